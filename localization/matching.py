"""Matches between the keypoints of two images: by descriptor alone, or guided by the known relative
pose.

A match is kept when each keypoint is the other's best (mutual). Its ratio is the descriptor
distance to the best over that to the second best, where a second neighbor counts only if it lies
elsewhere in the image: one corner often gives several keypoints (two orientations, two scales).
"""

from collections.abc import Iterable, Iterator
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


def _best_and_second(similarity: Tensor, xy_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of similarity (n, m): best column, its similarity, that of the best column that
    lies elsewhere.

    xy_px (m, 2) are the positions of the columns' keypoints. Where nothing lies elsewhere the last
    value is -1.
    """
    top, column = similarity.topk(min(_NEIGHBORS, similarity.shape[1]), dim=1)
    offset = xy_px[column] - xy_px[column[:, :1]]
    elsewhere = offset.norm(dim=-1) > SECOND_NEIGHBOR_PX
    second = torch.where(elsewhere, top, torch.full_like(top, -1.0)).amax(dim=1)
    return column[:, 0], top[:, 0], second


def _mutual(similarity: Iterable[Tensor], xy_b_px: Tensor) -> Matches:
    """Mutual best matches from the successive rows of a similarity matrix (n_a, n_b); the ratio is
    taken along b.
    """
    parts, done = [], 0
    top_a = torch.full((len(xy_b_px),), -2.0)
    best_a = torch.full((len(xy_b_px),), -1, dtype=torch.long)
    for rows in similarity:
        parts.append(_best_and_second(rows, xy_b_px))
        top, row = rows.max(dim=0)
        best_a = torch.where(top > top_a, row + done, best_a)
        top_a = torch.maximum(top_a, top)
        done += len(rows)
    best_b, value, second = (torch.cat(part) for part in zip(*parts))
    a = torch.arange(len(best_b))
    ratio = _distance(value) / _distance(second).clamp_min(1e-9)
    mutual = best_a[best_b] == a
    return Matches(a[mutual], best_b[mutual], value[mutual], ratio[mutual])


def mutual_matches(a: Features, b: Features) -> Matches:
    """Mutual matches by descriptor alone, without a ratio test (the ratio comes along)."""
    if min(len(a.xy_px), len(b.xy_px)) == 0:
        return _no_matches()
    return _mutual((rows @ b.descriptors.T for rows in a.descriptors.split(_ROWS)), b.xy_px)


def essential_matrix(a: View, b: View) -> Tensor:
    """E (3, 3) with x_b . E x_a = 0 for rays x_a, x_b of one point, in camera axes, of two posed
    views.
    """
    R_b_from_a = b.R_world_from_cam.T @ a.R_world_from_cam
    t = b.R_world_from_cam.T @ (a.c_world - b.c_world)
    x, y, z = t.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=t.dtype)
    return cross @ R_b_from_a


def epipolar_mask(a: View, b: View, band_px: float = EPIPOLAR_BAND_PX) -> Tensor:
    """Which keypoint pairs (n_a, n_b) the known poses allow.

    Allowed is a pair within band_px of each other's epipolar line, in both images, that meets in
    front of both cameras. Depths come from the point where the two rays are nearest; rays parallel
    to within the band (a far point) pass.
    """
    return torch.cat(list(_mask_rows(a, b, band_px)))


def _mask_rows(a: View, b: View, band_px: float) -> Iterator[Tensor]:
    """`epipolar_mask`, _ROWS keypoints of a at a time."""
    E = essential_matrix(a, b)
    xa, xb = rays(a.camera, a.features.xy_px), rays(b.camera, b.features.xy_px)
    line_b, line_a = xa @ E.T, xb @ E
    scale_b = torch.tensor([b.camera.fx, b.camera.fy], dtype=E.dtype)
    scale_a = torch.tensor([a.camera.fx, a.camera.fy], dtype=E.dtype)
    norm_b, norm_a = (line_b[:, :2] / scale_b).norm(dim=1), (line_a[:, :2] / scale_a).norm(dim=1)
    unit_line_b, point_b = (line_b / norm_b[:, None].clamp_min(1e-12)).float(), xb.T.float()
    baseline = b.c_world - a.c_world
    da, db = world_rays(a, a.features.xy_px), world_rays(b, b.features.xy_px)
    along_a, along_b = da @ baseline, db @ baseline
    slack = -float(baseline.norm()) * band_px / min(a.camera.fx, b.camera.fx)
    for start in range(0, max(1, len(xa)), _ROWS):
        # Few pairs are near the line in image b: only those are looked at closer.
        distance_b = unit_line_b[start : start + _ROWS] @ point_b
        mask = distance_b.abs_() <= band_px
        row, j = mask.nonzero(as_tuple=True)
        i = row + start
        near = distance_b[row, j] * norm_b[i] <= band_px * norm_a[j]
        cosine = (da[i] * db[j]).sum(dim=1)
        depth_a, depth_b = along_a[i] - cosine * along_b[j], cosine * along_a[i] - along_b[j]
        mask[row, j] = near & (depth_a >= slack) & (depth_b >= slack)
        yield mask


def guided_matches(a: View, b: View, band_px: float = EPIPOLAR_BAND_PX) -> Matches:
    """Mutual matches of two posed views inside the known epipolar band, with the ratio test inside
    the band.
    """
    if min(len(a.features.xy_px), len(b.features.xy_px)) == 0:
        return _no_matches()
    rows = a.features.descriptors.split(_ROWS)
    similarity = (
        (part @ b.features.descriptors.T).masked_fill_(~allowed, -1.0)
        for part, allowed in zip(rows, _mask_rows(a, b, band_px))
    )
    matches = _mutual(similarity, b.features.xy_px)
    return matches.select(
        (matches.similarity >= GUIDED_SIMILARITY) & (matches.ratio <= GUIDED_RATIO)
    )


def near_pairs(R_world_from_cam: Tensor, c_world: Tensor, limit: int) -> list[tuple[int, int]]:
    """Pairs (i < j) of posed images worth matching, at most about `limit` a image, from their poses
    alone.

    Images that look more than 90 degrees apart are left out. Of an image's others, sorted by
    distance, the nearer half of `limit` is taken whole and the rest spread evenly over the next 3 x
    limit, so that a slow video still gives baselines.
    """
    n = len(c_world)
    distance = torch.cdist(c_world, c_world)
    forward = R_world_from_cam[:, :, 2]
    distance = distance.masked_fill(forward @ forward.T <= 0, torch.inf)
    distance.fill_diagonal_(torch.inf)
    pairs = set()
    for i in range(n):
        order = [j for j in distance[i].argsort(stable=True).tolist() if distance[i, j] < torch.inf]
        if len(order) > limit:
            far = order[limit // 2 : limit // 2 + 3 * limit]
            spread = torch.linspace(0, len(far) - 1, limit - limit // 2).round().long().tolist()
            order = order[: limit // 2] + [far[k] for k in spread]
        pairs.update((min(i, j), max(i, j)) for j in order)
    return sorted(pairs)
