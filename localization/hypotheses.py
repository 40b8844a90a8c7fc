"""Where could the camera be? One list of pose hypotheses of a query, from many small searches.

A single search over everything loses the right pose among repeated structure; many searches, each over a part of the
matches and each followed by a second look at what it left unexplained, nearly always contain it. Which one is right is
not decided here (scoring.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.absolute_pose import draw_samples, p3p, refine_pose, score_poses, squared_errors
from localization.matching import View
from localization.relative_pose import RelativePose, essential_ransac, query_in_world
from localization.scoring import SAMPSON_PX, Evidence, epipolar_scores

POOLED_RATIOS = (0.8, 0.9, 0.97)
POOLED_MODES, POOLED_SAMPLES = 4, 1000
IMAGE_MODES, IMAGE_SAMPLES = 3, 500
THRESHOLD_PX = 4.0
MIN_MATCHES = 5
REFINE_STEPS = 8
ESSENTIAL_IMAGES, ESSENTIAL_SAMPLES = 8, 1000
MIN_ESSENTIAL_INLIERS = 15
MATCH_RATIO = 0.9
# Baselines tried, as shares of a typical distance of the scene.
SCALES = torch.logspace(-2.3, -0.22, 24, dtype=torch.float64)
# A mode takes what lies within so many thresholds out of the next search.
_REMOVAL_FACTOR = 2.0


@dataclass(frozen=True)
class Hypotheses:
    """h candidate poses: R_cam_from_world (h, 3, 3), c_world (h, 3), and where each came from."""

    R_cam_from_world: Tensor
    c_world: Tensor
    source: list[str]

    def select(self, order: Tensor) -> "Hypotheses":
        """The hypotheses that an index tensor picks."""
        return Hypotheses(
            self.R_cam_from_world[order], self.c_world[order], [self.source[i] for i in order.tolist()]
        )


@dataclass(frozen=True)
class _Search:
    """One search: the rows of the evidence it draws from, how many samples, how many modes it may return."""

    name: str
    rows: Tensor
    samples: int
    modes: int


def point_hypotheses(evidence: Evidence, views: list[int], generator: torch.Generator) -> Hypotheses:
    """P3P hypotheses from all index images together, at several ratios, and from each of `views` alone."""
    searches = [
        _Search("pooled", torch.nonzero(evidence.has_point & (evidence.ratio < r))[:, 0], POOLED_SAMPLES, POOLED_MODES)
        for r in POOLED_RATIOS
    ]
    searches += [
        _Search("image", torch.nonzero(evidence.has_point & (evidence.view == i))[:, 0], IMAGE_SAMPLES, IMAGE_MODES)
        for i in views
    ]
    searches = [s for s in searches if len(s.rows) >= MIN_MATCHES]
    seeds = _sampled_modes(evidence, searches, generator)
    pooled = [seed for seed in seeds if seed[0].name == "pooled"]
    single = [seed for seed in seeds if seed[0].name == "image"]
    parts = [_refined(evidence, group) for group in (pooled, single) if group]
    return joined(parts, evidence.point.device)


def joined(parts: list[Hypotheses], device: torch.device) -> Hypotheses:
    """Several lists of hypotheses as one."""
    none = torch.zeros(0, 3, 3, dtype=torch.float64, device=device)
    return Hypotheses(
        torch.cat([none] + [p.R_cam_from_world for p in parts]),
        torch.cat([none[:, 0]] + [p.c_world for p in parts]),
        [name for p in parts for name in p.source],
    )


def _sampled_modes(
    evidence: Evidence, searches: list[_Search], generator: torch.Generator
) -> list[tuple[_Search, Tensor, Tensor]]:
    """(search, R (3, 3), t (3,)) of the modes of every search, from minimal samples alone."""
    if not searches:
        return []
    threshold = THRESHOLD_PX / evidence.focal_px
    drawn = [s.rows[draw_samples(evidence.weight[s.rows], 3, s.samples, generator)] for s in searches]
    sample = torch.cat(drawn)
    xy = evidence.xy_norm[sample]
    R, t, valid = p3p(torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1), evidence.point[sample])
    seeds, start = [], 0
    for search in searches:
        part = slice(start, start + search.samples)
        start += search.samples
        poses = (R[part][valid[part]], t[part][valid[part]])
        seeds += [(search, *pose) for pose in _modes(evidence, search, *poses, threshold)]
    return seeds


def _modes(
    evidence: Evidence, search: _Search, R: Tensor, t: Tensor, threshold: float
) -> list[tuple[Tensor, Tensor]]:
    """The best of the poses, then the best on what the ones before leave unexplained."""
    rows, found = search.rows, []
    xy, X, keypoint = evidence.xy_norm[rows], evidence.point[rows], evidence.keypoint[rows]
    left = torch.ones_like(xy[:, 0])
    while len(R) and len(found) < search.modes:
        scores = score_poses(R, t, xy, X, threshold, weights=left, keypoint_ids=keypoint)
        best = scores.argmax()
        if float(scores[best]) <= 2.0:  # any sample of three scores nearly three
            break
        found.append((R[best], t[best]))
        explained = squared_errors(R[best], t[best], xy, X) < (_REMOVAL_FACTOR * threshold) ** 2
        left = torch.where(explained, torch.zeros_like(left), left)
    return found


def _refined(evidence: Evidence, seeds: list[tuple[_Search, Tensor, Tensor]]) -> Hypotheses:
    """The seeds after a few robust steps, each on all matches of its own search (padded to one batch)."""
    longest = max(len(search.rows) for search, _, _ in seeds)
    rows = torch.stack([torch.nn.functional.pad(s.rows, (0, longest - len(s.rows))) for s, _, _ in seeds])
    count = torch.tensor([len(s.rows) for s, _, _ in seeds], device=rows.device)
    used = torch.arange(longest, device=rows.device) < count[:, None]
    refined = refine_pose(
        torch.stack([R for _, R, _ in seeds]),
        torch.stack([t for _, _, t in seeds]),
        evidence.xy_norm[rows],
        evidence.point[rows],
        THRESHOLD_PX / evidence.focal_px,
        weights=used,
        iterations=REFINE_STEPS,
    )
    R = refined.R_cam_from_world
    center = -(R.transpose(1, 2) @ refined.t_cam[..., None])[..., 0]
    return Hypotheses(R, center, [search.name for search, _, _ in seeds])


def shifted_hypotheses(R_cam_from_world: Tensor, c_world: Tensor, turn_deg: float, least_m: float) -> Hypotheses:
    """Each of h poses (h, 3, 3), (h, 3) moved by the offsets between any two, with its own rotation.

    Tiles repeat at equal distances: where poses one and two tiles off were found, the right one, found by no search
    because few images show its place, lies one more step away. Offsets count between poses turned by less than
    turn_deg to each other, if longer than least_m.
    """
    cosine = (torch.einsum("aij,bij->ab", R_cam_from_world, R_cam_from_world) - 1) / 2
    offset = c_world[:, None] - c_world
    used = (cosine >= math.cos(math.radians(turn_deg))) & (offset.norm(dim=2) > least_m)
    moved = (c_world[:, None] + offset[used]).flatten(0, 1)
    R = R_cam_from_world.repeat_interleave(int(used.sum()), dim=0)
    return Hypotheses(R, moved, ["shifted"] * len(moved))


@dataclass(frozen=True)
class Bearing:
    """The query as one index view sees it: world rotation, unit direction from the view, and the relative pose."""

    view: int
    R_world_from_cam: Tensor
    direction: Tensor
    relative: RelativePose


def bearings(evidence: Evidence, views: list[View], generator: torch.Generator) -> list[Bearing]:
    """Relative poses with the index views of most matches, most inliers first."""
    distinct = evidence.ratio <= MATCH_RATIO
    count = torch.bincount(evidence.view[distinct], minlength=len(views))
    found = []
    for i in count.topk(min(ESSENTIAL_IMAGES, len(views))).indices.tolist():
        rows = torch.nonzero(distinct & (evidence.view == i))[:, 0]
        relative = essential_ransac(
            index_norm(evidence, views, rows),
            evidence.xy_norm[rows],
            SAMPSON_PX / evidence.focal_px,
            generator=generator,
            iterations=ESSENTIAL_SAMPLES,
        )
        if relative is not None and int(relative.inliers.sum()) >= MIN_ESSENTIAL_INLIERS:
            R, direction = query_in_world(views[i].R_world_from_cam, relative.R_b_from_a, relative.t_b_from_a)
            found.append(Bearing(i, R, direction, relative))
    return sorted(found, key=lambda b: -int(b.relative.inliers.sum()))


def index_norm(evidence: Evidence, views: list[View], rows: Tensor) -> Tensor:
    """Normalized coordinates (n, 2) in their index images of some rows of the evidence."""
    focal = torch.tensor([[v.camera.fx, v.camera.fy] for v in views], dtype=torch.float64, device=rows.device)
    center = torch.tensor([[v.camera.cx, v.camera.cy] for v in views], dtype=torch.float64, device=rows.device)
    view = evidence.view[rows]
    return (evidence.index_px[rows] - center[view]) / focal[view]


def essential_hypotheses(
    evidence: Evidence, views: list[View], seen_from: list[Bearing], typical_m: float
) -> Hypotheses:
    """Of each bearing the hypothesis at the baseline that explains the query best; typical_m: see SCALES.

    These need no points, and so are right where points are spoiled: few, or all from short baselines.
    """
    found = []
    for bearing in seen_from:
        scales = SCALES.to(bearing.direction) * typical_m
        center = views[bearing.view].c_world + scales[:, None] * bearing.direction
        R = bearing.R_world_from_cam.T.expand(len(scales), 3, 3)
        best = int(epipolar_scores(evidence, R, center).argmax())
        found.append(Hypotheses(R[best][None], center[best][None], ["essential"]))
    return joined(found, evidence.point.device)
