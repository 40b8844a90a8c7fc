"""triangulation.py: against closed forms and pycolmap."""

import pycolmap
import pytest
import torch

from localization.cameras import Camera
from localization.triangulation import (
    anchor_depths,
    cameras_of,
    consensus_points,
    project_points,
    refine_points,
    triangulate_views,
)


def observed(world, poses, noise_px, seed=0):
    """(cameras, xy (n, V, 2), seen (n, V)) of all points of a world in cameras at poses."""
    cameras = cameras_of([world.view(*pose) for pose in poses])
    xy, depth = project_points(cameras, world.points[:, None])
    generator = torch.Generator().manual_seed(seed)
    xy = xy + noise_px * torch.randn(xy.shape, generator=generator, dtype=torch.float64)
    return cameras, xy, depth > 0.3


def test_anchor_depth_in_closed_form():
    """Rays from (0,0,0) and (1,0,0) to (0,0,2): depth 2, angle atan(1/2)."""
    to = torch.tensor([-1.0, 0, 2]).double()
    depth, angle = anchor_depths(
        torch.tensor([0, 0, 1.0]).double(), torch.zeros(3).double(), to / to.norm(), torch.tensor([1.0, 0, 0]).double()
    )
    assert float(depth) == pytest.approx(2)
    assert float(angle) == pytest.approx(26.565, abs=1e-3)
    ahead = torch.tensor([0, 0, 1.0]).double()
    depth, angle = anchor_depths(ahead, torch.zeros(3).double(), ahead, torch.tensor([1.0, 0, 0]).double())
    assert torch.isfinite(depth) and float(angle) < 1e-3


def test_refined_points_are_pycolmaps(random_world, random_poses):
    """The least-squares point of pycolmap's triangulation, with noise, from a start 10 cm off."""
    world = random_world(0, count=30)
    cameras, xy, seen = observed(world, random_poses(6, 1), 1.0)
    position, _ = refine_points(cameras, xy, seen, world.points + 0.1)
    camera = pycolmap.Camera(model="PINHOLE", width=640, height=480, params=[320, 320, 320, 240])
    for k in range(len(position)):
        columns = seen[k].nonzero()[:, 0].tolist()
        poses = [
            pycolmap.Rigid3d(
                pycolmap.Rotation3d(cameras.R_cam_from_world[v].numpy()),
                (-cameras.R_cam_from_world[v] @ cameras.c_world[v]).numpy(),
            )
            for v in columns
        ]

        def cost(X, k=k, poses=poses, columns=columns):
            return sum(
                float(((torch.tensor(camera.img_from_cam((p * X)[None])[0]) - xy[k, v]) ** 2).sum())
                for p, v in zip(poses, columns)
            )

        ours = cost(position[k].numpy())
        for axis in torch.eye(3, dtype=torch.float64) * 1e-3:
            assert ours <= cost((position[k] + axis).numpy()) and ours <= cost((position[k] - axis).numpy())
    assert (position - world.points).norm(dim=1).median() < 0.05


def test_covariance_predicts_the_spread(random_world, random_poses):
    """Monte Carlo: normalized squared errors of refined points average 3, the number of coordinates."""
    world, poses = random_world(2, count=40), random_poses(8, 3)
    squared = []
    for seed in range(30):
        cameras, xy, seen = observed(world, poses, 1.0, seed)
        position, covariance = refine_points(cameras, xy, seen, world.points)
        error = position - world.points
        squared.append((error[:, None] @ torch.linalg.inv(covariance) @ error[..., None]).flatten())
    assert float(torch.cat(squared).mean()) == pytest.approx(3, rel=0.15)


def test_consensus_outvotes_wrong_matches(random_world, random_poses):
    """40 % of the matches point elsewhere; the depth most of them bear out is the right one."""
    world = random_world(4, count=200)
    cameras, xy, seen = observed(world, random_poses(8, 5), 0.5)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(seen.shape, generator=generator) < 0.4
    xy[wrong] = torch.rand(int(wrong.sum()), 2, generator=generator, dtype=torch.float64) * 480
    anchor = ~wrong[:, 0] & seen[:, 0]
    first, others = torch.tensor([0]), torch.arange(1, 8).expand(200, -1)
    points = consensus_points(cameras.select(first), xy[:, 0], cameras.select(others), xy[:, 1:], seen[:, 1:], others)
    good = points.valid & anchor
    assert good.sum() > 0.8 * anchor.sum()
    error = (points.position - world.points).norm(dim=1)[good]
    assert error.median() < 0.05 and (error < 0.5).double().mean() > 0.97
    assert (points.seen_in[good] >= 0).sum(1).double().mean() > 3
    assert torch.isfinite(points.position).all()
    agree = points.valid & (points.seen_in == 3).any(1) & ((points.seen_in >= 0).sum(1) == 1)
    assert torch.equal(points.without([3]).valid, points.valid & ~agree)
    some = torch.tensor([[n not in (-1, 3, 5) for n in row] for row in points.seen_in.tolist()]).any(1)
    assert torch.equal(points.without([3, 5]).valid, points.valid & some)


def test_points_behind_and_without_parallax_are_refused(random_world, look_at):
    world = random_world(6, count=50)
    R = look_at(torch.zeros(3).double(), torch.tensor([0.0, 7.0, 0.0]).double())
    near = [(R, torch.tensor([0.001 * i, 0.0, 0.0]).double()) for i in range(4)]
    cameras, xy, seen = observed(world, near, 0.0)
    one, rest = torch.tensor([0]), torch.tensor([1, 2, 3]).expand(50, -1)
    none = consensus_points(cameras.select(one), xy[:, 0], cameras.select(rest), xy[:, 1:], seen[:, 1:], rest)
    assert not none.valid.any()  # 3 mm of baseline at 7 m is far under a degree
    wide = [(R, torch.tensor([0.5 * i, 0.0, 0.0]).double()) for i in range(4)]
    cameras, xy, seen = observed(world, wide, 0.0)
    assert consensus_points(cameras.select(one), xy[:, 0], cameras.select(rest), xy[:, 1:], seen[:, 1:], rest).valid.all()
    flipped = xy[:, 1:].clone()  # disparity of the wrong sign: the rays meet behind
    flipped[..., 0] = 2 * xy[:, :1, 0] - flipped[..., 0]
    assert not consensus_points(cameras.select(one), xy[:, 0], cameras.select(rest), flipped, seen[:, 1:], rest).valid.any()


def test_triangulate_views_end_to_end(random_world, random_poses):
    world = random_world(8)
    views = [world.view(*pose) for pose in random_poses(6, 9)]
    calls = []
    for view, points in zip(views, triangulate_views(views, progress=lambda done, of: calls.append((done, of)))):
        n = len(view.seen)
        assert points.valid[:n].double().mean() > 0.8
        error = (points.position[:n] - world.points[view.seen]).norm(dim=1)[points.valid[:n]]
        assert error.median() < 0.05
        assert points.valid[n:].double().mean() < 0.2  # clutter
    assert calls[-1] == (15, 15)


def test_single_and_identical_views_give_no_points(random_world, random_poses):
    world = random_world(10)
    view = world.view(*random_poses(1, 11)[0])
    for views in ([view], [view, view], [view, view, view]):
        for points in triangulate_views(views):
            assert not points.valid.any() and torch.isfinite(points.position).all()


def test_mixed_cameras(random_world, random_poses):
    """Views of different cameras in one world, a portrait one among them."""
    world = random_world(12)
    small = Camera(200.0, 210.0, 150.0, 205.0, 300, 410)
    views = [world.view(*pose, camera=small if i % 2 else None) for i, pose in enumerate(random_poses(6, 13))]
    for view, points in zip(views, triangulate_views(views)):
        n = len(view.seen)
        error = (points.position[:n] - world.points[view.seen]).norm(dim=1)[points.valid[:n]]
        assert len(error) > 50 and error.median() < 0.06
