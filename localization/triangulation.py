"""3D points from posed images: one point per keypoint by depth consensus, refined on all views that
agree.

Every index keypoint that has matches becomes the anchor of its own point: each match proposes a
depth along the anchor's ray, the depth that most other matches bear out wins, and Gauss-Newton on
the reprojection errors finishes it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.cameras import homogeneous
from localization.matching import View, guided_matches, near_pairs
from localization.threads import in_threads

# How many other index images an index image is matched with, at most.
PARTNERS = 12
CONSENSUS_PX = 3.0
REPROJECTION_PX = 4.0
MIN_ANGLE_DEG = 1.0
GAUSS_NEWTON_STEPS = 5


@dataclass(frozen=True)
class Cameras:
    """V posed cameras in arrays: R_cam_from_world (V, 3, 3), c_world (V, 3), focal and center (V,
    2) in pixels.
    """

    R_cam_from_world: Tensor
    c_world: Tensor
    focal: Tensor
    center: Tensor

    def select(self, index: Tensor | tuple) -> "Cameras":
        """The cameras that an index picks."""
        return Cameras(
            *(v[index] for v in (self.R_cam_from_world, self.c_world, self.focal, self.center))
        )


def rotate(R: Tensor, v: Tensor) -> Tensor:
    """R v of many small matrices (..., 3, 3) and vectors (..., 3): faster than as products."""
    return R[..., 0] * v[..., :1] + R[..., 1] * v[..., 1:2] + R[..., 2] * v[..., 2:]


def project_points(cameras: Cameras, points: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (..., 2) and depths (...) of points (..., 3) in cameras of broadcastable leading
    shape.
    """
    local = rotate(cameras.R_cam_from_world, points - cameras.c_world)
    depth = local[..., 2]
    safe = torch.where(depth.abs() < 1e-9, torch.full_like(depth, 1e-9), depth)
    return local[..., :2] / safe[..., None] * cameras.focal + cameras.center, depth


def anchor_depths(
    ray: Tensor, center: Tensor, other_ray: Tensor, other_center: Tensor
) -> tuple[Tensor, Tensor]:
    """Depth along `ray` (..., 3) of the point nearest to another ray, and the angle of the two
    (degrees, 0..90).

    Rays are of unit length, centers (..., 3), all in world axes. The depth is NaN-free but
    meaningless for parallel rays; closed form of the shortest segment between two lines.
    """
    baseline = other_center - center
    cosine = (ray * other_ray).sum(-1)
    sine2 = (1 - cosine * cosine).clamp_min(1e-12)
    along, along_other = (ray * baseline).sum(-1), (other_ray * baseline).sum(-1)
    depth = (along - cosine * along_other) / sine2
    return depth, torch.rad2deg(torch.asin(sine2.clamp_max(1).sqrt()))


def refine_points(
    cameras: Cameras, xy_px: Tensor, seen: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Least-squares points (n, 3) from their observations, with covariances (n, 3, 3) for 1 px of
    noise.

    cameras: leading shape (n, V) or (V,); xy_px (n, V, 2); seen (n, V) bool; points (n, 3) the
    start. A few Gauss-Newton steps on the reprojection error; a point whose step is not finite
    stays where it is.
    """
    weight = seen.to(points.dtype)
    for _ in range(GAUSS_NEWTON_STEPS):
        normal, gradient = _normal_equations(cameras, xy_px, weight, points)
        step = torch.linalg.solve_ex(normal, gradient[..., None])[0].squeeze(-1)
        points = torch.where(torch.isfinite(step).all(-1, keepdim=True), points - step, points)
    normal, _ = _normal_equations(cameras, xy_px, weight, points)
    return points, torch.linalg.inv_ex(normal)[0]


def _normal_equations(
    cameras: Cameras, xy_px: Tensor, weight: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """J^T W J (n, 3, 3), barely damped, and J^T W r (n, 3) of the reprojection residuals of points
    (n, 3).
    """
    local = rotate(cameras.R_cam_from_world, points[:, None] - cameras.c_world)
    depth = local[..., 2:].clamp_min(1e-6)
    residual = local[..., :2] / depth * cameras.focal + cameras.center - xy_px
    slope = cameras.focal / depth
    # d(pixel)/d(point) = focal / z (R_xy - (local_xy / z) R_z)
    J = slope[..., None] * (
        cameras.R_cam_from_world[..., :2, :]
        - (local[..., :2] / depth)[..., None] * cameras.R_cam_from_world[..., 2:, :]
    )
    JW = J * weight[..., None, None]
    normal = torch.einsum("nvki,nvkj->nij", JW, J)
    damping = 1e-9 * normal.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-12)
    normal = normal + damping[:, None, None] * torch.eye(3, dtype=normal.dtype)
    return normal, torch.einsum("nvki,nvk->ni", JW, residual)


@dataclass(frozen=True)
class Points:
    """n points: position (n, 3) in world axes, valid (n,), seen_in (n, k): numbers of the other
    views that agree, -1 for none.

    Where valid is False the other values mean nothing (but are finite).
    """

    position: Tensor
    valid: Tensor
    seen_in: Tensor

    def without(self, views: Collection[int]) -> "Points":
        """The points that stand without some views: two others must show them."""
        gone = torch.tensor([-1, *views])
        left = (~torch.isin(self.seen_in, gone)).any(dim=1)
        return replace(self, valid=self.valid & left)


def consensus_points(
    anchor: Cameras,
    anchor_xy_px: Tensor,
    others: Cameras,
    xy_px: Tensor,
    seen: Tensor,
    numbers: Tensor,
) -> Points:
    """One point for each of n keypoints of the anchor image from their matches in V other images.

    anchor: one camera (leading shape (1,)); anchor_xy_px (n, 2); others (n, V); xy_px (n, V, 2) the
    matched positions where seen (n, V); numbers (n, V) of these images. A depth proposed by one match
    (angle >= 1 degree, in front) is borne out by every match it reprojects onto within 3 px; the
    depth with most support, then with the widest angle, wins. Kept are points in front of every
    agreeing camera, within 4 px in each and in the anchor, seen under at least 1 degree.
    """
    ray = unit_rays(anchor, anchor_xy_px)
    other_ray = unit_rays(others, xy_px)
    depth, angle = anchor_depths(ray[:, None], anchor.c_world, other_ray, others.c_world)
    proposed = seen & (angle >= MIN_ANGLE_DEG) & (depth > 0)
    candidate = anchor.c_world + depth.clamp_min(0)[..., None] * ray[:, None]

    supports = (
        agreeing(
            others.select((slice(None), None)), candidate[:, :, None], xy_px[:, None], CONSENSUS_PX
        )
        & seen[:, None]
    )
    support = supports.sum(-1) + angle / 1000
    best = torch.where(proposed, support, torch.full_like(support, -1.0)).argmax(dim=1)
    rows = torch.arange(len(ray))
    borne_out = supports[rows, best]

    first = anchor.select(torch.zeros(len(ray), 1, dtype=torch.long))
    cameras = Cameras(*(torch.cat(v, 1) for v in zip(vars(first).values(), vars(others).values())))
    all_xy = torch.cat([anchor_xy_px[:, None].to(xy_px.dtype), xy_px], dim=1)
    used = torch.cat([torch.ones_like(borne_out[:, :1]), borne_out], dim=1)
    position, covariance = refine_points(cameras, all_xy, used, candidate[rows, best])
    fits = (agreeing(cameras, position[:, None], all_xy, REPROJECTION_PX) | ~used).all(dim=1)
    wide = torch.where(borne_out, angle, torch.zeros_like(angle)).amax(dim=1) >= MIN_ANGLE_DEG
    finite = torch.isfinite(position).all(-1) & torch.isfinite(covariance).flatten(1).all(-1)
    valid = proposed.any(dim=1) & fits & wide & finite
    position = torch.where(valid[:, None], position, torch.zeros_like(position))
    return Points(position, valid, torch.where(borne_out, numbers, -1))


def unit_rays(cameras: Cameras, xy_px: Tensor) -> Tensor:
    """Unit rays (..., 3) in world axes of pixels (..., 2), float64, in cameras of broadcastable
    leading shape.
    """
    xy = (xy_px.to(torch.float64) - cameras.center) / cameras.focal
    ray = homogeneous(xy)
    ray = rotate(cameras.R_cam_from_world.transpose(-1, -2), ray)
    return ray / ray.norm(dim=-1, keepdim=True)


def agreeing(cameras: Cameras, points: Tensor, xy_px: Tensor, limit_px: float) -> Tensor:
    """Whether points (..., 3) lie in front of cameras (...) and reproject within limit_px of xy_px
    (..., 2).
    """
    xy, depth = project_points(cameras, points)
    return ((xy - xy_px).norm(dim=-1) <= limit_px) & (depth > 0)


def cameras_of(views: list[View]) -> Cameras:
    """The posed views' cameras as arrays."""
    intrinsics = torch.tensor(
        [[v.camera.fx, v.camera.fy, v.camera.cx, v.camera.cy] for v in views], dtype=torch.float64
    )
    return Cameras(
        torch.stack([v.R_world_from_cam.T for v in views]),
        torch.stack([v.c_world for v in views]),
        intrinsics[:, :2],
        intrinsics[:, 2:],
    )


def triangulate_views(
    views: list[View], wanted: Collection[int] | None = None, progress: Callable | None = None
) -> list[Points]:
    """The points of each posed view's keypoints (one each, where valid), from guided matches among
    the views.

    wanted: the views whose points are asked for, None for all; returned in rising order. progress:
    called with (done, of) as the matching advances.
    """
    cameras = cameras_of(views)
    wanted = sorted(range(len(views)) if wanted is None else wanted)
    R = torch.stack([v.R_world_from_cam for v in views])
    pairs = near_pairs(R, cameras.c_world, PARTNERS, wanted)
    found = {i: {} for i in range(len(views))}
    all_matches = in_threads(
        lambda pair: guided_matches(views[pair[0]], views[pair[1]]), pairs, progress
    )
    for (i, j), matches in zip(pairs, all_matches):
        found[i][j] = (matches.a, matches.b)
        found[j][i] = (matches.b, matches.a)
    return in_threads(lambda i: _points_of_view(views, cameras, i, found[i]), wanted)


def _points_of_view(views: list[View], cameras: Cameras, i: int, matched: dict) -> Points:
    """The points of view i; matched: other view's number -> (keypoints of i, keypoints of the
    other).

    Keypoints with equally many matches, roughly, are worked on together: the work grows with the
    square, and most have few.
    """
    count = len(views[i].features)
    points = Points(
        torch.zeros(count, 3, dtype=torch.float64),
        torch.zeros(count, dtype=torch.bool),
        torch.full((count, max(1, len(matched))), -1),
    )
    if not matched or not count:
        return points
    keypoint = torch.cat([own for own, _ in matched.values()])
    number = torch.cat([torch.full_like(own, j) for j, (own, _) in matched.items()])
    xy_px = torch.cat(
        [views[j].features.xy_px[other] for j, (_, other) in matched.items()]
    ).double()
    order = keypoint.argsort(stable=True)
    keypoint, number, xy_px = keypoint[order], number[order], xy_px[order]
    matches = torch.bincount(keypoint, minlength=count)
    slot = torch.arange(len(keypoint)) - (matches.cumsum(0) - matches)[keypoint]
    least, most = 0, 2
    while least < int(matches.max()):
        rows = torch.nonzero((matches > least) & (matches <= most))[:, 0]
        place = torch.full((count,), -1)
        place[rows] = torch.arange(len(rows))
        here = place[keypoint] >= 0
        at = place[keypoint[here]], slot[here]
        seen = torch.zeros(len(rows), most, dtype=torch.bool)
        xy, numbers = (
            torch.zeros(len(rows), most, 2, dtype=torch.float64),
            torch.full(seen.shape, i),
        )
        seen[at], xy[at], numbers[at] = True, xy_px[here], number[here]
        own = views[i].features.xy_px[rows].double()
        found = consensus_points(
            cameras.select(torch.tensor([i])), own, cameras.select(numbers), xy, seen, numbers
        )
        points.position[rows], points.valid[rows] = found.position, found.valid
        width = min(most, points.seen_in.shape[1])
        points.seen_in[rows, :width] = found.seen_in[:, :width]
        least, most = most, 2 * most
    return points
