"""Convention of the pose file and focal length of the camera, found from matches of posed index images.

For every convention (quaternion order x direction x 24 camera axes) and focal length the poses of two index images say
where a match may lie; the right hypothesis explains the most matches. The world frame cancels, and wrong focal lengths
spoil the vote on the convention, so both are searched together. Weak evidence decides for what was assumed before.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localization.cameras import (
    OPENCV,
    OPENGL,
    TARTANAIR,
    Camera,
    Convention,
    all_conventions,
    poses_from_file,
)
from localization.matching import View, mutual_matches

MIN_PAIRS, MIN_IMAGES, MIN_MATCHES = 6, 4, 30
MIN_MARGIN, MIN_INLIER_SHARE = 1.5, 0.3
SAMPSON_PX = 3.0
FOCAL_STEPS, FOCAL_RANGE = 37, (0.3, 2.0)
MATCH_RATIO = 0.9
MAX_PAIRS, PARTNERS = 40, 4
COARSE_MATCHES, FINE_MATCHES = 60, 400
# Keypoints an image whose matches tell which pairs overlap.
_SKETCH = 300
# A focal length or principal point is refined away from the prior when it is this many sigmas off, and this sure.
_SIGNIFICANT, _FOCAL_SIGMA, _CENTER_SIGMA_PX = 4.0, 0.01, 1.5
# The prior focal length stays where it explains this share of what the best one does.
_FLAT_BASIN = 0.98


@dataclass(frozen=True)
class Calibration:
    """What was found out about one camera, and on what evidence.

    margin: score of the winning convention over the runner-up's; pairs, images, matches: the evidence; inlier_share:
    of the matches, those the winner explains; convention_from, focal_from: "evidence", "prior" or "given".
    """

    convention: Convention
    camera: Camera
    margin: float
    pairs: int
    images: int
    inlier_share: float
    convention_from: str
    focal_from: str

    def describe(self) -> str:
        """One line for the screen."""
        c = self.camera
        return (
            f"{self.convention.describe()} ({self.convention_from}, margin {self.margin:.1f} from {self.pairs} pairs of "
            f"{self.images} images, {100 * self.inlier_share:.0f} % of matches explained), f {c.fx:.1f} {c.fy:.1f} "
            f"center {c.cx:.1f} {c.cy:.1f} px ({self.focal_from})"
        )

    def as_dict(self) -> dict:
        """Plain values for metrics.json."""
        c = self.camera
        return {
            "convention": self.convention.describe(),
            "fx": c.fx,
            "fy": c.fy,
            "cx": c.cx,
            "cy": c.cy,
            "margin": self.margin,
            "pairs": self.pairs,
            "images": self.images,
            "inlier_share": self.inlier_share,
            "convention_from": self.convention_from,
            "focal_from": self.focal_from,
        }


def calibrate(
    views: list[View],
    pose7: np.ndarray,
    camera: Camera,
    focal_known: bool,
    convention: Convention | None = None,
) -> Calibration:
    """Convention and camera of index images from their features and the rows (n, 7) of their pose file.

    camera: the known one, or the first guess; convention: given by the user, or None to find it out. Rows of NaN are
    left out.
    """
    posed = torch.isfinite(torch.as_tensor(pose7)).all(1).nonzero()[:, 0].tolist()
    pairs = _matched_pairs([views[i] for i in posed])
    pose7 = torch.as_tensor(pose7, dtype=torch.float64)[posed].to(pairs.xy_a.device)
    candidates = [convention] if convention else all_conventions()
    focals = [camera.fx] if focal_known else _focal_grid(camera)
    scores = _coarse_scores(pairs.first(COARSE_MATCHES), pose7, candidates, focals, camera, focal_known)
    chosen, margin, decided = _decide(scores.amax(1), candidates, pairs)
    best_focal = focals[int(scores[candidates.index(chosen)].argmax())]

    enough = pairs.enough() and (decided or convention is not None)
    refined, focal_from = camera, "given" if focal_known else "prior"
    if not focal_known and enough:
        refined, focal_from = _refine_camera(pairs, poses_from_file(pose7, chosen), camera, best_focal)
    share = float(_inlier_share(pairs, poses_from_file(pose7, chosen), refined))
    source = "given" if convention else "evidence" if decided else "prior"
    return Calibration(chosen, refined, margin, len(pairs.a), pairs.images(), share, source, focal_from)


@dataclass(frozen=True)
class _Pairs:
    """P matched image pairs: image numbers a, b (P,); positions xy_a, xy_b (P, m, 2) in pixels, used (P, m)."""

    a: Tensor
    b: Tensor
    xy_a: Tensor
    xy_b: Tensor
    used: Tensor

    def first(self, count: int) -> "_Pairs":
        """The pairs with their first `count` matches only."""
        return _Pairs(self.a, self.b, self.xy_a[:, :count], self.xy_b[:, :count], self.used[:, :count])

    def images(self) -> int:
        """Number of images that take part."""
        return len(torch.cat([self.a, self.b]).unique())

    def enough(self) -> bool:
        """Whether there is evidence enough to decide anything."""
        return len(self.a) >= MIN_PAIRS and self.images() >= MIN_IMAGES


def _matched_pairs(views: list[View]) -> _Pairs:
    """Matches of overlapping pairs with at least MIN_MATCHES each, most distinct matches first."""
    rows = []
    for i, j in _overlapping(views):
        m = mutual_matches(views[i].features, views[j].features)
        m = m.select(m.ratio <= MATCH_RATIO)
        if len(m) >= MIN_MATCHES:
            m = m.select(m.ratio.argsort(stable=True)[:FINE_MATCHES])
            rows.append((i, j, views[i].features.xy_px[m.a], views[j].features.xy_px[m.b]))
    device = views[0].features.xy_px.device if views else torch.device("cpu")
    xy_a = torch.zeros(len(rows), FINE_MATCHES, 2, dtype=torch.float64, device=device)
    xy_b, used = torch.zeros_like(xy_a), torch.zeros(xy_a.shape[:2], dtype=torch.bool, device=device)
    for row, (_, _, a, b) in enumerate(rows):
        xy_a[row, : len(a)], xy_b[row, : len(b)] = a.double(), b.double()
        used[row, : len(a)] = True
    numbers = torch.tensor([[i, j] for i, j, _, _ in rows], dtype=torch.long, device=device).reshape(-1, 2)
    return _Pairs(numbers[:, 0], numbers[:, 1], xy_a, xy_b, used)


def _overlapping(views: list[View]) -> list[tuple[int, int]]:
    """At most MAX_PAIRS pairs that probably overlap, spread over the images, from their strongest keypoints alone.

    Of an image's partners, sorted by matches, the first and every second of the following are taken: the most alike
    have the shortest baselines and tell least about the translation.
    """
    sketches = [v.features.descriptors[:_SKETCH] for v in views]
    n = len(views)
    count = torch.zeros(n, n)
    for i in range(n):
        for j in range(i + 1, n):
            if min(len(sketches[i]), len(sketches[j])) < 2:
                continue
            top, _ = (sketches[i] @ sketches[j].T).topk(2, dim=1)
            distance = (2 - 2 * top).clamp_min(0).sqrt()
            count[i, j] = count[j, i] = float((distance[:, 0] < 0.8 * distance[:, 1]).sum())
    ranked = []
    for i in range(n):
        order = [j for j in count[i].argsort(descending=True, stable=True).tolist() if count[i, j] >= 5]
        ranked += [(rank, min(i, j), max(i, j)) for rank, j in enumerate(order[: 2 * PARTNERS : 2])]
    pairs = list(dict.fromkeys((i, j) for _, i, j in sorted(ranked)))
    return pairs[:MAX_PAIRS]


def _focal_grid(camera: Camera) -> list[float]:
    """The prior focal length and log-spaced ones over FOCAL_RANGE of the longer image side, in pixels."""
    side = max(camera.width, camera.height)
    low, high = (np.log(side * v) for v in FOCAL_RANGE)
    return [camera.fx, *np.exp(np.linspace(low, high, FOCAL_STEPS)).tolist()]


def _relative(poses: tuple[Tensor, Tensor], pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """R_b_from_a (P, 3, 3) and unit t_b_from_a (P, 3); a baseline of zero stays zero."""
    R, c = poses
    R_b = R[pairs.b].transpose(1, 2)
    t = (R_b @ (c[pairs.a] - c[pairs.b])[..., None])[..., 0]
    return R_b @ R[pairs.a], t / t.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def _gains(R: Tensor, t: Tensor, x_a: Tensor, x_b: Tensor, limit: float) -> Tensor:
    """max(0, 1 - e^2 / limit^2) of the Sampson error of rays x_a, x_b (..., m, 3), z = 1, in front of both, (..., m).

    R, t (..., 3, 3), (..., 3). With n = t x R x_a the epipolar line is n, and depths are positive where R x_a, x_b and
    t turn the same way.
    """
    turned = x_a @ R.transpose(-1, -2)
    t = t[..., None, :].expand_as(turned)
    line_b = torch.linalg.cross(t, turned)
    line_a = torch.linalg.cross(x_b, t) @ R
    residual = (x_b * line_b).sum(-1)
    gradient2 = line_b[..., :2].square().sum(-1) + line_a[..., :2].square().sum(-1)
    error2 = residual.square() / gradient2.clamp_min(1e-20)
    normal = torch.linalg.cross(turned, x_b.expand_as(turned))
    front_b = (normal * torch.linalg.cross(turned, t)).sum(-1) > 0
    front_a = (normal * torch.linalg.cross(x_b.expand_as(t), t)).sum(-1) > 0
    return (1 - error2 / limit**2).clamp_min(0) * (front_a & front_b)


def _rays(xy_px: Tensor, focal: Tensor | float, center: Tensor) -> Tensor:
    """Rays (..., 3) with z = 1."""
    xy = (xy_px - center) / focal
    return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)


def _coarse_scores(
    pairs: _Pairs, pose7: Tensor, candidates: list[Convention], focals: list[float], camera: Camera, focal_known: bool
) -> Tensor:
    """Explained matches (conventions, focals): sum over pairs of the gains."""
    scores = torch.zeros(len(candidates), len(focals), dtype=torch.float64)
    if len(pairs.a) == 0:
        return scores
    relative = [_relative(poses_from_file(pose7, c), pairs) for c in candidates]
    R = torch.stack([r for r, _ in relative], dim=1).float()  # (P, conventions, 3, 3)
    t = torch.stack([v for _, v in relative], dim=1).float()
    center = torch.tensor([camera.cx, camera.cy], device=R.device)
    for column, focal in enumerate(focals):
        scale = torch.tensor([camera.fx, camera.fy] if focal_known else [focal, focal], device=R.device)
        x_a, x_b = (_rays(xy.float(), scale, center)[:, None] for xy in (pairs.xy_a, pairs.xy_b))
        gains = _gains(R, t, x_a, x_b, SAMPSON_PX / focal) * pairs.used[:, None]
        scores[:, column] = gains.sum(dim=(0, 2)).cpu().double()
    return scores


def _decide(best: Tensor, candidates: list[Convention], pairs: _Pairs) -> tuple[Convention, float, bool]:
    """(convention, margin over the runner-up, whether the evidence decided) from each candidate's best score (n,).

    TartanAir's convention is left only for a winner that stands out; where it is out of the running itself, the most
    common of those that nearly tie is taken.
    """
    if len(candidates) == 1:
        return candidates[0], 1.0, True
    order = best.argsort(descending=True, stable=True).tolist()
    margin = float(best[order[0]] / best[order[1]].clamp_min(1e-9))
    explained = float(best[order[0]]) / max(1, int(pairs.first(COARSE_MATCHES).used.sum()))
    if not pairs.enough() or explained < MIN_INLIER_SHARE:
        return TARTANAIR, margin, False
    if margin >= MIN_MARGIN:
        return candidates[order[0]], margin, True
    running = [candidates[i] for i in order if best[i] * MIN_MARGIN > best[order[0]]]
    for usual in (TARTANAIR, OPENCV, OPENGL):
        if usual in running:
            return usual, margin, False
    return candidates[order[0]], margin, False


def _inlier_share(pairs: _Pairs, poses: tuple[Tensor, Tensor], camera: Camera) -> Tensor:
    """Share of the matches within SAMPSON_PX and in front."""
    gains = _gains(*_relative(poses, pairs), *_camera_rays(pairs, _parameters(camera)), SAMPSON_PX / camera.fx)
    return ((gains > 0) & pairs.used).sum() / pairs.used.sum().clamp_min(1)


def _parameters(camera: Camera) -> Tensor:
    """(log f, cx, cy) of a camera with one focal length."""
    return torch.tensor([np.log(camera.fx), camera.cx, camera.cy], dtype=torch.float64)


def _camera_rays(pairs: _Pairs, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of all matches (P, m, 3), twice, for parameters (log f, cx, cy)."""
    p = parameters.to(pairs.xy_a.device)
    return _rays(pairs.xy_a, p[0].exp(), p[1:]), _rays(pairs.xy_b, p[0].exp(), p[1:])


def _residuals_px(pairs: _Pairs, R: Tensor, t: Tensor, parameters: Tensor) -> Tensor:
    """Signed Sampson distances (P, m) in pixels."""
    x_a, x_b = _camera_rays(pairs, parameters)
    turned = x_a @ R.transpose(-1, -2)
    t = t[:, None].expand_as(turned)
    line_b, line_a = torch.linalg.cross(t, turned), torch.linalg.cross(x_b, t) @ R
    gradient2 = line_b[..., :2].square().sum(-1) + line_a[..., :2].square().sum(-1)
    return (x_b * line_b).sum(-1) / gradient2.clamp_min(1e-20).sqrt() * parameters[0].exp()


def _refine_camera(
    pairs: _Pairs, poses: tuple[Tensor, Tensor], prior: Camera, focal: float
) -> tuple[Camera, str]:
    """Focal length from a coarse one, then the principal point, each only as far as the data bear it.

    Gauss-Newton with Cauchy weights on the Sampson distances of the inliers, numerical derivatives. Returns the camera
    and "evidence", or the prior and "prior" where the basin is flat.
    """
    R, t = _relative(poses, pairs)
    start = _parameters(prior)
    start[0] = np.log(focal)
    best, sigma = _gauss_newton(pairs, R, t, start, free=[0])
    at_best, at_prior = (_explained(pairs, R, t, p) for p in (best, _parameters(prior)))
    shift = abs(float(best[0] - np.log(prior.fx)))
    if at_prior >= _FLAT_BASIN * at_best or shift < _SIGNIFICANT * float(sigma[0]) or float(sigma[0]) > _FOCAL_SIGMA:
        return prior, "prior"
    full, sigma = _gauss_newton(pairs, R, t, best, free=[0, 1, 2])
    off = (full[1:] - start[1:]).abs()
    if bool((sigma[1:] < _CENTER_SIGMA_PX).all()) and bool((off > _SIGNIFICANT * sigma[1:]).any()):
        best = full if _explained(pairs, R, t, full) > at_best else best
    f = float(best[0].exp())
    return Camera(f, f, float(best[1]), float(best[2]), prior.width, prior.height), "evidence"


def _explained(pairs: _Pairs, R: Tensor, t: Tensor, parameters: Tensor) -> float:
    """Sum of the gains at parameters (log f, cx, cy)."""
    x_a, x_b = _camera_rays(pairs, parameters)
    limit = SAMPSON_PX / float(parameters[0].exp())
    return float((_gains(R, t, x_a, x_b, limit) * pairs.used).sum())


def _gauss_newton(
    pairs: _Pairs, R: Tensor, t: Tensor, start: Tensor, free: list[int], steps: int = 15
) -> tuple[Tensor, Tensor]:
    """Parameters (3,) after robust steps in the free ones, and standard deviations (of the free ones, in order)."""
    parameters, delta = start.clone(), torch.tensor([1e-4, 1e-2, 1e-2], dtype=torch.float64)
    longest = torch.tensor([0.1, 20.0, 20.0], dtype=torch.float64)
    covariance = torch.eye(len(free), dtype=torch.float64)
    for _ in range(steps):
        x_a, x_b = _camera_rays(pairs, parameters)
        inlier = (_gains(R, t, x_a, x_b, 2 * SAMPSON_PX / float(parameters[0].exp())) > 0) & pairs.used
        if int(inlier.sum()) < MIN_MATCHES:
            return start, torch.full((len(free),), torch.inf, dtype=torch.float64)
        r = _residuals_px(pairs, R, t, parameters)[inlier]
        columns = []
        for k in free:
            moved = parameters.clone()
            moved[k] += delta[k]
            columns.append((_residuals_px(pairs, R, t, moved)[inlier] - r) / delta[k])
        J = torch.stack(columns, dim=1)
        weight = 1 / (1 + r.square())
        normal = (J * weight[:, None]).T @ J
        covariance = torch.linalg.pinv(normal).cpu() * float((weight * r.square()).sum() / weight.sum())
        step = (torch.linalg.pinv(normal) @ (J * weight[:, None]).T @ r).cpu()
        parameters[free] -= torch.minimum(step.abs(), longest[free]) * step.sign()
    return parameters, covariance.diagonal().clamp_min(0).sqrt()
