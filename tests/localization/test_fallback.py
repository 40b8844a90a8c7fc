"""Answers from matches alone, without points, against the true poses of made views."""

import math

import torch

from localization.fallback import fall_back
from localization.matching import View, mutual_matches
from localization.scoring import gather_evidence
from localization.triangulation import Points


def guesses(index: list[View], query: View, seed: int = 0) -> list:
    """As if nothing had been triangulated."""
    matches = {i: mutual_matches(query.features, view.features) for i, view in enumerate(index)}
    points = [
        Points(torch.zeros(n, 3).double(), torch.zeros(n, dtype=torch.bool), torch.full((n, 1), -1))
        for n in (len(view.features) for view in index)
    ]
    evidence = gather_evidence(query, index, points, matches)
    generator = torch.Generator().manual_seed(seed)
    return fall_back(evidence, index, list(range(len(index))), generator)


def test_the_distance_is_that_which_other_views_bear_out(random_world, random_poses):
    for seed in range(3):
        world = random_world(seed)
        *index, query = (world.view(*pose) for pose in random_poses(5, seed + 10))
        best = guesses(index, query)[0]
        away = float((best.c_world - query.c_world).norm())
        assert best.method == "essential"
        assert away < 0.05 and away < 4 * best.sigma_m < 4.0
        cosine = (torch.trace(best.R_world_from_cam.T @ query.R_world_from_cam) - 1) / 2
        assert float(cosine.clamp_max(1).acos()) < math.radians(1)


def test_one_view_tells_no_distance(random_world, random_poses):
    """Nor do others that stand where it stands."""
    world = random_world(4)
    poses = random_poses(2, 5)
    view, query = world.view(*poses[0]), world.view(*poses[1])
    for index in ([view], [view, world.view(*poses[0])]):
        found = guesses(index, query)
        assert [guess.method for guess in found][:2] == ["rotation", "retrieval"]
        assert math.isinf(found[0].sigma_m) and torch.equal(found[0].c_world, view.c_world)


def test_a_query_without_matches_is_where_the_first_retrieved_is(random_world, random_poses):
    world = random_world(4)
    *index, query = (world.view(*pose) for pose in random_poses(4, 6))
    blank = View(query.features.select(slice(0)), query.camera)
    assert [guess.method for guess in guesses(index, blank)] == 3 * ["retrieval"]
