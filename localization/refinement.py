"""From a rough pose to a precise one: look for the points where they should be, then solve.

Given a hypothesis, the points that index images say should be visible are projected into the query
and looked for near there. This is a much easier search than the first: a window of some pixels
holds few keypoints to confuse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.absolute_pose import refine_pose, rotation_from_vector
from localization.cameras import project, rays
from localization.matching import View, best_of
from localization.scoring import NOISE_PX, Evidence, match_slopes
from localization.triangulation import Points

MAX_POINTS = 6000
MAX_VIEW_ANGLE_DEG = 60.0
MAX_DEPTH_RATIO = 2.5
GUIDED_RADII_PX = (12.0, 6.0, 4.0)
GUIDED_STEPS = 6
GUIDED_SIMILARITY = 0.75
FOUND_PX = 2.0
# Limits of the errors of matches, steps in each, and the longest in radians and shares of the
# distance.
LIMITS_PX, STEPS, LONGEST_STEP = (12.0, 6.0, 3.0), 4, 0.1
_DRIFT_PX = 8.0
# Pairs of descriptors compared at once: what stays in the processor's cache is five times as fast.
_PAIRS = 4096


@dataclass(frozen=True)
class PointMap:
    """All P points of an index: position (P, 3), descriptor (P, 128), index view (P,)
    and its keypoint there xy_px (P, 2), unit direction (P, 3) from the point to that view's camera,
    distance_m (P,) to it."""

    position: Tensor
    descriptor: Tensor
    view: Tensor
    xy_px: Tensor
    direction: Tensor
    distance_m: Tensor

    def select(self, keep: Tensor) -> "PointMap":
        """The points that a mask or an index tensor picks."""
        return PointMap(*(v[keep] for v in vars(self).values()))


def point_map(views: list[View], points: list[Points], numbers: Sequence[int]) -> PointMap:
    """The valid points of some views in one map; `view` counts in all of them."""
    keep = [points[i].valid for i in numbers]
    position = torch.cat([points[i].position[k] for i, k in zip(numbers, keep)])
    count = torch.tensor([int(k.sum()) for k in keep])
    offset = torch.stack([views[i].c_world for i in numbers]).repeat_interleave(count, 0) - position
    distance = offset.norm(dim=1)
    features = [views[i].features for i in numbers]
    return PointMap(
        position,
        torch.cat([f.descriptors[k] for f, k in zip(features, keep)]),
        torch.tensor(numbers).repeat_interleave(count),
        torch.cat([f.xy_px[k] for f, k in zip(features, keep)]).double(),
        offset / distance[:, None].clamp_min(1e-12),
        distance,
    )


def visible_points(
    points: PointMap, query: View, R_cam_from_world: Tensor, c_world: Tensor
) -> PointMap:
    """The points a camera at this pose should see, from a side its index image shows; at most
    MAX_POINTS.

    In the image, seen from within MAX_VIEW_ANGLE_DEG of the index view and MAX_DEPTH_RATIO of its
    distance. Where there are too many, those stay whose index view is most alike.
    """
    offset = c_world - points.position
    distance = offset.norm(dim=1).clamp_min(1e-12)
    cosine = (offset / distance[:, None] * points.direction).sum(1)
    stretch = (distance / points.distance_m.clamp_min(1e-12)).log().abs()
    xy, depth = project_query(query, R_cam_from_world, c_world, points.position)
    size = xy.new_tensor([query.camera.width, query.camera.height])
    inside = (depth > 0) & ((xy >= 0) & (xy < size)).all(1)
    seen = (
        inside
        & (cosine > math.cos(math.radians(MAX_VIEW_ANGLE_DEG)))
        & (stretch < math.log(MAX_DEPTH_RATIO))
    )
    rows = torch.nonzero(seen)[:, 0]
    if len(rows) > MAX_POINTS:
        likeness = cosine[rows] - stretch[rows]
        rows = rows[likeness.topk(MAX_POINTS).indices]
    return points.select(rows)


def project_query(
    query: View, R_cam_from_world: Tensor, c_world: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Pixels (n, 2) and depths (n,) of points (n, 3) in a query at a pose."""
    local = (points - c_world) @ R_cam_from_world.T
    return project(query.camera, local), local[:, 2]


@dataclass(frozen=True)
class Candidates:
    """Pairs of a visible point and a query keypoint near its projection: point, keypoint,
    similarity (n,).
    """

    point: Tensor
    keypoint: Tensor
    similarity: Tensor

    def select(self, keep: Tensor) -> "Candidates":
        """The pairs that a mask or an index tensor picks."""
        return Candidates(self.point[keep], self.keypoint[keep], self.similarity[keep])

    def best_of(self, key: Tensor, count: int) -> Tensor:
        """For each pair the highest similarity among the pairs of the same key (n,) in 0..count-1,
        (n,).
        """
        return best_of(self.similarity, key, count)[key]


def near_candidates(points: PointMap, query: View, xy_px: Tensor, radius_px: float) -> Candidates:
    """All pairs within radius_px of the projections xy_px (P, 2), not too unlike."""
    # Keypoints sorted by rows of the radius' height, then by x: those near a projection lie in
    # three short runs.
    xy, keypoints = xy_px.float(), query.features.xy_px
    row_length = (
        query.camera.width + 4 * radius_px
    )  # more than any x, so that rows do not run into each other
    place_of, by_place = (
        torch.floor(keypoints[:, 1] / radius_px).double() * row_length + keypoints[:, 0]
    ).sort()
    rows = torch.floor(xy[:, 1:] / radius_px) + torch.arange(-1, 2)
    middle = rows.double() * row_length + xy[:, :1]
    first = torch.searchsorted(place_of, middle - radius_px).flatten()
    count = torch.searchsorted(place_of, middle + radius_px, right=True).flatten() - first
    run = torch.arange(len(first)).repeat_interleave(count)
    within = torch.arange(len(run)) - (count.cumsum(0) - count)[run]
    point, keypoint = run // 3, by_place[first[run] + within]
    near = (xy[point] - keypoints[keypoint]).norm(dim=1) <= radius_px
    point, keypoint = point[near], keypoint[near]
    pairs = zip(point.split(_PAIRS), keypoint.split(_PAIRS))
    similarity = torch.cat(
        [(points.descriptor[p] * query.features.descriptors[k]).sum(1) for p, k in pairs]
    )
    alike = similarity >= GUIDED_SIMILARITY
    return Candidates(point[alike], keypoint[alike], similarity[alike])


def _mutual_best(candidates: Candidates, points: int, keypoints: int) -> Candidates:
    """The candidates that are the best of both their point and their keypoint."""
    of_point = candidates.best_of(candidates.point, points)
    of_keypoint = candidates.best_of(candidates.keypoint, keypoints)
    best = (candidates.similarity == of_point) & (candidates.similarity == of_keypoint)
    return candidates.select(best)


@dataclass(frozen=True)
class Refined:
    """A hypothesis after the guided search; found: query keypoints that agree with a point within
    FOUND_PX.
    """

    R_cam_from_world: Tensor
    c_world: Tensor
    found: int


def guided_refinement(points: PointMap, query: View, R: Tensor, c: Tensor) -> list[Refined]:
    """Match points to keypoints near their projections and solve, in ever smaller windows, for h
    poses R (h, 3, 3), c (h, 3) at once; those to which nothing is left are left out.
    """
    xy_norm = rays(query.camera, query.features.xy_px)[:, :2]
    focal = (query.camera.fx + query.camera.fy) / 2
    nearby = [_nearby(points, query, *pose) for pose in zip(R, c)]
    counts = [(len(visible.position), len(xy_norm)) for visible, _ in nearby]
    for radius in GUIDED_RADII_PX:
        inside = [
            _mutual_best(near.select(_errors(query, *pose, visible, near) <= radius), *count)
            for pose, (visible, near), count in zip(zip(R, c), nearby, counts)
        ]
        kept = [k for k, found in enumerate(inside) if len(found.point) >= 4]
        if not kept:
            return []
        nearby, counts, inside = ([part[k] for k in kept] for part in (nearby, counts, inside))
        x, X, used = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            for part in zip(
                *(
                    (xy_norm[found.keypoint], visible.position[found.point], found.point >= 0)
                    for found, (visible, _) in zip(inside, nearby)
                )
            )
        )
        R, c, _ = refine_pose(R[kept], c[kept], x, X, radius / focal, used, GUIDED_STEPS)
    found = []
    for *pose, (visible, near), count in zip(R, c, nearby, counts):
        close = near.select(_errors(query, *pose, visible, near) <= FOUND_PX)
        found.append(Refined(*pose, len(_mutual_best(close, *count).point)))
    return found


def _nearby(points: PointMap, query: View, R: Tensor, c: Tensor) -> tuple[PointMap, Candidates]:
    """The points visible from a pose, and all pairs that its refinement may come to need."""
    visible = visible_points(points, query, R, c)
    xy, _ = project_query(query, R, c, visible.position)
    return visible, near_candidates(visible, query, xy, GUIDED_RADII_PX[0] + _DRIFT_PX)


def _errors(query: View, R: Tensor, c: Tensor, visible: PointMap, near: Candidates) -> Tensor:
    """Reprojection error (n,) in pixels of every candidate pair, infinite behind the camera."""
    xy, depth = project_query(query, R, c, visible.position)
    error = (xy[near.point] - query.features.xy_px[near.keypoint]).norm(dim=1)
    return torch.where(depth[near.point] > 0, error, torch.full_like(error, torch.inf))


def refine_on_matches(
    evidence: Evidence, R: Tensor, c: Tensor, distance_m: float
) -> tuple[Tensor, Tensor]:
    """h poses R (h, 3, 3), c (h, 3) refined on the distinct matches of the query, within ever narrower
    limits; distance_m: about how far away things are.

    Robust steps (biweight) on `match_errors`. What has no point, because few index images show it,
    tells much of the rotation, and of the position all but its distance along a baseline.
    """
    evidence = evidence.select(evidence.distinct())
    for limit in (*LIMITS_PX, evidence.noise_px.clamp(*NOISE_PX)):
        for _ in range(STEPS):
            error, weight, slope = match_slopes(evidence, R, c, distance_m)
            near = (1 - error.square().sum(1) / torch.as_tensor(limit).square()).clamp_min(0)
            weighted = slope * (weight * near)[:, None, None]
            normal = weighted.flatten(2) @ slope.flatten(2).transpose(1, 2)
            gradient = (weighted * error[:, None]).sum((2, 3))
            damping = torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-12)
            delta = -torch.linalg.solve_ex(normal + damping, gradient[..., None])[0][..., 0]
            delta[:, 3:] /= distance_m
            delta *= (LONGEST_STEP / delta.abs().amax(1, keepdim=True)).clamp_max(1)
            delta = torch.where(delta.isfinite().all(1, keepdim=True), delta, 0.0)
            R = rotation_from_vector(delta[:, :3]) @ R
            c = c + distance_m * delta[:, 3:]
    return R, c
