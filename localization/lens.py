"""A query's lens: that of the scene's images as far as anyone knows, another where that explains
clearly more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.absolute_pose import angle_deg, pose_deviation
from localization.cameras import Camera, turned
from localization.hypotheses import focal_hypotheses, pooled_hypotheses
from localization.joint import LENS, Polished, Tracks, refine_with_points, with_free_lens
from localization.scoring import Evidence, epipolar_scores
from localization.search import (
    MANY_TRACKS,
    POLISHED,
    REFINED,
    Answer,
    Estimate,
    Search,
    poses_of,
)

# A lens is another one when it is off by so much (`_lens_change`) and by so many sigmas; it is refined
# in so many rounds, or until it stays.
SAME_LENS, SAME_LENS_SIGMA, LENS_ROUNDS, LENS_STAYS = 0.02, 4.0, 6, 0.003
# Matches with points, below which no lens is looked for.
MIN_POINTS = 12
# Where one so far off explains so many times as much the answer is in doubt (DOUBTFUL_SCORE); with so
# many times the tracks and what is explained, multiplied, it is the query's own (OWN_SCORE).
OTHER_LENS, OWN_SCORE, DOUBTFUL_SCORE = 0.05, 1.4, 1.15
# With so many times as much it is even with few tracks.
CLEAR_SCORE = 3.0
# A settled answer confirms its lens if it is so confident.
WELL_SURE = 0.8
# Poses with a lens of their own err by so many times the standard deviations that parts of the image
# tell. More of a lens than its focal length is another if it is off by so many times more of them.
OWN_SIGMA, MORE_SIGMA = 2.0, 3.0
# Focal lengths that are refined, lenses that are then searched with; noise of the matches that they are
# refined on, in pixels: wide ones draw first.
FOCALS, LENSES = 4, 2
WIDE_PX, WIDE_MATCHES = (16.0, 8.0, 4.0), 500
# Images are of one shape whose logs of the ratio of the sides differ by less.
SAME_SHAPE = 0.02
# The principal point may be outside of where a cut puts it by so much of the image's side.
CUT_SLACK = 0.03
# No lens is off by more (`_lens_change`).
ANY_LENS = 1.5
# The confidence of an answer whose lens is in doubt, and what is left of it where a lens of its own rests
# on few tracks.
DOUBTFUL_LENS, UNPROVEN_LENS = 0.1, 0.5


def with_own_lens(
    search: Search, answer: Answer | None, generator: torch.Generator
) -> Estimate | None:
    """The estimate after a look at the query's lens: that of another, if that explains clearly
    more.

    The lens is refined beside the answer's pose; where it is not the given one, or the answer does
    not confirm it, the query is searched for with the lenses that its matches suggest. Where neither the
    size of the image nor its matches tell the lens, for it may be a part of an image, the standard
    deviations are those of a pose with any lens. One that is said to be the query's stays, in doubt
    where another explains clearly more.
    """
    sure = search.query.lens_is_sure
    if int(search.evidence.has_point.sum()) < MIN_POINTS or (sure and answer is None):
        return answer and answer.estimate
    off, known, given = False, True, search.query.camera
    if answer is not None:
        if not sure:
            search, answer = _turned(search, answer)
        lens = _refined_lens(answer.polished)
        off, told = _is_other(search.query.camera, lens), _is_told(lens)
        known = sure or (_usual_shape(search) and (told or _usual_size(search)))
        if known and not off and _confirms_its_lens(answer, sure or told):
            return _with_lens(answer.estimate, search, given)
        off = (
            off
            and answer.polished.tracks >= MANY_TRACKS
            and _off(search.query.camera, lens.camera) > OTHER_LENS
        )
    least = _explained(search, answer.polished) if answer else 0.0
    most = answer.polished.tracks * least if answer else 0.0
    starts = _likely_lenses(search, answer, generator)
    found = [
        _Other.of(search, other) for start in starts if (other := _searched_with(search, start))
    ]
    found = [other for other in found if other.off >= OTHER_LENS]
    better = [other for other in found if other.explained > DOUBTFUL_SCORE * least]
    plainest = _plainest([other for other in better if other.is_cut])
    clear = bool(plainest) and plainest[0].is_clear(most)
    if sure:
        doubt = min(answer.estimate.confidence, DOUBTFUL_LENS)
        return replace(answer.estimate, confidence=doubt) if clear else answer.estimate
    if clear:
        own, answer = plainest[0], _among_rivals(search, plainest[0].answer, generator)
        estimate = replace(
            answer.estimate,
            camera=answer.polished.camera,
            sigma_m=OWN_SIGMA * answer.estimate.sigma_m,
            sigma_deg=OWN_SIGMA * answer.estimate.sigma_deg,
        )
        if answer.polished.tracks < MANY_TRACKS:
            estimate = replace(estimate, confidence=UNPROVEN_LENS * estimate.confidence)
        if own.odd > SAME_LENS:
            sigmas = _sigmas_of_any_lens(answer.polished)
            estimate = _at_least(estimate, *(OWN_SIGMA * sigma for sigma in sigmas))
        return _as_far_as(estimate, plainest)
    if answer is None:
        return None
    estimate = _with_lens(answer.estimate, search, given)
    if not known:
        estimate = _at_least(estimate, *_sigmas_of_any_lens(answer.polished))
    if not told:  # at most the size of the image speaks for the lens
        rivals = [other for other in found if DOUBTFUL_SCORE * other.explained > least]
        estimate = _as_far_as(estimate, rivals)
    if not (off or better):
        return estimate
    estimate = replace(estimate, confidence=min(estimate.confidence, DOUBTFUL_LENS))
    return _as_far_as(estimate, [other for other in found if OWN_SCORE * other.worth > most])


@dataclass(frozen=True)
class _Other:
    """An answer with another lens; explained: how much of the query it explains; off, odd: how far
    its lens is from the given one, and from a mere zoom of it; is_cut: see `_is_cut`.
    """

    answer: Answer
    explained: float
    off: float
    odd: float
    is_cut: bool

    @classmethod
    def of(cls, search: Search, answer: Answer) -> "_Other":
        given, camera = search.query.camera, answer.polished.camera
        explained = _explained(search, answer.polished)
        whole = search.index.views[search.order[0]].camera
        is_cut = _is_cut(whole, camera)
        return cls(answer, explained, _off(given, camera), _oddness(given, camera), is_cut)

    @property
    def worth(self) -> float:
        """By what it is compared: tracks times what is explained."""
        return self.answer.polished.tracks * self.explained

    def is_clear(self, most: float) -> bool:
        """Whether it is worth clearly more than the answer with the given lens, which is worth `most`."""
        many = self.answer.polished.tracks >= MANY_TRACKS
        return (many and self.worth > OWN_SCORE * most) or self.worth > CLEAR_SCORE * most > 0


def _plainest(others: list[_Other]) -> list[_Other]:
    """Of those worth about as much as the best the ones with the plainest lens, the best first: other
    lenses explain a flat scene as well, and most are mere zooms.
    """
    most = max((other.worth for other in others), default=0.0)
    near = [other for other in others if DOUBTFUL_SCORE * other.worth > most]
    plain = [o for o in near if o.odd < min(other.odd for other in near) + SAME_LENS]
    return sorted(plain, key=lambda other: other.worth, reverse=True)


def _is_cut(whole: Camera, camera: Camera) -> bool:
    """Whether a lens is that of an image of the camera `whole`, cut or with bars around it, and scaled.

    Where something was moved between two index images and the query, false parallax is explained by a
    principal point that no cut could put there.
    """
    if (whole.width - whole.height) * (camera.width - camera.height) < 0:
        whole = turned(whole, 1)
    sides = (
        (whole.fx, whole.cx, whole.width, camera.fx, camera.cx, camera.width),
        (whole.fy, whole.cy, whole.height, camera.fy, camera.cy, camera.height),
    )
    for focal, center, size, own_focal, own_center, own_size in sides:
        zoom = own_focal / focal
        low, high = sorted((zoom * center, zoom * center - (zoom * size - own_size)))
        slack = CUT_SLACK * own_size
        if not low - slack <= own_center <= high + slack:
            return False
    return True


def _oddness(given: Camera, camera: Camera) -> float:
    """How far a lens is from a mere zoom of the given one."""
    return max(map(abs, _lens_change(given, camera)[1:]))


def _as_far_as(estimate: Estimate, rivals: list[_Other]) -> Estimate:
    """The estimate with standard deviations that reach poses which another lens explains about as
    well.
    """
    for rival in rivals:
        other = rival.answer.estimate
        away_m = float((other.c_world - estimate.c_world).norm())
        turned = float(angle_deg(other.R_world_from_cam.T @ estimate.R_world_from_cam))
        estimate = _at_least(estimate, away_m, turned)
    return estimate


def _sigmas_of_any_lens(pose: Polished) -> tuple[float, float]:
    """sigma_m and sigma_deg of a pose whose lens might be any other."""
    sigma_m, sigma_deg = pose_deviation(with_free_lens(pose).covariance)
    return float(sigma_m), float(sigma_deg)


def _at_least(estimate: Estimate, sigma_m: float, sigma_deg: float) -> Estimate:
    """The estimate with standard deviations no smaller than these."""
    return replace(
        estimate,
        sigma_m=max(estimate.sigma_m, sigma_m),
        sigma_deg=max(estimate.sigma_deg, sigma_deg),
    )


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


def _usual_shape(search: Search) -> bool:
    """Whether the query is shaped as an index image, upright or turned: others were cut or squeezed."""
    own, *usual = (abs(math.log(camera.width / camera.height)) for camera in _cameras(search))
    return any(abs(own - shape) < SAME_SHAPE for shape in usual)


def _usual_size(search: Search) -> bool:
    """Whether the query is as large as an index image, upright or turned: others may be parts of one."""
    own, *usual = (sorted((camera.width, camera.height)) for camera in _cameras(search))
    return own in usual


def _cameras(search: Search) -> list[Camera]:
    """The query's, and those of the index images that count."""
    return [search.query.camera, *(search.index.views[i].camera for i in search.order)]


def _explained(search: Search, pose: Polished) -> float:
    """How much of the query a pose explains, with its lens."""
    evidence = search.evidence.seen_with(pose.camera)
    of_pose = pose.R_cam_from_world[None], pose.c_world[None]
    return float(epipolar_scores(evidence, *of_pose, polished=True))


def _likely_lenses(
    search: Search, answer: Answer | None, generator: torch.Generator
) -> list[Polished]:
    """Poses and lenses that explain the query, after refinement on its matches with points, from other
    focal lengths; the best ones, and what the answer's pose leads to with all of the lens free.

    Most lenses are zooms, or of an image that was squeezed, and come first: on a flat scene, freed
    with all the rest, the focal length would drift.
    """
    starts = []
    for evidence, poses in focal_hypotheses(search.evidence, generator):
        of_poses = poses.R_cam_from_world, poses.c_world
        if len(poses):
            score, best = epipolar_scores(evidence, *of_poses).max(dim=0)
            squeezed = _oddness(search.query.camera, evidence.camera) > OTHER_LENS
            start = evidence, *(part[best] for part in of_poses), 2 if squeezed else 1
            starts.append((float(score), start))
    starts = sorted(starts, key=lambda scored: scored[0], reverse=True)[:FOCALS]

    def roughly(pose: Polished) -> float:
        evidence = search.evidence.seen_with(pose.camera)
        return float(epipolar_scores(evidence, pose.R_cam_from_world[None], pose.c_world[None]))

    found: list[Polished] = []

    def add(poses: Iterable[Polished], most: int) -> None:
        for pose in poses:
            if (
                len(found) < most
                and _off(search.query.camera, pose.camera) < ANY_LENS
                and all(_off(other.camera, pose.camera) > OTHER_LENS for other in found)
            ):
                found.append(pose)

    add(sorted((_refined_on_matches(*s) for _, s in starts), key=roughly, reverse=True), LENSES)
    if answer is not None:
        pose = answer.polished
        own = _refined_on_matches(search.evidence, pose.R_cam_from_world, pose.c_world, LENS)
        add([own], LENSES + 1)
    return found


def _refined_on_matches(evidence: Evidence, R: Tensor, c: Tensor, lens: int) -> Polished:
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
    """The pose with the focal length that fits its tracks, and more of the lens if they are many and
    it is clearly another; standard deviations are those with all of it free.
    """
    of = pose.camera, pose.R_cam_from_world, pose.c_world, pose.observed
    lens = refine_with_points(*of, lens=1)
    for free in (2, LENS) if pose.tracks >= MANY_TRACKS else ():
        other = refine_with_points(*of, lens=free)
        if _is_other(pose.camera, other, len(lens.lens_sigma), MORE_SIGMA):
            lens = other
    return with_free_lens(lens) if pose.tracks >= MANY_TRACKS else lens


def _confirms_its_lens(answer: Answer, told: bool) -> bool:
    """Whether no other lens need be tried; told: whether the lens is known, or by the matches."""
    return told and answer.settled and answer.estimate.confidence >= WELL_SURE


def _is_told(lens: Polished) -> bool:
    """Whether the matches tell the focal length well enough for a lens of the query's own to show."""
    return SAME_LENS_SIGMA * float(lens.lens_sigma[0]) < SAME_LENS


def _is_other(given: Camera, lens: Polished, first: int = 0, times: float = 1.0) -> bool:
    """Whether the lens of a pose is another than the given one in what of it was free, from the
    parameter `first` on, by so many `times` more standard deviations.
    """
    free = len(lens.lens_sigma)
    change = torch.tensor(_lens_change(given, lens.camera)[:free]).abs()
    off = (change > SAME_LENS) & (change > times * SAME_LENS_SIGMA * lens.lens_sigma)
    return bool(off[first:].any())


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


def _among_rivals(search: Search, own: Answer, generator: torch.Generator) -> Answer:
    """An answer with a lens near the query's own, or what explains more with that lens elsewhere; as
    sure as the other places allow that the query may be at with it.
    """
    camera = own.polished.camera
    query, evidence = replace(search.query, camera=camera), search.evidence.seen_with(camera)
    everywhere = Search(query, search.index, search.order, evidence)
    everywhere.add(pooled_hypotheses(evidence, generator), REFINED, POLISHED)
    everywhere.polished.append(own.polished)
    best = everywhere.best()
    if float((best.polished.c_world - own.polished.c_world).norm()) > search.index.place_m:
        rival = _searched_with(search, best.polished)
        if rival and _explained(search, rival.polished) > _explained(search, own.polished):
            own = rival
    confidence = min(own.estimate.confidence, best.estimate.confidence)
    return replace(own, estimate=replace(own.estimate, confidence=confidence))


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
        nearby.polished, nearby.evidence = [lens], search.evidence.seen_with(lens.camera)
        answer = nearby.best()
        if _off(camera, lens.camera) < LENS_STAYS:
            break
        camera, poses = lens.camera, poses_of([lens])
    return answer
