"""NetVLAD layer against a loop, its initialization by its defining property, k-means, weights."""

import copy
import io
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16

from model import (
    WARNINGS,
    DescriptorModel,
    InputError,
    NetVLAD,
    NetVLADModel,
    Trunk,
    calibrate_trunk,
    choose_device,
    half_precision,
    half_type,
    initialize_netvlad,
    kmeans,
    load_checkpoint,
    usable_cores,
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


@torch.no_grad()
def test_initialization_assigns_by_cosine_with_a_mean_log_ratio_of_ln_100():
    generator = torch.Generator().manual_seed(1)
    descriptors = F.normalize(torch.rand(4000, 24, generator=generator), dim=1)
    layer = NetVLAD(8, 24)
    layer.initialize(descriptors, seed=3)
    scores = descriptors @ layer.assignment.weight[:, :, 0, 0].T + layer.assignment.bias
    top = scores.log_softmax(dim=1).topk(2, dim=1).values
    assert float((top[:, 0] - top[:, 1]).mean()) == pytest.approx(math.log(100), abs=2e-3)
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
    assert other.netvlad.initialized and other.trunk.initialized and other.initialized


def test_trunk_is_torchvisions_vgg16_and_files_with_or_without_classifier_load(tmp_path):
    torch.manual_seed(1)
    reference = vgg16(weights=None)
    x = torch.randn(1, 3, 64, 64)
    expected = reference.features[:-2](x)
    state = reference.state_dict()
    features_only = {k: v for k, v in state.items() if k.startswith("features")}
    for number, content in enumerate(
        (features_only, {**features_only, "classifier.0.bias": torch.zeros(3)})
    ):
        file = tmp_path / f"vgg{number}.pth"
        torch.save(content, file)
        model = NetVLADModel(4, weights=file)
        torch.testing.assert_close(model.trunk(x), expected)
        assert model.weights_origin == f"file vgg{number}.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth.*torchvision"):
        NetVLADModel(4, weights=tmp_path / "bad.pth")


def test_the_frozen_part_s_outputs_stand_for_images_and_only_the_rest_is_trained():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False, train_from="conv5")
    x = torch.randn(2, 3, 64, 64)
    whole = model(x)
    torch.testing.assert_close(model(model.frozen_part(x)), whole)
    whole.sum().backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert names == {
        *(f"trunk.{i}.{kind}" for i in (24, 26, 28) for kind in ("weight", "bias")),
        *("netvlad.assignment.weight", "netvlad.assignment.bias", "netvlad.centers"),
    }


def test_hooks_on_the_trunk_see_its_map():
    model, seen = NetVLADModel(4, pretrained=False), []
    model.trunk.register_forward_hook(lambda module, given, map: seen.append(map.shape))
    model(torch.randn(1, 3, 32, 48))
    assert seen == [(1, 512, 2, 3)]


def test_in_inference_mode_a_trunk_makes_the_same_of_few_images_at_a_time(monkeypatch):
    monkeypatch.setattr("model.CACHED_PIXELS", 2 * 12 * 16)
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU()]
    images, sizes = torch.randn(5, 3, 12, 16), []
    stages[0].register_forward_hook(lambda module, given, map: sizes.append(len(map)))
    with torch.no_grad():
        plain = nn.Sequential(*stages)(images)
    with torch.inference_mode():
        found = Trunk(*stages)(images)
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_model_pickles_deep_copies_and_is_saved_whole(how, tmp_path):
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "whole.pth")
        other = torch.load(tmp_path / "whole.pth", weights_only=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(model.state_dict())  # marks the copy, and the copy alone
    assert other.initialized and not model.initialized


def test_frozen_batch_statistics_stay_while_the_rest_is_trained():
    trunk = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    model = DescriptorModel(trunk, torch.nn.Flatten(), 12)
    model.freeze_below(1)
    model.train()
    found = model(torch.randn(4, 3, 2, 2) + 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert not trunk[0].running_mean.any() and trunk[1].running_mean.any()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


# ---------------------------------------------------------------- machines that are not here


def test_auto_takes_cuda_or_the_processor_never_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for gpus, expected in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert choose_device("auto").type == expected
    assert choose_device("mps").type == "mps" and choose_device("cuda:1").index == 1
    for name in ("cuda:2", "cuda:x", "mps:1", "cpu:", "gpu", ""):
        with pytest.raises(InputError, match="--device auto"):
            choose_device(name)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_gpus_without_bf16_compute_in_float32_or_float16(capability, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        torch, "autocast", lambda _, kind, enabled: entered.append(kind if enabled else None)
    )
    for precision in ("auto", "bf16", "fp16", "float32"):
        half_precision("cuda", precision)
    old, new = [None, None, torch.float16, None], [*3 * [torch.bfloat16], None]
    assert entered == (new if capability >= (8, 0) else old)
    assert half_type("mps", "fp16") is None and half_type("cpu", "fp16") is half_type("cpu")


def test_autocast_is_entered_for_processors_and_cuda_only(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: pytest.fail("entered"))
    for kind in ("mps", "meta"):
        with half_precision(kind), half_precision(kind, "float32"):
            pass


def test_clusters_are_found_on_the_processor(monkeypatch):
    """There float64 is there, and sums have one order; GPUs add as it comes, Apple's know no float64."""
    moved = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.shape) or to_cpu(x))
    NetVLAD(5, 4).initialize(torch.nn.functional.normalize(torch.rand(50, 4), dim=1))
    assert moved == [(50, 4)]


def test_cores_are_those_of_this_process_s_affinity(monkeypatch):
    before = usable_cores()
    for allowed in ({0}, {0, 1, 2, 3}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, a=allowed: a, raising=False)
        assert 1 <= usable_cores() <= len(allowed)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows have none
    assert 1 <= usable_cores() <= os.cpu_count() and before >= 1


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


NO_NUMBER = {"features.0.weight": torch.full((64, 3, 3, 3), float("nan"))}


@pytest.mark.parametrize(
    "content", [b"", b"half a file", b"PK\x03\x04", saved(NO_NUMBER), saved([1, 2])]
)
def test_a_damaged_download_is_named_and_imagenet_typed_by_hand_fails(
    content, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir()
    cached.write_bytes(content)
    model = NetVLADModel(4)
    assert model.weights_origin == "random" and not model.initialized
    assert len(WARNINGS) == 1 and "RANDOM" in WARNINGS[0] and f"{cached} is damaged" in WARNINGS[0]
    with pytest.raises(InputError, match="--weights FILE"):
        model.load_imagenet()


def test_calibration_gives_each_channel_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = torch.randn(10, 3, 64, 64)
    calibrate_trunk(model, images.double())  # as a loader without torchvision's transforms may give
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
