"""How much of what was learned is kept: weights between the untrained model's and the trained one's."""

import math

import torch

from model import DescriptorModel
from training.mining import TupleLoader

SHARES = (1.0, 0.85, 0.7)  # of the way from the untrained weights to the trained ones


@torch.no_grad()
def keep_best_share(model: DescriptorModel, untrained: DescriptorModel, tuples: TupleLoader) -> str:
    """Give `model`, trained, the weights of the share that ranks the held-out queries best; -> a line.

    All of it, unless another is better by more than the standard error of the mean difference.
    Pretrained weights know more than a small training set shows, and what was learned is mixed with it
    along the straight line between both (Wortsman et al., Robust fine-tuning of zero-shot models, 2022).
    """
    before = untrained.state_dict()
    after = {name: value.clone() for name, value in model.state_dict().items()}

    def take(share: float) -> None:
        mixed = {
            name: torch.lerp(before[name], value, share) if value.is_floating_point() else value
            for name, value in after.items()
        }
        model.load_state_dict(mixed)
        tuples.forget_descriptors()

    scores = {}
    for share in reversed(SHARES):  # all of it last: it mostly stays, and so do its descriptors
        take(share)
        scores[share] = tuples.judge(model)[0]
    best = SHARES[0]
    for share in SHARES[1:]:
        gain = scores[share] - scores[SHARES[0]]
        surely = float(gain.mean()) > float(gain.std(correction=0)) / math.sqrt(len(gain))
        if surely and scores[share].mean() > scores[best].mean():
            best = share
    if best != SHARES[0]:
        take(best)
    ranks = ", ".join(f"{share:.0%} {float(scores[share].mean()):.3f}" for share in SHARES)
    return (
        f"Of the way from the untrained to the trained weights {best:.0%} is gone, chosen by the "
        f"held-out queries (MRR: {ranks})."
    )
