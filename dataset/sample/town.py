"""The town: streets of houses, photographed for the index and on other days as queries."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.sample import paint
from dataset.sample.paint import Rng
from dataset.sample.render import (
    Atlas,
    Camera,
    Light,
    Quad,
    Scene,
    develop,
    normals,
    render,
    rotation,
)

SPLITS = ("train", "val", "test")
POS_DIST_THR_M = 25.0
STREETS_PER_ROW, STREET_SPACING_M = 3, 300.0  # other streets are negatives
STREET_M = (-26.0, 54.0)  # where a street begins and ends; its first index panorama is at 0
PITCHES_DEG, FIELD_OF_VIEW_DEG = (4.0, 26.0), 80.0
AUTO_EXPOSURE, AUTO_WHITE = 0.95, 0.8  # share of brightness and tint that a camera makes up for
ORIGIN_M = {"train": (585000, 4477000), "val": (588000, 4477000), "test": (585000, 4480000)}


@dataclass(frozen=True)
class Panorama:
    """What is seen at one moment from one place of a street, cut into views."""

    name: str  # of its views' files, up to the number of the view
    street: int
    is_query: bool
    position_m: tuple[float, float, float]  # along and across the street, down
    utm_m: tuple[float, float]
    views_deg: tuple[tuple[float, float], ...]  # yaw, pitch

    def files(self) -> list[str]:
        """The views as the lists name them."""
        return [f"dataset/{self.name}_{view:02d}.jpg" for view in range(len(self.views_deg))]


def plan_town(split: str, streets: int, queries: int, index: int, yaws: int, seed: int):
    """The panoramas of a split as Pittsburgh 30k has them: `queries` and `index` in each street.

    The index's follow each other at 8 to 12 m, cut into `yaws` directions x two pitches; a query's
    stand anywhere between them, cut at one pitch. Views of a panorama share its position. The last
    one of the first training street is 14 to 18 m from any index image: it has some within
    POS_DIST_THR_M, but none within the 10 m where training looks for positives.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    panoramas = []
    for street in range(streets):
        row, column = divmod(street, STREETS_PER_ROW)
        corner = np.array(ORIGIN_M[split]) + STREET_SPACING_M * np.array([column, row])
        along = np.concatenate([[0], np.cumsum(rng.uniform(8, 12, index - 1))])
        between = rng.uniform(-3, along[-1] + 3, queries)
        if split == "train" and street == 0:
            between[-1] = along[-1] + rng.uniform(14, 18)
        for is_query, places in ((False, along), (True, between)):
            for number, x in enumerate(places, street * len(places)):
                y, z = rng.uniform(-1.5, 1.5), -rng.uniform(2.2, 2.6)
                heading = rng.uniform(-15, 15) if is_query else rng.uniform(-3, 3)
                pitches = rng.choice(PITCHES_DEG, 1) if is_query else PITCHES_DEG
                turns = heading + np.arange(yaws) * 360 / yaws
                views = tuple((yaw, pitch) for yaw in turns for pitch in pitches)
                name = f"{'query' if is_query else 'index'}/{split}_{number:03d}"
                utm = tuple(corner + [x, y])
                panoramas.append(Panorama(name, street, is_query, (x, y, z), utm, views))
    return panoramas


@dataclass
class Street:
    """A street's scene, its width, and the textures of vans that may park in it."""

    scene: Scene
    atlas: Atlas
    width_m: float
    vans: list[int]


def build_street(rng: Rng) -> Street:
    """A street along x: houses on both sides and across both ends."""
    scene, width = Scene(), rng.uniform(15, 19)
    first, last = STREET_M
    road = scene.paint(paint.street(rng, last - first, width))
    scene.flat((first, last), (-width / 2, width / 2), 0, road)
    brick = paint.blocks(rng, 130, 128, 10, 4, paint.hsv(0.04, 0.3, 0.45), 0.5, 0.1)
    party_wall = scene.paint(brick)
    for side in (-1, 1):
        x, y = first, side * width / 2
        while x < last:
            w = min(rng.uniform(6, 11.5), last - x)
            w = last - x if last - x - w < 4 else w
            left, right = (x, x + w)[::-side]
            h = _house(scene, rng, (left, y), (right, y))
            for at, near, far in ((left, y + side * 5, y), (right, y, y + side * 5)):
                scene.wall((at, near), (at, far), -h, 0, party_wall, (3, 3))
            x += w
    for x, end in ((first, width / 2), (last, -width / 2)):
        _house(scene, rng, (x, end), (x, -end))
    vans = [scene.paint(paint.van(rng)) for _ in range(4)]
    return Street(scene, scene.atlas(), width, vans)


def _house(scene: Scene, rng: Rng, left, right) -> float:
    """Put the front of a house between two ground points; its height in meters."""
    front = paint.facade(rng, math.dist(left, right))
    height = len(front) / paint.TOWN_PX_PER_M
    scene.wall(left, right, -height, 0, scene.paint(front))
    return height


@dataclass(frozen=True)
class Day:
    """The light of one day (linear RGB), where its sun stands, and what the camera makes of it."""

    sun: np.ndarray
    to_sun: np.ndarray
    ambient: np.ndarray
    sky: np.ndarray  # (2, 3): at the horizon, above
    shade: float  # brightness at the foot of the houses
    lit_windows: float
    exposure: np.ndarray
    grain: float


SKIES = {  # sun, light from all around, horizon, zenith (linear RGB), share of lit windows
    "day": ((1.3, 1.24, 1.12), (0.6, 0.63, 0.7), (0.75, 0.82, 0.9), (0.35, 0.5, 0.8), 0.0),
    "overcast": ((0.1, 0.1, 0.1), (0.8, 0.82, 0.85), (0.74, 0.76, 0.8), (0.6, 0.63, 0.7), 0.05),
    "evening": ((0.8, 0.6, 0.4), (0.6, 0.6, 0.66), (0.85, 0.7, 0.55), (0.35, 0.44, 0.65), 0.1),
    "night": (
        (0.0, 0.0, 0.0),
        (0.07, 0.055, 0.04),
        (0.02, 0.018, 0.02),
        (0.004, 0.005, 0.01),
        0.25,
    ),
    "dusk": ((0.0, 0.0, 0.0), (0.26, 0.3, 0.42), (0.42, 0.36, 0.42), (0.12, 0.16, 0.3), 0.25),
}


# Of the index and of queries: azimuth and height of the sun (radians), shade, grain.
INDEX_DAY = ((-2.4, -1.8), (0.8, 1.0), (0.8, 0.8), (0.006, 0.006))
QUERY_DAY = ((0.5, 2.6), (0.2, 0.45), (0.4, 0.8), (0.008, 0.025))


def draw_day(rng: Rng, is_query: bool, by_night: bool = False) -> Day:
    """Index: bright forenoons. Queries: overcast, low evening sun, or dusk; another camera.

    By night lamps light the foot of the houses, and the camera cannot make up for the dark.
    """
    kind = rng.choice(["overcast", "evening", "dusk"]) if is_query else "day"
    ranges = QUERY_DAY if is_query else INDEX_DAY
    azimuth, height, shade, grain = (rng.uniform(*ends) for ends in ranges)
    stops, warm = rng.normal(0, [0.2, 0.08] if is_query else [0.08, 0.02])
    if by_night:
        kind, shade, grain = "night", rng.uniform(3, 6), rng.uniform(0.04, 0.1)
        stops, warm = rng.uniform(-3, -1.5), rng.uniform(0, 0.2)
    sun, ambient, *sky = (np.array(color) for color in SKIES[kind][:4])
    across = math.cos(height)
    to_sun = np.array([math.cos(azimuth) * across, math.sin(azimuth) * across, -math.sin(height)])
    exposure = (2**stops * np.array([1 + warm, 1, 1 - warm])).astype(np.float32)
    return Day(sun, to_sun, ambient, np.stack(sky), shade, SKIES[kind][4], exposure, grain)


def light_street(quads: list[Quad], day: Day, rng: Rng) -> Light:
    """Sun and sky on every quad; windows mirror the sky or, some at dusk, are lit."""
    normal = normals(quads)
    open_sky = 1 - 0.25 * np.abs(normal[:, 1:2])
    facing = np.clip(normal @ day.to_sun, 0, None)[:, None]
    upright = np.abs(normal[:, 2:]) < 0.1
    corners = np.where(upright, [1, 1, day.shade, day.shade], [0.95] * 4)
    lit = rng.random((len(quads), 1)) < day.lit_windows
    glow = np.where(lit, (1.0, 0.7, 0.35), 0.45 * day.sky[0])
    return Light(corners, open_sky * day.ambient + facing * day.sun, glow)


@dataclass(frozen=True)
class Shot:
    """A camera: its horizontal field of view, and how far it is turned clockwise."""

    field_of_view_deg: float = FIELD_OF_VIEW_DEG
    roll_deg: float = 0.0


def photograph(
    street: Street,
    panorama: Panorama,
    size_px,
    rng: Rng,
    by_night: bool = False,
    day: Day | None = None,
    shot: Shot = Shot(),
) -> Iterator[Image.Image]:
    """The views of a panorama, under the light of its day, or night, and with its parked vans."""
    day, vans = day or draw_day(rng, panorama.is_query, by_night), Scene()
    for side in (-1, 1):
        kerb = side * (street.width_m / 2 - 3.4)
        for x in panorama.position_m[0] + np.array([-18, -12, -6, 6, 12, 18]) + rng.uniform(-1, 1):
            if rng.random() < (0.3 if panorama.is_query else 0.2):
                y, z = (kerb - 0.9, kerb + 0.9), (-rng.uniform(1.5, 2.2), 0)
                vans.block((x - 2, x + 2), y, z, int(rng.choice(street.vans)))
    quads = street.scene.quads + vans.quads
    light = light_street(quads, day, rng)
    horizon, zenith = torch.from_numpy(day.sky).float()

    def sky(ray: torch.Tensor) -> torch.Tensor:
        up = (-ray[:, 2:] / ray.norm(dim=1, keepdim=True)).clamp(0, 1)
        return horizon + (zenith - horizon) * up**0.6

    width, height = size_px
    focal = width / 2 / math.tan(math.radians(shot.field_of_view_deg / 2))
    center, position = ((width - 1) / 2, (height - 1) / 2), np.array(panorama.position_m)
    for yaw, pitch in panorama.views_deg:
        camera = Camera(width, height, focal, center, rotation(yaw, pitch, shot.roll_deg), position)
        seen = render(quads, street.atlas, camera, light, sky)
        mean = seen.mean((0, 1))
        balance = (0.3 / mean.mean()) ** AUTO_EXPOSURE * (mean.mean() / mean) ** AUTO_WHITE
        seen *= (day.exposure * balance).astype(np.float32)
        seen *= 1 + day.grain * rng.standard_normal(seen.shape[:2], dtype=np.float32)[..., None]
        yield develop(seen)


def render_street(root: Path, panoramas: list[Panorama], size_px, seed: list[int], tick) -> None:
    """Render every view of one street into `root`."""
    street = build_street(np.random.default_rng([*seed, 2]))
    for number, panorama in enumerate(panoramas):
        views = photograph(street, panorama, size_px, np.random.default_rng([*seed, 3, number]))
        for picture, file in zip(views, panorama.files()):
            picture.save(root / file.removeprefix("dataset/"), quality=88)
            tick()
