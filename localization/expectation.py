"""What a query would explain if it were there: an alias explains much, but not what it should so near an index image.

How much is to be expected the index images tell: each, taken out, is a query whose pose is known. The expectation at a
pose is what the index images around it explain, carried to its distance from them.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localization.light import nearness
from localization.matching import View, mutual_matches
from localization.scoring import epipolar_scores, gather_evidence
from localization.triangulation import PARTNERS, Points

# Index views whose mean is the expectation; they look where the query looks, to within so much.
VIEWS, TURN_DEG = 3, 45.0
# Keypoints of an index view that are matched, at most: its share is a mean over them.
KEYPOINTS = 250


@dataclass(frozen=True)
class Expectation:
    """Posed views R_world_from_cam (V, 3, 3), c_world (V, 3) and their points.

    near_m: see `nearness`; known: what each view explains at its own pose, filled in when first asked for.
    """

    views: list[View]
    points: list[Points]
    R_world_from_cam: Tensor
    c_world: Tensor
    near_m: float
    known: dict[int, float] = field(default_factory=dict)

    def fulfilled(self, query: View, R_cam_from_world: Tensor, c_world: Tensor, score: float) -> float:
        """0..1: whether a query that has this score at a pose has what is to be expected there; the ratio squared."""
        return min(1.0, score / max(self.score(query, R_cam_from_world, c_world), 1e-12)) ** 2

    def score(self, query: View, R_cam_from_world: Tensor, c_world: Tensor) -> float:
        """The polished `epipolar_scores` to expect of a query at R_cam_from_world (3, 3), c_world (3,).

        The mean over the VIEWS nearest index views that look the same way of what each explains, taken out, per
        keypoint, times the ratio of the two's nearness, at most 1. 0 where no index view looks the same way.
        """
        if len(self.views) < 2:
            return 0.0
        away_m = self._away(R_cam_from_world.T, c_world)
        nearest = [i for i in away_m.argsort(stable=True)[:VIEWS].tolist() if away_m[i] < torch.inf]
        if not nearest:
            return 0.0
        near = nearness(away_m[nearest], self.near_m).tolist()
        share = sum(min(1.0, self._explained(i) * n) for i, n in zip(nearest, near)) / len(nearest)
        return share * len(query.features.xy_px)

    def _explained(self, number: int) -> float:
        """The score per keypoint of a view that is a query to the others, over its nearness to the nearest.

        0 where no other view looks the same way.
        """
        if number not in self.known:
            view = self.views[number]
            step = max(1, len(view.features) // KEYPOINTS)
            part = View(view.features.select(slice(None, None, step)), view.camera)
            away_m = self._away(view.R_world_from_cam, view.c_world)
            away_m[number] = torch.inf
            others = [i for i in away_m.argsort(stable=True).tolist() if i != number][:PARTNERS]
            matches = {i: mutual_matches(part.features, self.views[i].features) for i in others}
            evidence = gather_evidence(part, self.views, self.points, matches)
            pose = (view.R_world_from_cam.T[None], view.c_world[None])
            score = float(epipolar_scores(evidence, *pose, polished=True))
            near = float(nearness(away_m[others].min(), self.near_m))
            self.known[number] = score / max(1, len(part.features)) / near if near else 0.0
        return self.known[number]

    def _away(self, R_world_from_cam: Tensor, c_world: Tensor) -> Tensor:
        """Distances (V,) of the views from a pose, infinite where they look elsewhere."""
        cosine = (self.R_world_from_cam[:, :, 2] * R_world_from_cam[:, 2]).sum(1)
        away_m = (self.c_world - c_world).norm(dim=1)
        return away_m.masked_fill(cosine < math.cos(math.radians(TURN_DEG)), torch.inf)
