"""The points of a map as tracks: each 3D point once, with the keypoints of all images that show it.

Triangulation gives every index keypoint a point of its own. Here those that are one and the same
are joined: a point is looked for in each image that bore it out, at the keypoint nearest to where
it projects.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.matching import View
from localization.refinement import near_candidates, point_map
from localization.triangulation import (
    CONSENSUS_PX,
    REPROJECTION_PX,
    Points,
    agreeing,
    cameras_of,
    project_points,
    refine_points,
)

TRACKS_AT_ONCE = 20_000


@dataclass(frozen=True)
class Structure:
    """P points and the m keypoints that show them.

    position (P, 3) float64, world; point, view, keypoint (m,): an observation each, numbers of the
    point, of the view and of the keypoint in it; every point has two or more, a keypoint at most
    one point.
    """

    position: Tensor
    point: Tensor
    view: Tensor
    keypoint: Tensor

    def within(self, views: Sequence[int]) -> "Structure":
        """What these views show: the points that two or more of them see, and that alone."""
        seen = torch.isin(self.view, torch.tensor(views, dtype=torch.long))
        return self._kept(seen)

    def _kept(self, observed: Tensor) -> "Structure":
        """With some of the observations (m,), as far as these leave a point two or more."""
        count = torch.bincount(self.point[observed], minlength=len(self.position))
        observed = observed & (count >= 2)[self.point]
        number = torch.cumsum(count >= 2, 0) - 1
        return Structure(
            self.position[count >= 2],
            number[self.point[observed]],
            self.view[observed],
            self.keypoint[observed],
        )


def structure_of(worlds: Iterable[tuple[Sequence[int], list[View], list[Points]]]) -> Structure:
    """The structure of all worlds of a run; its views are numbered by their rows among the frames.

    worlds: of each the rows of its index views, these views and their points.
    """
    parts, count = [], 0
    for rows, views, points in worlds:
        part = joined_points(views, points)
        number = torch.tensor(rows, dtype=torch.long)[part.view]
        parts.append((part.position, part.point + count, number, part.keypoint))
        count += len(part.position)
    if not parts:
        none = torch.zeros(0, dtype=torch.long)
        return Structure(torch.zeros(0, 3, dtype=torch.float64), none, none, none)
    return Structure(*(torch.cat(values) for values in zip(*parts)))


def joined_points(views: list[View], points: list[Points]) -> Structure:
    """The points of posed views, as `triangulate_views` gives them, joined into tracks."""
    first = torch.tensor([0, *(len(view.features) for view in views)]).cumsum(0)
    anchor, other, similarity = _seen_again(views, points, first)
    corner = _corners(views, first)
    edges = torch.cat([anchor, torch.arange(len(corner))]), torch.cat([other, corner])
    track = _components(int(first[-1]), *edges)
    member = torch.unique(torch.cat([anchor, other]))
    alike = torch.zeros(int(first[-1]), dtype=similarity.dtype)
    alike = alike.scatter_reduce(0, anchor, similarity, "amax")
    alike = alike.scatter_reduce(0, other, similarity, "amax")
    view = torch.searchsorted(first, member, right=True) - 1
    # A corner can be several keypoints of an image: the one most alike stands for it.
    order = alike[member].argsort(descending=True, stable=True)
    member, view = member[order], view[order]
    key = track[member] * len(views) + view
    order = key.argsort(stable=True)
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[order][1:] != key[order][:-1]
    member, view = member[order[new]], view[order[new]]
    _, point = torch.unique(track[member], return_inverse=True)
    structure = Structure(
        torch.zeros(int(point.max()) + 1 if len(point) else 0, 3, dtype=torch.float64),
        point,
        view,
        member - first[view],
    )
    everything = torch.ones(len(point), dtype=torch.bool)
    return _located(structure._kept(everything), views, points)


def _seen_again(
    views: list[View], points: list[Points], first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of keypoints that show one point, counted over all views, and their similarity (m,)."""
    everything = point_map(views, points, range(len(views)))
    own = torch.cat([torch.nonzero(p.valid)[:, 0] + start for p, start in zip(points, first)])
    width = max([p.seen_in.shape[1] for p in points], default=1)
    pad = torch.nn.functional.pad
    seen_in = torch.cat(
        [pad(p.seen_in, (0, width - p.seen_in.shape[1]), value=-1)[p.valid] for p in points]
    )
    cameras = cameras_of(views)
    pairs = []
    for number, view in enumerate(views):
        rows = torch.nonzero((seen_in == number).any(dim=1))[:, 0]
        if not len(rows) or not len(view.features):
            continue
        here = everything.select(rows)
        xy, _ = project_points(cameras.select(torch.tensor([number])), here.position)
        near = near_candidates(here, view, xy, CONSENSUS_PX)
        near = near.select(near.similarity == near.best_of(near.point, len(rows)))
        pairs.append((own[rows[near.point]], near.keypoint + first[number], near.similarity))
    if not pairs:
        none = torch.zeros(0, dtype=torch.long)
        return none, none, torch.zeros(0)
    return tuple(torch.cat(part) for part in zip(*pairs))


def _corners(views: list[View], first: Tensor) -> Tensor:
    """For each keypoint of all views the first of its view at the same place: of a corner that looks
    several ways each way is a keypoint.
    """
    found = []
    for view, start in zip(views, first):
        _, place = torch.unique(view.features.xy_px, dim=0, return_inverse=True)
        number = torch.arange(len(place))
        least = torch.full_like(number, len(number)).scatter_reduce(0, place, number, "amin")
        found.append(start + least[place])
    return torch.cat(found)


def _components(count: int, a: Tensor, b: Tensor) -> Tensor:
    """For each of `count` nodes the smallest number of a node that edges a-b connect it with."""
    label = torch.arange(count)
    while True:
        least = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def _located(structure: Structure, views: list[View], points: list[Points]) -> Structure:
    """With positions: of the points of its keypoints that which most views see, refined on all of
    its observations; those that do not fit are taken out."""
    cameras, fits = cameras_of(views), torch.zeros(len(structure.point), dtype=torch.bool)
    first = torch.tensor([0, *(len(view.features) for view in views)]).cumsum(0)
    own = torch.cat([p.position for p in points])
    support = torch.cat([torch.where(p.valid, (p.seen_in >= 0).sum(1), -1) for p in points])
    for start in range(0, len(structure.position), TRACKS_AT_ONCE):
        rows = torch.nonzero(
            (structure.point >= start) & (structure.point < start + TRACKS_AT_ONCE)
        )[:, 0]
        point = structure.point[rows] - start
        order = point.argsort(stable=True)
        rows, point = rows[order], point[order]
        count = torch.bincount(point)
        column = torch.arange(len(point)) - (count.cumsum(0) - count)[point]
        slots = torch.full((len(count), int(count.max())), -1)
        slots[point, column] = rows
        seen, at = slots >= 0, slots.clamp_min(0)
        node = first[structure.view[at]] + structure.keypoint[at]
        best = torch.where(seen, support[node], -2).argmax(dim=1, keepdim=True)
        position = own[node.gather(1, best)[:, 0]]
        xy = torch.cat([view.features.xy_px for view in views])[node].double()
        placed = cameras.select(structure.view[at])
        for _ in range(2):
            good = seen & agreeing(placed, position[:, None], xy, REPROJECTION_PX)
            refined, _ = refine_points(placed, xy, good, position)
            position = torch.where((good.sum(1) >= 2)[:, None], refined, position)
        good = seen & agreeing(placed, position[:, None], xy, REPROJECTION_PX)
        structure.position[start : start + len(count)] = position
        fits[at[good]] = True
    return structure._kept(fits)
