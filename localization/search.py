"""The search for one query's pose: hypotheses in, the best answer so far out.

An index is what the search knows of the posed views: their points, one map of them all, and what
scores to expect.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from localization.absolute_pose import pose_deviation
from localization.cameras import Camera
from localization.expectation import Expectation
from localization.fallback import Guess
from localization.hypotheses import Hypotheses, shifted_hypotheses
from localization.matching import View
from localization.refinement import PointMap, Refined, guided_refinement, point_map
from localization.scoring import Evidence, epipolar_scores
from localization.tracks import Polished, polish
from localization.triangulation import Points, triangulate_views

# Hypotheses refined and modes polished, at most: at first, and where that left doubt.
QUICK_REFINED, QUICK_POLISHED = 3, 2
REFINED, POLISHED = 8, 4
# A hypothesis that scores less than this share of the best is not refined; one computed from others
# is rougher.
PROMISING, SHIFTED_PROMISING = 0.4, 0.25
# Hypotheses nearer than this share of the typical distance of the points, or this angle, are one.
SAME_MODE, SAME_MODE_DEG = 0.03, 2.0
# Answers nearer than this share of the typical distance and this angle are of one place.
SAME_PLACE, SAME_PLACE_DEG = 0.1, 10.0
# An answer this confident needs no further search.
ENOUGH = 0.7
# Inliers at which chance is out by 63 %.
TYPICAL_INLIERS = 30


@dataclass(frozen=True)
class Estimate(Guess):
    """A query's pose, how it was found and how far to trust it.

    R_world_from_cam (3, 3), c_world (3,) float64; method: name of what gave the pose; inliers:
    keypoints that agree; sigma_m, sigma_deg: standard deviations of position and rotation (infinite
    where unknown); confidence: 0..1; camera: the lens of its own that the query was found to have,
    None where the given one explains it.
    """

    confidence: float
    camera: Camera | None = None


@dataclass(frozen=True)
class Index:
    """Posed views, the points of their keypoints, all points in one map, their typical distance,
    and what the views tell of scores."""

    views: list[View]
    points: list[Points]
    map: PointMap
    typical_m: float
    expected: Expectation

    @classmethod
    def build(cls, views: list[View], progress: Callable[[int, int], None]) -> "Index":
        points = triangulate_views(views, progress=progress)
        everything = point_map(views, points)
        typical_m = float(everything.distance_m.median()) if len(everything.distance_m) else 0.0
        return cls(
            views, points, everything, typical_m, Expectation.learn(views, points, typical_m)
        )

    @property
    def same_m(self) -> float:
        """How near two poses of one mode are."""
        return SAME_MODE * self.typical_m

    @property
    def place_m(self) -> float:
        """How near two poses of one place are."""
        return SAME_PLACE * self.typical_m

    def extended(self, more: list[View]) -> "Index":
        """With further posed views, whose points are triangulated from all; all that was known
        stays.
        """
        views = self.views + more
        points = self.points + triangulate_views(views, range(len(self.views), len(views)))
        return replace(self, views=views, points=points, map=point_map(views, points))


@dataclass(frozen=True)
class Answer:
    """An estimate and the polished pose that it is."""

    estimate: Estimate
    polished: Polished


@dataclass
class Search:
    """What was found so far of where a query is: refined hypotheses, and the polished poses of the
    best modes.
    """

    query: View
    index: Index
    order: list[int]
    evidence: Evidence
    refined: list[Refined] = field(default_factory=list)
    polished: list[Polished] = field(default_factory=list)
    tried: set[int] = field(default_factory=set)

    def add(self, more: Hypotheses, most: int, modes: int, promising: float = PROMISING) -> None:
        """Refine the new among the promising of more hypotheses, at most so many; polish the best
        modes of all.
        """
        scores, known = self._scores(more), poses_of(self.refined)
        best = max([float(v.max()) for v in (scores, self._scores(known)) if len(v)], default=0.0)
        for i in _distinct(more, scores, self.index.same_m, most):
            R, c = more.R_cam_from_world[i], more.c_world[i]
            if float(scores[i]) >= promising * best and not bool(
                _near(known, R, c, self.index.same_m).any()
            ):
                self.refined += filter(None, [guided_refinement(self.index.map, self.query, R, c)])
        poses = poses_of(self.refined)
        for i in _distinct(poses, self._scores(poses), self.index.same_m, modes):
            near = _near(poses, poses.R_cam_from_world[i], poses.c_world[i], self.index.same_m)
            start = max(torch.nonzero(near)[:, 0].tolist(), key=lambda j: self.refined[j].found)
            if start not in self.tried:
                self.tried.add(start)
                R, c = poses.R_cam_from_world[start], poses.c_world[start]
                of = (self.query, self.index.views, self.order, self.index.map, self.evidence)
                self.polished += filter(None, [polish(*of, R, c)])

    def shifted(self) -> Hypotheses:
        """What the offsets between refined hypotheses lead to."""
        poses = poses_of(self.refined)
        modes = poses.select(_distinct(poses, self._scores(poses), self.index.same_m, REFINED))
        return shifted_hypotheses(
            modes.R_cam_from_world, modes.c_world, SAME_MODE_DEG, 2 * self.index.same_m
        )

    def best(self) -> Answer | None:
        """The answer from the polished poses, whose errors are those of the matches; None if there
        are none.

        The score and how far it is what is to be expected there choose the place, and most tracks
        the pose in it: those are no measure of centimeters.
        """
        if not self.polished:
            return None
        poses = poses_of(self.polished)
        explained = epipolar_scores(
            self.evidence, poses.R_cam_from_world, poses.c_world, polished=True
        )
        of_poses = zip(poses.R_cam_from_world, poses.c_world, explained.tolist())
        fulfilled = [self.index.expected.fulfilled(self.query, *of_pose) for of_pose in of_poses]
        scores = explained * torch.tensor(fulfilled)
        best = int(scores.argmax())
        here = _near(
            poses,
            poses.R_cam_from_world[best],
            poses.c_world[best],
            self.index.place_m,
            SAME_PLACE_DEG,
        )
        rival = float(scores.masked_fill(here, 0).max())
        most = max(torch.nonzero(here)[:, 0].tolist(), key=lambda i: self.polished[i].tracks)
        pose = self.polished[most]
        confidence = _confidence(float(scores[best]), rival, pose.tracks) * fulfilled[best]
        sigmas = (float(v) for v in pose_deviation(pose.covariance))
        estimate = Estimate(
            pose.R_cam_from_world.T, pose.c_world, "pnp", pose.tracks, *sigmas, confidence
        )
        return Answer(estimate, pose)

    def _scores(self, poses: Hypotheses) -> Tensor:
        return epipolar_scores(self.evidence, poses.R_cam_from_world, poses.c_world)


def poses_of(found: Sequence[Refined | Polished]) -> Hypotheses:
    """The poses of what was found, in arrays."""
    none = torch.zeros(0, 3, 3, dtype=torch.float64)
    R, c = (none, none[:, 0]) if not found else (
        torch.stack([f.R_cam_from_world for f in found]), torch.stack([f.c_world for f in found])
    )  # fmt: skip
    return Hypotheses(R, c)


def _distinct(poses: Hypotheses, scores: Tensor, same_m: float, limit: int) -> list[int]:
    """Numbers of the best of h poses, best first, leaving out those near a better one."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if len(kept) == limit:
            break
        if not bool(
            _near(poses.select(kept), poses.R_cam_from_world[i], poses.c_world[i], same_m).any()
        ):
            kept.append(i)
    return kept


def _near(
    poses: Hypotheses, R: Tensor, c: Tensor, same_m: float, same_deg: float = SAME_MODE_DEG
) -> Tensor:
    """Which of h poses are of one mode with R (3, 3), c (3,)."""
    cosine = (torch.einsum("hij,ij->h", poses.R_cam_from_world, R) - 1) / 2
    return ((poses.c_world - c).norm(dim=1) <= same_m) & (
        cosine >= math.cos(math.radians(same_deg))
    )


def _confidence(score: float, rival: float, inliers: int) -> float:
    """0..1: how far the best rival mode stays behind, times how unlikely so many inliers are by
    chance.
    """
    margin = max(0.0, 1 - rival / max(score, 1e-9))
    return margin * (1 - math.exp(-inliers / TYPICAL_INLIERS))
