"""DINOv2's vision transformers with patches of 14 x 14 px (Oquab et al. 2024) as a trunk of two stages.

The first stage is what is frozen (all of it trained where nothing is), the second makes the map of
local descriptors (N, C, H / 14, W / 14). Parameters have the names of the official files.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DescriptorModel, InputError, warn
from recognition.weights import read_weights

PATCH_PX = 14
GRID = 37  # patches a side in training, 518 px
# DINOv2 interpolates its position embedding as if a grid had so many patches more than it has.
GRID_OFFSET = 0.1
LAYER_NORM_EPS = 1e-6
TRAINED_BLOCKS = 4  # the last ones, where --freeze_te says nothing


@dataclass(frozen=True)
class VitSize:
    """Channels, blocks, heads of attention."""

    dim: int
    depth: int
    heads: int


SIZES = {
    "dinov2_vits14": VitSize(384, 12, 6),
    "dinov2_vitb14": VitSize(768, 12, 12),
    "dinov2_vitl14": VitSize(1024, 24, 16),
}


def official_file(name: str) -> str:
    """What Meta calls the weights of one of SIZES."""
    return f"{name}_pretrain.pth"


# ---------------------------------------------------------------- layers


class LayerScale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention of tokens with several heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, dim) -> (N, T, dim)."""
        # (N, T, 3 * dim) -> (3, N, heads, T, dim / heads)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + scale(attention(norm(x))), then the same with two linear layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, dim) -> (N, T, dim)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def _blocks(size: VitSize, numbers: range) -> nn.ModuleDict:
    return nn.ModuleDict({str(i): Block(size.dim, size.heads) for i in numbers})


# ---------------------------------------------------------------- stages


class FirstStage(nn.Module):
    """Images to tokens, and the blocks before `end`.

    The tokens leave as a map, so that caches and memory formats of maps serve them: `pack`.
    """

    def __init__(self, size: VitSize, end: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID**2, size.dim))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, size.dim, kernel_size=PATCH_PX, stride=PATCH_PX)}
        )
        self.blocks = _blocks(size, range(end))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> tokens packed, (N, dim, H / 14 + 1, W / 14).

        H and W that are no multiples of 14 become the nearest ones, which is said once.
        """
        patches = self.patch_embed["proj"](to_multiples(x))
        grid = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens_of(patches)], 1)
        tokens = tokens + self.positions(*grid)
        for block in self.blocks.values():
            tokens = block(tokens)
        return pack(tokens, *grid)

    def positions(self, h: int, w: int) -> Tensor:
        """The position embedding (1, 1 + h * w, dim), bicubic where the grid is another than trained on.

        The source of row i is (i + 1/2) * 37 / (h + GRID_OFFSET) - 1/2, as with the released weights.
        """
        if (h, w) == (GRID, GRID):
            return self.pos_embed
        of_cls, of_patches = self.pos_embed.float().split([1, GRID**2], 1)
        square = of_patches.transpose(1, 2).unflatten(2, (GRID, GRID))
        scale = [(side + GRID_OFFSET) / GRID for side in (h, w)]
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([of_cls, tokens_of(resized)], 1)


class LastStage(nn.Module):
    """The blocks from `begin`, the last norm, and the patches' tokens as a map.

    with_class: the class token stays with them, packed.
    """

    def __init__(self, size: VitSize, begin: int, with_class: bool) -> None:
        super().__init__()
        self.blocks = _blocks(size, range(begin, size.depth))
        self.norm = nn.LayerNorm(size.dim, LAYER_NORM_EPS)
        self.with_class = with_class

    def forward(self, x: Tensor) -> Tensor:
        """Tokens packed (N, dim, h + 1, w) -> (N, dim, h, w)."""
        tokens, (h, w) = unpack(x)
        for block in self.blocks.values():
            tokens = block(tokens)
        tokens = self.norm(tokens)
        if self.with_class:
            return pack(tokens, h, w)
        return tokens[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def tokens_of(patches: Tensor) -> Tensor:
    """A map (N, C, h, w) as tokens (N, h * w, C), row after row."""
    return patches.flatten(2).transpose(1, 2)


def pack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (N, 1 + h * w, C) as a map (N, C, h + 1, w): its first row is 0, …, 0, class token."""
    padded = F.pad(tokens, (0, 0, w - 1, 0))
    return padded.unflatten(1, (h + 1, w)).permute(0, 3, 1, 2)


def unpack(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens (N, 1 + h * w, C) and (h, w) of what `pack` made."""
    h, w = x.shape[2] - 1, x.shape[3]
    return tokens_of(x)[:, w - 1 :], (h, w)


def to_multiples(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) resized to the nearest multiples of PATCH_PX, if they have other sides."""
    sides = [max(1, round(side / PATCH_PX)) * PATCH_PX for side in x.shape[2:]]
    if sides == list(x.shape[2:]):
        return x
    warn(
        f"images of {x.shape[2]} x {x.shape[3]} px are resized to {sides[0]} x {sides[1]}: DINOv2 "
        f"takes multiples of {PATCH_PX}."
    )
    return F.interpolate(x, sides, mode="bilinear", antialias=True)


# ---------------------------------------------------------------- the trunk


def build_vit(
    name: str, weights: str | None, freeze_te: int | None = None, with_class: bool = False
) -> tuple[nn.Sequential, str]:
    """The trunk of one of SIZES, and where its weights are from in words.

    weights: the official file, "none" (random, with a warning) or "random" (to be loaded into).
    freeze_te: the blocks from this one on are in the second stage; None: the last TRAINED_BLOCKS.
    InputError if there is no such block, no file, or the file does not fit.
    """
    size = SIZES[name]
    begin = size.depth - TRAINED_BLOCKS if freeze_te is None else freeze_te
    if not 0 <= begin <= size.depth:
        raise InputError(
            f"--freeze_te {freeze_te} is not possible: {name} has blocks 0 to {size.depth - 1}; "
            f"{size.depth} freezes all of them, 0 none."
        )
    trunk = nn.Sequential(FirstStage(size, begin), LastStage(size, begin, with_class))
    trunk.initialized = weights != "random"
    if weights in (None, "imagenet"):
        raise InputError(
            f"the backbone {name} needs DINOv2's weights: download {official_file(name)} and name it "
            "with --foundation_model_path FILE, or try --weights none (random)."
        )
    if weights in ("none", "random"):
        _draw_weights(trunk)
        if weights == "none":
            warn("the backbone's weights are RANDOM, as --weights none says.")
        return trunk, "random"
    state = torch_file(Path(weights), name)
    trunk.load_state_dict(named_as_in(trunk, official_weights(state, name, weights)))
    return trunk, f"DINOv2, file {Path(weights).name}"


def freeze(model: DescriptorModel, freeze_te: int | None) -> None:
    """Train the second stage's blocks, but not the last norm, as published; all with freeze_te 0."""
    model.freeze_below(0 if freeze_te == 0 else 1)
    model.trunk[1].norm.requires_grad_(freeze_te == 0)


def _draw_weights(trunk: nn.Module) -> None:
    for name, parameter in trunk.named_parameters():
        if name.endswith(("cls_token", "pos_embed")) or parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=0.02)


def torch_file(path: Path, name: str) -> Mapping[str, Tensor]:
    """The tensors of the official file. InputError naming it where it is not there."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: download {official_file(name)} of DINOv2 and name it with "
            "--foundation_model_path."
        )
    return read_weights(path)


def official_weights(state: Mapping[str, Tensor], name: str, source: object) -> dict[str, Tensor]:
    """The official file's tensors, all that the network has and no others (but the mask token).

    InputError naming the network they are of, or the first key that does not fit.
    """
    given = {key: value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in given:
        raise InputError(
            f"{source} is of a DINOv2 with register tokens: name {official_file(name)}, without reg4."
        )
    dim = given["cls_token"].shape[-1] if "cls_token" in given else None
    others = [n for n, size in SIZES.items() if size.dim == dim and n != name]
    if others:
        raise InputError(f"{source} is {others[0]}: give --backbone={others[0]}.")
    with torch.device("meta"):
        size = SIZES[name]
        stages = FirstStage(size, 0), LastStage(size, 0, False)
    wanted = {k: v.shape for stage in stages for k, v in stage.state_dict().items()}
    for key, shape in wanted.items():
        if key not in given:
            raise InputError(f"{source} is no {official_file(name)}: it has no {key}.")
        if given[key].shape != shape:
            shapes = f"{tuple(given[key].shape)}, not {tuple(shape)}"
            raise InputError(f"{source} is no {official_file(name)}: its {key} is {shapes}.")
    if excess := sorted(given.keys() - wanted.keys()):
        raise InputError(f"{source} is no {official_file(name)}: it has {excess[0]} beside.")
    return given


def named_as_in(trunk: nn.Sequential, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of official names under those of the trunk, which put the stage's number before."""
    stage_of = {key.partition(".")[2]: key for key in trunk.state_dict()}
    return {stage_of.get(key, key): value for key, value in state.items()}
