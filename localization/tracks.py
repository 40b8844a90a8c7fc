"""The last refinement of a query's pose: on tracks, jointly with their points.

A track is a query keypoint with all index keypoints that show the same point: its matches by
descriptor that fit the pose, and what the guided search adds. Its point is triangulated anew from
all of them, so that the same observation is not counted once for every image, and its uncertainty
is known.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.absolute_pose import (
    levenberg_marquardt,
    robust_loss,
    rotation_from_vector,
    scaled_inverse,
    skew,
)
from localization.cameras import Camera
from localization.matching import View
from localization.refinement import PointMap, near_candidates, project_query, visible_points
from localization.scoring import Evidence, epipolar_errors, epipolar_gains, epipolar_slopes
from localization.triangulation import CONSENSUS_PX, Cameras, agreeing, cameras_of, refine_points

TRACK_RATIO = 0.97
GUIDED_PX, GUIDED_SIMILARITY, GUIDED_DROP = 4.0, 0.85, 0.05
# Keypoints are located to about half their scale; those that only the guided search matched count
# for less.
NOISE_OF_SCALE, GUIDED_NOISE = 0.5, 4.0
MIN_TRACKS = 6
ROUNDS = 2
# The noise of a match without a point, in that of its keypoints.
SINGLE_NOISE = 1.0
# Robust threshold in standard deviations.
THRESHOLD_SIGMA = 2.0
STEPS = 15


@dataclass(frozen=True)
class Polished:
    """A pose after the last refinement, and what it was refined on.

    covariance (6, 6): as of absolute_pose.refine_pose; tracks: how many agree; camera: the query's,
    with lens_sigma (lens,), the standard deviations of what of it was refined too; cost: the sum of
    robust losses; observed: the tracks.
    """

    R_cam_from_world: Tensor
    c_world: Tensor
    covariance: Tensor
    tracks: int
    camera: Camera
    lens_sigma: Tensor
    cost: float
    observed: "Tracks"


@dataclass(frozen=True)
class Tracks:
    """n query keypoints xy_px (n, 2) with their points: position (n, 3), covariance (n, 3, 3) for 1
    px of noise in the index images, and the noise_px (n,) there and in the query; single: matches of
    further keypoints, that have no point."""

    xy_px: Tensor
    position: Tensor
    covariance: Tensor
    noise_px: Tensor
    single: Evidence | None = None


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
) -> Polished | None:
    """The pose refined on its tracks, which are built anew each round; None if there are too few.

    order: the index views that count.
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
        noise = torch.where(seen.by_descriptor[keypoint], noise, GUIDED_NOISE * noise)
        xy = query.features.xy_px[keypoint].double()
        tracks = Tracks(xy, position, covariance, noise, evidence.select(_single(seen, keypoint)))
        result = refine_with_points(query.camera, R, c, tracks)
        R, c = result.R_cam_from_world, result.c_world
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
    rows = torch.nonzero(fits & (evidence.ratio <= TRACK_RATIO))[:, 0]
    k, v = evidence.keypoint[rows], column[evidence.view[rows]]
    xy[k, v], point[k, v] = evidence.index_px[rows], evidence.point[rows]
    seen[k, v], has_point[k, v] = True, evidence.has_point[rows]
    by_descriptor = torch.zeros(keypoints, dtype=torch.bool)
    by_descriptor[k] = True
    return _Observations(xy, seen, point, has_point, by_descriptor, rows, k)


def _single(seen: _Observations, tracked: Tensor) -> Tensor:
    """The rows of the evidence that fit and whose keypoints have no track."""
    return seen.rows[~torch.isin(seen.keypoint, tracked)]


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


def refine_with_points(
    camera: Camera, R: Tensor, c: Tensor, tracks: Tracks, *, lens: int = 0
) -> Polished:
    """The pose of a camera from tracks whose points are free to move, and with it as much of the
    lens as is asked for.

    lens: 0 nothing, 1 the focal length, 3 the principal point too. Eliminating the points from the
    joint least-squares problem (Schur complement, index cameras fixed, linearized at the points)
    leaves each reprojection error weighed by the inverse of noise^2 (I + J covariance J^T), J =
    d(pixel)/d(point): a point from a short baseline counts only across the direction it may slide
    in. A match without a point counts across its epipolar line. Cauchy loss.
    """
    focal, center = R.new_tensor([camera.fx, camera.fy]), R.new_tensor([camera.cx, camera.cy])
    size = focal.mean()

    def residuals(R: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels off (n, 2), their derivatives by the point in camera axes (n, 2, 3) and by the
        lens (n, 2, 3).

        v: center (3,), then log of the focal length's factor and the principal point's shift over
        the focal length.
        """
        local = (tracks.position - v[:3]) @ R.T
        depth = local[:, 2:].clamp_min(1e-6)
        xy = local[:, :2] / depth
        scaled = focal * v[3].exp()
        eye = torch.eye(2).to(R).expand(len(xy), 2, 2)
        by_point = (scaled / depth)[:, :, None] * torch.cat([eye, -xy[..., None]], dim=2)
        by_lens = torch.cat([(scaled * xy)[..., None], size * eye], dim=2)
        return xy * scaled + center + size * v[4:] - tracks.xy_px, by_point, by_lens

    v = torch.cat([c, c.new_zeros(3)])
    J_world = residuals(R, v)[1] @ R
    spread = torch.eye(2).to(R) + J_world @ tracks.covariance @ J_world.transpose(1, 2)
    factor, failed = torch.linalg.cholesky_ex(spread)
    whiten = torch.linalg.inv_ex(factor)[0] / tracks.noise_px[:, None, None]
    whiten = torch.where((failed == 0)[:, None, None], whiten, torch.zeros_like(whiten))

    def whitened(R: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        r, by_point, by_lens = residuals(R, v)
        turn = -skew((tracks.position - v[:3]) @ R.T)
        by_pose = by_point @ torch.cat([turn, (-R).expand(len(r), 3, 3)], dim=2)
        return (whiten @ r[..., None])[..., 0], whiten @ torch.cat(
            [by_pose, by_lens[..., :lens]], dim=2
        )

    single, away_m = tracks.single, float((tracks.position - c).norm(dim=1).median())

    def across(R: Tensor, v: Tensor, derived: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Errors (m,) of the matches without points over their noise, weights, derivatives (m, 6 +
        lens).
        """
        noise = SINGLE_NOISE * single.noise_px.double()

        def errors(v: Tensor) -> tuple[Tensor, ...]:
            zoomed, moved = focal * v[3].exp(), center + size * v[4:]
            lens_now = Camera(*zoomed.tolist(), *moved.tolist(), camera.width, camera.height)
            seen, of_pose = single.seen_with(lens_now), (R[None], v[None, :3])
            if derived:
                return epipolar_slopes(seen, *of_pose, away_m)
            return epipolar_errors(seen, *of_pose)

        error, weight, *slopes = (value[0] for value in errors(v))
        J = []
        if derived:
            J = [*slopes[0]]
            for k in range(lens):
                other = v.clone()
                other[3 + k] += 1e-3
                J.append((errors(other)[0][0] - error) / 1e-3)
            J = [torch.stack(J, dim=1) / noise[:, None]]
        return (error.double() / noise, weight.double(), *J)

    def cost_of(R: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        r = (whiten @ residuals(R[0], v[0])[0][..., None])[..., 0]
        cost = robust_loss(r.square().sum(1), THRESHOLD_SIGMA)[0].sum()
        if single is not None:
            r, weight = across(R[0], v[0], False)
            loss = robust_loss(r.square(), THRESHOLD_SIGMA)[0]
            cost = cost + (single.weight * torch.where(weight > 0, loss, THRESHOLD_SIGMA**2)).sum()
        return cost[None]

    def normal_equations(R: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        r, J = whitened(R[0], v[0])
        weight = robust_loss(r.square().sum(1), THRESHOLD_SIGMA)[1]
        JW = J * weight[:, None, None]
        normal, gradient = torch.einsum("nki,nkj->ij", JW, J), torch.einsum("nki,nk->i", JW, r)
        if single is not None:
            r, weight, J = across(R[0], v[0], True)
            JW = J * (weight * robust_loss(r.square(), THRESHOLD_SIGMA)[1])[:, None]
            normal, gradient = normal + JW.T @ J, gradient + JW.T @ r
        return normal[None], gradient[None]

    def move(R: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        delta = torch.nn.functional.pad(delta, (0, 9 - delta.shape[1]))
        return rotation_from_vector(delta[:, :3]) @ R, v + delta[:, 3:]

    R, v, cost = levenberg_marquardt(R[None], v[None], cost_of, normal_equations, move, STEPS)
    R, v = R[0], v[0]
    r, J = whitened(R, v)
    squared = r.square().sum(1)
    inlier = squared < THRESHOLD_SIGMA**2
    information = torch.einsum("nki,nkj->ij", J[inlier], J[inlier])
    freedom, left, agree = 2 * inlier.sum() - 6 - lens, squared[inlier].sum(), int(inlier.sum())
    if single is not None:
        r, weight, J = across(R, v, True)
        weight = weight * (r.square() < THRESHOLD_SIGMA**2)
        information = information + (J * weight[:, None]).T @ J
        freedom, left = freedom + (weight > 0).sum(), left + (weight * r.square()).sum()
        agree += len(single.keypoint[weight > 0.5].unique())
    variance = left / freedom.clamp_min(1)
    spread = scaled_inverse(information[None], variance[None], (freedom > 0)[None])[0]
    zoom, shift = float(v[3].exp()), (size * v[4:]).tolist()
    camera = replace(
        camera,
        fx=camera.fx * zoom,
        fy=camera.fy * zoom,
        cx=camera.cx + shift[0],
        cy=camera.cy + shift[1],
    )
    lens_sigma = spread.diagonal()[6:].clamp_min(0).sqrt()
    return Polished(
        R, v[:3], spread[:6, :6], agree, camera, lens_sigma, float(cost), tracks
    )
