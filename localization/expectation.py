"""What a query would explain if it were there: an alias explains much, but not what it should so
near an index image.

How much is to be expected the index images tell: each, taken out, is a query whose pose is known.
The expectation at a pose is what the index images around it explain, carried to its distance from
them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.matching import QUICK_IMAGES, View, mutual_matches
from localization.scoring import epipolar_scores, gather_evidence
from localization.threads import in_threads
from localization.triangulation import Points

# Index images count for half at this share of the typical distance of the points.
NEAR = 0.1
# Index views whose mean is the expectation; they look where the query looks, to within so much.
VIEWS, TURN_DEG = 3, 45.0
# A pose that looks where no index view does, to within so much, is worth this much of its score.
UNSEEN_DEG, UNSEEN = 60.0, 0.4
# Keypoints of an index view that are matched, at most: its share is a mean over them.
KEYPOINTS = 250
# Half octaves of keypoint sizes, up to a focal length.
SIZES = 32
# A view that explains less than this share of what is usual may have the pose of another.
UNUSUAL = 0.3


def nearness(away_m: Tensor, near_m: float) -> Tensor:
    """1..0 of any distances: how like each other two images so far apart are; a half at near_m."""
    return 1 / (1 + (away_m / max(near_m, 1e-12)).square())


@dataclass(frozen=True)
class Expectation:
    """Of posed views R_world_from_cam (V, 3, 3), c_world (V, 3): near_m, see `nearness`; explained
    (V,): the score per keypoint of each, taken out, as a query to the others, over its nearness to
    the nearest that looks the same way; sizes (SIZES,): how many keypoints of each size an image
    has in the mean, and like_sized, the share of an image's keypoints for which that is enough."""

    R_world_from_cam: Tensor
    c_world: Tensor
    near_m: float
    explained: Tensor
    sizes: Tensor
    like_sized: float

    @classmethod
    def learn(cls, views: list[View], points: list[Points], typical_m: float) -> "Expectation":
        """From posed views, their points, and the points' typical distance."""
        R = torch.stack([v.R_world_from_cam for v in views])
        c = torch.stack([v.c_world for v in views])
        near_m = NEAR * typical_m

        def explained(number: int) -> float:
            view = views[number]
            away_m = _away(R, c, view.R_world_from_cam, view.c_world, TURN_DEG)
            away_m[number] = torch.inf
            others = [i for i in away_m.argsort(stable=True).tolist() if i != number][:QUICK_IMAGES]
            near = float(nearness(away_m[others].min(), near_m)) if others else 0.0
            if near == 0:
                return 0.0
            part = view.as_query(KEYPOINTS)
            matches = {i: mutual_matches(part.features, views[i].features) for i in others}
            evidence = gather_evidence(part, views, points, matches)
            pose = (view.R_world_from_cam.T[None], view.c_world[None])
            score = float(epipolar_scores(evidence, *pose, polished=True))
            return score / max(1, len(part.features)) / near

        found = in_threads(explained, range(len(views)))
        counts = torch.stack([_sizes(view) for view in views])
        sizes = counts.mean(0)
        like_sized = float(torch.minimum(counts, sizes).sum() / counts.sum().clamp_min(1))
        explained_by = torch.tensor(found, dtype=torch.float64)
        return cls(R, c, near_m, explained_by, sizes, like_sized)

    @property
    def typical(self) -> float:
        """0..1: the score per keypoint of an index view near another."""
        return float(self.explained.clamp_max(1).median())

    def unusual(self) -> list[int]:
        """The views that at their poses explain much less of the others than is usual: astray, or alone."""
        near = [
            _away(self.R_world_from_cam, self.c_world, R, c, TURN_DEG).topk(2, largest=False)[0][1]
            for R, c in zip(self.R_world_from_cam, self.c_world)
        ]
        score = self.explained * nearness(torch.stack(near), self.near_m)
        return torch.nonzero(score < UNUSUAL * score.median())[:, 0].tolist()

    def fulfilled(
        self, query: View, R_cam_from_world: Tensor, c_world: Tensor, score: float
    ) -> float:
        """0..1: whether a query that has this score at a pose has what is to be expected there; the
        ratio squared.

        Where no index view looks nothing can be expected, which is no reason for trust.
        """
        if not bool((self._distances(R_cam_from_world.T, c_world, UNSEEN_DEG) < torch.inf).any()):
            return UNSEEN
        return min(1.0, score / max(self.score(query, R_cam_from_world, c_world), 1e-12)) ** 2

    def score(self, query: View, R_cam_from_world: Tensor, c_world: Tensor) -> float:
        """The polished `epipolar_scores` to expect of a query at R_cam_from_world (3, 3), c_world
        (3,).

        The mean over the VIEWS nearest index views that look the same way of what each explains,
        taken out, per keypoint, times the ratio of the two's nearness, at most 1. 0 where no index
        view looks the same way. Keypoints of sizes that index images lack, as a smaller copy or a
        far zoom has, can explain nothing.
        """
        away_m = self._distances(R_cam_from_world.T, c_world, TURN_DEG)
        nearest = away_m.argsort(stable=True)[:VIEWS]
        nearest = nearest[away_m[nearest] < torch.inf]
        if len(self.c_world) < 2 or len(nearest) == 0:
            return 0.0
        share = (
            (self.explained[nearest] * nearness(away_m[nearest], self.near_m)).clamp_max(1).mean()
        )
        like_sized = float(torch.minimum(_sizes(query), self.sizes).sum())
        return float(share) * min(len(query.features), like_sized / max(self.like_sized, 1e-12))

    def _distances(self, R_world_from_cam: Tensor, c_world: Tensor, turn_deg: float) -> Tensor:
        return _away(self.R_world_from_cam, self.c_world, R_world_from_cam, c_world, turn_deg)


def _sizes(view: View) -> Tensor:
    """How many keypoints (SIZES,) a view has of each size, in focal lengths, by half octaves."""
    size = view.features.scale_px.double() / ((view.camera.fx + view.camera.fy) / 2)
    step = (2 * torch.log2(size)).floor().long() + SIZES
    return torch.bincount(step.clamp(0, SIZES - 1), minlength=SIZES).double()


def _away(
    R: Tensor, c: Tensor, R_world_from_cam: Tensor, c_world: Tensor, turn_deg: float
) -> Tensor:
    """Distances (V,) of views (V, 3, 3), (V, 3) from a pose, infinite where they look elsewhere."""
    cosine = (R[:, :, 2] * R_world_from_cam[:, 2]).sum(1)
    return (
        (c - c_world).norm(dim=1).masked_fill(cosine < math.cos(math.radians(turn_deg)), torch.inf)
    )
