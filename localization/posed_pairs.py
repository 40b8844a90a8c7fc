"""Matched pairs of a scene's own index images: the evidence on which `calibrate` judges poses and
lens.

Which pairs: a bounded number an image, chosen by overlap and motion and spread over the sequence.
Which matches: not those that stand still in the image while the camera moves (a burnt-in time
stamp, a car's hood), for they would fit a camera that never moved.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.cameras import Camera, rays
from localization.features import Features
from localization.matching import View, mutual_matches
from localization.threads import in_threads

MIN_PAIRS, MIN_IMAGES, MIN_MATCHES = 6, 4, 30
MAX_PAIRS, MATCHES = 40, 400
# Strongest keypoints of an image that are matched, and the ratio of their matches.
_KEYPOINTS, MATCH_RATIO = 1200, 0.9
# Strongest keypoints of an image that tell which images overlap; how: words they are assigned to,
# the ranks by likeness that are looked at, the ratio of a match, and the fewest of them.
_SKETCH, _WORDS, _SKETCH_RATIO, _SKETCH_MATCHES = 300, 32, 0.8, 5
_RANKS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
# Median motion of the matches, in longer image sides, from which on more motion is no merit; a
# match that moves less than the second is no evidence of overlap.
_GOOD_MOTION, _NO_MOTION = 0.06, 0.002
# Cells of the longer side in which standing still is looked for; still is a match that moves by
# at most so many pixels between images turned by at least so many degrees.
_CELLS, _STILL_PX, _TURNED_DEG = 40, 1.0, 1.0
# Of images that are not turned, far points stand nearly still too: there still is what moves by at most
# so many pixels while so many matches move by so many, between images so far apart, in shares of the
# largest distance.
_FIXED_PX, _MOVING, _MOVING_PX, _APART = 0.35, 20, 3.0, 0.02
# A cell is still in which so many pairs have still matches, and most matches are.
_STILL_PAIRS, _STILL_SHARE = 4, 0.6


@dataclass(frozen=True)
class StillCells:
    """Where images of one size (width, height) show what does not move with the world: cells
    (rows, columns) bool.
    """

    width: int
    height: int
    cells: Tensor

    def moving(self, features: Features, camera: Camera) -> Features:
        """The keypoints of an image of this camera that lie in no still cell; all if it is
        turned.
        """
        if (camera.width - camera.height) * (self.width - self.height) < 0:
            return features
        cell = _cell_of(features.xy_px, camera.width, camera.height, *self.cells.shape)
        return features.select(~self.cells.flatten()[cell])


@dataclass(frozen=True)
class PosedPairs:
    """P matched image pairs.

    a, b (P,): image numbers; uv_a, uv_b (P, m, 2): positions from the principal point in units of
    the longer side of their own image, so that one focal length serves all sizes; used (P, m):
    which of them are matches.
    """

    a: Tensor
    b: Tensor
    uv_a: Tensor
    uv_b: Tensor
    used: Tensor

    def first(self, count: int) -> "PosedPairs":
        """The pairs with their first `count` matches only."""
        return PosedPairs(
            self.a, self.b, self.uv_a[:, :count], self.uv_b[:, :count], self.used[:, :count]
        )

    def select(self, keep: Tensor) -> "PosedPairs":
        """The pairs that a mask (P,) picks."""
        return PosedPairs(
            self.a[keep], self.b[keep], self.uv_a[keep], self.uv_b[keep], self.used[keep]
        )

    def images(self) -> int:
        """Number of images that take part."""
        return len(torch.cat([self.a, self.b]).unique())

    def enough(self) -> bool:
        """Whether there is evidence enough to decide anything."""
        return len(self.a) >= MIN_PAIRS and self.images() >= MIN_IMAGES


def matched_pairs(views: list[View], pose7: Tensor) -> tuple[PosedPairs, StillCells | None]:
    """Pairs of overlapping views with at least MIN_MATCHES each, most distinct matches first, and
    what stands still.

    pose7 (n, 7): the views' poses, in any order of the quaternion; only the angle between two of
    them is used, and how far they are apart.
    """
    rows = _matched(views)
    still = _still_cells(views, rows, pose7)
    if still is None and len(rows) < min(len(views), MIN_PAIRS):
        # The strongest keypoints may all stand still: then no pair seems to move.
        still = _still_cells(views, _matched(views, moving=False), pose7)
    if still is not None:
        rows = _matched([_without(view, still) for view in views])
    rows = [row for row in rows if len(row[2]) >= MIN_MATCHES]
    uv = torch.zeros(2, len(rows), MATCHES, 2, dtype=torch.float64)
    used = torch.zeros(len(rows), MATCHES, dtype=torch.bool)
    for row, (i, j, a, b) in enumerate(rows):
        count = min(MATCHES, len(a))
        uv[0, row, :count] = centered(views[i], a[:count])
        uv[1, row, :count] = centered(views[j], b[:count])
        used[row, :count] = True
    numbers = torch.tensor([row[:2] for row in rows], dtype=torch.long).reshape(-1, 2)
    return PosedPairs(numbers[:, 0], numbers[:, 1], uv[0], uv[1], used), still


def _matched(views: list[View], moving: bool = True) -> list[tuple[int, int, Tensor, Tensor]]:
    """Numbers i, j of overlapping views, and the pixels (m, 2) in each that match, most distinct
    first.
    """

    def matched(pair: tuple[int, int]) -> tuple[int, int, Tensor, Tensor]:
        a, b = (views[k].features.select(slice(_KEYPOINTS)) for k in pair)
        m = mutual_matches(a, b)
        m = m.select(m.ratio <= MATCH_RATIO)
        m = m.select(m.ratio.argsort(stable=True))
        return *pair, a.xy_px[m.a], b.xy_px[m.b]

    return in_threads(matched, _overlapping(views, moving))


def _without(view: View, still: StillCells) -> View:
    """The view without the keypoints that stand still."""
    return replace(view, features=still.moving(view.features, view.camera))


def centered(view: View, xy_px: Tensor) -> Tensor:
    """Ideal positions (..., 2) from the principal point in units of the longer image side,
    float64.
    """
    camera = view.camera
    return rays(camera, xy_px)[..., :2] * (camera.fx / max(camera.width, camera.height))


def _overlapping(views: list[View], moving: bool = True) -> list[tuple[int, int]]:
    """At most MAX_PAIRS pairs that probably overlap and, if asked for, move.

    Up to MAX_PAIRS images, spread over the sequence, are each compared with images at growing
    ranks of likeness, by their strongest keypoints alone; their best partners are taken, then
    their second best, and so on. The most alike have the shortest baselines and tell least about
    the translation.
    """
    if len(views) < 2:
        return []
    likeness = _signatures(views)
    anchors = torch.linspace(0, len(views) - 1, min(len(views), MAX_PAIRS)).round().long().tolist()
    worth: dict[tuple[int, int], float] = {}
    partners = []
    for i in anchors:
        order = (likeness @ likeness[i]).argsort(descending=True, stable=True).tolist()
        order.remove(i)
        pairs = [
            (min(i, j), max(i, j)) for j in (order[rank] for rank in _RANKS if rank < len(order))
        ]
        worth.update({(a, b): _worth(views[a], views[b]) for a, b in pairs if (a, b) not in worth})
        ranked = sorted(
            (p for p in pairs if worth[p] > 0 or not moving), key=worth.__getitem__, reverse=True
        )
        partners += [(rank, pair) for rank, pair in enumerate(ranked)]
    return list(dict.fromkeys(pair for _, pair in sorted(partners)))[:MAX_PAIRS]


def _signatures(views: list[View]) -> Tensor:
    """Unit vectors (n, d) whose products tell likeness: residuals of the strongest keypoints to
    words (VLAD).
    """
    sketches = [v.features.descriptors[:_SKETCH] for v in views]
    pool = torch.cat(sketches)
    words = pool[:: max(1, len(pool) // _WORDS)][:_WORDS]
    signatures = pool.new_zeros(len(views), len(words), pool.shape[1])
    for signature, sketch in zip(signatures, sketches):
        if len(sketch):
            word = (sketch @ words.T).argmax(1)
            signature.index_add_(0, word, sketch - words[word])
    return torch.nn.functional.normalize(
        torch.nn.functional.normalize(signatures, dim=2).flatten(1), dim=1
    )


def _worth(a: View, b: View) -> float:
    """Number of matches of the strongest keypoints that move, less where they move little."""
    first, second = a.features.descriptors[:_SKETCH], b.features.descriptors[:_SKETCH]
    if min(len(first), len(second)) < 2:
        return 0.0
    top, column = (first @ second.T).topk(2, dim=1)
    distance = (2 - 2 * top).clamp_min(0).sqrt()
    matched = distance[:, 0] < _SKETCH_RATIO * distance[:, 1]
    at_a = centered(a, a.features.xy_px[: len(first)][matched])
    at_b = centered(b, b.features.xy_px[column[matched, 0]])
    motion = (at_a - at_b).norm(dim=1)
    motion = motion[motion > _NO_MOTION]
    if len(motion) < _SKETCH_MATCHES:
        return 0.0
    return len(motion) * min(1.0, float(motion.median()) / _GOOD_MOTION)


def _cell_of(xy_px: Tensor, width: int, height: int, rows: int, columns: int) -> Tensor:
    """Number of the cell, row by row, of positions (n, 2) in an image of this size."""
    column = (xy_px[:, 0] * columns / width).long().clamp(0, columns - 1)
    return (xy_px[:, 1] * rows / height).long().clamp(0, rows - 1) * columns + column


def _still_cells(views: list[View], rows: list[tuple], pose7: Tensor) -> StillCells | None:
    """Where matches stand still in images of the most common size whose poses are turned against
    each other, or apart.

    rows: (i, j, xy_i, xy_j) of matched pairs; pose7 (n, 7). None where nothing does.
    """
    if not rows:
        return None
    q, t = torch.nn.functional.normalize(pose7[:, 3:], dim=1), pose7[:, :3]
    apart = _APART * float((t - t[:1]).norm(dim=1).max())
    sizes = [(v.camera.width, v.camera.height) for v in views]
    width, height = max(sorted(set(sizes)), key=sizes.count)
    columns = max(1, round(_CELLS * width / max(width, height)))
    grid = (max(1, round(_CELLS * height / max(width, height))), columns)
    shape = grid[0] * grid[1]
    matches, still, pairs = torch.zeros(3, shape)
    for i, j, a, b in rows:
        if sizes[i] != (width, height) or sizes[j] != sizes[i]:
            continue
        motion = (a - b).abs().amax(1)
        turned = 2 * math.acos(min(1.0, float((q[i] * q[j]).sum().abs())))
        if turned >= math.radians(_TURNED_DEG):
            stands = motion <= _STILL_PX
        elif float((t[i] - t[j]).norm()) > apart and int((motion > _MOVING_PX).sum()) >= _MOVING:
            stands = motion <= _FIXED_PX
        else:
            continue
        cell = _cell_of(a, width, height, *grid)
        matches += torch.bincount(cell, minlength=shape)
        found = torch.bincount(cell[stands], minlength=shape)
        still, pairs = still + found, pairs + (found > 0)
    cells = (
        ((pairs >= _STILL_PAIRS) & (still >= _STILL_SHARE * matches)).reshape(1, 1, *grid).float()
    )
    # What lies beside them has part of them in its patch.
    cells = torch.nn.functional.max_pool2d(cells, 3, stride=1, padding=1)[0, 0] > 0
    return StillCells(width, height, cells) if bool(cells.any()) else None
