"""Where the camera could be: what repeats is repeated once more."""

import math

import torch

from localization.absolute_pose import rotation_from_vector
from localization.hypotheses import shifted_hypotheses


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
