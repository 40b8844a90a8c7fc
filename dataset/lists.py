"""Reads the assignment's lists and ground truth; ValueError with one sentence for what is wrong."""

from pathlib import Path

import numpy as np


def read_list(
    list_file: Path | str, root_dir: Path | str, inside_first: bool = False
) -> list[Path]:
    """The image paths of a list, one a line. ValueError for a missing or empty list.

    A line is tried as it stands, then under `root_dir`, then under it without its leading
    `dataset/`; `inside_first` tries the last first.
    """
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error}): unpack it there."
        raise ValueError(f"the list {list_file} {reason}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"the list {list_file} is empty: it must name one image a line.")
    return [_resolve(line, Path(root_dir), inside_first) for line in lines]


def _resolve(line: str, root_dir: Path, inside_first: bool) -> Path:
    inside = root_dir / line.removeprefix("./").removeprefix("dataset/")
    places = [Path(line), root_dir / line, inside]
    places = [inside, *places] if inside_first else places
    return next((place for place in places if place.is_file()), inside)


def read_truth(gt_npz: Path | str) -> tuple[np.ndarray, np.ndarray, float]:
    """utmQ (nq, 2), utmDb (nd, 2) in meters, posDistThr. ValueError for a missing file or key."""
    keys = ("utmQ", "utmDb", "posDistThr")
    try:
        with np.load(gt_npz) as file:
            found = {key: np.asarray(file[key], dtype=np.float64) for key in keys if key in file}
            threshold = float(found.get("posDistThr", 0))
    except FileNotFoundError:
        raise ValueError(f"{gt_npz} is missing: unpack the assignment's gt/ there.") from None
    except Exception as error:  # zip, pickle and numpy each raise their own for a damaged file
        reason = f"cannot be read ({error}): take the assignment's file."
        raise ValueError(f"{gt_npz} {reason}") from error
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{gt_npz} has no {', '.join(missing)}: take the assignment's file.")
    query, index = found["utmQ"], found["utmDb"]
    if query.ndim != 2 or index.ndim != 2 or query.shape[1] != 2 or index.shape[1] != 2:
        shapes = f"{query.shape}, {index.shape}"
        raise ValueError(f"{gt_npz}: utmQ and utmDb must be (n, 2), not {shapes}.")
    return query, index, threshold
