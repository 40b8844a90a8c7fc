"""The score of hypotheses: the weight of a match, and that the truth explains most."""

import math

import torch

from localization.absolute_pose import rotation_from_vector
from localization.matching import mutual_matches
from localization.scoring import epipolar_scores, gather_evidence, match_weight
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
