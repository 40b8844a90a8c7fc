"""What a scene's own index images tell about its pose file and its lens, and how far that may be
trusted.

The poses of two images say where a match may lie. So the matches between index images judge every
reading of the pose file (`readings`), and, the reading found, the lens: focal length, principal
point and one radial term, each only as far as the data bear it. A scene whose poses explain few
of its matches is not to be trusted.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from localization.cameras import (
    TARTANAIR,
    Camera,
    Convention,
    all_conventions,
    camera_for,
    default_camera,
    project,
    rays,
)
from localization.lens_fit import CENTER, FOCAL, K1, LENS, TALLER, PosedMatches, refined
from localization.matching import View
from localization.posed_pairs import MIN_IMAGES, StillCells, matched_pairs
from localization.readings import (
    CLEARLY_MORE,
    CONVENTIONS,
    DOUBTFUL,
    USUAL,
    Judge,
    Reading,
    focal_grid,
    limit_of,
    relative,
)

# Least share of matches that poses explain which are those of their images; contradicted ones explain
# 0 to 18 %.
MIN_SHARE = 0.3
# Healthy scenes explain 45 to 90 % of their matches.
HEALTHY_SHARE = 0.45
# Most confidence in a scene whose poses contradict its images.
UNTRUSTED = 0.45
# Of the matches explained, those of far points in a scene that is seen from one place.
_ONE_PLACE = 0.9
# Less is chance.
_LEAST_SCORE = 12.0
# Principal points farther from the middle, in image sides, belong to an image of another size.
_OFF_MIDDLE = 0.25
_NO_SIZE = (640, 480)  # of a scene without images
# So much may the shape of that size, as the principal point tells it, differ from the shape of
# the images.
_OTHER_SHAPE = 0.15
# Focal lengths of images of another size, in those that the scene's lens would have there
# (logarithms).
_ZOOMS = np.linspace(-0.7, 0.7, 29).tolist()

_UNEXPLAINED = (
    "the poses explain only {:.0f} % of the matches between the scene's own index images (healthy: "
    "45 to 90 %), and no pose of it is trusted: do the poses belong to the images in "
    "their order, is the quaternion where and as it should be, are axes and lens those of these "
    "images?"
)
_DOUBTFUL = (
    "the poses explain only {:.0f} % of the matches between the scene's own index images (healthy: "
    "45 to 90 %), and no test shows that they are right: look at some answers before all are believed"
)
_VOUCHED = (
    "the poses explain only {:.0f} % of the matches between the scene's own index images (healthy: "
    "45 to 90 %), but some images that were left out are found where their poses say: look at some answers "
    "before all are believed"
)
_FEW_PAIRS = (
    "only {} pairs of the {} index images match, too few to judge poses and lens by: do the images "
    "overlap, or does most of what they show stand still in them?"
)
_ONE_PLACE_ONLY = (
    "all index images were taken from one place: they tell rotations, and no pose of it is trusted"
)


def _unusual(convention: Convention, explained: float) -> str:
    return (
        f"the poses are unusual ({convention.unusual()}): {convention.describe()} explains "
        f"{100 * explained:.0f} % of the matches"
    )


@dataclass(frozen=True)
class Calibration:
    """What was found out about a scene's pose file and camera, and on what evidence.

    camera: of images of the size that most have (or that the given camera describes); cameras: of
    each size (width, height); rows (N,): the pose row of each frame, -1 for none; still: where
    the images show what does not move with the world; explained: share of the index images' own
    matches that this reading explains; margin: score of the convention over the next one's;
    pairs, images: the evidence; convention_from, focal_from: "evidence", "prior", "guess" or
    "given"; trusted: whether a pose of this scene may be believed; warnings: sentences for the
    user.
    """

    convention: Convention
    camera: Camera
    cameras: dict[tuple[int, int], Camera]
    rows: np.ndarray
    still: StillCells | None
    explained: float
    margin: float
    pairs: int
    images: int
    convention_from: str
    focal_from: str
    trusted: bool
    warnings: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether it explains as much as scenes that are as they should be."""
        return self.trusted and self.explained >= HEALTHY_SHARE

    @property
    def trust(self) -> float:
        """The most confidence that an answer in this scene deserves."""
        return 1.0 if self.trusted else UNTRUSTED

    def tested(self, vouched: bool) -> "Calibration":
        """The same after the map's test of itself; vouched: index images left out were found where
        their poses say. That their matches explain little is then a matter of wide baselines, and the
        scene trusted; else a scene that is trusted though they explain little is in doubt.
        """
        if _ONE_PLACE_ONLY in self.warnings:
            return self
        if vouched:
            doubt = _UNEXPLAINED.format(100 * self.explained)
            others = tuple(w for w in self.warnings if w != doubt)
            if len(others) < len(self.warnings):
                others = (*others, _VOUCHED.format(100 * self.explained))
                if self.convention.unusual():
                    others = (*others, _unusual(self.convention, self.explained))
            return replace(self, trusted=True, warnings=others)
        if self.trusted and 0 < self.explained < HEALTHY_SHARE:
            return self.warning(_DOUBTFUL.format(100 * self.explained))
        return self

    def warning(self, sentence: str) -> "Calibration":
        """The same with a further sentence for the user."""
        return replace(self, warnings=(*self.warnings, sentence))

    def camera_of(self, width: int, height: int) -> Camera:
        """The scene's lens on an image of this size."""
        return self.cameras.get((width, height)) or camera_for(self.camera, width, height)

    def applied(self, view: View, lens: Camera | None = None) -> View:
        """An image of the scene with its camera, or with the lens that is known to be its own,
        without the keypoints that stand still in all images.
        """
        if lens is not None:
            own, common = taken_with(view, lens), self.camera.pinhole()
            moving = self.applied(seen_with(own, common))
            back = seen_with(replace(moving, camera=common), own.camera)
            return replace(back, lens_is_sure=True)
        camera, features = self.camera_of(view.camera.width, view.camera.height), view.features
        if self.still is not None:
            features = self.still.moving(features, camera)
        return replace(view, features=features, camera=camera)

    def describe(self) -> str:
        """One line for the screen."""
        return (
            f"{self.convention.describe()} ({self.convention_from}, margin {self.margin:.1f} from "
            f"{self.pairs} pairs of {self.images} images, {100 * self.explained:.0f} % of matches "
            f"explained), {self.camera.describe()} ({self.focal_from})"
        )

    def as_dict(self) -> dict:
        """Plain values for metrics.json."""
        lens = ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2")
        told = (
            "explained",
            "margin",
            "pairs",
            "images",
            "convention_from",
            "focal_from",
            "trusted",
        )
        return {
            "convention": self.convention.describe(),
            **{name: getattr(self.camera, name) for name in lens},
            **{name: getattr(self, name) for name in told},
            "cameras": {
                f"{width}x{height}": [getattr(c, name) for name in lens]
                for (width, height), c in self.cameras.items()
            },
            "warnings": list(self.warnings),
        }


def taken_with(view: View, lens: Camera) -> View:
    """The view with another camera, on images of its size."""
    return replace(view, camera=camera_for(lens, view.camera.width, view.camera.height))


def seen_with(view: View, camera: Camera) -> View:
    """The view as another camera at its place would have taken it."""
    xy_px = project(camera, rays(view.camera, view.features.xy_px)).float()
    return replace(view, features=replace(view.features, xy_px=xy_px), camera=camera)


def calibrate(
    views: list[View],
    pose7: np.ndarray,
    camera: Camera | None = None,
    convention: Convention | None = None,
    *,
    frames: list[int] | None = None,
    orders: dict[str, list[int]] | None = None,
) -> Calibration:
    """Convention, order of the rows and cameras of a scene from its index images.

    views: the index images, whose cameras only tell their sizes; pose7 (N, 7): the rows of the
    pose file, NaN for poses not known; camera: the known one, or the first guess; convention:
    given by the user, or None to find it out; frames (n,): the number of each view in the scene,
    which nominally is its row (default: all in order); orders: other rows (N,) of the frames that
    their names suggest, each with its reason in words.
    """
    pose7 = torch.as_tensor(pose7, dtype=torch.float64).reshape(-1, 7)
    frame = torch.as_tensor(range(len(views)) if frames is None else frames, dtype=torch.long)
    rows = torch.arange(max([len(pose7), *(frame + 1).tolist()]))
    rows = torch.where(rows < len(pose7), rows, -1)
    posed = [
        i for i, row in enumerate(rows[frame].tolist()) if row >= 0 and pose7[row].isfinite().all()
    ]
    views, frame = [views[i] for i in posed], frame[posed]
    sizes = [(v.camera.width, v.camera.height) for v in views]
    warnings: list[str] = []
    camera, focal_known = _of_a_size(camera, sizes, warnings)
    size = (camera.width, camera.height)
    everything, still = matched_pairs(
        [View(v.features, camera_for(camera, *s)) for v, s in zip(views, sizes)],
        pose7[rows[frame]],
    )
    same = torch.tensor([s == size for s in sizes], dtype=torch.bool)
    one_size = everything.select(same[everything.a] & same[everything.b])
    pairs = one_size if one_size.enough() else everything

    prior = camera.fx / max(size)
    judge = Judge(
        pairs, pose7, frame, limit_of(max(size)), [prior] if focal_known else focal_grid(prior)
    )
    read = judge.read([convention] if convention else CONVENTIONS, rows)
    if pairs.enough():
        orders = {what: torch.as_tensor(order) for what, order in (orders or {}).items()}
        read = _other_reading(judge, read, orders, convention, warnings)
        focal_known = focal_known and read.focal == prior
    read, source = _decide(judge, read, convention)
    poses = judge.poses(read.convention, read.rows)

    with_pose = poses[1].isfinite().all(1)
    everything, pairs = (p.select(with_pose[p.a] & with_pose[p.b]) for p in (everything, pairs))
    lens = PosedMatches(pairs, *relative(poses, poses, pairs), judge.limit)
    start = _zoomed(np.log(prior))
    steps = [] if focal_known else [FOCAL, TALLER]
    steps += [CENTER] if one_size.enough() and not focal_known else []
    bent_steps = steps if camera.k1 else [*steps, K1]
    found = refined(lens, start, read.focal, bent_steps) if pairs.enough() else start
    if found[3] and lens.shares(found)[0] < MIN_SHARE:
        # In a scene that explains little any lens fits something by chance.
        straight = refined(lens, start, read.focal, steps)
        if lens.score(found) < CLEARLY_MORE * lens.score(straight):
            found = straight
    if source == "guess" and found[0] == start[0]:
        found = found + _zoomed(np.log(read.focal / prior))
    cameras = {size: _camera(camera, found)}
    for other in sorted(set(sizes) - {size}) if pairs.enough() else ():
        own = torch.tensor([s == other for s in sizes], dtype=torch.bool)
        near = everything.select((own | same)[everything.a] & (own | same)[everything.b])
        near = near.select(own[near.a] | own[near.b])
        theirs = PosedMatches(
            near, *relative(poses, poses, near), judge.limit, found, own[near.a], own[near.b]
        )
        scan = [found + _zoomed(z) for z in _ZOOMS]
        focal = float(max(scan, key=theirs.score)[0].exp())
        cameras[other] = _camera(
            camera_for(camera, *other), refined(theirs, found, focal, [FOCAL, CENTER])
        )

    explained, far = lens.shares(found)
    grounded = pairs.enough() or source != "guess"
    one_place = grounded and far > _ONE_PLACE * explained > 0
    if one_place:
        warnings.append(_ONE_PLACE_ONLY)
    if not pairs.enough() and len(views) >= MIN_IMAGES:
        warnings.append(_FEW_PAIRS.format(len(pairs.a), len(views)))
    if pairs.enough() and explained < MIN_SHARE:
        warnings.append(_UNEXPLAINED.format(100 * explained))
    elif read.convention.unusual() and not convention:
        warnings.append(_unusual(read.convention, explained))
    trusted = explained >= MIN_SHARE and not one_place and grounded
    left = found[0] != np.log(prior)
    focal_from = (
        "given"
        if focal_known and not found[3]
        else "given, k1 from evidence"
        if focal_known
        else "prior"
        if not left
        else "evidence"
        if pairs.enough()
        else "guess"
    )
    return Calibration(
        read.convention,
        cameras[size],
        cameras,
        read.rows.numpy(),
        still,
        explained,
        read.margin,
        len(pairs.a),
        pairs.images(),
        source,
        focal_from,
        trusted,
        tuple(warnings),
    )


def _of_a_size(
    camera: Camera | None, sizes: list[tuple[int, int]], warnings: list[str]
) -> tuple[Camera, bool]:
    """The camera for the size of image it describes, a guess for that of most images where None;
    whether it is known.

    It describes the size whose middle is nearest its principal point. Where that is far from the
    middle it was measured on images of another size: scaled it is a first guess, if its principal
    point is a middle at all.
    """
    count = Counter(sizes)
    most = max(count, key=lambda s: (count[s], s), default=_NO_SIZE)
    if camera is None or not sizes:
        return camera or default_camera(*most), camera is not None
    own = (camera.width, camera.height)

    def off_middle(s: tuple[int, int]) -> tuple[float, bool, int]:
        return (
            round(max(abs(camera.cx / s[0] - 0.5), abs(camera.cy / s[1] - 0.5)), 2),
            s != own,
            -count[s],
        )

    size = min(count.keys() | ({own} if min(own) else set()), key=off_middle)
    camera = replace(camera, width=size[0], height=size[1])
    if off_middle(size)[0] <= _OFF_MIDDLE:
        return (camera if size in count else camera_for(camera, *most)), True
    full = (round(2 * camera.cx), round(2 * camera.cy))
    said = (
        f"the principal point {camera.cx:.1f} {camera.cy:.1f} is far from the middle of images "
        f"{size[0]} x {size[1]}"
    )
    if min(full) <= 0 or abs(full[0] * most[1] / (full[1] * most[0]) - 1) > _OTHER_SHAPE:
        warnings.append(f"{said}: give the intrinsics of these images; they are found out instead")
        return default_camera(*most), False
    warnings.append(
        f"{said}: taken for the intrinsics of images of about {full[0]} x {full[1]}, they are "
        "scaled"
    )
    return camera_for(replace(camera, width=full[0], height=full[1]), *most), False


def _other_reading(
    judge: Judge,
    read: Reading,
    orders: dict[str, Tensor],
    given: Convention | None,
    warnings: list[str],
) -> Reading:
    """`read`, or what explains clearly more: other rows, another focal length than the known one.

    warnings: tells of them, and of another convention than the given one.
    """

    def beats(other: Reading) -> bool:
        return other.score >= CLEARLY_MORE * read.score and other.share >= MIN_SHARE

    def told(other: Reading) -> str:
        return f"{100 * other.share:.0f} instead of {100 * read.share:.0f} % of the matches"

    usual = [given] if given else all_conventions()
    other = max(judge.other_rows(read, orders, usual), key=lambda reading: reading.score)
    if beats(other):
        warnings.append(
            f"the poses explain {told(other)} if taken in another order, and so they are: "
            f"{other.rows_are}"
        )
        read = judge.read([given] if given else CONVENTIONS, other.rows, other.rows_are)
    if given:
        other = judge.read(CONVENTIONS, read.rows)
        if beats(other):
            warnings.append(
                f"not the given convention but {other.convention.describe()} explains {told(other)}"
            )
    if len(judge.focals) == 1:
        free = replace(judge, focals=focal_grid(judge.focals[0]))
        other = free.read(
            [given or read.convention] if given or read.share >= DOUBTFUL else CONVENTIONS,
            read.rows,
        )
        if beats(other):
            times = other.focal / judge.focals[0]
            warnings.append(
                f"a focal length {times:.2f} times the given one explains {told(other)}, and is "
                "taken"
            )
            read = replace(other, margin=read.margin if other.margin == 1 else other.margin)
    return read


def _decide(judge: Judge, read: Reading, given: Convention | None) -> tuple[Reading, str]:
    """The reading that counts, and whether it is "given", "evidence", "prior" or a "guess".

    The winner counts, whatever its share, unless a more common convention is not clearly worse.
    """
    if given:
        return read, "given"
    if read.score < _LEAST_SCORE:
        return judge.read([TARTANAIR], read.rows), "prior"
    if len(read.rivals) == 1 and judge.pairs.enough() and read.share >= MIN_SHARE:
        return read, "evidence"
    chosen = next((c for c in USUAL if c in read.rivals), read.convention)
    if chosen != read.convention:
        read = replace(judge.read([chosen], read.rows), margin=read.margin, rows_are=read.rows_are)
    return read, "prior" if chosen == TARTANAIR else "guess"


def _zoomed(log_f: float) -> Tensor:
    """A lens (LENS,) of this focal length, else as the prior camera's."""
    return torch.tensor([log_f, *[0.0] * (LENS - 1)], dtype=torch.float64)


def _camera(prior: Camera, lens: Tensor) -> Camera:
    """The camera of a lens (LENS,) in longer image sides, relative to the prior camera."""
    log_f, dx, dy, k1, taller = lens.tolist()
    side, aspect = max(prior.width, prior.height), prior.fy / prior.fx
    fx = side * float(np.exp(log_f))
    fy = fx * aspect * float(np.exp(taller))
    cx, cy = prior.cx + dx * side, prior.cy + dy * side * aspect
    return replace(prior, fx=fx, fy=fy, cx=cx, cy=cy, k1=prior.k1 + k1)
