"""The lens of posed images from their matches: focal length, its ratio in y and x, principal point and one
radial term.

Each is freed only as far as the data bear it, and beside the errors of the reference poses.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from localization.absolute_pose import rotation_from_vector
from localization.cameras import undistorted
from localization.posed_pairs import MIN_MATCHES, PosedPairs
from localization.readings import SAMPSON_PX, as_rays, gains, sampson, sampson_by_pose

# Parameters of a lens.
LENS = 5
# A parameter of the lens is freed when it is so many sigmas off.
_SIGNIFICANT = 4.0


@dataclass(frozen=True)
class PosedMatches:
    """Matched pairs of known relative poses, by which a lens is judged.

    A lens is (log f, dx, dy, k1, log a), a tensor (LENS,): focal length, shift of the principal
    point, both in longer image sides, radial distortion, the factor a of the ratio of fy to fx. Of
    pairs of images with two lenses, own_a, own_b
    (P,) say which side has the one in question; the other has `rest`.
    """

    pairs: PosedPairs
    R: Tensor
    t: Tensor
    limit: float
    rest: Tensor | None = None
    own_a: Tensor | None = None
    own_b: Tensor | None = None

    def with_baseline(self) -> "PosedMatches":
        """The pairs taken from two places: the others have no epipolar lines to be off."""
        keep = self.t.norm(dim=1) > 0.5
        own_a, own_b = (own if own is None else own[keep] for own in (self.own_a, self.own_b))
        of_pairs = {"R": self.R[keep], "t": self.t[keep], "own_a": own_a, "own_b": own_b}
        return replace(self, pairs=self.pairs.select(keep), **of_pairs)

    def rays(self, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Rays of all matches (P, m, 3), twice."""
        return self._side(self.pairs.uv_a, lens, self.own_a), self._side(
            self.pairs.uv_b, lens, self.own_b
        )

    def _side(self, uv: Tensor, lens: Tensor, own: Tensor | None) -> Tensor:
        parameters = lens.expand(len(uv), LENS)
        if own is not None:
            parameters = torch.where(own[:, None], parameters, self.rest)
        log_f, shift, k1, taller = parameters[:, None].split([1, 2, 1, 1], dim=-1)
        xy = (uv - shift) / torch.cat([log_f, log_f + taller], dim=-1).exp()
        xy = undistorted(xy, k1, 0.0) if bool(k1.any()) else xy
        return as_rays(xy, 1.0)

    def gains(self, lens: Tensor, slack: float = 1.0) -> tuple[Tensor, Tensor]:
        """`readings.gains` (P, m) of the matches, within `slack` times the limit."""
        limit = slack * self.limit / float(lens[0].exp())
        near, far = gains(self.R, self.t, *self.rays(lens), limit)
        return near.where(self.pairs.used, 0.0), far.where(self.pairs.used, 0.0)

    def score(self, lens: Tensor) -> float:
        """Matches explained, the closely explained ones more."""
        return float(self.gains(lens)[0].sum())

    def shares(self, lens: Tensor) -> tuple[float, float]:
        """Shares of the matches explained, and explained as far points."""
        count = max(1, int(self.pairs.used.sum()))
        return tuple(float((gain > 0).sum()) / count for gain in self.gains(lens))

    def moved(self, by: Tensor) -> "PosedMatches":
        """The same with relative poses moved by (P, 6): a small rotation after R, and what is
        added to t.
        """
        t = torch.nn.functional.normalize(self.t + by[:, 3:], dim=1)
        return replace(self, R=rotation_from_vector(by[:, :3]) @ self.R, t=t)

    def residuals(self, lens: Tensor) -> Tensor:
        """Signed Sampson distances (P, m) in pixels."""
        return sampson(self.R, self.t, *self.rays(lens)) * self._px(lens)

    def residuals_by_pose(self, lens: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals and their derivatives (P, m, 6) by what `moved` takes."""
        return tuple(v * self._px(lens) for v in sampson_by_pose(self.R, self.t, *self.rays(lens)))

    def _px(self, lens: Tensor) -> float:
        return float(lens[0].exp()) * SAMPSON_PX / self.limit


@dataclass(frozen=True)
class Step:
    """Parameters that are freed together.

    beside: what is free with them while it is decided, lest they do another's work; least: the
    smallest change that matters; stays: explaining this share of the matches is enough to stay.
    """

    parameters: list[int]
    beside: list[int]
    least: float = 0.0
    stays: float = 1.0


FOCAL, TALLER, CENTER, K1 = (
    Step([0], [], stays=0.98),
    Step([4], [0], least=0.01, stays=0.98),
    Step([1, 2], [0], least=0.002),
    Step([3], [0, 1, 2], least=0.01),
)


def refined(lens: PosedMatches, start: Tensor, focal: float, steps: list[Step]) -> Tensor:
    """The lens `start` with the parameters that the data bear freed, step by step; `focal`: where
    the first begins.

    What is free beside a parameter stays free with it, where it has a step of its own.
    """
    best, free = start, []
    allowed = [k for step in steps for k in step.parameters]
    for step in steps:
        begin = best.clone()
        if step is FOCAL:
            begin[0] = np.log(focal)
        if step is TALLER:
            shapes = [begin + torch.tensor([0, 0, 0, 0, shape]) for shape in _SHAPES]
            begin = max(shapes, key=lens.score)
        beside = step.beside + step.parameters
        found, sigma = _gauss_newton(lens, begin, beside)
        off, sigma = (found - best)[step.parameters].abs(), sigma[len(step.beside) :]
        if not bool(((off > _SIGNIFICANT * sigma) & (off > step.least)).any()):
            continue
        together = sorted({*free, *(k for k in beside if k in allowed)})
        if beside != together:
            found, _ = _gauss_newton(lens, begin, together)
        if lens.score(best) < step.stays * lens.score(found):
            best, free = found, together
    return best


# Gauss-Newton: matches of a pair, most steps, the longest and the shortest, difference for
# derivatives.
_REFINED_MATCHES, _STEPS, _LONGEST, _SHORTEST, _DELTA = 150, 20, 0.1, 1e-4, 1e-5
# Where the ratio of fy to fx may begin, in logs.
_SHAPES = (0.0, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3)
# First guess of the errors of relative rotations and directions in radians.
_POSE_SIGMA = 0.005


def _gauss_newton(lens: PosedMatches, start: Tensor, free: list[int]) -> tuple[Tensor, Tensor]:
    """The lens (LENS,) after robust steps in the free parameters, and their standard deviations.

    Cauchy weights on the Sampson distances of the inliers. The reference poses have errors of
    their own, common to all matches of a pair: its relative pose moves along, held by a prior as
    wide as such errors turn out to be (empirical Bayes), and is eliminated (Schur complement).
    The deviations are those of sums over images, all of whose pairs err together (a sandwich
    estimate), not of sums over matches.
    """
    lens = replace(lens, pairs=lens.pairs.first(_REFINED_MATCHES)).with_baseline()
    parameters, count = start.clone(), len(free)
    sigma = torch.full((count,), torch.inf, dtype=torch.float64)
    a, b = lens.pairs.a, lens.pairs.b
    images = len(torch.cat([a, b]).unique())
    by = lens.R.new_zeros(len(a), 6)
    spread = by.new_full((6,), _POSE_SIGMA)
    for _ in range(_STEPS):
        posed = lens.moved(by)
        inlier = posed.gains(parameters, slack=2.0)[0] > 0
        if images <= count or int(inlier.sum()) < MIN_MATCHES:
            return start, torch.full_like(sigma, torch.inf)
        r, by_pose = posed.residuals_by_pose(parameters)
        columns = []
        for k in free:
            other = parameters.clone()
            other[k] += _DELTA
            columns.append((posed.residuals(other) - r) / _DELTA)
        J = torch.cat([torch.stack(columns, dim=-1), by_pose], dim=-1)
        JW = J * (inlier / (1 + r.square()))[..., None]
        normal, gradient = JW.transpose(1, 2) @ J, (JW * r[..., None]).sum(1)
        normal[:, count:, count:] += torch.diag(spread**-2)
        gradient[:, count:] += by / spread**2
        inverse = torch.linalg.inv(normal[:, count:, count:])
        eliminate = normal[:, :count, count:] @ inverse
        of_pair = gradient[:, :count] - (eliminate @ gradient[:, count:, None])[..., 0]
        covariance = torch.linalg.pinv(
            (normal[:, :count, :count] - eliminate @ normal[:, count:, :count]).sum(0)
        )
        step = -(covariance @ of_pair.sum(0)).clamp(-_LONGEST, _LONGEST)
        by = (
            by
            - (inverse @ (gradient[:, count:] + normal[:, count:, :count] @ step)[..., None])[
                ..., 0
            ]
        )
        spread = (by.square() + inverse.diagonal(dim1=1, dim2=2)).mean(0).sqrt()
        parameters[free] += step
        of_image = of_pair.new_zeros(int(torch.maximum(a, b).max()) + 1, count)
        of_image.index_add_(0, a, of_pair).index_add_(0, b, of_pair)
        meat = of_image.T @ of_image * (images / (images - count))
        sigma = (covariance @ meat @ covariance).diagonal().clamp_min(0).sqrt()
        if bool((step.abs() < _SHORTEST).all()):
            break
    return parameters, sigma
