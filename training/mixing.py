"""How much of what was learned is kept: weights between the untrained model's and the trained one's."""

import torch

from model import DescriptorModel
from training.mining import TupleLoader

SHARES = (1.0, 0.85, 0.7)  # of the way from the untrained weights to the trained ones


@torch.no_grad()
def keep_best_share(model: DescriptorModel, untrained: DescriptorModel, tuples: TupleLoader) -> str:
    """Give `model`, trained, the weights of the share that ranks the held-out queries best; -> a line.

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

    ranks = {}
    for share in SHARES:
        take(share)
        ranks[share] = float(tuples.judge(model)[0].mean())
    best = max(SHARES, key=ranks.__getitem__)
    take(best)
    scores = ", ".join(f"{share:.0%} {rank:.3f}" for share, rank in ranks.items())
    return (
        f"Of the way from the untrained to the trained weights {best:.0%} is gone, chosen by the "
        f"held-out queries (MRR: {scores})."
    )
