"""Two more built-in towns in the layout of GSV-Cities (dataset/gsv_cities.py), to train on.

    <rendered sample>/gsv_cities/{Dataframes/<City>.csv,Images/<City>/*.jpg}

A place is what is seen in one direction from one spot, photographed on several days from a little
beside. As in GSV-Cities places are far apart, each in a street of its own: another direction from
the same spot would be a negative that looks alike. Directions are those of the sample's panoramas:
were each place seen in one of its own, that would tell places apart, as it does not among the
streets of the other data sets, none of which is here.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import SAMPLE
from dataset.gsv_cities import COLUMNS, image_name
from dataset.sample import Size, is_rendered, render_sample
from dataset.sample.town import PITCHES_DEG, STREET_SPACING_M, Panorama, build_street, photograph
from model import progress, usable_cores

FOLDER = "gsv_cities"  # in the rendered sample
CITIES = ("Aville", "Beton")
ORIGIN_DEG = (40.44, -79.99)  # latitude, longitude
DEGREES_A_M = (1 / 111_320, 1 / 84_730)
# How far photographs of a place are from its spot, along and across the street, and from its
# direction: as the sample's queries are from its index.
ASIDE_M, ASIDE_DEG = (5.0, 1.5), 15.0
QUERY_DAYS = 0.6  # share of photographs taken on days like those of the sample's queries


@dataclass(frozen=True)
class GsvSize:
    """Streets of a city, each a place, photographs of a place, their pixels."""

    streets: int = 60
    photographs: int = 6
    size_px: tuple[int, int] = (320, 240)


FULL = GsvSize()


def locate_gsv_cities() -> Path:
    """The folder of the two cities, rendered on first use, said in a line."""
    folder = SAMPLE / FOLDER
    if not is_rendered(SAMPLE):
        print(f"The built-in SAMPLE is rendered to {SAMPLE} now, about a minute.")
        render_sample(SAMPLE)
    if not folder.is_dir():
        print(f"Its two cities to train on are rendered to {folder} now, about a minute.")
        seed = json.loads((SAMPLE / "sample.json").read_text())["seed"]
        render_gsv_cities(folder, seed)
    return folder


def render_gsv_cities(folder: Path, seed: int = 0, size: GsvSize = FULL) -> None:
    """Render CITIES into `folder`, whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
    total = len(CITIES) * size.streets * size.photographs
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        (partial / "Dataframes").mkdir()
        with progress(total=total, desc="rendering cities", unit="image") as bar:
            for number, city in enumerate(CITIES):
                (partial / "Images" / city).mkdir(parents=True)
                jobs = [
                    pool.submit(_render_street, partial, number, street, seed, size, bar.update)
                    for street in range(size.streets)
                ]
                table = partial / "Dataframes" / f"{city}.csv"
                with open(table, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(row for job in jobs for row in job.result())
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        shutil.rmtree(partial, ignore_errors=True)


def _render_street(
    folder: Path, city: int, number: int, seed: int, size: GsvSize, tick: Callable[[], object]
) -> list[dict]:
    """Render one place; its rows of the csv."""
    rng = np.random.default_rng([seed, 7, city, number])
    street = build_street(np.random.default_rng([seed, 8, city, number]))
    spot, heading, rows = rng.uniform(0, 24), 360 / Size.yaws * rng.integers(Size.yaws), []
    for day in range(size.photographs):
        x, y = (spot, 0) + np.multiply(ASIDE_M, rng.uniform(-1, 1, 2))
        yaw = heading + rng.uniform(-ASIDE_DEG, ASIDE_DEG)
        utm = (x + STREET_SPACING_M * number, y)
        position = (x, y, -rng.uniform(2.2, 2.6))
        view, is_query = (yaw, rng.uniform(*PITCHES_DEG)), bool(rng.random() < QUERY_DAYS)
        panorama = Panorama("", number, is_query, position, utm, (view,))
        (picture,) = photograph(street, panorama, size.size_px, rng)
        lat, lon = (o + m * d for o, m, d in zip(ORIGIN_DEG, utm[::-1], DEGREES_A_M))
        row = {
            "place_id": str(number),
            "year": str(2010 + day),
            "month": str(rng.integers(1, 13)),
            "northdeg": str(round(yaw) % 360),
            "city_id": CITIES[city],
            "lat": f"{lat:.6f}",
            "lon": f"{lon + city:.6f}",
            "panoid": f"{city}{number:02d}{day}",
        }
        name, _ = image_name(row, folder, day)
        picture.save(folder / "Images" / CITIES[city] / name, quality=88)
        rows.append(row)
        tick()
    return rows
