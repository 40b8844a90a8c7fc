"""The last least-squares problem of a query's pose: jointly with the points of its tracks, and with its
lens where that is asked for.
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
from localization.scoring import Evidence, match_errors, match_slopes

# Robust threshold in standard deviations. The last step has a lower one, that what errs least decides:
# most keypoints are located far better than their scale says.
THRESHOLD_SIGMA, FINE_SIGMA = 2.0, 0.7
STEPS = 15
# With so many tracks matches without points begin to count for less: what nothing confirms errs together
# where things repeat.
FEW_TRACKS = 60
# What a lens may differ in: focal length, the ratio of fy to fx, principal point.
LENS = 4
# Parts of an image, a side, in which errors act together.
CELLS = 4
# Difference for derivatives by the lens, whose unit is the focal length.
_DELTA = 1e-3


@dataclass(frozen=True)
class Polished:
    """A pose after the last refinement, and what it was refined on.

    covariance (6, 6): of (rotation vector in radians about the camera's axes, to be applied on the left
    of R, center in meters); tracks: how many agree, with the matches that have no point; camera: the
    query's, with lens_sigma (lens,), the standard deviations of what of it was refined too; observed:
    the tracks.
    """

    R_cam_from_world: Tensor
    c_world: Tensor
    covariance: Tensor
    tracks: int
    camera: Camera
    lens_sigma: Tensor
    observed: "Tracks"

    @property
    def fit(self) -> float:
        """The share 0..1 of what it was refined on that agrees."""
        return self.tracks / max(1, len(self.observed))


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

    def __len__(self) -> int:
        return len(self.xy_px) + (len(self.single) if self.single is not None else 0)


@dataclass(frozen=True)
class _Problem:
    """Errors of a pose R (3, 3) and v (3 + LENS,), in standard deviations: center (3,), logs of the
    factors of both focal lengths and of fy alone, the principal point's shift over the focal
    length; lens: how many of the last are free.

    whiten (n, 2, 2): of the tracks' errors; away_m: about how far away things are; threshold: of the
    robust loss.
    """

    camera: Camera
    tracks: Tracks
    lens: int
    whiten: Tensor
    away_m: float
    threshold: float = THRESHOLD_SIGMA

    @classmethod
    def of(cls, camera: Camera, R: Tensor, c: Tensor, tracks: Tracks, lens: int) -> "_Problem":
        away_m = float((tracks.position - c).norm(dim=1).median())
        plain = cls(camera, tracks, lens, torch.eye(2).to(R), away_m)
        _, xy, depth = _seen(tracks.position, R, c)
        J = plain._by_point(xy, depth, torch.cat([c, c.new_zeros(LENS)])) @ R
        spread = torch.eye(2).to(R) + J @ tracks.covariance @ J.transpose(1, 2)
        factor, failed = torch.linalg.cholesky_ex(spread)
        whiten = torch.linalg.inv_ex(factor)[0] / tracks.noise_px[:, None, None]
        return replace(plain, whiten=torch.where((failed == 0)[:, None, None], whiten, 0.0))

    def camera_at(self, v: Tensor) -> Camera:
        """The camera with the lens that v tells."""
        c, (fx, fy) = self.camera, self._focal_at(v).tolist()
        shift = (self._focal().mean() * v[5:]).tolist()
        return replace(c, fx=fx, fy=fy, cx=c.cx + shift[0], cy=c.cy + shift[1])

    def terms(self, R: Tensor, v: Tensor, derived: bool = True) -> list[tuple[Tensor, ...]]:
        """Errors (n, k), weights (n,) and, if derived, derivatives (n, k, 6 + lens): of tracks, and
        of matches without points.
        """
        terms = [self._of_tracks(R, v, derived)]
        if self.tracks.single is not None:
            terms.append(self._of_single(R, v, derived))
        return terms

    def _focal(self) -> Tensor:
        return torch.tensor([self.camera.fx, self.camera.fy], dtype=torch.float64)

    def _focal_at(self, v: Tensor) -> Tensor:
        return self._focal() * torch.stack([v[3], v[3] + v[4]]).exp()

    def _by_point(self, xy: Tensor, depth: Tensor, v: Tensor) -> Tensor:
        """Derivatives (n, 2, 3) of the pixels by points xy (n, 2), depth (n, 1) in camera axes."""
        eye = torch.eye(2).to(xy).expand(len(xy), 2, 2)
        return (self._focal_at(v) / depth)[:, :, None] * torch.cat([eye, -xy[..., None]], dim=2)

    def _of_tracks(self, R: Tensor, v: Tensor, derived: bool) -> tuple[Tensor, ...]:
        local, xy, depth = _seen(self.tracks.position, R, v[:3])
        zoomed, size = xy * self._focal_at(v), self._focal().mean()
        center = torch.tensor([self.camera.cx, self.camera.cy], dtype=torch.float64)
        r = zoomed + center + size * v[5:] - self.tracks.xy_px
        error, weight = (self.whiten @ r[..., None])[..., 0], torch.ones_like(r[:, 0])
        if not derived:
            return error, weight
        turn = torch.cat([-skew(local), (-R).expand(len(r), 3, 3)], dim=2)
        zoomed, eye = zoomed[..., None], torch.eye(2).to(xy).expand(len(xy), 2, 2)
        by_lens = torch.cat([zoomed, zoomed * eye[..., 1:], size * eye], dim=2)
        J = torch.cat([self._by_point(xy, depth, v) @ turn, by_lens[..., : self.lens]], dim=2)
        return error, weight, self.whiten @ J

    def _of_single(self, R: Tensor, v: Tensor, derived: bool) -> tuple[Tensor, ...]:
        """They err across their epipolar lines; one that cannot be errs without bound."""
        single, pose = self.tracks.single, (R[None], v[None, :3])
        noise = (single.noise_px.double() * max(1.0, len(self.tracks.noise_px) / FEW_TRACKS))[
            :, None
        ]

        def errors(v: Tensor) -> Tensor:
            error, possible = match_errors(single.seen_with(self.camera_at(v)), *pose)
            return torch.where(possible > 0, error[:, 0], torch.inf)[0][:, None] / noise

        error, weight = errors(v), single.weight.double()
        if not derived:
            return error, weight
        slopes = match_slopes(single.seen_with(self.camera_at(v)), *pose, self.away_m)[2]
        columns = [slopes[0, :, 0].T / noise]
        for k in range(self.lens):
            other = v.clone()
            other[3 + k] += _DELTA
            columns.append((errors(other) - error) / _DELTA)
        J = torch.cat(columns, dim=1)[:, None].nan_to_num(0.0, 0.0, 0.0)
        return error, weight, J

    def cost(self, R: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        costs = [
            (weight * robust_loss(r.square().sum(1), self.threshold)[0]).sum()
            for r, weight, *_ in self.terms(R[0], v[0], derived=False)
        ]
        return torch.stack(costs).sum()[None]

    def normal_equations(self, R: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        normal = gradient = 0.0
        for r, weight, J in self.terms(R[0], v[0]):
            slope = robust_loss(r.square().sum(1), self.threshold)[1]
            JW = J * (weight * slope)[:, None, None]
            normal = normal + torch.einsum("nki,nkj->ij", JW, J)
            gradient = gradient + torch.einsum("nki,nk->i", JW, r.where(r.isfinite(), 0.0))
        return normal[None], gradient[None]


def _seen(points: Tensor, R: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points (n, 3) in the axes of a camera at a pose, the same with z = 1 (n, 2), and their depths (n, 1)."""
    local = (points - c) @ R.T
    depth = local[:, 2:].clamp_min(1e-6)
    return local, local[:, :2] / depth, depth


def _move(R: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    delta = torch.nn.functional.pad(delta, (0, 6 + LENS - delta.shape[1]))
    return rotation_from_vector(delta[:, :3]) @ R, v + delta[:, 3:]


def refine_with_points(
    camera: Camera, R: Tensor, c: Tensor, tracks: Tracks, *, lens: int = 0
) -> Polished:
    """The pose of a camera from tracks whose points are free to move, and with it as much of the
    lens as is asked for.

    lens: 0 nothing, 1 the focal length, LENS the ratio of fy to fx and the principal point too.
    Eliminating the points from the joint least-squares problem (Schur complement, index cameras
    fixed, linearized at the points) leaves each reprojection error weighed by the inverse of noise^2
    (I + J covariance J^T), J = d(pixel)/d(point): a point from a short baseline counts only across
    the direction it may slide in. A match without a point counts across its epipolar line. Cauchy
    loss.
    """
    problem = _Problem.of(camera, R, c, tracks, lens)
    return _polished(problem, *_solved(problem, R, c))


def _solved(problem: _Problem, R: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.cat([c, c.new_zeros(LENS)])
    of_problem = problem.cost, problem.normal_equations
    R, v, _ = levenberg_marquardt(R[None], v[None], *of_problem, _move, STEPS)
    return R[0], v[0]


def finely(pose: Polished) -> tuple[Tensor, Tensor]:
    """R_cam_from_world (3, 3) and c_world (3,) of the pose moved to what errs least of its tracks."""
    start = pose.R_cam_from_world, pose.c_world
    problem = _Problem.of(pose.camera, *start, pose.observed, 0)
    R, v = _solved(replace(problem, threshold=FINE_SIGMA), *start)
    return R, v[:3]


def with_free_lens(pose: Polished) -> Polished:
    """The pose with the covariance that it has as one whose lens might be any other."""
    tracks, v = pose.observed, torch.cat([pose.c_world, pose.c_world.new_zeros(LENS)])
    problem = _Problem.of(pose.camera, pose.R_cam_from_world, pose.c_world, tracks, LENS)
    free = _polished(problem, pose.R_cam_from_world, v)
    return replace(pose, covariance=free.covariance)


def _polished(problem: _Problem, R: Tensor, v: Tensor) -> Polished:
    """A refined pose and lens with its covariance and what agrees with it.

    Where the lens is free the covariance is a sandwich estimate over CELLS x CELLS parts of the
    image: errors of points, which come from index poses, act together on a lens.
    """
    tracks, lens = problem.tracks, problem.lens
    information, left, freedom, agree = 0.0, 0.0, -6 - lens, 0
    of_cells = torch.zeros(CELLS**2, 6 + lens, dtype=torch.float64)
    for (r, weight, J), of in zip(problem.terms(R, v), (tracks, tracks.single)):
        inlier = r.square().sum(1) < THRESHOLD_SIGMA**2
        r, weight, J = r[inlier], weight[inlier], J[inlier]
        information = information + torch.einsum("nki,n,nkj->ij", J, weight, J)
        if lens:
            gradient = torch.einsum("nki,n,nk->ni", J, weight, r)
            of_cells.index_add_(0, _cells(of.xy_px[inlier]), gradient)
        left, freedom = left + (weight * r.square().sum(1)).sum(), freedom + r.numel()
        agree += len(r)
    known, variance = torch.tensor([freedom > 0]), left / max(1, freedom)
    spread = scaled_inverse(information[None], variance[None], known)[0]
    lens_sigma = spread.diagonal()[6:].clamp_min(0).sqrt()
    camera = problem.camera_at(v)
    if lens and bool(spread.isfinite().all()):
        inverse = spread / variance.clamp_min(1e-12)
        spread = inverse @ of_cells.T @ of_cells @ inverse
    return Polished(R, v[:3], spread[:6, :6], agree, camera, lens_sigma, tracks)


def _cells(xy_px: Tensor) -> Tensor:
    """Number of the cell, of CELLS x CELLS over all of them, of positions (n, 2)."""
    if len(xy_px) == 0:
        return torch.zeros(0, dtype=torch.long)
    low, high = xy_px.amin(0), xy_px.amax(0)
    column, row = ((xy_px - low) / (high - low + 1e-9) * CELLS).long().clamp_max(CELLS - 1).T
    return row * CELLS + column
