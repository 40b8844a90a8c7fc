"""The score of hypotheses: the weight of a match, and that the truth explains most."""

import math
from dataclasses import replace

import torch

from localization.absolute_pose import rotation_from_vector
from localization.map import Map
from localization.matching import mutual_matches
from localization.refinement import refine_on_matches
from localization.scoring import (
    Evidence,
    epipolar_scores,
    gather_evidence,
    match_errors,
    match_slopes,
    match_weight,
)
from localization.search import matched
from localization.triangulation import triangulate_views


def test_weight_of_matches():
    weight = match_weight(torch.tensor([0, 0, 2]), torch.tensor([0.95, 0.935, 0.5]), 4)
    torch.testing.assert_close(weight, torch.tensor([1.0, math.exp(-1), 1.0]))


def test_epipolar_score_prefers_the_truth(random_world, random_poses):
    """The true pose beats a hundred others; every explained keypoint counts once however many images show it."""
    world = random_world(16)
    views = [world.view(*pose) for pose in random_poses(7, 17)]
    index, query = views[:6], views[6]
    matches = {i: mutual_matches(query.features, v.features) for i, v in enumerate(index)}
    evidence = gather_evidence(query, index, triangulate_views(index), matches)
    generator = torch.Generator().manual_seed(0)
    turn = rotation_from_vector(0.05 * torch.randn(100, 3, generator=generator, dtype=torch.float64))
    shift = 0.3 * torch.randn(100, 3, generator=generator, dtype=torch.float64)
    R = torch.cat([query.R_world_from_cam.T[None], turn @ query.R_world_from_cam.T])
    scores = epipolar_scores(evidence, R, torch.cat([query.c_world[None], query.c_world + shift]))
    assert scores.argmax() == 0 and scores[0] > 1.5 * scores[1:].max()
    assert 0.6 * len(query.seen) < scores[0] < len(query.features.xy_px)
    # Turned about, the camera sees nothing of it.
    behind = epipolar_scores(evidence, torch.diag(torch.tensor([-1.0, 1, -1]).double())[None] @ R[:1], query.c_world[None])
    assert behind[0] < 0.2 * scores[0]


def test_a_pose_that_points_contradict_explains_nothing_however_near_the_epipolar_lines(random_world, random_poses):
    """Along the line through one index camera all epipolar lines stay: only the points tell how far."""
    world = random_world(16)
    views = [world.view(*pose) for pose in random_poses(7, 17)]
    index, query = Map.build(views[:6]), views[6]
    evidence = matched(query, index, [0])
    evidence = evidence.select(evidence.has_point)
    R, center = query.R_world_from_cam.T, index.views[0].c_world
    c = torch.stack([query.c_world, center + 2.5 * (query.c_world - center)])
    rough = epipolar_scores(evidence, R.expand(2, 3, 3), c)
    torch.testing.assert_close(rough[1], rough[0], rtol=0.05, atol=0)
    exact = epipolar_scores(evidence, R.expand(2, 3, 3), c, polished=True)
    assert exact[0] > 0.8 * rough[0] and exact[1] < 0.3 * exact[0]
    evidence = replace(evidence, has_point=torch.zeros_like(evidence.has_point))
    exact = epipolar_scores(evidence, R.expand(2, 3, 3), c, polished=True)
    torch.testing.assert_close(exact[1], exact[0], rtol=0.05, atol=0)


def some_evidence(random_world, random_poses) -> tuple[Evidence, torch.Tensor, torch.Tensor]:
    """The evidence of a query, of whose index keypoints three in four have no point, and its pose."""
    world = random_world(16)
    views = [world.view(*pose, noise_px=0.2) for pose in random_poses(7, 17)]
    index, query = Map.build(views[:6]), views[6]
    for points in index.points:
        points.valid[torch.arange(len(points.valid)) % 4 > 0] = False
    return matched(query, index, list(range(6))), query.R_world_from_cam.T, query.c_world


def test_errors_of_matches_at_the_truth_are_the_noise_and_their_slopes_are_derivatives(random_world, random_poses):
    evidence, R, c = some_evidence(random_world, random_poses)
    assert 0 < evidence.has_point.sum() < 0.5 * len(evidence)
    error, weight = match_errors(evidence, R[None], c[None])
    right = evidence.ratio < 0.7
    assert float((weight[0] > 0)[right].double().mean()) > 0.98
    assert float(error[0].norm(dim=0)[right].median()) < 0.5
    assert bool((error[0, 1, ~evidence.has_point] == 0).all())
    error, _, slope = match_slopes(evidence, R[None], c[None], 5.0)
    move = 1e-3 * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, -2.0], dtype=torch.float64)
    moved, _ = match_errors(evidence, (rotation_from_vector(move[None, :3])[0] @ R)[None], (c + move[3:])[None])
    change = (moved - error)[0][:, right]
    told = torch.einsum("k,kdm->dm", move, slope[0])[:, right]
    assert float((change - told).norm() / change.norm()) < 0.05


def test_a_pose_is_refined_on_matches_most_of_which_have_no_point(random_world, random_poses):
    evidence, R, c = some_evidence(random_world, random_poses)
    generator = torch.Generator().manual_seed(1)
    turn = rotation_from_vector(0.02 * torch.randn(5, 3, generator=generator, dtype=torch.float64))
    start = turn @ R, c + 0.1 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    before = epipolar_scores(evidence, *start, polished=True)
    found = refine_on_matches(evidence, *start, 5.0)
    assert bool((epipolar_scores(evidence, *found, polished=True) > before).all())
    assert float((found[1] - c).norm(dim=1).max()) < 0.02
