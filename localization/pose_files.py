"""Scenes on disk: which pose belongs to which picture, by pose.txt, COLMAP's or NeRF's files.

A pose is a row tx ty tz and a quaternion, as the file has it: what the numbers mean is found later
(calibration.py), or known where the format says it. A row belongs to a picture by its name or time
stamp where the file has such, else by its place in the order of the names.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.text import read_lines
from eval import IMAGE_SUFFIXES, list_images
from localization.cameras import OPENCV, OPENGL, Camera, Convention
from localization.lens_files import (
    image_sizes,
    nerf_camera,
    read_colmap_cameras,
    read_intrinsics,
    to_number,
)
from localization.pose_rows import PoseRow, colmap_rows, is_colmap, is_number, nerf_rows, text_rows
from model import InputError, warn

COLMAP = Convention("xyzw", "world_to_camera", OPENCV.axes)
_STAMP_FROM = 1e8  # whole numbers from here on are times, smaller ones count frames


@dataclass(frozen=True)
class SceneFiles:
    """What a scene's folder says.

    paths: its pictures in order. poses: (n, 7) float64, their rows, NaN where the pose is unknown.
    camera: their lens, on the size of image it belongs to, or None. convention: of the poses, or
    None where it has to be found out.
    """

    paths: list[Path]
    poses: np.ndarray
    camera: Camera | None
    convention: Convention | None


def read_scene(folder: Path) -> SceneFiles:
    """The pictures in `folder`/images with poses, lens and convention from the files beside them.

    pose.txt is taken where it is there, else transforms.json, else COLMAP's images.txt; the lens is
    that of intrinsics.txt, else of what gave the poses, else of cameras.txt. Where the counts of
    pictures and poses differ, a warning says what is left out. Raises InputError naming file and
    line for what is missing or in no form that is read.
    """
    pictures = folder / "images"
    paths = list_images(pictures)
    if not paths:
        raise InputError(
            f"{pictures} holds no image ({' '.join(IMAGE_SUFFIXES)}): unpack the frames there."
        )
    file = _beside(folder, "pose.txt", "transforms.json", "images.txt")
    if file is None:
        others = ", ".join(sorted(path.name for path in folder.glob("*.txt"))) or "no other .txt"
        raise InputError(
            f"{folder / 'pose.txt'} is missing (there is {others}): a line an image is needed."
        )
    lenses = [_beside(folder, "intrinsics.txt"), _beside(folder, "cameras.txt")]
    sizes = image_sizes(paths) if any(lenses) or file.suffix == ".json" else Counter()
    camera, convention = None, None
    lines = read_lines(file, "the pose file", utf16=True)
    if file.suffix == ".json":
        rows, values = nerf_rows(file, lines)
        camera, convention = nerf_camera(file, values, sizes), OPENGL
    elif file.name == "images.txt" or is_colmap(lines):
        rows, convention = colmap_rows(file, lines), COLMAP
    else:
        rows = text_rows(file, lines)
    if lenses[0]:
        camera = read_intrinsics(lenses[0], sizes)
    elif lenses[1] and not camera:
        camera = _used_camera(lenses[1], rows)
    if not any(rows):
        raise InputError(f"{file} is empty: a line an image is needed.")
    labels = next(row.labels for row in rows if row)
    kept = _by_labels(file, rows, paths) if labels else _by_order(file, rows, paths)
    poses = np.array([rows[i].pose if rows[i] else np.full(7, np.nan) for i in kept.values()])
    return SceneFiles([paths[i] for i in kept], poses.reshape(-1, 7), camera, convention)


def _beside(folder: Path, *names: str) -> Path | None:
    """The first of these files that is there, beside the pictures or where COLMAP writes."""
    places = (folder, folder / "images", folder / "sparse" / "0", folder / "sparse")
    found = (place / name for name in names for place in places if (place / name).is_file())
    return next(found, None)


def _used_camera(file: Path, rows: list[PoseRow | None]) -> Camera:
    """The camera of cameras.txt that most of the images are of."""
    cameras = read_colmap_cameras(file)
    used = Counter(row.camera for row in rows if row and row.camera) or Counter(
        [next(iter(cameras))]
    )
    camera = used.most_common(1)[0][0]
    if camera not in cameras:
        raise InputError(
            f"{file} has no camera {camera}, of which images.txt has images: export both again."
        )
    if len(used) > 1:
        warn(f"{file}: the images are of {len(used)} cameras; camera {camera} is taken for all.")
    return cameras[camera]


# ---------------------------------------------------------------- rows to pictures


def _by_order(file: Path, rows: list[PoseRow | None], paths: Sequence[Path]) -> dict[int, int]:
    """Picture -> row, one after another; `rows` has None for each empty line before the last pose.

    An empty line is an unknown pose where that makes the counts equal, else only spacing.
    """
    first = next(i for i, row in enumerate(rows) if row)
    filled = [i for i, row in enumerate(rows) if row]
    taken = filled
    if len(filled) != len(paths):
        taken = next(
            (
                rest
                for rest in (range(first, len(rows)), range(len(rows)))
                if len(rest) == len(paths)
            ),
            filled,
        )
    if len(taken) != len(paths):
        count = min(len(taken), len(paths))
        what = "images" if len(paths) > count else "poses"
        empty = len(rows) - first - len(filled)
        spaces = f", {empty} empty lines are passed over" if empty else ""
        left = abs(len(paths) - len(taken))
        warn(
            f"{file.parent} has {len(paths)} images and {len(taken)} poses: row i is taken for "
            f"image i{spaces}, and the last {left} of the {what} are left out."
        )
    names = [path.name for path in paths]
    if names != sorted(names):
        low, high = next(pair for pair in zip(names, sorted(names)) if pair[0] != pair[1])
        warn(
            f"{paths[0].parent}: the images are taken in the order of their numbers, {low} "
            f"before {high}, not in that of their letters."
        )
    return dict(zip(range(len(paths)), taken))


def _by_labels(file: Path, rows: list[PoseRow | None], paths: Sequence[Path]) -> dict[int, int]:
    """Picture -> row, by the first column of names, numbers or time stamps that pairs them."""
    there = [i for i, row in enumerate(rows) if row]
    columns = list(zip(*(rows[i].labels for i in there)))
    for column in columns:
        for pair in (_same_names, _same_numbers):
            if found := pair(column, paths):
                if len(found) < len(paths):
                    warn(
                        f"{file.parent} has {len(paths)} images, {len(found)} of which are among "
                        f"the {len(there)} poses by {pair.__name__[6:]}: the others are left out."
                    )
                return {image: there[found[image]] for image in sorted(found)}
    row = rows[there[0]]
    raise InputError(
        f"{file}, line {row.line}: {' '.join(row.labels)!r} stands beside the pose, but the "
        f"images ({paths[0].name} …) bear no such names or numbers: remove it from every line if "
        "row i belongs to image i."
    )


def _same_names(column: Sequence[str], paths: Sequence[Path]) -> dict[int, int] | None:
    """Picture -> row where the words are names of pictures, with or without folders and ending."""
    rows = {}
    for row, word in enumerate(column):
        rows.setdefault(_name(re.split(r"[/\\]", word)[-1]), []).append(row)
    found = {
        image: rows.get(_name(path.name)) or rows.get(_name(path.stem))
        for image, path in enumerate(paths)
    }
    found = {image: same for image, same in found.items() if same}
    used = [row for same in found.values() for row in same]
    if len(used) != len(found) or len(set(used)) != len(used):
        return None
    if all(map(is_number, column)) and len(used) not in (len(paths), len(column)):
        return None
    return {image: row for image, (row,) in found.items()}


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _same_numbers(column: Sequence[str], paths: Sequence[Path]) -> dict[int, int] | None:
    """Picture -> row where the words are the numbers in the names of pictures, or times near them.

    Numbers of frames have to be the same, for all pictures or all rows; so that a count from 0 and
    one from 1 pair nothing. Times may differ by half their spacing; half of the pictures need one.
    """
    if not all(map(is_number, column)):
        return None
    stamps = np.array([to_number(word) for word in column])
    if len(np.unique(stamps)) != len(stamps) or not np.isfinite(stamps).all():
        return None
    counts = (stamps == np.round(stamps)).all() and stamps.max() < _STAMP_FROM
    order = np.argsort(stamps)
    runs = [re.findall(r"[0-9]+(?:\.[0-9]+)?", path.stem) for path in paths]
    if len({len(run) for run in runs}) != 1:
        return None
    for numbers in (np.array(run, dtype=float) for run in zip(*runs)):
        if len(np.unique(numbers)) != len(numbers):
            continue
        spacing = [np.median(np.diff(np.sort(v))) for v in (stamps, numbers) if len(v) > 1]
        reach = 0.0 if counts else min(spacing, default=0.0) / 2
        after = np.searchsorted(stamps[order], numbers)
        beside = order[np.stack([after - 1, after]).clip(0, len(stamps) - 1)]
        distance = np.abs(stamps[beside] - numbers)
        near = np.flatnonzero(distance.min(axis=0) <= reach)
        rows = beside[distance.argmin(axis=0), np.arange(len(numbers))][near]
        whole = len(near) in (len(numbers), len(stamps)) and (
            len(numbers) != len(stamps) or len(near) == len(numbers)
        )
        if len(np.unique(rows)) == len(rows) and (
            whole if counts else 2 * len(near) >= len(numbers)
        ):
            return dict(zip(near.tolist(), rows.tolist()))
    return None
