"""From a map of local descriptors to one vector: GeM, and a linear layer behind any aggregation.

NetVLAD is model.py's. An aggregation maps (N, C, h, w) to (N, D); DescriptorModel normalizes the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import NetVLAD, half_precision

GEM_EPS = 1e-6
AGGREGATIONS = ("netvlad", "gem", "supervlad")
L2_PLACES = ("before_pool", "after_pool")


class GeM(nn.Module):
    """Generalized mean (mean max(x, eps)^p)^(1/p) over positions, p learned (Radenovic et al. 2018).

    l2_first: L2-normalize each position's channels before.
    """

    def __init__(self, l2_first: bool = True, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p))
        self.l2_first = l2_first

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, C)."""
        with half_precision(x.device, "float32"):  # powers lose too much in half precision
            x = F.normalize(x.float(), dim=1) if self.l2_first else x.float()
            return x.clamp(min=GEM_EPS).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


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


def build_aggregation(
    name: str, channels: int, clusters: int, fc_output_dim: int | None, l2: str
) -> tuple[nn.Module, int]:
    """An aggregation of maps of `channels`, and the dimension of what it makes."""
    if name == "netvlad":
        pool, dim = NetVLAD(clusters, channels), clusters * channels
    else:
        pool, dim = GeM(l2_first=l2 == "before_pool"), channels
    if fc_output_dim is None:
        return pool, dim
    return Projected(pool, dim, fc_output_dim), fc_output_dim
