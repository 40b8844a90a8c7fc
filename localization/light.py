"""Light as evidence: panels and tiles repeat, what the lamps make of them does not.

At the true pose the query shows each visible point as bright as the index images around do, up to one exposure. How
exactly, the index images themselves tell: each is compared with the others at its own, known pose.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.features import light_at
from localization.matching import View
from localization.refinement import PointMap, project_query, visible_points

# Index images count for half at this share of the typical distance of the points: reflections move with the camera.
NEAR = 0.1
# The light may differ by so many times its median deviation among the index images; by no less than the second.
DEVIATIONS, LEAST = 4.0, 0.1
# Fewer visible points say nothing.
MIN_POINTS = 20


@dataclass(frozen=True)
class Light:
    """How light is compared: near_m, the distance at which an index image counts for half; limit, of log intensity."""

    near_m: float
    limit: float

    def alike(self, points: PointMap, views: list[View], query: View, R: Tensor, c: Tensor) -> float:
        """0..1: how far the query at R_cam_from_world (3, 3), c_world (3,) is lit as the index views say.

        The mean over visible points of max(0, 1 - (difference / limit)^2), the difference being that of log intensity
        less its median (the exposure). 1 where too few points are visible to tell.
        """
        difference, weight = _differences(points, views, query, R, c, self.near_m)
        if len(difference) < MIN_POINTS:
            return 1.0
        likeness = (1 - (difference / self.limit).square()).clamp_min(0)
        return float((weight * likeness).sum() / weight.sum())


def learn_light(points: PointMap, views: list[View], typical_m: float) -> Light:
    """The comparison that suits posed views, whose points typically lie typical_m away."""
    near_m = NEAR * typical_m
    deviations = []
    for i, view in enumerate(views):
        others = points.select(points.view != i)
        difference, weight = _differences(others, views, view, view.R_world_from_cam.T, view.c_world, near_m)
        if len(difference) >= MIN_POINTS:
            deviations.append(float(_weighted_median(difference.abs(), weight)))
    if not deviations:
        return Light(near_m, math.inf)
    return Light(near_m, max(LEAST, DEVIATIONS * float(torch.tensor(deviations).median())))


def _differences(
    points: PointMap, views: list[View], query: View, R: Tensor, c: Tensor, near_m: float
) -> tuple[Tensor, Tensor]:
    """Log intensity (n,) of the n visible points in the query less that in their index views, less the median of
    that; weights (n,)."""
    visible = visible_points(points, query, R, c)
    if len(visible.position) == 0:
        return c.new_zeros(0), c.new_zeros(0)
    xy, _ = project_query(query, R, c, visible.position)
    difference = light_at(query.features.log_light, xy.float()).double() - visible.log_light.double()
    away_m = (torch.stack([v.c_world for v in views])[visible.view] - c).norm(dim=1)
    weight = nearness(away_m, near_m)
    return difference - _weighted_median(difference, weight), weight


def nearness(away_m: Tensor, near_m: float) -> Tensor:
    """1..0 of any distances: how like each other two images so far apart are; a half at near_m."""
    return 1 / (1 + (away_m / max(near_m, 1e-12)).square())


def _weighted_median(values: Tensor, weight: Tensor) -> Tensor:
    """The value below which half of the weight lies."""
    values, order = values.sort()
    total = weight[order].cumsum(0)
    return values[torch.searchsorted(total, total[-1] / 2).clamp_max(len(values) - 1)]
