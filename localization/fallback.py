"""Answers where nothing is sure: the rotation from the essential matrix with one index image, at that
image's place; the poses of the most similar index images. The last are always there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.hypotheses import MATCH_RATIO, find_bearings
from localization.matching import View
from localization.scoring import Evidence

ROTATION_SAMPLES = 1000
# Index images whose poses are answers of their own.
RETRIEVED = 3


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
    matches = torch.bincount(
        evidence.view[evidence.ratio <= MATCH_RATIO], minlength=len(views)
    ).tolist()
    alike = sorted(order, key=lambda i: -matches[i])[:RETRIEVED]
    retrieved = [
        Guess(views[i].R_world_from_cam, views[i].c_world, "retrieval", 0, math.inf, math.inf)
        for i in alike
    ]
    bearings = find_bearings(evidence, views, 1, ROTATION_SAMPLES, generator)
    rotated = [
        Guess(b.R_world_from_cam, views[b.view].c_world, "rotation", b.inliers, math.inf, math.inf)
        for b in bearings
    ]
    return [*rotated, *retrieved]
