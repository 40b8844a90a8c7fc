"""What a query ought to explain at a place: closed forms, and aliases of an equal tile."""

import math
from dataclasses import replace

import pytest
import torch

from localization.absolute_pose import rotation_from_vector
from localization.expectation import KEYPOINTS, NEAR, UNSEEN, Expectation, nearness
from localization.localize import build_map, localize
from localization.matching import View, mutual_matches
from localization.scoring import epipolar_scores, gather_evidence
from localization.triangulation import triangulate_views


def expectation(views: list[View], near_m: float, explained=None) -> Expectation:
    """Learned from the views, or with what each explains given."""
    if explained is None:
        return Expectation.learn(views, triangulate_views(views), near_m / NEAR)
    R, c = torch.stack([v.R_world_from_cam for v in views]), torch.stack([v.c_world for v in views])
    learned = Expectation.learn(views, triangulate_views(views), near_m / NEAR)
    given = {"R_world_from_cam": R, "c_world": c, "explained": torch.tensor(explained, dtype=torch.float64)}
    return replace(learned, **given, sizes=torch.full_like(learned.sizes, torch.inf))  # any size is like


def at(x: float) -> torch.Tensor:
    return torch.tensor([x, 0.0, 0.0], dtype=torch.float64)


def about_z(degrees: float) -> torch.Tensor:
    return rotation_from_vector(torch.tensor([0.0, 0.0, math.radians(degrees)], dtype=torch.float64))


def test_nearness_falls_to_a_half_and_never_divides_by_zero():
    away_m = torch.tensor([0.0, 0.5, 1.0, 1.5])
    assert nearness(away_m, 0.5).tolist() == pytest.approx([1, 1 / 2, 1 / 5, 1 / 10])
    assert nearness(torch.tensor([0.0, 1.0]), 0.0).tolist() == pytest.approx([1, 0], abs=1e-9)


def test_the_expectation_is_the_mean_of_the_three_nearest_carried_to_the_distance(random_world):
    world = random_world(0)
    ahead = about_z(0.0) @ torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    views = [world.view(ahead, at(x)) for x in (0.0, 0.5, 1.0, 3.0)]
    views.append(world.view(about_z(90.0) @ ahead, at(0.0)))  # near, but looks elsewhere
    expected = expectation(views, 0.5, [0.4, 0.2, 0.1, 50.0, 50.0])
    query = views[0]
    count = len(query.features)
    by_hand = (0.4 * 1 + 0.2 / 2 + 0.1 / 5) / 3 * count
    assert expected.score(query, ahead.T, at(0.0)) == pytest.approx(by_hand)
    assert expected.fulfilled(query, ahead.T, at(0.0), by_hand / 2) == pytest.approx(1 / 4)
    assert expected.fulfilled(query, ahead.T, at(0.0), 2 * by_hand) == 1
    assert expected.score(query, (about_z(-90.0) @ ahead).T, at(0.0)) == 0
    assert expected.fulfilled(query, (about_z(-90.0) @ ahead).T, at(0.0), 0.0) == UNSEEN < 0.5


def test_keypoints_of_sizes_that_index_images_lack_can_explain_nothing(random_world, random_poses):
    """A third of a query's are four times as large as any there; the rest are the index images' own, less those."""
    world = random_world(6, count=300)
    views = [world.view(*pose) for pose in random_poses(4, 7)]
    expected = expectation(views, 0.5)
    R, c = views[0].R_world_from_cam.T, views[0].c_world
    scale_px = views[0].features.scale_px.clone()
    usual = expected.score(views[0], R, c)
    scale_px[::3] *= 4
    large = replace(views[0], features=replace(views[0].features, scale_px=scale_px))
    share = 1 - len(scale_px[::3]) / len(scale_px)
    counts = torch.tensor([len(view.features) for view in views]).double()
    like_sized = float(counts.clamp_max(counts.mean()).sum() / counts.sum())
    by_hand = min(share * counts[0], float(counts.mean())) / like_sized / min(counts[0], float(counts.mean()) / like_sized)
    assert expected.score(large, R, c) == pytest.approx(float(by_hand) * usual)
    assert by_hand < 0.75


def test_a_view_taken_out_explains_what_it_does_as_a_query(random_world, random_poses):
    """At an index view's own pose and distance to the others the expectation is that view's score, as of a query."""
    world = random_world(1, count=KEYPOINTS - 100)  # all keypoints are used
    poses = random_poses(6, 2)
    views = [world.view(*pose) for pose in poses]
    expected = expectation(views, 0.7)
    query, others = views[0], range(1, 6)
    evidence = gather_evidence(
        query, views, triangulate_views(views), {i: mutual_matches(query.features, views[i].features) for i in others}
    )
    score = float(epipolar_scores(evidence, poses[0][0].T[None], poses[0][1][None], polished=True))
    away_m = min(float((views[i].c_world - poses[0][1]).norm()) for i in others)
    share = float(expected.explained[0]) * float(nearness(torch.tensor(away_m), 0.7))
    assert share * len(query.features) == pytest.approx(score, rel=1e-6)


def test_nothing_is_expected_from_fewer_than_two_views(random_world, random_poses):
    world = random_world(3)
    R, c = random_poses(1, 4)[0]
    view = world.view(R, c)
    assert expectation([view], 0.5).score(view, R.T, c) == 0
    assert expectation([view], 0.5).fulfilled(view, R.T, c, 3.0) == 1


def test_what_a_view_explains_is_bounded(random_world, look_at):
    """Of two views: the other far away, so that what it explains is carried too far; one that looks elsewhere."""
    world = random_world(5)
    target = torch.tensor([0.0, 7.0, 0.0], dtype=torch.float64)
    near, far, away = (world.view(look_at(c, t), c) for c, t in ((at(0), target), (at(2), target), (at(1), at(9))))
    R, c = near.R_world_from_cam.T, near.c_world
    expected = expectation([near, far], 1e-3)
    most = expected.score(near, R, c) / len(near.features)
    there = float(expected.explained[1]) * float(nearness(torch.tensor(2.0), 1e-3))
    assert expected.explained[0] > 1 and 0 < there < 1
    assert most == pytest.approx((1 + there) / 2, rel=1e-3)
    assert expectation([near, away], 0.5).score(near, R, c) == 0


@pytest.fixture
def gap(corridor, look_at):
    """Factory: index views along a wall of equal tiles, none within 2.2 tiles of x = 5, and queries at some x."""

    def build(seed: int, *queries: float) -> tuple[list[View], list[View]]:
        world = corridor(seed, difference=0.1, marks=6)
        generator = torch.Generator().manual_seed(seed)

        def view(x: float) -> View:
            c = at(x) + 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)
            c[1] += 1.5
            return world.view(look_at(c, c + torch.tensor([0.2, 3.0, 0.0]), 0.1), c, spread=0.25)

        return [view(0.3 * i) for i in range(36) if abs(0.3 * i - 5.0) > 2.2], [view(x) for x in queries]

    return build


def errors(index: list[View], queries: list[View], seed: int) -> list[float]:
    ranking = [list(range(len(index)))] * len(queries)
    asked = [View(q.features, q.camera) for q in queries]
    estimates = localize(build_map(index, seed=seed), asked, ranking, seed=seed)
    return [float((e.c_world - q.c_world).norm()) for e, q in zip(estimates, queries)]


@pytest.mark.parametrize("seed", range(2))
def test_the_true_tile_is_found_far_from_any_index_view(gap, seed):
    """Its aliases, right before index views, explain more of the query than the truth does."""
    index, queries = gap(seed, 5.0)
    assert errors(index, queries, seed)[0] < 0.05


def test_queries_help_each_other(gap):
    """Alone the query is taken for one of another tile; two others, halfway to the index views, tell it apart."""
    index, queries = gap(2, 5.0, 3.5, 6.5)
    assert errors(index, queries[:1], 2)[0] > 0.5
    assert max(errors(index, queries, 2)) < 0.05
