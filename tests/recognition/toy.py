"""A tiny data set of named images: places 100 m apart, each with a look of its own."""

from pathlib import Path

import numpy as np
from PIL import Image

EAST, NORTH = 584_000.0, 4_477_000.0
SIZE = (64, 48)  # width, height


def picture(place: int, view: int) -> Image.Image:
    """A view of a place: the same coarse pattern, shifted and disturbed."""
    pattern = np.random.default_rng([7, place]).uniform(0, 255, (6, 8, 3))
    rng = np.random.default_rng([8, place, view])
    image = Image.fromarray(pattern.astype(np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    pixels = np.roll(np.asarray(image, float), int(rng.integers(-3, 4)), 1) + rng.normal(
        0, 12, (48, 64, 3)
    )
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def name(east: float, north: float, **fields: str) -> str:
    """A file name with these fields: zone, letter, heading, note."""
    pieces = [""] * 15
    pieces[1:3] = f"{east:010.2f}", f"{north:010.2f}"
    for field, value in fields.items():
        pieces[{"zone": 3, "letter": 4, "pano": 7, "heading": 9, "note": 14}[field]] = value
    return "@".join(pieces) + "@.jpg"


def write_split(folder: Path, places: range, queries_each: int = 1, note: str = "") -> None:
    """database/ with 3 images a place, 0, 5 and 20 m along, and queries/ 2 m along."""
    for place in places:
        at = EAST + 100 * place
        shots = [("database", step, view) for view, step in enumerate((0, 5, 20))]
        shots += [("queries", 2 + i, 10 + i) for i in range(queries_each)]
        for kind, step, view in shots:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            labels = {"zone": "17", "letter": "T", "pano": f"{place}_{view}"}
            file = name(at, NORTH + step, note=note if kind == "queries" else "", **labels)
            picture(place, view).save(folder / kind / file, quality=95)


def write_data_set(folder: Path) -> Path:
    """A data set with train, val and test; -> its images/."""
    for split, places in (("train", range(8)), ("val", range(20, 26)), ("test", range(40, 45))):
        write_split(folder / "images" / split, places)
    return folder / "images"
