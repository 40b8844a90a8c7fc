"""The true positions of a data set: an .npz, or the .mat file that others have of the same data."""

import io
from pathlib import Path

import numpy as np

from dataset.matlab import MAGIC, read_mat
from model import InputError, warn

_TRUTH = ("utmQ", "utmDb", "posDistThr")


def read_truth(gt_npz: Path | str) -> tuple[np.ndarray, np.ndarray, float]:
    """utmQ (nq, 2), utmDb (nd, 2) in meters, posDistThr, from an .npz, or a .mat called so.

    InputError for a missing or damaged file, a missing array, another shape than (n, 2) or (2, n),
    positions that are not finite, a threshold that is no positive number.
    """
    form = (
        "it must hold utmQ (queries, 2) and utmDb (images, 2) in meters, and the number posDistThr"
    )
    arrays = _arrays(Path(gt_npz), form)
    if missing := [key for key in _TRUTH if key not in arrays]:
        there = (
            f"there is {', '.join(sorted(arrays))}" if arrays else "there is no array of numbers"
        )
        raise InputError(f"{gt_npz} has no {', '.join(missing)} ({there}): {form}.")
    places = []
    for key in _TRUTH[:2]:
        rows = arrays[key]
        if rows.ndim == 2 and rows.shape[0] == 2 != rows.shape[1]:
            warn(
                f"{gt_npz}: {key} is (2, {rows.shape[1]}), taken as its transpose, a row an image."
            )
            rows = rows.T
        if rows.ndim != 2 or rows.shape[1] != 2:
            raise InputError(f"{gt_npz}: {key} is of shape {rows.shape}: {form}.")
        if len(unknown := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
            raise InputError(
                f"{gt_npz}: {len(unknown)} of {len(rows)} rows of {key} are not finite, the first "
                f"is row {unknown[0]}, that of image {unknown[0] + 1} of the list: give their "
                "positions, or take them out of both."
            )
        places.append(np.ascontiguousarray(rows))
    threshold = arrays["posDistThr"]
    if threshold.size != 1 or not (np.isfinite(threshold).all() and threshold.item() > 0):
        shown = f"{threshold.item():g}" if threshold.size == 1 else f"of shape {threshold.shape}"
        raise InputError(
            f"{gt_npz}: posDistThr is {shown}: it must be one positive number of meters."
        )
    return *places, threshold.item()


def _arrays(file: Path, form: str) -> dict[str, np.ndarray]:
    """The arrays in an .npz or .mat file, float64; of an .npz those of _TRUTH, the others empty."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file} is missing: unpack the assignment's gt/ there.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}).") from None
    if data.startswith(b"\x93NUMPY"):
        raise InputError(f"{file} is one array (.npy), not an .npz of several: {form}.")
    if data.startswith(b"MATLAB 7.3"):
        raise InputError(f"{file} is of MATLAB 7.3: save it with -v7, or as .npz; {form}.")
    if not data.startswith((MAGIC, b"PK")):
        raise InputError(f"{file} is no .npz file: {form}.")
    key = ""
    try:
        if data.startswith(MAGIC):
            found = read_mat(data)
        else:
            with np.load(io.BytesIO(data), allow_pickle=False) as opened:
                found = dict.fromkeys(opened.files, np.empty(0))
                for key in (key for key in _TRUTH if key in found):
                    found[key] = opened[key]
    except Exception as error:  # zip, numpy and struct each raise their own for a damaged file
        if "Object arrays" in str(error):
            reason = f"{key} holds Python objects, not plain numbers"
        else:
            reason = f"it is damaged or cut short ({type(error).__name__})"
        raise InputError(f"{file}: {reason}; {form}.") from error
    for key, array in found.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{file}: {key} is of type {array.dtype}, not numbers; {form}.")
    return {key: np.asarray(array, dtype=np.float64) for key, array in found.items()}
