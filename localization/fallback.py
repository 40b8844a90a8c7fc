"""Answers without points, where there are too few for P3P or nothing is sure.

From strongest to weakest: the essential matrix with one index image and the scale from matches with
others (E5+1); the rotation from one, at that image's place; the poses of the most similar index
images. The last are always there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.hypotheses import MATCH_RATIO, Bearing, find_bearings
from localization.matching import View
from localization.relative_scale import scale_from_other_views
from localization.scoring import SAMPSON_PX, Evidence, epipolar_scores

ESSENTIAL_IMAGES, ESSENTIAL_SAMPLES = 8, 1000
MIN_SCALE_INLIERS = 5
# Index images whose poses are answers of their own.
RETRIEVED = 3
# With less parallax the direction of a relative pose means nothing.
MIN_PARALLAX_DEG = 0.5
# Index images no farther apart than this share of the query's distance from them tell nothing of
# that distance.
MIN_BASELINE = 0.01


@dataclass(frozen=True)
class Guess:
    """A pose R_world_from_cam (3, 3), c_world (3,), its method, inliers, and sigma_m, sigma_deg
    (infinite: unknown).
    """

    R_world_from_cam: Tensor
    c_world: Tensor
    method: str
    inliers: int
    sigma_m: float
    sigma_deg: float


def fall_back(
    evidence: Evidence, views: list[View], order: list[int], generator: torch.Generator
) -> list[Guess]:
    """The answers without points, the best first; order: index views by retrieval, best first.

    Index images themselves are answers by how many distinct matches they have, of equal ones the
    first retrieved.
    """
    bearings = find_bearings(evidence, views, ESSENTIAL_IMAGES, ESSENTIAL_SAMPLES, generator)
    matches = torch.bincount(
        evidence.view[evidence.ratio <= MATCH_RATIO], minlength=len(views)
    ).tolist()
    alike = sorted(order, key=lambda i: -matches[i])[:RETRIEVED]
    retrieved = [
        Guess(views[i].R_world_from_cam, views[i].c_world, "retrieval", 0, math.inf, math.inf)
        for i in alike
    ]
    return [*_scaled(evidence, views, bearings), *_rotated(views, bearings), *retrieved]


def _scaled(evidence: Evidence, views: list[View], bearings: list[Bearing]) -> list[Guess]:
    """E5+1: the bearing and scale that explain the query best, if matches with other views give a
    scale.
    """
    guesses = []
    R_views, c_views = (
        torch.stack([getattr(v, name) for v in views]) for name in ("R_world_from_cam", "c_world")
    )
    for b in bearings:
        rows = torch.nonzero((evidence.ratio <= MATCH_RATIO) & (evidence.view != b.view))[:, 0]
        if b.relative.parallax_deg < MIN_PARALLAX_DEG or len(rows) == 0:
            continue
        others = evidence.view[rows]
        index_norm = (evidence.ray_world[rows, None] @ R_views[others])[:, 0, :2]
        scale = scale_from_other_views(
            c_views[b.view],
            b.direction,
            b.R_world_from_cam,
            evidence.xy_norm[rows],
            R_views[others],
            c_views[others],
            index_norm,
            SAMPSON_PX / evidence.focal_px,
        )
        if (
            scale is not None
            and int(scale.inliers.sum()) >= MIN_SCALE_INLIERS
            and math.isfinite(scale.scale)
        ):
            sigma_deg = _rotation_sigma_deg(evidence.focal_px, b)
            sigma_m = math.hypot(scale.sigma, scale.scale * math.radians(sigma_deg))
            baseline = float((c_views[others[scale.inliers]] - c_views[b.view]).norm(dim=1).max())
            if baseline < MIN_BASELINE * scale.scale:
                sigma_m = math.inf
            center = c_views[b.view] + scale.scale * b.direction
            guesses.append(
                Guess(b.R_world_from_cam, center, "essential", b.inliers, sigma_m, sigma_deg)
            )
    if not guesses:
        return []
    R = torch.stack([g.R_world_from_cam.T for g in guesses])
    scores = epipolar_scores(evidence, R, torch.stack([g.c_world for g in guesses]))
    return [guesses[int(scores.argmax())]]


def _rotation_sigma_deg(focal_px: float, bearing: Bearing) -> float:
    """A rough standard deviation of a relative rotation: no formula, ten pixels over the root of
    the inliers.
    """
    return max(0.2, math.degrees(10 / focal_px) / math.sqrt(bearing.inliers))


def _rotated(views: list[View], bearings: list[Bearing]) -> list[Guess]:
    """The rotation from the best relative pose, at the place of its index view."""
    return [
        Guess(b.R_world_from_cam, views[b.view].c_world, "rotation", b.inliers, math.inf, math.inf)
        for b in bearings[:1]
    ]
