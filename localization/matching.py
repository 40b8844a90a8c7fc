"""Matches between the keypoints of two images: by descriptor alone, or guided by the known relative
pose.

A match is kept when each keypoint is the other's best (mutual). Its ratio is the descriptor
distance to the best over that to the second best, where a second neighbor counts only if it lies
elsewhere in the image: one corner often gives several keypoints (two orientations, two scales).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.cameras import Camera, camera_for, project, rays
from localization.features import MAX_SIDE, Features

SECOND_NEIGHBOR_PX = 5.0
EPIPOLAR_BAND_PX = 3.0
GUIDED_RATIO = 0.9
GUIDED_SIMILARITY = 0.7
# Second neighbors looked through for one that lies elsewhere.
_NEIGHBORS = 4
# Pairs of descriptors compared at once: what stays in the processor's cache is five times as fast.
_PAIRS = 4096
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

    def prepared(self) -> "View":
        """The view as a pinhole camera of the size at which its keypoints were sought would have
        taken it, so that pixels mean as much in every image and distortion is dealt with once."""
        camera, features = self.camera, self.features
        if camera.k1 or camera.k2:
            ray, camera = rays(camera, features.xy_px), replace(camera, k1=0.0, k2=0.0)
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


def world_rays(view: View, xy_px: Tensor) -> Tensor:
    """Unit viewing rays (..., 3) in world axes, float64, of pixels (..., 2) of a posed view."""
    ray = rays(view.camera, xy_px) @ view.R_world_from_cam.T
    return ray / ray.norm(dim=-1, keepdim=True)


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
    # Seconds are looked for only where they are needed.
    seconds = [_second(rows, b) for rows in a.descriptors[row].split(_ROWS)]
    ratio = _distance(top[row]) / _distance(torch.cat(seconds)).clamp_min(1e-9)
    return Matches(row, column[row], top[row], ratio)


def _second(descriptors: Tensor, b: Features) -> Tensor:
    """The similarity (n,) of the second best keypoint of b that lies elsewhere; -1 where none does."""
    top, column = (descriptors @ b.descriptors.T).topk(min(_NEIGHBORS, len(b)), dim=1)
    elsewhere = (b.xy_px[column] - b.xy_px[column[:, :1]]).norm(dim=-1) > SECOND_NEIGHBOR_PX
    return torch.where(elsewhere, top, -1.0).amax(dim=1)


def essential_matrix(a: View, b: View) -> Tensor:
    """E (3, 3) with x_b . E x_a = 0 for rays x_a, x_b of one point, in camera axes, of two posed
    views.
    """
    R_b_from_a = b.R_world_from_cam.T @ a.R_world_from_cam
    t = b.R_world_from_cam.T @ (a.c_world - b.c_world)
    x, y, z = t.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=t.dtype)
    return cross @ R_b_from_a


def in_band(
    a: View, b: View, i: Tensor, j: Tensor, band_px: float = EPIPOLAR_BAND_PX
) -> Tensor:
    """Which of k pairs of keypoints i (k,) of a and j (k,) of b the known poses allow.

    Allowed is a pair within band_px of each other's epipolar line, in both images, on one side of
    the line through the cameras, that meets in front of both. Depths come from the point where the two rays are nearest; rays parallel
    to within the band (a far point) pass. Of cameras at one place the rays must be parallel.
    """
    baseline = b.c_world - a.c_world
    length, focal_px = float(baseline.norm()), min(a.camera.fx, b.camera.fx)
    da, db = (world_rays(v, v.features.xy_px).float() for v in (a, b))
    if length == 0:
        return (da[i] - db[j]).norm(dim=1) <= band_px / focal_px
    baseline = baseline / length
    E = essential_matrix(a, b) / length
    xa, xb = rays(a.camera, a.features.xy_px), rays(b.camera, b.features.xy_px)
    scale_a, scale_b = (
        torch.tensor([[v.camera.fx, v.camera.fy]], dtype=E.dtype) for v in (a, b)
    )
    line_b, line_a = xa @ E.T, xb @ E
    norm_b, norm_a = (line_b[:, :2] / scale_b).norm(dim=1), (line_a[:, :2] / scale_a).norm(dim=1)
    residual = (line_b.float()[i] * xb.float()[j]).sum(1).abs_()
    near = residual <= band_px * torch.minimum(norm_b.float()[i], norm_a.float()[j])
    along_a, along_b = da @ baseline.float(), db @ baseline.float()
    cosine, slack = (da[i] * db[j]).sum(1), -band_px / focal_px
    along_a, along_b = along_a[i], along_b[j]
    front = (along_a - cosine * along_b >= slack) & (cosine * along_a - along_b >= slack)
    return near & front & (cosine >= along_a * along_b)


def epipolar_pairs(
    a: View, b: View, band_px: float = EPIPOLAR_BAND_PX
) -> tuple[Tensor, Tensor]:
    """All pairs of keypoints that `in_band` allows: numbers (k,) in a and in b; none for cameras at
    one place.

    A point lies in a half-plane bounded by the line through the two cameras. Keypoints of a sorted
    by the angle of their half-plane, those that can meet a keypoint of b are a run of them.
    """
    baseline = b.c_world - a.c_world
    none = torch.zeros(0, dtype=torch.long)
    if min(len(a.features), len(b.features)) == 0 or float(baseline.norm()) == 0:
        return none, none
    axis = baseline / baseline.norm()
    across = torch.linalg.cross(axis, torch.eye(3, dtype=axis.dtype)[axis.abs().argmin()])
    frame = torch.stack([across / across.norm(), torch.linalg.cross(axis, across / across.norm())])
    (xa, ya), (xb, yb) = (
        (world_rays(v, v.features.xy_px) @ frame.T).unbind(1) for v in (a, b)
    )
    angle_a, by_angle = torch.atan2(ya, xa).sort()
    # Pixels apart are at least the focal length times the sine of the angle from the half-plane.
    focal_px = min(b.camera.fx, b.camera.fy)
    reach = torch.asin((band_px / (focal_px * torch.hypot(xb, yb))).clamp(max=1.0))
    angle_b = torch.atan2(yb, xb)
    around = torch.cat([angle_a - 2 * math.pi, angle_a, angle_a + 2 * math.pi])
    first = torch.searchsorted(around, angle_b - reach)
    count = torch.searchsorted(around, angle_b + reach, right=True) - first
    j = torch.arange(len(count)).repeat_interleave(count)
    within = torch.arange(len(j)) - (count.cumsum(0) - count)[j]
    i = by_angle[(first[j] + within) % len(angle_a)]
    allowed = in_band(a, b, i, j, band_px)
    return i[allowed], j[allowed]


def guided_matches(a: View, b: View, band_px: float = EPIPOLAR_BAND_PX) -> Matches:
    """Mutual matches of two posed views inside the known epipolar band, with the ratio test inside
    the band.
    """
    i, j = epipolar_pairs(a, b, band_px)
    similarity = pair_similarity(a.features.descriptors, b.features.descriptors, i, j)
    alike = similarity >= GUIDED_SIMILARITY
    row, column, value = i[alike], j[alike], similarity[alike]
    top_a = best_of(value, row, len(a.features))
    best = (value == top_a[row]) & (value == best_of(value, column, len(b.features))[column])
    matched = torch.full((len(a.features),), -1)
    matched[row[best]] = column[best]
    xy_px = b.features.xy_px
    apart = (xy_px[j] - xy_px[matched[i]]).norm(dim=1) > SECOND_NEIGHBOR_PX
    second = best_of(similarity[apart], i[apart], len(a.features))
    a_rows = torch.nonzero(matched >= 0)[:, 0]
    ratio = _distance(top_a[a_rows]) / _distance(second[a_rows].clamp_min(-1)).clamp_min(1e-9)
    matches = Matches(a_rows, matched[a_rows], top_a[a_rows], ratio)
    return matches.select(ratio <= GUIDED_RATIO)


def pair_similarity(first: Tensor, second: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Products (k,) of the rows i (k,) and j (k,) of two sets of descriptors."""
    pairs = zip(i.split(_PAIRS), j.split(_PAIRS))
    parts = [(first[rows] * second[columns]).sum(1) for rows, columns in pairs]
    return torch.cat(parts) if parts else first.new_zeros(0)


def best_of(value: Tensor, key: Tensor, count: int) -> Tensor:
    """The largest value (k,) of each key 0..count-1, (count,); -2 where there is none."""
    return value.new_full((count,), -2.0).scatter_reduce_(0, key, value, "amax")


def near_pairs(R_world_from_cam: Tensor, c_world: Tensor, limit: int) -> list[tuple[int, int]]:
    """Pairs (i < j) of posed images worth matching, at most about `limit` a image, from their poses
    alone.

    Images that look more than 90 degrees apart, or from one place, are left out. Of an image's
    others, sorted by distance, the nearer half of `limit` is taken whole and the rest spread evenly
    over the next 3 x limit, so that a slow video still gives baselines.
    """
    pairs = set()
    near, spread = limit // 2, limit - limit // 2
    for i in range(len(c_world)):
        away = (c_world - c_world[i]).norm(dim=1)
        usable = (away > 0) & (R_world_from_cam[:, :, 2] @ R_world_from_cam[i, :, 2] > 0)
        away, order = away.masked_fill(~usable, torch.inf).topk(
            min(len(away), near + 3 * limit), largest=False
        )
        order = order[away < torch.inf].tolist()
        if len(order) > limit:
            far = torch.linspace(near, len(order) - 1, spread).round().long().tolist()
            order = order[:near] + [order[k] for k in far]
        pairs.update((min(i, j), max(i, j)) for j in order)
    return sorted(pairs)
