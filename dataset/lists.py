"""The assignment's data sets: lists of images, their true positions, and what is odd about both.

Raises InputError with one sentence for what is wrong.
"""

import glob
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import split_files
from dataset.text import read_lines
from dataset.truth import read_truth
from eval import IMAGE_SUFFIXES, load_image, positives_within, transform_to
from model import IMAGE_SIZE, InputError

# A path that ends like an image, and what may follow it: a label, the other columns of a CSV.
_ENDING = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_PATH = re.compile(rf"(.*(?:{_ENDING}))(?:$|[\s,;\"'])", re.IGNORECASE)
_COLUMN = re.compile(r"^[^\s,;/]+[\s,;]+")  # before the path
_UNTIL_DATASET = re.compile(r"^(?:.*/)?dataset/")


def read_list(
    list_file: Path | str, root_dir: Path | str, inside_first: bool = False
) -> tuple[list[Path], list[int]]:
    """The image paths of a list, one a line, and the rows of those that are not there.

    A line is tried as it stands, then under `root_dir`, then under it without its leading
    `dataset/`; `inside_first` tries the last first. Only where none of them is a file, backslashes
    count as slashes, all before `dataset/` and a column before the path are dropped, and capital
    letters and Unicode's two ways to write an accent count as equal. Lines that begin with `#`, a
    header above the paths and what follows an image's name are passed over. InputError for a missing
    or empty list.
    """
    disk = _Disk()
    lines = [line.strip() for line in read_lines(Path(list_file), "the list")]
    lines = [line for line in lines if line and not line.startswith("#")]
    names = [_PATH.match(line) for line in lines]
    if any(names) and not names[0] and not re.search(r"[/\\]", lines[0]):
        lines, names = lines[1:], names[1:]
    if not lines:
        raise InputError(f"the list {list_file} is empty: it must name one image a line.")
    root, paths, absent = str(root_dir), [], []
    for row, (line, name) in enumerate(zip(lines, names)):
        line = (name[1] if name else line).strip("\"'")
        inside = line.removeprefix("./").removeprefix("dataset/")
        tries = [("", line), (root, line), (root, inside)]
        found = disk.first(tries[-1:] * inside_first + tries)
        if found is None:
            line = line.replace("\\", "/")
            for part in (line, _COLUMN.sub("", line)):
                loose = [("", part), (root, part), (root, _UNTIL_DATASET.sub("", part))]
                found = found or disk.first_alike(loose[-1:] * inside_first + loose)
        if found is None:
            absent.append(row)
        paths.append(Path(os.path.join(root, inside) if found is None else found))
    return paths, absent


class _Disk:
    """What is in the folders; each is listed once, however many images are asked for."""

    def __init__(self) -> None:
        self.listed: dict[str, dict[str, bool]] = {}
        self.alike: dict[str, dict[str, list[str]]] = {}

    def entries(self, folder: str) -> dict[str, bool]:
        """Name -> is it a file, of all that is in a folder; nothing for what is no folder."""
        if folder not in self.listed:
            try:
                with os.scandir(folder or ".") as entries:
                    self.listed[folder] = {entry.name: entry.is_file() for entry in entries}
            except OSError:
                self.listed[folder] = {}
        return self.listed[folder]

    def first(self, tries: list[tuple[str, str]]) -> str | None:
        """The first file `line` below `base` among the (base, line)."""
        for base, line in tries:
            path = os.path.join(base, line)
            folder, name = os.path.split(path)
            if self.entries(folder).get(name):
                return path
        return None

    def first_alike(self, tries: list[tuple[str, str]]) -> str | None:
        """The same where the names below `base` need only look alike, and only one does."""
        for base, line in tries:
            folder, path = "", base
            for part in line.split("/"):
                if part not in ("", "."):
                    folder, name = path, self._as_on_disk(path, part)
                    path = os.path.join(folder, name)
            if path != base and self.entries(folder).get(name):
                return path
        return None

    def _as_on_disk(self, folder: str, name: str) -> str:
        entries = self.entries(folder)
        if name in entries or name == "..":
            return name
        if folder not in self.alike:
            self.alike[folder] = {}
            for entry in entries:
                self.alike[folder].setdefault(_loosely(entry), []).append(entry)
        alike = self.alike[folder].get(_loosely(name), ())
        return alike[0] if len(alike) == 1 else name


def _loosely(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class ImageListDataset(Dataset):
    """The images of a list file (see read_list for where they are): item (image, index, path).

    transform: applied to the RGB image; None leaves it a PIL image.
    at_least: pixels a side to which `transform` shrinks the image, so that more is not decoded.
    """

    def __init__(
        self,
        list_file: Path | str,
        root_dir: Path | str,
        transform: Callable | None = None,
        *,
        inside_first: bool = False,
        at_least: int | None = None,
    ) -> None:
        self.list_file = list_file
        self.paths, self.absent = read_list(list_file, root_dir, inside_first)
        self.transform = transform
        self.at_least = at_least

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        image = load_image(self.paths[i], self.at_least)
        return self.transform(image) if self.transform else image, i, str(self.paths[i])


class LoadDataset(Dataset):
    """Triplets: item i is (q, p, n) for the i-th query.

    p: a random index image closer than posDistThr, the nearest if there is none; n: a random one
    farther than 10 posDistThr, the farthest if there is none. Drawn anew at each access from
    torch's generator.
    Raises InputError when the lists and gt_npz differ in length.
    """

    def __init__(
        self,
        query_file: Path | str,
        db_file: Path | str,
        root_dir: Path | str,
        gt_npz: Path | str,
        transform: Callable | None = None,
        *,
        inside_first: bool = False,
        at_least: int | None = None,
    ) -> None:
        how = {"inside_first": inside_first, "at_least": at_least}
        self.queries = ImageListDataset(query_file, root_dir, transform, **how)
        self.index = ImageListDataset(db_file, root_dir, transform, **how)
        self.utm_query, self.utm_index, self.threshold = read_truth(gt_npz)
        for name, list_file, images, rows in (
            ("utmQ", query_file, self.queries, self.utm_query),
            ("utmDb", db_file, self.index, self.utm_index),
        ):
            if len(images) != len(rows):
                raise InputError(
                    f"{list_file} has {len(images)} images but {name} in {gt_npz} has {len(rows)} "
                    "rows: row i is the place of image i, so take both from the same archive, with "
                    "one image a line and nothing else."
                )

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, i: int) -> tuple:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        p, (n,) = draw_random(self.utm_query[i], self.utm_index, self.threshold, 1, rng)
        return self.queries[i][0], self.index[p][0], self.index[n][0]

    def keep(self, queries: np.ndarray, index: np.ndarray) -> None:
        """Reduce the data set to these rows of the two lists."""
        for images, rows in ((self.queries, queries), (self.index, index)):
            images.paths = [images.paths[row] for row in rows]
        self.utm_query, self.utm_index = self.utm_query[queries], self.utm_index[index]


def draw_random(
    query: np.ndarray, utm_index: np.ndarray, threshold: float, count: int, rng: np.random.Generator
) -> tuple[int, np.ndarray]:
    """A random positive closer than `threshold` (or the nearest) and `count` random negatives.

    query (2,), utm_index (nd, 2) in meters. Negatives lie farther than 10 · threshold; where none
    does, the farthest is taken; with fewer than `count` they repeat.
    """
    distance = np.hypot(*(utm_index - query).T)
    near, far = np.flatnonzero(distance < threshold), np.flatnonzero(distance > 10 * threshold)
    near = near if len(near) else distance.argmin(keepdims=True)
    far = far if len(far) else distance.argmax(keepdims=True)
    return int(rng.choice(near)), rng.choice(far, count, replace=len(far) < count)


def read_split(
    root: Path, split: str, limit: int | None = None, size: int = IMAGE_SIZE
) -> LoadDataset | None:
    """One of train, val, test; None for a `test` that is not there. InputError for missing images.

    limit: keep this many queries, evenly spaced, the index images near them and as many others.
    size: pixels a side of the images.
    """
    files = [root / name for name in split_files(split)]
    if split == "test" and not any(file.exists() for file in files):
        return None
    data = LoadDataset(
        files[0],
        files[1],
        root,
        files[2],
        transform_to(size),
        inside_first=True,
        at_least=size,
    )
    for images in (data.queries, data.index):
        if images.absent:
            raise InputError(_where_images_are(images, root))
    if limit is not None and limit < len(data):
        queries = np.linspace(0, len(data) - 1, limit).round().astype(int)
        positives = positives_within(data.utm_query[queries], data.utm_index, data.threshold)
        near = np.unique(np.concatenate(positives))
        others = np.setdiff1d(np.arange(len(data.index)), near)
        spaced = others[np.linspace(0, len(others) - 1, min(len(near), len(others))).astype(int)]
        data.keep(queries, np.union1d(near, spaced))
    return data


def _where_images_are(images: ImageListDataset, root: Path) -> str:
    """The sentence for images that are not where their list says."""
    path = images.paths[images.absent[0]]
    count = f"{len(images.absent)} of {len(images)} images of {images.list_file}"
    sentence = f"{count} are missing, the first is "
    if not _PATH.match(path.name):
        return f"{sentence}{str(path)!r}: write the path of one image a line."
    found = root.rglob(glob.escape(path.name))  # first where folders have its folder's name
    folder = path.parent.name
    deeper = min(found, key=lambda p: (folder not in p.relative_to(root).parts, p), default=None)
    mend = f"it is at {deeper}: move" if deeper else "unpack"
    return f"{sentence}{path}; {mend} the archive's images to where the list says."


def data_warnings(splits: dict[str, LoadDataset]) -> list[str]:
    """What is odd about the data though it can be used, a line each."""
    found = []
    names = {name: {*data.queries.paths, *data.index.paths} for name, data in splits.items()}
    for name, data in splits.items():
        twice = len(data.queries) + len(data.index) - len(names[name])
        if twice:
            found.append(f"{name}: {twice} images are listed more than once.")
        positives = positives_within(data.utm_query, data.utm_index, data.threshold)
        nearest = [
            np.linalg.norm(data.utm_index[p[0]] - q) for p, q in zip(positives, data.utm_query)
        ]
        alone = int((np.array(nearest) > data.threshold).sum())
        if all(len(near) == len(data.index) for near in positives):
            found.append(
                f"{name}: all {len(data.index)} index images lie within {data.threshold:g} m of "
                "every query: are utmQ and utmDb in meters, not degrees?"
            )
        if alone:
            found.append(
                f"{name}: {alone} queries have no index image within {data.threshold:g} m."
            )
        if name != "train" and (shared := len(names.get("train", set()) & names[name])):
            found.append(
                f"{shared} images are both in train and in {name}: recall there is flattered."
            )
    return found
