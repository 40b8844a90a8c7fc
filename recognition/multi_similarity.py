"""Multi-similarity loss and miner (Wang et al., CVPR 2019) on batches of places x images."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import DescriptorModel, warn
from training.distributed import gather_with_gradient

# Of GSV-Cities (Ali-bey et al. 2022): weights of positives and negatives, threshold, miner's margin.
ALPHA, BETA, BASE, EPSILON = 1.0, 50.0, 0.0, 0.1


def multi_similarity(
    similarity: Tensor,
    same: Tensor,
    itself: Tensor,
    beta: float = BETA,
    base: Tensor | float = BASE,
) -> Tensor:
    """Loss (n,) of each anchor over the pairs that the miner keeps.

    similarity, same, itself: (n, N), of anchors to all images: cosine, whether of the same place,
    whether the anchor itself. A positive is kept if it is less similar than the most similar negative
    plus EPSILON, a negative if more than the least similar positive minus EPSILON.
    l = ln(1 + sum_p exp(-ALPHA (s_p - base))) / ALPHA + ln(1 + sum_n exp(beta (s_n - base))) / beta.
    """
    positive, negative = same & ~itself, ~same
    with torch.no_grad():
        hardest = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        easiest = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        positive &= similarity - EPSILON < hardest
        negative &= similarity + EPSILON > easiest

    def soft(logits: Tensor, kept: Tensor) -> Tensor:
        return torch.logsumexp(F.pad(logits.masked_fill(~kept, -torch.inf), (1, 0)), dim=1)

    towards = soft(-ALPHA * (similarity - base), positive) / ALPHA
    return towards + soft(beta * (similarity - base), negative) / beta


class MultiSimilarity(nn.Module):
    """An objective for train() on batches (images (n, 3, H, W), labels (n,), key) of this process.

    Similarities are to the images of all processes. micro_batch: images whose activations are held
    at a time, at the price of a second pass; the gradient is the same. encoder_once: whether a
    cross-image encoder is trained in the first step only, as in SuperVLAD's published program.
    base: the similarity that is neutral; None: the mean of different places in the first batch.
    From descriptors far above it the loss mostly learns to take all images apart, and places are
    lost (on the sample, where random weights give 0.9, R@1 on val goes from 37 to 23 % with base
    0, to 67 % with None). The key seeds what is random in the network (dropout), so that processes agree
    and a run can be taken up.
    """

    def __init__(
        self,
        micro_batch: int | None = None,
        encoder_once: bool = False,
        base: float | None = BASE,
    ) -> None:
        super().__init__()
        self.micro_batch, self.encoder_once, self.measures = micro_batch, encoder_once, base is None
        self.register_buffer("base", torch.tensor(math.nan if base is None else float(base)))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, model: DescriptorModel, batch: list[Tensor], device: torch.device) -> Tensor:
        """Losses (n,) of this process's images."""
        images, labels, key = batch
        labels = labels.to(device)
        if self.encoder_once:
            model.aggregation.encoder.requires_grad_(bool(self.steps == 0))
        self.steps += 1
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(key))
            own = self.describe(model, images, device)
            everyone, first = gather_with_gradient(own)
            all_labels, _ = gather_with_gradient(labels)
            if hasattr(model.aggregation, "across"):
                with model.autocast(device):
                    everyone = model.aggregation.across(everyone).float()
        numbers = torch.arange(first, first + len(own), device=device)
        itself = numbers[:, None] == torch.arange(len(everyone), device=device)
        same = labels[:, None] == all_labels
        similarity = everyone[first : first + len(own)] @ everyone.T
        if self.measures and self.steps == 1:
            with torch.no_grad():
                apart = all_labels[:, None] != all_labels
                self.base.copy_((everyone @ everyone.T)[apart].mean())
        return multi_similarity(similarity, same, itself, base=self.base)

    def shown(self) -> dict[str, float]:
        """The base of the loss, if it was measured."""
        return {"loss's base": float(self.base)} if self.measures else {}

    def describe(self, model: DescriptorModel, images: Tensor, device: torch.device) -> Tensor:
        """Descriptors (n, D), float32."""
        parts = []
        for part in images.split(self.micro_batch or len(images)):
            part = part.to(device, non_blocking=True)
            part = part.contiguous(memory_format=torch.channels_last)
            with model.autocast(device):
                if len(part) < len(images) and torch.is_grad_enabled():
                    if model.first_trained:
                        with torch.no_grad():
                            part = model.frozen_part(part)
                    found = checkpoint(
                        model,
                        part,
                        use_reentrant=False,
                        context_fn=lambda: (contextlib.nullcontext(), statistics_kept(model)),
                    )
                else:
                    found = model(part)
            parts.append(found.float())
        return torch.cat(parts)


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let the second pass of a micro-batch leave the statistics of batch normalizations as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if norms:
        warn(
            "--micro_batch: batch normalizations see the images of a micro-batch, not of the batch."
        )
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
