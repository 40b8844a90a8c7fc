"""The scale of a relative pose, from matches with further posed views (E5+1); see relative_pose.py
for the conventions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from localization.absolute_pose import SCORE_CHUNK, robust_loss
from localization.relative_pose import homogeneous

SCALE_CANDIDATES = 1000  # at most so many single-match scales are tried


@dataclass(frozen=True)
class ScaleEstimate:
    """Length of a baseline in the unit of the posed views, its standard deviation, inliers (m,)."""

    scale: float
    sigma: float
    inliers: Tensor


def scale_from_other_views(
    c_a: Tensor,
    direction: Tensor,
    R_world_from_query: Tensor,
    xy_query: Tensor,
    R_world_from_view: Tensor,
    c_view: Tensor,
    xy_view: Tensor,
    threshold: float,
    *,
    weights: Tensor | None = None,
) -> ScaleEstimate | None:
    """How far along c_a + s · direction the query is, from matches with further posed views (E5+1).

    c_a (3,), direction (3,), R_world_from_query (3, 3): see `query_in_world`. Match i joins
    xy_query[i] with xy_view[i] (m, 2) in the view of pose R_world_from_view[i] (m, 3, 3),
    c_view[i] (m, 3); weights (m,) or None. Views may repeat; matches with view a itself tell
    nothing. threshold on the Sampson distance.

    The epipolar constraint (c_view − c_a − s d) · (r_view × r_query) = 0 is linear in s. Each
    match proposes its s; the best by MSAC, depths positive, is refined by reweighted least squares
    over all matches. Returns None unless two matches agree on a scale > 0.
    """
    matches = [v.to(torch.float64) for v in (xy_query, R_world_from_view, c_view, xy_view)]
    m = len(xy_query)
    w = matches[0].new_ones(m) if weights is None else weights.to(matches[0])
    finite = torch.stack([torch.isfinite(v).flatten(1).all(1) for v in matches]).all(0)
    w = torch.where(finite, w, 0.0)
    matches = [torch.nan_to_num(v, 0.0, 0.0, 0.0) for v in matches]
    lines = _ScaleLines.build(c_a, direction, R_world_from_query, *matches)
    proposals = -lines.value[0] / lines.value[1]
    useful = torch.isfinite(proposals) & (proposals > 0) & (w > 0)
    proposals, sensitivity = proposals[useful], lines.value[1][useful].abs()
    steepest = torch.topk(sensitivity, min(SCALE_CANDIDATES, len(sensitivity))).indices
    proposals = proposals[steepest]
    if len(proposals) == 0:
        return None
    step = max(1, SCORE_CHUNK // m)
    scores = torch.cat([lines.score(part, w, threshold) for part in proposals.split(step)])
    scale = proposals[scores.argmax()]
    for _ in range(10):
        squared, size, front = lines.errors(scale[None])
        _, slope = robust_loss(squared[0], threshold)
        pull = w * slope * front[0] / size[0]
        information = (pull * lines.value[1].square()).sum()
        scale = -(pull * lines.value[0] * lines.value[1]).sum() / information
    squared, size, front = lines.errors(scale[None])
    inliers = (squared[0] < threshold**2) & front[0] & (w > 0)
    count = int(inliers.sum())
    if count < 2 or not bool(scale > 0):
        return None
    information = (w * inliers * lines.value[1].square() / size[0]).sum()
    variance = (w * inliers * squared[0]).sum() / (count - 1) / information
    return ScaleEstimate(float(scale), float(variance.sqrt()), inliers)


@dataclass(frozen=True)
class _ScaleLines:
    """Epipolar quantities of m matches as functions p + s q of the scale: p, q stacked first."""

    value: Tensor  # (2, m) x_queryᵀ E x_view
    line_query: Tensor  # (2, m, 3)
    line_view: Tensor  # (2, m, 3)
    depth_query: Tensor  # (2, m), up to a positive factor
    depth_view: Tensor  # (2, m)

    @classmethod
    def build(
        cls,
        c_a: Tensor,
        direction: Tensor,
        R_query: Tensor,
        xy_query: Tensor,
        R_view: Tensor,
        c_view: Tensor,
        xy_view: Tensor,
    ) -> "_ScaleLines":
        c_a, direction, R_query = (v.to(xy_query) for v in (c_a, direction, R_query))
        ray_query = homogeneous(xy_query) @ R_query.T
        ray_view = (R_view @ homogeneous(xy_view)[..., None])[..., 0]
        baseline = torch.stack([c_view - c_a, (-direction).expand_as(c_view)])
        ray_query, ray_view = ray_query.expand_as(baseline), ray_view.expand_as(baseline)
        normal = torch.linalg.cross(ray_view, ray_query)
        plane_view = torch.linalg.cross(baseline, ray_view)
        plane_query = torch.linalg.cross(ray_query, baseline)
        return cls(
            value=(baseline * normal).sum(2),
            line_query=plane_view @ R_query,
            line_view=(plane_query[..., None, :] @ R_view)[..., 0, :],
            depth_query=-(plane_view * normal).sum(2),
            depth_view=(plane_query * normal).sum(2),
        )

    def errors(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared Sampson distances, their denominators, in front of both cameras: each (k, m)."""

        def at(pair: Tensor) -> Tensor:
            return pair[0] + scales.reshape(-1, *[1] * (pair.dim() - 1)) * pair[1]

        size = at(self.line_query)[..., :2].square().sum(2)
        size = (size + at(self.line_view)[..., :2].square().sum(2)).clamp_min(1e-20)
        front = (at(self.depth_query) > 0) & (at(self.depth_view) > 0)
        return at(self.value).square() / size, size, front

    def score(self, scales: Tensor, weights: Tensor, threshold: float) -> Tensor:
        squared, _, front = self.errors(scales)
        return ((1 - squared / threshold**2).clamp_min(0) * front) @ weights
