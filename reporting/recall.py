"""Recall as it is reported: beside chance and the untrained model, with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval import first_hits, positives_within, search

BOOTSTRAP_DRAWS = 1000
RECALL_VALUES = tuple(range(1, 21))


def bootstrap(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % percentile bootstrap interval, rows low and high, of the mean of values (n, ...) of queries."""
    n = len(values)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP_DRAWS)
    return np.percentile(weights @ values / n, [2.5, 97.5], axis=0)


def recall_interval(
    hits: np.ndarray, recall_values: Sequence[int], seed: int = 0
) -> tuple[list[float], list[float]]:
    """95 % bootstrap interval of recall at each K from `first_hits`."""
    low, high = bootstrap(hits[:, None] < np.asarray(recall_values), seed)
    return low.tolist(), high.tolist()


def recall_gain(
    hits: np.ndarray, before: np.ndarray, k: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """Recall at K less that `before`, of first hits of the same queries, and its 95 % interval.

    A paired bootstrap: queries are redrawn, each with both of its answers.
    """
    difference = (hits < k).astype(float) - (before < k)
    low, high = bootstrap(difference, seed)
    return float(difference.mean()), float(low), float(high)


def chance_recall(
    positives: Sequence[np.ndarray], database_size: int, recall_values: Sequence[int]
) -> list[float]:
    """Expected recall at each K of a random ranking: 1 - C(D - P, K) / C(D, K), mean over queries."""
    counts = np.array([len(p) for p in positives])
    drawn = np.arange(min(max(recall_values), database_size))
    miss = np.clip(database_size - counts[:, None] - drawn, 0, None) / (database_size - drawn)
    recall = 1 - miss.cumprod(axis=1).mean(axis=0)
    return [float(recall[min(k, database_size) - 1]) for k in recall_values]


@dataclass(frozen=True)
class Recall:
    """Recall of a model on one split. section: curves for metrics.json, lists over K = 1 … 20 in 0..1,
    and `gain`, of R@1 by training, with the low and high end of its interval.

    similarity, ranking: (nq, 20) of the last model; hits: (nq,) rank of the first positive, 0 = best.
    """

    section: dict
    similarity: np.ndarray
    ranking: np.ndarray
    hits: np.ndarray
    positives: list[np.ndarray]


def measure_recall(
    embedded: Sequence[tuple[np.ndarray, np.ndarray]],
    utm_query: np.ndarray,
    utm_index: np.ndarray,
    threshold: float,
    device: torch.device,
    seed: int = 0,
) -> Recall:
    """Recall@1..20 of the last model ("trained") beside the first ("untrained") and chance.

    embedded: the descriptors (nq, D), (nd, D) of queries and index images by each model.
    """
    positives = positives_within(utm_query, utm_index, threshold)
    found = [search(q, d, RECALL_VALUES[-1], device) for q, d in embedded]
    hits = [first_hits(ranking, positives) for _, ranking in found]
    curves = [[float((h < k).mean()) for k in RECALL_VALUES] for h in hits]
    low, high = recall_interval(hits[-1], RECALL_VALUES, seed)
    section = {
        "queries": len(utm_query),
        "index": len(utm_index),
        "k": list(RECALL_VALUES),
        "trained": curves[-1],
        "untrained": curves[0],
        "low": low,
        "high": high,
        "chance": chance_recall(positives, len(utm_index), RECALL_VALUES),
        "gain": recall_gain(hits[-1], hits[0], seed=seed),
    }
    return Recall(section, *found[-1], hits[-1], positives)
