"""Answers without points, where there are too few for P3P or nothing is sure.

From strongest to weakest: the essential matrix with one index image, at the distance that the matches
with others bear out; the rotation from one, at that image's place; the poses of the most similar index
images. The last are always there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.hypotheses import MATCH_RATIO, Bearing, find_bearings
from localization.matching import View
from localization.refinement import refine_on_matches
from localization.scoring import Evidence, epipolar_scores

ESSENTIAL_IMAGES, ESSENTIAL_SAMPLES = 8, 1000
# Distances tried along a bearing, over that of the farthest other index image; the best must explain so
# many keypoints more than the worst, and those that explain but one less may be as right.
DISTANCES = torch.logspace(-2.5, 1.5, 97, dtype=torch.float64)
MIN_GAIN, MAY_BE = 3.0, 1.0
# Index images whose poses are answers of their own.
RETRIEVED = 3
# With less parallax the direction of a relative pose means nothing.
MIN_PARALLAX_DEG = 0.5


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
    """The bearing and distance that explain most of the distinct matches, refined on them; none where
    no distance explains more than others.
    """
    if not bearings:
        return []
    evidence = evidence.select(evidence.ratio <= MATCH_RATIO)
    c_views = torch.stack([views[i].c_world for i in evidence.view.unique().tolist()])
    best, most = None, 0.0
    for b in bearings:
        if b.relative.parallax_deg < MIN_PARALLAX_DEG:
            continue
        c_view = views[b.view].c_world
        away_m = float((c_views - c_view).norm(dim=1).max()) * DISTANCES
        c, R = c_view + away_m[:, None] * b.direction, b.R_world_from_cam.T
        explained = epipolar_scores(evidence, R.expand(len(c), 3, 3), c)
        k, score = int(explained.argmax()), float(explained.max())
        if score - float(explained.min()) >= MIN_GAIN and score > most:
            likely_m = away_m[explained >= score - MAY_BE]
            best, most = (b, R, c[k], float(away_m[k]), likely_m), score
    if best is None:
        return []
    b, R, c, away_m, likely_m = best
    sigma_deg = _rotation_sigma_deg(evidence.focal_px, b)
    half_m = float(likely_m.max() - likely_m.min()) / 2
    sigma_m = math.hypot(half_m, away_m * math.radians(sigma_deg))
    R, c = refine_on_matches(evidence, R[None], c[None], away_m)
    return [Guess(R[0].T, c[0], "essential", b.inliers, sigma_m, sigma_deg)]


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
