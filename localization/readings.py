"""Readings of a pose file, judged by the matches of its own images.

A reading says which row belongs to which image and in which convention the rows are written.
Together with a focal length it says where a match may lie; the right one explains the most
matches. The world frame cancels, and wrong focal lengths spoil the vote on the convention, so
both are searched together.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localization.cameras import (
    OPENCV,
    OPENGL,
    TARTANAIR,
    Convention,
    all_conventions,
    homogeneous,
    poses_from_file,
    unusual_conventions,
)
from localization.posed_pairs import PosedPairs

USUAL = (TARTANAIR, OPENCV, OPENGL)
# A convention is evident that explains so many times what the next one does. Another order of the
# rows, or a convention that nobody means to write, is believed from the second on.
MIN_MARGIN, CLEARLY_MORE = 1.5, 1.25
# Below this share of matches explained every convention is tried with every other order of the
# rows.
DOUBTFUL = 0.45
SAMPSON_PX, _LARGE_PX = 3.0, 1024
# Focal lengths in longer image sides, and how many are tried, first and then for the best
# conventions.
FOCAL_RANGE, _COARSE_FOCALS, _FOCALS = (0.3, 2.0), 13, 37
_COARSE_MATCHES, _FINE_MATCHES, _BEST = 15, 60, 8
_SHIFTS = (-2, -1, 0, 1, 2)


@dataclass(frozen=True)
class Reading:
    """A convention, the pose row of each frame (N,) (-1: none) and the focal length that explain
    most.

    focal: in longer image sides; score: matches explained, those of far points twice, because
    both of their coordinates are foretold; share: of the matches looked at; margin: score over
    the next convention's; rivals: conventions that are not clearly worse, the best first;
    rows_are: what is unusual about the rows, in words, or "".
    """

    convention: Convention
    rows: Tensor
    focal: float
    score: float
    share: float
    margin: float
    rivals: list[Convention]
    rows_are: str = ""


def relative(
    poses_a: tuple[Tensor, Tensor], poses_b: tuple[Tensor, Tensor], pairs: PosedPairs
) -> tuple[Tensor, Tensor]:
    """R_b_from_a (P, 3, 3) and unit t_b_from_a (P, 3) of poses (R_world_from_cam, c_world) of the
    images.

    A baseline of zero stays zero.
    """
    R_b = poses_b[0][pairs.b].transpose(1, 2)
    t = (R_b @ (poses_a[1][pairs.a] - poses_b[1][pairs.b])[..., None])[..., 0]
    return R_b @ poses_a[0][pairs.a], t / t.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def sampson(R: Tensor, t: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """Signed Sampson distances (..., m) of rays x_a, x_b (..., m, 3), z = 1, to poses (..., 3,
    3), (..., 3).
    """
    turned = x_a @ R.transpose(-1, -2)
    return _epipolar(R, turned, t[..., None, :].expand_as(turned), x_b.expand_as(turned))[0]


def sampson_by_pose(R: Tensor, t: Tensor, x_a: Tensor, x_b: Tensor) -> tuple[Tensor, Tensor]:
    """`sampson`, and its derivatives (..., m, 6) by a small rotation applied after R, and by t."""
    turned = x_a @ R.transpose(-1, -2)
    t, x_b = t[..., None, :].expand_as(turned), x_b.expand_as(turned)
    distance, scale, line_b, beside = _epipolar(R, turned, t, x_b)
    flat = turned.new_tensor([1.0, 1.0, 0.0])
    flat_a, flat_b = (beside @ R * flat) @ R.transpose(-1, -2), line_b * flat
    along, across = (t * turned).sum(-1, keepdim=True), (flat_b * turned).sum(-1, keepdim=True)
    value_by = torch.cat(
        [torch.linalg.cross(turned, beside), torch.linalg.cross(turned, x_b)], dim=-1
    )
    # Half the derivative of 1 / scale^2.
    by_rotation = along * flat_b - across * t + torch.linalg.cross(flat_a, beside)
    by_t = torch.linalg.cross(turned, flat_b) + torch.linalg.cross(flat_a, x_b)
    scale = scale[..., None]
    size_by = torch.cat([by_rotation, by_t], dim=-1)
    return distance, scale * (value_by - distance[..., None] * scale * size_by)


def _epipolar(
    R: Tensor, turned: Tensor, t: Tensor, x_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampson distances, what x_b . t x R x_a is multiplied by in them, t x R x_a, and x_b x t."""
    line_b, beside = torch.linalg.cross(t, turned), torch.linalg.cross(x_b, t)
    gradient2 = line_b[..., :2].square().sum(-1) + (beside @ R)[..., :2].square().sum(-1)
    scale = gradient2.clamp_min(1e-20).rsqrt()
    return (x_b * line_b).sum(-1) * scale, scale, line_b, beside


def gains(R: Tensor, t: Tensor, x_a: Tensor, x_b: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """max(0, 1 - e^2 / limit^2), (..., m), of two errors: the Sampson distance; the distance to a
    point at infinity.

    R, t (..., 3, 3), (..., 3); rays x_a, x_b (..., m, 3), z = 1. The first counts only in front
    of both cameras, where R x_a, x_b and t turn the same way, or where the second counts. The
    second is what a pair without baseline can tell.
    """
    turned = x_a @ R.transpose(-1, -2)
    t, x_b = t[..., None, :].expand_as(turned), x_b.expand_as(turned)
    distance, _, line_b, beside = _epipolar(R, turned, t, x_b)
    far2 = (turned[..., :2] / turned[..., 2:].clamp_min(1e-6) - x_b[..., :2]).square().sum(-1)
    far = (1 - far2 / limit**2).clamp_min(0)
    normal = torch.linalg.cross(turned, x_b)
    front = ((normal * line_b).sum(-1) < 0) & ((normal * beside).sum(-1) > 0)
    return (1 - distance.square() / limit**2).clamp_min(0) * (front | (far > 0)), far


def limit_of(side_px: int) -> float:
    """SAMPSON_PX in longer image sides; large photographs are measured as if they were smaller."""
    return SAMPSON_PX / min(side_px, _LARGE_PX)


def as_rays(uv: Tensor, focal: float) -> Tensor:
    """Rays (..., 3) with z = 1 of positions in longer image sides."""
    return homogeneous(uv / focal)


def focal_grid(prior: float, count: int = _FOCALS) -> list[float]:
    """The prior focal length and log-spaced ones over FOCAL_RANGE, in longer image sides."""
    return [prior, *np.geomspace(*FOCAL_RANGE, count).tolist()]


@dataclass(frozen=True)
class Judge:
    """What all readings are judged by.

    pairs; pose7 (N, 7): rows of the file; frame (n,): of each image; limit: of an error, in
    longer image sides; focals: the possible ones, in the same unit, the first guess first.
    """

    pairs: PosedPairs
    pose7: Tensor
    frame: Tensor
    limit: float
    focals: list[float]

    def poses(self, convention: Convention, rows: Tensor) -> tuple[Tensor, Tensor]:
        """R_world_from_cam (n, 3, 3), c_world (n, 3) of the images; NaN where one has no row."""
        row = rows[self.frame]
        return poses_from_file(
            torch.where((row >= 0)[:, None], self.pose7[row], torch.nan), convention
        )

    def read(self, conventions: list[Convention], rows: Tensor, rows_are: str = "") -> Reading:
        """The best reading for these rows: a coarse grid, then a fine one for the best few
        conventions.
        """
        poses = [self.poses(c, rows) for c in conventions]
        relatives = [relative(p, p, self.pairs) for p in poses]
        few = self.focals if len(self.focals) == 1 else focal_grid(self.focals[0], _COARSE_FOCALS)
        score, _, _ = self._scores(relatives, few, _COARSE_MATCHES)
        order = score.sum(0).amax(1).argsort(descending=True, stable=True).tolist()
        kept = order[:_BEST] + [i for i in order[_BEST:] if conventions[i] in USUAL]
        score, explained, matches = self._scores(
            [relatives[i] for i in kept], self.focals, _FINE_MATCHES
        )
        conventions, score = [conventions[i] for i in kept], score.sum(0)
        share = explained.sum(0) / matches.sum(0).clamp_min(1)
        best = score.amax(1)
        handicap = torch.tensor(
            [1.0 if c in _NOT_UNUSUAL else 1 / CLEARLY_MORE for c in conventions]
        )
        first, *rest = (best * handicap).argsort(descending=True, stable=True).tolist()
        if conventions[first] in _NOT_UNUSUAL:
            rest = [i for i in rest if conventions[i] in _NOT_UNUSUAL]
        margin = float(best[first] / best[rest[0]].clamp_min(1e-9)) if rest else 1.0
        rivals = [conventions[i] for i in rest if best[i] * MIN_MARGIN > best[first]]
        column = int(score[first].argmax())
        return Reading(
            conventions[first],
            rows,
            self.focals[column],
            float(best[first]),
            float(share[first, column]),
            margin,
            [conventions[first], *rivals],
            rows_are,
        )

    def _scores(
        self, relatives: list[tuple[Tensor, Tensor]], focals: list[float], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score and matches explained, (P, k, focals), and matches (P, k, 1), of k hypotheses of
        the relative poses.

        By the first `count` matches of each pair; a pair without pose has none.
        """
        pairs = self.pairs.first(count)
        R = torch.stack([r for r, _ in relatives], dim=1).float()  # (P, k, 3, 3)
        t = torch.stack([v for _, v in relatives], dim=1).float()
        used = (
            pairs.used[:, None]
            & torch.isfinite(R).flatten(2).all(2)[..., None]
            & torch.isfinite(t).all(2)[..., None]
        )
        uv_a, uv_b = pairs.uv_a.float()[:, None], pairs.uv_b.float()[:, None]
        score = torch.zeros(*R.shape[:2], len(focals), dtype=torch.float64)
        explained = torch.zeros_like(score)
        for column, focal in enumerate(focals):
            near, far = gains(R, t, as_rays(uv_a, focal), as_rays(uv_b, focal), self.limit / focal)
            near, far = near.where(used, 0.0), far.where(used, 0.0)
            score[..., column] = (near + far).sum(2).double()
            explained[..., column] = (near > 0).sum(2).double()
        return score, explained, used.sum(2).double()[..., None]

    def other_rows(
        self, read: Reading, orders: dict[str, Tensor], usual: list[Convention]
    ) -> Iterator[Reading]:
        """Readings with other rows than `read`: given orders, and rows shifted by one or two, all
        or from a frame on.

        Where `read` explains little its convention means nothing, and all of `usual` are tried.
        """
        doubtful = read.share < DOUBTFUL
        for what, rows in orders.items():
            yield self.read(usual if doubtful else read.rivals, rows, what)
        for shift in _SHIFTS if doubtful else ():
            if shift:
                yield self.read(
                    usual, self._rows(len(read.rows), 0, shift, shift), _row_of("frame i", shift)
                )
        if doubtful:
            yield self.read(usual, read.rows.flip(0), "the rows from the last to the first")
        for convention in read.rivals[:_BEST]:
            yield self.read(read.rivals, *self._best_break(convention, read.focal, len(read.rows)))

    def _rows(self, frames: int, start: int, before: int, after: int) -> Tensor:
        """The row of each frame: shifted by `before`, and from `start` on by `after`; -1 for none.

        Where rows are missing at `start`, the frames there have none.
        """
        number = torch.arange(frames)
        row = torch.where(number < start, number + before, number + after)
        missing = (number >= start) & (number < start + before - after) if start else number < 0
        return torch.where(missing | (row < 0) | (row >= len(self.pose7)), -1, row)

    def _best_break(self, convention: Convention, focal: float, frames: int) -> tuple[Tensor, str]:
        """The rows, and what they are, if from some frame on they are shifted otherwise than
        before.
        """
        poses = [self.poses(convention, self._rows(frames, 0, shift, shift)) for shift in _SHIFTS]
        relatives = [relative(a, b, self.pairs) for a in poses for b in poses]
        score, _, _ = self._scores(relatives, [focal, self.focals[0]], _FINE_MATCHES)
        score = torch.nn.functional.pad(
            score.reshape(-1, len(_SHIFTS), len(_SHIFTS), 2), (0, 0, 0, 1, 0, 1)
        )
        pair = torch.arange(len(score))
        best = (-1.0, 0, 0, 0)
        for start, before, after in itertools.product(range(frames), *[range(len(_SHIFTS))] * 2):
            if (start == 0) != (before == after):
                continue
            rows = self._rows(frames, start, _SHIFTS[before], _SHIFTS[after])[self.frame]
            shift = torch.where(self.frame < start, before, after).where(rows >= 0, len(_SHIFTS))
            total = float(score[pair, shift[self.pairs.a], shift[self.pairs.b]].sum(0).amax())
            best = max(best, (total, -start, before, after))
        start, before, after = -best[1], *(_SHIFTS[i] for i in best[2:])
        what = _row_of("frame i", before) + (
            _row_of(f", of frame i >= {start}", after) if start else ""
        )
        return self._rows(frames, start, before, after), what


_NOT_UNUSUAL = frozenset(all_conventions())
CONVENTIONS = [*all_conventions(), *unusual_conventions()]


def _row_of(frames: str, shift: int) -> str:
    """In words: the pose of `frames` stands so many rows later or earlier."""
    sign = "-" if shift < 0 else "+"
    return f"{frames} in row i" + (f" {sign} {abs(shift)}" if shift else "")
