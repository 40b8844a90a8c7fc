"""The last refinement of a query's pose: on tracks, jointly with their points.

A track is a query keypoint with all index keypoints that show the same point: its matches by
descriptor that fit the pose, and what the guided search adds. Its point is triangulated anew from
all of them, so that the same observation is not counted once for every image, and its uncertainty
is known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from localization.cameras import project
from localization.joint import Polished, Tracks, refine_with_points
from localization.matching import View
from localization.refinement import PointMap, near_candidates, project_query, visible_points
from localization.scoring import POINT_RATIO, Evidence, epipolar_gains
from localization.triangulation import CONSENSUS_PX, Cameras, agreeing, cameras_of, refine_points

GUIDED_PX, GUIDED_SIMILARITY, GUIDED_DROP = 4.0, 0.85, 0.05
# Keypoints are located to about half their scale; those that only the guided search matched count
# for less.
NOISE_OF_SCALE, GUIDED_NOISE = 0.5, 4.0
MIN_TRACKS = 6
ROUNDS = 2


@dataclass(frozen=True)
class _Observations:
    """What K query keypoints may have to do with V index views: matched position xy_px (K, V, 2)
    where seen (K, V); candidate point (K, V, 3) where has_point (K, V); by_descriptor (K,): matched
    without guidance, by the rows (m,) of the evidence, of these keypoints (m,)."""

    xy_px: Tensor
    seen: Tensor
    point: Tensor
    has_point: Tensor
    by_descriptor: Tensor
    rows: Tensor
    keypoint: Tensor


def polish(
    query: View,
    views: list[View],
    order: list[int],
    points: PointMap,
    evidence: Evidence,
    R: Tensor,
    c: Tensor,
    *,
    with_single: bool = False,
    guided_noise: float = GUIDED_NOISE,
) -> Polished | None:
    """The pose refined on its tracks; None if there are too few. Where that moves their points out of
    the reach of the guided search, they are built anew and it is refined once more.

    order: the index views that count; with_single: distinct matches without points count too;
    guided_noise: of keypoints that only the guided search matched, times that of others.
    """
    cameras = cameras_of([views[i] for i in order])
    column = torch.full((len(views),), -1)
    column[torch.tensor(order)] = torch.arange(len(order))
    result = None
    for _ in range(ROUNDS):
        seen = _observe(query, column, points, evidence, R, c)
        keypoint, position, covariance = _triangulate(cameras, seen)
        if len(keypoint) < MIN_TRACKS:
            return result
        noise = query.features.scale_px[keypoint].double() * NOISE_OF_SCALE
        noise = torch.where(seen.by_descriptor[keypoint], noise, guided_noise * noise)
        xy = query.features.xy_px[keypoint].double()
        single = evidence.select(_single(seen, keypoint, evidence)) if with_single else None
        tracks = Tracks(xy, position, covariance, noise, single)
        result = refine_with_points(query.camera, R, c, tracks)
        before = project(query.camera, (position - c) @ R.T)
        R, c = result.R_cam_from_world, result.c_world
        moved = project(query.camera, (position - c) @ R.T) - before
        if float(moved.norm(dim=1).median()) < GUIDED_PX:
            break
    return result


def _observe(
    query: View, column: Tensor, points: PointMap, evidence: Evidence, R: Tensor, c: Tensor
) -> _Observations:
    """Observations at a pose: first the guided ones, then, replacing them, the matches by
    descriptor that fit.
    """
    keypoints, columns = len(query.features.xy_px), int(column.max()) + 1
    xy = torch.zeros(keypoints, columns, 2, dtype=torch.float64)
    seen, point = torch.zeros(xy.shape[:2], dtype=torch.bool), xy.new_zeros(keypoints, columns, 3)
    has_point = seen.clone()

    visible, near = _guided(query, column, points, R, c)
    k, v = near.keypoint, column[visible.view[near.point]]
    xy[k, v], point[k, v] = visible.xy_px[near.point], visible.position[near.point]
    seen[k, v] = has_point[k, v] = True

    fits = epipolar_gains(evidence, R[None], c[None])[0] > 0
    rows = torch.nonzero(fits & (evidence.ratio <= POINT_RATIO))[:, 0]
    k, v = evidence.keypoint[rows], column[evidence.view[rows]]
    xy[k, v], point[k, v] = evidence.index_px[rows], evidence.point[rows]
    seen[k, v], has_point[k, v] = True, evidence.has_point[rows]
    by_descriptor = torch.zeros(keypoints, dtype=torch.bool)
    by_descriptor[k] = True
    return _Observations(xy, seen, point, has_point, by_descriptor, rows, k)


def _single(seen: _Observations, tracked: Tensor, evidence: Evidence) -> Tensor:
    """The rows of the evidence that fit, distinct matches without points of keypoints without tracks."""
    rows = seen.rows[~torch.isin(seen.keypoint, tracked)]
    return rows[~evidence.has_point[rows] & evidence.distinct()[rows]]


def _guided(query: View, column: Tensor, points: PointMap, R: Tensor, c: Tensor) -> tuple:
    """Visible points and their candidates among the query's keypoints: at most one a keypoint and
    view.

    A candidate must be its point's best and not much less alike than the keypoint's best.
    """
    visible = visible_points(points, query, R, c)
    near = near_candidates(
        visible, query, project_query(query, R, c, visible.position)[0], GUIDED_PX
    )
    near = near.select(near.similarity >= GUIDED_SIMILARITY)
    best_of_keypoint = near.best_of(near.keypoint, len(query.features.xy_px))
    best_of_point = near.best_of(near.point, len(visible.position))
    near = near.select(
        (near.similarity >= best_of_keypoint - GUIDED_DROP) & (near.similarity == best_of_point)
    )
    columns = int(column.max()) + 1
    slot = near.keypoint * columns + column[visible.view[near.point]]
    return visible, near.select(
        near.similarity == near.best_of(slot, len(query.features.xy_px) * columns)
    )


def _triangulate(cameras: Cameras, seen: _Observations) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints (n,) that have a track of at least two agreeing views, their points (n, 3),
    covariances (n, 3, 3).

    Of a keypoint's candidate points the one that most of its observations bear out is the start.
    """
    rows = torch.nonzero(seen.has_point.any(dim=1))[:, 0]
    xy, point, has_point = seen.xy_px[rows], seen.point[rows], seen.has_point[rows]
    supports = (
        agreeing(cameras, point[:, :, None], xy[:, None], CONSENSUS_PX) & seen.seen[rows][:, None]
    )
    count = torch.where(has_point, supports.sum(-1), -1)
    best = count.argmax(dim=1) if len(rows) else rows
    each = torch.arange(len(rows))
    used, start = supports[each, best], point[each, best]
    position, covariance = refine_points(cameras, xy, used, start)
    good = (
        (used.sum(1) >= 2)
        & torch.isfinite(covariance).flatten(1).all(1)
        & torch.isfinite(position).all(1)
    )
    return rows[good], position[good], covariance[good]
