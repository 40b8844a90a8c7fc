"""The search for one query's pose: hypotheses in, the best answer so far out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from localization.absolute_pose import pose_deviation
from localization.cameras import Camera
from localization.fallback import Guess
from localization.hypotheses import (
    Hypotheses,
    bearing_hypotheses,
    pooled_hypotheses,
)
from localization.joint import Polished, finely
from localization.map import SAME_MODE_DEG, SAME_PLACE_DEG, Map
from localization.matching import View, laid_over, mutual_matches
from localization.refinement import (
    PointMap,
    Refined,
    guided_refinement,
    point_map,
    refine_on_matches,
)
from localization.scoring import Evidence, epipolar_scores, gather_evidence
from localization.tracks import polish

# Hypotheses refined and modes polished, at most: at first, and where that left doubt.
QUICK_REFINED, QUICK_POLISHED = 3, 2
REFINED, POLISHED = 8, 4
# A hypothesis that scores less than this share of the best is not refined.
PROMISING = 0.4
# A mode that explains less than this share of the best after refinement is not polished at first.
# Where that leaves doubt it may be the right one yet: aliases beside index views explain more.
RIVAL = 0.5
# A pose from matches without points, whose distances are less sure, counts where it explains so many
# times what all others do.
CLEARLY_MORE = 1.5
# An answer this confident needs no further search; it serves as an index view for others.
SURE = 0.5
# Inliers at which chance is out by 63 %, and the share of what an index image explains: where things
# repeat, chance explains much too.
FEW_INLIERS, USUAL_INLIERS = 30, 0.075
# Of what right poses were refined on this share agrees, of wrong ones or ones with a wrong lens less.
GOOD_FIT, NO_FIT = 0.8, 0.6
# A sure answer with so many tracks of which so large a share agrees is settled.
MANY_TRACKS, WELL_FIT = 100, 0.85


@dataclass(frozen=True)
class Estimate(Guess):
    """A query's pose, how it was found and how far to trust it.

    R_world_from_cam (3, 3), c_world (3,) float64; method: what gave the pose ("pnp", "same image",
    "essential", "rotation", "retrieval"); inliers: keypoints that agree; sigma_m, sigma_deg: standard
    deviations of position and rotation (infinite where unknown); confidence: 0..1; camera: the lens
    of its own that the query was found to have, None where the given one explains it; fine:
    R_world_from_cam and c_world after the last refinement, if there was one, which take the others'
    place when nothing is left to decide.
    """

    confidence: float
    camera: Camera | None = None
    fine: tuple[Tensor, Tensor] | None = None

    def told(self) -> "Estimate":
        """The estimate with its fine pose as its pose."""
        R, c = self.fine or (self.R_world_from_cam, self.c_world)
        return replace(self, R_world_from_cam=R, c_world=c, fine=None)


@dataclass(frozen=True)
class Answer:
    """An estimate and the polished pose that it is."""

    estimate: Estimate
    polished: Polished

    @property
    def settled(self) -> bool:
        """Whether it is sure, and rests on many tracks that fit: no further pose need be tried."""
        many_fit = self.polished.tracks >= MANY_TRACKS and self.polished.fit >= WELL_FIT
        return many_fit and self.estimate.confidence >= SURE


@dataclass
class Search:
    """What was found so far of where a query is: refined hypotheses, and the polished poses of the
    best modes.

    order: the index views that count; map: their points.
    """

    query: View
    index: Map
    order: list[int]
    evidence: Evidence
    refined: list[Refined] = field(default_factory=list)
    polished: list[Polished] = field(default_factory=list)
    tried: set[int] = field(default_factory=set)
    skipped: list[Refined] = field(default_factory=list)
    map: PointMap = field(init=False)

    def __post_init__(self) -> None:
        self.map = point_map(self.index.views, self.index.points, self.order)

    def add(
        self,
        more: Hypotheses,
        most: int,
        modes: int,
        rival: float = 0.0,
    ) -> None:
        """Refine the new among the promising of more hypotheses, at most so many; polish the best
        modes of all, those that explain a share `rival` of the best one's.
        """
        scores, known = self._scores(more), poses_of(self.refined)
        best = max([float(v.max()) for v in (scores, self._scores(known)) if len(v)], default=0.0)
        new = []
        for i in _distinct(more, scores, self.index.same_m, most):
            R, c = more.R_cam_from_world[i], more.c_world[i]
            if float(scores[i]) >= PROMISING * best and not bool(
                _near(known, R, c, self.index.same_m).any()
            ):
                new.append(i)
        new = more.select(new)
        if len(new):
            self.refined += guided_refinement(
                self.map, self.query, new.R_cam_from_world, new.c_world
            )
        poses, self.skipped = poses_of(self.refined), []
        scores = self._scores(poses)
        for i in _distinct(poses, scores, self.index.same_m, modes):
            near = _near(poses, poses.R_cam_from_world[i], poses.c_world[i], self.index.same_m)
            start = max(torch.nonzero(near)[:, 0].tolist(), key=lambda j: self.refined[j].found)
            if start in self.tried:
                continue
            if float(scores[i]) < rival * float(scores.max()):
                self.skipped.append(self.refined[start])
                continue
            self.tried.add(start)
            R, c = poses.R_cam_from_world[start], poses.c_world[start]
            self._polish(R, c)

    def add_from_matches(self, more: Hypotheses, most: int) -> None:
        """Refine the best of more hypotheses on all distinct matches, those without points too;
        polish the best where it explains clearly more than all that is known.
        """
        if not len(more) or not self.index.typical_m:
            return
        best = more.select(_distinct(more, self._scores(more), self.index.same_m, most))
        found = Hypotheses(
            *refine_on_matches(
                self.evidence, best.R_cam_from_world, best.c_world, self.index.typical_m
            )
        )
        scores = self._scores(found, polished=True)
        known = self._scores(poses_of([*self.refined, *self.polished]), polished=True)
        i = int(scores.argmax())
        if not len(known) or float(scores[i]) > CLEARLY_MORE * float(known.max()):
            R, c = found.R_cam_from_world[i], found.c_world[i]
            self.refined.append(Refined(R, c, 0))
            self.tried.add(len(self.refined) - 1)
            self._polish(R, c, with_single=True)

    def _polish(self, R: Tensor, c: Tensor, *, with_single: bool = False) -> None:
        self.polished += filter(None, [self._polished_at(R, c, with_single=with_single)])

    def _polished_at(self, R: Tensor, c: Tensor, **how: bool | float) -> Polished | None:
        of = (self.query, self.index.views, self.order, self.map, self.evidence)
        return polish(*of, R, c, **how)

    def refined_last(self, answer: Answer) -> tuple[Tensor, Tensor]:
        """R_world_from_cam (3, 3) and c_world (3,) of a sure answer: polished on all that fits it, guided
        matches, which can be trusted there, as much as others, and matches without points too, as points
        may be few, or all in one part of the image; then finely.
        """
        at = answer.polished.R_cam_from_world, answer.polished.c_world
        last = self._polished_at(*at, with_single=True, guided_noise=1.0)
        R, c = finely(last or answer.polished)
        return R.T, c

    def best(self) -> Answer | None:
        """The answer from the polished poses, whose errors are those of the matches; None if there
        are none.

        The score and how far it is what is to be expected there choose the place, and most tracks
        the pose in it: those are no measure of centimeters.
        """
        if not self.polished:
            return None
        # What was not polished is not the answer, but a rival.
        poses = poses_of([*self.polished, *self.skipped])
        explained = epipolar_scores(
            self.evidence, poses.R_cam_from_world, poses.c_world, polished=True
        )
        of_poses = zip(poses.R_cam_from_world, poses.c_world, explained.tolist())
        fulfilled = [self.index.expected.fulfilled(self.query, *of_pose) for of_pose in of_poses]
        scores = explained * torch.tensor(fulfilled)
        best = int(scores[: len(self.polished)].argmax())
        here = _near(
            poses,
            poses.R_cam_from_world[best],
            poses.c_world[best],
            self.index.place_m,
            SAME_PLACE_DEG,
        )
        rival = float(scores.masked_fill(here, 0).max())
        here = torch.nonzero(here[: len(self.polished)])[:, 0].tolist()
        pose = self.polished[max(here, key=lambda i: self.polished[i].tracks)]
        confidence = self._confidence(float(scores[best]), rival, pose) * fulfilled[best]
        sigmas = (float(v) for v in pose_deviation(pose.covariance))
        estimate = Estimate(
            pose.R_cam_from_world.T, pose.c_world, "pnp", pose.tracks, *sigmas, confidence
        )
        return Answer(estimate, pose)

    def _confidence(self, score: float, rival: float, pose: Polished) -> float:
        """0..1: how far the best rival mode stays behind, times how unlikely so many inliers are by
        chance, times how far what the pose was refined on fits it as it fits right ones.
        """
        margin = max(0.0, 1 - rival / max(score, 1e-9))
        fits = min(1.0, max(0.0, (pose.fit - NO_FIT) / (GOOD_FIT - NO_FIT)))
        usual = USUAL_INLIERS * self.index.expected.typical * len(self.query.features)
        return margin * fits * (1 - math.exp(-pose.tracks / max(FEW_INLIERS, usual)))

    def _scores(self, poses: Hypotheses, polished: bool = False) -> Tensor:
        of_pose = (poses.R_cam_from_world, poses.c_world)
        return epipolar_scores(self.evidence, *of_pose, polished=polished)


def matched(query: View, index: Map, order: list[int]) -> Evidence:
    """The evidence of a query's matches with the index views in `order`; of what is laid over a part of
    both images there is none.
    """
    matches = {}
    for i in order:
        view = index.views[i]
        found = mutual_matches(query.features, view.features)
        matches[i] = found.select(~laid_over(query, view, found))
    return gather_evidence(query, index.views, index.points, matches)


def quick_search(
    query: View, index: Map, order: list[int], generator: torch.Generator
) -> tuple[Search, Answer | None]:
    """The first search for a query among some index views, which mostly is enough, and its answer."""
    evidence = matched(query, index, order)
    search = Search(query, index, order, evidence)
    pooled = pooled_hypotheses(evidence, generator)
    search.add(pooled, QUICK_REFINED, QUICK_POLISHED, rival=RIVAL)
    if (answer := search.best()) and answer.settled:
        return search, answer
    bearings = bearing_hypotheses(evidence, index.views, index.typical_m, generator)
    search.add_from_matches(Hypotheses.joined(pooled, bearings), QUICK_REFINED)
    return search, search.best()


def poses_of(found: Sequence[Refined | Polished]) -> Hypotheses:
    """The poses of what was found, in arrays."""
    return Hypotheses.joined(
        *(Hypotheses(f.R_cam_from_world[None], f.c_world[None]) for f in found)
    )


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
