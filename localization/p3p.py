"""P3P: the camera poses that three rays to known points leave.

Every function works on plain tensors, in float64, with no loop over samples; see absolute_pose.py
for the conventions.
"""

import torch
from torch import Tensor

THIN_TRIANGLE = 1e-4  # height over longest edge below which three points count as collinear


def p3p(ray_cam: Tensor, point_world: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All poses that put three world points on three viewing rays.

    ray_cam (..., 3, 3): the three rays as rows, of any length. point_world (..., 3, 3): the points
    as rows. Returns R_cam_from_world (..., 4, 3, 3), t_cam (..., 4, 3) and valid (..., 4) bool.
    Invalid entries (fewer solutions, collinear points, negative depth, non-finite input) hold the
    identity.

    The depths d along the unit rays satisfy |d_i b_i − d_j b_j|² = |X_i − X_j|². Eliminating the
    absolute scale leaves two conics in (d_1 : d_2 : d_3); a degenerate conic of their pencil, from
    one real root of a cubic, is a pair of lines whose intersections with a conic are the
    solutions (Ding et al., "Revisiting the P3P Problem", CVPR 2023). Newton steps polish the
    depths; aligning two orthonormal frames gives the pose.
    """
    batch = ray_cam.shape[:-2]
    # Component first, samples last: every step below is elementwise over contiguous samples.
    b = ray_cam.to(torch.float64).reshape(-1, 3, 3).permute(1, 2, 0).contiguous()
    X = point_world.to(torch.float64).reshape(-1, 3, 3).permute(1, 2, 0).contiguous()
    b = b / b.square().sum(1, keepdim=True).sqrt()
    edges = torch.stack([X[0] - X[1], X[0] - X[2], X[1] - X[2]])
    a = edges.square().sum(1)  # squared lengths (12, 13, 23)
    longest = a.amax(0)
    area2 = _cross(edges[0], edges[1]).square().sum(0)
    proper = area2 > THIN_TRIANGLE**2 * longest.square()
    proper &= torch.isfinite(area2) & torch.isfinite(b).all(0).all(0)
    a = torch.where(proper, a / longest, torch.ones_like(a))
    m = torch.stack([(b[0] * b[1]).sum(0), (b[0] * b[2]).sum(0), (b[1] * b[2]).sum(0)])
    m = torch.where(proper, m, torch.zeros_like(m))

    depth, valid = _depths(a, m)
    valid &= proper
    depth = torch.where(valid, depth * longest.sqrt(), torch.ones_like(depth))

    Y = depth[:, None] * b[:, :, None]  # point, coordinate, solution, sample
    frame_cam = _frame(Y[0], Y[1], Y[2])
    frame_world = _frame(X[0], X[1], X[2])[:, :, None]
    R = (frame_cam[:, :, None] * frame_world[:, None]).sum(0)
    t = Y.mean(0) - (R * X.mean(0)[None, :, None]).sum(1)
    valid &= torch.isfinite(R).all(0).all(0) & torch.isfinite(t).all(0)

    R, t = R.permute(3, 2, 0, 1), t.permute(2, 1, 0)
    valid = valid.transpose(0, 1)
    identity = torch.eye(3, dtype=R.dtype)
    R = torch.where(valid[..., None, None], R, identity)
    t = torch.where(valid[..., None], t, torch.zeros_like(t))
    return R.reshape(*batch, 4, 3, 3), t.reshape(*batch, 4, 3), valid.reshape(*batch, 4)


def _depths(a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Depths (3, 4, B), validity (4, B) from squared edges and cosines (3, B): 12, 13, 23."""
    a12, a13, a23 = a
    m12, m13, m23 = m
    zero = torch.zeros_like(a12)
    # Symmetric matrices as (00, 01, 02, 11, 12, 22), in (d1 : d2 : d3).
    C1 = torch.stack([a23, -a23 * m12, zero, a23 - a12, a12 * m23, -a12])
    C2 = torch.stack([a23, zero, -a23 * m13, -a13, a13 * m23, a23 - a13])
    C1 = C1 / C1.abs().amax(0)
    C2 = C2 / C2.abs().amax(0)
    adj1, adj2 = _adjugate(C1), _adjugate(C2)
    c0, c1 = _trace(adj1, C1) / 3, _trace(adj1, C2)  # det(C1 + σ C2) = c0 + c1 σ + c2 σ² + c3 σ³
    c2, c3 = _trace(adj2, C1), _trace(adj2, C2) / 3
    # Divide by the larger of the end coefficients, so that σ (or 1/σ) stays bounded.
    swap = c0.abs() > c3.abs()
    lead = torch.where(swap, c0, c3)
    lead = torch.where(lead == 0, torch.ones_like(lead), lead)
    sigma = _isolated_root(
        torch.where(swap, c1, c2) / lead,
        torch.where(swap, c2, c1) / lead,
        torch.where(swap, c3, c0) / lead,
    )
    one = torch.ones_like(sigma)
    weight1, weight2 = torch.where(swap, sigma, one), torch.where(swap, one, sigma)
    lines, real = _line_pair(weight1 * C1 + weight2 * C2)
    # Of the pencil, intersect with the conic that is less like the degenerate one.
    conic = torch.where(weight1.abs() > weight2.abs(), C2, C1)
    depth, meets = _line_conic(lines, conic)

    depth = depth * torch.sign(depth.sum(0))
    a, m = a[:, None], m[:, None]
    mixed = m * torch.stack([depth[0] * depth[1], depth[0] * depth[2], depth[1] * depth[2]])
    form = 2 * (depth.square() - mixed).sum(0)
    depth = depth * (a.sum(0) / form.clamp_min(1e-300)).sqrt()
    for _ in range(2):
        residual, step = _depth_step(depth, a, m)
        depth = depth - step
    # The residual is that before the last step, so that the solution is better still.
    valid = real & meets & (residual < 1e-7) & (depth > 0).all(0) & torch.isfinite(depth).all(0)
    return depth, valid


def _depth_step(depth: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Newton step on the three law-of-cosines equations: (largest residual, step to subtract).

    depth (3, 4, B), squared edges a and cosines m (3, 1, B).
    """
    d1, d2, d3 = depth
    f1 = d1 * d1 + d2 * d2 - 2 * m[0] * d1 * d2 - a[0]
    f2 = d1 * d1 + d3 * d3 - 2 * m[1] * d1 * d3 - a[1]
    f3 = d2 * d2 + d3 * d3 - 2 * m[2] * d2 * d3 - a[2]
    # Jacobian rows (p, q, 0), (r, 0, s), (0, u, v); solved by Cramer's rule.
    p, q = 2 * (d1 - m[0] * d2), 2 * (d2 - m[0] * d1)
    r, s = 2 * (d1 - m[1] * d3), 2 * (d3 - m[1] * d1)
    u, v = 2 * (d2 - m[2] * d3), 2 * (d3 - m[2] * d2)
    det = -p * s * u - q * r * v
    inverse = torch.where(det.abs() > 1e-14, 1 / det, torch.zeros_like(det))
    mixed = f2 * v - s * f3
    step = (
        (-f1 * s * u - q * mixed) * inverse,
        (p * mixed - f1 * r * v) * inverse,
        (r * f1 * u - p * f2 * u - q * r * f3) * inverse,
    )
    residual = torch.maximum(torch.maximum(f1.abs(), f2.abs()), f3.abs())
    return residual, torch.stack(step)


def _isolated_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The real root of x³ + a x² + b x + c farthest from the other two (the best conditioned)."""
    Q = (a * a - 3 * b) / 9
    half = (2 * a**3 - 9 * a * b + 27 * c) / 54
    gap = half.square() - Q**3
    sign = torch.where(half < 0, -torch.ones_like(half), torch.ones_like(half))
    root_Q = Q.clamp_min(1e-300).sqrt()
    ratio = (half.abs() / root_Q**3).clamp(0, 1)
    three_real = 2 * root_Q * torch.cos(torch.acos(ratio) / 3)
    A = (half.abs() + gap.clamp_min(0).sqrt()).clamp_min(1e-300) ** (1 / 3)
    one_real = A + Q / A
    x = -sign * torch.where(gap < 0, three_real, one_real) - a / 3
    for _ in range(2):
        slope = (3 * x + 2 * a) * x + b
        value = ((x + a) * x + b) * x + c
        x = torch.where(slope.abs() > 1e-12, x - value / slope, x)
    return x


def _line_pair(C: Tensor) -> tuple[Tensor, Tensor]:
    """The two lines (3, 2, B) of degenerate conics (6, B), and whether they are real (B,).

    Richter-Gebert, "Perspectives on Projective Geometry", 11.1: C + [p]× has rank one, where p
    is the meeting point of the lines, read off a column of the adjugate.
    """
    B = _adjugate(C)
    diagonal = -B[[0, 3, 5]]
    largest, k = diagonal.max(0)
    columns = torch.stack([B[[0, 1, 2]], B[[1, 3, 4]], B[[2, 4, 5]]])
    p = columns.gather(0, k.expand(1, 3, -1))[0] / largest.clamp_min(1e-300).sqrt()
    rank_one = torch.stack(
        [
            torch.stack([C[0], C[1] - p[2], C[2] + p[1]]),
            torch.stack([C[1] + p[2], C[3], C[4] - p[0]]),
            torch.stack([C[2] - p[1], C[4] + p[0], C[5]]),
        ]
    )
    pivot = rank_one.reshape(9, -1).abs().argmax(0)
    row = rank_one.gather(0, (pivot // 3).expand(1, 3, -1))[0]
    column = rank_one.gather(1, (pivot % 3).expand(3, 1, -1))[:, 0]
    lines = torch.stack([row, column], 1)
    return lines / lines.abs().amax(0), largest > 0


def _line_conic(lines: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Where lines (3, 2, B) meet conics (6, B): points (3, 4, B), and if they are real (4, B)."""
    axis = torch.nn.functional.one_hot(lines.abs().argmin(0), 3).to(lines.dtype).permute(2, 0, 1)
    u = _cross(lines, axis)
    v = _cross(lines, u)
    C = C[:, None]
    Cu, Cv = _times(C, u), _times(C, v)
    # The point x u + y v lies on the conic: gamma x² + 2 beta x y + alpha y² = 0.
    alpha, beta, gamma = (v * Cv).sum(0), (u * Cv).sum(0), (u * Cu).sum(0)
    gap = beta.square() - alpha * gamma
    size = beta.square() + alpha.abs() * gamma.abs()
    q = -(beta + torch.where(beta < 0, -1.0, 1.0) * gap.clamp_min(0).sqrt())
    points = torch.cat([alpha * u + q * v, q * u + gamma * v], 1)
    points = points / points.abs().amax(0).clamp_min(1e-300)
    real = gap > -1e-9 * size  # a double root may come out slightly complex
    return points, torch.cat([real, real])


def _adjugate(C: Tensor) -> Tensor:
    """Adjugate of symmetric matrices (6, ...) = (00, 01, 02, 11, 12, 22)."""
    a, b, c, d, e, f = C
    return torch.stack(
        [d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b]
    )


def _trace(A: Tensor, B: Tensor) -> Tensor:
    """Trace of the product of two symmetric matrices (6, ...)."""
    P = A * B
    return P[0] + P[3] + P[5] + 2 * (P[1] + P[2] + P[4])


def _times(C: Tensor, v: Tensor) -> Tensor:
    """Product of symmetric matrices (6, ...) and vectors (3, ...)."""
    a, b, c, d, e, f = C
    x, y, z = v
    return torch.stack([a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z])


def _cross(u: Tensor, v: Tensor) -> Tensor:
    """Cross product along the first dimension."""
    return torch.stack(
        [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
    )


def _frame(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """Orthonormal frames of triangles: (axis, coordinate, ...) from corners (coordinate, ...)."""
    first = q - p
    first = first / first.square().sum(0).sqrt()
    normal = _cross(first, r - p)
    normal = normal / normal.square().sum(0).sqrt()
    return torch.stack([first, _cross(normal, first), normal])
