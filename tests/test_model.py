"""NetVLAD layer against a loop, its initialization by its defining property, k-means, weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

from model import (
    InputError,
    NetVLAD,
    NetVLADModel,
    calibrate_trunk,
    initialize_netvlad,
    kmeans,
    load_checkpoint,
)


def random_layer(k: int, d: int, seed: int = 0) -> NetVLAD:
    torch.manual_seed(seed)
    layer = NetVLAD(k, d)
    torch.nn.init.normal_(layer.assignment.weight)
    torch.nn.init.normal_(layer.assignment.bias)
    return layer


def test_closed_form_equals_the_defining_loop():
    layer = random_layer(5, 7)
    x = torch.randn(3, 7, 4, 6)
    weight, bias = layer.assignment.weight[:, :, 0, 0], layer.assignment.bias
    expected = []
    for image in x:
        v = torch.zeros(5, 7)
        for row in range(4):
            for column in range(6):
                local = image[:, row, column] / image[:, row, column].norm()
                scores = torch.stack([weight[k] @ local + bias[k] for k in range(5)])
                assignment = torch.exp(scores) / torch.exp(scores).sum()
                for k in range(5):
                    v[k] += assignment[k] * (local - layer.centers[k])
        v = torch.stack([row / row.norm() for row in v]).flatten()
        expected.append(v / v.norm())
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=2e-6, rtol=0)


def test_layer_computes_in_full_precision_under_autocast():
    layer = random_layer(4, 16)
    x = torch.randn(2, 16, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    torch.testing.assert_close(half, layer(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["v1", "v2"])
@torch.no_grad()
def test_initialization_makes_the_mean_log_ratio_ln_100(form):
    generator = torch.Generator().manual_seed(1)
    descriptors = F.normalize(torch.rand(4000, 24, generator=generator), dim=1)
    layer = NetVLAD(8, 24)
    layer.initialize(descriptors, seed=3, form=form)
    scores = descriptors @ layer.assignment.weight[:, :, 0, 0].T + layer.assignment.bias
    top = scores.log_softmax(dim=1).topk(2, dim=1).values
    assert float((top[:, 0] - top[:, 1]).mean()) == pytest.approx(math.log(100), abs=2e-3)


def test_v2_assigns_by_distance_to_the_centers_and_v1_by_cosine():
    descriptors = F.normalize(torch.randn(500, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    for form in ("v1", "v2"):
        layer = NetVLAD(4, 6)
        layer.initialize(descriptors, seed=0, form=form)
        scores = descriptors @ layer.assignment.weight[:, :, 0, 0].T + layer.assignment.bias
        if form == "v2":
            nearest = torch.cdist(descriptors, layer.centers).argmin(dim=1)
        else:
            nearest = (descriptors @ F.normalize(layer.centers, dim=1).T).argmax(dim=1)
        assert torch.equal(scores.argmax(dim=1), nearest)


def test_kmeans_recovers_planted_clusters():
    generator = torch.Generator().manual_seed(5)
    truth = 10 * torch.randn(12, 8, generator=generator)
    x = (truth[:, None] + 0.1 * torch.randn(12, 40, 8, generator=generator)).flatten(0, 1)
    found = kmeans(x, 12, seed=7)
    nearest = torch.cdist(truth, found)
    assert sorted(nearest.argmin(dim=1).tolist()) == list(range(12))
    assert float(nearest.min(dim=1).values.max()) < 0.1


def test_kmeans_keeps_all_clusters_when_points_coincide():
    x = torch.tensor([[0.0, 0.0]] * 50 + [[1.0, 0.0]] * 2)
    centers = kmeans(x, 3, seed=0)
    assert centers.shape == (3, 2)
    assert torch.isfinite(centers).all()


def test_model_shapes_norms_and_state_dict():
    torch.manual_seed(0)
    model = NetVLADModel(num_clusters=16, pretrained=False)
    out = model(torch.randn(2, 3, 64, 48))
    assert out.shape == (2, 16 * 512)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    other = NetVLADModel(num_clusters=16, pretrained=False)
    assert not other.netvlad.initialized
    other.load_state_dict(model.state_dict())
    assert other.netvlad.initialized and other.trunk_initialized


def test_trunk_is_torchvisions_vgg16_and_files_with_or_without_classifier_load(tmp_path):
    torch.manual_seed(1)
    reference = vgg16(weights=None)
    x = torch.randn(1, 3, 64, 64)
    expected = reference.features[:-2](x)
    state = reference.state_dict()
    features_only = {k: v for k, v in state.items() if k.startswith("features")}
    for number, content in enumerate((features_only, {**features_only, "classifier.0.bias": torch.zeros(3)})):
        file = tmp_path / f"vgg{number}.pth"
        torch.save(content, file)
        model = NetVLADModel(4, weights=file)
        torch.testing.assert_close(model.trunk(x), expected)
        assert model.weights_origin == f"file vgg{number}.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth.*torchvision"):
        NetVLADModel(4, weights=tmp_path / "bad.pth")


def test_start_continues_from_the_frozen_part_and_only_the_rest_is_trained():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False, train_from="conv5")
    x = torch.randn(2, 3, 64, 64)
    whole = model(x)
    torch.testing.assert_close(model(model.trunk[: model.first_trained](x), model.first_trained), whole)
    whole.sum().backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert names == {
        "trunk.24.weight", "trunk.24.bias", "trunk.26.weight", "trunk.26.bias", "trunk.28.weight",
        "trunk.28.bias", "netvlad.assignment.weight", "netvlad.assignment.bias", "netvlad.centers",
    }  # fmt: skip


def test_calibration_gives_each_channel_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = torch.randn(10, 3, 64, 64)
    calibrate_trunk(model, images)
    x = images
    for module in model.trunk.requires_grad_(False):
        x = module(x)
        if isinstance(module, torch.nn.Conv2d):
            assert float(x.mean((0, 2, 3)).abs().max()) < 0.05
            assert float((x.std((0, 2, 3)) - 1).abs().max()) < 0.05
    assert "10 training images" in model.weights_origin


def test_initialize_is_seeded():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    batches = [torch.randn(2, 3, 64, 64)]
    centers = []
    for seed in (1, 1, 2):
        initialize_netvlad(model, batches, torch.device("cpu"), seed=seed)
        centers.append(model.netvlad.centers.clone())
    assert torch.equal(centers[0], centers[1])
    assert not torch.equal(centers[0], centers[2])


def test_load_checkpoint_reads_the_number_of_clusters(tmp_path):
    torch.manual_seed(0)
    model = NetVLADModel(5, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    loaded = load_checkpoint(tmp_path / "m.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model.eval()(x))
