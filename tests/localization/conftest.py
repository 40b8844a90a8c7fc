"""Synthetic scenes for the localization tests: 3D points with descriptors, seen by posed cameras, no pixels."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from localization.cameras import Camera, project
from localization.features import Features
from localization.matching import View


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def looking(c: Tensor, target: Tensor, roll: float = 0.0) -> Tensor:
    """R_world_from_cam (3, 3) of a camera at c that looks at target, world z up, turned about its axis by roll."""
    forward = unit(target - c)
    right = unit(torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0], dtype=c.dtype)))
    R = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    s, k = math.sin(roll), math.cos(roll)
    return R @ torch.tensor([[k, -s, 0], [s, k, 0], [0, 0, 1]], dtype=c.dtype)


CAMERA = Camera(320.0, 320.0, 320.0, 240.0, 640, 480)


@dataclass
class World:
    """Points (n, 3) and their descriptors (n, 128); views of them are drawn with `view`."""

    points: Tensor
    descriptors: Tensor
    generator: torch.Generator
    camera: Camera = CAMERA

    def view(self, R: Tensor, c: Tensor, *, noise_px=0.3, spread=0.3, clutter=50, camera=None) -> View:
        """What a camera at (R_world_from_cam, c_world) sees; keypoint k < len(seen) is point view.seen[k].

        spread: norm of the noise added to each unit descriptor; clutter: keypoints of nothing.
        """
        camera = camera or self.camera
        local = (self.points - c) @ R
        xy = project(camera, local)
        size = torch.tensor([camera.width, camera.height])
        seen = torch.nonzero((local[:, 2] > 0.3) & ((xy >= 0) & (xy < size)).all(1))[:, 0]
        draw = {"generator": self.generator, "dtype": torch.float64}
        xy = xy[seen] + noise_px * torch.randn(len(seen), 2, **draw)
        descriptors = self.descriptors[seen] + spread * unit(torch.randn(len(seen), 128, **draw))
        xy = torch.cat([xy, torch.rand(clutter, 2, **draw) * size])
        descriptors = unit(torch.cat([descriptors, torch.randn(clutter, 128, **draw)]))
        n = len(xy)
        features = Features(
            xy.float(), torch.full((n,), 2.0), torch.zeros(n), torch.linspace(1, 0.5, n), descriptors.float(),
        )
        view = View(features, camera, R, c)
        view.seen = seen
        return view


@pytest.fixture
def random_world():
    """Factory: a box of random points, x and z from -4 to 4, y from 4 to 10, with random descriptors."""

    def build(seed: int, count: int = 400, camera: Camera | None = None) -> World:
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        points = points * torch.tensor([8.0, 6.0, 8.0]) + torch.tensor([-4.0, 4.0, -4.0])
        descriptors = unit(torch.randn(count, 128, generator=generator, dtype=torch.float64))
        world = World(points, descriptors, generator)
        if camera:
            world.camera = camera
        return world

    return build


@pytest.fixture
def random_poses():
    """Factory: n poses near the origin that look into the box of `random_world`, rolled like a drone's."""

    def build(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(n, 7, generator=generator, dtype=torch.float64) * 2 - 1
        poses = []
        for row in draw:
            c = row[:3] * torch.tensor([1.5, 0.8, 0.8], dtype=torch.float64)
            target = torch.tensor([0.0, 7.0, 0.0], dtype=torch.float64) + row[3:6]
            poses.append((looking(c, target, float(row[6]) * 0.6), c))
        return poses

    return build


@pytest.fixture
def corridor():
    """Factory: a wall of equal tiles, 1 m wide, along x at y = 3; a few marks tell the tiles apart.

    Every tile has the same points and, but for `difference`, the same descriptors.
    """

    def build(seed: int, tiles: int = 12, per_tile: int = 60, marks: int = 12, difference: float = 0.15) -> World:
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        tile = torch.rand(per_tile, 3, **draw) * torch.tensor([1.0, 0.4, 2.5]) + torch.tensor([0.0, 3.0, -1.25])
        shift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        points = torch.cat([tile + i * shift for i in range(tiles)])
        base = unit(torch.randn(per_tile, 128, **draw)).repeat(tiles, 1)
        base = unit(base + difference * unit(torch.randn(len(base), 128, **draw)))
        unique = torch.rand(marks, 3, **draw) * torch.tensor([float(tiles), 0.2, 2.0])
        unique = unique + torch.tensor([0.0, 2.9, -1.0])
        descriptors = torch.cat([base, unit(torch.randn(marks, 128, **draw))])
        return World(torch.cat([points, unique]), descriptors, generator)

    return build


@pytest.fixture
def look_at():
    """The function (c, target, roll) -> R_world_from_cam."""
    return looking
