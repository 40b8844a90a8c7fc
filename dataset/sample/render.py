"""The renderer: textured parallelograms, a pinhole camera, exact truth.

Axes are TartanAir's, in the camera and in the world: x forward, y right, z down. Pixel (u, v) is a
pixel center, (0, 0) the top-left one. Light is linear until a picture is developed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CHUNK = 1 << 15  # points shaded at once: their arrays stay in the processor's cache
ANISOTROPY = 3  # how many times longer than wide a texture's footprint is before it is blurred


@dataclass(frozen=True)
class Quad:
    """A parallelogram seen from its front: `origin` top left, `right` and `down` its edges (m).

    `repeat` tiles the texture over it; the texture's fourth channel is its share of `glow`.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray
    texture: int
    repeat: tuple[float, float] = (1.0, 1.0)
    glow: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: pixels, focal length and principal point in pixels, pose."""

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


class Scene:
    """Quads and their textures under construction."""

    def __init__(self) -> None:
        self.textures: list[np.ndarray] = []
        self.quads: list[Quad] = []

    def paint(self, image: np.ndarray) -> int:
        """Register a texture (h, w, 4) of display values; its number."""
        self.textures.append(image)
        return len(self.textures) - 1

    def wall(self, left, right, top: float, bottom: float, texture: int, tile_m=None) -> None:
        """A vertical quad between two ground points, left and right as one faces it (z down);
        with tile_m = (width, height) its texture repeats every so many meters."""
        repeat = (1.0, 1.0)
        if tile_m:
            repeat = (math.dist(left, right) / tile_m[0], (bottom - top) / tile_m[1])
        edge = np.array([right[0] - left[0], right[1] - left[1], 0.0])
        down = np.array([0.0, 0.0, bottom - top])
        origin = np.array([*left, top], dtype=float)
        self.quads.append(Quad(origin, edge, down, texture, repeat))

    def flat(self, x, y, z: float, texture: int, tile_m: float = 0, ceiling=False, **more) -> None:
        """A horizontal rectangle x[0]..x[1], y[0]..y[1], seen from above or, a ceiling, below."""
        right, down = np.array([x[1] - x[0], 0.0, 0.0]), np.array([0.0, y[1] - y[0], 0.0])
        repeat = (right[0] / tile_m, down[1] / tile_m) if tile_m else (1.0, 1.0)
        origin = np.array([x[0], y[0], z], dtype=float)
        if ceiling:
            origin, down = origin + down, -down
        self.quads.append(Quad(origin, right, down, texture, repeat, **more))

    def block(self, x, y, z, texture: int) -> None:
        """A box seen from above: four sides and a top, which is at z[0]."""
        corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
        for i in range(4):
            self.wall(corners[i - 3], corners[i], z[0], z[1], texture)
        self.flat(x, y, z[0], texture)

    def atlas(self) -> Atlas:
        """The textures in linear light; the border of a repeated one wraps round."""
        wrapping = {q.texture for q in self.quads if q.repeat != (1.0, 1.0)}
        depth = round(math.log2(max(max(i.shape[:2]) for i in self.textures)))
        texels, levels, total = [], [], 0
        for number, image in enumerate(self.textures):
            image = np.concatenate([np.clip(image[..., :3], 0, 1) ** 2, image[..., 3:]], axis=2)
            texture = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
            mode = "circular" if number in wrapping else "replicate"
            for _ in range(depth):
                h, w = texture.shape[2:]
                bordered = F.pad(texture, (1, 1, 1, 1), mode=mode)[0]
                texels.append(bordered.permute(1, 2, 0).reshape(-1, 4))
                levels.append((w, h, total + w + 3))
                total += len(texels[-1])
                if min(w, h) > 1:
                    texture = F.avg_pool2d(texture, 2)
        assert total < 1 << 24, "rows are addressed in float32"
        table = torch.tensor(levels, dtype=torch.float32)
        return Atlas(torch.cat(texels), table.view(len(self.textures), depth, 3))


def _texels_at(atlas: Atlas, texture: torch.Tensor, u, v, level) -> torch.Tensor:
    """(P, 4) values at u, v in 0..1 across each point's texture, trilinear."""
    depth = atlas.levels.shape[1]
    table = atlas.levels.view(-1, 3).T
    low = level.clamp(0, depth - 1).floor()
    blend = (level - low).clamp(0, 1)
    first = (texture * depth + low).long()
    second = (texture * depth + (low + 1).clamp(max=depth - 1)).long()
    rows, weights = [], []
    for number, share in ((first, 1 - blend), (second, blend)):
        w, h, start = table.index_select(1, number)
        x, y = u * w - 0.5, v * h - 0.5
        x0, y0 = x.floor(), y.floor()
        x, y, pitch = x - x0, y - y0, w + 2
        corner = start + y0 * pitch + x0
        below = y * share
        above = share - below
        right, right_below = above * x, below * x
        rows += [corner, corner + 1, corner + pitch, corner + pitch + 1]
        weights += [above - right, right, below - right_below, right_below]
    rows, weights = torch.stack(rows, 1).int(), torch.stack(weights, 1)
    return F.embedding_bag(rows, atlas.texels, mode="sum", per_sample_weights=weights)


def _plane_forms(quads: list[Quad], camera: Camera) -> np.ndarray:
    """(Q, 3, 3): 1/depth, a/depth, b/depth of each quad's plane as affine functions of the pixel.

    Row r gives r0 + r1 (x - cx) + r2 (y - cy); a and b run 0..1 along `right` and `down`. From
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
    inverse = n @ rays / np.where(nw > 1e-9, nw, np.inf)  # 0: seen from behind or edge on
    a = dual_a @ rays - (dual_a * w).sum(1, keepdims=True) * inverse
    b = dual_b @ rays - (dual_b * w).sum(1, keepdims=True) * inverse
    return np.stack([inverse, a, b], 1)


def _visible(forms: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """(len(ys), len(xs)) int32: the nearest quad at each sample, -1 where there is none.

    On a row a quad is the interval where 0 <= a <= 1 and 0 <= b <= 1, all affine in x once
    multiplied by 1/depth. xs, ys: even steps, relative to the principal point.
    """
    facing = np.flatnonzero(forms[:, 0].any(1))
    inverse, a, b = forms[facing].transpose(1, 0, 2)
    low, high = np.full((2, len(facing), len(ys)), -np.inf)
    high[:] = np.inf
    for g in (a, b, inverse - a, inverse - b):
        slope = np.where(np.abs(g[:, 1]) < 1e-12, 1e-12, g[:, 1])[:, None]
        end = -(g[:, :1] + g[:, 2:] * ys) / slope
        np.maximum(low, end, out=low, where=slope > 0)
        np.minimum(high, end, out=high, where=slope < 0)
    step = xs[1] - xs[0]
    slack = 2e-3  # of a step: neighbors that share an edge leave no gap
    low = np.ceil(np.clip((low - xs[0]) / step - slack, 0, len(xs))).astype(np.int32)
    high = np.floor(np.clip((high - xs[0]) / step + slack, -1, len(xs) - 1)).astype(np.int32) + 1
    filled = low < high
    nearest = np.zeros((len(ys), len(xs)), np.float32)
    owner = np.full(nearest.shape, -1, np.int32)
    columns = np.arange(len(xs), dtype=np.int32)
    x32, y32 = xs.astype(np.float32), ys.astype(np.float32)
    for k in np.flatnonzero(filled.any(1)):
        rows = np.flatnonzero(filled[k])
        y = slice(rows[0], rows[-1] + 1)
        x = slice(low[k, rows].min(), high[k, rows].max())
        f = inverse[k].astype(np.float32)
        depth_inverse = (f[0] + f[1] * x32[x]) + (f[2] * y32[y])[:, None]
        hit = columns[x] >= low[k, y, None]
        hit &= columns[x] < high[k, y, None]
        hit &= depth_inverse > nearest[y, x]
        np.copyto(nearest[y, x], depth_inverse, where=hit)
        np.copyto(owner[y, x], facing[k], where=hit)
    return owner


def normals(quads: list[Quad]) -> np.ndarray:
    """(Q, 3) unit vectors to the side from which each quad is seen."""
    n = np.cross(*(np.stack([getattr(q, k) for q in quads]) for k in ("down", "right")))
    return n / np.linalg.norm(n, axis=1, keepdims=True)


@dataclass(frozen=True)
class Light:
    """Light on each quad: brightness (Q, 4) at its corners (top left, top right, bottom left,
    bottom right), color (Q, 3), and what its glowing parts send out, (Q, 3)."""

    corners: np.ndarray
    color: np.ndarray
    glow: np.ndarray


def render(
    quads: list[Quad], atlas: Atlas, camera: Camera, light: Light, background: Callable
) -> np.ndarray:
    """Linear radiance (height, width, 3) float32.

    Visibility is found for 2 x 2 samples a pixel; a pixel that one quad fills is shaded once, at
    its center, any other at each sample. background(ray (P, 3)) -> (P, 3) where there is no quad.
    """
    width, height = camera.width, camera.height
    cx, cy = (np.arange(n) - c for n, c in zip((width, height), camera.center_px))
    xs, ys = ((c[:, None] + [-0.25, 0.25]).reshape(-1) for c in (cx, cy))
    forms = _plane_forms(quads, camera)
    owner = _visible(forms, xs, ys).reshape(height, 2, width, 2)
    first = owner[:, 0, :, 0]
    whole = (first == owner[:, 0, :, 1]) & (first == owner[:, 1, :, 0])
    whole = (whole & (first == owner[:, 1, :, 1])).reshape(-1)
    split = owner.transpose(0, 2, 1, 3)[~whole.reshape(height, width)]
    rows, columns = np.divmod(np.flatnonzero(~whole), width)
    split_x = xs.reshape(width, 2)[columns][:, [0, 1, 0, 1]]
    split_y = ys.reshape(height, 2)[rows][:, [0, 0, 1, 1]]
    count = int(whole.sum())
    quad = torch.from_numpy(np.concatenate([first.reshape(-1)[whole], split.reshape(-1)])).long()
    x = np.concatenate([np.tile(cx, height)[whole], split_x.reshape(-1)])
    y = np.concatenate([np.repeat(cy, width)[whole], split_y.reshape(-1)])
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()

    table = _shading_table(quads, forms, atlas, light)
    spacing = torch.ones(len(quad))
    spacing[count:] = 0.5
    color = torch.empty(len(quad), 3)
    for at in range(0, len(quad), CHUNK):
        part = slice(at, at + CHUNK)
        columns = table.index_select(1, quad[part].clamp(min=0))
        color[part] = _shade(columns, atlas, x[part], y[part], spacing[part])
    sky = torch.nonzero(quad < 0)[:, 0]
    rays = camera.R_world_from_cam @ np.diag([1, 1 / camera.focal_px, 1 / camera.focal_px])
    forward, across, below = torch.from_numpy(rays.T.copy()).float()
    color[sky] = background(forward + x[sky, None] * across + y[sky, None] * below)
    image = np.empty((height * width, 3), np.float32)
    image[whole] = color[:count].numpy()
    image[~whole] = color[count:].view(-1, 4, 3).mean(1).numpy()
    return image.reshape(height, width, 3)


def _shading_table(quads: list[Quad], forms: np.ndarray, atlas: Atlas, light: Light):
    """(24, Q) float32: all that shading a point needs to know of its quad."""
    texture = np.array([q.texture for q in quads])
    repeat = np.array([q.repeat for q in quads])
    texels = atlas.levels[:, 0, :2].numpy()[texture] * repeat
    c0, c1, c2, c3 = light.corners.T
    bilinear = np.stack([c0, c1 - c0, c2 - c0, c0 - c1 - c2 + c3], axis=1)
    parts = (
        forms.reshape(-1, 9),
        texture[:, None],
        repeat,
        texels,
        bilinear,
        light.color,
        light.glow,
    )
    return torch.from_numpy(np.concatenate(parts, 1).T.copy()).float()


def _shade(table: torch.Tensor, atlas: Atlas, x, y, spacing) -> torch.Tensor:
    """(P, 3) radiance at pixels x, y, `spacing` pixels apart, given their quads' columns."""
    z0, zx, zy, a0, ax, ay, b0, bx, by, texture, tile_u, tile_v, tu, tv, *rest = table
    depth = 1 / (z0 + zx * x + zy * y)
    a, b = (a0 + ax * x + ay * y) * depth, (b0 + bx * x + by * y) * depth
    # texels from one shaded point to the next: singular values of d(texel)/d(point)
    ux, uy = tu * (ax - a * zx), tu * (ay - a * zy)
    vx, vy = tv * (bx - b * zx), tv * (by - b * zy)
    square = ux * ux + uy * uy + vx * vx + vy * vy
    area = (ux * vy - uy * vx).abs()
    major = ((square + (square * square - 4 * area * area).clamp(min=0).sqrt()) / 2).sqrt()
    footprint = torch.maximum(area / major, major / ANISOTROPY) * depth * spacing
    level = torch.log2(footprint.clamp(min=1))
    a, b = a.clamp(0, 1 - 1e-6), b.clamp(0, 1 - 1e-6)
    u, v = a * tile_u, b * tile_v
    texel = _texels_at(atlas, texture, u - u.floor(), v - v.floor(), level)
    l0, la, lb, lab = rest[:4]
    shine = (l0 + la * a + (lb + lab * a) * b) * torch.stack(rest[4:7])
    return texel[:, :3] * shine.T + texel[:, 3:] * torch.stack(rest[7:]).T


def rotation(yaw_deg: float, pitch_deg: float, roll_deg: float) -> np.ndarray:
    """R_world_from_cam: turn right by yaw, then up by pitch, then clockwise by roll (degrees)."""
    angles = np.radians([yaw_deg, pitch_deg, roll_deg])
    (cy, cp, cr), (sy, sp, sr) = np.cos(angles), np.sin(angles)
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    roll = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return yaw @ pitch @ roll


def develop(radiance: np.ndarray) -> Image.Image:
    """A picture (h, w, 3), 8 bits, of linear radiance; bright parts are compressed."""
    shown = np.sqrt(np.clip(radiance / (1 + 0.2 * radiance), 0, 1))
    return Image.fromarray((shown * 255 + 0.5).astype(np.uint8))
