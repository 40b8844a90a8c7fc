"""From a map of local descriptors to one vector: GeM, MixVPR, Conv-AP, attention, a linear layer behind any.

NetVLAD is model.py's. An aggregation maps (N, C, h, w) to (N, D); DescriptorModel normalizes the result.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import InputError, NetVLAD, half_precision
from recognition.salad import SALAD
from recognition.supervlad import SuperVLAD

GEM_EPS = 1e-6
# What of GeM is L2-normalized: channels before it, the descriptor after it. As published, before_pool
# left the descriptor as it was: that is before_pool_only.
L2_PLACES = ("before_pool", "after_pool", "before_pool_only", "none")


class GeM(nn.Module):
    """Generalized mean (mean max(x, eps)^p)^(1/p) over positions, p learned (Radenovic et al. 2018).

    l2_first: L2-normalize each position's channels before. unit_norm: whether the result, if it is the
    descriptor, is to be L2-normalized.
    """

    def __init__(self, l2_first: bool = True, unit_norm: bool = True, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p))
        self.l2_first, self.unit_norm = l2_first, unit_norm

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, C)."""
        with half_precision(x.device, "float32"):  # powers lose too much in half precision
            x = F.normalize(x.float(), dim=1) if self.l2_first else x.float()
            return x.clamp(min=GEM_EPS).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class MixVPR(nn.Module):
    """Each channel's map, seen as one vector, is mixed by MLPs; then channels and positions are reduced.

    Ali-bey et al., WACV 2023: `depth` times x + MLP(LayerNorm(x)) over the positions, a linear layer
    over the channels, one over the positions. positions: of the map, h · w; None waits for the first
    map, whose size then belongs to the weights. InputError for a map of another size.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        out_rows: int,
        depth: int = 4,
        positions: int | None = None,
    ) -> None:
        super().__init__()
        self.depth, self.rows = depth, out_rows
        self.mix = nn.Sequential()
        self.channel_proj = nn.Linear(channels, out_channels)
        self.row_proj: nn.Module = nn.Identity()
        self.positions: int | None = None
        if positions:
            self.set_positions(positions)

    def set_positions(self, positions: int) -> None:
        """Make the layers for maps of so many positions."""
        self.positions = positions
        like = self.channel_proj.weight
        with torch.inference_mode(False):  # the first map may come when nothing is trained
            self.mix = nn.Sequential(*(Mixer(positions) for _ in range(self.depth))).to(like)
            self.row_proj = nn.Linear(positions, self.rows).to(like)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, out_channels · out_rows), channel-major."""
        x = x.flatten(2)
        if self.positions is None:
            self.set_positions(x.shape[2])
        if x.shape[2] != self.positions:
            raise InputError(
                f"MixVPR was made for maps of {self.positions} positions, and these images give "
                f"{x.shape[2]}: use the size of images that it was trained with."
            )
        x = self.channel_proj(self.mix(x).transpose(1, 2)).transpose(1, 2)
        return self.row_proj(x).flatten(1)


class Mixer(nn.Module):
    """x + MLP(LayerNorm(x)) over the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)
        )
        for layer in (self.mix[1], self.mix[3]):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same shape."""
        return x + self.mix(x)


class ConvAP(nn.Module):
    """A 1 x 1 convolution to `dim` channels, averaged over `cells` x `cells` parts of the map.

    Ali-bey et al., "GSV-Cities", Neurocomputing 2022.
    """

    def __init__(self, channels: int, dim: int, cells: int = 2) -> None:
        super().__init__()
        self.channel_pool = nn.Conv2d(channels, dim, kernel_size=1)
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, dim · cells²), channel-major."""
        return F.adaptive_avg_pool2d(self.channel_pool(x), self.cells).flatten(1)


class AttentionPooling(nn.Module):
    """A learned query a head says where to look: softmax over positions of q · K x, sum of V x.

    All heads together have as many channels as the map. V begins as the identity and q at 0, so that
    the layer begins as an average.
    """

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, channels // heads))
        self.key = nn.Conv2d(channels, channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        nn.init.dirac_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, C), head-major."""
        x = F.normalize(x, dim=1)
        heads, each = self.query.shape
        key, value = (
            part(x).flatten(2).unflatten(1, (heads, each)) for part in (self.key, self.value)
        )
        scores = torch.einsum("hc,nhcl->nhl", self.query, key) / math.sqrt(each)
        return torch.einsum("nhl,nhcl->nhc", scores.softmax(dim=2), value).flatten(1)


class Projected(nn.Module):
    """An aggregation, then a linear layer to `dim` numbers."""

    def __init__(self, pool: nn.Module, channels: int, dim: int) -> None:
        super().__init__()
        self.pool = pool
        self.fc = nn.Linear(channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, dim)."""
        return self.fc(self.pool(x))

    @property
    def initialized(self) -> bool:
        """Whether the aggregation's values are more than those of its construction."""
        return getattr(self.pool, "initialized", True)

    def initialize(self, descriptors: Tensor, seed: int = 0) -> None:
        """As the aggregation does."""
        self.pool.initialize(descriptors, seed)


def _netvlad(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    clusters = settings["netvlad_clusters"]
    return NetVLAD(clusters, channels), clusters * channels


def _gem(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    l2 = settings["l2"]
    unit_norm = l2 in ("before_pool", "after_pool")
    return GeM(l2 in ("before_pool", "before_pool_only"), unit_norm), channels


def _mixvpr(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    out, rows = settings["mix_out_channels"], settings["mix_out_rows"]
    return MixVPR(channels, out, rows, settings["mix_depth"]), out * rows


def _convap(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    dim, cells = settings["convap_dim"], settings["convap_cells"]
    return ConvAP(channels, dim, cells), dim * cells**2


def _supervlad(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    clusters, ghosts = settings["supervlad_clusters"], settings["ghost_clusters"]
    layer = SuperVLAD(clusters, ghosts, channels, settings["crossimage_encoder"])
    return layer, clusters * channels


def _salad(channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    sizes = [settings[name] for name in ("salad_clusters", "salad_cluster_dim", "salad_token_dim")]
    return SALAD(channels, *sizes), sizes[0] * sizes[1] + sizes[2]


# By name: of a map's channels and the settings (AGGREGATION_SETTINGS), the layer and its dimension.
AGGREGATIONS: dict[str, Callable[[int, Mapping], tuple[nn.Module, int]]] = {
    "netvlad": _netvlad,
    "gem": _gem,
    "mixvpr": _mixvpr,
    "convap": _convap,
    "attention": lambda channels, _settings: (AttentionPooling(channels), channels),
    "supervlad": _supervlad,
    "salad": _salad,
}
# What the layers are made with, and the values where nothing else is said.
AGGREGATION_SETTINGS = {
    "netvlad_clusters": 64,
    "fc_output_dim": None,
    "l2": L2_PLACES[0],
    "mix_out_channels": 1024,
    "mix_out_rows": 4,
    "mix_depth": 4,
    "convap_dim": 1024,
    "convap_cells": 2,
    "supervlad_clusters": 4,
    "ghost_clusters": 1,
    "crossimage_encoder": False,
    "salad_clusters": 64,
    "salad_cluster_dim": 128,
    "salad_token_dim": 256,
}


def build_aggregation(name: str, channels: int, settings: Mapping) -> tuple[nn.Module, int]:
    """One of AGGREGATIONS of maps of `channels`, and the dimension of what it makes.

    settings: of AGGREGATION_SETTINGS, those that differ at least. InputError for a cross-image encoder
    that would not be the last layer.
    """
    settings = {**AGGREGATION_SETTINGS, **settings}
    alone = name == "supervlad" and settings["fc_output_dim"] is None
    if settings["crossimage_encoder"] and not alone:
        raise InputError(
            "--crossimage_encoder belongs to --aggregation supervlad without --fc_output_dim: leave "
            "it out."
        )
    pool, dim = AGGREGATIONS[name](channels, settings)
    if settings["fc_output_dim"] is None:
        return pool, dim
    return Projected(pool, dim, settings["fc_output_dim"]), settings["fc_output_dim"]


def fit_to(aggregation: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a MixVPR among the layers the number of positions of a state dict of the model."""
    for module in aggregation.modules():
        rows = [v for k, v in state.items() if k.endswith("row_proj.weight")]
        if isinstance(module, MixVPR) and rows:
            module.set_positions(rows[0].shape[1])
