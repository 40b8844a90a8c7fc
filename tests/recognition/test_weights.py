"""Files of published systems: their key names, and descriptors by their layers written out again."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from model import InputError
from recognition import vit
from recognition.aggregation import AGGREGATION_SETTINGS
from recognition.backbones import BACKBONES, Backbone
from recognition.recipes import RECIPES, load_any, load_model
from recognition.weights import SYSTEMS, read_weights, system_of

TINY = vit.VitSize(48, 5, 3)
SIZE_PX = 518  # positions are not interpolated


@pytest.fixture(autouse=True)
def _a_small_transformer(monkeypatch):
    monkeypatch.setitem(vit.SIZES, "tiny", TINY)
    monkeypatch.setitem(BACKBONES, "dino", Backbone("tiny", 2, TINY.dim, 1))


class Wrapped(nn.Module):
    """A network as MixVPR's and SALAD's programs hold it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def transformer() -> nn.Module:
    net = timm.models.vision_transformer.VisionTransformer(
        SIZE_PX, 14, embed_dim=TINY.dim, depth=TINY.depth, num_heads=TINY.heads, init_values=1.0,
        num_classes=0,
    )  # fmt: skip
    net.mask_token = nn.Parameter(torch.zeros(1, TINY.dim))
    return net


def resnet18(stages: int) -> nn.Module:
    net = torchvision.models.resnet18(weights=None)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
    for name in ("avgpool", "fc", "layer4")[: 2 + (stages < 4)]:
        setattr(net, name, None)
    return net


def resnet18_map(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    x = net.layer3(net.layer2(net.layer1(x)))
    return x if net.layer4 is None else net.layer4(x)


class SuperVlad(nn.Module):
    """As its authors' network.py and supervlad_layer.py."""

    def __init__(self, clusters: int, ghosts: int, encoder: bool) -> None:
        super().__init__()
        self.backbone, self.clusters = transformer(), clusters
        self.aggregation = nn.Module()
        self.aggregation.conv = nn.Conv2d(TINY.dim, clusters + ghosts, 1, bias=False)
        nn.init.normal_(self.aggregation.conv.weight)
        if encoder:
            layer = nn.TransformerEncoderLayer(TINY.dim, 16, 2048, 0.1, "gelu")
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = F.normalize(self.backbone.forward_features(x)[:, 1:], dim=2)
        weight = self.aggregation.conv.weight[:, :, 0, 0]
        share = torch.softmax(torch.einsum("nlc,kc->nlk", tokens, weight), 2)
        v = torch.einsum("nlk,nlc->nkc", share, tokens)[:, : self.clusters]
        v = F.normalize(F.normalize(v, dim=2).flatten(1), dim=1)
        if hasattr(self, "encoder"):
            v = self.encoder(v.view(len(x), self.clusters, -1)).reshape(len(x), -1)
        return F.normalize(v, dim=1)


class CosPlace(nn.Module):
    """As network.py and layers.py of CosPlace and EigenPlaces."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])
        gem = nn.Module()
        gem.p = nn.Parameter(torch.tensor([2.7]))
        self.aggregation = nn.Sequential(nn.Identity(), gem, nn.Linear(512, 32), nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(self.backbone(x), dim=1).clamp(min=1e-6)
        p = self.aggregation[1].p
        return F.normalize(self.aggregation[2](x.pow(p).mean((2, 3)).pow(1 / p)), dim=1)


class MixVpr(nn.Module):
    """As main.py and aggregators/mixvpr.py of MixVPR."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.backbone = Wrapped(resnet18(3))
        mixers = []
        for _ in range(4):
            mixers.append(nn.Module())
            mixers[-1].mix = nn.Sequential(
                nn.LayerNorm(positions), nn.Linear(positions, positions), nn.ReLU(),
                nn.Linear(positions, positions),
            )  # fmt: skip
        self.aggregator = nn.Module()
        self.aggregator.mix = nn.Sequential(*mixers)
        self.aggregator.channel_proj = nn.Linear(256, 8)
        self.aggregator.row_proj = nn.Linear(positions, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = resnet18_map(self.backbone.model, x).flatten(2)
        for mixer in self.aggregator.mix:
            x = x + mixer.mix(x)
        x = self.aggregator.channel_proj(x.permute(0, 2, 1)).permute(0, 2, 1)
        return F.normalize(self.aggregator.row_proj(x).flatten(1), dim=1)


class ConvAp(nn.Module):
    """As main.py and aggregators/convap.py of GSV-Cities."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.aggregator = Wrapped(resnet18(4)), nn.Module()
        self.aggregator.channel_pool = nn.Conv2d(512, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.aggregator.channel_pool(resnet18_map(self.backbone.model, x))
        return F.normalize(F.adaptive_avg_pool2d(x, (2, 2)).flatten(1), dim=1)


class Salad(nn.Module):
    """As vpr_model.py and aggregators/salad.py of SALAD."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.aggregator = Wrapped(transformer()), nn.Module()

        def branch(to: int) -> nn.Module:
            layers = (
                nn.Conv2d(TINY.dim, 512, 1),
                nn.Dropout(0.3),
                nn.ReLU(),
                nn.Conv2d(512, to, 1),
            )
            return nn.Sequential(*layers)

        self.aggregator.token_features = nn.Sequential(
            nn.Linear(TINY.dim, 512), nn.ReLU(), nn.Linear(512, 6)
        )
        self.aggregator.cluster_features, self.aggregator.score = branch(5), branch(7)
        self.aggregator.dust_bin = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, a = self.backbone.model.forward_features(x), self.aggregator
        patches = tokens[:, 1:].permute(0, 2, 1).unflatten(2, (37, 37))
        f, s = a.cluster_features(patches).flatten(2), a.score(patches).flatten(2)
        n, m, length = s.shape
        s = torch.cat([s, a.dust_bin.expand(n, 1, length)], 1)
        norm = -math.log(length + m)
        log_a = torch.full((m + 1,), norm)
        log_a[-1] += math.log(length - m)
        u, v = torch.zeros(n, m + 1), torch.zeros(n, length)
        for _ in range(3):
            u = log_a - torch.logsumexp(s + v[:, None], 2)
            v = norm - torch.logsumexp(s + u[:, :, None], 1)
        p = (s + u[:, :, None] + v[:, None] - norm).exp()[:, :-1]
        sums = torch.stack([(f * p[:, k, None]).sum(2) for k in range(m)], 2)
        of_class = F.normalize(a.token_features(tokens[:, 0]), dim=1)
        return F.normalize(torch.cat([of_class, F.normalize(sums, dim=1).flatten(1)], 1), dim=1)


CASES = {
    "SuperVLAD": (lambda: SuperVlad(4, 1, encoder=False), "supervlad", {}, SIZE_PX),
    "SuperVLAD, encoder": (
        lambda: SuperVlad(4, 1, encoder=True), "supervlad", {"crossimage_encoder": True}, SIZE_PX,
    ),
    "1-cluster VLAD": (
        lambda: SuperVlad(1, 2, encoder=False), "supervlad",
        {"supervlad_clusters": 1, "ghost_clusters": 2}, SIZE_PX,
    ),
    "CosPlace": (
        CosPlace, None,
        {"backbone": "resnet18conv5", "aggregation": "gem", "fc_output_dim": 32}, 96,
    ),
    "MixVPR": (
        lambda: MixVpr(6 * 6), "mixvpr",
        {"backbone": "resnet18conv4", "mix_out_channels": 8, "mix_out_rows": 4}, 96,
    ),
    "ConvAP": (ConvAp, "convap", {"backbone": "resnet18conv5", "convap_dim": 8}, 96),
    "SALAD": (
        Salad, "salad",
        {"salad_clusters": 7, "salad_cluster_dim": 5, "salad_token_dim": 6}, SIZE_PX,
    ),
}  # fmt: skip


def settings_of(recipe: str | None, changed: dict) -> dict:
    defaults = RECIPES[recipe].defaults if recipe else {}
    return {**AGGREGATION_SETTINGS, "freeze_te": None, **defaults, **changed}


class Settings:
    """Something that pickles beside weights and must not be needed, or made, to read them."""

    def __init__(self) -> None:
        self.made = True

    def __reduce__(self) -> tuple:
        return pytest.fail, ("the file ran this",)


def as_published(net: nn.Module, case: str, file: Path) -> None:
    """Write a network's weights as its authors' programs do."""
    state = net.state_dict()
    if case.startswith(("SuperVLAD", "1-")):
        state = {f"module.{key}": value for key, value in state.items()}
        scores = {"recalls": np.array([91.5, 97.0]), "best_r5": np.float64(97.0), "epoch_num": 3}
        torch.save({"model_state_dict": state, **scores}, file)
    elif case == "MixVPR":
        torch.save({"state_dict": state, "hyper_parameters": {"own": Settings()}}, file)
    else:
        torch.save(state, file)


@pytest.mark.parametrize("case", CASES)
def test_a_published_file_describes_as_its_own_layers_do(case, tmp_path):
    make, recipe, changed, side = CASES[case]
    torch.manual_seed(0)
    net, file = make().eval(), tmp_path / "published.pth"
    as_published(net, case, file)
    model, _ = load_model(file, settings_of(recipe, changed))
    model.precision = "float32"
    images = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        expected, found = net(images), model(images)
    assert found.shape == (1, model.descriptor_dim)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_published_file_is_searched_with_as_its_recipe_says(tmp_path):
    file = tmp_path / "published.pth"
    as_published(SuperVlad(4, 1, encoder=False), "SuperVLAD", file)
    model = load_any(file)
    assert model.descriptor_dim == 4 * TINY.dim
    assert model.transform(Image.new("RGB", (400, 300))).shape == (3, 322, 322)


def test_every_system_knows_its_own_files_only():
    expected = {"SuperVLAD, encoder": "SuperVLAD", "1-cluster VLAD": "SuperVLAD"}
    expected["CosPlace"] = "CosPlace or EigenPlaces"
    for case, (make, *_) in CASES.items():
        with torch.device("meta"):
            assert system_of(make().state_dict()) == expected.get(case, case)
    assert system_of({"backbone.0.weight": None}) == "the NetVLAD benchmark"
    assert system_of({"trunk.0.weight": None}) is None
    assert all(
        system.recipe in RECIPES or system.recipe == "cosplace" for system in SYSTEMS.values()
    )


def test_a_file_for_another_architecture_is_told_what_to_ask_for(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "SuperVLAD.pth"
    as_published(SuperVlad(4, 1, encoder=True), "SuperVLAD", file)
    for changed, says in (
        (
            {"supervlad_clusters": 1, "ghost_clusters": 2, "crossimage_encoder": True},
            r"SuperVLAD\.pth has 5 clusters, ghosts included, but --supervlad_clusters 1 and --ghost"
            + r"_clusters 2 make 3: .* 1-cluster model 1 \+ 2 in a file of its own",
        ),
        ({}, "has a cross-image encoder: give --crossimage_encoder"),
        (
            {"aggregation": "gem"},
            "weights of SuperVLAD, not for --aggregation gem: give --recipe=supe",
        ),
    ):
        with pytest.raises(InputError, match=says):
            load_model(file, settings_of("supervlad", changed))
    as_published(SuperVlad(4, 1, encoder=False), "SuperVLAD", file)
    with pytest.raises(InputError, match="has no cross-image encoder: leave out --crossimage_enc"):
        load_model(file, settings_of("supervlad", {"crossimage_encoder": True}))
    with pytest.raises(InputError, match="salad needs a class token, which resnet18conv4 lacks"):
        load_model(file, settings_of("salad", {"backbone": "resnet18conv4"}))


def test_what_is_no_file_of_weights_is_refused_and_nothing_in_it_runs(tmp_path):
    file = tmp_path / "file.pth"
    with pytest.raises(InputError, match="does not exist"):
        read_weights(file)
    torch.save({"own": Settings(), "w": torch.ones(2)}, file)
    with pytest.raises(InputError, match="holds no plain state dict"):
        read_weights(file)
    torch.save([torch.ones(2)], file)
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(file)
    file.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match="cannot be read as PyTorch weights"):
        read_weights(file)
