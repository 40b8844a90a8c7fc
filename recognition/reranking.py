"""The first K of a ranking once more: clusters of positions, query expansion, geometric verification."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval import load_image, search
from localization.features import Features, extract_features
from localization.matching import mutual_matches
from localization.relative_pose import essential_ransac
from model import progress
from recognition.inference import unit

RERANKED = 20  # K
EXPANSION_NEIGHBORS, EXPANSION_POWER = 5, 3.0
FEATURE_SIDE_PX = 640  # longer side of an image whose keypoints are sought
KEYPOINTS = 1000
FEATURES_KEPT = 4000  # images; about 0.5 MB each
RATIO = 0.85
SAMPSON_PX = 4.0
SAMPLES = 400
FOCAL_SIDES = 1.0  # guess of the focal length, in longer sides of the image
ENOUGH_INLIERS = 20  # a best candidate with fewer proves nothing: the ranking stays


def rerank_clusters(
    similarity: np.ndarray, ranking: np.ndarray, utm_index: np.ndarray, threshold: float
) -> np.ndarray:
    """Rankings (nq, k) with the first K ordered by clusters of positions.

    Candidates within `threshold` m are connected; a component scores the sum of exp(-d²/tau), d the
    descriptors' distance, tau the median d² of the K. The best component comes first, inside by d.
    """
    out = ranking.copy()
    for row, (values, rows) in enumerate(zip(similarity[:, :RERANKED], ranking[:, :RERANKED])):
        square = np.maximum(2 - 2 * values, 0)
        component = components(utm_index[rows], threshold)
        tau = max(float(np.median(square)), 1e-12)
        score = np.bincount(component, np.exp(-square / tau))
        out[row, : len(rows)] = rows[np.lexsort((np.arange(len(rows)), -score[component]))]
    return out


def components(utm: np.ndarray, threshold: float) -> np.ndarray:
    """Number of the connected component of each position (n, 2); links are at most `threshold` m."""
    linked = np.hypot(*(utm[:, None] - utm[None]).transpose(2, 0, 1)) <= threshold
    label = np.arange(len(utm))
    while True:  # each takes the smallest label among its links, until nothing changes
        smallest = np.where(linked, label[None], len(utm)).min(axis=1)
        if (smallest == label).all():
            return np.unique(label, return_inverse=True)[1]
        label = smallest


def expand_queries(queries: np.ndarray, index: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """Queries (nq, D) moved towards their first neighbors, each weighed with similarity^power; all of
    norm 1.

    Alpha query expansion (Radenovic et al., PAMI 2019).
    """
    near = index[ranking[:, :EXPANSION_NEIGHBORS]]
    weights = np.einsum("qd,qkd->qk", queries, near).clip(min=0) ** EXPANSION_POWER
    return unit(queries + (weights[..., None] * near).sum(axis=1))


def rerank_expansion(
    queries: np.ndarray, index: np.ndarray, ranking: np.ndarray, device: torch.device
) -> np.ndarray:
    """The ranking (nq, k), by cosine, of the expanded queries; descriptors of any norm."""
    queries, index = unit(queries), unit(index)
    return search(expand_queries(queries, index, ranking), index, ranking.shape[1], device)[1]


def rerank_geometric(
    ranking: np.ndarray, query_paths: Sequence[Path], index_paths: Sequence[Path], seed: int = 0
) -> np.ndarray:
    """Rankings (nq, k) with the first K ordered by how many matches an epipolar geometry explains.

    Where the best candidate has fewer than ENOUGH_INLIERS the ranking stays as it is.
    """
    keypoints = lru_cache(FEATURES_KEPT)(_keypoints)
    out = ranking.copy()
    bar = progress(query_paths, desc="geometric verification", unit="query")
    for number, (path, rows) in enumerate(zip(bar, ranking[:, :RERANKED])):
        query = keypoints.__wrapped__(path)
        inliers = np.array([count_inliers(query, keypoints(index_paths[i]), seed) for i in rows])
        if inliers.max() >= ENOUGH_INLIERS:
            out[number, : len(rows)] = rows[np.argsort(-inliers, kind="stable")]
    return out


def _keypoints(path: Path) -> tuple[Features, tuple[int, int]]:
    """The keypoints of an image file, and its size (width, height) in their pixels."""
    image = load_image(path, FEATURE_SIDE_PX).convert("L")
    image.thumbnail((FEATURE_SIDE_PX, FEATURE_SIDE_PX), Image.Resampling.BILINEAR)
    gray = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return extract_features(gray, max_keypoints=KEYPOINTS), image.size


def count_inliers(
    query: tuple[Features, tuple[int, int]],
    candidate: tuple[Features, tuple[int, int]],
    seed: int = 0,
) -> int:
    """How many mutual matches between two images agree with one essential matrix.

    Nobody knows the cameras: the focal length is a guess, the principal point the middle.
    """
    (a, size_a), (b, size_b) = query, candidate
    matches = mutual_matches(a, b)
    matches = matches.select(matches.ratio <= RATIO)
    if not len(matches):
        return 0
    normalized = [
        (features.xy_px[rows] - torch.tensor(size) / 2) / (FOCAL_SIDES * max(size))
        for features, rows, size in ((a, matches.a, size_a), (b, matches.b, size_b))
    ]
    threshold = SAMPSON_PX / (FOCAL_SIDES * math.sqrt(max(size_a) * max(size_b)))
    generator = torch.Generator().manual_seed(seed)
    pose = essential_ransac(*normalized, threshold, generator=generator, iterations=SAMPLES)
    return 0 if pose is None else int(pose.inliers.sum())
