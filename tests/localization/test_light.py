"""Light as evidence: another place is lit otherwise, another exposure is the same light."""

import math
from dataclasses import replace

import pytest
import torch

from localization.features import LIGHT_CELL_PX
from localization.light import LEAST, Light, learn_light
from localization.localize import _Index
from localization.refinement import point_map
from localization.triangulation import triangulate_views

CELLS = (480 // LIGHT_CELL_PX, 640 // LIGHT_CELL_PX)


@pytest.fixture
def lit_world(random_world, random_poses):
    """Five posed views of a world, and the map of its points; each image gets `light` (30, 40) as its log light."""
    world = random_world(5)
    poses = random_poses(5, seed=2)

    def build(lights):
        views = []
        for pose, light in zip(poses, lights):
            view = world.view(*pose, clutter=0)
            view.features = replace(view.features, log_light=light)
            views.append(view)
        return views, point_map(views, triangulate_views(views))

    return build


def flat(value: float = -1.0) -> torch.Tensor:
    return torch.full(CELLS, value)


def test_equal_light_is_alike_whatever_the_exposure(lit_world):
    views, points = lit_world([flat(v) for v in (-1.0, -1.0, -1.0, -1.0, -0.2)])
    light = learn_light(points.select(points.view < 4), views[:4], 7.0)
    assert light.limit == LEAST  # equal images bear any small difference out; the least stays
    query = views[4]
    pose = (query.R_world_from_cam.T, query.c_world)
    others = points.select(points.view != 4)
    assert light.alike(others, views, query, *pose) == pytest.approx(1.0, abs=1e-6)


def test_likeness_is_the_weighted_share_of_points_out_of_the_shade(lit_world):
    lights = [flat() for _ in range(5)]
    lights[4][:, :16] -= 10 * LEAST
    views, points = lit_world(lights)
    light = learn_light(points.select(points.view < 4), views[:4], 7.0)
    query = views[4]
    R, c = query.R_world_from_cam.T, query.c_world
    others = points.select(points.view != 4)
    local = (others.position - c) @ R.T
    x = local[:, 0] / local[:, 2] * 320 + 320
    y = local[:, 1] / local[:, 2] * 320 + 240
    inside = (local[:, 2] > 0) & (x >= 0) & (x < 640) & (y >= 0) & (y < 480)
    shaded = x < 16 * LIGHT_CELL_PX
    weight = 1 / (1 + ((torch.stack([v.c_world for v in views])[others.view] - c).norm(dim=1) / 0.7) ** 2)
    share = float((weight * (inside & ~shaded)).sum() / (weight * inside).sum())
    assert 0.5 < share < 0.9
    assert light.alike(others, views, query, R, c) == pytest.approx(share, abs=0.1)


def test_near_index_images_count_most(lit_world):
    """The query's own place shows it as it is; the other four, seven times as far as `near_m`, are striped."""
    striped = flat()
    striped[:, ::2] = 5.0
    views, points = lit_world([striped, striped, striped, striped, flat()])
    pose = (views[4].R_world_from_cam.T, views[4].c_world)
    away_m = min(float((v.c_world - views[4].c_world).norm()) for v in views[:4])
    assert Light(away_m / 7, LEAST).alike(points, views, views[4], *pose) > 0.9
    assert Light(away_m * 100, LEAST).alike(points, views, views[4], *pose) < 0.6


def test_the_limit_is_learned_from_how_the_index_images_differ(lit_world):
    generator = torch.Generator().manual_seed(1)
    lights = [flat() + 0.3 * torch.randn(CELLS, generator=generator) for _ in range(5)]
    views, points = lit_world(lights)
    rough = learn_light(points, views, 7.0)
    views, points = lit_world([flat() + (light + 1) / 3 for light in lights])
    smooth = learn_light(points, views, 7.0)
    assert rough.limit == pytest.approx(3 * smooth.limit, rel=0.02)
    assert smooth.limit > 2 * LEAST


def test_too_few_points_say_nothing(lit_world):
    views, points = lit_world([flat() for _ in range(5)])
    few = points.select(torch.arange(5))
    assert math.isinf(learn_light(few, views, 7.0).limit)
    views[0].features.log_light[:, ::2] = 5.0
    pose = (views[0].R_world_from_cam.T, views[0].c_world)
    assert Light(0.7, LEAST).alike(few, views, views[0], *pose) == 1.0
    assert Light(0.7, LEAST).alike(points, views, views[0], *pose) < 0.8


def test_later_views_are_compared_as_the_first_ones_taught(lit_world):
    views, _ = lit_world([flat() for _ in range(5)])
    index = _Index.build(views[:4], lambda done, of: None)
    assert index.extended(views[4:]).light == index.light
