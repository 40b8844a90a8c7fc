"""A pose from relative geometry, or from retrieval alone, where there are too few points for P3P.

From strongest to weakest: the essential matrix with one index image and the scale from matches with others (E5+1); the
intersection of the directions from several index images; the rotation from one, at that image's place; the mean of the
best index poses. One of them always answers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.hypotheses import MATCH_RATIO, SAMPSON_PX, Bearing, index_norm
from localization.matching import View
from localization.relative_pose import (
    intersect_directions,
    scale_from_other_views,
    weighted_mean_pose,
)
from localization.scoring import Evidence, epipolar_scores

MIN_SCALE_INLIERS = 5
MEAN_IMAGES = 3
# With less parallax the direction of a relative pose means nothing.
MIN_PARALLAX_DEG = 0.5
# Directions this ill-conditioned are parallel.
MAX_CONDITION = 1e4


@dataclass(frozen=True)
class Guess:
    """A pose without points: R_world_from_cam (3, 3), c_world (3,), its method, inliers and sigma_m, sigma_deg."""

    R_world_from_cam: Tensor
    c_world: Tensor
    method: str
    inliers: int
    sigma_m: float
    sigma_deg: float


def fall_back(
    evidence: Evidence, views: list[View], bearings: list[Bearing], order: list[int], similarity: list[float]
) -> Guess:
    """The best answer without points. order: index views by retrieval, best first, with their similarity."""
    return (
        _scaled(evidence, views, bearings)
        or _intersected(evidence.focal_px, views, bearings)
        or _rotated(views, bearings)
        or _mean(views, order, similarity)
    )


def _scaled(evidence: Evidence, views: list[View], bearings: list[Bearing]) -> Guess | None:
    """E5+1: the bearing and scale that explain the query best; None if matches with other views give no scale."""
    guesses = []
    for b in bearings:
        rows = torch.nonzero((evidence.ratio <= MATCH_RATIO) & (evidence.view != b.view))[:, 0]
        if b.relative.parallax_deg < MIN_PARALLAX_DEG or len(rows) == 0:
            continue
        others = evidence.view[rows]
        scale = scale_from_other_views(
            views[b.view].c_world,
            b.direction,
            b.R_world_from_cam,
            evidence.xy_norm[rows],
            torch.stack([v.R_world_from_cam for v in views])[others],
            torch.stack([v.c_world for v in views])[others],
            index_norm(evidence, views, rows),
            SAMPSON_PX / evidence.focal_px,
        )
        if scale is not None and int(scale.inliers.sum()) >= MIN_SCALE_INLIERS and math.isfinite(scale.scale):
            center = views[b.view].c_world + scale.scale * b.direction
            inliers = int(b.relative.inliers.sum()) + int(scale.inliers.sum())
            sigma_deg = _rotation_sigma_deg(evidence.focal_px, b)
            sigma_m = math.hypot(scale.sigma, scale.scale * math.radians(sigma_deg))
            guesses.append(Guess(b.R_world_from_cam, center, "essential", inliers, sigma_m, sigma_deg))
    if not guesses:
        return None
    R = torch.stack([g.R_world_from_cam.T for g in guesses])
    scores = epipolar_scores(evidence, R, torch.stack([g.c_world for g in guesses]))
    return guesses[int(scores.argmax())]


def _rotation_sigma_deg(focal_px: float, bearing: Bearing) -> float:
    """A rough standard deviation of a relative rotation: no formula, ten pixels over the root of the inliers."""
    return max(0.2, math.degrees(10 / focal_px) / math.sqrt(int(bearing.relative.inliers.sum())))


def _intersected(focal_px: float, views: list[View], bearings: list[Bearing]) -> Guess | None:
    """Where the directions from at least two index views meet; None if there are fewer or they are parallel."""
    good = [b for b in bearings if b.relative.parallax_deg >= MIN_PARALLAX_DEG]
    if len(good) < 2:
        return None
    centers = torch.stack([views[b.view].c_world for b in good])
    directions = torch.stack([b.direction for b in good])
    weights = torch.tensor([float(b.relative.inliers.sum()) for b in good], dtype=torch.float64, device=centers.device)
    center, condition = intersect_directions(centers, directions, weights)
    forward = ((center - centers) * directions).sum(1) > 0
    if condition > MAX_CONDITION or not bool(forward.all()):
        return None
    offset = center - centers
    miss = (offset - (offset * directions).sum(1, keepdim=True) * directions).norm(dim=1)
    sigma_m = float(miss.square().mean().sqrt()) * math.sqrt(condition)
    sigma_deg = _rotation_sigma_deg(focal_px, good[0])
    return Guess(good[0].R_world_from_cam, center, "directions", int(good[0].relative.inliers.sum()), sigma_m, sigma_deg)


def _rotated(views: list[View], bearings: list[Bearing]) -> Guess | None:
    """The rotation from the best relative pose, at the place of its index view."""
    if not bearings:
        return None
    best = bearings[0]
    return Guess(
        best.R_world_from_cam, views[best.view].c_world, "rotation", int(best.relative.inliers.sum()), math.inf, math.inf
    )


def _mean(views: list[View], order: list[int], similarity: list[float]) -> Guess:
    """The mean of the best index poses by retrieval, weighted by similarity."""
    best = order[:MEAN_IMAGES]
    weights = torch.tensor([max(0.0, float(s)) for s in similarity[:MEAN_IMAGES]], dtype=torch.float64)
    R, c = (torch.stack([v[i] for i in best]) for v in ([v.R_world_from_cam for v in views], [v.c_world for v in views]))
    return Guess(*weighted_mean_pose(R, c, weights.to(c.device)), "retrieval", 0, math.inf, math.inf)
