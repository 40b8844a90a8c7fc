"""The training queries split by place, for training, validation and test loss."""

import numpy as np

from eval import positives_within
from model import InputError

PARTS = {"train": 0.8, "val": 0.1, "test": 0.1}
SPLIT_DIRECTIONS = 12


def split_by_place(
    utm_query: np.ndarray, utm_index: np.ndarray, threshold: float, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Queries in three parts, 80/10/10, such that no index image is near queries of two parts.

    Cuts across a direction of the map put val at one end, test at the other; queries that share an
    index image within `threshold` with another part are dropped. Of SPLIT_DIRECTIONS (the first is
    random by seed) the one that drops fewest is taken. -> (part -> rows, number dropped).
    Raises InputError if every direction leaves a part empty.
    """
    positives = positives_within(utm_query, utm_index, threshold)
    count = len(utm_query)
    held_out = max(1, round(PARTS["val"] * count))
    first = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    best: np.ndarray | None = None
    for angle in first + np.arange(SPLIT_DIRECTIONS) * 2 * np.pi / SPLIT_DIRECTIONS:
        along = np.argsort(utm_query @ [np.cos(angle), np.sin(angle)], kind="stable")
        part = np.zeros(count, dtype=int)
        part[along[:held_out]], part[along[count - held_out :]] = 1, 2
        part = _drop_between(part, positives, len(utm_index))
        kept = np.bincount(part[part >= 0], minlength=3)
        if kept.min() > 0 and (best is None or (part >= 0).sum() > (best >= 0).sum()):
            best = part
    if best is None:
        raise InputError(
            f"the {count} training queries cannot be split 80/10/10 by place: they need at least "
            f"three places that share no index image within {threshold:g} m."
        )
    return {name: np.flatnonzero(best == i) for i, name in enumerate(PARTS)}, int((best < 0).sum())


def _drop_between(part: np.ndarray, positives: list[np.ndarray], index_count: int) -> np.ndarray:
    """`part` (nq,) with -1 for queries whose index images are near a query of a later part."""
    part = part.copy()
    claimed = np.zeros(index_count, dtype=bool)
    for number in (2, 1, 0):
        for query in np.flatnonzero(part == number):
            if claimed[positives[query]].any():
                part[query] = -1
        for query in np.flatnonzero(part == number):
            claimed[positives[query]] = True
    return part
