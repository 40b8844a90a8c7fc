"""The ranking loss by hand and against PyTorch, and the loop with plain loaders and with others."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import train as train_py
from model import WARNINGS, DescriptorModel, InputError, NetVLADModel, half_precision
from recognition.optimization import make_optimizer
from tests.training.places import a_model, tuples_of
from train import (
    RankingLoss,
    centralize_gradients,
    ranking_loss,
    rate_factor,
    train,
    validate,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def test_loss_is_pytorchs_triplet_margin_loss():
    q, p, n = unit(6, 8, seed=1), unit(6, 8, seed=2), unit(6, 8, seed=3)
    expected = nn.functional.triplet_margin_loss(q, p, n, margin=0.1, eps=0, reduction="none")
    torch.testing.assert_close(ranking_loss(q, p, n, 0.1)[:, 0], expected)


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
    layer = nn.Conv2d(3, 2, 3)
    x = torch.rand(1, 3, 5, 5)
    layer(x).square().sum().backward()
    bias = layer.bias.grad.clone()
    centralize_gradients(layer.parameters())
    change = nn.functional.conv2d(torch.ones(1, 3, 3, 3), layer.weight.grad)
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


def test_frozen_outputs_train_as_the_images_do():
    images = triplets(2, 3, 32)
    torch.manual_seed(0)
    source = NetVLADModel(4, pretrained=False)
    train(source, images, [], "cpu", epochs=0)  # calibrates and initializes
    results = []
    for cached in (False, True):
        model = NetVLADModel(4, pretrained=False)
        model.load_state_dict(source.state_dict())
        loader = images
        if cached:
            with torch.no_grad(), half_precision("cpu"):
                loader = [[model.frozen_part(part) for part in batch] for batch in images]
        objective = RankingLoss(margin=1.0)
        history = train(model, loader, loader, "cpu", epochs=2, objective=objective)
        results.append([value for h in history for value in (h["train_loss"], h["val_loss"])])
    assert results[0] == pytest.approx(results[1], rel=0.01)
    assert min(results[0]) > 0


def test_training_lowers_the_loss_prints_both_and_freezes_what_it_should(capsys):
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images, objective = triplets(4, 3, 32), RankingLoss(margin=1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = train(model, images, images[:1], "cpu", epochs=3, lr=1e-3, objective=objective)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    kept = min(history, key=lambda epoch: epoch["val_loss"])
    found = validate(model, images[:1], "cpu", objective=objective)
    assert found == pytest.approx(kept["val_loss"])
    out = capsys.readouterr().out
    assert out.count("train loss") == out.count("val loss") == 3
    after = model.state_dict()
    assert not torch.equal(before["trunk.28.weight"], after["trunk.28.weight"])
    # Calibration rescales the frozen layers once; training must leave them as it found them.
    frozen = after["trunk.21.weight"].clone()
    train(model, images, [], "cpu", epochs=1, lr=1e-3, objective=objective)
    assert "val loss nan" in capsys.readouterr().out
    assert torch.equal(frozen, model.state_dict()["trunk.21.weight"])


def test_a_collapsed_last_epoch_is_not_what_a_plain_loader_keeps():
    images, weights, losses = triplets(2, 3, 32), [], []

    class Spoiling(RankingLoss):
        """From the third epoch on the loss of everything is what a collapsed descriptor has."""

        def forward(self, model, batch, device):
            if not torch.is_grad_enabled():
                weights.append(model.trunk[28].weight.clone())
                losses.append(0.5 if len(weights) < 3 else 0.6)
                return super().forward(model, batch, device) * 0 + losses[-1]
            return super().forward(model, batch, device)

    model = NetVLADModel(4, pretrained=False)
    train(model, images, images[:1], "cpu", epochs=4, lr=1e-3, objective=Spoiling(1.0))
    assert losses == [0.5, 0.5, 0.6, 0.6]
    assert torch.equal(model.trunk[28].weight, weights[0])


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


def test_a_model_within_data_parallel_trains_as_it_does_alone():
    images, weights = triplets(2, 3, 32), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = NetVLADModel(4, pretrained=False)
        given = nn.DataParallel(model) if wrapped else model
        history = train(given, images, images, "cpu", epochs=1)
        assert validate(given, images, "cpu") == pytest.approx(history[0]["val_loss"])
        weights.append(model.trunk[28].weight)
    assert torch.equal(*weights)


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
            assert model(model.frozen_part(image).bfloat16()).dtype == torch.float32
    assert 0.95 < float((seen["float32"] * seen["bf16"]).sum(1).min()) < 1 - 1e-7


# ---------------------------------------------------------------- a scaled loss


def train_scaled(monkeypatch, half: torch.dtype | None, *, overflow: int = -1, **options) -> list:
    """The states that two epochs by SGD save; the gradient of step `overflow` is not finite."""
    monkeypatch.setattr(train_py, "half_type", lambda device, precision: half)  # of an older GPU
    tuples, model = tuples_of(mining="random")
    saved, steps = [], []

    def spoiled(gradient):
        steps.append(gradient)
        return gradient * float("inf") if len(steps) == overflow + 1 else gradient

    model.trunk[28].bias.register_hook(spoiled)
    how = {"objective": RankingLoss(1.0), "optimizer": torch.optim.SGD, "lr": 0.1}
    save = lambda state: saved.append(copy.deepcopy(state))
    train(model, tuples, [], "cpu", epochs=2, save=save, **how, **options)
    return saved


needs_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch 2.2 scales on CUDA GPUs only"
)


@needs_scaler
def test_a_scaled_loss_leads_to_the_same_weights(monkeypatch):
    plain, scaled = (train_scaled(monkeypatch, half)[-1] for half in (None, torch.float16))
    assert plain["scaler"] == {} and scaled["scaler"]["scale"] == 2**16
    for name, value in plain["weights"].items():  # a power of two changes no digit
        assert torch.equal(value, scaled["weights"][name])


@needs_scaler
def test_a_step_that_overflows_is_left_out_and_the_scale_halved_also_when_resumed(monkeypatch):
    monkeypatch.setattr(train_py, "SAVE_SECONDS", 0)
    whole = train_scaled(monkeypatch, torch.float16, overflow=1)
    first, second, third = (state["weights"] for state in whole[:3])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(second["trunk.28.weight"], third["trunk.28.weight"])
    assert [state["scaler"]["scale"] for state in whole] == [2**16, *(len(whole) - 1) * [2**15]]
    (again,) = train_scaled(monkeypatch, torch.float16, state=whole[-2])
    assert again["scaler"] == whole[-1]["scaler"]
    for name, value in whole[-1]["weights"].items():
        assert torch.equal(value, again["weights"][name])


# ---------------------------------------------------------------- other objectives


class Classifier(nn.Module):
    """An objective on batches (images, labels) with parameters and a rate of its own."""

    lr = 0.05

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, classes)

    def forward(self, model, batch, device):
        logits = self.layer(model(batch[0].to(device)))
        return nn.functional.cross_entropy(logits, batch[1].to(device), reduction="none")


def test_the_loop_serves_any_network_and_any_objective_with_parameters_of_its_own():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = DescriptorModel(trunk, head, 6)
    model.freeze_below(2)
    images = torch.randn(12, 3, 8, 8) + torch.arange(12)[:, None, None, None] % 3
    batches = [(images, torch.arange(12) % 3)] * 5
    objective, before = Classifier(3, 6), copy.deepcopy(model.state_dict())
    own = objective.layer.weight.clone()
    history = train(model, batches, batches[:1], "cpu", epochs=4, lr=1e-2, objective=objective)
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"trunk.2.weight", "trunk.2.bias"}  # not the statistics of what is frozen
    assert not torch.equal(own, objective.layer.weight)
    # Adam's first step moves each weight by its rate: the objective's is its own.
    optimizer = train_py.trained_parts(model, objective, 1e-2)[1]
    assert [group["peak"] for group in optimizer.param_groups] == [1e-2, 0.05]


# ---------------------------------------------------------------- averaged weights


def train_by_asgd(steps: list, judged: list, **options) -> tuple[dict, list[dict]]:
    """Two epochs by ASGD that averages from its third step on; the model's weights, and the history.

    steps, judged: get the trained weights after each step, and when the model is judged. The judge likes
    the averaged weights of the second epoch best.
    """
    tuples, model = tuples_of(mining="random")
    weights = [p for p in model.parameters() if p.requires_grad]

    def watched(groups):
        optimizer = make_optimizer("asgd", average_after=1)(groups)
        step = optimizer.step

        def step_and_note():
            step()
            steps.append([p.detach().clone() for p in weights])

        optimizer.step = step_and_note
        return optimizer

    def judge(model):
        judged.append([p.detach().clone() for p in weights])
        return torch.tensor([float(len(judged) + options.get("judged_before", 0))]), {
            "r": len(judged)
        }

    how = {"optimizer": watched, "judge": judge, "epochs": 2, "lr": 0.5}
    more = {k: v for k, v in options.items() if k != "judged_before"}
    history = train(model, tuples, [], "cpu", **how, **more)
    return model.state_dict(), history


def test_averaged_weights_are_judged_and_kept_beside_the_raw_ones():
    steps, judged, saved = [], [], []
    found, history = train_by_asgd(steps, judged, save=saved.append)
    mean = [torch.stack(each[2:]).mean(0) for each in zip(*steps)]
    assert len(judged) == 5  # untrained, and twice an epoch
    for place, wanted in ((3, steps[-1]), (4, mean)):
        for a, b in zip(judged[place], wanted):
            torch.testing.assert_close(a, b)
    assert not all(torch.allclose(a, b) for a, b in zip(mean, steps[-1]))
    assert [(epoch["r"], epoch["averaged r"]) for epoch in history] == [(2, 3), (4, 5)]
    best = saved[-1]["best"]
    assert best["averaged"] and best["epoch"] == 2
    for name, value in best["weights"].items():
        assert torch.equal(value, saved[-1]["averaged"][name]) and torch.equal(value, found[name])
    for a, b in zip(saved[-1]["weights"].values(), steps[-1]):
        assert torch.equal(a, b)  # the training goes on from the raw ones


def test_a_run_with_averages_is_taken_up_exactly(monkeypatch):
    monkeypatch.setattr(train_py, "SAVE_SECONDS", 0)
    whole = train_by_asgd([], [])[0]
    saved = []
    train_by_asgd([], [], save=lambda state: saved.append(copy.deepcopy(state)))
    (middle,) = [s for s in saved if (s["epoch"], s["step"]) == (2, 1)]
    again = train_by_asgd([], [], state=middle, judged_before=3)[0]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


# ---------------------------------------------------------------- which epoch, what goes wrong


def test_the_latest_epoch_within_the_standard_error_of_the_best_scores_is_kept():
    best, kept = {}, []
    means = [
        [0.5, 0.5, 0.5, 0.5],  # untrained
        [0.625, 0.375, 0.5, 0.5],  # no gain: it stays
        [0.7, 0.8, 0.7, 0.8],  # better
        [0.8, 0.6, 0.8, 0.7],  # worse by 0.025, its standard error 0.06: as good, and later
        [0.6, 0.7, 0.7, 0.9],  # worse than the best, epoch 2, by 0.025, standard error 0.041: later
        [0.6, 0.7, 0.6, 0.7],  # worse than the best by 0.1, standard error 0
        [0.9, 0.9, 0.8, 0.8],  # better
    ]
    for epoch, each in enumerate(means):
        scores, record = torch.tensor(each), {"epoch": epoch, "val_loss": 0.1}
        if train_py._is_kept(record, scores, best):
            best = {**record, "scores": train_py._best_scores(scores, best)}
        kept.append(best["epoch"])
    assert kept == [0, 0, 2, 3, 4, 4, 6]


def test_without_scores_the_lowest_loss_is_kept_and_without_a_loss_the_last_epoch():
    nan = float("nan")
    cases = ([0.3, 0.1, 0.2], 2), ([nan] * 3, 3), ([0.3, nan], 1), ([nan, 0.3, 0.4], 2)
    for losses, expected in cases:
        best = {}
        for epoch, loss in enumerate(losses, 1):
            record = {"epoch": epoch, "val_loss": loss}
            if train_py._is_kept(record, None, best):
                best = record
        assert best["epoch"] == expected


def test_a_loss_that_is_no_number_names_the_files():
    tuples, model = tuples_of(mining="random")
    tuples.inputs.cached[False][:6] = float("nan")
    with pytest.raises(InputError, match=r"epoch 1, batch 1 \(q\d, q\d, i\d+, .*--lr"):
        train(model, tuples, [], "cpu", epochs=1)
    with pytest.raises(InputError, match="not a number in epoch 1, batch 1:"):
        batch = [torch.full((1, 3, 32, 32), float("nan"))] * 3
        train(a_model(), [batch], [], "cpu", epochs=1)


def test_a_loader_without_batches_is_refused():
    for model in (a_model(), NetVLADModel(4, pretrained=False)):
        with pytest.raises(InputError, match="gives no batch"):
            train(model, [], [], "cpu", epochs=1)
    once = iter([[torch.rand(1, 3, 32, 32) for _ in range(3)]])
    assert len(train(a_model(), once, [], "cpu", epochs=2)) == 1
    assert "no batch in epoch 2" in WARNINGS[-1]


def test_what_goes_wrong_is_named(capsys):
    diagnose = RankingLoss(0.1).diagnose
    assert "collapsed" in diagnose(0.1002, 1.0)
    assert "every triplet" in diagnose(0.4, 1.0)
    assert "nothing is left" in diagnose(0.0, 0.0)
    assert diagnose(0.09, 0.9) is None
    tuples, model = tuples_of()
    tuples.inputs.cached[False][:] = tuples.inputs.cached[False][:1]  # all look alike
    train(model, tuples, [], "cpu", epochs=1)
    assert "WARNING: epoch 1: the descriptor has collapsed" in capsys.readouterr().err


def test_the_rate_climbs_then_falls_to_nothing():
    shares = np.linspace(0, 1, 101)
    factors = np.array([rate_factor(share) for share in shares])
    assert factors[0] == factors[-1] == 0 and factors.argmax() == 10 and factors.max() > 0.97
    assert (np.diff(factors[:11]) > 0).all() and (np.diff(factors[10:]) < 0).all()
