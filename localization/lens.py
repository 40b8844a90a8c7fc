"""A query's lens: that of the scene's images as far as anyone knows, another where that explains
clearly more.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from localization.cameras import Camera, turned
from localization.hypotheses import focal_hypotheses
from localization.joint import LENS, Polished, Tracks, refine_with_points
from localization.scoring import Evidence, epipolar_scores
from localization.search import MANY_TRACKS, Answer, Estimate, Search, poses_of

# A lens is another one when it is off by so much (`_lens_change`) and by so many sigmas; it is refined
# in so many rounds, or until it stays.
SAME_LENS, SAME_LENS_SIGMA, LENS_ROUNDS, LENS_STAYS = 0.02, 4.0, 6, 0.003
# Matches with points, below which no lens is looked for.
MIN_POINTS = 12
# Where one so far off explains so many times as much the answer is in doubt (DOUBTFUL_SCORE); with so
# many times the tracks and what is explained, multiplied, it is the query's own (OWN_SCORE).
OTHER_LENS, OWN_SCORE, DOUBTFUL_SCORE = 0.05, 1.4, 1.15
# Errors of points, which come from index poses, act together on a lens: by so much more it errs than
# if each were on its own.
OWN_SIGMA = 3.0
# Lenses that are searched with; noise of the matches that they are refined on, in pixels: wide ones
# draw first.
LENSES = 2
WIDE_PX, WIDE_MATCHES = (16.0, 8.0, 4.0), 500
# No lens is off by more (`_lens_change`).
ANY_LENS = 1.5
# The confidence of an answer whose lens is in doubt.
DOUBTFUL_LENS = 0.1


def with_own_lens(
    search: Search, answer: Answer | None, generator: torch.Generator
) -> Estimate | None:
    """The estimate after a look at the query's lens: that of another, if that explains clearly
    more.

    The lens is refined beside the answer's pose; where it is not the given one, or the answer is
    not settled, the query is searched for with the lenses that its matches suggest.
    """
    if search.query.lens_is_sure or int(search.evidence.has_point.sum()) < MIN_POINTS:
        return answer and answer.estimate
    off, given = False, search.query.camera
    if answer is not None:
        search, answer = _turned(search, answer)
        lens = _refined_lens(answer.polished)
        change = torch.tensor(
            _lens_change(search.query.camera, lens.camera)[: len(lens.lens_sigma)]
        ).abs()
        off = bool(((change > SAME_LENS) & (change > SAME_LENS_SIGMA * lens.lens_sigma)).any())
        if answer.settled and not off:
            return _with_lens(answer.estimate, search, given)
        off = off and answer.polished.tracks >= MANY_TRACKS and float(change.max()) > OTHER_LENS
    best, least = answer, _explained(search, answer.polished) if answer else 0.0
    most = least * answer.polished.tracks if answer else 0.0
    for start in _likely_lenses(search, answer, generator):
        other = _searched_with(search, start)
        if other is None or _off(search.query.camera, other.polished.camera) < OTHER_LENS:
            continue
        tracks, explained = other.polished.tracks, _explained(search, other.polished)
        if explained <= DOUBTFUL_SCORE * least:
            continue
        off = True
        if tracks >= MANY_TRACKS and tracks * explained > OWN_SCORE * most:
            best, most = other, tracks * explained
    if best is None:
        return None
    estimate = best.estimate
    if best is not answer:
        sigmas = OWN_SIGMA * estimate.sigma_m, OWN_SIGMA * estimate.sigma_deg
        return replace(
            estimate, camera=best.polished.camera, sigma_m=sigmas[0], sigma_deg=sigmas[1]
        )
    if off:
        estimate = replace(estimate, confidence=min(estimate.confidence, DOUBTFUL_LENS))
    return _with_lens(estimate, search, given)


def _with_lens(estimate: Estimate, search: Search, given: Camera) -> Estimate:
    """The estimate with the lens that was searched with, if that is not the given one."""
    camera = search.query.camera
    return estimate if camera == given else replace(estimate, camera=camera)


def _turned(search: Search, answer: Answer) -> tuple[Search, Answer]:
    """The search and its answer with the lens turned as the image was, where that fits better.

    An image that lies otherwise than the index images that look its way was turned, or its camera
    was held so.
    """
    pose, views = answer.polished, [search.index.views[i] for i in search.order]
    R = torch.stack([pose.R_cam_from_world @ view.R_world_from_cam for view in views])
    sine, cosine = (R[:, 1, 0] - R[:, 0, 1]), (R[:, 0, 0] + R[:, 1, 1])
    alike = R[:, 2, 2] > 0
    angle = math.atan2(float(sine[alike].sum()), float(cosine[alike].sum()))
    own, quarter = search.query.camera, round(angle / (math.pi / 2)) % 4
    camera = turned(views[0].camera, quarter)
    if not quarter or camera == own or (camera.width, camera.height) != (own.width, own.height):
        return search, answer
    query = replace(search.query, camera=camera)
    other = Search(query, search.index, search.order, search.evidence.seen_with(camera))
    start = _refined_on_matches(other.evidence, pose.R_cam_from_world, pose.c_world, lens=0)
    other.add(poses_of([start]), 1, 1)
    found = other.best()
    # The size of the image proves a quarter turn, and its center was a guess.
    least = 1 / DOUBTFUL_SCORE if quarter % 2 else 1.0
    if found is None or _explained(search, found.polished) <= least * _explained(search, pose):
        return search, answer
    return other, found


def _explained(search: Search, pose: Polished) -> float:
    """How much of the query a pose explains, with its lens."""
    evidence = search.evidence.seen_with(pose.camera)
    of_pose = pose.R_cam_from_world[None], pose.c_world[None]
    return float(epipolar_scores(evidence, *of_pose, polished=True))


def _likely_lenses(
    search: Search, answer: Answer | None, generator: torch.Generator
) -> list[Polished]:
    """Poses and lenses that fit the matches with points best, from the answer's and from other
    focal lengths.
    """
    starts = []
    if answer is not None:
        pose = answer.polished
        starts.append((search.evidence, pose.R_cam_from_world, pose.c_world))
    for evidence, poses in focal_hypotheses(search.evidence, generator):
        of_poses = poses.R_cam_from_world, poses.c_world
        if len(poses):
            best = int(epipolar_scores(evidence, *of_poses).argmax())
            starts.append((evidence, *(part[best] for part in of_poses)))
    found: list[Polished] = []
    for pose in sorted(
        (_refined_on_matches(*start) for start in starts), key=lambda pose: pose.cost
    ):
        if _off(search.query.camera, pose.camera) < ANY_LENS and all(
            _off(other.camera, pose.camera) > OTHER_LENS for other in found
        ):
            found.append(pose)
    return found[:LENSES]


def _refined_on_matches(evidence: Evidence, R: Tensor, c: Tensor, lens: int = LENS) -> Polished:
    """A pose with as much of the lens as is asked for, from far off in ever closer steps, on the most
    distinct matches with points.
    """
    with_point = torch.nonzero(evidence.has_point)[:, 0]
    distinct = evidence.ratio[with_point].argsort(stable=True)[:WIDE_MATCHES]
    of = evidence.select(with_point[distinct])
    none = torch.zeros(len(of), 3, 3, dtype=torch.float64)
    camera = evidence.camera
    for noise_px in WIDE_PX:
        tracks = Tracks(of.xy_px, of.point, none, torch.full((len(of),), noise_px).double())
        pose = refine_with_points(camera, R, c, tracks, lens=lens)
        camera, R, c = pose.camera, pose.R_cam_from_world, pose.c_world
    return pose


def _refined_lens(pose: Polished) -> Polished:
    """The pose with the lens that fits its tracks; all of it if they are many."""
    free = LENS if pose.tracks >= MANY_TRACKS else 1
    return refine_with_points(
        pose.camera, pose.R_cam_from_world, pose.c_world, pose.observed, lens=free
    )


def _lens_change(a: Camera, b: Camera) -> tuple[float, float, float, float]:
    """Logs of the ratios of focal lengths and of fy / fx, and the shift of the principal point over
    the focal length.
    """
    zoom, taller = math.log(b.fx / a.fx), math.log(b.fy * a.fx / (b.fx * a.fy))
    return zoom, taller, (b.cx - a.cx) / a.fx, (b.cy - a.cy) / a.fx


def _off(a: Camera, b: Camera) -> float:
    """By how much two lenses differ; infinite where one of them is none."""
    focals = a.fx, a.fy, b.fx, b.fy
    if min(focals) <= 0 or not all(map(math.isfinite, focals)):
        return math.inf
    return max(map(abs, _lens_change(a, b)))


def _searched_with(search: Search, start: Polished) -> Answer | None:
    """The answer near a pose with a lens near its own, which is refined until it stays."""
    answer, camera, poses = None, start.camera, poses_of([start])
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
        if _off(camera, lens.camera) < LENS_STAYS:
            break
        camera, poses = lens.camera, poses_of([lens])
    return answer
