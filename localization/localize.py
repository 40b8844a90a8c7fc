"""Queries in, poses out: the table of contents of the localization.

The index images of one world are matched with each other and triangulated once; some, left out, are
located first: the map tests itself. Each query is matched with its most similar index images, P3P
gives hypotheses, one score judges them, the best are refined and polished, and the answer is chosen
by how far its score is what is to be expected there. A query that is an index image has its pose.
Sure queries then serve as index images for the rest. What is unsure even so is searched further, with
each index image alone. Then the query's lens is looked at. What is never sure is answered by the pose
of least expected error; the others' poses are refined once more. Every answer names its method.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from localization.cameras import camera_for
from localization.fallback import Guess, fall_back
from localization.features import Features
from localization.hypotheses import image_hypotheses, pooled_hypotheses
from localization.lens import with_own_lens
from localization.map import Map
from localization.matching import (
    DISTINCT_RATIO,
    QUICK_IMAGES,
    View,
    in_band,
    mutual_matches,
    same_picture,
)
from localization.scoring import Evidence
from localization.search import (
    POLISHED,
    REFINED,
    SURE,
    Estimate,
    Search,
    matched,
    quick_search,
)
from localization.self_test import self_test
from localization.threads import in_threads
from localization.tracks import MIN_TRACKS

__all__ = ["Estimate", "Map", "View", "build_map", "localize", "share_world"]

# A query is an index image itself if so many of its keypoints are where that image has them, to within
# so much.
SAME_SHARE, SAME_PX = 0.5, 0.5
# A pose is right, which confidence is the chance of, if it errs by less.
RIGHT_M, RIGHT_DEG = 0.25, 2.0
# As helpers of a query serve those whose most similar index views are its own: so many, of so many
# compared.
HELPERS, COMPARED = 20, 10
# What a pose without points deserves, by its method.
GUESS_CONFIDENCE = {"essential": 0.1, "rotation": 0.02, "retrieval": 0.0}
# How much likelier than one of these the scaled essential matrix is, when there is nothing better.
ESSENTIAL_ODDS = 3.0
# share_world: pairs tried, distinct matches a pair needs, the share that must fit, pairs that must
# prove it.
SHARED_TRIED, SHARED_MATCHES, SHARED_INLIERS, SHARED_PROOFS = 10, 30, 0.6, 3


def build_map(
    views: list[View],
    *,
    seed: int,
    in_doubt: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Map:
    """The map of the posed views of one world, tested by itself, the more if the poses are in doubt;
    progress(done, of) is called as views are matched.
    """
    built = Map.build(views, progress)
    return replace(built, test=self_test(built, seed, in_doubt=in_doubt))


def localize(
    index: Map,
    query_views: list[View],
    ranking: Sequence[Sequence[int]],
    *,
    seed: int,
    trust: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Estimate]:
    """Poses of query views in a map.

    ranking: for each query the numbers of the map's views by global descriptor, best first (at
    least one; only these are matched). trust: no answer is more confident. progress(phase, done,
    of) is called as work advances. The map's test of itself adds to standard deviations and bounds
    confidence too.
    """
    report = progress or (lambda phase, done, of: None)
    outcome = index.test
    queries = _Queries(
        [view.prepared() for view in query_views],
        index,
        [[int(i) for i in row] for row in ranking],
        seed,
    )
    estimates = _with_each_other(queries, report)
    estimates = [
        replace(
            estimate.told(),
            sigma_m=math.hypot(estimate.sigma_m, outcome.beyond_m),
            sigma_deg=math.hypot(estimate.sigma_deg, outcome.beyond_deg),
            camera=estimate.camera
            and camera_for(estimate.camera, view.camera.width, view.camera.height),
        )
        for estimate, view in zip(estimates, query_views)
    ]
    trust = min(trust, outcome.trust)
    return [replace(e, confidence=min(e.confidence * _within(e), trust)) for e in estimates]


def _within(estimate: Estimate) -> float:
    """How likely the errors are within RIGHT_M and RIGHT_DEG by their standard deviations."""
    ratios = RIGHT_M / max(estimate.sigma_m, 1e-12), RIGHT_DEG / max(estimate.sigma_deg, 1e-12)
    return math.erf(min(ratios) / math.sqrt(2))


def _with_each_other(
    queries: "_Queries", report: Callable[[str, int, int], None]
) -> list[Estimate]:
    """The estimates of all queries: by the quick stage, then of the rest by the whole search, in which
    the sure ones have served as index views.
    """
    rest = list(range(len(queries.views)))
    estimates: list[Estimate | None] = [None] * len(rest)
    phase, quick = "queries", len(rest) > 1
    while rest:
        found = queries.located(rest, quick, functools.partial(report, phase))
        for n, estimate in zip(rest, found):
            estimates[n] = estimate
        sure = [n for n in rest if estimates[n] and estimates[n].confidence >= SURE]
        rest = [n for n in rest if n not in sure]
        if not sure and not quick:
            break
        phase, quick = "unsure queries", False
        if sure:
            queries = queries.seeing({n: estimates[n] for n in sure})
    return estimates


@dataclass(frozen=True)
class _Queries:
    """All queries of a world, the index that they are matched with, and for each its index views,
    best first, and how many of them are tried at first.
    """

    views: list[View]
    index: Map
    orders: list[list[int]]
    seed: int
    first: int | None = QUICK_IMAGES

    def seeing(self, placed: dict[int, Estimate]) -> "_Queries":
        """The same with queries at their estimated poses among the index views, each matched with
        the like of it; not with versions of its own picture, which prove no place.
        """
        first = len(self.index.views)
        more = [
            View(
                self.views[n].features,
                e.camera or self.views[n].camera,
                e.R_world_from_cam,
                e.c_world,
            )
            for n, e in placed.items()
        ]
        similar = [set(order[:COMPARED]) for order in self.orders]
        orders = []
        for view, order, mine in zip(self.views, self.orders, similar):
            shared = torch.tensor([len(mine & similar[n]) for n in placed])
            best = shared.argsort(descending=True, stable=True).tolist()
            others = (k for k in best if not same_picture(view.features, more[k].features))
            orders.append(order + [first + k for k in itertools.islice(others, HELPERS)])
        return replace(self, index=self.index.extended(more), orders=orders, first=None)

    def located(
        self, numbers: Sequence[int], quick: bool, progress: Callable[[int, int], None]
    ) -> list[Estimate | None]:
        """The estimates of the queries `numbers`, in order; None of one that is not sure by the quick stage,
        if only that is asked for.
        """

        def locate(n: int) -> Estimate | None:
            view = self.views[n]
            generator = _generator(self.seed, view.features)
            return _locate(view, self.index, self.orders[n], self.first, quick, generator)

        return in_threads(locate, numbers, progress)


def _generator(seed: int, features: Features) -> torch.Generator:
    """The random numbers of one image, the same whatever its place among others is."""
    image = zlib.crc32(features.xy_px.numpy().tobytes())
    return torch.Generator().manual_seed((seed + image) % 2**63)


def _locate(
    query: View,
    index: Map,
    order: list[int],
    first: int | None,
    quick: bool,
    generator: torch.Generator,
) -> Estimate | None:
    """The pose of one query from the index views in `order`, if need be from more than the first, unless
    it should be quick.
    """
    search, answer = quick_search(query, index, order[:first], generator)
    evidence = search.evidence
    if same := _same_image(query, index, evidence):
        return same
    if answer is None or answer.estimate.confidence < SURE:
        if quick:
            return None
        if len(order) > len(search.order):
            evidence = matched(query, index, order)
            search = Search(query, index, order, evidence, search.refined)
            search.add(pooled_hypotheses(evidence, generator), REFINED, POLISHED)
        search.add(image_hypotheses(evidence, order, generator), REFINED, POLISHED)
        answer = search.best()
    estimate = with_own_lens(search, answer, generator)
    if estimate is None or estimate.confidence < SURE:
        guesses = fall_back(evidence, index.views, order, generator)
        return _least_expected_error(estimate, guesses, index.place_m)
    if estimate is answer.estimate and estimate.confidence * _within(estimate) >= SURE:
        return replace(estimate, fine=search.refined_last(answer))
    return estimate


def _same_image(query: View, index: Map, evidence: Evidence) -> Estimate | None:
    """The pose of the index view that shows what the query shows where the query shows it, if any.

    What index views of several places show there is burnt into the images.
    """
    still = (evidence.xy_px - evidence.index_px).norm(dim=1) <= SAME_PX
    count = torch.bincount(evidence.view[still], minlength=len(index.views))
    view, keypoints = index.views[int(count.argmax())], int(count.max())
    if keypoints < SAME_SHARE * len(query.features) or keypoints < MIN_TRACKS:
        return None
    alike = torch.nonzero(count >= SAME_SHARE * len(query.features))[:, 0].tolist()
    if any(float((index.views[i].c_world - view.c_world).norm()) > index.same_m for i in alike):
        return None
    turn = SAME_PX / evidence.focal_px
    sigmas = turn * index.typical_m, math.degrees(turn)
    return Estimate(view.R_world_from_cam, view.c_world, "same image", keypoints, *sigmas, 1.0)


def _least_expected_error(
    answer: Estimate | None, guesses: list[Guess], place_m: float
) -> Estimate:
    """Of an unsure answer and the guesses the one that is nearest to all, each as far as it is
    believed; the answer if it is at the same place. Confidence tells who may serve others; what is
    right more often than not has a quarter."""
    estimates = [
        Estimate(**vars(guess), confidence=GUESS_CONFIDENCE[guess.method]) for guess in guesses
    ]
    odds = [ESSENTIAL_ODDS if guess.method == "essential" else 1.0 for guess in guesses]
    belief = torch.tensor(odds, dtype=torch.float64) / sum(odds)
    if answer:
        estimates = [answer, *estimates]
        believed = math.sqrt(answer.confidence)
        belief = torch.cat([belief.new_tensor([believed]), (1 - believed) * belief])
    c = torch.stack([e.c_world for e in estimates])
    distance = (c[:, None] - c).norm(dim=-1)
    best = int((distance @ belief).argmin())
    return answer if answer and float(distance[best, 0]) <= place_m else estimates[best]


def share_world(pairs: Iterable[tuple[View, View]]) -> bool:
    """Whether posed views of two scenes prove by their own matches that the scenes' poses are of
    one world.

    pairs: a view of each scene, the most alike first. Several of the first SHARED_TRIED pairs must
    have many distinct matches most of which lie where their poses, taken as of one world, say; by
    chance a few percent would.
    """
    proofs = 0
    for a, b in itertools.islice(pairs, SHARED_TRIED):
        a, b = a.prepared(), b.prepared()
        matches = mutual_matches(a.features, b.features)
        matches = matches.select(matches.ratio < DISTINCT_RATIO)
        if len(matches) < SHARED_MATCHES:
            continue
        allowed = in_band(a, b, matches.a, matches.b)
        proofs += float(allowed.double().mean()) >= SHARED_INLIERS
        if proofs == SHARED_PROOFS:
            return True
    return False
