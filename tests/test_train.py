"""Ranking loss by hand and against PyTorch, the loop, the split by place."""

import numpy as np
import pytest
import torch

from model import InputError, NetVLADModel, half_precision
from train import centralize_gradients, ranking_loss, split_by_place, train, validate


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


@pytest.mark.parametrize("seed", range(5))
def test_split_by_place_shares_no_index_image(seed):
    rng = np.random.default_rng(seed)
    streets = rng.uniform(0, 3000, (30, 2))
    utm_query = np.repeat(streets, 6, axis=0) + rng.uniform(-60, 60, (180, 2))
    utm_index = np.repeat(streets, 15, axis=0) + rng.uniform(-60, 60, (450, 2))
    parts, dropped = split_by_place(utm_query, utm_index, 25, seed)
    rows = np.concatenate(list(parts.values()))
    assert len(set(rows)) == len(rows) == 180 - dropped
    assert len(parts["train"]) > 120 and 8 <= len(parts["val"]) <= 18 and 8 <= len(parts["test"]) <= 18
    distance = np.linalg.norm(utm_query[:, None] - utm_index[None], axis=2)
    near = [set(np.flatnonzero((distance[part] <= 25).any(axis=0))) for part in parts.values()]
    assert not (near[0] & near[1] or near[0] & near[2] or near[1] & near[2])
    again, _ = split_by_place(utm_query, utm_index, 25, seed)
    assert all(np.array_equal(parts[k], again[k]) for k in parts)


def test_split_of_one_place_is_refused():
    with pytest.raises(InputError, match="three places"):
        split_by_place(np.zeros((20, 2)), np.zeros((5, 2)), 25, 0)
