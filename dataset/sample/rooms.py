"""Four indoor scenes of repeated structure, flown through by a camera like TartanAir's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.sample import paint
from dataset.sample.paint import Rng, hsv
from dataset.sample.render import Camera, Light, Scene, develop, normals, render, rotation

SCENES = ("P001", "P002", "P003", "P004")
BAY_M = 3.2  # what repeats along a room: doors, lamps, columns


@dataclass(frozen=True)
class Plan:
    """A room: bays along x, half its width and its height (m), colors, and what stands there."""

    bays: int
    half_m: float
    high_m: float
    floor: tuple[float, float, float]  # hue, saturation, value
    wall: tuple[float, float, float]
    furnish: Callable[[Scene, Rng, "Plan"], None]


def hang(scene: Scene, at, width: float, height: float, facing: str, texture: int) -> None:
    """Hang a picture, door or sign 12 mm proud of a wall; `facing` +x, -x, +y, -y."""
    x, y, z = at
    sign = 1 if facing[0] == "+" else -1
    proud, half = sign * 0.012, sign * width / 2
    if facing[1] == "x":
        left, right = (x + proud, y + half), (x + proud, y - half)
    else:
        left, right = (x - half, y + proud), (x + half, y + proud)
    scene.wall(left, right, z - height / 2, z + height / 2, texture)


def benches(room: Scene, rng: Rng, plan: Plan) -> None:
    """Equal benches along both walls of some bays."""
    wood = room.paint(paint.wood(rng, hsv(0.07, 0.5, 0.5)))
    for bay in rng.permutation(plan.bays - 1)[:4]:
        x, y = (bay + 1) * BAY_M, rng.choice([-1, 1]) * (plan.half_m - 0.2)
        for ends, z in (
            ((-0.7, 0.7), (-0.45, -0.36)),
            ((-0.6, -0.5), (-0.36, 0)),
            ((0.5, 0.6), (-0.36, 0)),
        ):
            room.block((x + ends[0], x + ends[1]), (y - 0.2, y + 0.2), z, wood)


def columns(room: Scene, rng: Rng, plan: Plan) -> None:
    """Two rows of equal columns."""
    shaft = paint.blocks(rng, 128, 704, 128, 64, hsv(0.09, 0.15, 0.7), hsv(0.09, 0.1, 0.45), 0.04)
    stone = room.paint(paint.weather(rng, shaft, 0.06, 0.8))
    base = room.paint(paint.wood(rng, hsv(0.07, 0.2, 0.4)))
    for bay in range(plan.bays):
        for x, y in (((bay + 0.5) * BAY_M, side * plan.half_m / 2) for side in (-1, 1)):
            for r, high, texture in ((0.25, plan.high_m, stone), (0.33, 0.3, base)):
                room.block((x - r, x + r), (y - r, y + r), (-high, 0), texture)


PLANS = (
    Plan(6, 1.25, 2.8, (0.12, 0.10, 0.62), (0.14, 0.08, 0.80), benches),
    Plan(5, 2.6, 2.8, (0.60, 0.25, 0.38), (0.10, 0.06, 0.85), benches),
    Plan(6, 5.0, 4.4, (0.08, 0.12, 0.66), (0.07, 0.16, 0.78), columns),
    Plan(5, 4.0, 3.4, (0.10, 0.05, 0.50), (0.58, 0.06, 0.72), columns),
)


def build_room(scene: int, seed: int) -> Scene:
    """Scene 0 to 3: the same doors, tiles, lamps every BAY_M, a few things that exist once."""
    rng, plan, room = np.random.default_rng([seed, 10, scene]), PLANS[scene], Scene()
    long, half, high = plan.bays * BAY_M, plan.half_m, plan.high_m
    floor = room.paint(paint.tiles(rng, 320, hsv(*plan.floor), 0.55, 0.10))
    panels = room.paint(paint.tiles(rng, 240, np.full(3, 0.8), 0.6, 0.05))
    rail = paint.any_color(rng, (0.2, 0.4), (0.4, 0.6))
    plaster = room.paint(paint.plaster(rng, hsv(*plan.wall), rail))
    room.flat((0, long), (-half, half), 0, floor, 1.2)
    room.flat((0, long), (-half, half), -high, panels, 1.2, ceiling=True)
    corners = [(0, -half), (0, half), (long, half), (long, -half)]
    for i in range(4):
        room.wall(corners[i - 3], corners[i], -high, 0, plaster, (BAY_M, high))
    panel = paint.canvas(64, 64, 0.9)
    panel[3:-3, 3:-3, 3] = 1
    lamp = room.paint(panel)
    doors = [room.paint(paint.door(rng, glazed)) for glazed in (True, False)]
    for bay in range(plan.bays):
        x = (bay + 0.5) * BAY_M
        hang(room, (x, -half, -1.08), 1.05, 2.16, "+y", doors[0])
        hang(room, (x, half, -1.08), 1.05, 2.16, "-y", doors[bay % 2])
        lamp_x, lamp_y = (x - 0.6, x + 0.6), (-0.15, 0.15)
        room.flat(lamp_x, lamp_y, -high + 0.008, lamp, ceiling=True, glow=(1.0, 0.97, 0.9))
        side, facing = ((half, "-y"), (-half, "+y"))[bay % 2]
        if rng.random() < 0.5:
            hang(room, (x + 1.6, side, -1.55), 0.8, 0.6, facing, room.paint(paint.picture(rng)))
        if rng.random() < 0.7:
            number = room.paint(paint.sign(f"{100 + int(rng.integers(900))}", paint.any_color(rng)))
            hang(room, (x + 0.8, -side, -1.6), 0.28, 0.16, "+-"[bay % 2 == 0] + "y", number)
    end = room.paint(paint.sign("EXIT", hsv(0.38, 0.9, 0.45)))
    for x, facing in ((0, "+x"), (long, "-x")):
        hang(room, (x, 0, -1.08), 1.9, 2.16, facing, doors[1])
        hang(room, (x, 0.2, -2.42), 0.7, 0.28, facing, end)
    plan.furnish(room, rng, plan)
    return room


def light_room(room: Scene, rng: Rng) -> Light:
    """Light from above and from all around, fading unevenly over every quad."""
    up = -normals(room.quads)[:, 2]
    corners = (0.85 + 0.15 * up)[:, None] * (1 + 0.12 * rng.standard_normal((len(up), 4)))
    glow = np.array([q.glow for q in room.quads])
    return Light(corners, np.tile((1.0, 0.98, 0.93), (len(up), 1)), glow)


def fly(plan: Plan, frames: int, rng: Rng) -> np.ndarray:
    """Camera poses along the middle of a room, 0.25 to 0.6 m apart, on a smooth curve.

    -> (frames, 6): x, y, z in meters; yaw, pitch, roll in degrees.
    """
    turn = np.array([1, -1, 1, -1, 1])
    x, y = 1.2 + 2.7 * np.arange(5), turn * rng.uniform(0.4, 1, 5) * min(0.35 * plan.half_m, 1)
    yaw, pitch = turn * rng.uniform(10, 35, 5), rng.uniform(-10, 2, 5)
    roll = -turn * rng.uniform(8, 20, 5)
    knots = np.stack([x, y, rng.uniform(-1.8, -1.3, 5), yaw, pitch, roll], axis=1)
    knots = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    t = np.linspace(0, 4 - 1e-9, 2000)
    k, s = t.astype(int), (t % 1)[:, None]
    p0, p1, p2, p3 = (knots[k + i] for i in range(4))  # Catmull-Rom
    cubic = 2 * p0 - 5 * p1 + 4 * p2 - p3 + s * (3 * (p1 - p2) + p3 - p0)
    curve = p1 + s / 2 * (p2 - p0 + s * cubic)
    steps = np.linalg.norm(np.diff(curve[:, :3], axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    at = np.cumsum(np.concatenate([[0], rng.uniform(0.75, 1.25, frames - 1)]))
    at *= min(length[-1], 0.45 * (frames - 1)) / at[-1]
    rows = np.stack([np.interp(at, length, c) for c in curve.T], 1)
    rows[:, 3:] += rng.normal(0, (5.0, 2.5, 3.5), (frames, 3))
    return rows


def quaternion(yaw_deg: float, pitch_deg: float, roll_deg: float) -> np.ndarray:
    """(x, y, z, w) of `rotation` of the same angles."""
    half = np.radians([yaw_deg, pitch_deg, roll_deg]) / 2
    (cy, cp, cr), (sy, sp, sr) = np.cos(half), np.sin(half)
    x, y = sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy
    z, w = cr * cp * sy - sr * sp * cy, cr * cp * cy + sr * sp * sy
    return np.array([x, y, z, w]) * (1 if w >= 0 else -1)


def render_room(root: Path, scene: int, frames: int, size_px, seed: int, tick) -> None:
    """Render one indoor scene with its pose.txt."""
    room, rng = build_room(scene, seed), np.random.default_rng([seed, 11, scene])
    poses = fly(PLANS[scene], frames, rng)
    atlas, light = room.atlas(), light_room(room, rng)
    folder = root / "camera" / SCENES[scene]
    (folder / "images").mkdir(parents=True)
    width, height = size_px
    lines = []
    for number, pose in enumerate(poses):
        c, R = pose[:3], rotation(*pose[3:])
        camera = Camera(width, height, width / 2, (width / 2, height / 2), R, c)
        picture = develop(render(room.quads, atlas, camera, light, torch.zeros_like))
        picture.save(folder / "images" / f"{number:06d}.png", compress_level=1)
        lines.append(" ".join(f"{v:.9f}" for v in (*c, *quaternion(*pose[3:]))) + "\n")
        tick()
    (folder / "pose.txt").write_text("".join(lines))
