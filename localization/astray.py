"""Images whose poses stand in other rows of the pose file than theirs: a few rows that changed places."""

import torch
from torch import Tensor

from localization.cameras import poses_from_file
from localization.lens_fit import PosedMatches
from localization.readings import Judge, Reading, relative

# Least share of matches that poses explain which are those of their images; contradicted ones explain
# 0 to 18 %.
MIN_SHARE = 0.3
# A pose contradicts its image if it explains less than this share of what is usual, and is its own if it
# explains more than the second.
CONTRADICTED, ITS_ROW = 0.2, 0.5


def rows_of_astray(
    judge: Judge, read: Reading, lens: PosedMatches, found: Tensor
) -> dict[int, int]:
    """The rows in which frames have their poses that by their matches are not where they should be.

    found: the lens. A pose counts that explains about as much of an image's matches as others explain
    of theirs, and is not the pose of another index image, which it fits. Where most poses contradict
    their images there is nothing to go by.
    """
    explained = _explained(lens, found)
    usual = lens.shares(found)[0]
    known, astray = explained >= 0, (explained >= 0) & (explained < CONTRADICTED * usual)
    if 2 * int(astray.sum()) > int(known.sum()):
        return {}
    fitting = torch.ones(len(judge.frame), dtype=torch.bool)
    fitting[: len(astray)] = ~astray
    poses = judge.poses(read.convention, read.rows)
    of_rows = poses_from_file(judge.pose7, read.convention)
    free = of_rows[1].isfinite().all(1)
    taken = read.rows[judge.frame[fitting]]
    free[taken[taken >= 0]] = False
    moved = {}
    for image in torch.nonzero(astray)[:, 0].tolist():
        a, b = lens.pairs.a, lens.pairs.b
        own = ((a == image) & fitting[b]) | ((b == image) & fitting[a])
        pairs, shares = lens.pairs.select(own), {}
        for row in torch.nonzero(free)[:, 0].tolist():
            tried = tuple(part.clone() for part in poses)
            for part, of_row in zip(tried, of_rows):
                part[image] = of_row[row]
            there = PosedMatches(pairs, *relative(tried, tried, pairs), lens.limit)
            shares[row] = there.shares(found)[0]
        row = max(shares, key=shares.__getitem__, default=None)
        if row is not None and shares[row] > max(ITS_ROW * usual, MIN_SHARE):
            moved[int(judge.frame[image])] = row
    return moved


def _explained(lens: PosedMatches, found: Tensor) -> Tensor:
    """The share (n,) of each image's matches that the poses explain; -1 of one that has none."""
    pairs = lens.pairs
    of_pairs = torch.stack([(lens.gains(found)[0] > 0).sum(1), pairs.used.sum(1)], dim=1).double()
    ends, images = torch.cat([pairs.a, pairs.b]), 1 + int(torch.maximum(pairs.a, pairs.b).max())
    explained, matches = of_pairs.new_zeros(images, 2).index_add_(0, ends, of_pairs.repeat(2, 1)).T
    return torch.where(matches > 0, explained / matches.clamp_min(1), -1.0)
