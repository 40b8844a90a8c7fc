"""What is minimized beside train.py's ranking loss: SARE (Liu et al., ICCV 2019) on the same tuples."""

import torch
from torch import Tensor, nn

from train import MARGIN, RankingLoss

CRITERIA = ("triplet", "sare_ind", "sare_joint")


def sare_loss(q: Tensor, p: Tensor, n: Tensor, joint: bool) -> Tensor:
    """-log softmax of -d(q, p)^2 against -d(q, n)^2, of each negative alone or of all jointly.

    q, p: (B, D); n: (B, N, D) -> (B, N), or (B, 1) if joint.
    """
    to_positive = (q - p).square().sum(dim=-1)[:, None]
    to_negatives = (q[:, None] - n).square().sum(dim=-1)
    if not joint:
        return nn.functional.softplus(to_positive - to_negatives)
    return torch.logsumexp(torch.cat([-to_positive, -to_negatives], 1), 1)[:, None] + to_positive


class Sare(RankingLoss):
    """SARE on batches (q, p, n). The published sum is divided by the number of negatives, as here."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = joint

    def losses(self, q: Tensor, p: Tensor, n: Tensor) -> Tensor:
        """Losses of descriptors (B, D), (B, D), (B, N, D)."""
        losses = sare_loss(q, p, n, self.joint)
        return losses / n.shape[1] if self.joint else losses

    def diagnose(self, loss: float, violations: float) -> None:
        """Nothing: these losses are never 0, so that their number says nothing."""


def build_objective(criterion: str, margin: float = MARGIN) -> nn.Module:
    """One of CRITERIA."""
    return RankingLoss(margin) if criterion == "triplet" else Sare(criterion == "sare_joint")
