"""A query's lens: that of the scene's images as far as anyone knows, another where that explains
clearly more.
"""

import math
from dataclasses import replace

import torch

from localization.cameras import Camera
from localization.hypotheses import Hypotheses, focal_hypotheses
from localization.joint import Polished, refine_with_points
from localization.scoring import epipolar_scores
from localization.search import SURE, Answer, Estimate, Search, poses_of

# A lens is another one when its focal length (or its center, over that) is off by so much and by so
# many sigmas; the center is looked at with so many tracks; it is refined in so many rounds, or
# until it stays within a share.
SAME_LENS, SAME_LENS_SIGMA, MANY_TRACKS, LENS_ROUNDS, LENS_STAYS = 0.02, 4.0, 100, 6, 0.003
# It is the query's own if it is so far off, has so many times the tracks, and they cost so many
# times as much each; if it is only off, the answer is in doubt.
OTHER_LENS, OWN_TRACKS, OWN_COST = 0.05, 1.15, 0.7
# The confidence of an answer whose lens is in doubt.
DOUBTFUL_LENS = 0.1


def with_own_lens(
    search: Search, answer: Answer | None, generator: torch.Generator
) -> Estimate | None:
    """The estimate after a look at the query's lens: that of another, if that explains clearly
    more.

    The lens is refined beside the answer's pose; where it is not the given one, or the answer is
    not sure, the query is searched for with the lens so found and with other focal lengths.
    """
    query = search.query
    if query.lens_is_sure:
        return answer and answer.estimate
    starts, off = [], False
    if answer is not None:
        lens = _refined_lens(answer.polished)
        change = torch.tensor(_lens_change(query.camera, lens.camera)[: len(lens.lens_sigma)]).abs()
        off = bool(((change > SAME_LENS) & (change > SAME_LENS_SIGMA * lens.lens_sigma)).any())
        starts = [(lens.camera, poses_of([lens]))] if off else []
        if not off and answer.estimate.confidence >= SURE:
            return answer.estimate
    if answer is None or answer.estimate.confidence < SURE:
        zoomed = [
            (float(scores.max()), evidence.camera, poses.select([int(scores.argmax())]))
            for evidence, poses in focal_hypotheses(search.evidence, generator)
            if len(scores := epipolar_scores(evidence, poses.R_cam_from_world, poses.c_world))
        ]
        starts += [start for _, *start in sorted(zoomed, key=lambda found: -found[0])[:1]]
    best = answer
    for start in starts:
        other = _searched_with(search, *start)
        if (
            other is None
            or other.polished.tracks < MANY_TRACKS
            or max(map(abs, _lens_change(query.camera, other.polished.camera))) < OTHER_LENS
        ):
            continue
        if best is None or _explains_more(other.polished, best.polished):
            best = other
    if best is not answer:
        return replace(best.estimate, camera=best.polished.camera)
    if off and float(change.max()) > OTHER_LENS and answer.estimate.inliers >= MANY_TRACKS:
        return replace(answer.estimate, confidence=min(answer.estimate.confidence, DOUBTFUL_LENS))
    return answer and answer.estimate


def _explains_more(a: Polished, b: Polished) -> bool:
    """Whether a pose has clearly more tracks than another, and they fit it clearly better."""
    cost_a, cost_b = (p.cost / len(p.observed.xy_px) for p in (a, b))
    return a.tracks > OWN_TRACKS * b.tracks and cost_a < OWN_COST * cost_b


def _refined_lens(pose: Polished) -> Polished:
    """The pose with the lens that fits its tracks; the center too if they are many."""
    free = 3 if pose.tracks >= MANY_TRACKS else 1
    return refine_with_points(
        pose.camera, pose.R_cam_from_world, pose.c_world, pose.observed, lens=free
    )


def _lens_change(a: Camera, b: Camera) -> tuple[float, float, float]:
    """Log of the ratio of focal lengths, and the shift of the principal point over the focal
    length.
    """
    return math.log(b.fx / a.fx), (b.cx - a.cx) / a.fx, (b.cy - a.cy) / a.fx


def _searched_with(search: Search, camera: Camera, poses: Hypotheses) -> Answer | None:
    """The answer near some poses with a lens near `camera`, which is refined until it stays."""
    answer = None
    for _ in range(LENS_ROUNDS):
        query = replace(search.query, camera=camera)
        nearby = Search(query, search.index, search.order, search.evidence.seen_with(camera))
        nearby.add(poses, 1, 1)
        answer = nearby.best()
        if answer is None:
            return None
        lens = _refined_lens(answer.polished)
        nearby.polished = [lens]
        answer = nearby.best()
        if max(map(abs, _lens_change(camera, lens.camera))) < LENS_STAYS:
            break
        camera, poses = lens.camera, poses_of([lens])
    return answer
