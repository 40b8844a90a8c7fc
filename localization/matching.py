"""Matches between the keypoints of two images: by descriptor alone, or guided by the known relative
pose.

A match is kept when each keypoint is the other's best (mutual). Its ratio is the descriptor
distance to the best over that to the second best, where a second neighbor counts only if it lies
elsewhere in the image: one corner often gives several keypoints (two orientations, two scales).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.cameras import Camera, camera_for, homogeneous, project, rays
from localization.features import MAX_SIDE, Features

SECOND_NEIGHBOR_PX = 5.0
EPIPOLAR_BAND_PX = 3.0
GUIDED_RATIO = 0.9
GUIDED_SIMILARITY = 0.7
# Index images, the most alike, that a query is matched with first: the rest only where that left
# doubt.
QUICK_IMAGES = 12
# Two images are versions of one picture where an affine map takes so large a share of their distinct
# matches, of so many, to within so much of where they are; it is found in so many rounds.
SAME_MAP, SAME_MAP_PX, SAME_MAP_MATCHES, SAME_MAP_ROUNDS = 0.8, 2.0, 30, 10
# Distinct is a match of a lower ratio.
DISTINCT_RATIO = 0.8
# Second neighbors looked through for one that lies elsewhere.
_NEIGHBORS = 4
# Keypoints of an overlay are at the same pixels to within so much, at least such a share of the matches
# is; an equal image, or one from nearly the same place, has them, to within so much, in so many of the
# cells, of so many a side, that have so many keypoints.
LAID_PX, LAID_SHARE = 0.15, 0.2
EQUAL_PX, LAID_EVERYWHERE, LAID_CELLS, LAID_KEYPOINTS = 2.0, 0.75, 4, 10
# Half-planes through both cameras are compared up to this sine of their angle: beside an epipole,
# where more of them come near, no depth can be told.
MAX_TURN = 0.25
# Keypoints of an image whose candidates are sought together.
_BLOCK = 64
# Keypoints of an image compared at once with all of another: the similarities stay in the
# processor's cache.
_ROWS = 256


@dataclass
class View:
    """One image: its features, its camera and, for an index image, its pose (None for a query).

    lens_is_sure: the camera is that of the image, not one that others of its scene were taken with.
    """

    features: Features
    camera: Camera
    R_world_from_cam: Tensor | None = None
    c_world: Tensor | None = None
    lens_is_sure: bool = False

    def as_query(self, keypoints: int) -> "View":
        """The image without its pose, and with about so many of its keypoints if it has more."""
        step = max(1, len(self.features) // keypoints)
        return View(self.features.select(slice(None, None, step)), self.camera)

    def prepared(self) -> "View":
        """The view as a pinhole camera of the size at which its keypoints were sought would have
        taken it, so that pixels mean as much in every image and distortion is dealt with once."""
        camera, features = self.camera, self.features
        if camera != camera.pinhole():
            ray, camera = rays(camera, features.xy_px), camera.pinhole()
            features = replace(features, xy_px=project(camera, ray).float())
        scale = min(1.0, MAX_SIDE / max(camera.width, camera.height))
        if scale < 1:
            camera = camera_for(camera, camera.width * scale, camera.height * scale)
            xy_px = (features.xy_px + 0.5) * scale - 0.5
            features = replace(features, xy_px=xy_px, scale_px=features.scale_px * scale)
        return replace(self, features=features, camera=camera)


@dataclass(frozen=True)
class Matches:
    """m matches of images a and b: keypoint numbers a, b (m,), cosine similarity (m,) and distance
    ratio (m,).
    """

    a: Tensor
    b: Tensor
    similarity: Tensor
    ratio: Tensor

    def select(self, keep: Tensor) -> "Matches":
        """The matches that a mask or an index tensor picks."""
        return Matches(self.a[keep], self.b[keep], self.similarity[keep], self.ratio[keep])

    def __len__(self) -> int:
        return len(self.a)


def _no_matches() -> Matches:
    none, nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    return Matches(none, none, nothing, nothing)


def _distance(similarity: Tensor) -> Tensor:
    """Distance of unit descriptors from their cosine similarity."""
    return (2 - 2 * similarity).clamp_min(0).sqrt()


def mutual_matches(a: Features, b: Features) -> Matches:
    """Mutual matches by descriptor alone, without a ratio test (the ratio comes along)."""
    if min(len(a.xy_px), len(b.xy_px)) == 0:
        return _no_matches()
    top_b = torch.full((len(b),), -2.0)
    parts = []
    for rows in a.descriptors.split(_ROWS):
        similarity = rows @ b.descriptors.T
        parts.append(similarity.max(dim=1))
        torch.maximum(top_b, similarity.amax(dim=0), out=top_b)
    top, column = (torch.cat(part) for part in zip(*parts))
    row = torch.nonzero(top == top_b[column])[:, 0]
    row = row[_first(column[row], len(b))]
    # Seconds are looked for only where they are needed.
    seconds = [_second(rows, b) for rows in a.descriptors[row].split(_ROWS)]
    ratio = _distance(top[row]) / _distance(torch.cat(seconds)).clamp_min(1e-9)
    return Matches(row, column[row], top[row], ratio)


def laid_over(a: View, b: View, matches: Matches) -> Tensor:
    """Which matches (m,) of two images are of what was laid over them, as a caption or a menu is: many
    keypoints at the very same pixels, in a part of the image only.
    """
    xy = a.features.xy_px
    moved = (xy[matches.a] - b.features.xy_px[matches.b]).norm(dim=1)
    still = moved <= LAID_PX
    if int(still.sum()) < LAID_SHARE * len(matches):
        return torch.zeros_like(still)
    size = torch.tensor([a.camera.width, a.camera.height])
    column, row = (xy * LAID_CELLS / size).long().clamp(0, LAID_CELLS - 1).unbind(1)
    cell, count = row * LAID_CELLS + column, LAID_CELLS**2
    there = torch.bincount(cell, minlength=count)
    alike = torch.bincount(cell[matches.a[moved <= EQUAL_PX]], minlength=count)
    looked = there >= LAID_KEYPOINTS
    equal = looked & (alike >= LAID_SHARE * there)
    return still & bool(equal.sum() < LAID_EVERYWHERE * looked.sum())


def same_picture(a: Features, b: Features) -> bool:
    """Whether two images are versions of one picture: cut, scaled, stretched, turned.

    An affine map between them, of least absolute errors, agrees with most of their distinct matches.
    Between such images there is no parallax, so they tell nothing of each other's place: with a false
    lens a cut image agrees with the whole one from any place along the optical axis.
    """
    matches = mutual_matches(a, b)
    matches = matches.select(matches.ratio < DISTINCT_RATIO)
    if len(matches) < SAME_MAP_MATCHES:
        return False
    x, y = homogeneous(a.xy_px[matches.a].double()), b.xy_px[matches.b].double()
    weight = torch.ones_like(x[:, :1])
    for _ in range(SAME_MAP_ROUNDS):
        error = (x @ torch.linalg.lstsq(weight * x, weight * y).solution - y).norm(dim=1)
        weight = error.clamp_min(SAME_MAP_PX / 4).rsqrt()[:, None]
    return float((error <= SAME_MAP_PX).double().mean()) >= SAME_MAP


def _first(column: Tensor, count: int) -> Tensor:
    """Which rows (n,) are the first of their column 0..count-1: of equals one is matched."""
    rows = torch.arange(len(column))
    first = torch.full((count,), len(column)).scatter_reduce(0, column, rows, "amin")
    return first[column] == rows


def _second(descriptors: Tensor, b: Features) -> Tensor:
    """The similarity (n,) of the second best keypoint of b that lies elsewhere; -1 where none does."""
    top, column = (descriptors @ b.descriptors.T).topk(min(_NEIGHBORS, len(b)), dim=1)
    elsewhere = (b.xy_px[column] - b.xy_px[column[:, :1]]).norm(dim=-1) > SECOND_NEIGHBOR_PX
    return torch.where(elsewhere, top, -1.0).amax(dim=1)


@dataclass(frozen=True)
class _HalfPlanes:
    """Keypoints (n,) of a posed view in half-planes bounded by the line through two cameras.

    angle: of the half-plane, in radians about that line; along, across: cosine and sine of the
    ray's angle from the line, towards the second camera; size: distance of the ray (z = 1) from
    the line, at unit distance of the cameras; line: length of the half-plane's line in the other
    image, its normal being of unit length, in pixels: a ray there, off by a turn of the half-plane,
    is size * sin(turn) / line pixels from that line.
    """

    angle: Tensor
    along: Tensor
    across: Tensor
    size: Tensor
    line: Tensor

    @classmethod
    def of(cls, view: View, other: View, axis: Tensor, frame: Tensor) -> "_HalfPlanes":
        ray = rays(view.camera, view.features.xy_px)
        size = ray.norm(dim=1)
        ray = (ray / size[:, None]) @ view.R_world_from_cam.T
        x, y = (ray @ frame.T).unbind(1)
        across = torch.hypot(x, y)
        # The unit normal of the half-plane in the other camera's axes: its line there.
        normal = (torch.stack([-y, x], 1) / across[:, None].clamp_min(1e-12)) @ frame
        line = normal @ other.R_world_from_cam[:, :2]
        focal = torch.tensor([other.camera.fx, other.camera.fy], dtype=line.dtype)
        parts = torch.atan2(y, x), ray @ axis, across, size * across, (line / focal).norm(dim=1)
        return cls(*(part.float() for part in parts))

    def select(self, keep: Tensor | slice | tuple) -> "_HalfPlanes":
        return _HalfPlanes(*(value[keep] for value in vars(self).values()))


def _half_planes(a: View, b: View) -> tuple[_HalfPlanes, _HalfPlanes]:
    """Both views' keypoints about the line from a to b."""
    baseline = b.c_world - a.c_world
    axis = baseline / baseline.norm()
    across = torch.linalg.cross(axis, torch.eye(3, dtype=axis.dtype)[axis.abs().argmin()])
    across = across / across.norm()
    frame = torch.stack([across, torch.linalg.cross(axis, across)])
    return _HalfPlanes.of(a, b, axis, frame), _HalfPlanes.of(b, a, axis, frame)


def _meet(a: _HalfPlanes, b: _HalfPlanes, slack: float) -> Tensor:
    """Which pairs of keypoints, of broadcastable shapes, may show one point; see `in_band`."""
    turn = b.angle - a.angle
    off, cosine = turn.sin().abs(), turn.cos()
    near = off * b.size <= EPIPOLAR_BAND_PX * a.line
    near &= off * a.size <= EPIPOLAR_BAND_PX * b.line
    near &= (off <= MAX_TURN) & (cosine > 0)
    product = a.along * b.along + a.across * b.across * cosine
    front = (a.along - product * b.along >= slack) & (product * a.along - b.along >= slack)
    return near & front


def _slack(a: View, b: View) -> float:
    """How far behind, in baselines, a point may seem by an error of the band."""
    return -EPIPOLAR_BAND_PX / min(a.camera.fx, b.camera.fx)


def in_band(a: View, b: View, i: Tensor, j: Tensor) -> Tensor:
    """Which of k pairs of keypoints i (k,) of a and j (k,) of b the known poses allow.

    Allowed is a pair within EPIPOLAR_BAND_PX of each other's epipolar line, in both images, on one
    side of the line through the cameras (and clearly so: not beside an epipole), that meets in front
    of both. Depths come from the point where the two rays are nearest; rays parallel to within the
    band (a far point) pass. Of cameras at one place the rays must be parallel.
    """
    if bool((a.c_world == b.c_world).all()):
        da, db = (rays(v.camera, v.features.xy_px) @ v.R_world_from_cam.T for v in (a, b))
        da, db = (torch.nn.functional.normalize(d, dim=1) for d in (da, db))
        return (da[i] - db[j]).norm(dim=1) <= -_slack(a, b)
    of_a, of_b = _half_planes(a, b)
    return _meet(of_a.select(i), of_b.select(j), _slack(a, b))


def epipolar_pairs(a: View, b: View) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of keypoints that `in_band` allows: numbers (k,) in a and in b, and the similarity of
    their descriptors; none for cameras at one place.

    With the keypoints of both sorted by the angle of their half-planes, those of a that can meet
    one of _BLOCK successive keypoints of b are a run.
    """
    none = torch.zeros(0, dtype=torch.long)
    if min(len(a.features), len(b.features)) == 0 or bool((a.c_world == b.c_world).all()):
        return none, none, torch.zeros(0)
    of_a, of_b = _half_planes(a, b)
    # Twice around, so that no run is broken.
    by_angle, order = of_a.angle.argsort().repeat(2), of_b.angle.argsort()
    count, angle = len(a.features), of_b.angle[order]
    of_a_rows, of_b_rows = a.features.descriptors[by_angle], b.features.descriptors[order]
    # Pixels apart are at least the focal length times the sine of the angle from the half-plane.
    least_px = min(b.camera.fx, b.camera.fy) * of_b.across[order]
    reach = torch.asin((EPIPOLAR_BAND_PX / least_px).clamp(max=MAX_TURN)) + 1e-5
    around = torch.cat(
        [of_a.angle[by_angle[:count]] + turn for turn in (-2 * math.pi, 0, 2 * math.pi)]
    )
    low = torch.stack([part.min() for part in (angle - reach).split(_BLOCK)])
    high = torch.stack([part.max() for part in (angle + reach).split(_BLOCK)])
    first = torch.searchsorted(around, low)
    length = (torch.searchsorted(around, high, right=True) - first).clamp(max=count)
    parts = []
    for start, begin, size in zip(range(0, len(order), _BLOCK), first.tolist(), length.tolist()):
        block, run = slice(start, start + _BLOCK), slice(begin % count, begin % count + size)
        turn = around[begin : begin + size] - angle[block, None]
        column, row = torch.nonzero(turn.abs() <= reach[block, None], as_tuple=True)
        similarity = (of_b_rows[block] @ of_a_rows[run].T)[column, row]
        parts.append((by_angle[run][row], order[block][column], similarity))
    i, j, similarity = (torch.cat(part) for part in zip(*parts))
    allowed = _meet(of_a.select(i), of_b.select(j), _slack(a, b))
    return i[allowed], j[allowed], similarity[allowed]


def guided_matches(a: View, b: View) -> Matches:
    """Mutual matches of two posed views inside the known epipolar band, with the ratio test inside
    the band.
    """
    i, j, similarity = epipolar_pairs(a, b)
    top_a = best_of(similarity, i, len(a.features))
    best = (similarity == top_a[i]) & (similarity == best_of(similarity, j, len(b.features))[j])
    best &= similarity >= GUIDED_SIMILARITY
    matched = torch.full((len(a.features),), -1)
    matched[i[best]] = j[best]
    row = torch.nonzero(matched >= 0)[:, 0]
    row = row[_first(matched[row], len(b.features))]
    xy_px = b.features.xy_px
    apart = (xy_px[j] - xy_px[matched[i]]).norm(dim=1) > SECOND_NEIGHBOR_PX
    second = best_of(similarity[apart], i[apart], len(a.features))[row].clamp_min(-1)
    ratio = _distance(top_a[row]) / _distance(second).clamp_min(1e-9)
    return Matches(row, matched[row], top_a[row], ratio).select(ratio <= GUIDED_RATIO)


def best_of(value: Tensor, key: Tensor, count: int) -> Tensor:
    """The largest value (k,) of each key 0..count-1, (count,); -2 where there is none."""
    return value.new_full((count,), -2.0).scatter_reduce_(0, key, value, "amax")


def near_pairs(
    R_world_from_cam: Tensor, c_world: Tensor, limit: int, wanted: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Pairs (i < j) of posed images worth matching, from their poses alone.

    At most `limit` that an image asks for (`wanted` images alone, None for all), and twice as many
    of any. Images that look more than 90 degrees apart, or from one place, are left out. Of an
    image's others, sorted by distance, the nearer half of `limit` is taken whole and the rest
    spread evenly over the next 3 x limit, so that a slow video still gives baselines.
    """
    asked: dict[tuple[int, int], int] = {}
    near, spread = limit // 2, limit - limit // 2
    for i in range(len(c_world)) if wanted is None else wanted:
        away = (c_world - c_world[i]).norm(dim=1)
        usable = (away > 0) & (R_world_from_cam[:, :, 2] @ R_world_from_cam[i, :, 2] > 0)
        away, order = away.masked_fill(~usable, torch.inf).topk(
            min(len(away), near + 3 * limit), largest=False
        )
        order = order[away < torch.inf].tolist()
        if len(order) > limit:
            far = torch.linspace(near, len(order) - 1, spread).round().long().tolist()
            order = order[:near] + [order[k] for k in far]
        for rank, j in enumerate(order):
            pair = min(i, j), max(i, j)
            asked[pair] = min(rank, asked.get(pair, rank))
    partners, pairs = [0] * len(c_world), []
    for i, j in sorted(asked, key=lambda pair: (asked[pair], pair)):
        if max(partners[i], partners[j]) < 2 * limit:
            pairs.append((i, j))
            partners[i], partners[j] = partners[i] + 1, partners[j] + 1
    return sorted(pairs)
