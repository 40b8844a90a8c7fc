"""Optimizers, schedules of their rate, and when to stop: what train() asks for, by name."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

# Each optimizer and, where no --weight_decay is given, its own.
OPTIMIZERS = {
    "adam": (torch.optim.Adam, 0.0),
    "adamw": (torch.optim.AdamW, 1e-2),
    "sgd": (torch.optim.SGD, 1e-3),
    "asgd": (torch.optim.ASGD, 0.0),
}
MOMENTUM = 0.9
SCHEDULERS = ("none", "step", "multistep", "cosine", "plateau")
PLATEAU_GAIN = 1e-4  # share of the best R@1 by which it must rise to count


def make_optimizer(
    name: str, weight_decay: float | None = None, average_after: int = 0
) -> Callable[[list[dict]], Optimizer]:
    """What makes an optimizer of groups of parameters.

    Vectors (biases, norms, GeM's p) do not decay. average_after: steps after which ASGD begins to average
    the weights (Polyak & Juditsky 1992); train() then judges and keeps those too. Groups that are `apart`
    have an Adam of their own.
    """
    kind, decay = OPTIMIZERS[name]
    decay = decay if weight_decay is None else weight_decay
    options = {"sgd": {"momentum": MOMENTUM}, "asgd": {"t0": average_after}}.get(name, {})

    def make(groups: list[dict]) -> Optimizer:
        apart = [group for group in groups if group.get("apart")]
        split = []
        for group in (group for group in groups if not group.get("apart")):
            for is_vector in (False, True):
                params = [p for p in group["params"] if (p.dim() < 2) == is_vector]
                if params:
                    split.append(
                        {**group, "params": params, "weight_decay": 0.0 if is_vector else decay}
                    )
        own = kind(split, **options)
        return Several([own, torch.optim.Adam(apart)]) if apart else own

    return make


class Several:
    """Optimizers that step together: what train() uses of one."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """Those of all."""
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> dict:
        """By parameter, that of all."""
        return {p: state for each in self.optimizers for p, state in each.state.items()}

    def zero_grad(self) -> None:
        """Of all."""
        for each in self.optimizers:
            each.zero_grad()

    def step(self) -> None:
        """Of all."""
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict:
        """The states of all, for `load_state_dict`."""
        return {"several": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        for each, part in zip(self.optimizers, state["several"]):
            each.load_state_dict(part)


def make_rate(
    name: str,
    epochs: int,
    *,
    warmup: float = 0.0,
    step: int = 5,
    factor: float = 0.3,
    milestones: Sequence[int] = (),
) -> Callable[[float, list[dict]], float]:
    """What the peak rate is multiplied with, of the share of `epochs` done and the epochs' records.

    step: times `factor` every `step` epochs. multistep: times `factor` after each of `milestones`
    epochs. cosine: half a cosine over all epochs, an epoch at a time. plateau: times `factor` whenever
    val R@1 has not risen for more than `step` epochs. The first `warmup` epochs climb linearly from 0.
    """

    def rate(share: float, history: list[dict]) -> float:
        done = len(history)
        by_name = {
            "none": lambda: 1.0,
            "step": lambda: factor ** (done // step),
            "multistep": lambda: factor ** sum(done >= milestone for milestone in milestones),
            "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done / epochs)),
            "plateau": lambda: factor ** plateaus([r["val R@1"] for r in history], step),
        }
        return by_name[name]() * min(1.0, share * epochs / warmup if warmup else 1.0)

    return rate


def plateaus(values: list[float], patience: int) -> int:
    """How often ReduceLROnPlateau(mode="max") would have lowered the rate."""
    best, since, count = -math.inf, 0, 0
    for value in values:
        if best == -math.inf or value > best * (1 + PLATEAU_GAIN):
            best, since = value, 0
        else:
            since += 1
        if since > patience:
            since, count = 0, count + 1
    return count


def make_stop(patience: int, score: Callable[[dict], float]) -> Callable[[list[dict]], bool]:
    """Whether the best score was `patience` epochs ago."""

    def stop(history: list[dict]) -> bool:
        scores = [score(record) for record in history]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience

    return stop
