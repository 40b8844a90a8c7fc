"""GSV-Cities (Ali-bey et al. 2022): a csv and a folder of images for each city.

    <folder>/Dataframes/<City>.csv     place_id,year,month,northdeg,city_id,lat,lon,panoid
    <folder>/Images/<City>/<city_id>_<place_id>_<year>_<month>_<northdeg>_<lat>_<lon>_<panoid>.jpg

In the names place_id (modulo 100000) has 7 digits, year 4, month 2, northdeg 3; latitude and longitude
are as in the csv. Raises InputError with one sentence for what is wrong.
"""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from eval import load_image
from model import InputError, progress

COLUMNS = ("place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid")
NAMES = ("gsv_cities", "GSV-Cities", "gsv-cities", "GSVCities", "GSV_Cities")  # of the folder
PLACES_A_CITY = 100_000


class GsvCities(Dataset):
    """The images of places with at least `fewest` of them: item (image, index, path).

    place: (n,) number of each image's place; city_of: (places,) the number of each place's city, in
    the order of `cities`. dropped: places with fewer images. transform: of an RGB image.
    at_least: pixels a side below which `transform` shrinks the image.
    """

    def __init__(
        self,
        folder: Path,
        fewest: int,
        transform: Callable | None = None,
        at_least: int | None = None,
    ) -> None:
        self.folder, self.transform, self.at_least = folder, transform, at_least
        tables = sorted((folder / "Dataframes").glob("*.csv"))
        if not tables:
            raise InputError(
                f"{folder} has no Dataframes/*.csv: name GSV-Cities' folder, which holds Dataframes/ "
                "and Images/, with --gsv_cities_folder."
            )
        self.cities = [table.stem for table in tables]
        self.names: list[str] = []
        place_ids, city_of = [], []
        for number, table in enumerate(progress(tables, desc="GSV-Cities", unit="city")):
            names, places = read_city(table, folder / "Images" / table.stem)
            self.names += [f"{table.stem}/{name}" for name in names]
            place_ids += [places]
            city_of += [np.full(len(places), number)]
        cities = np.concatenate(city_of)
        _, first, self.place, counts = np.unique(
            np.concatenate(place_ids) + PLACES_A_CITY * cities,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        self._keep(counts >= fewest, cities[first])
        if not len(self.city_of):
            raise InputError(
                f"none of the {self.dropped} places in {folder} has {fewest} images, the most has "
                f"{counts.max(initial=0)}: lower --images_per_place."
            )

    def _keep(self, chosen: np.ndarray, city_of: np.ndarray) -> None:
        """Keep the chosen places, numbered anew, and their images."""
        numbers = np.cumsum(chosen) - 1
        images = np.flatnonzero(chosen[self.place])
        self.names = [self.names[i] for i in images]
        self.place = numbers[self.place[images]]
        self.city_of = city_of[chosen]
        self.dropped = int((~chosen).sum())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple:
        image = load_image(self.path(i), self.at_least)
        return self.transform(image) if self.transform else image, i, str(self.path(i))

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.folder / "Images" / self.names[i]


def read_city(table: Path, folder: Path) -> tuple[list[str], np.ndarray]:
    """File names and place ids (n,) of a city's csv. InputError for what it lacks, or images that do."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if absent:
                raise InputError(
                    f"{table} has no column {absent[0]}: its first line must name "
                    f"{', '.join(COLUMNS)}."
                )
            found = [image_name(row, table, rows.line_num) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} cannot be read ({error}): unpack it again.") from None
    if not found:
        raise InputError(f"{table} lists no image: unpack it again, or remove it.")
    names, places = [name for name, _ in found], np.array([place for _, place in found])
    if not folder.is_dir():
        raise InputError(f"{table} has no images: there is no folder {folder}; unpack it there.")
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries}
    lacking = [name for name in names if name not in there]
    if lacking:
        raise InputError(
            f"{len(lacking)} of the {len(names)} images that {table} lists are not in {folder}, "
            f"first {lacking[0]}: unpack them, or remove the csv to go without the city."
        )
    return names, places


def image_name(row: dict, table: Path, line: int) -> tuple[str, int]:
    """The file of a row of a city's csv, and its place id."""
    try:
        place, year, month, north = (int(float(row[name])) for name in COLUMNS[:4])
        city, *rest = (row[name].strip() for name in COLUMNS[4:])
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(
            f"{table}, line {line}: {', '.join(COLUMNS[:4])} must be numbers and no field may lack."
        ) from None
    number = place % PLACES_A_CITY
    fields = [city, f"{number:07d}", f"{year:04d}", f"{month:02d}", f"{north:03d}", *rest]
    return "_".join(fields) + ".jpg", number


def find_gsv_cities(given: Path | None, places: Sequence[Path]) -> Path | None:
    """The folder of GSV-Cities: `given`, or one of NAMES in the first of `places` that has one.

    None if it is nowhere. InputError if `given` is no folder.
    """
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--gsv_cities_folder {given} is no folder: name GSV-Cities' folder.")
        return given
    candidates = (place / name for place in places for name in NAMES)
    return next((path for path in candidates if (path / "Dataframes").is_dir()), None)
