"""Where the camera could be: what repeats is repeated once more."""

import math

import torch

from localization.absolute_pose import rotation_from_vector
from localization.hypotheses import bearing_hypotheses, shifted_hypotheses
from localization.map import Map
from localization.search import matched


def test_two_tiles_that_look_alike_lead_to_the_next_on_either_side():
    generator = torch.Generator().manual_seed(0)
    R = rotation_from_vector(torch.randn(3, generator=generator, dtype=torch.float64)[None])[0]
    first = torch.randn(3, generator=generator, dtype=torch.float64)
    step = torch.tensor([0.6, -1.2, 0.3], dtype=torch.float64)
    elsewhere = rotation_from_vector(torch.tensor([[0.0, math.radians(5), 0.0]]).double())[0] @ R
    rotations = torch.stack([R, R, elsewhere])
    centers = torch.stack([first, first + step, first + torch.tensor([5.0, 5.0, 5.0])])

    found = shifted_hypotheses(rotations, centers, 2.0, 0.1)
    steps = (found.c_world - first) @ step / step.square().sum()
    on_line = (found.c_world - first - steps[:, None] * step).norm(dim=1) < 1e-9
    assert sorted(steps[on_line].round(decimals=6).tolist()) == [-1.0, 0.0, 1.0, 2.0]
    assert torch.equal(found.R_cam_from_world[on_line][0], R)
    moved = found.R_cam_from_world.isclose(elsewhere).flatten(1).all(1)
    away = (found.c_world[moved] - centers[2]).norm(dim=1)
    torch.testing.assert_close(away, step.norm().expand(2))
    assert len(found) == 6


def test_nothing_is_moved_by_less_than_a_mode_is_wide():
    R = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    c = torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, 0.0]], dtype=torch.float64)
    assert len(shifted_hypotheses(R, c, 2.0, 0.1)) == 0
    assert len(shifted_hypotheses(R[:0], c[:0], 2.0, 0.1)) == 0


def test_bearings_lead_past_the_truth(random_world, random_poses):
    """Of two index images alone: the rotation is found, and the line from one through the query."""
    world = random_world(3)
    views = [world.view(*pose) for pose in random_poses(3, 4)]
    index, query = Map.build(views[:2]), views[2]
    evidence = matched(query, index, [0, 1])
    found = bearing_hypotheses(evidence, index.views, 5.0, torch.Generator().manual_seed(0))
    turn = found.R_cam_from_world @ query.R_world_from_cam
    assert len(found) == 16 and float(torch.rad2deg(turn[:, 2, :2].norm(dim=1)).max()) < 0.5
    for line in found.c_world.split(8):
        way = line[1:] - line[:1]
        offset = query.c_world - line[0]
        along = way[-1] / way[-1].norm()
        assert float((offset - (offset @ along) * along).norm()) < 0.03
        assert 0 < float(offset @ along) < float(way[-1].norm())
