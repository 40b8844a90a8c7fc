"""Tracks: keypoints of one and the same point, as the world from which they were drawn knows it."""

from dataclasses import replace

import torch

from localization.features import Features
from localization.structure import Structure, _located, joined_points, structure_of
from localization.triangulation import triangulate_views


def views_of(random_world, random_poses, count=8, seed=3):
    world = random_world(seed)
    return world, [world.view(R, c) for R, c in random_poses(count, seed)]


def test_every_track_is_one_point_of_the_world(random_world, random_poses):
    world, views = views_of(random_world, random_poses)
    found = joined_points(views, triangulate_views(views))
    truth = torch.tensor(
        [
            int(views[v].seen[k]) if k < len(views[v].seen) else -1
            for v, k in zip(found.view.tolist(), found.keypoint.tolist())
        ]
    )
    assert len(found.position) > 200
    names = [set(truth[found.point == p].tolist()) for p in range(len(found.position))]
    assert sum(len(name) == 1 for name in names) > 0.98 * len(names)
    single = [(p, name.pop()) for p, name in enumerate(names) if len(name) == 1 and -1 not in name]
    assert len({true for _, true in single}) == len(single)  # no point twice
    off = torch.stack([(found.position[p] - world.points[true]).norm() for p, true in single])
    assert float(off.median()) < 0.02


def test_a_keypoint_has_one_point_and_a_point_one_keypoint_an_image(random_world, random_poses):
    """Also where a corner is two keypoints of an image."""
    _, views = views_of(random_world, random_poses)
    twice = [
        replace(v, features=Features(*(torch.cat([w, w[:100]]) for w in vars(v.features).values())))
        for v in views
    ]
    found = joined_points(twice, triangulate_views(twice))
    assert len(found.position) > 100
    for key in (found.view * 10_000 + found.keypoint, found.view * 100_000 + found.point):
        assert len(key.unique()) == len(key)
    assert int(torch.bincount(found.point).min()) >= 2
    assert found.point.unique().tolist() == list(range(len(found.position)))


def test_a_corner_that_is_matched_two_ways_is_one_point(random_world, random_poses):
    """As keypoints of two orientations are: at one place, each with its own like in the other images."""
    _, views = views_of(random_world, random_poses, count=5)

    def both_ways(view):
        other = replace(view.features, descriptors=view.features.descriptors.roll(1, dims=1))
        pairs = zip(vars(view.features).values(), vars(other).values())
        return replace(view, features=Features(*(torch.cat(pair) for pair in pairs)))

    views = [both_ways(view) for view in views]
    found = joined_points(views, triangulate_views(views))
    seen = zip(found.view.tolist(), found.keypoint.tolist())
    places = [(v, *views[v].features.xy_px[k].tolist()) for v, k in seen]
    assert len(places) > 200 and len(set(places)) == len(places)


def test_what_some_views_show(random_world, random_poses):
    _, views = views_of(random_world, random_poses)
    found = joined_points(views, triangulate_views(views))
    part = found.within([1, 4, 6])
    assert set(part.view.tolist()) == {1, 4, 6} and 0 < len(part.position) < len(found.position)
    assert int(torch.bincount(part.point, minlength=len(part.position)).min()) >= 2
    whole = {tuple(p): i for i, p in enumerate(found.position.tolist())}
    kept = [whole[tuple(p)] for p in part.position.tolist()]
    assert kept == sorted(kept)
    for new, old in enumerate(kept):
        here = {(v, k) for v, k in zip(*_shown(found, old)) if v in (1, 4, 6)}
        assert here == set(zip(*_shown(part, new)))
    assert len(found.within([2]).position) == len(found.within([]).view) == 0


def _shown(structure: Structure, point: int) -> tuple[list[int], list[int]]:
    of = structure.point == point
    return structure.view[of].tolist(), structure.keypoint[of].tolist()


def test_worlds_stand_side_by_side_with_their_rows(random_world, random_poses):
    worlds = [
        (rows, views, triangulate_views(views))
        for rows, views in (
            ([3, 5, 7, 9], views_of(random_world, random_poses, 4, 1)[1]),
            ([0, 1, 2, 4], views_of(random_world, random_poses, 4, 2)[1]),
        )
    ]
    found = structure_of(worlds)
    alone = joined_points(*worlds[1][1:])
    second = found.within([0, 1, 2, 4])
    assert torch.equal(second.position, alone.position)
    assert torch.equal(second.view, torch.tensor([0, 1, 2, 4])[alone.view])
    assert len(found.within([3, 0]).position) == 0  # no point of two worlds
    assert len(structure_of([]).position) == 0


def test_views_that_match_nothing_have_no_points(random_world, random_poses):
    (R, c), *_ = random_poses(1, 0)
    view = random_world(1).view(R, c)
    assert len(joined_points([view], triangulate_views([view])).position) == 0


def test_an_observation_that_does_not_fit_is_taken_out(random_world, random_poses):
    _, views = views_of(random_world, random_poses)
    points = triangulate_views(views)
    found = joined_points(views, points)
    point = int(torch.bincount(found.point).argmax())
    of = torch.nonzero(found.point == point)[:, 0]
    wrong = int(of[-1])
    used = found.keypoint[found.view == found.view[wrong]]
    free = next(k for k in range(len(views[0].features)) if k not in used.tolist())
    keypoint = found.keypoint.clone()
    keypoint[wrong] = free  # clutter, somewhere else in the image
    mended = _located(replace(found, keypoint=keypoint), views, points)
    assert len(mended.view) == len(found.view) - 1
    here = mended.point == point
    assert int(here.sum()) == len(of) - 1 and free not in mended.keypoint[here].tolist()
    assert float((mended.position[point] - found.position[point]).norm()) < 0.02
