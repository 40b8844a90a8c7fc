"""How time and memory of the localization grow with the index: a corridor of 50, 200, 1000 frames.

    OMP_NUM_THREADS=1 python tests/bench/scale.py [50 200 1000]

A straight corridor whose walls, floor and ceiling carry distinct points, a frame every 10 cm, and 5
queries between frames; keypoints and descriptors are made, not found in pixels, so that what is
measured is the map and the search. Each size runs in a process of its own. Printed: seconds of CPU
of the map and of a query, the peak memory, the errors, and the slope of log time over log frames.
"""

import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from localization.cameras import Camera, project
from localization.features import Features
from localization.localize import build_map, localize
from localization.matching import View

CAMERA = Camera(320.0, 320.0, 319.5, 239.5, 640, 480)
STEP_M, SEEN_M, PER_M, QUERIES, TOP_K = 0.1, 6.0, 150, 5, 30


def corridor(length_m: float, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (n, 3) on the four sides of a corridor along z, 2 m wide and high, and descriptors."""
    count = int(PER_M * length_m)
    around, z = torch.rand(2, count, generator=draw, dtype=torch.float64)
    side, u = (4 * around).floor(), 2 * (4 * around).frac() - 1
    one = torch.ones_like(u)
    x = torch.stack([-one, one, u, u])[side.long(), torch.arange(count)]
    y = torch.stack([u, u, -one, one])[side.long(), torch.arange(count)]
    descriptors = torch.randn(count, 128, generator=draw)
    return torch.stack([x, y, z * length_m], 1), torch.nn.functional.normalize(descriptors, dim=1)


def seen(points: torch.Tensor, descriptors: torch.Tensor, z: float, draw: torch.Generator) -> View:
    """A view along the corridor from its middle, a little turned, with half a pixel of noise."""
    yaw = 0.2 * math.sin(3.0 * z)
    R = torch.tensor(
        [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]]
    )
    R, c = R.double(), torch.tensor([0.3 * math.sin(z), 0.2 * math.cos(2 * z), z]).double()
    near = torch.nonzero((points[:, 2] > z + 0.5) & (points[:, 2] < z + SEEN_M))[:, 0]
    xy = project(CAMERA, (points[near] - c) @ R)
    inside = ((xy >= 0) & (xy < torch.tensor([CAMERA.width, CAMERA.height]))).all(1)
    near, xy = near[inside], xy[inside]
    noise = torch.randn(len(near), 130, generator=draw)
    likeness = torch.nn.functional.normalize(descriptors[near] + 0.03 * noise[:, 2:], dim=1)
    one = torch.ones(len(near))
    features = Features((xy + 0.5 * noise[:, :2]).float(), 2 * one, 0 * one, one, likeness)
    return View(features, CAMERA, R, c)


def measure(frames: int) -> None:
    """Print one line of figures."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    world = corridor(frames * STEP_M + SEEN_M, draw)
    views = [seen(*world, STEP_M * i, draw) for i in range(frames)]
    places = [STEP_M * (frames * (k + 0.5) / QUERIES) + STEP_M / 3 for k in range(QUERIES)]
    queries = [seen(*world, z, draw) for z in places]
    ranking = [
        sorted(range(frames), key=lambda i, z=z: abs(STEP_M * i - z))[:TOP_K] for z in places
    ]
    began = time.process_time()
    built = build_map(views, seed=0)
    mapped = time.process_time()
    found = localize(built, [View(q.features, q.camera) for q in queries], ranking, seed=0)
    done = time.process_time()
    worst = max(float((e.c_world - q.c_world).norm()) for e, q in zip(found, queries))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{frames} {mapped - began:.2f} {(done - mapped) / QUERIES:.3f} {peak:.2f} {worst:.4f}")


def main(sizes: list[int]) -> None:
    """One process a size, and the slope."""
    print(
        f"{'frames':>7s}{'map s':>9s}{'query s':>9s}{'peak GiB':>10s}{'worst m':>9s}{'slope':>7s}"
    )
    before = None
    for size in sizes:
        command = [sys.executable, __file__, "--one", str(size)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        frames, mapped = float(line[0]), float(line[1])
        slope = (
            f"{math.log(mapped / before[1]) / math.log(frames / before[0]):7.2f}" if before else ""
        )
        print(
            f"{line[0]:>7s}{line[1]:>9s}{line[2]:>9s}{line[3]:>10s}{line[4]:>9s}{slope}", flush=True
        )
        before = frames, mapped


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        main([int(size) for size in sys.argv[1:]] or [50, 200, 1000])
