"""The relative pose of two views: five-point essential matrices in MSAC with local optimization.

Plain tensors in, float64 out. A relative pose is x_b = R_b_from_a x_a + t_b_from_a; E = [t]× R, so
that x_bᵀ E x_a = 0. Image points are normalized (K⁻¹ pixel, z = 1) and thresholds are pixels over the
focal length.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.absolute_pose import (
    SCORE_CHUNK,
    draw_samples,
    levenberg_marquardt,
    robust_loss,
    rotation_from_vector,
    samples_needed,
    skew,
)
from localization.cameras import homogeneous

ROUND_SAMPLES = 200  # five-point samples solved and scored together
LOCAL_CANDIDATES = 4  # best essential matrices of a round that are refined
LOCAL_ITERATIONS = 8
MIN_INLIERS = 6  # any five matches agree with some essential matrix


@dataclass(frozen=True)
class RelativePose:
    """x_b = R x_a + s t for an unknown s > 0.

    t_b_from_a is a unit vector; inliers (n,) bool; parallax_deg:
    median angle between the rays of the inliers once the rotation is undone. With a parallax near
    zero (pure rotation) R still holds and t means nothing.
    """

    R_b_from_a: Tensor
    t_b_from_a: Tensor
    inliers: Tensor
    parallax_deg: float


# ---------------------------------------------------------------- essential matrices


def essential_from_pose(R_b_from_a: Tensor, t_b_from_a: Tensor) -> Tensor:
    """E = [t]× R of relative poses (..., 3, 3), (..., 3) -> (..., 3, 3)."""
    return skew(t_b_from_a) @ R_b_from_a


def five_point(ray_a: Tensor, ray_b: Tensor) -> tuple[Tensor, Tensor]:
    """All essential matrices of five matches.

    ray_a, ray_b (..., 5, 3): matched viewing rays of any length. Returns E (..., 10, 3, 3) with
    Frobenius norm √2 and valid (..., 10) bool; invalid entries are zero.

    E = x E₁ + y E₂ + z E₃ + E₄ spans the null space of the epipolar constraints; det E = 0 and
    2 E Eᵀ E − tr(E Eᵀ) E = 0 are ten cubics in x, y, z. Eliminating the ten monomials of degree
    three leaves a 10×10 action matrix (multiplication by x) whose real eigenvectors are the
    solutions (Stewénius, Engels, Nistér, "Recent developments on direct relative orientation",
    2006).
    """
    batch = ray_a.shape[:-2]
    a = torch.nn.functional.normalize(ray_a.to(torch.float64).reshape(-1, 5, 3), dim=2)
    b = torch.nn.functional.normalize(ray_b.to(torch.float64).reshape(-1, 5, 3), dim=2)
    constraints = (b[..., :, None] * a[..., None, :]).flatten(2)
    finite = torch.isfinite(constraints).flatten(1).all(1)
    constraints = torch.where(finite[:, None, None], constraints, 0.0)
    null = torch.linalg.qr(constraints.transpose(1, 2), mode="complete")[0][:, :, 5:]
    basis = null.transpose(1, 2).reshape(-1, 4, 3, 3)
    cubics = _essential_cubics(basis)
    reduced, failed = torch.linalg.solve_ex(cubics[:, :, :10], cubics[:, :, 10:])
    proper = finite & (failed == 0) & torch.isfinite(reduced).flatten(1).all(1)
    action = torch.zeros_like(reduced)
    action[:, :6] = -reduced[:, :6]
    action[:, [6, 7, 8, 9], [0, 1, 2, 6]] = 1.0
    action = torch.where(proper[:, None, None], action, 0.0)
    values, vectors = torch.linalg.eig(action)
    real = values.imag.abs() < 1e-6 * (1 + values.real.abs())
    monomials = vectors.real[:, 6:].transpose(1, 2)  # (x, y, z, 1) of each solution, to scale
    E = torch.einsum("bsk,bkij->bsij", monomials, basis)
    norm = E.flatten(2).norm(dim=2)
    E = E / norm.clamp_min(1e-12)[..., None, None] * math.sqrt(2)
    EEt = E @ E.transpose(2, 3)
    trace = EEt.diagonal(dim1=2, dim2=3).sum(2)[..., None, None]
    violation = (2 * EEt @ E - trace * E).flatten(2).abs().amax(2)
    valid = real & proper[:, None] & (norm > 1e-12) & (violation < 1e-6)
    E = torch.where(valid[..., None, None], E, 0.0)
    return E.reshape(*batch, 10, 3, 3), valid.reshape(*batch, 10)


@functools.cache
def _products(degree: int) -> Tensor:
    """0/1 table (monomials of degree + 1, 4 · those of degree): collects products by x, y, z, 1.

    The monomials are ordered so that for degree 3 those without a factor 1 come first, and for
    degree 2 by x², xy, xz, y², yz, z², x, y, z, 1.
    """

    def monomials(d: int) -> list[tuple[int, ...]]:
        # Sorted tuples of variable numbers, 3 standing for the constant 1.
        everything = itertools.combinations_with_replacement(range(4), d)
        return sorted(everything, key=lambda m: (m.count(3), m))

    targets = {m: i for i, m in enumerate(monomials(degree + 1))}
    pairs = itertools.product(monomials(degree), range(4))
    table = torch.zeros(len(targets), 4 * len(monomials(degree)), dtype=torch.float64)
    for column, (m, variable) in enumerate(pairs):
        table[targets[tuple(sorted((*m, variable)))], column] = 1.0
    return table


def _essential_cubics(basis: Tensor) -> Tensor:
    """The ten cubics of essential matrices spanned by basis (B, 4, 3, 3): (B, 10, 20)."""
    square, cube = _products(1), _products(2)

    def collect(table: Tensor, products: Tensor) -> Tensor:
        return torch.einsum("mc,bc...->bm...", table, products.flatten(1, 2))

    EEt = collect(square, torch.einsum("bpij,bqkj->bpqik", basis, basis))
    trace = EEt.diagonal(dim1=2, dim2=3).sum(2)[..., None, None]
    eye = torch.eye(3, dtype=basis.dtype)
    trace_constraint = collect(cube, torch.einsum("bpij,bqjk->bpqik", 2 * EEt - trace * eye, basis))
    first, second, third = basis.unbind(2)
    minors = collect(square, torch.linalg.cross(first[:, :, None], second[:, None, :]))
    determinant = collect(cube, torch.einsum("bpi,bqi->bpq", minors, third))
    return torch.cat([trace_constraint.flatten(2), determinant[..., None]], 2).transpose(1, 2)


def sampson_squared(E: Tensor, xy_a: Tensor, xy_b: Tensor) -> Tensor:
    """Squared Sampson distances of matches to essential matrices.

    E (..., 3, 3), xy_a, xy_b (n, 2) or (..., n, 2) -> (..., n), in the dtype of E.
    """
    line_b = xy_a @ E[..., :, :2].transpose(-1, -2) + E[..., None, :, 2]
    line_a = xy_b @ E[..., :2, :] + E[..., None, 2, :]
    value = (xy_b * line_b[..., :2]).sum(-1) + line_b[..., 2]
    size = line_b[..., :2].square().sum(-1) + line_a[..., :2].square().sum(-1)
    return value.square() / size.clamp_min(1e-20)


def score_essentials(E: Tensor, xy_a: Tensor, xy_b: Tensor, threshold: float) -> Tensor:
    """MSAC scores (h,) of E (h, 3, 3), higher is better: Σ max(0, 1 − e²/T²), e Sampson's.

    xy_a, xy_b (n, 2). Computed in float32; does not look at depths.
    """
    h, n = E.shape[0], xy_a.shape[0]
    E, xy_a, xy_b = (v.to(torch.float32) for v in (E, xy_a, xy_b))
    one = torch.ones_like(xy_a[:, :1])
    a, b = torch.cat([xy_a, one], 1).T.contiguous(), torch.cat([xy_b, one], 1).T.contiguous()
    scores = torch.zeros(h, dtype=torch.float64)
    step = max(1, SCORE_CHUNK // max(n, 1))
    for start in range(0, h, step):
        part = E[start : start + step]
        k = part.shape[0]
        line_b = (part.transpose(0, 1).reshape(3 * k, 3) @ a).reshape(3, k, n)
        line_a = (part.permute(2, 0, 1)[:2].reshape(2 * k, 3) @ b).reshape(2, k, n)
        value = line_b[2].addcmul_(line_b[0], b[0]).addcmul_(line_b[1], b[1])
        size = line_b[:2].square_().sum(0).add_(line_a.square_().sum(0)).clamp_min_(1e-20)
        gain = value.square_().div_(size).mul_(-1 / threshold**2).add_(1).clamp_min_(0)
        scores[start : start + step] = gain.sum(1)
    return scores


def in_front(R_b_from_a: Tensor, t_b_from_a: Tensor, xy_a: Tensor, xy_b: Tensor) -> Tensor:
    """Whether matches triangulate in front of both cameras.

    R (..., 3, 3), t (..., 3), xy_a, xy_b (n, 2) -> (..., n) bool.
    The depths solve λ_b x_b = λ_a R x_a + t in the least-squares sense of each cross product.
    """
    a = homogeneous(xy_a) @ R_b_from_a.transpose(-1, -2)
    b = homogeneous(xy_b).expand_as(a)
    normal = torch.linalg.cross(a, b)
    t = t_b_from_a[..., None, :].expand_as(a)
    depth_b = (normal * torch.linalg.cross(a, t)).sum(-1)
    depth_a = (normal * torch.linalg.cross(b, t)).sum(-1)
    return (depth_a > 0) & (depth_b > 0)


def decompose_essential(
    E: Tensor, xy_a: Tensor, xy_b: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The relative pose of each essential matrix that puts most matches in front of both cameras.

    E (h, 3, 3), xy_a, xy_b (n, 2), mask (h, n) bool: the matches that vote. Returns
    R_b_from_a (h, 3, 3) and unit t_b_from_a (h, 3). Always a rotation, whatever E is (Hartley,
    Zisserman, "Multiple View Geometry", 9.6.2).
    """
    U, _, Vt = torch.linalg.svd(E.to(torch.float64))
    U = U * torch.linalg.det(U)[:, None, None]
    Vt = Vt * torch.linalg.det(Vt)[:, None, None]
    turn = E.new_tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    R1, R2, t = U @ turn @ Vt, U @ turn.T @ Vt, U[:, :, 2]
    R = torch.stack([R1, R1, R2, R2], 1)
    t = torch.stack([t, -t, t, -t], 1)
    votes = in_front(R, t, xy_a.to(torch.float64), xy_b.to(torch.float64)) & mask[:, None]
    best = votes.sum(2).argmax(1)
    rows = torch.arange(len(best))
    return R[rows, best], t[rows, best]


def refine_relative_pose(
    R_b_from_a: Tensor,
    t_b_from_a: Tensor,
    xy_a: Tensor,
    xy_b: Tensor,
    threshold: float,
    weights: Tensor,
    iterations: int = 25,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize the robust Sampson error of h relative poses at once.

    R (h, 3, 3), unit t (h, 3), xy_a, xy_b (n, 2), weights (h, n). The loss is that of `refine_pose`.
    Returns (R, unit t, cost (h,)). Depths are not looked at.
    """
    a, b = homogeneous(xy_a.to(torch.float64)), homogeneous(xy_b.to(torch.float64))
    problem = _Epipolar(a, b, weights.to(a), threshold)
    R, t = R_b_from_a.to(torch.float64), torch.nn.functional.normalize(t_b_from_a.to(a), dim=1)
    return levenberg_marquardt(
        R, t, problem.cost, problem.normal_equations, _move_relative, iterations
    )


def _tangent(t: Tensor) -> Tensor:
    """Two unit vectors orthogonal to unit vectors (h, 3): (h, 2, 3)."""
    axis = torch.nn.functional.one_hot(t.abs().argmin(1), 3).to(t.dtype)
    first = torch.nn.functional.normalize(torch.linalg.cross(t, axis), dim=1)
    return torch.stack([first, torch.linalg.cross(t, first)], 1)


def _move_relative(R: Tensor, t: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    moved = t + (delta[:, 3:, None] * _tangent(t)).sum(1)
    return rotation_from_vector(delta[:, :3]) @ R, torch.nn.functional.normalize(moved, dim=1)


@dataclass(frozen=True)
class _Epipolar:
    """Robust Sampson error of relative poses with five parameters (rotation 3, direction 2)."""

    a: Tensor  # (n, 3)
    b: Tensor  # (n, 3)
    weights: Tensor  # (h, n)
    threshold: float

    def cost(self, R: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        squared = sampson_squared(essential_from_pose(R, t), self.a[:, :2], self.b[:, :2])
        return (self.weights[rows] * robust_loss(squared, self.threshold)[0]).sum(1)

    def normal_equations(self, R: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        E = essential_from_pose(R, t)
        axes = skew(torch.eye(3, dtype=R.dtype))
        by_rotation = skew(t)[:, None] @ axes @ R[:, None]
        by_direction = skew(_tangent(t)) @ R[:, None]
        dE = torch.cat([by_rotation, by_direction], 1)  # (k, 5, 3, 3)
        line_b, line_a = self.a @ E.transpose(1, 2), self.b @ E
        d_line_b, d_line_a = self.a @ dE.transpose(2, 3), self.b @ dE
        value, d_value = (self.b * line_b).sum(2), (self.b * d_line_b).sum(3)
        size = line_b[..., :2].square().sum(2) + line_a[..., :2].square().sum(2)
        size = size.clamp_min(1e-20)
        half_d_size = (line_b[:, None, :, :2] * d_line_b[..., :2]).sum(3)
        half_d_size = half_d_size + (line_a[:, None, :, :2] * d_line_a[..., :2]).sum(3)
        residual = value * size.rsqrt()
        J = (d_value - (value / size)[:, None] * half_d_size) * size.rsqrt()[:, None]
        _, slope = robust_loss(residual.square(), self.threshold)
        JW = J * (self.weights[rows] * slope)[:, None]
        return JW @ J.transpose(1, 2), (JW * residual[:, None]).sum(2)


def essential_ransac(
    xy_a: Tensor,
    xy_b: Tensor,
    threshold: float,
    *,
    generator: torch.Generator,
    iterations: int = 2000,
) -> RelativePose | None:
    """Relative pose of the best MSAC score among five-point samples, locally optimized.

    xy_a, xy_b (n, 2) matched normalized points, finite; threshold on the Sampson distance; iterations:
    most samples drawn. A match counts only if it lies in front of both cameras. Returns None where
    no pose has MIN_INLIERS inliers.
    """
    a, b = xy_a.to(torch.float64), xy_b.to(torch.float64)
    if len(a) < MIN_INLIERS:
        return None
    rays_a, rays_b, all_alike = homogeneous(a), homogeneous(b), a.new_ones(len(a))

    best_R, best_t, best_score, drawn, needed = None, None, 0.0, 0, math.inf
    while drawn < min(iterations, needed):
        count = min(ROUND_SAMPLES, iterations - drawn)
        drawn += count
        sample = draw_samples(all_alike, 5, count, generator)
        E, valid = five_point(rays_a[sample], rays_b[sample])
        E = E[valid]
        scores = score_essentials(E, a, b, threshold)
        E = E[torch.topk(scores, min(LOCAL_CANDIDATES, len(scores))).indices]
        R, t = decompose_essential(E, a, b, sampson_squared(E, a, b) < threshold**2)
        weights = all_alike.expand(len(R), -1)
        R, t, _ = refine_relative_pose(R, t, a, b, threshold, weights, LOCAL_ITERATIONS)
        scores = _score_relative(R, t, a, b, threshold)
        if len(scores) and float(scores.max()) > best_score:
            leader = scores.argmax()
            best_R, best_t, best_score = R[leader], t[leader], float(scores[leader])
            inliers = _relative_inliers(best_R, best_t, a, b, threshold)
            needed = samples_needed(float(inliers.double().mean()), 5)
    if best_R is None:
        return None
    R, t = best_R[None], best_t[None]
    for _ in range(2):  # an epipolar line passes many a wrong match: the end is for inliers alone
        inliers = _relative_inliers(R, t, a, b, threshold)
        R, t, _ = refine_relative_pose(R, t, a, b, threshold, inliers)
    R, t = R[0], t[0]
    inliers = _relative_inliers(R, t, a, b, threshold)
    if int(inliers.sum()) < MIN_INLIERS:
        return None
    turned = torch.nn.functional.normalize(rays_a[inliers] @ R.T, dim=1)
    apart = (turned - torch.nn.functional.normalize(rays_b[inliers], dim=1)).norm(dim=1)
    parallax = torch.rad2deg(2 * torch.asin((apart / 2).clamp(max=1)).median())
    return RelativePose(R, t, inliers, float(parallax))


def _relative_inliers(R: Tensor, t: Tensor, a: Tensor, b: Tensor, threshold: float) -> Tensor:
    near = sampson_squared(essential_from_pose(R, t), a, b) < threshold**2
    return near & in_front(R, t, a, b)


def _score_relative(R: Tensor, t: Tensor, a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """MSAC scores (h,) of relative poses, matches behind a camera scoring nothing."""
    squared = sampson_squared(essential_from_pose(R, t), a, b)
    return ((1 - squared / threshold**2).clamp_min(0) * in_front(R, t, a, b)).sum(1)


# ---------------------------------------------------------------- from relative to absolute


def query_in_world(
    R_world_from_a: Tensor, R_b_from_a: Tensor, t_b_from_a: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotation R_world_from_b, and the unit direction in the world from camera a to camera b.

    All (..., 3, 3) and (..., 3). With a scale s the center of b is c_a + s · direction.
    """
    R_world_from_b = R_world_from_a @ R_b_from_a.transpose(-1, -2)
    direction = -(R_world_from_b @ t_b_from_a[..., None])[..., 0]
    return R_world_from_b, torch.nn.functional.normalize(direction, dim=-1)
