"""Where the camera could be, by two index images alone."""

import torch

from localization.hypotheses import bearing_hypotheses
from localization.map import Map
from localization.search import matched


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
