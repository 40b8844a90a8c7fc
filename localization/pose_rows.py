"""The poses in a file: rows of numbers or matrices, COLMAP's images.txt, NeRF's transforms.json."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eval import IMAGE_SUFFIXES
from localization.cameras import quaternion_from_rotation
from localization.lens_files import numbers_in, to_number, without_comment
from model import InputError

UNIT = 0.01  # a quaternion's length may differ from 1 by so much
FARTHEST = 1e12  # of a coordinate; UTM in micrometers is less
_WANTED = "tx ty tz and a quaternion, or nan"
_ENDING = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_NAME_FIRST = re.compile(rf"\s*(.+?(?:{_ENDING}))[\"']?[\s,;]+(.*)", re.IGNORECASE)
_NUMBERED = re.compile(r"([^\s,;]+)[\s,;]+(.+)")
_DECIMAL_COMMA = re.compile(r"^[^.#]*[0-9],[0-9]+[\s;]+-?[0-9]+,[0-9]+[^.#]*$")
_NAME_LAST = re.compile(rf"(.*?)[\s,;]+([^\s,;]+(?:{_ENDING}))", re.IGNORECASE)


class PoseRow(NamedTuple):
    """A pose: its line, the words beside it (name, time stamp), seven numbers, COLMAP's camera."""

    line: int
    labels: tuple[str, ...]
    pose: np.ndarray
    camera: str = ""


def text_rows(file: Path, lines: list[str]) -> list[PoseRow | None]:
    """The poses of a text file in the order of its lines, None for each empty line before the last.

    A line may hold seven numbers or a 3x4 or 4x4 matrix, one or two words beside them, or a row of
    such a matrix; comments (#) and a header of words are passed over.
    """
    table: list[tuple[int, list[str]]] = []
    for number, line in enumerate(lines, 1):
        if _DECIMAL_COMMA.search(line):
            raise InputError(
                f"{file}, line {number}: commas stand for decimal points; write points."
            )
        words = _words(line)
        header = (
            len(words) > 1
            and not any(filled for _, filled in table)
            and not any(map(is_number, words))
        )
        if not header and (words or "#" not in line):
            table.append((number, words))
    while table and not table[-1][1]:
        table.pop()
    filled = [(number, words) for number, words in table if words]
    if not filled:
        return []
    widths = Counter(len(words) for _, words in filled if len(words) > 1) or Counter([7])
    columns = widths.most_common(1)[0][0]
    if columns == 4:
        return _blocks(file, filled)
    size = next((size for size in (7, 12, 16) if 0 <= columns - size <= 2), None)
    if size is None:
        number = next(number for number, words in filled if len(words) == columns)
        raise InputError(
            f"{file}, line {number}: {columns} columns where 7 are needed ({_WANTED}); a 3x4 or "
            "4x4 matrix, and a picture's name in front, are read too; write one of these."
        )
    before = _words_before([words for _, words in filled if len(words) == columns], columns, size)
    return [
        _row(file, number, words, columns, size, before) if words else None
        for number, words in table
    ]


def _words_before(rows: list[list[str]], columns: int, size: int) -> int:
    """How many words stand before the pose in rows of `columns` words, of which `size` are the pose.

    Words are before it unless the last is no number, or only quaternions farther in front have length 1.
    """
    if not rows or not is_number(rows[0][-1]):
        return 0
    last = columns - size

    def of_unit_length(first: int) -> bool:
        words = [row[first + 3 : first + 7] for row in rows]
        if not all(is_number(word) for row in words for word in row):
            return False
        length = np.linalg.norm([[to_number(word) for word in row] for row in words], axis=1)
        return bool((np.isnan(length) | (np.abs(length - 1) < UNIT)).all())

    if size != 7 or of_unit_length(last):
        return last
    return next((first for first in range(last) if of_unit_length(first)), last)


def _words(line: str) -> list[str]:
    """The words of a line; a picture's name, which may hold spaces, is one, a number before it another."""
    line = without_comment(line)
    if named := _NAME_FIRST.fullmatch(line):
        numbered = _NUMBERED.fullmatch(named[1])
        names = (
            numbered.groups() if numbered and is_number(numbered[1]) else [named[1].lstrip("\"'")]
        )
        return [*names, *numbers_in(named[2])]
    if named := _NAME_LAST.fullmatch(line):
        return [*numbers_in(named[1]), named[2]]
    return numbers_in(re.sub("[\"']", " ", line))


def is_number(word: str) -> bool:
    try:
        to_number(word)
    except ValueError:
        return False
    return True


def _row(
    file: Path, number: int, words: list[str], columns: int, size: int, before: int
) -> PoseRow:
    """One line of `columns` words, of which `size` are the pose, so many before it, the others behind."""
    where = f"{file}, line {number}"
    if len(words) == 1 and words[0].lower() == "nan" and columns == size:
        return PoseRow(number, (), np.full(7, np.nan))
    if len(words) != columns:
        needed = (
            f"{columns} are needed (with {_WANTED})" if columns > 7 else f"7 are needed ({_WANTED})"
        )
        raise InputError(f"{where}: {len(words)} columns where {needed}; correct that line.")
    labels = words[:before] + words[before + size :]
    words = words[before : before + size]
    try:
        values = np.array([to_number(word) for word in words])
    except ValueError as error:
        raise InputError(
            f"{where}: not a number in {' '.join(words)!r} ({error}); correct that line."
        ) from None
    return PoseRow(number, tuple(labels), _pose(where, values))


def _pose(where: str, values: np.ndarray) -> np.ndarray:
    """The seven numbers of a pose that is written as seven, or as a 3x4 or 4x4 matrix."""
    if not np.isfinite(values).any():
        return np.full(7, np.nan)
    if not np.isfinite(values).all():
        raise InputError(
            f"{where}: a value is not finite; write numbers, or nan for a pose that is not known."
        )
    if len(values) != 7:
        return _of_matrix(where, values.reshape(-1, 4))
    if np.abs(values[:3]).max() > FARTHEST:
        raise InputError(
            f"{where}: no position is {np.abs(values[:3]).max():.3g}; correct that line."
        )
    length = np.abs(values[3:]).max()
    if not 1e-6 < length < 1e6:
        said = "zero" if length <= 1e-6 else f"as long as {length:.3g}"
        raise InputError(
            f"{where}: the quaternion is {said}; write a unit one, or nan for a pose not known."
        )
    return values


def _of_matrix(where: str, matrix: np.ndarray) -> np.ndarray:
    """tx ty tz qx qy qz qw of a matrix (3, 4) or (4, 4)."""
    R = matrix[:3, :3]
    orthonormal = np.abs(R @ R.T - np.eye(3)).max() < 0.01
    if (
        not orthonormal
        or np.linalg.det(R) < 0
        or (len(matrix) == 4 and np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6)
    ):
        what = (
            "mirrors the axes"
            if orthonormal
            else "is no rotation beside a translation, with a last row 0 0 0 1"
        )
        raise InputError(
            f"{where}: the matrix {what}; write it by rows, or tx ty tz and a quaternion."
        )
    return np.concatenate(
        [matrix[:3, 3], quaternion_from_rotation(torch.from_numpy(R.copy())).numpy()]
    )


def _blocks(file: Path, lines: list[tuple[int, list[str]]]) -> list[PoseRow]:
    """The poses of a file that has a row of a matrix on each line, three or four rows a pose."""
    values = []
    for number, words in lines:
        try:
            values.append([to_number(word) for word in words])
            if len(words) != 4:
                raise ValueError
        except ValueError:
            raise InputError(
                f"{file}, line {number}: a row of a matrix, four numbers, is needed; correct that "
                "line."
            ) from None
    last = np.abs(np.array(values) - [0, 0, 0, 1]).max(axis=1) < 1e-6
    height = 4 if last.any() else 3
    if len(values) % height or (height == 4 and not last[3::4].all()):
        raise InputError(
            f"{file}: {len(values)} rows of four numbers are no 4x4 matrices, each ending in "
            "0 0 0 1, nor 3x4 ones: write the rows of all."
        )
    blocks = np.array(values).reshape(-1, height * 4)
    return [
        PoseRow(lines[i * height][0], (), _pose(f"{file}, line {lines[i * height][0]}", block))
        for i, block in enumerate(blocks)
    ]


# ---------------------------------------------------------------- COLMAP and NeRF


def is_colmap(lines: list[str]) -> bool:
    """Whether the first line that says something is one of COLMAP's images.txt."""
    first = next((line for line in lines if without_comment(line)), "")
    return _colmap_line(first) is not None


def _colmap_line(line: str) -> list[str] | None:
    """IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, or None for another line."""
    words = line.split(None, 9)
    if len(words) < 10 or not all(map(is_number, words[:9])) or is_number(words[9].split()[-1]):
        return None
    return words


def colmap_rows(file: Path, lines: list[str]) -> list[PoseRow]:
    """The poses of COLMAP's images.txt, world to camera; the lines of points are passed over."""
    rows = []
    for number, line in enumerate(lines, 1):
        words = _colmap_line(line) if without_comment(line) else None
        if words:
            qw, *xyz_t = (to_number(word) for word in words[1:8])
            values = np.array([*xyz_t[3:], *xyz_t[:3], qw])
            where = f"{file}, line {number}"
            rows.append(colmap_pose(where, number, values, words[9].strip(), words[8]))
        elif without_comment(line) and not (rows and all(map(is_number, line.split()))):
            raise InputError(
                f"{file}, line {number}: neither IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME nor "
                "the points of an image; export the model again as text."
            )
    return rows


def colmap_pose(where: str, number: int, values: np.ndarray, name: str, camera: str) -> PoseRow:
    """The row of an image of COLMAP, of tx ty tz qx qy qz qw (7,). Raises InputError."""
    return PoseRow(number, (name,), _pose(where, values), camera)


def nerf_rows(file: Path, lines: list[str]) -> tuple[list[PoseRow], dict]:
    """The poses of a transforms.json, camera to world with OpenGL's axes, and its top level."""
    try:
        values = json.loads("\n".join(lines))
        frames = [
            (str(f["file_path"]), np.array(f["transform_matrix"], dtype=float))
            for f in values["frames"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{file} has no frames with file_path and transform_matrix ({reason}): export it again."
        ) from None
    rows = []
    for number, (name, matrix) in enumerate(frames, 1):
        where = f"{file}, frame {number}"
        if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
            raise InputError(f"{where}: transform_matrix is no 4x4 matrix of numbers; write one.")
        rows.append(PoseRow(number, (name,), _of_matrix(where, matrix)))
    return rows, values
