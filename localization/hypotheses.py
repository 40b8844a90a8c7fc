"""Where could the camera be? Pose hypotheses of a query, from many small searches.

A single search over everything loses the right pose among repeated structure; many searches, each
over a part of the matches and each followed by a second look at what it left unexplained, nearly
always contain it. Which one is right is not decided here (scoring.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.absolute_pose import draw_samples, refine_pose, score_poses, squared_errors
from localization.cameras import homogeneous
from localization.matching import View
from localization.p3p import p3p
from localization.relative_pose import RelativePose, essential_ransac, query_in_world
from localization.scoring import SAMPSON_PX, Evidence

POOLED_RATIOS = (0.8, 0.9, 0.97)
POOLED_MODES, POOLED_SAMPLES = 4, 1000
IMAGE_MODES, IMAGE_SAMPLES = 3, 500
# What the query's focal lengths in x and y may be, over those assumed, and the searches for it: another
# zoom, or an image that was squeezed or stretched.
_ZOOMS = (0.55, 0.67, 0.82, 1.22, 1.5, 1.82)
FOCAL_RATIOS = (*((zoom, zoom) for zoom in _ZOOMS), (1.0, 0.8), (1.0, 1.25))
FOCAL_MODES, FOCAL_SAMPLES = 2, 500
# Index images whose essential matrices are computed, from so many samples; how far from them the
# query is then tried, in typical distances of what is seen; ratio of the matches and fewest inliers.
BEARING_IMAGES, BEARING_SAMPLES = 2, 300
BEARING_DISTANCES = (0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
MATCH_RATIO, MIN_ESSENTIAL_INLIERS = 0.9, 15
THRESHOLD_PX = 4.0
MIN_MATCHES = 5
# Matches on which all poses of a search are scored first, and the best that are scored on all.
PREVIEW, REVIEWED = 256, 64
# A mode is refined on so many matches nearest to it, in so many steps.
REFINED_MATCHES, REFINE_STEPS = 400, 6
# A mode with no more is what chance gives.
CHANCE_SCORE = 6.0
# A mode takes what lies within so many thresholds out of the next search.
_REMOVAL_FACTOR = 2.0


@dataclass(frozen=True)
class Hypotheses:
    """h candidate poses: R_cam_from_world (h, 3, 3), c_world (h, 3)."""

    R_cam_from_world: Tensor
    c_world: Tensor

    def __len__(self) -> int:
        return len(self.c_world)

    @classmethod
    def joined(cls, *parts: "Hypotheses") -> "Hypotheses":
        """Those of all parts; none of none."""
        R = [torch.zeros(0, 3, 3, dtype=torch.float64), *(part.R_cam_from_world for part in parts)]
        return cls(torch.cat(R), torch.cat([R[0][:, 0], *(part.c_world for part in parts)]))

    def select(self, keep: Tensor | list[int]) -> "Hypotheses":
        """The hypotheses that a mask or an index picks."""
        return Hypotheses(self.R_cam_from_world[keep], self.c_world[keep])


@dataclass(frozen=True)
class Bearing:
    """The query as one index view sees it: world rotation, unit direction from the view, and the
    relative pose.
    """

    view: int
    R_world_from_cam: Tensor
    direction: Tensor
    relative: RelativePose

    @property
    def inliers(self) -> int:
        return int(self.relative.inliers.sum())


@dataclass(frozen=True)
class _Search:
    """One search: the rows of the evidence it draws from, how many samples, how many modes it may
    return.
    """

    rows: Tensor
    samples: int
    modes: int


def pooled_hypotheses(evidence: Evidence, generator: torch.Generator) -> Hypotheses:
    """P3P hypotheses from all index images together, at several ratios."""
    limits = [evidence.has_point & (evidence.ratio < r) for r in POOLED_RATIOS]
    return _found(
        evidence, [_Search(_rows(mask), POOLED_SAMPLES, POOLED_MODES) for mask in limits], generator
    )


def image_hypotheses(
    evidence: Evidence, views: Sequence[int], generator: torch.Generator
) -> Hypotheses:
    """P3P hypotheses from each index image of `views` alone."""
    masks = [evidence.has_point & (evidence.view == i) for i in views]
    return _found(
        evidence, [_Search(_rows(mask), IMAGE_SAMPLES, IMAGE_MODES) for mask in masks], generator
    )


def focal_hypotheses(
    evidence: Evidence, generator: torch.Generator
) -> list[tuple[Evidence, Hypotheses]]:
    """Pooled hypotheses for each of several other lenses of the query, with the evidence seen so."""
    found = []
    rows = _rows(evidence.has_point & (evidence.ratio < POOLED_RATIOS[1]))
    for wide, tall in FOCAL_RATIOS:
        camera = evidence.camera
        seen = evidence.seen_with(replace(camera, fx=wide * camera.fx, fy=tall * camera.fy))
        found.append((seen, _found(seen, [_Search(rows, FOCAL_SAMPLES, FOCAL_MODES)], generator)))
    return found


def _rows(mask: Tensor) -> Tensor:
    return torch.nonzero(mask)[:, 0]


def _found(evidence: Evidence, searches: list[_Search], generator: torch.Generator) -> Hypotheses:
    """The modes of every search, refined on its matches."""
    searches = [s for s in searches if len(s.rows) >= MIN_MATCHES]
    seeds = _sampled_modes(evidence, searches, generator)
    return _refined(evidence, seeds) if seeds else Hypotheses.joined()


def _sampled_modes(
    evidence: Evidence, searches: list[_Search], generator: torch.Generator
) -> list[tuple[_Search, Tensor, Tensor]]:
    """(search, R (3, 3), t (3,)) of the modes of every search, from minimal samples alone."""
    if not searches:
        return []
    threshold = THRESHOLD_PX / evidence.focal_px
    sample = torch.cat(
        [s.rows[draw_samples(evidence.weight[s.rows], 3, s.samples, generator)] for s in searches]
    )
    xy = evidence.xy_norm[sample]
    R, t, valid = p3p(homogeneous(xy), evidence.point[sample])
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
    some = slice(None, None, math.ceil(len(rows) / PREVIEW))
    while len(R) and len(found) < search.modes:
        preview = score_poses(R, t, xy[some], X[some], threshold, left[some])
        best = preview.topk(min(REVIEWED, len(R))).indices
        scores = score_poses(R[best], t[best], xy, X, threshold, left, keypoint_ids=keypoint)
        if float(scores.max()) <= CHANCE_SCORE and found:
            break
        best = best[scores.argmax()]
        found.append((R[best], t[best]))
        explained = squared_errors(R[best], t[best], xy, X) < (_REMOVAL_FACTOR * threshold) ** 2
        left = torch.where(explained, torch.zeros_like(left), left)
    return found


def _refined(evidence: Evidence, seeds: list[tuple[_Search, Tensor, Tensor]]) -> Hypotheses:
    """The seeds after a few robust steps, each on the matches of its own search nearest to it
    (padded to one batch).
    """
    R, t = (torch.stack(part) for part in list(zip(*seeds))[1:])
    longest = min(REFINED_MATCHES, max(len(search.rows) for search, _, _ in seeds))
    rows = torch.zeros(len(seeds), longest, dtype=torch.long)
    used = torch.zeros(rows.shape, dtype=torch.bool)
    xy_norm = evidence.xy_norm
    for k, (search, R_k, t_k) in enumerate(seeds):
        error = squared_errors(R_k, t_k, xy_norm[search.rows], evidence.point[search.rows])
        nearest = error.topk(min(longest, len(error)), largest=False).indices
        rows[k, : len(nearest)], used[k, : len(nearest)] = search.rows[nearest], True
    c = -(R.transpose(1, 2) @ t[..., None])[..., 0]
    threshold = THRESHOLD_PX / evidence.focal_px
    of_seeds = xy_norm[rows], evidence.point[rows], threshold, used, REFINE_STEPS
    return Hypotheses(*refine_pose(R, c, *of_seeds)[:2])


def find_bearings(
    evidence: Evidence, views: list[View], count: int, samples: int, generator: torch.Generator
) -> list[Bearing]:
    """Relative poses with the `count` index views of most matches, most inliers first."""
    distinct = evidence.ratio <= MATCH_RATIO
    matches = torch.bincount(evidence.view[distinct], minlength=len(views))
    found = []
    for i in matches.topk(min(count, len(views))).indices.tolist():
        rows = torch.nonzero(distinct & (evidence.view == i))[:, 0]
        relative = essential_ransac(
            (evidence.ray_world[rows] @ views[i].R_world_from_cam)[:, :2],
            evidence.xy_norm[rows],
            SAMPSON_PX / evidence.focal_px,
            generator=generator,
            iterations=samples,
        )
        if relative is not None and int(relative.inliers.sum()) >= MIN_ESSENTIAL_INLIERS:
            R, direction = query_in_world(
                views[i].R_world_from_cam, relative.R_b_from_a, relative.t_b_from_a
            )
            found.append(Bearing(i, R, direction, relative))
    return sorted(found, key=lambda b: -b.inliers)


def bearing_hypotheses(
    evidence: Evidence, views: list[View], distance_m: float, generator: torch.Generator
) -> Hypotheses:
    """Hypotheses without points: from the index views of most matches on along the essential matrix's
    direction, at several distances; distance_m: about how far away things are.
    """
    found = []
    away_m = distance_m * torch.tensor(BEARING_DISTANCES, dtype=torch.float64)
    for b in find_bearings(evidence, views, BEARING_IMAGES, BEARING_SAMPLES, generator):
        center = views[b.view].c_world + away_m[:, None] * b.direction
        found.append(Hypotheses(b.R_world_from_cam.T.expand(len(center), 3, 3), center))
    return Hypotheses.joined(*found)
