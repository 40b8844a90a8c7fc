"""The built-in sample: a small town and four indoor scenes, in exactly the assignment's layout.

    python dataset/sample.py                       # renders dataset/sample/ beside this file
    python dataset/sample.py --output DIR --seed 1

Everything is a textured planar quad.  One renderer (`render`) casts 2 x 2 rays a
pixel, keeps the nearest quad, and filters its texture through mipmaps; so the truth is exact by
construction.  Axes are TartanAir's throughout: x forward, y right, z down, in the camera and in the
world; pixel (u, v) is a pixel center, (0, 0) the top-left one.  The file reads top to bottom:
renderer, paint, town, rooms, files.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

Tick = Callable[[], None]  # called after each image
SPLITS = ("train", "val", "test")
SCENES = ("P001", "P002", "P003", "P004")
POS_DIST_THR_M = 25.0
DISK_NEEDED_BYTES = 120 * 2**20
STALE_SECONDS = 3600
CHUNK_SAMPLES = 1 << 15  # samples shaded at once: their arrays stay in the processor's cache
NEAR_M = 0.05
ANISOTROPY = 3  # how many times longer than wide a texture's footprint is before it is blurred


@dataclass(frozen=True)
class Size:
    """How much is rendered: images per split (queries, index), pixels, scenes and frames."""

    train: tuple[int, int] = (120, 300)
    val: tuple[int, int] = (60, 150)
    test: tuple[int, int] = (60, 150)
    town_px: tuple[int, int] = (320, 240)
    scenes: int = 4
    frames: int = 24
    room_px: tuple[int, int] = (640, 480)


FULL = Size()
TINY = Size(train=(12, 30), val=(6, 15), test=(6, 15), town_px=(128, 96), scenes=2, frames=12,
            room_px=(320, 240))


# ---------------------------------------------------------------------------------------- renderer
@dataclass(frozen=True)
class Quad:
    """A parallelogram seen from its front: `origin` top left, `right` and `down` its edges (metres).

    `repeat` tiles the texture over it.  A `cutout` is seen from both sides, its texture's fourth
    channel is its opacity; otherwise that channel says how much of `glow` the surface sends out.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray
    texture: int
    repeat: tuple[float, float] = (1.0, 1.0)
    cutout: bool = False
    glow: tuple[float, float, float] = (0.0, 0.0, 0.0)
    occludes: bool = True


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: pixels, focal length and principal point in pixels, pose camera to world."""

    width: int
    height: int
    focal_px: float
    center_px: tuple[float, float]
    R_world_from_cam: np.ndarray
    c_world: np.ndarray


@dataclass(frozen=True)
class Atlas:
    """All textures with all their mipmaps in one table, each level with a border of one texel."""

    texels: torch.Tensor  # (T, 4) linear light and a fourth channel
    levels: torch.Tensor  # (textures, levels, 3) width, height, row of texel (0, 0); float32, exact


def pack_textures(images: list[np.ndarray], quads: list[Quad], mipmaps: bool = True) -> Atlas:
    """Mipmap (h, w, 4) images of linear light; the border of those that `quads` repeat wraps round."""
    wrapping = {q.texture for q in quads if q.repeat != (1.0, 1.0)}
    depth = max(1, round(math.log2(max(max(i.shape[:2]) for i in images))) - 1) if mipmaps else 1
    texels, levels, total = [], [], 0
    for number, image in enumerate(images):
        texture = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
        for _ in range(depth):
            h, w = texture.shape[2:]
            mode = "circular" if number in wrapping else "replicate"
            texels.append(F.pad(texture, (1, 1, 1, 1), mode=mode)[0].permute(1, 2, 0).reshape(-1, 4))
            levels.append((w, h, total + w + 3))
            total += len(texels[-1])
            texture = F.adaptive_avg_pool2d(texture, (max(1, h // 2), max(1, w // 2)))
    assert total < 1 << 24, "rows are addressed in float32"
    return Atlas(torch.cat(texels), torch.tensor(levels, dtype=torch.float32).view(len(images), -1, 3))


def sample_texture(atlas: Atlas, texture: int, u: torch.Tensor, v: torch.Tensor,
                   level: torch.Tensor | None = None) -> torch.Tensor:
    """Look up (P, 4) values at u, v in 0..1 across a texture: bilinear, trilinear if given a level."""
    table = atlas.levels[texture]
    if level is None:
        parts = [(table[0], 1.0)]
    else:
        last = len(table) - 1
        low = level.clamp(0, last).floor()
        blend, number = (level - low).clamp(0, 1), low.long()
        parts = [(table.index_select(0, number).T, 1 - blend),
                 (table.index_select(0, (number + 1).clamp(max=last)).T, blend)]
    rows = torch.empty(len(u), 4 * len(parts), dtype=torch.int32)
    weights = torch.empty(len(u), 4 * len(parts))
    for first, ((w, h, start), share) in zip((0, 4), parts):
        x, y = u * w - 0.5, v * h - 0.5
        x0, y0 = x.floor(), y.floor()
        x, y, pitch = x - x0, y - y0, w + 2
        corner = start + y0 * pitch + x0
        for k, row in enumerate((corner, corner + 1, corner + pitch, corner + pitch + 1)):
            rows[:, first + k] = row
        bottom = y * share
        top = share - bottom
        right, below = top * x, bottom * x
        for k, weight in enumerate((top - right, right, bottom - below, below)):
            weights[:, first + k] = weight
    return F.embedding_bag(rows, atlas.texels, mode="sum", per_sample_weights=weights)


def plane_forms(quads: list[Quad], camera: Camera) -> np.ndarray:
    """(Q, 3, 3): 1/depth, a/depth, b/depth of each quad's plane as affine functions of the pixel.

    Row r gives r0 + r1 (x - cx) + r2 (y - cy); a and b run 0..1 along `right` and `down`.  From
    c + t d = o + a right + b down: with n = right x down, w = o - c and the dual basis A, B,
    1/t = n.d / n.w and a/t = A.d - (A.w)/t.
    """
    o, r, d = (np.stack([getattr(q, k) for q in quads]) for k in ("origin", "right", "down"))
    n = np.cross(r, d)
    nn = (n * n).sum(1, keepdims=True)
    dual_a, dual_b = np.cross(d, n) / nn, np.cross(n, r) / nn
    w = o - camera.c_world
    rays = camera.R_world_from_cam @ np.diag([1, 1 / camera.focal_px, 1 / camera.focal_px])
    nw = (n * w).sum(1, keepdims=True)
    inverse = n @ rays / np.where(np.abs(nw) < 1e-9, 1e-9, nw)
    a = dual_a @ rays - (dual_a * w).sum(1, keepdims=True) * inverse
    b = dual_b @ rays - (dual_b * w).sum(1, keepdims=True) * inverse
    return np.stack([inverse, a, b], 1)


def screen_boxes(quads: list[Quad], camera: Camera, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """(Q, 4) sample ranges x0, x1, y0, y1 that may show a quad; empty when it is out of sight.

    xs, ys: sample positions relative to the principal point.
    """
    o, r, d = (np.stack([getattr(q, k) for q in quads]) for k in ("origin", "right", "down"))
    corners = np.stack([o, o + r, o + d, o + r + d], 1) - camera.c_world
    corners = corners @ camera.R_world_from_cam  # (Q, 4, 3): forward, right, down
    depth, across, below = corners[..., 0], corners[..., 1], corners[..., 2]
    hidden = (depth < NEAR_M).all(1)
    for value, ends in ((across, xs), (below, ys)):
        hidden |= (value * camera.focal_px > depth * ends[-1]).all(1)
        hidden |= (value * camera.focal_px < depth * ends[0]).all(1)
    facing = (np.cross(r, d) * (o - camera.c_world)).sum(1) > 1e-9
    hidden |= ~facing & ~np.array([q.cutout for q in quads])
    whole = (depth < NEAR_M).any(1)  # crosses the camera's plane: its corners bound nothing
    safe = np.maximum(depth, NEAR_M)
    boxes = np.zeros((len(quads), 4), int)
    for k, (value, at) in enumerate(((across, xs), (below, ys))):
        pixel = value * camera.focal_px / safe
        boxes[:, 2 * k] = np.where(whole, 0, np.searchsorted(at, pixel.min(1) - 1e-3))
        boxes[:, 2 * k + 1] = np.where(whole, len(at), np.searchsorted(at, pixel.max(1) + 1e-3))
    boxes[hidden] = 0
    return boxes


Light = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def render(quads: list[Quad], atlas: Atlas, camera: Camera, light: Light,
           background: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Linear radiance (height, width, 3) float32 of opaque quads, then cutouts, far to near.

    Visibility is found for 2 x 2 samples a pixel; a pixel that one quad fills is shaded once, at its
    center, any other at each sample.  light(quad, a (P,), b (P,)) -> (P, 3) or (3,) irradiance at
    places a, b on that quad; background(ray (P, 3)) -> (P, 3) for rays that meet nothing.
    """
    width, height = camera.width, camera.height
    centers = [torch.arange(n) - c for n, c in zip((width, height), camera.center_px)]
    xs, ys = ((c[:, None] + torch.tensor([-0.25, 0.25])).view(-1) for c in centers)
    boxes = screen_boxes(quads, camera, xs.numpy(), ys.numpy()).tolist()
    forms = plane_forms(quads, camera).tolist()
    nearest = torch.zeros(2 * height, 2 * width)
    owner = torch.full((2 * height, 2 * width), -1, dtype=torch.int32)

    def cover(q: int) -> tuple[tuple[slice, slice], torch.Tensor, torch.Tensor]:
        x0, x1, y0, y1 = boxes[q]
        window = slice(y0, y1), slice(x0, x1)
        inverse, a, b = ((f[0] + f[1] * xs[x0:x1]) + (f[2] * ys[y0:y1])[:, None] for f in forms[q])
        reach = inverse * (1 + 2e-6)  # neighbors that share an edge leave no gap
        slack = inverse * -2e-6
        inside = (torch.minimum(a, b) >= slack) & (torch.maximum(a, b) <= reach)
        return window, inside & (inverse > nearest[window]), inverse

    def shade(q: int, x: torch.Tensor, y: torch.Tensor, spacing: float
              ) -> tuple[torch.Tensor, torch.Tensor]:
        (z0, zx, zy), (a0, ax, ay), (b0, bx, by) = forms[q]
        (tile_u, tile_v), texture = quads[q].repeat, quads[q].texture
        depth = 1 / (z0 + zx * x + zy * y)
        a, b = (a0 + ax * x + ay * y) * depth, (b0 + bx * x + by * y) * depth
        # texels from one shaded point to the next: singular values of d(texel)/d(point)
        w, h, _ = (atlas.levels[texture, 0] * spacing).tolist()
        ux, uy = (w * tile_u) * (ax - a * zx), (w * tile_u) * (ay - a * zy)
        vx, vy = (h * tile_v) * (bx - b * zx), (h * tile_v) * (by - b * zy)
        square = ux * ux + uy * uy + vx * vx + vy * vy
        area = (ux * vy - uy * vx).abs()
        major = ((square + (square * square - 4 * area * area).clamp(min=0).sqrt()) / 2).sqrt()
        level = torch.log2((torch.maximum(area / major, major / ANISOTROPY) * depth).clamp(min=1))
        u, v = a.clamp(0, 1) * tile_u, b.clamp(0, 1) * tile_v
        if quads[q].repeat != (1.0, 1.0):
            u, v = u - u.floor(), v - v.floor()
        return sample_texture(atlas, texture, u, v, level), light(q, a, b)

    def points(mask: torch.Tensor, per_pixel: int, window: tuple[slice, slice] = np.s_[0:, 0:]
               ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Number of the pixel, x, y of the points of a grid (1 or 2 per pixel and axis) in a mask."""
        gx, gy = centers if per_pixel == 1 else (xs, ys)
        rows, columns = torch.nonzero(mask, as_tuple=True)
        for i, j in zip(rows.split(CHUNK_SAMPLES), columns.split(CHUNK_SAMPLES)):
            i, j = i + window[0].start, j + window[1].start
            pixel = i * width + j if per_pixel == 1 else (i >> 1) * width + (j >> 1)
            yield pixel, gx.index_select(0, j), gy.index_select(0, i)

    seen = [q for q, (x0, x1, y0, y1) in enumerate(boxes) if x1 > x0 and y1 > y0]
    solid = [q for q in seen if not quads[q].cutout]
    for q in solid:
        window, hit, inverse = cover(q)
        nearest[window] = torch.where(hit, inverse, nearest[window])
        owner[window].masked_fill_(hit, q)
    first = owner[::2, ::2]
    whole = (first == owner[1::2, ::2]) & (first == owner[::2, 1::2]) & (first == owner[1::2, 1::2])
    split = ~whole.repeat_interleave(2, 0).repeat_interleave(2, 1)
    owners = {1: torch.where(whole, first, -2), 2: torch.where(split, owner, -2)}
    color = torch.zeros(height * width, 3)
    for q in solid:
        x0, x1, y0, y1 = boxes[q]
        glow = torch.tensor(quads[q].glow, dtype=torch.float32)
        for per_pixel, owned in owners.items():
            scale = 2 // per_pixel
            window = slice(y0 // scale, -(-y1 // scale)), slice(x0 // scale, -(-x1 // scale))
            for pixel, x, y in points(owned[window] == q, per_pixel, window):
                texel, shine = shade(q, x, y, 1 / per_pixel)
                color.index_add_(0, pixel, texel[:, :3] * shine + texel[:, 3:] * glow,
                                 alpha=1 / per_pixel**2)
    rays = camera.R_world_from_cam @ np.diag([1, 1 / camera.focal_px, 1 / camera.focal_px])
    forward, across, below = torch.from_numpy(rays.T.copy()).float()
    for per_pixel, owned in owners.items():
        for pixel, x, y in points(owned == -1, per_pixel):
            ray = forward + x[:, None] * across + y[:, None] * below
            color.index_add_(0, pixel, background(ray), alpha=1 / per_pixel**2)
    away = {q: np.linalg.norm(quads[q].origin + (quads[q].right + quads[q].down) / 2
                              - camera.c_world) for q in seen if quads[q].cutout}
    for q in sorted(away, key=away.get, reverse=True):
        window, hit, _ = cover(q)
        share = torch.zeros(2 * height, 2 * width)
        share[window] = hit.float()
        share = F.avg_pool2d(share[None], 2).view(-1)
        for pixel, x, y in points(share.view(height, width) > 0, 1):
            texel, shine = shade(q, x, y, 1.0)
            opacity = texel[:, 3:] * share.index_select(0, pixel)[:, None]
            color[pixel] = color[pixel] * (1 - opacity) + texel[:, :3] * shine * opacity
    return color.view(height, width, 3)


def rotation(yaw_deg: float, pitch_deg: float, roll_deg: float) -> np.ndarray:
    """R_world_from_cam: turn right by yaw, then up by pitch, then clockwise by roll (degrees)."""
    (cy, cp, cr), (sy, sp, sr) = ([f(math.radians(v)) for v in (yaw_deg, pitch_deg, roll_deg)]
                                  for f in (math.cos, math.sin))
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    roll = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return yaw @ pitch @ roll


# ------------------------------------------------------------------------------------------- paint
Rng = np.random.Generator


def linear(image: np.ndarray) -> np.ndarray:
    """A painted image (display values) in linear light; the fourth channel stays."""
    return np.concatenate([np.clip(image[..., :3], 0, 1) ** 2, image[..., 3:]], 2)


def canvas(width: int, height: int, color: tuple | np.ndarray) -> np.ndarray:
    """A (height, width, 4) image of one color, fourth channel 0."""
    image = np.zeros((height, width, 4), np.float32)
    image[..., :3] = color
    return image


def noise(rng: Rng, width: int, height: int, fall: float = 1.0) -> np.ndarray:
    """Tileable noise (height, width) with amplitude 1/frequency**fall, mean 0, deviation 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)).astype(np.float32))
    fy, fx = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * height
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum / frequency**fall, (height, width))
    return (field / field.std()).astype(np.float32)


@functools.cache
def noise_field(fall: float) -> np.ndarray:
    return noise(np.random.default_rng(int(fall * 10)), 512, 512, fall)


def grain(rng: Rng, width: int, height: int, fall: float) -> np.ndarray:
    """A random piece of one noise field: as `noise`, much quicker, but its ends do not meet."""
    x, y = rng.integers(0, 512, 2)
    return noise_field(fall).take(np.arange(y, y + height), 0, mode="wrap").take(
        np.arange(x, x + width), 1, mode="wrap")


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Display color of hue, saturation, value, all 0..1 (hue wraps)."""
    k = (np.array([5, 3, 1]) + hue % 1 * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def box(image: np.ndarray, x: float, y: float, w: float, h: float, color: tuple | np.ndarray | float,
        glass: float = 0.0) -> None:
    """Fill a rectangle given in pixels; it may stick out."""
    part = image[max(0, round(y)):max(0, round(y + h)), max(0, round(x)):max(0, round(x + w))]
    part[..., :3] = color
    part[..., 3] = glass


def write(image: np.ndarray, text: str, x: float, y: float, w: float, h: float,
          color: tuple | np.ndarray) -> None:
    """Write `text` as large as fits, centered in a rectangle given in pixels."""
    left, top, right, bottom = ImageFont.load_default(40).getbbox(text)
    size = 40 * min(w / (right - left), h / (bottom - top))
    font = ImageFont.load_default(max(5, size))
    mask = Image.new("L", (image.shape[1], image.shape[0]))
    ImageDraw.Draw(mask).text((x + w / 2, y + h / 2), text, 255, font, anchor="mm")
    share = np.asarray(mask, np.float32)[..., None] / 255
    image[..., :3] += (np.asarray(color, np.float32) - image[..., :3]) * share


def blocks(rng: Rng, width: int, height: int, bw: int, bh: int, color: np.ndarray, joint: np.ndarray,
           spread: float) -> np.ndarray:
    """A wall of bricks or stones bw x bh pixels in running bond, each of its own shade."""
    y, x = np.mgrid[:height, :width]
    row = y // bh
    x = x + row % 2 * (bw // 2)
    shades = 1 + spread * rng.standard_normal((height // bh + 1, width // bw + 2, 1)).astype("f")
    image = canvas(width, height, color)
    image[..., :3] *= shades[row, x // bw]
    image[(y % bh == 0) | (x % bw == 0), :3] = joint
    return image


def paint_hue(rng: Rng) -> float:
    """A hue people paint things in: reds, ochres, greens, blues; seldom a violet."""
    hues = (0.0, 0.02, 0.06, 0.09, 0.12, 0.15, 0.28, 0.38, 0.48, 0.55, 0.59, 0.63, 0.8)
    return rng.choice(hues) + rng.normal(0, 0.02)


def paint_wall(rng: Rng, width: int, height: int) -> np.ndarray:
    """The bare wall of a house: brick, stone, boards, panels, timber frame or stucco."""
    kind = rng.choice(["brick", "brick", "stucco", "stucco", "boards", "stone", "panels", "timber"])
    if kind == "brick":
        color = hsv(rng.choice([0.01, 0.03, 0.06, 0.09]), rng.uniform(0.15, 0.6), rng.uniform(0.35, 0.7))
        joint = np.full(3, rng.uniform(0.35, 0.75))
        image = blocks(rng, width, height, 10, 4, color, joint, 0.13)
    elif kind == "stone":
        color = hsv(rng.uniform(0.05, 0.15), rng.uniform(0.05, 0.3), rng.uniform(0.5, 0.8))
        image = blocks(rng, width, height, int(rng.integers(16, 30)), 12, color, color * 0.65, 0.09)
    else:
        hue = rng.choice([0.03, 0.08, 0.12, 0.14, 0.3, 0.55, 0.6, 0.95])
        color = hsv(hue + rng.normal(0, 0.02), rng.uniform(0.05, 0.45), rng.uniform(0.5, 0.93))
        image = canvas(width, height, color)
        y, x = np.mgrid[:height, :width]
        if kind == "boards":
            image[..., :3] *= (0.8 + 0.2 * (y % 7 / 6))[..., None]
        elif kind == "panels":
            bw, bh = rng.integers(30, 70, 2)
            image[..., :3] *= 1 + 0.05 * rng.standard_normal((height // bh + 1, width // bw + 1, 1)
                                                             )[y // bh, x // bw]
            image[(y % bh < 2) | (x % bw < 2), :3] *= 0.6
        elif kind == "timber":
            pitch = int(rng.integers(36, 60))
            beam = (x % pitch < 7) | (y % 92 < 7) | ((x + y * (-1) ** (x // pitch)) % pitch < 6)
            image[..., :3] = np.clip(image[..., :3] * 1.1, 0, 0.95)
            image[beam, :3] = hsv(0.07, 0.5, rng.uniform(0.15, 0.35))
    image[..., :3] *= 1 + 0.06 * grain(rng, width, height, 0.9)[..., None]
    dirt = np.linspace(0, 1, height, dtype=np.float32)[:, None] ** 6
    image[..., :3] *= (1 - 0.25 * dirt - 0.04 * np.clip(grain(rng, width, height, 1.6), 0, 3))[..., None]
    return image


def paint_window(rng: Rng, w: int, h: int) -> np.ndarray:
    """A window of w x h pixels: frame, panes, and glass that mirrors the sky."""
    frame = hsv(paint_hue(rng), rng.choice([0, 0, 0.5]), rng.choice([0.2, 0.9, 0.95]))
    image = canvas(w, h, frame)
    columns, lines = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    edge = 2
    pw, ph = (w - edge) / columns, (h - edge) / lines
    for i in range(columns):
        for j in range(lines):
            x, y = edge + i * pw, edge + j * ph
            box(image, x, y, pw - edge, ph - edge, (0.13, 0.15, 0.18), 0.6)
    return image


WORDS = ("BAKERY", "BOOKS", "CAFE", "HOTEL", "PHARMACY", "FLOWERS", "BARBER", "MUSIC", "BANK", "PIZZA",
         "TAILOR", "CLOCKS", "OPTICS", "TEA", "BIKES", "WINE", "SHOES", "TOYS", "ARTS", "FISH", "PAPER",
         "LAMPS", "FRUIT", "DINER", "RADIO", "STAMPS", "MAPS", "TILES")  # fmt: skip
TOWN_PX_PER_M = 32


def paint_facade(rng: Rng, width_m: float) -> np.ndarray:
    """The front of a house, TOWN_PX_PER_M pixels a metre: its own wall, windows, door or shop."""
    m = TOWN_PX_PER_M
    floors, storey, ground = int(rng.integers(1, 4)), rng.uniform(2.6, 3.2), rng.uniform(3.1, 3.8)
    width, height = round(width_m * m), round((ground + floors * storey + rng.uniform(0.3, 1)) * m)
    image = paint_wall(rng, width, height)
    trim = hsv(paint_hue(rng), rng.uniform(0, 0.25), rng.choice([0.25, 0.8, 0.92]))
    base = height - ground * m
    count = max(1, round(width_m / rng.uniform(1.7, 3.2)))
    pitch = width / count
    ww, wh = round(pitch * rng.uniform(0.35, 0.65)), round(rng.uniform(1.2, 2.0) * m)
    window = paint_window(rng, ww, wh)
    arched, shutters, sills, balcony = rng.random(4) < (0.25, 0.35, 0.7, 0.2)
    shutter = hsv(paint_hue(rng), rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.6))
    if arched:
        y, x = np.mgrid[:wh, :ww]
        keep = ((x - ww / 2 + 0.5) / (ww / 2)) ** 2 + ((y - ww / 2) / (ww / 2)) ** 2 <= 1
        keep |= y > ww / 2
    for floor in range(floors):
        y = round(base - (floor + 1) * storey * m + (storey * m - wh) * 0.55)
        for column in range(count):
            x = round((column + 0.5) * pitch - ww / 2)
            pane = window.copy()
            blind = rng.choice([0, 0, 0.3, 0.5, 0.9]) * wh
            curtain = hsv(paint_hue(rng), rng.uniform(0, 0.3), rng.uniform(0.5, 0.9))
            box(pane, 2, 2, ww - 4, blind, curtain, 0.1)
            if sills:
                box(image, x - 4, y + wh, ww + 8, 4, trim)
                box(image, x - 3, y - 6, ww + 6, 5, trim)
            if shutters and pitch > 1.7 * ww:
                for side in (x - ww * 0.4, x + ww):
                    box(image, side, y, ww * 0.4, wh, shutter)
                    for line in range(4, wh - 3, 4):
                        box(image, side + 1, y + line, ww * 0.4 - 2, 1, shutter * 0.65)
            target = image[y:y + wh, x:x + ww]
            target[...] = np.where(keep[..., None], pane, target) if arched else pane
        if balcony and floor:
            rail = round(y + wh)
            box(image, 0.08 * width, rail - 3, 0.84 * width, 6, trim * 0.8)
            for x in np.arange(0.08 * width, 0.92 * width, 5):
                box(image, x, rail - 30, 1.5, 28, (0.1, 0.1, 0.1))
            box(image, 0.08 * width, rail - 31, 0.84 * width, 3, (0.1, 0.1, 0.1))
    if rng.random() < 0.6:
        box(image, 0, base, width, 5, trim)
    if rng.random() < 0.3:  # corner stones
        for y in range(0, height, 22):
            for x in (0, width - 14 - y % 44 / 4):
                box(image, x, y, 14 + y % 44 / 4, 18, trim * 0.95)
    box(image, 0, 0, width, rng.uniform(6, 16), trim * 0.9)
    paint_ground_floor(rng, image, base, trim)
    box(image, rng.uniform(0.02, 0.04) * width, 0, 3, height, trim * 0.5)  # downpipe
    return image


def paint_ground_floor(rng: Rng, image: np.ndarray, base: float, trim: np.ndarray) -> None:
    """A shop, a home or a garage below pixel row `base` of a facade."""
    m, (height, width) = TOWN_PX_PER_M, image.shape[:2]
    door_color = hsv(paint_hue(rng), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.55))
    door_x = rng.uniform(0.08, 0.9) * (width - 1.1 * m)
    kind = rng.choice(["shop", "shop", "home", "home", "garage"])
    if kind == "shop":
        board = hsv(paint_hue(rng), rng.uniform(0.2, 0.9), rng.uniform(0.15, 0.9))
        ink = hsv(paint_hue(rng), 0.2, 0.95 if board.mean() < 0.5 else 0.1)
        box(image, 5, base + 8, width - 10, height - base - 8, board * 0.7)
        glass = int(rng.integers(1, 4))
        pane = (width - 20) / glass
        for i in range(glass):
            box(image, 10 + i * pane, base + 0.8 * m, pane - 5, 1.75 * m, (0.2, 0.2, 0.22), 0.5)
            for _ in range(5):  # goods on show
                gx, gh = rng.uniform(12, pane - 14), rng.uniform(0.15, 0.8) * m
                box(image, 10 + i * pane + gx, base + 2.5 * m - gh, rng.uniform(5, 14), gh,
                    hsv(paint_hue(rng), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.8)), 0.2)
        box(image, 5, base + 8, width - 10, 0.62 * m, board)
        write(image, str(rng.choice(WORDS)), 0.1 * width, base + 10, 0.8 * width, 0.5 * m, ink)
        if rng.random() < 0.5:  # awning
            stripes = hsv(paint_hue(rng), 0.7, 0.7)
            for i, x in enumerate(np.arange(6, width - 6, 9)):
                box(image, x, base + 0.75 * m, min(9, width - 6 - x), 0.55 * m, stripes if i % 2 else 0.9)
    elif kind == "garage":
        gw = min(2.8 * m, width * 0.6)
        gx = rng.uniform(6, width - gw - 6)
        box(image, gx - 4, height - 2.5 * m, gw + 8, 2.5 * m, trim)
        for line in range(int(2.4 * m)):
            box(image, gx, height - 2.4 * m + line, gw, 1, door_color * (1.25 if line % 12 < 10 else 0.6))
        door_x = gx + gw + 8 if gx < width / 2 else gx - 1.2 * m
    else:
        ww, wh = round(rng.uniform(0.7, 1.3) * m), round(rng.uniform(1.1, 1.6) * m)
        window = paint_window(rng, ww, wh)
        for x in np.arange(0.4 * m, width - ww - 6, ww + rng.uniform(0.5, 1.2) * m):
            if abs(x + ww / 2 - door_x - 0.5 * m) > ww / 2 + 0.8 * m:
                x, y = round(x), round(base + 0.75 * m)
                image[y:y + wh, x:x + ww] = window
                box(image, x - 3, y + wh, ww + 6, 4, trim)
    if 4 < door_x < width - 1.1 * m:
        top = height - 2.35 * m
        box(image, door_x - 4, top - 4, m + 8, 2.35 * m + 4, trim)
        box(image, door_x, top, m, 2.35 * m, door_color)
        box(image, door_x + 3, top + 3, m - 6, 0.35 * m, (0.15, 0.17, 0.2), 0.5)
        for x in (0.12 * m, 0.56 * m):
            box(image, door_x + x, top + 0.55 * m, 0.32 * m, 0.65 * m, door_color * 0.7)
            box(image, door_x + x, top + 1.35 * m, 0.32 * m, 0.8 * m, door_color * 0.7)
        box(image, door_x + 0.88 * m, top + 1.2 * m, 3, 3, (0.8, 0.7, 0.3))
    box(image, 0, height - 8, width, 8, image[..., :3].mean((0, 1)) * 0.6)


def paint_tree(rng: Rng) -> np.ndarray:
    """A tree with its crown, 128 x 160 pixels, the fourth channel its opacity."""
    leaf = hsv(rng.uniform(0.17, 0.33), rng.uniform(0.4, 0.7), rng.uniform(0.25, 0.5))
    image = canvas(128, 160, leaf)
    y, x = np.mgrid[:160, :128]
    crown = 1 - ((x - 64) / 58) ** 2 - ((y - 58) / 56) ** 2 + 0.35 * grain(rng, 128, 160, 1.1)
    image[..., :3] *= (1 + 0.3 * grain(rng, 128, 160, 0.6) - 0.4 * (y / 110 - 0.5))[..., None]
    image[..., 3] = np.clip(crown * 6, 0, 1)
    trunk = (abs(x - 64) < 4) & (y > 60) & (image[..., 3] < 0.5)
    image[trunk] = (0.25, 0.2, 0.15, 1)
    return image


def paint_person(rng: Rng) -> np.ndarray:
    """A passer-by, 48 x 120 pixels, the fourth channel their opacity."""
    coat, legs = (hsv(paint_hue(rng), rng.uniform(0, 0.7), rng.uniform(0.1, 0.7)) for _ in range(2))
    skin = hsv(0.06, rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.9))
    image, layer = canvas(48, 120, coat), Image.new("L", (192, 480))
    draw, step = ImageDraw.Draw(layer), rng.uniform(4, 40)
    draw.polygon([(70, 250), (122, 250), (110 + step, 478), (88 + step, 478), (96, 290), (104 - step, 478),
                  (80 - step, 478)], 255)
    draw.polygon([84, 78, 108, 78, 138, 98, 124, 180, 128, 270, 64, 270, 68, 180, 54, 98], 255)
    draw.line([(56, 104), (44, 180), (52 + step / 2, 252)], 255, 18, "curve")
    draw.line([(136, 104), (148, 180), (140 - step / 2, 252)], 255, 18, "curve")
    draw.ellipse((76, 14, 116, 72), 255)
    image[..., 3] = np.asarray(layer.resize((48, 120), Image.Resampling.BOX), np.float32) / 255
    image[64:, :, :3], image[:20, :, :3], image[:8, :, :3] = legs, skin, skin * 0.3
    image[..., :3] *= np.linspace(1.15, 0.75, 48, dtype=np.float32)[None, :, None]
    return image


def paint_car(rng: Rng) -> np.ndarray:
    """A parked car from the side, 176 x 60 pixels, the fourth channel its opacity."""
    body = hsv(paint_hue(rng), rng.choice([0.05, 0.1, 0.7]), rng.uniform(0.15, 0.85))
    image = canvas(176, 60, body)
    layers = []
    for shapes in ([(4, 34, 44, 28, 62, 5, 122, 5, 146, 27, 172, 33, 173, 50, 3, 50)],
                   [(52, 27, 66, 9, 91, 9, 91, 27), (96, 27, 96, 9, 119, 9, 135, 27)]):
        layer = Image.new("L", (704, 240))
        for shape in shapes:
            ImageDraw.Draw(layer).polygon([4 * v for v in shape], 255)
        layers.append(np.asarray(layer.resize((176, 60), Image.Resampling.BOX), np.float32) / 255)
    image[..., :3] *= np.linspace(1.25, 0.6, 60, dtype=np.float32)[:, None, None]
    image[layers[1] > 0.5, :3] = (0.12, 0.14, 0.17)
    y, x = np.mgrid[:60, :176]
    image[..., 3] = layers[0]
    for wheel in (36, 140):
        far = np.hypot(x - wheel, y - 47)
        image[far < 12.5] = (0.05, 0.05, 0.05, 1)
        image[far < 7] = (0.55, 0.55, 0.57, 1)
    return image


def paint_street(rng: Rng, length_m: float, width_m: float) -> np.ndarray:
    """Road and pavements seen from above, 16 pixels a metre."""
    m, w, h = 16, round(length_m * 16), round(width_m * 16)
    image = canvas(w, h, hsv(0.1, 0.04, rng.uniform(0.3, 0.42)))
    image[..., :3] *= (1 + 0.05 * grain(rng, w, h, 0.3) + 0.06 * grain(rng, w, h, 1.2))[..., None]
    slabs = blocks(rng, w, h, 10, 8, hsv(0.1, 0.08, rng.uniform(0.5, 0.65)), np.full(3, 0.4), 0.05)
    walk = round(rng.uniform(2.4, 3.2) * m)
    for part in (slice(0, walk), slice(h - walk, h)):
        image[part] = slabs[part]
    for y in (walk, h - walk - 3):
        box(image, 0, y, w, 3, 0.62)
    if rng.random() < 0.6:
        for x in range(0, w, 5 * m):
            box(image, x, h / 2 - 1, 2.5 * m, 2, 0.75)
    for _ in range(6):  # patches and manholes
        x, y = rng.uniform(0, w), rng.uniform(walk, h - walk - 30)
        box(image, x, y, rng.uniform(8, 60), rng.uniform(8, 30), rng.uniform(0.22, 0.4))
    return image


# -------------------------------------------------------------------------------------------- town
STREET_M, STREET_GAP_M, ROW_GAP_M = 80.0, 120.0, 90.0  # more than 2 x 25 m between streets
STREETS_PER_ROW, INDEX_PER_STREET = 3, 10
AUTO_EXPOSURE, AUTO_WHITE = 0.95, 0.8  # share of brightness and tint that a camera makes up for
TOWN_ORIGIN_M = {"train": (585000.0, 4477000.0), "val": (587500.0, 4477000.0),
                 "test": (585000.0, 4480000.0)}


@dataclass(frozen=True)
class Shot:
    """One photograph of a street: where from, which way (degrees), file and list it belongs to."""

    name: str
    street: int
    position: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float
    roll_deg: float
    is_query: bool


def plan_town(split: str, size: Size, seed: int) -> tuple[list[Shot], list[Shot], np.ndarray, np.ndarray]:
    """Query shots, index shots, and their positions utmQ (nq, 2), utmDb (nd, 2) in metres.

    Streets of 80 m lie in rows of three.  The index looks ahead and at one side, left or right by
    street, every 8 m, so that whatever lies within 25 m sees some of the same houses; queries stand
    anywhere between.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    queries, index = getattr(size, split)
    streets = math.ceil(index / INDEX_PER_STREET)
    shots: dict[bool, list[Shot]] = {True: [], False: []}
    for is_query, count in ((True, queries), (False, index)):
        per_street = np.diff(np.linspace(0, count, streets + 1).round().astype(int))
        for street, here in enumerate(per_street):
            for i in range(here):
                along = (i + 0.5) * STREET_M / here
                side = street_side(street)
                if is_query:
                    along += rng.uniform(-0.4, 0.4) * STREET_M / here
                    across, height, turn = rng.uniform(-2.5, 2.5), rng.uniform(1.5, 2.0), 18
                else:
                    across, height, turn = rng.uniform(-1, 1), rng.uniform(2.3, 2.6), 6
                folder = "query" if is_query else "index"
                shots[is_query].append(Shot(
                    f"dataset/{folder}/{split}_{len(shots[is_query]) + 1:04d}.jpg", street,
                    (along, across, -height), side * 52 + rng.uniform(-turn, turn),
                    rng.uniform(4, 12), rng.normal(0, 2.0 if is_query else 0.7), is_query))
    utm = []
    for is_query in (True, False):
        xy = np.array([s.position[:2] for s in shots[is_query]])
        street = np.array([s.street for s in shots[is_query]])
        corner = np.stack([street % STREETS_PER_ROW * (STREET_M + STREET_GAP_M),
                           street // STREETS_PER_ROW * ROW_GAP_M], 1)
        utm.append(np.asarray(TOWN_ORIGIN_M[split]) + corner + xy)
    return shots[True], shots[False], utm[0], utm[1]


def street_side(street: int) -> int:
    """The side photographed: 1 right, -1 left."""
    return 1 if street % 2 else -1


@dataclass
class Street:
    """A street's quads, its roof heights each metre of both sides, and what may pass by."""

    quads: list[Quad]
    textures: list[np.ndarray]
    width_m: float
    roofs: np.ndarray = field(default_factory=lambda: np.zeros((2, 140), np.float32))
    people: range = range(0)
    cars: range = range(0)
    shadow: int = 0


def upright(left: tuple[float, float], right: tuple[float, float], top: float, bottom: float,
            texture: int, **more) -> Quad:
    """A vertical quad between two ground points, left and right as one faces it; z down."""
    return Quad(np.array([*left, top], float), np.array([right[0] - left[0], right[1] - left[1], 0.0]),
                np.array([0.0, 0.0, bottom - top]), texture, **more)


def build_street(rng: Rng, side: int) -> Street:
    """A street along x from -14 m to 94 m: houses on one side (-1 left, 1 right) and across both ends."""
    width = rng.uniform(15, 19)
    street = Street([], [], width)
    textures, quads = street.textures, street.quads
    first, last = -14.0, STREET_M + 14
    textures.append(paint_street(rng, last - first, width))
    quads.append(Quad(np.array([first, -width / 2, 0]), np.array([last - first, 0.0, 0]),
                      np.array([0, width, 0.0]), 0))
    tiles, side_wall = len(textures), len(textures) + 1
    roof = blocks(rng, 128, 128, 8, 8, hsv(rng.choice([0.02, 0.05, 0.6]), 0.4, 0.4), np.full(3, 0.2), 0.1)
    plain = blocks(rng, 130, 128, 10, 4, hsv(0.04, rng.uniform(0.1, 0.4), 0.45), np.full(3, 0.5), 0.1)
    textures += [roof, plain]
    street.roofs[(1 - side) // 2] = np.repeat(rng.uniform(6, 13, 14), 10)  # these only cast shadows
    x, y = first, side * width / 2
    deep = y + side * 5
    while x < last:
        w = min(rng.uniform(6, 11.5), last - x)
        w = last - x if last - x - w < 4 else w
        textures.append(paint_facade(rng, w))
        h = textures[-1].shape[0] / TOWN_PX_PER_M
        left, right = (x, x + w)[::-side]
        quads.append(upright((left, y), (right, y), -h, 0, len(textures) - 1))
        for at, near, far in ((left, deep, y), (right, y, deep)):
            quads.append(upright((at, near), (at, far), -h, 0, side_wall, repeat=(1.5, 2.5)))
        if rng.random() < 0.6:  # a pitched roof, rising away from the street
            rise = rng.uniform(2, 4)
            quads.append(Quad(np.array([left, y + side * 4.15, -h - rise]), quads[-3].right,
                              np.array([0, -side * 4.5, rise + 0.25]), tiles, (w / 3, 1.5)))
        street.roofs[(1 + side) // 2, round(x - first):round(x + w - first)] = h
        x += w
    for x, sign in ((first, 1), (last, -1)):
        textures.append(paint_facade(rng, width))
        h = textures[-1].shape[0] / TOWN_PX_PER_M
        quads.append(upright((x, sign * width / 2), (x, -sign * width / 2), -h, 0, len(textures) - 1))
    trees = len(textures)
    textures += [paint_tree(rng), paint_tree(rng)]
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    street.shadow = len(textures)
    dark = canvas(32, 32, (0.03, 0.03, 0.04))
    dark[..., 3] = np.clip(1.3 - 1.3 * np.hypot(x, y), 0, 0.75)
    post = canvas(16, 128, 0.12)
    post[..., 3] = (abs(np.mgrid[:128, :16][1] - 8) < 1.2)
    post[:6, 3:13] = (0.8, 0.8, 0.7, 1)
    textures += [dark, post]
    if rng.random() < 0.6:
        for x in np.arange(rng.uniform(-10, 5), last, rng.uniform(14, 30)):
            stand(quads, trees + int(rng.integers(2)), x, side * (width / 2 - 2.2), 4.6, 5.8, 90)
    for x in np.arange(rng.uniform(-10, 5), last, 22):
        stand(quads, street.shadow + 1, x, side * (width / 2 - 2.6), 0.6, 5, 90)
    street.people = range(len(textures), len(textures) + 6)
    textures += [paint_person(rng) for _ in street.people]
    street.cars = range(len(textures), len(textures) + 4)
    textures += [paint_car(rng) for _ in street.cars]
    return street


def stand(quads: list[Quad], texture: int, x: float, y: float, width: float, height: float,
          facing_deg: float, shadow: int | None = None) -> None:
    """Stand a cutout on the ground at (x, y), seen squarely by who looks along `facing_deg`."""
    across = np.array([-math.sin(math.radians(facing_deg)), math.cos(math.radians(facing_deg)), 0])
    at = np.array([x, y, 0.0])
    if shadow is not None:
        deep = np.array([across[1], -across[0], 0]) * 0.45
        quads.append(Quad(at - across * width * 0.6 - deep - [0, 0, 0.02], across * width * 1.2, 2 * deep,
                          shadow, cutout=True))
    quads.append(Quad(at - across * width / 2 - [0, 0, height], across * width,
                      np.array([0, 0, height]), texture, cutout=True))


@dataclass(frozen=True)
class Weather:
    """Light of one photograph (linear RGB), and what the camera makes of it."""

    sun: np.ndarray
    to_sun: np.ndarray
    ambient: np.ndarray
    horizon: np.ndarray
    zenith: np.ndarray
    clouds: float
    lit_windows: float
    exposure: float
    balance: np.ndarray
    grain: float


SKIES = {  # sun, light from all around, horizon, zenith (linear RGB), clouds, share of lit windows
    "day": ((1.3, 1.24, 1.12), (0.6, 0.63, 0.7), (0.75, 0.82, 0.9), (0.35, 0.5, 0.8), 0.12, 0.0),
    "hazy": ((0.5, 0.48, 0.44), (0.75, 0.77, 0.8), (0.8, 0.82, 0.86), (0.6, 0.66, 0.78), 0.06, 0.0),
    "overcast": ((0.05, 0.05, 0.05), (0.8, 0.82, 0.85), (0.74, 0.76, 0.8), (0.6, 0.63, 0.7), 0.06, 0.05),
    "evening": ((0.8, 0.6, 0.4), (0.6, 0.6, 0.66), (0.85, 0.7, 0.55), (0.35, 0.44, 0.65), 0.15, 0.1),
    "dusk": ((0.0, 0.0, 0.0), (0.26, 0.3, 0.42), (0.42, 0.36, 0.42), (0.12, 0.16, 0.3), 0.05, 0.25)}


def draw_weather(rng: Rng, is_query: bool) -> Weather:
    """Index: bright or hazy forenoons.  Queries: overcast, low evening sun, or dusk; another camera."""
    if is_query:
        kind = rng.choice(["overcast", "evening", "dusk"], p=[0.35, 0.3, 0.35])
        azimuth, height = rng.uniform(0.5, 2.6), rng.uniform(0.2, 0.45)
        stops, warm, grain_size = rng.normal(-0.1, 0.2), rng.normal(0, 0.08), rng.uniform(0.008, 0.025)
    else:
        kind = rng.choice(["day", "hazy"])
        azimuth, height = rng.uniform(-2.4, -1.8), rng.uniform(0.8, 1.0)
        stops, warm, grain_size = rng.normal(0, 0.08), rng.normal(0, 0.02), 0.006
    to_sun = np.array([math.cos(azimuth) * math.cos(height), math.sin(azimuth) * math.cos(height),
                       -math.sin(height)])
    sun, ambient, horizon, zenith = (np.array(color) for color in SKIES[kind][:4])
    clouds, lit_windows = SKIES[kind][4:]
    return Weather(sun, to_sun, ambient, horizon, zenith, clouds, lit_windows, 2**stops,
                   np.array([1 + warm, 1, 1 - warm]), grain_size)


def photograph(street: Street, atlas: Atlas, shot: Shot, size: Size, rng: Rng) -> Image.Image:
    """Render one shot of a street with its own weather, traffic and camera."""
    weather = draw_weather(rng, shot.is_query)
    x, y, z = shot.position
    quads = list(street.quads)
    for side in (-1, 1):
        for at in np.arange(x - 18, x + 18, 6.5):
            if rng.random() < (0.4 if shot.is_query else 0.25):
                stand(quads, int(rng.choice(street.cars)), at + rng.uniform(-1, 1),
                      side * (street.width_m / 2 - 3.4), 4.4, 1.5, 90 * side, street.shadow)
    for _ in range(int(rng.integers(2, 7)) if shot.is_query else int(rng.integers(0, 2))):
        far = rng.uniform(3, 12)
        angle = math.radians(shot.yaw_deg + rng.uniform(-40, 40))
        px, py = x + far * math.cos(angle), y + far * math.sin(angle)
        if abs(py) < street.width_m / 2 - 0.5:
            tall = rng.uniform(1.55, 1.9)
            stand(quads, int(rng.choice(street.people)), px, py, tall * 0.4, tall,
                  math.degrees(angle), street.shadow)
    normal = np.cross(*(np.stack([getattr(q, k) for q in quads]) for k in ("down", "right")))
    normal = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    facing = np.clip(normal @ weather.to_sun, 0, None)
    facing[[q.cutout for q in quads]] = 0.5
    upward = 1 - 0.25 * np.abs(normal[:, 1])
    direct = torch.from_numpy(facing[:, None] * weather.sun).float()
    ambient = torch.from_numpy(upward[:, None] * weather.ambient).float()
    lamps = rng.random(len(quads)) < weather.lit_windows
    mirror = np.where(lamps[:, None], (1.0, 0.7, 0.35), 0.45 * weather.horizon)
    quads = [Quad(q.origin, q.right, q.down, q.texture, q.repeat, q.cutout, tuple(g))
             for q, g in zip(quads, mirror)]
    roofs, to_sun = torch.from_numpy(street.roofs), weather.to_sun.tolist()
    opposite = 1 if to_sun[1] > 0 else -1

    def light(quad: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not direct[quad].any():
            return ambient[quad]
        q = quads[quad]
        x, y, z = (o + a * r + b * d for o, r, d in zip(*(v.tolist() for v in (q.origin, q.right, q.down))))
        reach = (opposite * street.width_m / 2 - y) / to_sun[1]
        at = (x + reach * to_sun[0] + 14).long().clamp(0, roofs.shape[1] - 1)
        over = -(z + reach * to_sun[2]) - roofs[(opposite + 1) // 2].index_select(0, at)
        return ambient[quad] + direct[quad] * (over + 0.5).clamp(0, 1)[:, None]

    horizon, zenith = torch.from_numpy(weather.horizon).float(), torch.from_numpy(weather.zenith).float()
    field = torch.from_numpy(noise(rng, 128, 128, 1.5))[None, None]

    def sky(ray: torch.Tensor) -> torch.Tensor:
        up = (-ray[:, 2] / ray.norm(dim=1)).clamp(0, 1)
        plane = ray[:, :2] / (up + 0.15)[:, None] * 0.25
        grid = (plane - 2 * torch.round(plane / 2))[None, None]
        cloud = F.grid_sample(field, grid, align_corners=False, padding_mode="border")[0, 0, 0]
        clear = horizon + (zenith - horizon) * up[:, None] ** 0.6
        return clear + weather.clouds * cloud.clamp(0, 2)[:, None]

    width, height = size.town_px
    focal = width / 2 / math.tan(math.radians(37.5))
    camera = Camera(width, height, focal, ((width - 1) / 2, (height - 1) / 2),
                    rotation(shot.yaw_deg, shot.pitch_deg, shot.roll_deg), np.array([x, y, z]))
    seen = render(quads, atlas, camera, light, sky).numpy()
    mean = seen.mean((0, 1))
    seen *= weather.exposure * (0.3 / mean.mean()) ** AUTO_EXPOSURE
    seen *= weather.balance * (mean.mean() / mean) ** AUTO_WHITE
    shown = np.clip(seen / (1 + 0.25 * seen), 0, 1) ** 0.5
    shown += weather.grain * rng.standard_normal(shown.shape, dtype=np.float32)
    return to_image(shown)


def to_image(shown: np.ndarray) -> Image.Image:
    """Display values 0..1 (h, w, 3) to an 8-bit picture."""
    return Image.fromarray((np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8))


def render_street(root: Path, split: str, street: int, size: Size, seed: int, tick: Tick) -> None:
    """Render every photograph of one street of a split."""
    queries, index, _, _ = plan_town(split, size, seed)
    built = build_street(np.random.default_rng([seed, SPLITS.index(split), 2, street]), street_side(street))
    atlas = pack_textures([linear(i) for i in built.textures], built.quads)
    shots = [s for s in queries + index if s.street == street]
    for number, shot in enumerate(shots):
        rng = np.random.default_rng([seed, SPLITS.index(split), 3, street, number])
        path = root / shot.name.removeprefix("dataset/")
        photograph(built, atlas, shot, size, rng).save(path, quality=88)
        tick()


# ------------------------------------------------------------------------------------------- rooms
LIGHT_PX_PER_M = 4
DOME_RAYS, DOME_M = 28, 1.6


@dataclass(frozen=True)
class Lamp:
    """A rectangle of light on a ceiling, (x, y, z) its middle, metres; power in linear RGB."""

    at: tuple[float, float, float]
    size: tuple[float, float]
    power: tuple[float, float, float]


@dataclass
class Room:
    """An indoor scene under construction and the way the camera flies through it.

    `way` rows: x, y, z, heading, pitch, roll, in metres and degrees, joined by a smooth curve.
    """

    textures: list[np.ndarray] = field(default_factory=list)
    quads: list[Quad] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)
    way: list[tuple[float, ...]] = field(default_factory=list)

    def paint(self, image: np.ndarray) -> int:
        """Register a texture; its number."""
        self.textures.append(image)
        return len(self.textures) - 1


def wall(room: Room, left: tuple[float, float], right: tuple[float, float], top: float, bottom: float,
         texture: int, tile_m: tuple[float, float] | None = None, **more) -> None:
    """A vertical quad; with tile_m its texture repeats every so many metres."""
    repeat = (1.0, 1.0)
    if tile_m:
        repeat = (math.dist(left, right) / tile_m[0], (bottom - top) / tile_m[1])
    room.quads.append(upright(left, right, top, bottom, texture, repeat=repeat, **more))


def flat(room: Room, x: tuple[float, float], y: tuple[float, float], z: float, texture: int,
         tile_m: float = 0, ceiling: bool = False, **more) -> None:
    """A horizontal rectangle at height z, seen from above or, a ceiling, from below."""
    w, d = x[1] - x[0], y[1] - y[0]
    right, down = np.array([w, 0.0, 0]), np.array([0, d, 0.0])
    origin = np.array([x[0], y[0], z], float)
    repeat = (w / tile_m, d / tile_m) if tile_m else (1.0, 1.0)
    if ceiling:
        origin, down = origin + down, -down
    room.quads.append(Quad(origin, right, down, texture, repeat, **more))


def block(room: Room, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], side: int,
          top: int | None = None, tile_m: float = 0) -> None:
    """A box standing in the room: four sides, a top and an underside; z[0] is its top."""
    tile = (tile_m, tile_m) if tile_m else None
    corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
    for i in range(4):
        wall(room, corners[i - 3], corners[i], z[0], z[1], side, tile)
    flat(room, x, y, z[0], side if top is None else top, tile_m)
    if z[1] < -0.05:
        flat(room, x, y, z[1], side if top is None else top, tile_m, ceiling=True)


def hang(room: Room, at: tuple[float, float, float], width: float, height: float, facing: str,
         texture: int, glow: tuple = (0.0, 0.0, 0.0), proud: float = 0.012) -> None:
    """Hang a picture, door or sign `proud` of a wall; `facing` +x, -x, +y, -y: where it looks."""
    x, y, z = at
    sign = 1 if facing[0] == "+" else -1
    if facing[1] == "x":
        left, right = (x + sign * proud, y + sign * width / 2), (x + sign * proud, y - sign * width / 2)
    else:
        left, right = (x - sign * width / 2, y + sign * proud), (x + sign * width / 2, y + sign * proud)
    top, bottom = z - height / 2, z + height / 2
    room.quads.append(upright(left, right, top, bottom, texture, glow=glow, occludes=False))


def shell(room: Room, x: tuple[float, float], y: tuple[float, float], high: float, floor: tuple[int, float],
          ceiling: tuple[int, float], walls: int, wall_m: float) -> None:
    """Floor, ceiling and four walls of a box room; (texture, tile in metres) for the first two."""
    flat(room, x, y, 0, *floor)
    flat(room, x, y, -high, *ceiling, ceiling=True)
    corners = [(x[0], y[0]), (x[0], y[1]), (x[1], y[1]), (x[1], y[0])]
    for i in range(4):
        wall(room, corners[i - 3], corners[i], -high, 0, walls, (wall_m, high))


def panel_light(room: Room, x: float, y: float, high: float, size: tuple[float, float], power: float,
                tint: tuple[float, float, float] = (1.0, 0.97, 0.9)) -> None:
    """A glowing panel in the ceiling and the lamp it is."""
    image = canvas(64, 64, 0.9)
    image[3:-3, 3:-3, 3] = 1
    flat(room, (x - size[0] / 2, x + size[0] / 2), (y - size[1] / 2, y + size[1] / 2), -high + 0.008,
         room.paint(image), ceiling=True, glow=tint, occludes=False)
    room.lamps.append(Lamp((x, y, -high + 0.03), size, tuple(power * t for t in tint)))


def paint_tiles(rng: Rng, px: int, count: int, color: np.ndarray, joint: float,
                speckle: float) -> np.ndarray:
    """count x count floor tiles in px pixels, speckled; repeating it repeats them exactly."""
    image = canvas(px, px, color)
    pitch = px // count
    y, x = np.mgrid[:px, :px]
    shade = 1 + 0.05 * rng.standard_normal((count, count, 1)).astype("f")
    image[..., :3] *= np.kron(shade, np.ones((pitch, pitch, 1), "f"))[:px, :px]
    specks = noise(rng, px, px, 0.5)
    image[..., :3] *= (1 + speckle * np.clip(specks, -1.5, 3) + 0.02 * noise(rng, px, px, 1.2))[..., None]
    image[(x % pitch < 3) | (y % pitch < 3), :3] = color * joint
    return image


def paint_plaster(rng: Rng, width: int, height: int, color: np.ndarray, rail: np.ndarray | None = None,
                  skirting: float = 0.1) -> np.ndarray:
    """A plain wall with faint blotches, a skirting board and, if wanted, a guard rail."""
    image = canvas(width, height, color)
    image[..., :3] *= (1 + 0.02 * noise(rng, width, height, 1.3) + 0.012 * noise(rng, width, height, 0.6)
                       )[..., None]
    box(image, 0, height * (1 - skirting / 3), width, height, color * 0.45)
    if rail is not None:
        box(image, 0, height * 0.66, width, height * 0.05, rail)
        box(image, 0, height * 0.71, width, height * 0.006, rail * 0.5)
    box(image, 0, 0, 2, height, color * 0.8)
    return image


def paint_door(rng: Rng, color: np.ndarray, window: bool) -> np.ndarray:
    """A door in its frame, 176 x 352 pixels."""
    image = canvas(176, 352, color * 0.6)
    box(image, 12, 12, 152, 340, color)
    image[..., :3] *= (1 + 0.035 * noise(rng, 176, 352, 0.9))[..., None]
    for x, y, w, h in ((30, 190, 50, 130), (96, 190, 50, 130)):
        box(image, x, y, w, h, color * 0.82)
        box(image, x + 4, y + 4, w - 4, h - 4, color * 1.05)
    if window:
        box(image, 44, 44, 88, 110, color * 0.5)
        box(image, 50, 50, 76, 98, (0.25, 0.3, 0.33))
        box(image, 58, 54, 14, 90, (0.35, 0.4, 0.43))
    else:
        box(image, 30, 36, 116, 124, color * 0.82)
        box(image, 34, 40, 112, 120, color * 1.05)
    box(image, 140, 176, 16, 26, (0.6, 0.6, 0.62))
    box(image, 134, 186, 18, 5, (0.3, 0.3, 0.32))
    return image


def paint_picture(rng: Rng, width: int, height: int) -> np.ndarray:
    """A framed picture that exists once: hills, a sun, blots."""
    sky = hsv(paint_hue(rng), rng.uniform(0.2, 0.6), 0.85)
    land = hsv(paint_hue(rng), rng.uniform(0.3, 0.8), 0.5)
    image = canvas(width, height, sky)
    y, x = np.mgrid[:height, :width]
    for depth in range(3):
        line = height * (0.4 + 0.18 * depth) + height * 0.12 * noise(rng, width, 8, 1.5)[0]
        image[y > line, :3] = land * (1.1 - 0.3 * depth)
    sun = np.hypot(x - rng.uniform(0.2, 0.8) * width, y - rng.uniform(0.15, 0.3) * height)
    image[sun < height * rng.uniform(0.06, 0.14), :3] = hsv(rng.uniform(0, 0.15), 0.6, 0.95)
    for _ in range(14):
        spot = np.hypot(x - rng.uniform(0, width), (y - rng.uniform(0.5, 1) * height) * rng.uniform(0.7, 2))
        image[spot < rng.uniform(2, 9), :3] = hsv(paint_hue(rng), 0.6, rng.uniform(0.2, 0.9))
    image[..., :3] *= (1 + 0.06 * noise(rng, width, height, 0.7))[..., None]
    frame = hsv(0.08, rng.uniform(0, 0.6), rng.uniform(0.1, 0.6))
    for part in (np.s_[:7], np.s_[-7:], np.s_[:, :7], np.s_[:, -7:]):
        image[part][..., :3] = frame
    return image


def paint_sign(text: str, width: int, height: int, color: np.ndarray, ink: float = 0.95) -> np.ndarray:
    """A sign with large letters."""
    image = canvas(width, height, color)
    for y in (3, height - 5):
        box(image, 3, y, width - 6, 2, ink)
    write(image, text, width * 0.1, height * 0.2, width * 0.8, height * 0.6, np.full(3, ink))
    return image


def paint_wood(rng: Rng, width: int, height: int, color: np.ndarray, boards: int = 1,
               contrast: float = 0.1) -> np.ndarray:
    """Wood with its grain along x, in boards; or, with little contrast, painted metal."""
    image = canvas(width, height, color)
    lines = noise(rng, max(8, width // 8), height, 0.8)
    lines = np.repeat(lines, 8, 1)[:, :width] if width >= 64 else noise(rng, width, height, 0.8)
    image[..., :3] *= (1 + contrast * (lines + 0.4 * noise(rng, width, height, 0.4)))[..., None]
    for i in range(1, boards):
        box(image, 0, i * height / boards - 1, width, 3, color * 0.35)
    return image


def paint_shelf(rng: Rng, width: int, height: int, rows: int) -> np.ndarray:
    """Shelves of books and folders."""
    image = canvas(width, height, (0.12, 0.1, 0.08))
    pitch, wood = height / rows, hsv(0.08, 0.4, 0.45)
    for row in range(rows):
        x = 6.0
        while x < width - 14:
            w, h = rng.uniform(5, 15), pitch * rng.uniform(0.55, 0.85)
            if rng.random() < 0.9:  # else a gap
                y = (row + 1) * pitch - h
                color = hsv(paint_hue(rng), rng.uniform(0, 0.7), rng.uniform(0.2, 0.8))
                box(image, x, y, w - 1, h, color)
                box(image, x + 1, y + h * 0.15, w - 3, h * 0.12, 0.8)
            x += w
        box(image, 0, (row + 1) * pitch - 5, width, 5, wood)
    for x in (0, width - 6):
        box(image, x, 0, 6, height, wood)
    return image


def paint_stain(rng: Rng) -> np.ndarray:
    """A stain, its fourth channel the opacity."""
    image = canvas(96, 96, hsv(0.09, 0.5, rng.uniform(0.15, 0.35)))
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    image[..., 3] = np.clip(0.6 - np.hypot(x, y) + 0.25 * noise(rng, 96, 96, 1.3), 0, 0.5)
    return image


def paint_window_view(rng: Rng) -> np.ndarray:
    """A window with daylight behind it, 200 x 240 pixels; the fourth channel glows."""
    image = canvas(200, 240, 0.85)
    for i in range(2):
        for j in range(2):
            box(image, 10 + 95 * i, 10 + 115 * j, 85, 105, (0.3, 0.3, 0.3), 0.9 - 0.3 * j)
    image[..., 3] *= 1 + 0.1 * noise(rng, 200, 240, 1.5)
    return image


def corridor(room: Room, rng: Rng) -> None:
    """A hospital corridor: the same door every 3.2 m, the same tiles, a few signs."""
    long, half, high = 19.2, 1.25, 2.8
    floor = room.paint(paint_tiles(rng, 320, 2, hsv(0.12, 0.1, 0.62), 0.55, 0.10))
    panels = room.paint(paint_tiles(rng, 240, 2, np.full(3, 0.8), 0.6, 0.05))
    plaster = room.paint(paint_plaster(rng, 512, 448, hsv(0.14, 0.08, 0.8), hsv(0.5, 0.25, 0.5)))
    shell(room, (0, long), (-half, half), high, (floor, 1.2), (panels, 1.2), plaster, 3.2)
    door = room.paint(paint_door(rng, hsv(0.55, 0.3, 0.6), True))
    double = room.paint(paint_door(rng, hsv(0.09, 0.5, 0.55), False))
    for i in range(6):
        x = 1.6 + 3.2 * i
        hang(room, (x, -half, -1.08), 1.05, 2.16, "+y", door)
        hang(room, (x, half, -1.08), 1.05, 2.16, "-y", door if i % 2 else double)
        panel_light(room, x, 0, high, (1.2, 0.3), 1.5)
        if i in (0, 2, 3, 5):
            number = room.paint(paint_sign(f"{104 + i}", 96, 64, hsv(0.6, 0.6, 0.35)))
            hang(room, (x + 0.8, -half, -1.6), 0.26, 0.17, "+y", number)
    way_out = room.paint(paint_sign("EXIT", 140, 56, hsv(0.38, 0.9, 0.45)))
    for x, facing in ((0, "+x"), (long, "-x")):
        hang(room, (x, 0, -1.08), 1.9, 2.16, facing, double)
        hang(room, (x, 0.2, -2.42), 0.7, 0.28, facing, way_out)
    for x, y, facing in ((3.3, half, "-y"), (8.1, -half, "+y"), (13.0, half, "-y")):
        hang(room, (x, y, -1.55), 0.8, 0.6, facing, room.paint(paint_picture(rng, 192, 144)))
    stain = room.paint(paint_stain(rng))
    for x, y in ((5.0, 0.4), (11.7, -0.5)):
        flat(room, (x, x + 0.7), (y - 0.3, y + 0.3), -0.004, stain, cutout=True, occludes=False)
    wood = room.paint(paint_wood(rng, 256, 64, hsv(0.07, 0.5, 0.5), 2))
    block(room, (6.3, 7.7), (half - 0.45, half), (-0.45, -0.36), wood)
    for x in (6.4, 7.5):
        block(room, (x, x + 0.1), (half - 0.4, half - 0.05), (-0.36, 0), wood)
    cabinet = room.paint(paint_wood(rng, 96, 128, hsv(0.6, 0.1, 0.7), 3, 0.025))
    block(room, (14.2, 14.9), (-half, -half + 0.4), (-1.1, 0), cabinet)
    room.way += [(1.2, 0.2, -1.5, 8, -4, 6), (4.5, -0.4, -1.3, -22, 2, -14), (7.5, 0.0, -1.7, 18, -8, 10),
                 (10.0, 0.3, -1.4, 30, 0, 20), (12.2, -0.2, -1.6, -10, -5, -8)]


def office(room: Room, rng: Rng) -> None:
    """An office: four equal desks, shelves, windows, pictures."""
    x1, y1, high = 8.4, 6.6, 2.8
    carpet = room.paint(paint_tiles(rng, 256, 2, hsv(0.6, 0.25, 0.38), 0.85, 0.22))
    panels = room.paint(paint_tiles(rng, 240, 2, np.full(3, 0.82), 0.6, 0.06))
    plaster = room.paint(paint_plaster(rng, 512, 448, hsv(0.1, 0.06, 0.85)))
    shell(room, (0, x1), (0, y1), high, (carpet, 1.0), (panels, 1.2), plaster, 2.8)
    desk = room.paint(paint_wood(rng, 256, 128, hsv(0.08, 0.45, 0.62), 1))
    grey = room.paint(paint_wood(rng, 128, 128, hsv(0.6, 0.05, 0.45), 3, 0.025))
    screen = canvas(128, 80, 0.06)
    box(screen, 5, 5, 118, 66, (0.15, 0.2, 0.3), 0.25)
    for line in range(8):
        box(screen, 12, 10 + 7 * line, 20 + 9 * (line * 5 % 9), 3, (0.7, 0.8, 0.75), 0.3)
    screen, paper = room.paint(screen), room.paint(paint_sign("PLAN", 64, 80, np.full(3, 0.85), 0.2))
    for x in (2.3, 5.1):
        for y in (1.9, 4.3):
            block(room, (x, x + 1.6), (y, y + 0.8), (-0.74, -0.70), desk)
            for leg in (x + 0.03, x + 1.12):
                block(room, (leg, leg + 0.45), (y + 0.08, y + 0.72), (-0.70, 0), grey)
            block(room, (x + 0.5, x + 1.1), (y + 0.5, y + 0.54), (-1.2, -0.8), grey)
            hang(room, (x + 0.8, y + 0.5, -1.0), 0.58, 0.38, "-y", screen, (0.9, 0.95, 1.0))
            flat(room, (x + 1.2, x + 1.42), (y + 0.1, y + 0.4), -0.745, paper, occludes=False)
    for y in (1.2, 3.3, 5.4):
        hang(room, (x1, y, -1.55), 1.3, 1.5, "-x", room.paint(paint_window_view(rng)), (0.95, 1.0, 1.1))
    books = [room.paint(paint_shelf(rng, 256, 320, 5)) for _ in range(2)]
    for i, x in enumerate((1.0, 2.3, 3.6)):
        block(room, (x, x + 1.2), (0, 0.35), (-2.0, 0), grey)
        hang(room, (x + 0.6, 0.35, -1.0), 1.2, 2.0, "+y", books[i % 2])
    door = room.paint(paint_door(rng, hsv(0.08, 0.35, 0.7), False))
    hang(room, (6.6, 0, -1.05), 1.0, 2.1, "+y", door)
    hang(room, (0, 5.6, -1.05), 1.0, 2.1, "+x", door)
    board = canvas(320, 200, 0.9)
    for _ in range(14):
        x, y, w = rng.uniform(12, 220), rng.uniform(12, 180), rng.uniform(15, 80)
        box(board, x, y, w, 3, hsv(paint_hue(rng), 0.8, 0.5))
    for part in (np.s_[:5], np.s_[-5:], np.s_[:, :5], np.s_[:, -5:]):
        board[part][..., :3] = 0.4
    hang(room, (0, 2.6, -1.5), 2.0, 1.25, "+x", room.paint(board))
    for x in (1.6, 3.4, 5.6, 7.2):
        hang(room, (x, y1, -1.6), 0.9, 0.65, "-y", room.paint(paint_picture(rng, 216, 156)))
    block(room, (4.3, 4.9), (y1 - 0.5, y1), (-1.1, 0), grey)
    for x in (2.4, 6.0):
        for y in (1.8, 4.8):
            panel_light(room, x, y, high, (1.2, 0.6), 1.6)
    room.way += [(1.2, 5.6, -1.5, -45, -5, -8), (1.4, 3.3, -1.35, -20, -10, 12),
                 (4.4, 3.4, -1.7, 25, -6, 18), (7.4, 3.3, -1.4, 110, -4, -10),
                 (7.0, 5.6, -1.6, 190, -8, -16), (4.6, 5.8, -1.5, 230, -10, 6)]


def hall(room: Room, rng: Rng) -> None:
    """A hall with two rows of equal columns, large tiles, high windows and banners."""
    x1, y1, high = 17.6, 10.0, 4.4
    floor = paint_tiles(rng, 400, 2, hsv(0.08, 0.12, 0.66), 0.5, 0.09)
    floor[:200, :200, :3] *= 0.6
    floor[200:, 200:, :3] *= 0.6
    floor = room.paint(floor)
    panels = room.paint(paint_tiles(rng, 256, 1, np.full(3, 0.78), 0.55, 0.05))
    plaster = room.paint(paint_plaster(rng, 480, 660, hsv(0.07, 0.16, 0.78), hsv(0.05, 0.4, 0.45), 0.15))
    shell(room, (0, x1), (0, y1), high, (floor, 1.6), (panels, 1.6), plaster, 3.2)
    stone = room.paint(blocks(rng, 128, 704, 128, 64, hsv(0.09, 0.15, 0.7), hsv(0.09, 0.1, 0.45), 0.04)
                       * (1 + 0.06 * noise(rng, 128, 704, 0.8))[..., None])
    base = room.paint(paint_wood(rng, 96, 48, hsv(0.07, 0.2, 0.4)))
    for i in range(5):
        x = 2.4 + 3.2 * i
        for y in (2.6, 7.4):
            block(room, (x - 0.25, x + 0.25), (y - 0.25, y + 0.25), (-high, 0), stone)
            block(room, (x - 0.33, x + 0.33), (y - 0.33, y + 0.33), (-0.3, 0), base)
        panel_light(room, x, 5.0, high, (1.6, 1.6), 4.0, (1.0, 0.93, 0.8))
    pane = room.paint(paint_window_view(rng))
    door = room.paint(paint_door(rng, hsv(0.05, 0.55, 0.4), True))
    for i in range(5):
        hang(room, (2.4 + 3.2 * i, 0, -2.5), 1.5, 2.2, "+y", pane, (0.9, 1.0, 1.15))
        hang(room, (2.4 + 3.2 * i, y1, -1.15), 1.15, 2.3, "-y", door)
    for i, text in enumerate(("NORTH", "B", "GALLERY", "7")):
        color = hsv(paint_hue(rng), 0.7, 0.45)
        hang(room, (4.0 + 3.2 * i, y1, -2.6), 1.1, 1.1, "-y", room.paint(paint_sign(text, 224, 224, color)))
    for y in (1.5, 5.0, 8.5):
        hang(room, (0, y, -2.0), 1.7, 1.2, "+x", room.paint(paint_picture(rng, 272, 192)))
        hang(room, (x1, y, -2.0), 1.7, 1.2, "-x", room.paint(paint_picture(rng, 272, 192)))
    wood = room.paint(paint_wood(rng, 320, 96, hsv(0.06, 0.55, 0.45), 3))
    block(room, (13.6, 14.2), (3.6, 6.4), (-1.1, 0), wood)
    for x in (4.2, 7.4, 10.6):
        block(room, (x, x + 1.6), (8.9, 9.4), (-0.45, -0.3), wood)
        block(room, (x + 0.2, x + 0.5), (9.0, 9.3), (-0.3, 0), base)
        block(room, (x + 1.1, x + 1.4), (9.0, 9.3), (-0.3, 0), base)
    room.way += [(1.2, 5.2, -1.7, 12, 2, 5), (4.2, 4.4, -1.5, -30, 4, -16), (6.8, 5.6, -2.0, 20, -2, 14),
                 (9.4, 5.0, -1.6, 55, 0, 22), (11.4, 6.2, -1.8, 20, -4, -10)]


def storage(room: Room, rng: Rng) -> None:
    """A store: racks with equal crates, a concrete floor, aisle signs."""
    x1, y1, high = 12.0, 7.2, 3.4
    concrete = room.paint(paint_tiles(rng, 512, 1, hsv(0.1, 0.05, 0.5), 0.7, 0.13))
    ceiling = room.paint(paint_wood(rng, 256, 256, hsv(0.6, 0.08, 0.5), 4, 0.025))
    brick = room.paint(blocks(rng, 480, 408, 48, 24, hsv(0.12, 0.06, 0.72), hsv(0.1, 0.05, 0.55), 0.025)
                       * (1 + 0.04 * noise(rng, 480, 408, 0.7))[..., None])
    shell(room, (0, x1), (0, y1), high, (concrete, 2.4), (ceiling, 1.6), brick, 4.0)
    steel = room.paint(paint_wood(rng, 128, 32, hsv(0.6, 0.6, 0.4), 1, 0.03))
    crate = [room.paint(paint_wood(rng, 160, 128, hsv(0.09, 0.45, v), 5)) for v in (0.62, 0.5)]
    card = paint_wood(rng, 160, 128, hsv(0.09, 0.35, 0.6))
    box(card, 70, 0, 20, 128, hsv(0.1, 0.25, 0.75))
    write(card, "FRAGILE", 12, 70, 136, 40, (0.5, 0.1, 0.1))
    kinds = crate + [room.paint(card)]
    for y in (0.0, 3.2, 6.5):
        for x in np.arange(1.2, 10.0, 1.9):
            for level in (-0.95, -1.85):
                block(room, (x, x + 1.9), (y, y + 0.7), (level, level + 0.06), steel)
            for px in (x, x + 1.84):
                block(room, (px, px + 0.06), (y, y + 0.7), (-2.4, 0), steel)
            for bottom in (0.0, -0.95, -1.85):
                at = x + 0.12
                while at < x + 1.2:
                    w, h = rng.choice([0.5, 0.75]), rng.choice([0.4, 0.55, 0.7])
                    if rng.random() < 0.85:
                        block(room, (at, at + w), (y + 0.06, y + 0.64), (bottom - h, bottom - 0.002),
                              kinds[rng.integers(3)])
                    at += w + 0.12
    for i, y in enumerate((1.95, 5.2)):
        aisle = room.paint(paint_sign(f"AISLE {i + 1}", 200, 120, hsv(0.13, 0.9, 0.75), 0.1))
        gate = room.paint(paint_sign("AB"[i] + "17", 160, 100, hsv(0.0, 0.8, 0.5)))
        hang(room, (x1, y, -2.6), 1.0, 0.6, "-x", aisle)
        hang(room, (0, y, -2.4), 0.8, 0.5, "+x", gate)
        for x in (2.2, 6.0, 9.8):
            panel_light(room, x, y, high, (0.25, 1.4), 1.6, (0.92, 1.0, 1.0))
    hang(room, (x1, 5.2, -1.1), 1.4, 2.2, "-x", room.paint(paint_door(rng, hsv(0.3, 0.3, 0.4), False)))
    line = room.paint(canvas(32, 32, (0.75, 0.6, 0.1)))
    for y in (0.85, 3.0, 4.1, 6.3):
        flat(room, (0.8, 11.2), (y, y + 0.08), -0.003, line, occludes=False)
    stain = room.paint(paint_stain(rng))
    for x, y in ((3.4, 1.5), (6.6, 2.3), (9.2, 5.0)):
        flat(room, (x, x + 0.9), (y, y + 0.8), -0.004, stain, cutout=True, occludes=False)
    room.way += [(0.8, 2.0, -1.5, 5, -4, 8), (4.0, 1.8, -1.7, 25, -8, -14),
                 (6.6, 2.3, -1.4, -20, 0, 16), (9.2, 1.9, -1.6, 15, -6, 22),
                 (11.2, 2.6, -1.7, 80, -6, -6), (11.0, 4.6, -1.5, 150, -4, -18)]


def bake_light(room: Room) -> Atlas:
    """Light on every quad, one small map each: lamps with their shadows, and light from all around.

    A texel's light is the sum of the lamps' irradiance (six points a lamp, those hidden left out) and
    a glow lessened by what stands within 1.6 m (28 rays over the hemisphere).
    """
    solid = [q for q in room.quads if q.occludes and not q.cutout]
    o, r, d = (torch.from_numpy(np.stack([getattr(q, k) for q in solid])).float()
               for k in ("origin", "right", "down"))
    n = torch.cross(r, d, dim=1)
    normals, squares = n, (n * n).sum(1, keepdim=True)
    duals = [torch.cross(d, n, dim=1) / squares, torch.cross(n, r, dim=1) / squares]
    middles, radii = o + (r + d) / 2, (r + d).norm(dim=1) / 2

    def blocked(start: torch.Tensor, way: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        n, a_dual, b_dual = (m[by].T for m in (normals, *duals))
        n_o, a_o, b_o = ((m.T * o[by]).sum(1) for m in (n, a_dual, b_dual))
        parts = [torch.zeros(0, dtype=torch.bool)]
        for s, w in zip(start.split(2048), way.split(2048)):
            t = (n_o - s @ n) / (w @ n)
            a, b = s @ a_dual - a_o + t * (w @ a_dual), s @ b_dual - b_o + t * (w @ b_dual)
            inside = torch.maximum((a - 0.5).abs(), (b - 0.5).abs()) < 0.5
            parts.append((inside & (t > 1e-4) & (t < 1)).any(1))
        return torch.cat(parts)

    count = torch.arange(DOME_RAYS) + 0.5
    up, turn = (1 - count / DOME_RAYS).sqrt(), count * 2.399963  # golden angle
    dome = torch.stack([(1 - up**2).sqrt() * turn.cos(), (1 - up**2).sqrt() * turn.sin(), up], 1) * DOME_M
    spots = torch.tensor([[lamp.at[0] + i / 3 * lamp.size[0], lamp.at[1] + j / 4 * lamp.size[1], lamp.at[2]]
                          for lamp in room.lamps for i in (-1, 0, 1) for j in (-1, 1)])
    power = torch.tensor([lamp.power for lamp in room.lamps for _ in range(6)]) / 6
    anything = torch.arange(len(solid))
    maps = []
    for quad in room.quads:
        origin, right, down = (torch.from_numpy(v).float() for v in (quad.origin, quad.right, quad.down))
        w, h = (max(2, int(v.norm() * LIGHT_PX_PER_M)) for v in (right, down))
        normal = -F.normalize(torch.cross(right, down, dim=0), dim=0)
        b, a = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
        a, b = (x.reshape(-1, 1).clamp(m, 1 - m) for x, v in ((a, right), (b, down))
                for m in [min(0.04 / float(v.norm()), 0.3)])
        point = origin + a * right + b * down + normal * 0.02
        rays = dome @ torch.stack([F.normalize(right, dim=0), F.normalize(down, dim=0), normal])
        reach = (middles - origin - (right + down) / 2).norm(dim=1) - radii - (right + down).norm() / 2
        start = point.repeat_interleave(DOME_RAYS, 0)
        shut = blocked(start, rays.repeat(len(point), 1), torch.nonzero(reach < DOME_M)[:, 0])
        total = (0.54 - 0.42 * shut.view(-1, DOME_RAYS).float().mean(1, keepdim=True)).expand(-1, 3)
        way = spots - point[:, None]
        falls = (way @ normal).clamp(min=0) * (-way[..., 2]).clamp(min=0) / ((way * way).sum(2)**2 + 0.05)
        where = torch.nonzero(falls > 0.01)
        clear = ~blocked(point[where[:, 0]], way[where[:, 0], where[:, 1]], anything)
        lit = torch.zeros_like(falls)
        lit[where[:, 0], where[:, 1]] = falls[where[:, 0], where[:, 1]] * clear
        image = (total + lit @ power).view(h, w, 3).permute(2, 0, 1)[None]
        image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)[0].permute(1, 2, 0)
        maps.append(F.pad(image, (0, 1)).numpy())
    return pack_textures(maps, [], mipmaps=False)


def fly(room: Room, frames: int, rng: Rng) -> list[tuple[np.ndarray, np.ndarray]]:
    """Camera poses (R_world_from_cam, c_world) along the room's way, 0.25 to 0.6 m apart."""
    knots = np.array(room.way)
    knots = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    t = np.linspace(0, len(room.way) - 1 - 1e-9, 2000)
    k, s = t.astype(int), (t % 1)[:, None]
    p0, p1, p2, p3 = (knots[k + i] for i in range(4))  # Catmull-Rom
    curve = p1 + s / 2 * (p2 - p0 + s * (2 * p0 - 5 * p1 + 4 * p2 - p3 + s * (3 * (p1 - p2) + p3 - p0)))
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve[:, :3], axis=0), axis=1))])
    steps = np.cumsum(np.concatenate([[0], rng.uniform(0.75, 1.25, frames - 1)]))
    at = steps / steps[-1] * min(length[-1], 0.45 * (frames - 1))
    rows = np.stack([np.interp(at, length, c) for c in curve.T], 1)
    rows[:, 3:] += rng.normal(0, (5.0, 2.5, 3.5), (frames, 3))
    return [(rotation(*row[3:]), row[:3]) for row in rows]


def quaternion(R: np.ndarray) -> np.ndarray:
    """(x, y, z, w) of a rotation, w >= 0, from the largest diagonal of 4 q q^T."""
    m = R
    outer = np.array([
        [1 + m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2]],
        [m[0, 1] + m[1, 0], 1 - m[0, 0] + m[1, 1] - m[2, 2], m[1, 2] + m[2, 1], m[0, 2] - m[2, 0]],
        [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], 1 - m[0, 0] - m[1, 1] + m[2, 2], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], 1 + m[0, 0] + m[1, 1] + m[2, 2]]])
    q = outer[np.argmax(np.diag(outer))]
    return q / np.linalg.norm(q) * (1 if q[3] >= 0 else -1)


def build_room(scene: int, seed: int) -> Room:
    """Scene 0 to 3: corridor, office, hall, storage."""
    room = Room()
    (corridor, office, hall, storage)[scene](room, np.random.default_rng([seed, 10, scene]))
    return room


def render_room(root: Path, scene: int, size: Size, seed: int, tick: Tick) -> None:
    """Render one indoor scene with its pose.txt."""
    room = build_room(scene, seed)
    atlas, lights = pack_textures([linear(i) for i in room.textures], room.quads), bake_light(room)

    def light(quad: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w, h, _ = lights.levels[quad, 0].tolist()  # the outer texels lie on the edges
        return sample_texture(lights, quad, (a * (w - 1) + 0.5) / w, (b * (h - 1) + 0.5) / h)[:, :3]

    folder = root / "camera" / SCENES[scene]
    (folder / "images").mkdir(parents=True)
    width, height = size.room_px
    poses = fly(room, size.frames, np.random.default_rng([seed, 11, scene]))
    for number, (R, c) in enumerate(poses):
        camera = Camera(width, height, width / 2, (width / 2, height / 2), R, c)
        seen = render(room.quads, atlas, camera, light, torch.zeros_like).numpy()
        shown = np.clip(1.15 * seen / (1 + 0.2 * seen), 0, 1) ** 0.5
        to_image(shown).save(folder / "images" / f"{number:06d}.png", compress_level=3)
        tick()
    lines = [" ".join(f"{v:.9f}" for v in (*c, *quaternion(R))) for R, c in poses]
    (folder / "pose.txt").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------- files
def settings(seed: int, size: Size) -> dict:
    """What a rendering depends on: this file, the seed and the size (as JSON would give it back)."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return json.loads(json.dumps({"code": code, "seed": seed, "size": asdict(size)}))


def is_rendered(root: Path, seed: int = 0, size: Size = FULL) -> bool:
    """Whether `root` holds a complete rendering by this very code with this seed and size."""
    try:
        return json.loads((Path(root) / "sample.json").read_text()) == settings(seed, size)
    except (OSError, ValueError):
        return False


def write_lists(root: Path, size: Size, seed: int) -> None:
    """Lists and positions of the town, in the assignment's format."""
    (root / "gt").mkdir()
    for split in SPLITS:
        queries, index, utm_q, utm_db = plan_town(split, size, seed)
        for name, shots in (("query", queries), ("index", index)):
            (root / f"{name}_{split}.txt").write_text("".join(s.name + "\n" for s in shots))
        np.savez(root / "gt" / f"pitts30k_{split}.npz", utmQ=utm_q, utmDb=utm_db, posDistThr=POS_DIST_THR_M)


def render_all(root: Path, seed: int, size: Size, workers: int, quiet: bool) -> None:
    """Render everything into the empty folder `root`; rooms first, they take longest."""
    for name in ("query", "index"):
        (root / name).mkdir()
    write_lists(root, size, seed)
    total = size.scenes * size.frames + sum(sum(getattr(size, split)) for split in SPLITS)
    threads, cancelled, lock = torch.get_num_threads(), threading.Event(), threading.Lock()
    with tqdm(total=total, unit="image", desc="rendering the sample", disable=quiet or None) as bar:

        def tick() -> None:
            with lock:
                bar.update()
            if cancelled.is_set():
                raise InterruptedError("another part of the sample could not be rendered")

        jobs = [(render_room, root, scene, size, seed, tick) for scene in range(size.scenes)]
        for split in SPLITS:
            streets = math.ceil(getattr(size, split)[1] / INDEX_PER_STREET)
            jobs += [(render_street, root, split, street, size, seed, tick) for street in range(streets)]
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for done in as_completed([pool.submit(*job) for job in jobs]):
                done.result()
        finally:  # after an error or Ctrl-C the others stop at their next image
            cancelled.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def render_sample(root: Path | None = None, seed: int = 0, workers: int | None = None, quiet: bool = False,
                  size: Size = FULL) -> None:
    """Render the sample into `root` (default: `sample/` beside this file), replacing an older one.

    The work is done in a folder beside it which takes its name when complete, so that a rendering cut
    short leaves nothing that looks finished.  Raises ValueError if `root` holds anything else, or if
    the disk is full or not writable.
    """
    root = Path(root) if root is not None else Path(__file__).resolve().parent / "sample"
    ours = root.is_dir() and ((root / "sample.json").exists() or not any(root.iterdir()))
    if root.exists() and not ours:
        raise ValueError(f"{root} is there already and is not a rendered sample; name an empty folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for stale in root.parent.glob(f".{root.name}.partial-*"):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        if shutil.disk_usage(root.parent).free < DISK_NEEDED_BYTES and size == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
        try:
            render_all(partial, seed, size, workers or min(8, os.cpu_count() or 1), quiet)
            (partial / "sample.json").write_text(json.dumps(settings(seed, size)))
            if root.exists():
                shutil.rmtree(root)
            partial.chmod(0o755)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(f"the disk of {root.parent} is too full for the sample "
                             f"({DISK_NEEDED_BYTES >> 20} MB): free some or name another folder") from error
        raise ValueError(f"the sample cannot be written to {root} ({error.strerror or error}): "
                         "name a folder that is writable") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render the built-in sample in the assignment's layout.")
    parser.add_argument("--output", type=Path, help="where to (default: sample/ beside this file)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another town (default 0)")
    args = parser.parse_args(argv)
    try:
        render_sample(args.output, args.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
