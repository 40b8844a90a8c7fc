"""Ranking loss by hand and against PyTorch, mining, the loop and its resuming."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train as train_py
from model import WARNINGS, InputError, NetVLADModel, half_precision
from train import (
    TupleLoader,
    centralize_gradients,
    diagnose,
    draw_random,
    hardest_negatives,
    ranking_loss,
    rate_factor,
    train,
    validate,
    violates,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def test_loss_is_pytorchs_triplet_margin_loss_and_squared_by_hand():
    q, p, n = unit(6, 8, seed=1), unit(6, 8, seed=2), unit(6, 8, seed=3)
    expected = torch.nn.functional.triplet_margin_loss(q, p, n, margin=0.1, eps=0, reduction="none")
    torch.testing.assert_close(ranking_loss(q, p, n, 0.1)[:, 0], expected)
    squared = [max(0, float((a - b) @ (a - b) + 0.1 - (a - c) @ (a - c))) for a, b, c in zip(q, p, n)]
    torch.testing.assert_close(ranking_loss(q, p, n, 0.1, squared=True)[:, 0], torch.tensor(squared))


def test_several_negatives_are_as_many_triplets():
    q, p, n = unit(3, 8, seed=1), unit(3, 8, seed=2), unit(3, 4, 8, seed=3)
    together = ranking_loss(q, p, n)
    assert together.shape == (3, 4)
    for j in range(4):
        torch.testing.assert_close(together[:, j], ranking_loss(q, p, n[:, j])[:, 0])


def test_gradient_is_finite_where_query_and_positive_coincide():
    q = unit(2, 8).requires_grad_()
    ranking_loss(q, q, unit(2, 8, seed=5), margin=5.0).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_centralized_filters_do_not_answer_to_a_shift_of_their_input():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 2, 3)
    x = torch.rand(1, 3, 5, 5)
    layer(x).square().sum().backward()
    bias = layer.bias.grad.clone()
    centralize_gradients(layer.parameters())
    change = torch.nn.functional.conv2d(torch.ones(1, 3, 3, 3), layer.weight.grad)
    assert float(change.abs().max()) < 1e-4 < float(layer.weight.grad.abs().max())
    assert torch.equal(bias, layer.bias.grad)


def triplets(count: int, channels: int, size: int) -> list:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, channels, size, size, generator=generator)
    batches = []
    for _ in range(count):
        noise = 0.5 * torch.randn(3, 2, channels, size, size, generator=generator)
        batches.append((kinds + noise[0], kinds + noise[1], kinds.flip(0) + noise[2]))
    return batches


def test_cached_trunk_outputs_train_as_the_images_do():
    images = triplets(2, 3, 32)
    torch.manual_seed(0)
    source = NetVLADModel(4, pretrained=False)
    train(source, images, [], "cpu", epochs=0)  # calibrates and initializes
    results = []
    for start in (0, 24):
        model = NetVLADModel(4, pretrained=False)
        model.load_state_dict(source.state_dict())
        with torch.no_grad(), half_precision("cpu"):
            loader = [[model.trunk[:start](part) for part in batch] for batch in images]
        history = train(model, loader, loader, "cpu", epochs=2, margin=1.0, start=start)
        results.append([value for h in history for value in (h["train_loss"], h["val_loss"])])
    assert results[0] == pytest.approx(results[1], rel=0.01)
    assert min(results[0]) > 0


def test_training_lowers_the_loss_prints_both_and_freezes_what_it_should(capsys):
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = triplets(4, 3, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = train(model, images, images[:1], "cpu", epochs=3, lr=1e-3, margin=1.0)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert validate(model, images[:1], "cpu", margin=1.0) == pytest.approx(history[-1]["val_loss"])
    out = capsys.readouterr().out
    assert out.count("train loss") == out.count("val loss") == 3
    after = model.state_dict()
    assert not torch.equal(before["trunk.28.weight"], after["trunk.28.weight"])
    # Calibration rescales the frozen layers once; training must leave them as it found them.
    frozen = after["trunk.21.weight"].clone()
    train(model, images, [], "cpu", epochs=1, lr=1e-3, margin=1.0)
    assert torch.equal(frozen, model.state_dict()["trunk.21.weight"])


def test_a_loaded_model_is_not_initialized_again():
    torch.manual_seed(0)
    source = NetVLADModel(4, pretrained=False)
    model = NetVLADModel(4, pretrained=False)
    model.load_state_dict(source.state_dict())
    train(model, triplets(1, 3, 32), [], "cpu", epochs=0)
    assert torch.equal(model.netvlad.centers, source.netvlad.centers)
    fresh = NetVLADModel(4, pretrained=False)
    train(fresh, triplets(1, 3, 32), [], "cpu", epochs=0)
    assert fresh.netvlad.initialized


def test_precisions_agree_and_float32_computes_in_it():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    image = torch.rand(2, 3, 64, 64)
    train(model, [(image, image, image)], [], "cpu", epochs=0)
    seen = {}
    for precision in ("float32", "bf16"):
        model.precision = precision
        with torch.no_grad(), model.autocast("cpu"):
            computed = model.trunk(image).dtype
            assert computed == (torch.float32 if precision == "float32" else torch.bfloat16)
            seen[precision] = model(image)
            # Half-precision inputs, as a cache holds them, suit either.
            assert model(model.trunk[:24](image).bfloat16(), 24).dtype == torch.float32
    assert 0.95 < float((seen["float32"] * seen["bf16"]).sum(1).min()) < 1 - 1e-7


# ---------------------------------------------------------------- mining


def places(count: int = 6, size: int = 2, seed: int = 0) -> SimpleNamespace:
    """Data of `count` places 1 km apart: a query, index images 4, 8 and 20 m from it."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(count, 512, size, size, generator=generator)
    noise = torch.randn(4, count, 512, size, size, generator=generator)
    at = np.arange(count)[:, None] * [1000.0, 0]
    index = (looks + noise[:3]).transpose(0, 1).flatten(0, 1)
    away = np.tile([[0, 4.0], [0, 8.0], [0, 20.0]], (count, 1))
    return SimpleNamespace(
        utm_query=at, utm_index=np.repeat(at, 3, axis=0) + away, threshold=25.0,
        cached=(looks + noise[3], index),
        queries=SimpleNamespace(paths=[f"q{i}" for i in range(count)]),
        index=SimpleNamespace(paths=[f"i{i}" for i in range(3 * count)]),
    )  # fmt: skip


def a_model(seed: int = 0) -> NetVLADModel:
    torch.manual_seed(seed)
    model = NetVLADModel(4, pretrained=False)
    model.netvlad.initialize(unit(200, 512))
    return model


def loader(data: SimpleNamespace, **options) -> TupleLoader:
    count = len(data.utm_query)
    options = {"batch_size": 2, "start": 24, "negatives": 3} | options
    return TupleLoader(data, np.arange(count - 1), np.array([count - 1]), torch.device("cpu"), **options)


def test_mined_tuples_are_those_a_plain_loop_finds():
    data, model = places(), a_model()
    data.utm_query[4] += [0, 100]  # nothing within 10 m: its nearest, 80 m away, is the positive
    tuples = loader(data, margin=10.0)
    for _ in tuples.epoch(model, 1):
        pass
    with torch.no_grad(), half_precision("cpu"):
        q, d = (model(x.contiguous(memory_format=torch.channels_last), 24) for x in data.cached)
    similarity = (torch.cat([q, d]).float() @ d.float().T).numpy()
    utm = np.concatenate([data.utm_query, data.utm_index])  # index images are queries too
    assert sorted(tuples.window.queries)[:5] == [0, 1, 2, 3, 4] and len(tuples.window.queries) == 10
    for query, p, n in zip(tuples.window.queries, tuples.window.positives, tuples.window.negatives):
        near, far = [], []
        for i in range(18):
            distance = np.linalg.norm(data.utm_index[i] - utm[query])
            near += [i] * int(distance <= 10 and i != query - 6)
            far += [i] * int(distance > 25)
        near = near or [14]
        assert p == max(near, key=lambda i: similarity[query, i])
        assert list(n) == sorted(far, key=lambda i: -similarity[query, i])[:3]
    assert tuples.window.used.all()


def test_index_images_are_queries_too_but_not_their_own_positives_nor_near_a_held_out_query():
    data, model = places(), a_model()
    tuples, joined = loader(data, margin=10.0), []
    for epoch in (1, 2):
        q, p, _ = (torch.cat(parts) for parts in zip(*tuples.epoch(model, epoch)))
        queries, positives = tuples.window.queries, tuples.window.positives
        of_index = queries >= 6
        rows = queries[of_index] - 6
        assert sorted(queries[~of_index]) == [0, 1, 2, 3, 4] and len(set(rows)) == 5
        assert torch.equal(q[of_index], data.cached[1][rows]) and torch.equal(p, data.cached[1][positives])
        # Of a place's three images those at 4 and 8 m have each other within 10 m, that at 20 m none.
        assert set(rows % 3) == {0, 1} and np.array_equal(positives[of_index], rows + 1 - 2 * (rows % 3))
        assert rows.max() < 15  # the query of the last place is held out
        joined.append(set(rows))
    assert joined[0] != joined[1]
    plain = loader(data, margin=10.0, mining="random")
    assert len(plain) == 3 and len(tuples) == 5 and plain.joining == 0


def test_negatives_come_from_the_pool_and_what_was_hard_before():
    similarity = np.arange(100) / 100
    rng = np.random.default_rng(0)
    rows = hardest_negatives(similarity, np.arange(50), np.array([49, 7]), 5, rng)
    assert 5 <= len(rows) <= 7 and {49, 7} <= set(rows) <= set(range(50))
    assert list(rows) == sorted(rows, reverse=True)
    few = hardest_negatives(similarity, np.array([3, 9]), np.array([], int), 1000, rng)
    assert list(few) == [9, 3]


def test_a_query_without_negatives_is_skipped_and_few_negatives_repeat():
    data = places(2)
    tuples = loader(data, margin=10.0, negatives=8)
    (batch,) = tuples.epoch(a_model(), 1)
    assert [tuple(part.shape[:2]) for part in batch] == [(2, 512), (2, 512), (2, 8)]
    assert set(tuples.window.negatives.ravel()) == {3, 4, 5}
    data.utm_index[:] = data.utm_query[0]
    (batch,) = loader(data, margin=10.0).epoch(a_model(), 1)
    assert batch == []


def test_a_tuple_is_used_only_if_its_loss_is_positive():
    q, p, n = unit(50, 6, seed=1), unit(50, 6, seed=2), unit(50, 3, 6, seed=3)
    for squared in (False, True):
        loss = ranking_loss(q, p, n, 0.1, squared)
        for i in range(50):
            found = violates(float(q[i] @ p[i]), (n[i] @ q[i]).numpy(), 0.1, squared)
            assert np.array_equal(found, (loss[i] > 0).numpy())


def test_random_tuples_keep_the_distances_of_the_assignment():
    data = places()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p, n = draw_random(data.utm_query[2], data.utm_index, 25.0, 4, rng)
        assert p in (6, 7, 8) and len(set(n)) == 4 and not {6, 7, 8} & set(n)
    p, n = draw_random(np.array([500.0, 0]), data.utm_index[:1], 25.0, 2, rng)
    assert p == 0 and list(n) == [0, 0]
    p, n = draw_random(np.array([0.0, 0]), data.utm_index[:3], 25.0, 2, rng)
    assert list(n) == [2, 2]


def test_every_second_epoch_takes_mirror_images_and_the_score_never_does():
    data, model, made = places(), a_model(), []
    other = data.cached[0].flip(3), data.cached[1].flip(0, 3)  # in another order, so that ranks differ
    tuples = loader(data, margin=10.0, mirrored=lambda: made.append(1) or other)
    score = tuples.score(model)
    for epoch in (1, 2, 3, 4):
        (q, p, n), *_ = tuples.epoch(model, epoch)
        assert len(made) == (epoch > 1)  # not before they are needed, and once
        queries, index = data.cached if epoch % 2 else other
        rows, w = tuples.window.queries[:2], tuples.window
        assert torch.equal(q, torch.cat([queries, index])[rows])
        assert torch.equal(p, index[w.positives[:2]]) and torch.equal(n, index[w.negatives[:2]])
        with torch.inference_mode(), half_precision("cpu"):
            q, d = (model(x.contiguous(memory_format=torch.channels_last), 24) for x in (queries, index))
        i = int(rows[0])
        similar = d.float() @ torch.cat([q, d])[i].float()
        assert w.positives[0] == max(tuples.positives[i], key=lambda j: similar[j])
        assert torch.equal(tuples.score(model), score)
    assert not loader(data).mirrors and not loader(data, mining="random", mirrored=lambda: other).mirrors


def test_images_are_mirrored_too():
    data = places()
    images = torch.rand(24, 3, 32, 32)
    data.cached = None
    data.queries, data.index = [(x,) for x in images[:6]], [(x,) for x in images[6:]]
    tuples = loader(data, margin=10.0, start=0)
    for epoch in (1, 2):
        (q, p, _), *_ = tuples.epoch(a_model(), epoch)
        rows, positives = tuples.window.queries[:2], tuples.window.positives[:2]
        for found, expected in ((q, images[rows]), (p, images[6 + positives])):
            assert torch.equal(found, expected.flip(3) if epoch == 2 else expected)


def test_the_held_out_score_is_the_reciprocal_ranks_of_queries_and_of_index_images_near_them():
    data, model = places(), a_model()
    data.utm_index[15] += [0, 300]  # near nothing: no positive of the last query, and none of its own
    tuples = TupleLoader(data, np.arange(4), np.array([4, 5]), torch.device("cpu"), start=24)
    index = tuples.embed(model, "index", np.arange(18))
    queries = tuples.embed(model, "queries", np.array([4, 5]))
    expected = []
    rows = [(queries[0], 4, None), (queries[1], 5, None), *((index[i], i // 3, i) for i in (12, 13, 14, 16, 17))]
    for descriptor, place, own in rows:
        order = [j for j in np.argsort(-index @ descriptor) if j != own]
        right = [j for j in range(18) if j // 3 == place and j not in (15, own)]
        expected.append(1 / (1 + min(order.index(j) for j in right)))
    assert tuples.score(model).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


# ---------------------------------------------------------------- resuming


def epochs_of(data: SimpleNamespace, save=None, state=None, **options) -> tuple[NetVLADModel, list]:
    model = a_model()
    mirrored = tuple(part.flip(3) for part in data.cached)
    tuples = loader(data, margin=0.5, mirrored=lambda: mirrored, **options)
    history = train(
        model, tuples, [], "cpu", epochs=2, margin=0.5, start=24, save=save, state=state,
    )  # fmt: skip
    return model, history


def test_descriptors_are_made_anew_for_each_window_of_queries(monkeypatch):
    monkeypatch.setattr(train_py, "REFRESH_QUERIES", 4)
    tuples, model = loader(places(12), margin=10.0), a_model()
    windows = []
    for _ in tuples.epoch(model, 1):
        if not windows or tuples.window is not windows[-1]:
            windows.append(tuples.window)
    assert [len(window.queries) for window in windows] == [4, 4, 4, 4, 4, 2]
    drawn = sorted(q for window in windows for q in window.queries)
    assert drawn[:11] == list(range(11)) and len(set(drawn)) == 22


@pytest.mark.parametrize(("mining", "steps"), [("hard", 7), ("random", 4)])
def test_a_run_goes_on_from_any_step_to_the_same_weights(mining, steps, monkeypatch):
    monkeypatch.setattr(train_py, "SAVE_SECONDS", 0)  # a checkpoint after every step
    monkeypatch.setattr(train_py, "REFRESH_QUERIES", 4)  # a window of two steps
    data, states = places(8), []
    whole, history = epochs_of(data, lambda state: states.append(copy.deepcopy(state)), mining=mining)
    assert [(s["epoch"], s["step"]) for s in states] == [
        *((1, step + 1) for step in range(steps)), (2, 0),
        *((2, step + 1) for step in range(steps)), (3, 0),
    ]  # fmt: skip
    for state in states[1 : 2 * steps + 1 : steps - 1]:
        later = []
        resumed, again = epochs_of(data, later.append, copy.deepcopy(state), mining=mining)
        done = (state["epoch"] - 1) * steps + state["step"]
        assert len([s for s in later if s["step"]]) == 2 * steps - done  # finished steps are not repeated
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for a, b in zip(history, again):
            assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, nan_ok=True)


def test_the_seed_decides_the_result():
    data = places(8)
    weights = [epochs_of(data, seed=s)[0].state_dict()["trunk.28.weight"] for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_epoch_that_ranks_best_is_kept_and_ties_within_the_standard_error_go_to_the_lower_loss():
    parameter, best, kept = {"w": torch.zeros(1)}, {}, []
    ranks = [
        ([0.5, 0.5, 0.5, 0.5], 0.1),
        ([0.7, 0.8, 0.7, 0.8], 0.3),  # better by 0.25, its standard error 0.025
        ([0.8, 0.6, 0.8, 0.8], 0.2),  # equal on the mean, lower loss
        ([0.9, 0.9, 0.5, 0.8], 0.25),  # better by 0.025, but its standard error is 0.1: a tie, higher loss
        ([0.4, 0.4, 0.4, 0.4], 0.0),  # worse
    ]
    for epoch, (each, loss) in enumerate(ranks, 1):
        parameter["w"].fill_(epoch)
        train_py._keep_best(best, {"epoch": epoch, "val_loss": loss}, torch.tensor(each), parameter)
        kept.append(best["epoch"])
    assert kept == [1, 2, 3, 3, 3] and float(best["weights"]["w"]) == 3


def test_a_loss_that_is_no_number_names_the_files():
    data = places()
    data.cached[0][:] = float("nan")
    with pytest.raises(InputError, match=r"epoch 1, batch 1 \(q\d, q\d, i\d+, .*--lr"):
        epochs_of(data, mining="random")
    with pytest.raises(InputError, match="not a number in epoch 1, batch 1:"):
        batch = [torch.full((1, 3, 32, 32), float("nan"))] * 3
        train(a_model(), [batch], [], "cpu", epochs=1)


def test_what_goes_wrong_is_named(capsys):
    assert "collapsed" in diagnose(0.1002, 1.0, 0.1)
    assert "every triplet" in diagnose(0.4, 1.0, 0.1)
    assert "nothing is left" in diagnose(0.0, 0.0, 0.1)
    assert diagnose(0.09, 0.9, 0.1) is None
    data = places()
    data.cached[0][:], data.cached[1][:] = data.cached[0][:1], data.cached[0][:1]  # all look alike
    epochs_of(data)
    assert any("epoch 1: the descriptor has collapsed" in text for text in WARNINGS)
    assert "collapsed" in capsys.readouterr().err


def test_the_rate_climbs_then_falls_to_nothing():
    shares = np.linspace(0, 1, 101)
    factors = np.array([rate_factor(share) for share in shares])
    assert factors[0] == factors[-1] == 0 and factors.argmax() == 10 and factors.max() > 0.97
    assert (np.diff(factors[:11]) > 0).all() and (np.diff(factors[10:]) < 0).all()


# ---------------------------------------------------------------- several processes

PROCESS = """
import sys, torch
import torch.distributed as dist
from tests.test_train import a_model, loader, places
from train import train
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
results = {}
for mining in ("random", "hard"):
    data, model = places(8), a_model(seed=rank)  # process 0's weights are what counts
    model.precision = "float32"
    tuples = loader(data, margin=0.5, mining=mining, batch_size=3)
    fetched, fetch = [], tuples.fetch
    tuples.fetch = lambda t: fetched.append(t.queries.tolist()) or fetch(t)
    history = train(model, tuples, [], "cpu", epochs=2, margin=0.5, start=24)
    weights = model.state_dict()["trunk.28.weight"]
    results[mining] = {"history": history, "fetched": fetched, "weights": weights}
torch.save(results, f"{folder}/{rank}.pth")
"""


def test_two_processes_train_as_one_does_on_items_of_their_own(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    root = Path(train_py.__file__).parent
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for mining in ("random", "hard"):
        one = a_model()
        one.precision = "float32"
        tuples = loader(places(8), margin=0.5, mining=mining, batch_size=3)
        history = train(one, tuples, [], "cpu", epochs=2, margin=0.5, start=24)
        first, second = (result[mining] for result in results)
        assert torch.equal(first["weights"], second["weights"])
        torch.testing.assert_close(first["weights"], one.state_dict()["trunk.28.weight"], atol=1e-4, rtol=0)
        for mine, theirs in zip(history, first["history"]):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
            assert mine["skipped"] == theirs["skipped"]
        seen = [query for a, b in zip(first["fetched"], second["fetched"]) for query in a + b]
        for a, b in zip(first["fetched"], second["fetched"]):
            assert not set(a) & set(b)
        if mining == "random":
            assert sorted(seen) == sorted(2 * list(range(7)))
