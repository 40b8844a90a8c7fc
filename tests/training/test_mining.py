"""Tuples against plain loops and hand counts, the score that chooses the epoch, resuming."""

import copy

import numpy as np
import pytest
import torch

import train as train_py
from dataset.lists import draw_random, read_split
from model import half_precision
from tests.training.places import a_model, places, tuples_of
from train import RankingLoss, ranking_loss, train
from training import mining as mining_py
from training.mining import HeldOutTuples, hardest_negatives, reciprocal_rank, violates


@pytest.fixture
def three_negatives(monkeypatch):
    """All of the three hardest, so that a tuple does not depend on what is drawn."""
    monkeypatch.setitem(mining_py.NEGATIVES, "hard", 3)
    monkeypatch.setattr(mining_py, "HARDEST", 3)


@pytest.fixture
def the_two_hardest(monkeypatch):
    monkeypatch.setattr(mining_py, "HARDEST", 2)


def described(model, outputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), half_precision("cpu"):
        return model(outputs.contiguous(memory_format=torch.channels_last)).float()


def by_brute_force(data, similarity, query: int, radius: float = 10.0) -> tuple[int, list[int]]:
    """The best positive of a row of the inputs, None without one, and its three hardest negatives."""
    utm = np.concatenate([data.utm_query, data.utm_index])
    near, far = [], []
    for i in range(len(data.utm_index)):
        distance = np.linalg.norm(data.utm_index[i] - utm[query])
        elsewhere = query < len(data.utm_query) or distance > 1
        near += [i] * int(distance <= radius and elsewhere)
        far += [i] * int(distance > 25)
    best = max(near, key=lambda i: similarity[query, i], default=None)
    return best, sorted(far, key=lambda i: -similarity[query, i])[:3]


def test_mined_tuples_are_those_a_plain_loop_finds(three_negatives):
    data = places()
    data.utm_query[4] += [0, 100]  # nothing within 10 m: dropped, not given its nearest
    data.utm_index[0:3] = data.utm_index[1]  # views from one position, as Pittsburgh's
    tuples, model = tuples_of(data, margin=10.0, batch_size=100)
    assert tuples.dropped == 1
    every = described(model, data.outputs)
    similarity = (every @ every[6:].T).numpy()
    for epoch in (1, 3):
        for _ in tuples.epoch(model, epoch):
            found = tuples.window
        assert sorted(found.queries)[:4] == [0, 1, 2, 3] and len(found) == 4 + 8
        assert not {6, 7, 8} & set(found.queries)  # another position is 13 m away
        for query, p, n in zip(found.queries, found.positives, found.negatives):
            positive, hardest = by_brute_force(data, similarity, query)
            assert p == positive and set(n) == set(hardest)


def test_negatives_are_drawn_anew_from_the_hardest_and_from_no_others(monkeypatch):
    monkeypatch.setattr(mining_py, "HARDEST", 3)
    data, drawn = places(), {}
    tuples, model = tuples_of(data, margin=10.0, batch_size=100)
    every = described(model, data.outputs)
    similarity = (every @ every[6:].T).numpy()
    for epoch in range(1, 40, 2):
        list(tuples.epoch(model, epoch))
        for query, n in zip(tuples.window.queries, tuples.window.negatives):
            assert len(set(n)) == 2
            drawn.setdefault(query, set()).add(frozenset(n))
    for query in range(5):
        hardest = by_brute_force(data, similarity, query)[1]
        assert drawn[query] == {frozenset(hardest) - {left} for left in hardest}


def test_views_of_pittsburgh_have_positives_of_other_positions_only(pittsburgh):
    data = read_split(pittsburgh, "train")
    data.outputs = torch.zeros(len(data.queries) + len(data.index), 512, 1, 1)
    tuples, _ = tuples_of(data)
    views, apart = 6, []
    for row in range(len(data.queries), len(tuples.utm)):
        distance = np.hypot(*(data.utm_index[tuples.positives[row]] - tuples.utm[row]).T)
        assert len(distance) in (0, views)  # the panorama next to it, whole
        apart += distance.tolist()
    assert apart and min(apart) == max(apart) == 9.0
    assert tuples.dropped == views  # of the query panorama that is 15 m from its place


def test_index_images_are_queries_too_but_not_their_own_positives_nor_near_a_held_out_query(
    monkeypatch,
):
    monkeypatch.setattr(mining_py, "JOINING", 1)
    data, joined = places(), []
    tuples, model = tuples_of(data, margin=10.0, batch_size=100)
    for epoch in (1, 3):
        q, p, _ = (torch.cat(parts) for parts in zip(*tuples.epoch(model, epoch)))
        queries, positives = tuples.window.queries, tuples.window.positives
        of_index = queries >= 6
        rows = queries[of_index] - 6
        assert sorted(queries[~of_index]) == [0, 1, 2, 3, 4] and len(set(rows)) == 5
        assert torch.equal(q, data.outputs[queries]) and torch.equal(p, data.outputs[6 + positives])
        # Of a place's three images those at 4 and 8 m have each other within 10 m, that at 20 m none.
        partners = rows + 1 - 2 * (rows % 3)
        assert set(rows % 3) == {0, 1} and np.array_equal(positives[of_index], partners)
        assert rows.max() < 15  # the query of the last place is held out
        joined.append(set(rows))
    assert joined[0] != joined[1]
    plain, _ = tuples_of(data, margin=10.0, mining="random")
    assert len(plain) == 3 and len(tuples) == 1 and plain.joining == 0


@pytest.mark.parametrize(("few", "each", "joining"), [(1000, 4, 10), (1000, 1, 5), (8, 4, 3), (5, 4, 0), (4, 4, 0)])
def test_index_images_join_up_to_a_number_and_to_so_many_for_each_query(few, each, joining, monkeypatch):
    """Five queries, and ten index images that can join."""
    monkeypatch.setattr(mining_py, "FEW_QUERIES", few)
    monkeypatch.setattr(mining_py, "JOINING", each)
    assert tuples_of(places())[0].joining == joining


def test_negatives_come_from_the_pool_and_what_was_hard_before():
    similarity = np.arange(100) / 100
    rng = np.random.default_rng(0)
    rows = hardest_negatives(similarity, np.arange(50), np.array([49, 7]), 5, rng)
    assert 5 <= len(rows) <= 7 and {49, 7} <= set(rows) <= set(range(50))
    assert list(rows) == sorted(rows, reverse=True)
    few = hardest_negatives(similarity, np.array([3, 9]), np.array([], int), 1000, rng)
    assert list(few) == [9, 3]


def test_a_query_without_negatives_is_skipped_and_few_negatives_repeat(monkeypatch):
    monkeypatch.setitem(mining_py.NEGATIVES, "hard", 8)
    data = places(2)
    tuples, model = tuples_of(data, margin=10.0)
    batch, _ = tuples.epoch(model, 1)
    assert [tuple(part.shape[:2]) for part in batch] == [(2, 512), (2, 512), (2, 8)]
    assert set(tuples.window.negatives.ravel()) == {3, 4, 5}
    data.utm_index[:] = data.utm_query[0]
    tuples, model = tuples_of(data, margin=10.0)
    assert list(tuples.epoch(model, 1)) == []


def test_steps_are_filled_with_tuples_that_have_something_to_teach(the_two_hardest, monkeypatch):
    monkeypatch.setattr(mining_py, "REFRESH_QUERIES", 6)
    data = places(12)
    data.outputs[6:12] = data.outputs[12 + 3 * 6 :: 3][:6]  # these queries are their positives
    model = a_model()
    model.freeze_below(24)
    tuples, model = tuples_of(data, model, margin=0.2, batch_size=3)
    sizes, shares, seen = [], [], []
    for step, batch in enumerate(tuples.epoch(model, 1)):
        assert tuples.size(step) == len(batch[0])
        sizes.append(len(batch[0]))
        shares.append(tuples.share(step))
        seen += tuples.in_step(step).queries.tolist()
    every = described(model, data.outputs)
    similarity = (every @ every[12:].T).numpy()
    teaching = {
        q
        for q in range(11)
        if violates(
            similarity[q, by_brute_force(data, similarity, q)[0]],
            similarity[q, by_brute_force(data, similarity, q)[1][:2]],
            0.2,
        ).any()
    }
    assert {q for q in seen if q < 12} == teaching and len(teaching) < 11
    assert set(sizes[:-1]) == {3} and len(seen) == len(set(seen))
    assert 0 < shares[0] and shares == sorted(shares) and shares[-1] < 1


def test_many_queries_need_neither_index_images_nor_mirror_images(monkeypatch):
    monkeypatch.setattr(mining_py, "FEW_QUERIES", 4)
    data = places()
    tuples, model = tuples_of(data, margin=10.0, batch_size=100)
    assert tuples.joining == 0
    (q, *_), *_ = tuples.epoch(model, 2)
    assert torch.equal(q, data.outputs[tuples.window.queries]) and len(q) == 5


def test_a_tuple_is_used_only_if_its_loss_is_positive():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(50, 5, 6, generator=generator), dim=2)
    q, p, n = x[:, 0], x[:, 1], x[:, 2:]
    loss = ranking_loss(q, p, n, 0.1)
    for i in range(50):
        found = violates(float(q[i] @ p[i]), (n[i] @ q[i]).numpy(), 0.1)
        assert np.array_equal(found, (loss[i] > 0).numpy())
    assert violates(np.nan, np.full(2, np.nan), 0.1).all()  # so that training says that it diverged


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


@pytest.mark.parametrize("mining", ["hard", "random"])
def test_held_out_tuples_are_chosen_as_in_training_and_none_is_skipped(mining, the_two_hardest):
    data = places()
    data.outputs[5] = data.outputs[6 + 15]  # nothing to learn from it
    tuples, model = tuples_of(data, margin=0.01, mining=mining)
    loader = HeldOutTuples(tuples, model, np.array([1, 4, 5]))
    first, again = list(loader), list(loader)
    assert [len(batch[0]) for batch in first] == [2, 1] and len(loader) == 2
    for a, b in zip(first, again):
        assert all(torch.equal(*parts) for parts in zip(a, b))
    q, p, n = (torch.cat(parts) for parts in zip(*first))
    assert torch.equal(q, data.outputs[[1, 4, 5]])
    every = described(model, data.outputs)
    similarity = (every @ every[6:].T).numpy()
    for query, positive, negatives in zip((1, 4, 5), p, n):
        rows = [
            int((data.outputs[6:] == x).flatten(1).all(dim=1).nonzero())
            for x in (positive, *negatives)
        ]
        if mining == "hard":
            best, hardest = by_brute_force(data, similarity, query)
            assert rows[0] == best and set(rows[1:]) == set(hardest[:2])
        else:
            assert rows[0] // 3 == query != rows[1] // 3


def test_every_second_epoch_flips_its_inputs_and_nothing_else_does():
    data = places()
    tuples, model = tuples_of(data, margin=10.0)
    score, _ = tuples.judge(model)
    held_out = list(HeldOutTuples(tuples, model, np.array([5])))
    every = described(model, data.outputs)
    for epoch in (1, 2, 3, 4):
        q, p, n = next(tuples.epoch(model, epoch))
        outputs = data.outputs if epoch % 2 else data.outputs.flip(3)
        w = tuples.window
        assert torch.equal(q, outputs[w.queries[:2]])
        assert torch.equal(p, outputs[6 + w.positives[:2]])
        assert torch.equal(n, outputs[6 + w.negatives[:2]])
        i = int(w.queries[0])
        similar = every[6:] @ every[i]
        assert w.positives[0] == max(tuples.positives[i], key=lambda j: similar[j])
        assert torch.equal(tuples.judge(model)[0], score)
        (batch,) = HeldOutTuples(tuples, model, np.array([5]))
        assert all(torch.equal(*pair) for pair in zip(batch, held_out[0]))
    plain, model = tuples_of(data, mining="random")
    q, *_ = next(plain.epoch(model, 2))
    assert torch.equal(q, data.outputs[plain.window.queries[:2]])


def test_the_judge_gives_reciprocal_ranks_of_held_out_queries_and_of_index_images_near_them():
    data = places()
    data.utm_index[15] += [
        0,
        300,
    ]  # near nothing: no positive of the last query, and none of its own
    tuples, model = tuples_of(data, held_out=2)
    every = described(model, data.outputs).numpy()
    queries, index = every[4:6], every[6:]
    near = [(index[i], i // 3, i) for i in (12, 13, 14, 16, 17)]
    expected = []
    for descriptor, place, own in [(queries[0], 4, None), (queries[1], 5, None), *near]:
        order = [j for j in np.argsort(-index @ descriptor) if j != own]
        right = [j for j in range(18) if j // 3 == place and j not in (15, own)]
        expected.append(1 / (1 + min(order.index(j) for j in right)))
    scores, shown = tuples.judge(model)
    assert scores.tolist() == pytest.approx(expected)
    assert shown == {"held_out_mrr": pytest.approx(np.mean(expected))}
    assert len(set(expected)) > 1


# ---------------------------------------------------------------- resuming


def trained(data, save=None, state=None, **options) -> tuple:
    tuples, model = tuples_of(data, **options)
    objective = RankingLoss(0.5)
    history = train(
        model,
        tuples,
        [],
        "cpu",
        epochs=2,
        objective=objective,
        judge=tuples.judge,
        save=save,
        state=state,
    )
    return model, history


def test_descriptors_are_made_anew_for_each_window_of_queries(monkeypatch):
    monkeypatch.setattr(mining_py, "REFRESH_QUERIES", 4)
    tuples, model = tuples_of(places(12), margin=10.0)
    drawn, described = [], []
    draw, describe = tuples.draw, tuples.inputs.describe
    tuples.draw = lambda m, queries, key: drawn.append(queries) or draw(m, queries, key)
    tuples.inputs.describe = lambda m, rows, what: described.append(what) or describe(m, rows, what)
    assert len(list(tuples.epoch(model, 1))) == 17  # of 2 of 11 queries and 22 index images
    assert [len(queries) for queries in drawn] == [4] * 8 + [1]
    assert described.count("index images") == 9
    everyone = np.concatenate(drawn)
    assert sorted(everyone)[:11] == list(range(11)) and len(set(everyone)) == 33


@pytest.mark.parametrize("mining", ["hard", "random"])
def test_a_run_goes_on_from_any_step_to_the_same_weights(mining, monkeypatch):
    monkeypatch.setattr(train_py, "SAVE_SECONDS", 0)  # a checkpoint after every step
    monkeypatch.setattr(mining_py, "REFRESH_QUERIES", 4)  # a window of two steps
    data, states = places(8), []
    whole, history = trained(data, lambda s: states.append(copy.deepcopy(s)), mining=mining)
    steps = [(s["epoch"], s["step"]) for s in states]
    last = steps.index((2, 0))
    assert steps[:last] == [(1, step) for step in range(1, last + 1)] and steps[-1] == (3, 0)
    for start in (0, 1, last - 1, last, last + 2, len(steps) - 2):
        later = []
        resumed, again = trained(data, later.append, copy.deepcopy(states[start]), mining=mining)
        assert [(s["epoch"], s["step"]) for s in later] == steps[start + 1 :]  # none is repeated
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for a, b in zip(history, again):
            assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, nan_ok=True)


def test_the_seed_decides_the_result():
    data = places(8)
    losses = [[epoch["train_loss"] for epoch in trained(data, seed=s)[1]] for s in (0, 0, 1)]
    assert losses[0] == losses[1] and losses[0] != losses[2]


def test_the_mean_loss_of_an_epoch_is_that_of_the_tuples_used():
    data = places()
    tuples, model = tuples_of(data, batch_size=100)
    history = train(model, tuples, [], "cpu", epochs=1, lr=1e-12, objective=RankingLoss(0.5))
    every = described(a_model(), data.outputs)
    w = tuples.window
    each = [
        ranking_loss(every[[q]], every[[6 + p]], every[None, 6 + n], 0.5).mean()
        for q, p, n in zip(w.queries, w.positives, w.negatives)
    ]
    assert history[0]["train_loss"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-3)
    assert history[0]["skipped"] == 15 - len(each)


def test_reciprocal_ranks_by_hand_with_others_first_among_equals():
    row = np.array([0.9, 0.5, 0.7, 0.7, -np.inf])
    assert reciprocal_rank(row, np.array([1, 2])) == 1 / 3
    assert reciprocal_rank(row, np.array([0, 1])) == 1
    assert reciprocal_rank(np.ones(5), np.array([2])) == 1 / 5  # all look alike
    assert reciprocal_rank(row, np.array([4])) is None
    assert reciprocal_rank(np.full(5, np.nan), np.array([2])) == 1 / 5  # of a model that diverged


def test_an_untrained_model_that_ranks_better_is_kept():
    tuples, model = tuples_of()
    before, scores = model.trunk[28].weight.clone(), iter((0.9, 0.5, 0.6))
    train(model, tuples, [], "cpu", epochs=2, judge=lambda m: (torch.full((9,), next(scores)), {}))
    assert torch.equal(model.trunk[28].weight, before)


@pytest.mark.parametrize(("near", "radius", "dropped"), [(3, 10, 2), (2, 25, 0)])
def test_where_few_queries_have_a_positive_near_them_farther_ones_count(near, radius, dropped):
    data = places()  # of the five trained on, `near` have index images within 10 m, all within 25 m
    data.utm_index[3 * near : 15, 1] = 20
    tuples, model = tuples_of(data, margin=10.0)
    assert (tuples.radius_m, tuples.dropped) == (radius, dropped)
    assert tuples.rows.tolist() == list(range(5 - dropped)) and list(tuples.epoch(model, 1))
