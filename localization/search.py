"""The search for one query's pose: hypotheses in, the best answer so far out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localization.absolute_pose import pose_deviation
from localization.cameras import Camera
from localization.fallback import Guess
from localization.hypotheses import (
    Hypotheses,
    bearing_hypotheses,
    pooled_hypotheses,
    shifted_hypotheses,
)
from localization.joint import Polished
from localization.map import SAME_MODE_DEG, SAME_PLACE_DEG, Map
from localization.matching import View, mutual_matches
from localization.refinement import PointMap, point_map, refine_on_matches
from localization.scoring import Evidence, epipolar_scores, gather_evidence
from localization.tracks import MIN_TRACKS, polish

# Hypotheses refined and modes polished, at most: at first, and where that left doubt.
QUICK_REFINED, QUICK_POLISHED = 3, 2
REFINED, POLISHED = 8, 4
# A hypothesis that scores less than this share of the best is not refined; one computed from others
# is rougher.
PROMISING, SHIFTED_PROMISING = 0.4, 0.25
# A mode that explains less than this share of the best after refinement is not polished at first.
# Where that leaves doubt it may be the right one yet: aliases beside index views explain more.
RIVAL = 0.5
# A hypothesis is replaced by what it becomes if that explains so many times as much.
EXPLAINS_MORE = 1.1
# A pose from an essential matrix, whose distance is unsure, counts where it explains so many times what
# poses from points do.
BEYOND = 1.25
# An answer this confident needs no further search; it serves as an index view for others.
SURE = 0.5
# The most confidence in a pose that no points give, or whose place they leave open.
WITHOUT_POINTS = 0.1
# Inliers, and share of the keypoints explained, at which chance is out by 63 %: six parameters find a
# few percent anywhere.
TYPICAL_INLIERS, TYPICAL_SHARE = 30, 0.05
_POSE = ("R_cam_from_world", "c_world")


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
class Answer:
    """An estimate and the polished pose that it is."""

    estimate: Estimate
    polished: Polished


@dataclass
class Search:
    """What was found so far of where a query is: refined hypotheses, and the polished poses of the
    best modes.

    order: the index views that count; map: their points; tried, skipped: numbers of the refined
    hypotheses that were polished, and of those that promised too little for it.
    """

    query: View
    index: Map
    order: list[int]
    evidence: Evidence
    refined: Hypotheses = field(default_factory=Hypotheses.none)
    polished: list[Polished] = field(default_factory=list)
    tried: set[int] = field(default_factory=set)
    skipped: list[int] = field(default_factory=list)
    map: PointMap = field(init=False)

    def __post_init__(self) -> None:
        self.map = point_map(self.index.views, self.index.points, self.order)

    def add(
        self,
        more: Hypotheses,
        most: int,
        modes: int,
        promising: float = PROMISING,
        rival: float = 0.0,
        beyond: float = 0.0,
    ) -> None:
        """Refine the new among the promising of more hypotheses, at most so many, and forget those
        that then explain less than `beyond` times what is known does; polish the best modes of all,
        those that explain a share `rival` of the best one's.
        """
        same_m = self.index.same_m
        scores, known = self._scores(more), self._scores(self.refined)
        best = max([float(v.max()) for v in (scores, known) if len(v)], default=0.0)
        new = [
            i
            for i in _distinct(more, scores, same_m, most)
            if float(scores[i]) >= promising * best
            and not bool(_near(self.refined, *more.pose(i), same_m).any())
        ]
        if new:
            refined = self._refined(more.select(new))
            if beyond and len(self.refined):
                known = float(self._scores(self.refined, polished=True).max())
                refined = refined.select(self._scores(refined, polished=True) > beyond * known)
            self.refined = self.refined.and_also(refined)
        scores, self.skipped = self._scores(self.refined, polished=True), []
        for i in _distinct(self.refined, scores, same_m, modes):
            if i in self.tried:
                continue
            if float(scores[i]) < rival * float(scores.max()):
                self.skipped.append(i)
                continue
            self.tried.add(i)
            of = (self.query, self.index, self.order, self.map, self.evidence)
            self.polished += filter(None, [polish(*of, *self.refined.pose(i))])

    def _refined(self, start: Hypotheses) -> Hypotheses:
        """Hypotheses refined on their matches, each as far as it then explains clearly more."""
        R, c = refine_on_matches(
            self.evidence, start.R_cam_from_world, start.c_world, self.index.typical_m
        )
        before = self._scores(start, polished=True)
        more = self._scores(Hypotheses(R, c), polished=True) > EXPLAINS_MORE * before
        return Hypotheses(
            torch.where(more[:, None, None], R, start.R_cam_from_world),
            torch.where(more[:, None], c, start.c_world),
        )

    def shifted(self) -> Hypotheses:
        """What the offsets between refined hypotheses lead to."""
        scores = self._scores(self.refined)
        modes = self.refined.select(_distinct(self.refined, scores, self.index.same_m, REFINED))
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
        # What was not polished is not the answer, but a rival.
        poses = poses_of(self.polished).and_also(self.refined.select(self.skipped))
        explained = epipolar_scores(
            self.evidence, poses.R_cam_from_world, poses.c_world, polished=True
        )
        of_poses = zip(poses.R_cam_from_world, poses.c_world, explained.tolist())
        fulfilled = [self.index.expected.fulfilled(self.query, *of_pose) for of_pose in of_poses]
        scores = explained * torch.tensor(fulfilled)
        best = int(scores[: len(self.polished)].argmax())
        here = _near(poses, *poses.pose(best), self.index.place_m, SAME_PLACE_DEG)
        rival = float(scores.masked_fill(here, 0).max())
        here = torch.nonzero(here[: len(self.polished)])[:, 0].tolist()
        pose = self.polished[max(here, key=lambda i: self.polished[i].tracks)]
        share = float(explained[best]) / max(1, len(self.query.features))
        confidence = _confidence(float(scores[best]), rival, pose.tracks, share) * fulfilled[best]
        sigma_m, sigma_deg = (float(v) for v in pose_deviation(pose.covariance))
        method = "pnp" if len(pose.observed.xy_px) >= MIN_TRACKS else "essential"
        if method == "essential" or not math.isfinite(sigma_m):
            confidence = min(confidence, WITHOUT_POINTS)
        estimate = Estimate(
            pose.R_cam_from_world.T,
            pose.c_world,
            method,
            pose.tracks,
            sigma_m,
            sigma_deg,
            confidence,
        )
        return Answer(estimate, pose)

    def _scores(self, poses: Hypotheses, polished: bool = False) -> Tensor:
        of_pose = (poses.R_cam_from_world, poses.c_world)
        return epipolar_scores(self.evidence, *of_pose, polished=polished)


def matched(query: View, index: Map, order: list[int]) -> Evidence:
    """The evidence of a query's matches with the index views in `order`."""
    matches = {i: mutual_matches(query.features, index.views[i].features) for i in order}
    return gather_evidence(query, index.views, index.points, matches)


def quick_search(
    query: View, index: Map, order: list[int], generator: torch.Generator
) -> tuple[Search, Answer | None]:
    """The first search for a query among some index views, which mostly is enough, and its answer."""
    evidence = matched(query, index, order)
    search = Search(query, index, order, evidence)
    search.add(pooled_hypotheses(evidence, generator), QUICK_REFINED, QUICK_POLISHED, rival=RIVAL)
    bearings = bearing_hypotheses(evidence, index.views, index.typical_m, generator)
    search.add(bearings, QUICK_REFINED, QUICK_POLISHED, rival=RIVAL, beyond=BEYOND)
    return search, search.best()


def poses_of(found: Sequence[Polished]) -> Hypotheses:
    """The poses of what was found, in arrays; of one at least."""
    return Hypotheses(*(torch.stack([getattr(f, k) for f in found]) for k in _POSE))


def _distinct(poses: Hypotheses, scores: Tensor, same_m: float, limit: int) -> list[int]:
    """Numbers of the best of h poses, best first, leaving out those near a better one."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if len(kept) == limit:
            break
        if not bool(_near(poses.select(kept), *poses.pose(i), same_m).any()):
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


def _confidence(score: float, rival: float, inliers: int, share: float) -> float:
    """0..1: how far the best rival mode stays behind, times how unlikely by chance so many inliers
    and such a share of the keypoints explained are.
    """
    margin = max(0.0, 1 - (rival / max(score, 1e-9)) ** 2)
    by_chance = math.exp(-inliers / TYPICAL_INLIERS), math.exp(-((share / TYPICAL_SHARE) ** 2))
    return margin * (1 - by_chance[0]) * (1 - by_chance[1])
