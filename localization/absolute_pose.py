"""Camera pose from matches of image points with 3D points: MSAC scores, refinement.

Every function works on plain tensors, in float64, with no loop over samples. A pose is
`R_cam_from_world` (3, 3), `t_cam` (3,): x_cam = R X + t, or its center c_world = -Rᵀ t. Image points
are `xy_norm`, normalized coordinates (x/z, y/z) = K⁻¹ pixel; thresholds are in the same unit, that
is pixels divided by the focal length. "Correspondence" i is the pair xy_norm[i], points[i].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCORE_CHUNK = 1 << 18  # pose × correspondence pairs scored at once: stays in a core's cache
MISS_PROBABILITY = 1e-4  # RANSAC stops when a better pose is missed with this probability
MIN_DEPTH = 1e-6  # nearer than this counts as behind the camera
SMALL = 1e-9  # least squares end with a step that promises less of the cost


# ---------------------------------------------------------------- rotations


def skew(v: Tensor) -> Tensor:
    """Cross-product matrices: (..., 3) -> (..., 3, 3) with skew(v) w = v × w."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    rows = (zero, -z, y, z, zero, -x, -y, x, zero)
    return torch.stack(rows, -1).reshape(*v.shape, 3)


def rotation_from_vector(omega: Tensor) -> Tensor:
    """Rotation vectors in radians (..., 3) -> matrices (..., 3, 3), by Rodrigues' formula."""
    angle = omega.norm(dim=-1)[..., None, None]
    K = skew(omega)
    identity = torch.eye(3, dtype=omega.dtype)
    # torch.sinc(x) = sin(πx)/(πx) is smooth at zero; 1 − cos θ = 2 sin²(θ/2).
    first = torch.sinc(angle / math.pi)
    second = 0.5 * torch.sinc(angle / (2 * math.pi)).square()
    return identity + first * K + second * (K @ K)


def angle_deg(R: Tensor) -> Tensor:
    """Angles (...) in degrees of rotations (..., 3, 3); exact near zero: sin is half the skew part's length."""
    axis = torch.stack(
        [R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], -1
    )
    trace = R.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1))


# ---------------------------------------------------------------- scoring


def score_poses(
    R_cam_from_world: Tensor,
    t_cam: Tensor,
    xy_norm: Tensor,
    points: Tensor,
    threshold: float,
    weights: Tensor,
    keypoint_ids: Tensor | None = None,
) -> Tensor:
    """MSAC scores of h poses, higher is better: Σ w · max(0, 1 − e²/T²), e the reprojection error.

    R (h, 3, 3), t (h, 3), xy_norm (n, 2), points (n, 3), weights (n,), all finite. Returns (h,)
    float64; 1 is one perfect correspondence, and Σ w − score is the usual MSAC cost over T². A point
    behind the camera scores 0, that is, costs T². With keypoint_ids (n,) only the best
    correspondence of each keypoint counts: several points tried on one keypoint are not independent
    evidence. The products run in float32, about the center of the points.
    """
    h, n = R_cam_from_world.shape[0], points.shape[0]
    if h == 0 or n == 0:
        return torch.zeros(h, dtype=torch.float64)
    layers = [n]
    if keypoint_ids is not None:
        order, layers = _keypoint_layers(keypoint_ids)
        xy_norm, points, weights = xy_norm[order], points[order], weights[order]
    middle = points.to(torch.float64).mean(0)
    shifted = (points - middle).to(torch.float32).transpose(0, 1).contiguous()
    x, y = xy_norm.to(torch.float32).transpose(0, 1).contiguous()
    w, R = weights.to(torch.float32), R_cam_from_world.to(torch.float32)
    t = (t_cam + R_cam_from_world @ middle).to(torch.float32)
    scores = torch.empty(h, dtype=torch.float64)
    step = max(1, SCORE_CHUNK // n)
    for start in range(0, h, step):
        rows = slice(start, start + step)
        gain = _gains(R[rows], t[rows], x, y, shifted, threshold).mul_(w)
        best = gain[:, : layers[0]]
        offset = layers[0]
        for size in layers[1:]:
            torch.maximum(best[:, :size], gain[:, offset : offset + size], out=best[:, :size])
            offset += size
        scores[rows] = best.sum(1)
    return scores


def _gains(R: Tensor, t: Tensor, x: Tensor, y: Tensor, points: Tensor, threshold: float) -> Tensor:
    """max(0, 1 − e²/T²) of k poses and n correspondences (k, n); points (3, n)."""
    k = R.shape[0]
    stacked = R.transpose(0, 1).reshape(3 * k, 3)
    cam = torch.addmm(t.transpose(0, 1).reshape(3 * k, 1), stacked, points).reshape(3, k, -1)
    # A depth clamped to almost nothing throws a point behind the camera far out of the image.
    inverse = cam[2].clamp_min_(MIN_DEPTH).reciprocal_()
    dx = cam[0].mul_(inverse).sub_(x)
    dy = cam[1].mul_(inverse).sub_(y)
    error = dx.square_().add_(dy.square_())
    return error.mul_(-1 / threshold**2).add_(1).clamp_min_(0)


def _keypoint_layers(keypoint_ids: Tensor) -> tuple[Tensor, list[int]]:
    """Order correspondences so that the maximum per keypoint takes contiguous slices only.

    Layer j holds the j-th correspondence of each keypoint that has one; keypoints stand by falling
    number of correspondences, so that layer j lines up with the front of layer 0. Returns the
    order (n,) and the sizes of the layers.
    """
    _, keypoint, counts = torch.unique(keypoint_ids, return_inverse=True, return_counts=True)
    by_count = torch.argsort(counts, descending=True, stable=True)
    place = torch.empty_like(by_count)
    place[by_count] = torch.arange(len(counts))
    place = place[keypoint]
    grouped = torch.argsort(place, stable=True)
    starts = torch.cumsum(counts[by_count], 0) - counts[by_count]
    layer = torch.arange(len(keypoint)) - starts[place[grouped]]
    order = grouped[torch.argsort(layer, stable=True)]
    return order, torch.bincount(layer).tolist()


def squared_errors(
    R_cam_from_world: Tensor, t_cam: Tensor, xy_norm: Tensor, points: Tensor
) -> Tensor:
    """Squared reprojection errors in float64; infinite behind the camera.

    R (h, 3, 3), t (h, 3), xy_norm (n, 2) or (h, n, 2), points (n, 3) or (h, n, 3) -> (h, n); or
    R (3, 3), t (3,), xy_norm (n, 2), points (n, 3) -> (n,).
    """
    cam = points @ R_cam_from_world.transpose(-1, -2) + t_cam[..., None, :]
    front = cam[..., 2] > MIN_DEPTH
    projected = cam[..., :2] / torch.where(front, cam[..., 2], 1.0)[..., None]
    errors = (projected - xy_norm).square().sum(-1)
    return torch.where(front, errors, math.inf)


# ---------------------------------------------------------------- refinement


def refine_pose(
    R_cam_from_world: Tensor,
    c_world: Tensor,
    xy_norm: Tensor,
    points: Tensor,
    threshold: float,
    weights: Tensor,
    iterations: int = 25,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize the robust reprojection errors of h poses, each on matches of its own.

    R (h, 3, 3), c_world (h, 3), xy_norm (h, n, 2), points (h, n, 3), finite float64; weights (h, n),
    0 or False where there is none. Returns R, c_world and the minimized sums of losses (h,).

    The loss of an error e is c² log(1 + e²/c²), c = T/2 (Cauchy), never more than T²; that is
    also what a point behind the camera costs. Levenberg–Marquardt.
    """
    problem = _Reprojection(xy_norm, points, weights.to(points), threshold)
    of_problem = problem.cost, problem.normal_equations
    return levenberg_marquardt(R_cam_from_world, c_world, *of_problem, _move_camera, iterations)


def _move_camera(R: Tensor, center: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return rotation_from_vector(delta[:, :3]) @ R, center + delta[:, 3:]


@dataclass(frozen=True)
class _Reprojection:
    """Robust reprojection error of poses (rows: which of the h poses R, center belong to)."""

    xy: Tensor  # (h, n, 2)
    points: Tensor  # (h, n, 3)
    weights: Tensor  # (h, n)
    threshold: float

    def _residuals(self, R: Tensor, center: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Residuals (k, 2, n), projections (k, 2, n), inverse depths and in front (k, n)."""
        cam = R @ (self.points[rows] - center[:, None]).transpose(1, 2)
        front = cam[:, 2] > MIN_DEPTH
        inverse = 1 / torch.where(front, cam[:, 2], 1.0)
        projected = cam[:, :2] * inverse[:, None]
        return projected - self.xy[rows].transpose(1, 2), projected, inverse, front

    def cost(self, R: Tensor, center: Tensor, rows: Tensor) -> Tensor:
        residual, _, _, front = self._residuals(R, center, rows)
        loss, _ = robust_loss(residual.square().sum(1), self.threshold)
        loss = torch.where(front, loss, self.threshold**2)
        return (self.weights[rows] * loss).sum(1)

    def _jacobian(self, R: Tensor, projected: Tensor, inverse: Tensor) -> Tensor:
        """d(projection) / d(rotation vector, center) (k, 6, 2, n)."""
        a, b = projected.unbind(1)
        one = torch.ones_like(a)
        rotation_x = torch.stack([-a * b, one + a * a, -b], 1)
        rotation_y = torch.stack([-one - b * b, a * b, a], 1)
        center_x = (a[:, None] * R[:, 2, :, None] - R[:, 0, :, None]) * inverse[:, None]
        center_y = (b[:, None] * R[:, 2, :, None] - R[:, 1, :, None]) * inverse[:, None]
        in_x = torch.cat([rotation_x, center_x], 1)
        in_y = torch.cat([rotation_y, center_y], 1)
        return torch.stack([in_x, in_y], 2)

    def normal_equations(self, R: Tensor, center: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        residual, projected, inverse, front = self._residuals(R, center, rows)
        J = self._jacobian(R, projected, inverse)
        _, slope = robust_loss(residual.square().sum(1), self.threshold)
        w = self.weights[rows] * slope * front
        JW = J * w[:, None, None]
        return JW.flatten(2) @ J.flatten(2).transpose(1, 2), (JW * residual[:, None]).sum((2, 3))


def robust_loss(squared: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Cauchy loss c² log(1 + e²/c²), c = T/2, cut off at T², of e²: (loss, d loss / d e²).

    The cut makes an outlier cost the same wherever it lies, behind the camera included.
    """
    c2 = threshold**2 / 4
    loss = c2 * torch.log1p(squared / c2)
    inside = loss < threshold**2
    slope = torch.where(inside, c2 / (c2 + squared), 0.0)
    return loss.clamp_max(threshold**2), slope


def scaled_inverse(information: Tensor, variance: Tensor, determined: Tensor) -> Tensor:
    """variance · information⁻¹ (h, k, k); infinite on the diagonal where not determined.

    Not determined is also a singular matrix, one whose smallest eigenvalue after scaling the
    diagonal to ones is below 1e-10.
    """
    scale = information.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    unit = information * scale[:, :, None] * scale[:, None]
    unit = torch.where(torch.isfinite(unit), unit, 0.0)
    values, vectors = torch.linalg.eigh(unit)
    fixed = determined & (values[:, 0] > 1e-10)
    inverse = (vectors / values.clamp_min(1e-10)[:, None]) @ vectors.transpose(1, 2)
    inverse = inverse * scale[:, :, None] * scale[:, None] * variance[:, None, None]
    unknown = torch.diag(information.new_full((information.shape[1],), math.inf))
    return torch.where(fixed[:, None, None], inverse, unknown)


def pose_deviation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (..., 6, 6) of (rotation vector, center) -> (sigma_m, sigma_deg), each (...).

    They are the root mean square distance of the center (meters) and rotation angle (degrees).
    """
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    sigma_deg = torch.rad2deg(variances[..., :3].sum(-1).sqrt())
    return variances[..., 3:].sum(-1).sqrt(), sigma_deg


def levenberg_marquardt(
    R: Tensor,
    v: Tensor,
    cost_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    normal_equations: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    move: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize h independent costs over (R (h, 3, 3), v (h, 3)), each with its own damping.

    cost_of(R, v, rows) -> (k,) and normal_equations(R, v, rows) -> (H (k, p, p), gradient (k, p))
    are asked for the problems `rows` (k,) only; move(R, v, delta (k, p)) takes a step. Normal
    equations are formed anew only after an accepted step. Returns (R, v, cost); the cost never
    rises.
    """
    R, v = R.clone(), v.clone()
    rows = torch.arange(R.shape[0])
    cost = cost_of(R, v, rows)
    H, gradient = normal_equations(R, v, rows)
    damping = torch.full_like(cost, 1e-3)
    for _ in range(iterations):
        if rows.numel() == 0:
            break
        diagonal = H[rows].diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        damped = H[rows] + torch.diag_embed(damping[rows, None] * diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        delta = -torch.cholesky_solve(gradient[rows, :, None], factor)[..., 0]
        delta = torch.where((failed == 0)[:, None], delta, 0.0)
        new_R, new_v = move(R[rows], v[rows], delta)
        new_cost = cost_of(new_R, new_v, rows)
        better = new_cost < cost[rows]
        accepted = rows[better]
        promised = -(gradient[rows] * delta).sum(1)
        small = promised <= SMALL * cost[rows] + 1e-24
        stuck = damping[rows] > 1e8
        R[accepted], v[accepted], cost[accepted] = new_R[better], new_v[better], new_cost[better]
        damping[rows] = torch.where(better, damping[rows] * 0.1, damping[rows] * 10)
        going_on = ~torch.where(better, small, (small & (failed == 0)) | stuck)
        stale = rows[better & going_on]
        if stale.numel():
            H[stale], gradient[stale] = normal_equations(R[stale], v[stale], stale)
        rows = rows[going_on]
    return R, v, cost


# ---------------------------------------------------------------- sampling


def draw_samples(weights: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count, size) drawn with probability proportional to weights (n,).

    An index may come twice in a sample; the minimal solvers call such samples degenerate.
    """
    drawn = torch.multinomial(weights, size * count, replacement=True, generator=generator)
    return drawn.reshape(count, size)


def samples_needed(inlier_share: float, size: int) -> float:
    """Samples after which one of inliers only is missed with MISS_PROBABILITY."""
    pure = inlier_share**size
    if pure >= 1:
        return 0.0
    return math.log(MISS_PROBABILITY) / math.log1p(-pure) if pure > 0 else math.inf
