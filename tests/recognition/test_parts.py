"""Backbones, aggregations, objectives, optimization: shapes and counts as published, closed forms."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from pytorch_metric_learning import distances, losses, reducers
from torch import nn

from model import WARNINGS, DescriptorModel, InputError
from recognition.aggregation import AGGREGATIONS, L2_PLACES, GeM, build_aggregation
from recognition.backbones import BACKBONES, build_trunk, calibrate
from recognition.objectives import build_objective, sare_loss
from recognition.optimization import make_optimizer, make_rate, make_stop, plateaus
from recognition.recipes import build_model, count_work, let_batchnorm_drift, load_model
from recognition.weights import load_fitting, read_weights
from train import ranking_loss

SETTINGS = {
    "backbone": "resnet18conv4",
    "aggregation": "netvlad",
    "netvlad_clusters": 4,
    "fc_output_dim": None,
    "l2": "before_pool",
}


def small(**changed) -> DescriptorModel:
    torch.manual_seed(0)
    model = build_model(SETTINGS | changed)
    if not getattr(model.aggregation, "initialized", True):
        channels = BACKBONES[(SETTINGS | changed)["backbone"]].channels
        model.aggregation.initialize(F.normalize(torch.randn(50, channels), dim=1))
    return model


# ------------------------------------------------ backbones


@pytest.mark.parametrize(
    "name, parameters, trained, stride",
    [
        ("resnet18conv4", 2_782_784, 2_099_712, 16),
        ("resnet18conv5", 11_176_512, 10_493_440, 32),
        ("vgg16", 14_714_688, 7_079_424, 16),
    ],
)
def test_trunks_have_the_published_parameters_and_maps(name, parameters, trained, stride):
    model = small(backbone=name, aggregation="gem")
    assert sum(p.numel() for p in model.trunk.parameters()) == parameters
    assert sum(p.numel() for p in model.trunk.parameters() if p.requires_grad) == trained
    with torch.inference_mode():
        found = model.eval().local_descriptors(torch.zeros(1, 3, 96, 64))
    assert found.shape == (1, BACKBONES[name].channels, 96 // stride, 64 // stride)


@pytest.mark.parametrize("name", ["resnet18conv4", "resnet18conv5", "resnet50conv4"])
def test_maps_are_those_of_timm_with_the_same_weights(name, tmp_path):
    backbone = BACKBONES[name]
    torch.manual_seed(0)
    whole = torchvision.models.get_model(backbone.network, weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    trunk, _ = build_trunk(name, str(tmp_path / "weights.pth"))
    theirs = timm.create_model(backbone.network, num_classes=0).eval()
    theirs.load_state_dict(whole.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        (expected,) = theirs.forward_intermediates(
            images, indices=[3 if name.endswith("4") else 4], intermediates_only=True
        )
        torch.testing.assert_close(trunk.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_deep_trunks_have_the_published_channels():
    for name in ("resnet50conv4", "resnet101conv5"):
        trunk, _ = build_trunk(name, "random")
        with torch.inference_mode():
            found = trunk.eval()(torch.zeros(1, 3, 32, 32))
        assert found.shape[1] == BACKBONES[name].channels and found.isfinite().all()


def test_weights_of_other_files_fit_or_the_first_key_that_does_not_is_named(tmp_path):
    torch.manual_seed(3)
    whole = torchvision.models.resnet18(weights=None)
    file = tmp_path / "resnet18.pth"
    wrapped = {"model_state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}
    for content in (whole.state_dict(), wrapped):
        torch.save(content, file)
        trunk, origin = build_trunk("resnet18conv4", str(file))
        assert torch.equal(trunk[6][1].conv2.weight, whole.layer3[1].conv2.weight)
        assert trunk.initialized and origin == "file resnet18.pth"
    state = whole.state_dict()
    del state["layer1.0.conv2.weight"]
    with pytest.raises(InputError, match=r"it has no layer1\.0\.conv2\.weight"):
        load_fitting(whole, state, "it")
    with pytest.raises(InputError, match=r"its conv1\.weight is \(1, 3, 7, 7\), not \(64"):
        load_fitting(whole, whole.state_dict() | {"conv1.weight": torch.zeros(1, 3, 7, 7)}, "it")
    with pytest.raises(InputError, match="there is no place for its more"):
        load_fitting(whole, whole.state_dict() | {"more": torch.zeros(1)}, "it")
    for broken, says in {
        b"cut": "cannot be read as PyTorch weights",
        b"": "is empty: copy or download it again",
        b"version https://git-lfs.github.com/spec/v1": "is a Git LFS pointer",
    }.items():
        file.write_bytes(broken)
        with pytest.raises(InputError, match=says):
            read_weights(file)
    torch.save({"conv1.weight": torch.tensor([1.0, float("nan")])}, file)
    with pytest.raises(InputError, match=r"not finite \(conv1\.weight\)"):
        read_weights(file)


def test_calibration_gives_batchnorms_the_statistics_of_the_images():
    model = small()
    model.trunk.initialized = False
    images = 3 + 2 * torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(model, images)
    with torch.inference_mode():
        first = model.trunk[0](images)
        after = model.trunk[:2](images)
    assert torch.allclose(model.trunk[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert after.mean((0, 2, 3)).abs().max() < 0.05 and (after.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert (
        model.trunk.initialized and model.trunk[1].momentum == 0.1 and not model.trunk[1].training
    )


def test_frozen_batchnorms_stay_unless_they_are_let_drift():
    model = small()
    model.train()
    frozen, trained = model.trunk[4][0].bn1, model.trunk[6][0].bn1
    before = frozen.running_mean.clone(), trained.running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(trained.running_mean, before[1])
    let_batchnorm_drift(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not torch.equal(frozen.running_mean, before[0])
    assert model.trunk[4][0].conv1.weight.grad is None


# ------------------------------------------------ aggregation


def test_gem_is_the_generalized_mean():
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    assert GeM(l2_first=False)(x).item() == pytest.approx(4.5 ** (1 / 3), abs=1e-5)
    x = torch.rand(2, 5, 3, 4)
    assert torch.allclose(GeM(False, p=1.0)(x), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(GeM(False, p=60.0)(x + 0.5), x.amax((2, 3)) + 0.5, rtol=0.05)
    unit = F.normalize(x, dim=1)
    assert torch.allclose(GeM(True)(x), GeM(False)(unit)) and not torch.allclose(
        GeM(True)(x), GeM(False)(x)
    )


@pytest.mark.parametrize("l2", L2_PLACES)
def test_gem_is_normalized_where_l2_says(l2):
    """Each of the benchmark's places (there before_pool has no L2 at the end) in plain numpy."""
    model = small(aggregation="gem", l2=l2).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        x, found = model.trunk(images).double().numpy(), model(images).numpy()
    if l2.startswith("before_pool"):
        x = x / np.maximum(np.sqrt((x**2).sum(1, keepdims=True)), 1e-12)
    want = (np.maximum(x, 1e-6) ** 3).mean((2, 3)) ** (1 / 3)
    if l2 in ("before_pool", "after_pool"):
        want = want / np.linalg.norm(want, axis=1, keepdims=True)
    assert np.allclose(found, want, rtol=1e-3, atol=1e-5)
    assert model.unit_norm == (l2 in ("before_pool", "after_pool"))
    assert small(aggregation="gem", l2=l2, fc_output_dim=4).unit_norm  # FC, then L2, as published


@pytest.mark.parametrize("aggregation", ["gem", "netvlad", "convap"])
def test_descriptors_have_norm_1_in_half_precision_too(aggregation):
    """Else ranking by their products is ranking by how the norms were rounded."""
    model = small(aggregation=aggregation, fc_output_dim=512).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model(torch.rand(4, 3, 64, 64)).double()
    assert torch.allclose(found.norm(dim=1), torch.ones(4).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18conv5", "VGG16", "EfficientNet_B0", "ConvNeXt_Tiny"])
def test_any_backbone_goes_with_any_aggregation(name):
    trunk, channels = build_trunk(name, "random")[0].eval(), BACKBONES[name].channels
    with torch.inference_mode():
        local = trunk(torch.rand(2, 3, 64, 64))
    dims = {"netvlad": 64 * channels, "mixvpr": 4096, "convap": 4096, "supervlad": 4 * channels}
    for aggregation in AGGREGATIONS.keys() - {"salad"}:  # needs a class token
        for fc in (None, 7):
            pool, dim = build_aggregation(aggregation, channels, {"fc_output_dim": fc})
            with torch.inference_mode():
                found = DescriptorModel(nn.Sequential(), pool, dim).eval()(local)
            assert found.shape == (2, fc or dims.get(aggregation, channels)) == (2, dim)
            assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)


def test_backbones_make_maps_of_their_channels():
    for name in ("ResNet152", "EfficientNet_B2", "EfficientNet_B7", "ConvNeXt_Tiny"):
        backbone = BACKBONES[name]
        with torch.device("meta"):
            network = torchvision.models.get_model(backbone.network, weights=None)
            trunk = getattr(network, "features", None) or nn.Sequential(*network.children())
            found = trunk[: backbone.stages](torch.zeros(1, 3, 64, 64))
        assert found.shape[1] == backbone.channels, name
        assert 0 < backbone.first_trained < backbone.stages
        torchvision.models.get_model_weights(backbone.network)[backbone.weights]


def test_cosplace_has_its_published_parameters():
    head, _ = build_aggregation("gem", 512, {"fc_output_dim": 512})
    assert sum(p.numel() for p in head.parameters()) == 262_657
    model = small(backbone="ResNet18", aggregation="gem", fc_output_dim=512)
    assert sum(p.numel() for p in model.parameters()) == 11_439_169


# ------------------------------------------------ files of models


def test_a_file_of_the_benchmark_describes_as_its_layers_do(tmp_path):
    model = small().eval()
    conv, centroids = torch.randn(4, 256, 1, 1), torch.randn(4, 256)
    state = {f"module.backbone.{k}": v for k, v in model.trunk.state_dict().items()}
    state |= {"module.aggregation.conv.weight": conv, "module.aggregation.centroids": centroids}
    torch.save({"model_state_dict": state}, tmp_path / "dvg.pth")
    loaded, _ = load_model(tmp_path / "dvg.pth", SETTINGS)
    loaded.precision = "float32"
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        x = F.normalize(model.trunk(images), dim=1).flatten(2)
        weight = torch.softmax(torch.einsum("kd,ndl->nkl", conv[:, :, 0, 0], x), 1)
        residuals = x[:, None] - centroids[None, :, :, None]  # (N, K, D, L)
        vlad = F.normalize((weight[:, :, None] * residuals).sum(3), dim=2).flatten(1)
        assert torch.allclose(loaded(images), F.normalize(vlad, dim=1), atol=1e-5)


@pytest.mark.parametrize("fc", [None, 8])
def test_gem_of_the_benchmark_loads_too(tmp_path, fc):
    settings = SETTINGS | {"aggregation": "gem", "fc_output_dim": fc}
    state = {f"backbone.{k}": v for k, v in small().trunk.state_dict().items()}
    if fc:
        weight = torch.randn(8, 256)
        state |= {"aggregation.0.1.p": torch.tensor([2.5])}
        state |= {"aggregation.1.weight": weight, "aggregation.1.bias": torch.ones(8)}
    else:
        state |= {"aggregation.1.p": torch.tensor([2.5])}
    torch.save(state, tmp_path / "dvg.pth")
    model, _ = load_model(tmp_path / "dvg.pth", settings)
    gem = model.aggregation.pool if fc else model.aggregation
    assert gem.p.item() == 2.5
    del state["backbone.6.0.conv1.weight"]
    torch.save(state, tmp_path / "dvg.pth")
    with pytest.raises(InputError, match=r"it has no trunk\.6\.0\.conv1\.weight"):
        load_model(tmp_path / "dvg.pth", settings)


def test_counted_work_is_that_of_the_layers():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False))
    aggregation, dim = build_aggregation("gem", 4, {"fc_output_dim": 5})
    model = DescriptorModel(trunk, aggregation, dim)
    work = count_work(model, (10, 20))
    assert work["gflops"] * 1e9 == pytest.approx(2 * (3 * 9 * 4 * 10 * 20 + 4 * 5))
    assert work["parameters"] == 3 * 4 * 9 + 1 + 4 * 5 + 5 and work["descriptor_dim"] == 5


# ------------------------------------------------ objectives and optimization


def test_sare_is_the_softmax_of_squared_distances():
    q, p, n = torch.zeros(1, 2), torch.tensor([[1.0, 0]]), torch.tensor([[[0, 2.0], [0, 1.0]]])
    e = [math.exp(-d) for d in (1, 4, 1)]
    found = sare_loss(q, p, n, joint=False)[0].tolist()
    assert found == pytest.approx([-math.log(e[0] / (e[0] + e[i])) for i in (1, 2)], abs=1e-6)
    assert sare_loss(q, p, n, joint=True).item() == pytest.approx(
        -math.log(e[0] / sum(e)), abs=1e-6
    )
    published = sare_loss(q, p, n, joint=True).sum() / 2  # over negatives too
    assert build_objective("sare_joint").losses(q, p, n).item() == pytest.approx(published.item())
    assert torch.equal(build_objective("triplet", 0.3).losses(q, p, n), ranking_loss(q, p, n, 0.3))


def test_losses_are_those_of_pytorch_metric_learning():
    """Triplets by distance; SARE by squared distance is, between unit vectors, InfoNCE at T = 1/2."""
    torch.manual_seed(0)
    q, p, n = (F.normalize(torch.randn(*shape, 8), dim=-1) for shape in ((3,), (3,), (3, 4)))
    rows = torch.cat([q, p, n.flatten(0, 1)])
    anchor = torch.arange(3).repeat_interleave(4)
    triplets = anchor, anchor + 3, torch.arange(6, 18)
    distance = distances.LpDistance(normalize_embeddings=False)
    triplet = losses.TripletMarginLoss(0.1, distance=distance, reducer=reducers.DoNothingReducer())
    theirs = triplet(rows, torch.arange(18), indices_tuple=triplets)["loss"]["losses"].view(3, 4)
    assert torch.allclose(build_objective("triplet", 0.1).losses(q, p, n), theirs, atol=1e-6)
    info = losses.NTXentLoss(temperature=0.5, reducer=reducers.DoNothingReducer())
    for i in range(3):
        mine = torch.cat([q[i : i + 1], p[i : i + 1], n[i]])
        one = torch.zeros(4, dtype=torch.long)
        pair = torch.tensor([0]), torch.tensor([1]), one, torch.arange(2, 6)
        found = info(mine, torch.arange(6), indices_tuple=pair)["loss"]["losses"]
        assert sare_loss(q, p, n, joint=True)[i].item() == pytest.approx(found.item(), abs=1e-5)
        for j in range(4):
            twice = torch.tensor([0, 0]), torch.tensor([1, 1])  # a single pair is passed over
            pair = *twice, torch.tensor([0]), torch.tensor([2 + j])
            found = info(mine, torch.arange(6), indices_tuple=pair)["loss"]["losses"][0]
            ours = sare_loss(q, p, n, joint=False)[i, j].item()
            assert ours == pytest.approx(found.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "asgd"])
def test_vectors_do_not_decay(name):
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    group = {"params": [matrix, vector], "lr": 0.1, "peak": 0.1}
    optimizer = make_optimizer(name, 0.5)([group])
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (matrix < 0.96).all() and torch.allclose(
        vector, torch.ones(3), atol=1e-4
    )  # ASGD's lambd
    assert [g["peak"] for g in optimizer.param_groups] == [0.1, 0.1]


def test_schedules_are_those_of_torch():
    parameter = [nn.Parameter(torch.zeros(1))]
    values = [0.1, 0.3, 0.3, 0.29, 0.3, 0.31, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    for name, make in (
        ("step", lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, len(values))),
        ("plateau", lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", 0.3, 2)),
    ):
        optimizer = torch.optim.SGD(parameter, lr=1.0)
        scheduler, rate, history = make(optimizer), make_rate(name, len(values), step=2), []
        for epoch, value in enumerate(values):
            share = epoch / len(values)
            assert rate(share, history) == pytest.approx(optimizer.param_groups[0]["lr"]), name
            optimizer.step()
            scheduler.step(*([value] if name == "plateau" else []))
            history.append({"val R@1": value})
    assert plateaus([], 2) == 0 and plateaus(values, 2) == 3


def test_warm_up_climbs_and_patience_ends():
    rate = make_rate("none", 10, warmup=2)
    assert [rate(s, []) for s in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    stop = make_stop(2, lambda record: record["r"])
    scores = [0.5, 0.6, 0.6, 0.55]
    assert [stop([{"r": r} for r in scores[:n]]) for n in range(5)] == [False] * 4 + [True]


def test_random_filters_do_not_answer_to_brightness():
    for name in ("resnet18conv4", "vgg16"):
        first = build_trunk(name, "random")[0][0]
        answer = first(torch.full((1, 3, 32, 32), 7.0))[0, :, 8, 8]
        assert answer.abs().max() < 1e-4 < first.weight.std()


def test_a_damaged_download_of_any_backbone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = torchvision.models.ResNet18_Weights[BACKBONES["resnet18conv4"].weights]
    cached = tmp_path / "checkpoints" / entry.url.rsplit("/", 1)[1]
    cached.parent.mkdir()
    cached.write_bytes(b"half a file")
    build_trunk("resnet18conv4")
    assert "RANDOM" in WARNINGS[0] and f"{cached} is damaged" in WARNINGS[0]
    with pytest.raises(InputError, match=f"give a downloaded {cached.name} with --weights FILE"):
        build_trunk("resnet18conv4", "imagenet")


def test_random_weights_are_said(monkeypatch):
    build_trunk("resnet18conv4", "none")
    assert "RANDOM" in WARNINGS[0]
