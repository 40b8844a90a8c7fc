"""Data sets in folders of images whose names tell their position (VPR-datasets-downloader's format).

    <name>/images/{train,val,test}/{database,queries}/**/@utm_east@utm_north@…@.jpg

The name has up to 15 fields between its "@": 1 east and 2 north (UTM, meters), 3 zone number, 4 zone
letter, 5 latitude, 6 longitude, 7 panorama, 8 tile, 9 heading (degrees), 10 pitch, 11 roll,
12 height, 13 time, 14 note. Only the first two must be filled. Raises InputError with one sentence
for what is wrong.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from dataset.text import read_lines
from eval import IMAGE_SUFFIXES, load_image, positives_within
from model import InputError, warn

SPLITS = ("train", "val", "test")
INDEX_FOLDERS = ("database",)
QUERY_FOLDERS = ("queries", "queries_v1", "queries_v2")
PLACES = (Path("../datasets_vg/datasets"), Path("dataset"))  # where data sets are looked for
LOCAL_M = 1e4  # positions all below this are of a local system, and may be small numbers
OF_A_TOWN_DEG = 1.0  # positions in degrees of one data set differ by less, those in meters by more
ZONE_APART_M = 1e8  # positions of different UTM zones are this far from each other


@dataclass(frozen=True)
class Label:
    """What a file name says: position (east, north) in meters; None where it says nothing.

    zone: number and hemisphere. heading_deg in [0, 360).
    """

    utm: tuple[float, float]
    zone: tuple[int, bool] | None
    heading_deg: float | None
    note: str


def parse_name(path: Path) -> Label:
    """The label in a file's base name. InputError if it has no position."""
    fields = path.name.split("@")
    if len(fields) < 4 or fields[0]:
        raise InputError(
            f"the image {path} has no position in its name: name it @utm_east@utm_north@{path.suffix} "
            "(meters)."
        )
    fields += [""] * (16 - len(fields))
    east, north = _number(fields[1], path, "UTM east"), _number(fields[2], path, "UTM north")
    heading = _number(fields[9], path, "heading") % 360 if fields[9].strip() else None
    number, letter = fields[3].strip(), fields[4].strip().upper()
    zone = (int(number), not letter or letter >= "N") if number.isdecimal() else None
    return Label((east, north), zone, heading, fields[14])


def _number(text: str, path: Path, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"the image {path} has {text!r} for its {what}: write a number there.")
    return value


class FolderImages(Dataset):
    """Named images in a folder and below, sorted: item (image, index, path).

    A file <folder>_images_paths.txt, a relative path a line, says which: large sets take long to look through.
    utm: (n, 2) meters, images of different zones far apart. transform: of an RGB image.
    at_least: pixels a side below which `transform` shrinks the image.
    Raises InputError for names without a position, or with one in degrees.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        transform: Callable | None = None,
        at_least: int | None = None,
    ) -> None:
        self.transform, self.at_least = transform, at_least
        found = [path for folder in folders for path in _files_in(folder)]
        self.paths = sorted(
            path
            for path in found
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        labels = [parse_name(path) for path in self.paths]
        self.zones = [label.zone for label in labels]
        self.headings_deg = [label.heading_deg for label in labels]
        self.notes = [label.note for label in labels]
        self.utm = np.array([label.utm for label in labels], dtype=np.float64).reshape(-1, 2)
        largest = np.abs(self.utm).max(axis=1, initial=0)
        small = largest <= 180
        if small.any() and (largest[~small] > LOCAL_M).all():
            first = self.paths[int(small.argmax())].name
            said = f"{small.sum()} names in {folders[0]} seem to give degrees (first: {first})"
            if not small.all() or np.ptp(self.utm, axis=0).max() < OF_A_TOWN_DEG:
                mend = "write UTM east and north, in meters, into the first two fields."
                raise InputError(f"{said}: {mend}")
            warn(f"{said}: they are taken for meters of a local system.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        image = load_image(self.paths[i], self.at_least)
        return self.transform(image) if self.transform else image, i, str(self.paths[i])


def _walk(folder: Path) -> Iterator[Path]:
    """Files in a folder and below, linked folders too, each folder once: links may lead around in circles."""
    seen = set()
    for place, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def _files_in(folder: Path) -> Iterable[Path]:
    """Files in a folder and below, or those that <folder>_images_paths.txt lists."""
    listed = folder.absolute().with_name(f"{folder.absolute().name}_images_paths.txt")
    if not listed.is_file():
        return _walk(folder)
    paths = [folder / line.strip() for line in read_lines(listed, "the list") if line.strip()]
    if paths and not paths[0].is_file():
        raise InputError(
            f"{listed} lists {paths[0]}, which is not there: write it anew, or remove it, and the "
            "folder itself is looked through."
        )
    print(f"{folder}: the {len(paths)} images that {listed.name} lists.")
    return paths


def same_size(paths: Sequence[Path]) -> bool:
    """Whether the files say that all images have one width and height, and none is turned."""
    sizes = set()
    for path in paths:
        try:
            with Image.open(path) as file:
                sizes.add((*file.size, file.getexif().get(ExifTags.Base.Orientation, 1)))
        except Exception:  # noqa: BLE001, whoever reads the image says what is wrong with it
            return False
    return len(sizes) == 1


@dataclass
class FolderSplit:
    """The split in `folder`: queries and index images; what is a positive: at most `threshold` m away.

    positives: for each query the rows of its positives, empty where there are none.
    """

    queries: FolderImages
    index: FolderImages
    threshold: float
    folder: Path
    positives: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.positives = true_positives(self.utm_query, self.utm_index, self.threshold)

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def utm_query(self) -> np.ndarray:
        """Positions (nq, 2) of the queries, in meters."""
        return self.queries.utm

    @property
    def utm_index(self) -> np.ndarray:
        """Positions (nd, 2) of the index images, in meters."""
        return self.index.utm

    @property
    def without_positives(self) -> int:
        """How many queries cannot be answered: each counts as a miss."""
        return sum(not len(rows) for rows in self.positives)


def true_positives(
    utm_query: np.ndarray, utm_index: np.ndarray, threshold: float
) -> list[np.ndarray]:
    """For each query the rows at most `threshold` meters away, none where there is none."""
    found = positives_within(utm_query, utm_index, threshold)
    distance = [np.hypot(*(utm_index[rows[0]] - query)) for rows, query in zip(found, utm_query)]
    return [rows if d <= threshold else rows[:0] for rows, d in zip(found, distance)]


def read_split(
    folder: Path,
    threshold: float,
    transform: Callable | None = None,
    at_least: int | None = None,
) -> FolderSplit:
    """The split in `folder`, which holds database/ and queries/.

    Positions in different UTM zones are moved apart, so that they are never positives, with a warning.
    Raises InputError for a split without queries or without index images.
    """
    images = []
    for names, what in ((QUERY_FOLDERS, "queries"), (INDEX_FOLDERS, "database")):
        there = [folder / name for name in names if (folder / name).is_dir()]
        if not there:
            raise InputError(f"{folder} has no folder {what}/: put the split's {what} there.")
        if len(there) > 1:
            names = " and ".join(part.name for part in there)
            warn(f"{folder} has {names}: they are taken together, move one away to test the other.")
        images.append(FolderImages(there, transform, at_least))
        if not len(images[-1]):
            raise InputError(f"{there[0]} holds no image ({' '.join(IMAGE_SUFFIXES)}): unpack it.")
    zones = sorted({zone for part in images for zone in part.zones if zone})
    if len(zones) > 1:
        names = ", ".join(f"{number} {'north' if north else 'south'}" for number, north in zones)
        warn(f"{folder} spans the UTM zones {names}: images of different zones count as far apart.")
        for part in images:
            part.utm[:, 0] += [ZONE_APART_M * zones.index(z) if z else 0.0 for z in part.zones]
    return FolderSplit(*images, threshold, folder)


def find_data_set(datasets_folder: Path | None, name: str) -> Path | None:
    """The folder <name>/images; None if it is nowhere.

    datasets_folder: where data sets lie, else $DATASETS_FOLDER, else PLACES. InputError if one of the
    first two is given but does not hold the data set.
    """
    variable = os.environ.get("DATASETS_FOLDER")
    given = datasets_folder or (Path(variable) if variable else None)
    for place in [given] if given else PLACES:
        if (place / name / "images").is_dir():
            return place / name / "images"
    if given is None:
        return None
    flag = "--datasets_folder" if datasets_folder else "$DATASETS_FOLDER"
    there = sorted(p.parent.name for p in given.glob("*/images"))
    known = f"it has {', '.join(there)}" if there else "it has no data set at all"
    raise InputError(f"{flag} {given} has no {name}/images/: {known}.")
