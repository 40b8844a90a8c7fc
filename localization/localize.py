"""Queries in, poses out: the table of contents of the localization.

The index images of one world are matched with each other and triangulated once; each query is matched with its most
similar index images, hypotheses come from several sources, one scorer picks among them and one refiner finishes the
winner. A query for which this fails gets a pose from relative geometry or retrieval, and the name of that method.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localization.absolute_pose import pose_deviation
from localization.expectation import Expectation
from localization.fallback import Guess, fall_back
from localization.hypotheses import (
    Hypotheses,
    bearings,
    essential_hypotheses,
    point_hypotheses,
    shifted_hypotheses,
)
from localization.light import Light, learn_light
from localization.matching import View, epipolar_mask, mutual_matches
from localization.refinement import PointMap, Refined, guided_refinement, point_map, search_again
from localization.scoring import Evidence, epipolar_scores, gather_evidence
from localization.tracks import Polished, polish
from localization.triangulation import Points, triangulate_views

__all__ = ["Estimate", "View", "localize", "share_world"]

# Hypotheses that are refined, at most, and those that are first searched again around.
REFINED = 8
# A hypothesis that scores less than this share of the best is not refined.
WORTH_REFINING = 0.4
# One that was computed from others is rougher: it needs this share of the best.
SHIFTED_WORTH = 0.25
# Where points are many, a hypothesis without is not refined if it scores less than this share of the best with.
ROUGHLY_AS_GOOD = 0.8
# Modes of one source that are polished, at most.
POLISHED = 4
# Hypotheses nearer than this share of the typical distance of the points, or this angle, are one.
SAME_MODE, SAME_MODE_DEG = 0.03, 2.0
# Answers nearer than this share of the typical distance and this angle are of one place.
SAME_PLACE, SAME_PLACE_DEG = 0.1, 10.0
# Queries at least this confident serve as index views for the others.
SURE = 0.5
# When no more are, of those at least this confident the surest, this share of them at a time.
NEARLY_SURE, NEARLY_SHARE = 0.2, 0.25
# As helpers of a query serve those whose most similar index views are its own: so many, of so many compared.
HELPERS, COMPARED = 20, 10
# Inliers at which chance is out by 63 %.
TYPICAL_INLIERS = 30
# How much more than an answer from points one without must score.
CLEARLY_MORE = 1.3
# Below this many inliers or this confidence an answer is not taken from points alone.
MANY_INLIERS, DOUBTFUL = 40, 0.15
# What a pose without points deserves, by its method.
FALLBACK_CONFIDENCE = {"essential": 0.1, "directions": 0.05, "rotation": 0.02, "retrieval": 0.0}
# share_world: pairs tried, distinct matches a pair needs, the share that must fit, pairs that must prove it.
SHARED_TRIED, SHARED_MATCHES, SHARED_INLIERS, SHARED_PROOFS = 10, 30, 0.6, 3


@dataclass(frozen=True)
class Estimate(Guess):
    """A query's pose, how it was found and how far to trust it.

    R_world_from_cam (3, 3), c_world (3,) float64; method: name of what gave the pose; inliers: keypoints that agree;
    sigma_m, sigma_deg: standard deviations of position and rotation (infinite where unknown); confidence: 0..1.
    """

    confidence: float


def localize(
    index_views: list[View],
    query_views: list[View],
    ranking: Sequence[Sequence[int]],
    similarity: Sequence[Sequence[float]],
    *,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Estimate]:
    """Poses of the query views of one world from its posed index views.

    ranking: for each query the numbers of its index views by global descriptor, best first (at least one; only these
    are matched); similarity: their descriptor similarities. progress(phase, done, of) is called as work advances.
    """
    report = progress or (lambda phase, done, of: None)
    index = _Index.build(index_views, lambda done, of: report("index", done, of))
    orders = [[int(i) for i in row] for row in ranking]
    likeness = [[float(s) for s in row] for row in similarity]
    queries = _Queries(query_views, index, orders, likeness, seed, list(range(len(query_views))))
    estimates = queries.located(lambda done, of: report("queries", done, of))
    return _with_each_other(queries, estimates, lambda done, of: report("unsure queries", done, of))


def _with_each_other(
    queries: "_Queries", estimates: list[Estimate], progress: Callable[[int, int], None]
) -> list[Estimate]:
    """The estimates of all queries after the sure ones have served as index views for the rest, the surest first."""
    rest = list(range(len(estimates)))
    while True:
        rest.sort(key=lambda n: -estimates[n].confidence)
        sure = [n for n in rest if estimates[n].confidence >= SURE]
        nearly = [n for n in rest if estimates[n].confidence >= NEARLY_SURE]
        new = sure or nearly[: math.ceil(NEARLY_SHARE * len(nearly))]
        rest = [n for n in rest if n not in new]
        if not new or not rest:
            return estimates
        queries = replace(queries.seeing({n: estimates[n] for n in new}), numbers=rest)
        again = dict(zip(rest, queries.located(progress)))
        estimates = [again.get(n, e) for n, e in enumerate(estimates)]


@dataclass(frozen=True)
class _Index:
    """Posed views, the points of their keypoints, all points in one map, their typical distance, and what the views
    tell of light and of scores."""

    views: list[View]
    points: list[Points]
    map: PointMap
    typical_m: float
    light: Light
    expected: Expectation

    @classmethod
    def build(cls, views: list[View], progress: Callable[[int, int], None]) -> "_Index":
        points = triangulate_views(views, progress=progress)
        everything = point_map(views, points)
        typical_m = float(everything.distance_m.median()) if len(everything.distance_m) else 0.0
        light = learn_light(everything, views, typical_m)
        R, c = torch.stack([v.R_world_from_cam for v in views]), torch.stack([v.c_world for v in views])
        return cls(views, points, everything, typical_m, light, Expectation(views, points, R, c, light.near_m))

    @property
    def same_m(self) -> float:
        """How near two poses of one mode are."""
        return SAME_MODE * self.typical_m

    @property
    def place_m(self) -> float:
        """How near two poses of one place are."""
        return SAME_PLACE * self.typical_m

    def extended(self, more: list[View]) -> "_Index":
        """With further posed views, whose points are triangulated from all; all that was known stays."""
        views = self.views + more
        points = self.points + triangulate_views(views, range(len(self.views), len(views)))
        return replace(self, views=views, points=points, map=point_map(views, points))


@dataclass(frozen=True)
class _Queries(Dataset):
    """The queries `numbers` as a data set of estimates, for the processes of a DataLoader to work on.

    The steps of one query are many and small: threads would wait for each other's turn at the interpreter.
    """

    views: list[View]
    index: _Index
    orders: list[list[int]]
    similarity: list[list[float]]
    seed: int
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Estimate:
        number = self.numbers[i]
        generator = _generator(self.seed, number)
        return _locate(self.views[number], self.index, self.orders[number], self.similarity[number], generator)

    def seeing(self, placed: dict[int, Estimate]) -> "_Queries":
        """The same with queries at their estimated poses among the index views, each matched with the like of it."""
        first = len(self.index.views)
        more = [
            View(self.views[n].features, self.views[n].camera, e.R_world_from_cam, e.c_world)
            for n, e in placed.items()
        ]
        similar = [set(order[:COMPARED]) for order in self.orders]
        orders = []
        for order, mine in zip(self.orders, similar):
            shared = torch.tensor([len(mine & similar[n]) for n in placed])
            best = shared.argsort(descending=True, stable=True)[:HELPERS]
            orders.append(order + [first + k for k in best.tolist()])
        return replace(self, index=self.index.extended(more), orders=orders)

    def located(self, progress: Callable[[int, int], None]) -> list[Estimate]:
        """The estimates in order; on a GPU, which processes cannot share, one after the other."""
        on_cpu = self.index.map.position.device.type == "cpu"
        workers = min(len(self), os.cpu_count() or 1) if on_cpu and len(self) > 1 else 0
        estimates = []
        for estimate in DataLoader(self, batch_size=None, num_workers=workers):
            estimates.append(estimate)
            progress(len(estimates), len(self))
        return estimates


def _generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one query, the same whatever the other queries are."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _locate(
    query: View, index: _Index, order: list[int], similarity: list[float], generator: torch.Generator
) -> Estimate:
    """The pose of one query from the index views in `order` (similarity: of the first of them)."""
    matches = {i: mutual_matches(query.features, index.views[i].features) for i in order}
    evidence = gather_evidence(query, index.views, index.points, matches)
    refined = _refine_best(query, index, evidence, point_hypotheses(evidence, order, generator), generator)
    polished = _polish_modes(query, index, order, evidence, refined)
    answer = _choose(query, index, evidence, polished)
    if answer is not None and answer.estimate.confidence < SURE:
        shifted = _refine_shifted(query, index, evidence, refined, generator)
        polished += _polish_modes(query, index, order, evidence, shifted)
        answer = _choose(query, index, evidence, polished)
    many = answer is not None and answer.estimate.inliers >= MANY_INLIERS
    if many and answer.estimate.confidence >= DOUBTFUL:
        return answer.estimate
    seen_from = bearings(evidence, index.views, generator)
    more = essential_hypotheses(evidence, index.views, seen_from, index.typical_m)
    least = ROUGHLY_AS_GOOD * float(_scores(evidence, refined).max()) if many else 0.0
    refined = _refine_best(query, index, evidence, more, generator, least)
    other = _choose(query, index, evidence, _polish_modes(query, index, order, evidence, refined))
    answer = _better(answer, other, index.place_m)
    if answer:
        return answer.estimate
    guess = fall_back(evidence, index.views, seen_from, order, similarity)
    return Estimate(**vars(guess), confidence=FALLBACK_CONFIDENCE[guess.method])


def _refine_best(
    query: View, index: _Index, evidence: Evidence, hypotheses: Hypotheses, generator: torch.Generator,
    least: float = 0.0,
) -> list[Refined]:  # fmt: skip
    """The promising hypotheses that score at least `least`, each refined as it is and after a search around it."""
    scores = epipolar_scores(evidence, hypotheses.R_cam_from_world, hypotheses.c_world)
    refined = []
    for i in _distinct(hypotheses.R_cam_from_world, hypotheses.c_world, scores, index.same_m, REFINED):
        if float(scores[i]) < max(least, WORTH_REFINING * float(scores.max())):
            break
        R, c = hypotheses.R_cam_from_world[i], hypotheses.c_world[i]
        starts = [(R, c), search_again(index.map, query, R, c, generator)]
        refined += [guided_refinement(index.map, query, *start) for start in starts if start]
    return [r for r in refined if r]


def _refine_shifted(
    query: View, index: _Index, evidence: Evidence, refined: list[Refined], generator: torch.Generator
) -> list[Refined]:
    """What the offsets between refined hypotheses lead to, refined, where nothing has been found so far."""
    if not refined:
        return []
    R, c = torch.stack([r.R_cam_from_world for r in refined]), torch.stack([r.c_world for r in refined])
    scores = _scores(evidence, refined)
    modes = _distinct(R, c, scores, index.same_m, REFINED)
    shifted = shifted_hypotheses(R[modes], c[modes], SAME_MODE_DEG, 2 * index.same_m)
    poses = zip(shifted.R_cam_from_world, shifted.c_world)
    new = [not bool(_near(R, c, *pose, index.same_m).any()) for pose in poses]
    shifted = shifted.select(torch.nonzero(torch.tensor(new, dtype=torch.bool))[:, 0])
    return _refine_best(query, index, evidence, shifted, generator, SHIFTED_WORTH * float(scores.max()))


def _scores(evidence: Evidence, refined: list[Refined]) -> Tensor:
    """Scores (n,) of n refined hypotheses."""
    if not refined:
        return torch.zeros(0, dtype=torch.float64)
    R, c = torch.stack([r.R_cam_from_world for r in refined]), torch.stack([r.c_world for r in refined])
    return epipolar_scores(evidence, R, c)


def _distinct(R: Tensor, c: Tensor, scores: Tensor, same_m: float, limit: int) -> list[int]:
    """Numbers of the best of h poses (h, 3, 3), (h, 3), best first, leaving out those near a better one."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if len(kept) == limit:
            break
        if not bool(_near(R[kept], c[kept], R[i], c[i], same_m).any()):
            kept.append(i)
    return kept


def _near(
    R: Tensor, c: Tensor, R_one: Tensor, c_one: Tensor, same_m: float, same_deg: float = SAME_MODE_DEG
) -> Tensor:
    """Which of h poses (h, 3, 3), (h, 3) are of one mode with R_one (3, 3), c_one (3,)."""
    cosine = ((R @ R_one.T).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    return ((c - c_one).norm(dim=1) <= same_m) & (cosine >= math.cos(math.radians(same_deg)))


@dataclass(frozen=True)
class _Answer:
    """An estimate, how much its pose explains, and the score that chose its place."""

    estimate: Estimate
    explained: float
    score: float


def _choose(query: View, index: _Index, evidence: Evidence, polished: list[Polished]) -> _Answer | None:
    """The answer from polished poses, whose errors are those of the matches; None if there are none.

    The score, the light and how far the score is what is to be expected there choose the place, and most tracks the
    pose in it: those are no measure of centimeters.
    """
    if not polished:
        return None
    R, c = torch.stack([p.R_cam_from_world for p in polished]), torch.stack([p.c_world for p in polished])
    lit = [index.light.alike(index.map, index.views, query, *pose) for pose in zip(R, c)]
    explained = epipolar_scores(evidence, R, c, polished=True)
    fulfilled = [index.expected.fulfilled(query, *of_pose) for of_pose in zip(R, c, explained.tolist())]
    scores = explained * torch.tensor(lit, device=c.device) * torch.tensor(fulfilled, device=c.device)
    best = int(scores.argmax())
    here = _near(R, c, R[best], c[best], index.place_m, SAME_PLACE_DEG)
    rivals, score = scores[~here], float(scores[best])
    most = max((i for i, same in enumerate(here.tolist()) if same), key=lambda i: polished[i].tracks)
    pose = polished[most]
    confidence = _confidence(score, float(rivals.max()) if len(rivals) else 0.0, pose.tracks) * fulfilled[best]
    sigma_m, sigma_deg = (float(v) for v in pose_deviation(pose.covariance))
    R_world = pose.R_cam_from_world.T
    estimate = Estimate(R_world, pose.c_world, "pnp", pose.tracks, sigma_m, sigma_deg, confidence)
    return _Answer(estimate, float(explained[most]), score)


def _polish_modes(
    query: View, index: _Index, order: list[int], evidence: Evidence, refined: list[Refined]
) -> list[Polished]:
    """Of each of the best POLISHED modes the pose with most keypoints found, polished."""
    if not refined:
        return []
    R, c = torch.stack([r.R_cam_from_world for r in refined]), torch.stack([r.c_world for r in refined])
    polished = []
    for i in _distinct(R, c, _scores(evidence, refined), index.same_m, POLISHED):
        near = _near(R, c, R[i], c[i], index.same_m).tolist()
        start = max((r for r, same in zip(refined, near) if same), key=lambda r: r.found)
        pose = (start.R_cam_from_world, start.c_world)
        polished.append(polish(query, index.views, order, index.map, evidence, *pose))
    return [p for p in polished if p]


def _confidence(score: float, rival: float, inliers: int) -> float:
    """0..1: how far the best rival mode stays behind, times how unlikely so many inliers are by chance."""
    margin = max(0.0, 1 - rival / max(score, 1e-9))
    return margin * (1 - math.exp(-inliers / TYPICAL_INLIERS))


def _better(with_points: _Answer | None, without: _Answer | None, place_m: float) -> _Answer | None:
    """The answer of hypotheses without points only where it explains or, at another place, scores clearly more."""
    if with_points is None or without is None:
        return with_points or without
    a, b = with_points.estimate, without.estimate
    if bool(_near(a.R_world_from_cam[None], a.c_world[None], b.R_world_from_cam, b.c_world, place_m, SAME_PLACE_DEG)):
        return without if without.explained > CLEARLY_MORE * with_points.explained else with_points
    if without.score <= CLEARLY_MORE * with_points.score:
        return with_points
    confidence = _confidence(without.score, with_points.score, without.estimate.inliers)
    estimate = replace(without.estimate, confidence=min(without.estimate.confidence, confidence))
    return replace(without, estimate=estimate)


def share_world(pairs: Iterable[tuple[View, View]]) -> bool:
    """Whether posed views of two scenes prove by their own matches that the scenes' poses are of one world.

    pairs: a view of each scene, the most alike first. Several of the first SHARED_TRIED pairs must have many distinct
    matches most of which lie where their poses, taken as of one world, say; by chance a few percent would.
    """
    proofs = 0
    for a, b in itertools.islice(pairs, SHARED_TRIED):
        matches = mutual_matches(a.features, b.features)
        matches = matches.select(matches.ratio < 0.8)
        if len(matches) < SHARED_MATCHES:
            continue
        allowed = epipolar_mask(a, b)[matches.a, matches.b]
        proofs += float(allowed.double().mean()) >= SHARED_INLIERS
        if proofs == SHARED_PROOFS:
            return True
    return False
