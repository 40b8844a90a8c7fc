"""Towns in CosPlace's layout: classes of many days to train on, other streets to be found in.

    rendered_places/sf_xs/{train,val/{database,queries},test/{database,queries}}, tokyo_xs/test/…

Training and val are photographed from a car, at all times of the day; the queries of both tests are a
phone's, from the pavement, in tokyo_xs partly by night. Names give the heading, degrees from north.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dataset import SAMPLE
from dataset.sample import is_made, run_jobs, settings, write_rendering
from dataset.sample.town import Panorama, Shot, build_street, draw_day, photograph
from model import progress, usable_cores

PLACES = SAMPLE.with_name("rendered_places")
CELLS_M, CELL_M = (0, 20), 10  # where the classes of a street lie along it
HEADINGS_DEG, TURN_DEG = (15, 105, 195, 285), 12  # of classes; a view is at most so much beside
DATABASE_M, QUERIES_M = (0, 10, 20, 30), (-4.0, 34.0)
STREETS_A_ROW, STREET_SPACING_M = 4, 300
CAR, PHONE = 256, (240, 320)  # pixels


@dataclass(frozen=True)
class Part:
    """A folder of towns: its streets, where it lies, how its queries are taken, its UTM zone."""

    folder: str
    origin_m: tuple[int, int]
    queries: str = "car"
    zone: str = "10@S"


PARTS = (
    Part("sf_xs/train", (540000, 4170000)),
    Part("sf_xs/val", (545000, 4170000)),
    Part("sf_xs/test", (540000, 4175000), "phone"),
    Part("tokyo_xs/test", (385000, 3950000), "phone by night", "54@S"),
)


@dataclass(frozen=True)
class PlacesSize:
    """Streets of each of PARTS, images of a class, queries of a street; pixels a side of the car's."""

    streets: tuple[int, int, int, int] = (12, 16, 12, 10)
    images: int = 12
    queries: int = 8
    px: int = CAR


FULL = PlacesSize()
TINY = PlacesSize((2, 1, 1, 1), 3, 2, 64)


def locate_places() -> Path:
    """The folder that holds sf_xs and tokyo_xs, rendered on first use, said in a line."""
    if not is_made(PLACES, _made(0, FULL)):
        print(f"The towns sf_xs and tokyo_xs are rendered to {PLACES} now, about two minutes.")
        render_places(PLACES)
    return PLACES


def render_places(root: Path, seed: int = 0, workers: int = 0, size: PlacesSize = FULL) -> None:
    """Render sf_xs and tokyo_xs into `root`, replacing older ones, whole or not at all."""

    def fill(partial: Path) -> None:
        bar = progress(unit="image", desc="rendering towns", total=0)
        jobs = []
        for number, (part, streets) in enumerate(zip(PARTS, size.streets)):
            for street in range(streets):
                key = [seed, 100 + number, street]
                views = list(plan_street(part, street, size, np.random.default_rng([*key, 1])))
                bar.total += len(views)
                jobs.append((_render, partial, views, key))
        run_jobs(jobs, workers or usable_cores(), bar)

    write_rendering(root, _made(seed, size), fill)


def _made(seed: int, size: PlacesSize) -> dict:
    return {**settings(seed, None), "size": json.loads(json.dumps(asdict(size)))}


@dataclass(frozen=True)
class View:
    """One photograph: its file below the root, where it is taken from, by what, by night or not."""

    file: str
    panorama: Panorama
    shot: Shot
    px: tuple[int, int]
    quality: int
    by_night: bool


def plan_street(
    part: Part, street: int, size: PlacesSize, rng: np.random.Generator
) -> Iterator[View]:
    """The photographs of a street: of its classes, or of its database and queries."""
    if part.folder.endswith("train"):
        for cell in CELLS_M:
            for heading in HEADINGS_DEG:
                for _ in range(size.images):
                    x = cell + rng.uniform(0.5, CELL_M - 0.5)
                    yield _view(part, street, size, "", (x, heading), "car", rng)
        return
    for x in DATABASE_M:
        for heading in HEADINGS_DEG:
            at = (x + rng.uniform(-2, 2), heading)
            yield _view(part, street, size, "/database", at, "car", rng)
    for number in range(size.queries):
        at = (rng.uniform(*QUERIES_M), int(rng.choice(HEADINGS_DEG)))
        by_night = part.queries.endswith("night") and number % 2 == 0
        how = "night" if by_night else part.queries.split()[0]
        yield _view(part, street, size, "/queries", at, how, rng)


def _view(
    part: Part,
    street: int,
    size: PlacesSize,
    kind: str,
    at: tuple[float, int],
    how: str,
    rng: np.random.Generator,
) -> View:
    """A photograph at (x, heading) by how: car, phone or night."""
    x, heading = at[0], at[1] + rng.uniform(-TURN_DEG, TURN_DEG)
    row, column = divmod(street, STREETS_A_ROW)
    if how == "car":
        y, z = rng.uniform(-1.5, 1.5), -rng.uniform(2.2, 2.6)
        px, quality = (size.px, size.px), 88
        shot, pitch = Shot(), rng.uniform(3, 12)
    else:
        y, z = rng.choice([-1, 1]) * rng.uniform(2.5, 4.5), -rng.uniform(1.5, 1.75)
        px = tuple(round(side * size.px / CAR) for side in PHONE)
        px, quality = (px if rng.random() < 0.6 else px[::-1]), 70
        shot = Shot(field_of_view_deg=rng.uniform(60, 75), roll_deg=rng.uniform(-5, 5))
        pitch = rng.uniform(2, 16)
    east = part.origin_m[0] + STREET_SPACING_M * column + x
    north = part.origin_m[1] + STREET_SPACING_M * row + CELL_M / 2 + y
    note = "night" if how == "night" else ""
    pano = f"s{street:02d}_{rng.integers(10**6):06d}"
    name = (
        f"@{east:010.2f}@{north:010.2f}@{part.zone}@@@{pano}@@{heading % 360:03.0f}@@@@@{note}@.jpg"
    )
    yaw = 90 - heading  # the sample's yaw turns from east to north
    is_query = how != "car" or rng.random() < 0.6  # dull days and evenings
    panorama = Panorama(pano, street, is_query, (x, y, z), (east, north), ((yaw, pitch),))
    return View(f"{part.folder}{kind}/{name}", panorama, shot, px, quality, how == "night")


def _render(root: Path, views: list[View], key: list[int], tick) -> None:
    street = build_street(np.random.default_rng([*key, 2]))
    for number, view in enumerate(views):
        rng = np.random.default_rng([*key, 3, number])
        day = draw_day(rng, view.panorama.is_query, view.by_night)
        (picture,) = photograph(street, view.panorama, view.px, rng, day=day, shot=view.shot)
        file = root / view.file
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=view.quality)
        tick()
