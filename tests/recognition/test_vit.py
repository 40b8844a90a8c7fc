"""DINOv2's transformers: timm's as oracle, the position embedding's formula, files, what is frozen."""

import math

import pytest
import timm
import torch
from torch import nn

from model import WARNINGS, DescriptorModel, InputError
from recognition import vit
from recognition.aggregation import GeM
from recognition.vit import (
    build_vit,
    freeze,
    named_as_in,
    official_weights,
    pack,
    tokens_of,
    unpack,
)

TINY = vit.VitSize(32, 5, 4)


@pytest.fixture
def tiny(monkeypatch) -> str:
    """The name of a network small enough to train."""
    monkeypatch.setitem(vit.SIZES, "tiny", TINY)
    return "tiny"


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return drawn(timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval()


def ours_of(theirs: nn.Module, name: str, freeze_te: int | None = None) -> nn.Sequential:
    trunk, _ = build_vit(name, "random", freeze_te)
    state = theirs.state_dict() | {"mask_token": torch.zeros(1, TINY.dim)}
    trunk.load_state_dict(named_as_in(trunk, official_weights(state, name, "timm")))
    return trunk.eval()


@pytest.mark.parametrize("size", [(518, 518), (322, 322), (224, 224), (98, 140)])
def test_timm_finds_the_same_with_our_position_embedding(small, size, monkeypatch):
    trunk = ours_of(small, "dinov2_vits14")
    h, w = (side // 14 for side in size)
    positions = trunk[0].positions(h, w)
    if size != (518, 518):  # timm resizes with antialiasing and another scale
        monkeypatch.setattr(
            "timm.models.vision_transformer.resample_abs_pos_embed", lambda *_, **__: positions
        )
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        theirs, ours = small.forward_features(x), trunk(x)
    assert ours.shape == (1, 384, h, w)
    torch.testing.assert_close(tokens_of(ours), theirs[:, 1:], atol=1e-5, rtol=0)


def test_the_base_network_has_timm_s_names_and_the_published_sizes():
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch14_dinov2")
        trunk, _ = build_vit("dinov2_vitb14", "random", 8)
    names = official_weights(theirs.state_dict(), "dinov2_vitb14", "timm")
    assert named_as_in(trunk, names).keys() == trunk.state_dict().keys()
    # With the mask token's 768, which we lack.
    assert sum(p.numel() for p in trunk.parameters()) == 86_580_480 - 768
    model = DescriptorModel(trunk, GeM(), 768)
    freeze(model, 8)
    trained = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    assert trained == 28_357_632


def cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("grid", [(16, 16), (23, 12), (40, 37)])
def test_positions_are_the_bicubic_formula(tiny, grid):
    trunk, _ = build_vit(tiny, "random")
    embedding = drawn(trunk)[0].pos_embed[0].detach()
    square = embedding[1:].view(37, 37, -1).double()
    weights = []
    for side in grid:
        matrix = torch.zeros(side, 37, dtype=torch.float64)
        for i in range(side):
            at = (i + 0.5) * 37 / (side + 0.1) - 0.5
            for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                matrix[i, min(max(tap, 0), 36)] += cubic(at - tap)
        weights.append(matrix)
    expected = torch.einsum("iy,jx,yxc->ijc", *weights, square).flatten(0, 1)
    found = trunk[0].positions(*grid)[0]
    assert torch.equal(found[0], embedding[0])
    torch.testing.assert_close(found[1:].double(), expected, atol=1e-5, rtol=0)


def test_tokens_travel_as_maps():
    tokens = torch.randn(2, 1 + 3 * 5, 4)
    packed = pack(tokens, 3, 5)
    assert packed.shape == (2, 4, 4, 5) and torch.equal(packed[:, :, 0, -1], tokens[:, 0])
    back, grid = unpack(packed.contiguous())
    assert grid == (3, 5) and torch.equal(back, tokens)


def test_frozen_blocks_are_computed_once_and_not_trained(tiny):
    for freeze_te, trained in ((4, {"1.blocks.4"}), (5, set())):
        trunk, _ = build_vit(tiny, "random", freeze_te)
        model = DescriptorModel(drawn(trunk), GeM(), TINY.dim)
        freeze(model, freeze_te)
        x = torch.randn(2, 3, 42, 28)
        torch.testing.assert_close(model(model.frozen_part(x)), model(x))
        model(x).square().sum().backward()
        moved = {k.rsplit(".", 2)[0] for k, p in trunk.named_parameters() if p.grad is not None}
        assert {name[:10] for name in moved} == trained, moved
    trunk, _ = build_vit(tiny, "random", 0)
    model = DescriptorModel(drawn(trunk), GeM(), TINY.dim)
    freeze(model, 0)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in trunk.parameters())


def test_other_sizes_become_multiples_of_the_patch(tiny):
    trunk, _ = build_vit(tiny, "random", 1)
    found = drawn(trunk)(torch.rand(1, 3, 50, 31))
    assert found.shape == (1, 32, 4, 2)
    assert "images of 50 x 31 px are resized to 56 x 28" in WARNINGS[0]
    gray = vit.to_multiples(torch.full((1, 3, 50, 31), 0.5))
    torch.testing.assert_close(gray, torch.full((1, 3, 56, 28), 0.5))


def test_the_class_token_comes_along_where_it_is_asked_for(tiny):
    plain, _ = build_vit(tiny, "random")
    both, _ = build_vit(tiny, "random", with_class=True)
    both.load_state_dict(drawn(plain).state_dict())
    x = torch.rand(1, 3, 28, 42)
    tokens, grid = unpack(both(x))
    assert grid == (2, 3) and torch.equal(tokens[:, 1:], tokens_of(plain(x)))


def test_files_that_do_not_fit_are_named(tiny, tmp_path):
    file = tmp_path / "dino.pth"
    with pytest.raises(InputError, match=r"dino\.pth does not exist: download tiny_pretrain\.pth"):
        build_vit(tiny, str(file))
    with pytest.raises(InputError, match=r"needs DINOv2's weights: download tiny_pretrain\.pth"):
        build_vit(tiny, None)
    with pytest.raises(InputError, match="--freeze_te 6 is not possible: tiny has blocks 0 to 4"):
        build_vit(tiny, "random", 6)
    trunk, _ = build_vit(tiny, "none", 1)
    assert "RANDOM" in WARNINGS[0]
    state = {key.partition(".")[2]: value for key, value in trunk.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 32)
    torch.save(state, file)
    again, origin = build_vit(tiny, str(file), 2)
    assert origin == "DINOv2, file dino.pth" and again.initialized
    assert torch.equal(again[0].blocks["1"].mlp.fc1.weight, trunk[1].blocks["1"].mlp.fc1.weight)
    changes = (
        ({"register_tokens": torch.zeros(1)}, "with register tokens"),
        ({"cls_token": torch.zeros(1, 1, 384)}, "is dinov2_vits14: give --backbone=dinov2_vits14"),
        ({"norm.weight": torch.zeros(5)}, r"its norm\.weight is \(5,\), not \(32,\)"),
        ({"head.weight": torch.zeros(5)}, r"it has head\.weight beside"),
    )
    for changed, says in changes:
        torch.save(state | changed, file)
        with pytest.raises(InputError, match=says):
            build_vit(tiny, str(file))
    del state["blocks.1.ls2.gamma"]
    torch.save(state, file)
    with pytest.raises(InputError, match=r"it has no blocks\.1\.ls2\.gamma"):
        build_vit(tiny, str(file))
