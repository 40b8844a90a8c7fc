"""Objectives on images of classes: CosFace and its kin, VICReg on two views, a domain adversary.

Each is a module with a rate of its own where it has parameters; ClassObjective adds up what a run wants.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DescriptorModel
from training.distributed import sum_over_processes

LOSS_FUNCTIONS = ("cosface", "arcface", "sphereface", "none")
SCALE_AND_MARGIN = {"cosface": (30.0, 0.4), "arcface": (64.0, 0.5), "sphereface": (30.0, 1.5)}
EXPANDED = 2048
VICREG = (25.0, 25.0, 1.0)  # weights of invariance, variance, covariance
VARIANCE_EPS = 1e-4
ADVERSARY_LR = 1e-3
ADVERSARY_SIZES = (50, 20)
ADVERSARY_GROWTH = 10.0


# ---------------------------------------------------------------- classes


class Classifier(nn.Module):
    """The logits of one group's classes, scaled cosines, the right one's lowered by a margin.

    cosface: s (cos t - m) (Wang et al., CVPR 2018); arcface: s cos(t + m) (Deng et al., CVPR 2019),
    beyond t = pi - m s (cos t - m sin m) so that it goes on falling; sphereface: s psi(t),
    psi(t) = (-1)^k cos(m t) - 2 k for t from k pi / m (Liu et al., CVPR 2017).
    Trained at `lr` by an Adam of its own.
    """

    apart = True

    def __init__(self, dim: int, classes: int, kind: str, lr: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))
        self.kind, self.lr = kind, lr
        self.scale, self.margin = SCALE_AND_MARGIN[kind]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, classes) of descriptors x (B, D) whose classes are labels (B,)."""
        cosine = F.normalize(x, dim=1, eps=1e-8) @ F.normalize(self.weight, dim=1, eps=1e-8).T
        right = cosine.gather(1, labels[:, None])
        return self.scale * cosine.scatter(1, labels[:, None], self.lowered(right))

    def lowered(self, cosine: Tensor) -> Tensor:
        """The cosines to the right classes, less the margin."""
        m = self.margin
        if self.kind == "cosface":
            return cosine - m
        angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
        if self.kind == "arcface":
            return torch.where(angle <= math.pi - m, (angle + m).cos(), cosine - m * math.sin(m))
        k = (m * angle / math.pi).floor().detach()
        return (1 - 2 * (k % 2)) * (m * angle).cos() - 2 * k


# ---------------------------------------------------------------- two views


def vicreg_loss(z: Tensor, other: Tensor) -> Tensor:
    """VICReg (Bardes et al., ICLR 2022) of two views' vectors (B, D).

    25 times the mean squared difference, 25 times the mean over both views of relu(1 - deviation),
    1 times the sum over both of squared covariances off the diagonal / D.
    """
    of_views = [z - z.mean(0), other - other.mean(0)]
    variance = covariance = z.new_zeros(())
    for centered in of_views:
        deviation = (centered.square().sum(0) / (len(z) - 1) + VARIANCE_EPS).sqrt()
        variance = variance + F.relu(1 - deviation).mean() / 2
        matrix = centered.T @ centered / (len(z) - 1)
        off = matrix.square().sum() - matrix.diagonal().square().sum()
        covariance = covariance + off / z.shape[1]
    parts = ((z - other).square().mean(), variance, covariance)
    return sum(weight * part for weight, part in zip(VICREG, parts))


def make_expander(dim: int) -> nn.Sequential:
    """The MLP between descriptors before their normalization and VICReg."""
    return nn.Sequential(
        nn.Linear(dim, EXPANDED), nn.BatchNorm1d(EXPANDED), nn.ReLU(),
        nn.Linear(EXPANDED, EXPANDED), nn.BatchNorm1d(EXPANDED), nn.ReLU(),
        nn.Linear(EXPANDED, EXPANDED),
    )  # fmt: skip


# ---------------------------------------------------------------- two domains


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """x; its gradient is multiplied by -weight (Ganin et al., JMLR 2016)."""
    return _Reversal.apply(x, weight)


class Adversary(nn.Module):
    """Tells images of the target domain from those of the source by their averaged map.

    What it learns of them is taken from the trunk: its gradient arrives there times
    -weight (2 / (1 + exp(-10 p)) - 1), p the share of the training that is done.
    """

    lr = ADVERSARY_LR
    apart = True

    def __init__(self, channels: int, weight: float) -> None:
        super().__init__()
        sizes = (channels, *ADVERSARY_SIZES)
        layers = [
            layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))
        self.weight = weight
        self.register_buffer("counted", torch.zeros(2))  # right answers, all

    def forward(self, source: Tensor, target: Tensor, share: float) -> Tensor:
        """The loss of maps (n, C, h, w), (m, C, h, w); both domains count alike."""
        weight = self.weight * (2 / (1 + math.exp(-ADVERSARY_GROWTH * share)) - 1)
        pooled = torch.cat([source.float().mean((2, 3)), target.float().mean((2, 3))])
        said = self.layers(reverse_gradient(pooled, weight))
        truth = torch.arange(2, device=said.device).repeat_interleave(
            torch.tensor([len(source), len(target)], device=said.device)
        )
        right = said.detach().argmax(1) == truth
        self.counted += torch.stack([right.sum(), torch.tensor(len(truth), device=said.device)])
        losses = F.cross_entropy(said, truth, reduction="none")
        return sum(part.mean() for part in losses.split([len(source), len(target)])) / 2

    def shown(self) -> dict[str, float]:
        """Its accuracy since it was last asked; 0.5 is a trunk that gives nothing away."""
        right, total = sum_over_processes([], self.counted.clone()).tolist()
        self.counted.zero_()
        return {"domain accuracy": right / max(1.0, total)}


# ---------------------------------------------------------------- together


class ClassObjective(nn.Module):
    """What train() minimizes on batches of ClassBatches: of images' classes, views, domains.

    classes: how many each group has. kind: one of LOSS_FUNCTIONS. ssl_weight: of VICReg on two views;
    adversary_weight: of the domains; 0 leaves it out. The loader says by `use` which group a batch is
    of, and by `share` how much of the training is done.
    """

    def __init__(
        self,
        model: DescriptorModel,
        classes: Sequence[int],
        kind: str,
        lr: float,
        ssl_weight: float = 0.0,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        dim = model.descriptor_dim
        of_classes = [] if kind == "none" else [Classifier(dim, n, kind, lr) for n in classes]
        self.classifiers = nn.ModuleList(of_classes)
        self.ssl_weight = ssl_weight
        self.expander = make_expander(dim) if ssl_weight else None
        self.adversary = adversary
        self.group, self.share = 0, 0.0

    def use(self, group: int) -> None:
        """Train this group's classifier, and let the others rest."""
        self.group = group
        for number, classifier in enumerate(self.classifiers):
            classifier.requires_grad_(number == group)

    def forward(
        self, model: DescriptorModel, batch: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        """Losses (B,) of a batch: images, labels, and where they are wanted other views, target images."""
        images, labels, *more = (part.to(device, non_blocking=True) for part in batch)
        n, views = len(images), 2 if self.expander is not None else 1
        stacked = torch.cat([images, *more]).contiguous(memory_format=torch.channels_last)
        with model.autocast(device):
            local = model.local_descriptors(stacked)
            vectors = model.aggregation(local[: views * n]).float()
        losses = vectors.new_zeros(n)
        if len(self.classifiers):
            logits = self.classifiers[self.group](F.normalize(vectors[:n], dim=1), labels)
            losses = losses + F.cross_entropy(logits, labels, reduction="none")
        if self.expander is not None:
            with model.autocast(device):
                expanded = self.expander(vectors).float()
            losses = losses + self.ssl_weight * vicreg_loss(*expanded.split(n))
        if self.adversary is not None:
            losses = losses + self.adversary(local[:n], local[views * n :], self.share)
        return losses

    def shown(self) -> dict[str, float]:
        """Of an epoch, what else there is to see."""
        return self.adversary.shown() if self.adversary is not None else {}
