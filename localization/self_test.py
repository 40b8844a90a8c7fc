"""The map tests itself: some index images, left out in turn, are located like queries, and their
poses are known.

A wrong convention, lens, handedness or order of files shows here at once; and how large errors are
beside the standard deviations that are claimed for them.
"""

import math
from dataclasses import replace

import torch

from localization.absolute_pose import angle_deg
from localization.map import SAME_MODE_DEG, Map, SelfTest
from localization.matching import QUICK_IMAGES, View
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
    tests = in_threads(lambda number: _located(index, number, seed), numbers)
    found = [t for t in tests if t[0] <= index.same_m and t[1] <= SAME_MODE_DEG]
    error = torch.tensor([[0.0] * 5, *found], dtype=torch.float64)[bool(found) :].square()
    beyond = (error[:, :2] - error[:, 2:4]).nan_to_num(0, 0, 0).mean(dim=0).clamp_min(0).sqrt()
    wrong = sum(t[4] >= SURE for t in tests if t not in found)
    trust = (len(found) + 0.5) / (len(found) + wrong + 0.5) if found else UNTRUSTED
    vouched = wrong == 0 and len(found) >= VOUCHED * tested
    return SelfTest([t[:2] for t in tests], len(found), trust, vouched, *beyond.tolist())


def _located(index: Map, number: int, seed: int) -> tuple[float, float, float, float, float]:
    """Error in meters and degrees, the standard deviations claimed, infinite where there is no
    answer, and the confidence.
    """
    view = index.views[number]
    others = [i for i in range(len(index.views)) if i != number]
    others.sort(key=lambda i: float((index.views[i].c_world - view.c_world).norm()))
    points = [p.without(number) for p in index.points]
    points[number] = replace(points[number], valid=torch.zeros_like(points[number].valid))
    index = replace(index, points=points)
    step = max(1, len(view.features) // KEYPOINTS)
    query = View(view.features.select(slice(None, None, step)), view.camera)
    generator = torch.Generator().manual_seed(seed)
    _, answer = quick_search(query, index, others[:QUICK_IMAGES], generator)
    if answer is None:
        return (*(math.inf,) * 4, 0.0)
    estimate = answer.estimate
    meters = float((estimate.c_world - view.c_world).norm())
    degrees = float(angle_deg(estimate.R_world_from_cam.T @ view.R_world_from_cam))
    return meters, degrees, estimate.sigma_m, estimate.sigma_deg, estimate.confidence
