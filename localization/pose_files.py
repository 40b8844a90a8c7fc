"""Scenes on disk: which pose belongs to which picture, by pose.txt, COLMAP's or NeRF's files.

A pose is a row tx ty tz and a quaternion, as the file has it: what the numbers mean is found later
(calibration.py), or known where the format says it. A row belongs to a picture by its name or time
stamp where the file has such, else by its place in the order of the names.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.text import read_lines
from eval import IMAGE_SUFFIXES, list_images
from localization.cameras import OPENCV, OPENGL, Camera, Convention
from localization.colmap_binary import binary_cameras, binary_images
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
_ENDING = re.compile(f"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$")
_LENS_NAME = re.compile(r"(intrinsics?|calib\w*|cameras?|k)(\.\w+)?", re.IGNORECASE)
_SAME_SHAPE = 0.02  # by how much the shape of a smaller version of an image may differ
_FOLDERS = 3  # of a name that are looked at, at most
_STAMP_FROM = 1e8  # whole numbers from here on are times, smaller ones count frames


@dataclass(frozen=True)
class SceneFiles:
    """What a scene's folder says.

    paths: its pictures in order. poses: (n, 7) float64, their rows, NaN where the pose is unknown.
    camera: their lens, on the size of image it belongs to, or None; where they have several, the
    one that most have. convention: of the poses, or None where it has to be found out. lenses: that
    of each picture where they have several.
    """

    paths: list[Path]
    poses: np.ndarray
    camera: Camera | None
    convention: Convention | None
    lenses: dict[Path, Camera] = field(default_factory=dict)


def read_scene(folder: Path) -> SceneFiles:
    """The pictures in `folder`/images with poses, lens and convention from the files beside them.

    pose.txt is taken where it is there, else transforms.json, else COLMAP's images.txt or
    images.bin, whose images may be in folders; the lens is that of intrinsics.txt, else of what gave
    the poses, else of the cameras beside it. Where the counts of pictures and poses differ, a
    warning says what is left out. Raises InputError naming file and line for what is missing or in
    no form that is read.
    """
    pictures = folder / "images"
    file = _beside(folder, "pose.txt", "transforms.json", "images.txt", "images.bin")
    paths = list_images(pictures, "**/*" if file and file.stem == "images" else "*")
    if not paths:
        raise InputError(
            f"{pictures} holds no image ({' '.join(IMAGE_SUFFIXES)}): unpack the frames there."
        )
    if file is None:
        others = (
            ", ".join(sorted(p.name for p in folder.glob("*.txt") if p.is_file()))
            or "no other .txt"
        )
        raise InputError(
            f"{folder / 'pose.txt'} is missing (there is {others}): a line an image is needed."
        )
    camera, convention = None, None
    if file.suffix == ".bin":
        rows, convention = binary_images(file), COLMAP
    else:
        lines = read_lines(file, "the pose file", utf16=True)
        if file.suffix == ".json":
            (rows, values), convention = nerf_rows(file, lines), OPENGL
        elif file.stem == "images" or is_colmap(lines):
            rows, convention = colmap_rows(file, lines), COLMAP
        else:
            rows = text_rows(file, lines)
    if not any(rows):
        need = "has no image: export it again"
        if convention != COLMAP:
            need = "has no line of numbers: a line an image is needed, tx ty tz and a quaternion"
        raise InputError(f"{file} {need}.")
    labels = next(row.labels for row in rows if row)
    kept = _by_labels(file, rows, paths) if labels else _by_order(file, rows, paths)
    rows = [rows[i] for i in kept.values()]
    paths = [paths[i] for i in kept]
    lenses = {}
    if own := _beside(folder, "intrinsics.txt"):
        camera = read_intrinsics(own, image_sizes(paths))
    elif file.suffix == ".json":
        camera, lenses = _nerf_lenses(file, values, rows, paths)
    elif not camera and (cameras := _cameras_of(file, folder)):
        camera, lenses = _lenses(cameras, rows, paths)
    elif not camera:
        _warn_of_unread_lens(folder)
    poses = np.array([row.pose if row else np.full(7, np.nan) for row in rows])
    return SceneFiles(paths, poses.reshape(-1, 7), camera, convention, lenses)


def _beside(folder: Path, *names: str) -> Path | None:
    """The first of these files that is there, beside the pictures or where COLMAP writes."""
    places = (folder, folder / "images", folder / "sparse" / "0", folder / "sparse")
    found = (place / name for name in names for place in places if (place / name).is_file())
    return next(found, None)


def _warn_of_unread_lens(folder: Path) -> None:
    """Say that a file that seems to describe the lens is not read."""
    for file in sorted(folder.iterdir()):
        if _LENS_NAME.fullmatch(file.name) and (file.is_file() or file.suffix):
            warn(
                f"{file} is not read: the lens stands in {folder / 'intrinsics.txt'}, as fx fy cx cy."
            )


def _cameras_of(file: Path, folder: Path) -> Path | None:
    """The file of the cameras that belongs to a file of poses: of the same model, else any."""
    own = (file.with_name(f"cameras{suffix}") for suffix in (file.suffix, ".txt", ".bin"))
    return next(filter(Path.is_file, own), None) or _beside(folder, "cameras.txt")


def _nerf_lenses(
    file: Path, values: dict, rows: list[PoseRow | None], paths: list[Path]
) -> tuple[Camera | None, dict[Path, Camera]]:
    """The camera of a transforms.json with these values, or the one that most of the images have; that
    of each image where they have several, which their frames tell.
    """
    frames = {path: values["frames"][row.line - 1] for path, row in zip(paths, rows) if row}
    if not any(frame.keys() & {"fl_x", "camera_angle_x"} for frame in frames.values()):
        return nerf_camera(file, values, image_sizes(paths)), {}
    found = {
        path: nerf_camera(file, {**values, **frame}, image_sizes([path]))
        for path, frame in frames.items()
    }
    lenses = {path: camera for path, camera in found.items() if camera}
    common = Counter(lenses.values()).most_common(1)[0][0]
    return common, lenses if len(set(lenses.values())) > 1 else {}


def _lenses(
    file: Path, rows: list[PoseRow | None], paths: list[Path]
) -> tuple[Camera, dict[Path, Camera]]:
    """The camera that most of the images are of, the first where none says; that of each image
    where they are of several."""
    used = Counter(row.camera for row in rows if row and row.camera)
    if file.suffix == ".bin":
        cameras = binary_cameras(file, used or None)
    else:
        cameras = read_colmap_cameras(file, used or None)
    for name in used:
        if name not in cameras:
            raise InputError(
                f"{file} has no camera {name}, of which there are images: export both again."
            )
    if not used:
        return next(iter(cameras.values())), {}
    common = cameras[used.most_common(1)[0][0]]
    if len(set(cameras.values())) == 1:
        return common, {}
    lenses = {path: cameras[row.camera] for path, row in zip(paths, rows) if row}
    for name, lens in cameras.items():
        mine = [path for path, own in lenses.items() if own == lens]
        if not (0 <= lens.cx < lens.width and 0 <= lens.cy < lens.height):
            raise InputError(
                f"{file}: the center {lens.cx:g} {lens.cy:g} of camera {name} is outside its "
                f"{lens.width}x{lens.height} images."
            )
        for width, height in image_sizes(mine):
            if abs(width * lens.height / (height * lens.width) - 1) > _SAME_SHAPE:
                warn(
                    f"{file}: camera {name} is of {lens.width}x{lens.height} images, but of "
                    f"{width}x{height} ones ({mine[0].name} …), which are no smaller version."
                )
    return common, lenses


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
                if len(found) < len(there) and file.stem == "images":
                    warn(
                        f"{file}: {len(there) - len(found)} of its {len(there)} images are not "
                        "there: they are left out."
                    )
                return {image: there[found[image]] for image in sorted(found)}
    row = rows[there[0]]
    if file.stem == "images":
        name, count = Counter(columns[0]).most_common(1)[0]
        if count > 1:
            raise InputError(f"{file} has two images {name!r}: keep one of them.")
        raise InputError(
            f"{file} has images such as {name!r}, those that are there are such as {paths[0]}: name "
            "them as the model does."
        )
    known = {name for path in paths for name in (path.name, path.stem)}
    for word, count in (pair for column in columns for pair in Counter(column).items()):
        if count > 1 and word in known:
            raise InputError(f"{file} has {count} poses of {word!r}: keep one of them.")
    raise InputError(
        f"{file}, line {row.line}: {' '.join(row.labels)!r} stands beside the pose, but the "
        f"images ({paths[0].name} …) bear no such names or numbers: remove it from every line if "
        "row i belongs to image i."
    )


def _same_names(column: Sequence[str], paths: Sequence[Path]) -> dict[int, int] | None:
    """Picture -> row where the words are names of pictures, with or without folders and ending.

    Folders count as far as names alone do not tell the pictures apart.
    """
    for depth in range(1, _FOLDERS + 2):
        rows, stems = {}, {}
        for row, word in enumerate(column):
            name = _name(re.split(r"[/\\]", word), depth)
            rows.setdefault(name, []).append(row)
            stems.setdefault(_ENDING.sub("", name), []).append(row)
        found = {
            image: rows.get(_name(path.parts, depth))
            or stems.get(_name(path.with_suffix("").parts, depth))
            for image, path in enumerate(paths)
        }
        found = {image: same for image, same in found.items() if same}
        used = [row for same in found.values() for row in same]
        if len(used) == len(found) and len(set(used)) == len(used):
            break
    else:
        return None
    if all(map(is_number, column)) and len(used) not in (len(paths), len(column)):
        return None
    return {image: row for image, (row,) in found.items()}


def _name(parts: Sequence[str], depth: int) -> str:
    """The last words of a path, so many of those that lie in images/, in one spelling."""
    inside = parts[1 + max((i for i, p in enumerate(parts[:-1]) if p == "images"), default=-1) :]
    return unicodedata.normalize("NFC", "/".join(inside[-depth:])).casefold()


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
