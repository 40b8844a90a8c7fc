"""The map tests itself: some index images, left out in turn, are located like queries, and their
poses are known.

A wrong convention, lens, handedness or order of files shows here at once; and how large errors are
beside the standard deviations that are claimed for them.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from localization.absolute_pose import angle_deg
from localization.map import SAME_MODE_DEG, Map, SelfTest
from localization.matching import QUICK_IMAGES
from localization.search import SURE, quick_search
from localization.threads import in_threads

# Index images tested, also where the scene is in doubt, and the keypoints of each that are matched: it
# must cost little.
TESTED, TESTED_IN_DOUBT, KEYPOINTS = 3, 8, 500
# Fewer views can spare none.
MIN_VIEWS = 5
# What answers in a scene none of whose images finds itself are worth, at most.
UNTRUSTED = 0.4
# The scene is as it should be if this share finds itself, and none is sure of another place: where
# poses belong to other images none does.
VOUCHED = 0.5
# A pose is refuted by an answer so sure (an alias of an image that has no neighbor left is less) and so many
# times farther off than is usual; in a scene in doubt only where more than a share of its images find
# themselves.
ORDERLY, REFUTED, BEYOND = 1 / 3, 0.75, 4.0


@dataclass(frozen=True)
class _Outcome:
    """How an image of known pose was found: errors in meters and degrees, the standard deviations
    claimed for them, and confidence.
    """

    meters: float = math.inf
    degrees: float = math.inf
    sigma_m: float = math.inf
    sigma_deg: float = math.inf
    confidence: float = 0.0

    def is_right(self, index: Map) -> bool:
        """Whether it is at its own pose."""
        return self.meters <= index.same_m and self.degrees <= SAME_MODE_DEG


def self_test(index: Map, seed: int, *, in_doubt: bool = False) -> SelfTest:
    """Locate some views of the index without what it knows of them, by the quick stage of the
    search; more of them where the scene is in doubt.

    One that has too few neighbors left is right to be unsure: answers are trusted by how many are
    found beside those that are surely wrong. What the found ones err beyond their standard
    deviations, as poses of index images do that are not exact, all answers have to expect.
    """
    count = len(index.views)
    if count < MIN_VIEWS:
        return SelfTest([], 0)
    tested = min(count, TESTED_IN_DOUBT if in_doubt else TESTED)
    numbers = [round((k + 0.5) * count / tested - 0.5) for k in range(tested)]
    tests = in_threads(
        lambda number: _located(index, number, _nearest(index, number), seed), numbers
    )
    found = [t for t in tests if t.is_right(index)]
    errors = [(t.meters, t.degrees, t.sigma_m, t.sigma_deg) for t in found] or [[0.0] * 4]
    error = torch.tensor(errors, dtype=torch.float64).square()
    beyond = (error[:, :2] - error[:, 2:]).nan_to_num(0, 0, 0).mean(dim=0).clamp_min(0).sqrt()
    wrong = sum(t.confidence >= SURE for t in tests if t not in found)
    trust = (len(found) + 0.5) / (len(found) + wrong + 0.5) if found else UNTRUSTED
    vouched = wrong == 0 and len(found) >= VOUCHED * tested
    of_tests = [(t.meters, t.degrees) for t in tests]
    return SelfTest(of_tests, len(found), trust, vouched, *beyond.tolist())


def false_poses(
    index: Map, descriptors: np.ndarray, *, seed: int, in_doubt: bool = False
) -> dict[int, tuple[float, float]]:
    """The views whose poses their own images refute, and how far off they are, in meters and degrees.

    index: a map that has tested itself; descriptors (n, d): of its views, by which the like of one is
    found, wherever its pose is. A view that explains unusually little is refuted if without its pose
    it is surely found elsewhere. Next to a false pose right ones seem false, and false ones right: what
    counts is what is found without those first found.
    """

    def refuted(left_out: set[int]) -> dict[int, tuple[float, float]]:
        def located(number: int) -> _Outcome:
            alike = np.argsort(-(descriptors @ descriptors[number]), kind="stable").tolist()
            others = [i for i in alike if i != number and i not in left_out]
            return _located(index, number, others, seed)

        return {
            number: (outcome.meters, outcome.degrees)
            for number, outcome in zip(suspects, in_threads(located, suspects))
            if outcome.confidence >= REFUTED
            and (outcome.meters > far_m or outcome.degrees > far_deg)
        }

    test = index.test
    if not test.errors or (in_doubt and test.found <= ORDERLY * len(test.errors)):
        return {}
    far_m = max(index.same_m, BEYOND * test.beyond_m)
    far_deg = max(SAME_MODE_DEG, BEYOND * test.beyond_deg)
    suspects = index.expected.unusual()
    first = refuted(set())
    return refuted(set(first)) if first and len(suspects) > 1 else first


def _nearest(index: Map, number: int) -> list[int]:
    """The other views by their distance from one."""
    c = torch.stack([view.c_world for view in index.views])
    order = (c - c[number]).norm(dim=1).argsort(stable=True).tolist()
    return [i for i in order if i != number]


def _located(index: Map, number: int, others: list[int], seed: int) -> _Outcome:
    """A view as a query among the first of others, the only ones that there are."""
    view, left_out = index.views[number], set(range(len(index.views))) - set(others)
    points = [p.without(left_out) for p in index.points]
    for i in left_out:
        points[i] = replace(points[i], valid=torch.zeros_like(points[i].valid))
    index = replace(index, points=points)
    query = view.as_query(KEYPOINTS)
    generator = torch.Generator().manual_seed(seed)
    search, answer = quick_search(query, index, others[:QUICK_IMAGES], generator)
    if answer is None:
        return _Outcome()
    found = answer.estimate
    if found.confidence >= SURE:
        found = replace(found, fine=search.refined_last(answer)).told()
    return _Outcome(
        float((found.c_world - view.c_world).norm()),
        float(angle_deg(found.R_world_from_cam.T @ view.R_world_from_cam)),
        found.sigma_m,
        found.sigma_deg,
        found.confidence,
    )
