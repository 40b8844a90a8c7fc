"""Files that describe a lens: intrinsics.txt in its usual forms, COLMAP's and NeRF's.

COLMAP and NeRF count pixels from the corner of the top-left one, this project from its center: what
they write loses half a pixel here. An intrinsics.txt of bare numbers is taken as it is.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.text import read_lines
from localization.cameras import Camera
from model import InputError, warn

Size = tuple[int, int]  # width, height

# COLMAP's models in the order of their numbers (src/colmap/sensor/models.h): how many parameters
# they have, and which, where the model is read.
COLMAP_MODELS = {
    "SIMPLE_PINHOLE": (3, "f cx cy"),
    "PINHOLE": (4, "fx fy cx cy"),
    "SIMPLE_RADIAL": (4, "f cx cy k1"),
    "RADIAL": (5, "f cx cy k1 k2"),
    "OPENCV": (8, "fx fy cx cy k1 k2 p1 p2"),
    "OPENCV_FISHEYE": (8, ""),
    "FULL_OPENCV": (12, ""),
    "FOV": (5, ""),
    "SIMPLE_RADIAL_FISHEYE": (4, ""),
    "RADIAL_FISHEYE": (5, ""),
    "THIN_PRISM_FISHEYE": (12, ""),
    "RAD_TAN_THIN_PRISM_FISHEYE": (16, ""),
    "SIMPLE_DIVISION": (4, ""),
    "DIVISION": (5, ""),
    "SIMPLE_FISHEYE": (3, ""),
    "FISHEYE": (4, ""),
    "EUCM": (6, ""),
    "EQUIRECTANGULAR": (2, ""),
}
_FORMS = (
    "fx fy cx cy, then k1 k2 p1 p2 if you like, a 3x3 matrix, or a line of COLMAP's cameras.txt"
)
_PLAIN_RATIOS = [*range(2, 9), *(1 / n for n in range(2, 9)), 3 / 2, 2 / 3, 4 / 3, 3 / 4]
_RATIO_TOLERANCE = 0.08
MOST_DISTORTION = 100.0  # coefficients beyond are numbers out of place
_BENT = -1.0, 2.0  # and so are those that move the corner of an image by more than this share
_VIEW = 0.2, 20.0  # focal lengths in longer sides: views of 136 and of 3 degrees
_NEAR_MIDDLE = 0.2  # of half the image: a center within is of this size beyond doubt
_DECIMAL_COMMA = re.compile(r"\d,\d.*\d\s+[-\d]|\d\s+[-\d].*\d,\d")
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF: values from 5 on exchange width and height


def image_sizes(paths: Sequence[Path]) -> Counter[Size]:
    """How many images there are of each size, held upright; unreadable files do not count."""
    sizes: Counter[Size] = Counter()
    for path in paths:
        try:
            with Image.open(path) as image:
                turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= _FIRST_TURNED
                sizes[image.size[::-1] if turned else image.size] += 1
        except (OSError, ValueError, SyntaxError, TypeError):
            continue
    return sizes


def numbers_in(line: str) -> list[str]:
    """The words of a line without its comment, parted by blanks, commas, semicolons or brackets."""
    return [word for word in re.split(r"[\s,;()\[\]{}]+", without_comment(line)) if word]


def without_comment(line: str) -> str:
    """A line up to a `#` that begins it or follows a space."""
    return re.sub(r"(^|\s)#.*", "", line).strip("\ufeff \t\f\v")


def to_number(word: str) -> float:
    """The number a word stands for, else ValueError; float() itself takes 1_0 for 10."""
    if "_" in word:
        raise ValueError(word)
    return float(word)


def read_intrinsics(path: Path, sizes: Counter[Size]) -> Camera:
    """The camera that a file describes, on images of the one of `sizes` to which it belongs.

    Raises InputError for a file in another form, or of another size than the images have.
    """
    lines = [without_comment(line) for line in read_lines(path, "the lens file", utf16=True)]
    if any(_DECIMAL_COMMA.search(line) and "." not in line for line in lines):
        raise InputError(f"{path}: commas stand for decimal points; write points.")
    lines = [numbers_in(line) for line in lines]
    lines = [words for words in lines if words]
    if any(len(words) > 1 and words[1].isupper() and words[1][0].isalpha() for words in lines):
        cameras = read_colmap_cameras(path)
        if len(cameras) > 1:
            warn(f"{path} describes {len(cameras)} cameras: the first is taken for all images.")
        return next(iter(cameras.values()))
    try:
        values = [to_number(word) for words in lines for word in words]
    except ValueError as error:
        raise InputError(
            f"{path} holds {error}, which is no number: it must hold {_FORMS}."
        ) from None
    values = _without_matrix(values)
    if len(values) not in (4, 5, 6, 8, 9) or not np.isfinite(values).all():
        found = (
            f"{len(values)} values" if np.isfinite(values).all() else "values that are not finite"
        )
        raise InputError(f"{path} holds {found}: it must hold {_FORMS}.")
    names = ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3")
    return _on_images(path, dict(zip(names, values)), sizes)


def _without_matrix(values: list[float]) -> list[float]:
    """fx, fy, cx, cy of a 3x3 (also transposed), 3x4 or 4x4 matrix; else the values themselves."""
    shape = {9: (3, 3), 12: (3, 4), 16: (4, 4)}.get(len(values))
    if shape:
        matrix = np.reshape(values, shape)
        for K in (matrix[:3, :3], matrix[:3, :3].T):
            rest = np.array([K[0, 1], K[1, 0], K[2, 0], K[2, 1]])
            if K[2, 2] == 1 and np.abs(rest).max() < 1e-3 * abs(K[0, 0]):
                return [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])]
    return values


def given_camera(option: str, values: Sequence[float], size: Size) -> Camera:
    """The camera of an option's fx, fy, cx, cy on images of a size. Raises InputError where they are of
    no such image.
    """
    camera = _on_images(option, dict(zip(("fx", "fy", "cx", "cy"), values)), Counter({size: 1}))
    if not all(_VIEW[0] < focal / max(size) < _VIEW[1] for focal in (camera.fx, camera.fy)):
        raise InputError(
            f"{option}: focal lengths of {camera.fx:g} and {camera.fy:g} pixels belong to no image of "
            f"{size[0]}x{size[1]}: give them in its pixels."
        )
    return camera


def _on_images(path: Path | str, lens: dict[str, float], sizes: Counter[Size]) -> Camera:
    """The camera of bare numbers, on the size its center is the middle of, scaled if need be."""

    def offset(size: Size) -> float:
        return max(abs(2 * lens["cx"] / size[0] - 1), abs(2 * lens["cy"] / size[1] - 1))

    def ratio(size: Size) -> float | None:
        over = np.array([2 * lens["cx"] / size[0], 2 * lens["cy"] / size[1]])
        off, plain = min((np.abs(over / plain - 1).max(), plain) for plain in _PLAIN_RATIOS)
        return plain if off < _RATIO_TOLERANCE else None

    by_count = [size for size, _ in sizes.most_common()]
    if not by_count:
        raise InputError(f"{path}: no image of its scene can be read, so that its size is unknown.")
    best = min(by_count, key=lambda size: round(offset(size), 2))
    if offset(best) > _NEAR_MIDDLE:
        scaled = next((size for size in by_count if ratio(size)), None)
        center = f"the center {lens['cx']:g} {lens['cy']:g}"
        if scaled:
            by = ratio(scaled)
            full = f"{scaled[0] * by:.0f}x{scaled[1] * by:.0f}"
            warn(
                f"{path}: {center} is the middle of {full} images, but they are {scaled[0]}x"
                f"{scaled[1]}: its numbers are divided by {by:g}."
            )
            for name in ("cx", "cy"):
                lens[name] = (lens[name] + 0.5) / by - 0.5
            return _camera(path, {**lens, "fx": lens["fx"] / by, "fy": lens["fy"] / by}, scaled)
        if offset(best) > 0.5:
            raise InputError(
                f"{path}: {center} is outside the middle half of the {best[0]}x{best[1]} images: "
                "give fx fy cx cy of images of this size."
            )
    return _camera(path, lens, best)


def _camera(where: Path | str, lens: dict[str, float], size: Size) -> Camera:
    """A Camera of named parameters; k3, the sixth-order distortion, is left out with a warning."""
    fx, fy = (lens.get(name, lens.get("f", math.nan)) for name in ("fx", "fy"))
    bent = [lens.get(name, 0.0) for name in ("k1", "k2", "p1", "p2")]
    values = [fx, fy, lens["cx"], lens["cy"], *bent]
    if not (np.isfinite(values).all() and min(fx, fy) > 0 and min(size) > 0):
        raise InputError(
            f"{where}: the focal lengths and the size must be positive, and all finite, found "
            f"fx={fx:g}, fy={fy:g}, {size[0]}x{size[1]}."
        )
    if np.abs(bent).max() > MOST_DISTORTION or not _BENT[0] < _bend(values, size) < _BENT[1]:
        raise InputError(f"{where}: the distortion {max(bent, key=abs):g} is that of no lens.")
    if lens.get("k3"):
        warn(f"{where}: the distortion k3 is left out; the others are used.")
    return Camera(*values[:4], *size, *bent)


def _bend(values: Sequence[float], size: Size) -> float:
    """By what share k1 and k2 of fx fy cx cy k1 k2 … move the corner of an image that is farthest off."""
    if not any(values[4:6]):
        return 0.0
    fx, fy, cx, cy, k1, k2 = np.array(values[:6])
    with np.errstate(over="ignore", invalid="ignore"):
        r2 = (max(cx, size[0] - cx) / fx) ** 2 + (max(cy, size[1] - cy) / fy) ** 2
        return float(k1 * r2 + k2 * r2**2)


def read_colmap_cameras(path: Path, used: Collection[str] | None = None) -> dict[str, Camera]:
    """CAMERA_ID -> camera of COLMAP's cameras.txt: CAMERA_ID MODEL WIDTH HEIGHT PARAMS…

    used: the numbers of those that are asked for, None for all.
    """
    cameras = {}
    for number, line in enumerate(read_lines(path, "the cameras", utf16=True), 1):
        words = numbers_in(line)
        if not words or not (used is None or words[0] in used):
            continue
        where, model = f"{path}, line {number}", words[1] if len(words) > 1 else ""
        try:
            width, height, *parameters = map(to_number, words[2:])
            size = int(width), int(height)
        except (ValueError, OverflowError):
            raise InputError(
                f"{where}: CAMERA_ID MODEL WIDTH HEIGHT PARAMS[] is needed, with numbers; correct "
                "that line."
            ) from None
        cameras[words[0]] = colmap_camera(where, model, size, parameters)
    if not cameras and used is None:
        raise InputError(f"{path} describes no camera: export it again from COLMAP.")
    return cameras


def colmap_camera(where: str, model: str, size: Size, parameters: Sequence[float]) -> Camera:
    """A camera of one of COLMAP's models; `where` names it in a sentence. Raises InputError."""
    names = COLMAP_MODELS.get(model, (0, ""))[1].split()
    if not names:
        readable = [name for name, (_, names) in COLMAP_MODELS.items() if names]
        raise InputError(
            f"{where}: the model {model or '(none)'} is none of {', '.join(readable)}: undistort "
            "the images with COLMAP's image_undistorter."
        )
    if len(parameters) != len(names):
        needed = f"CAMERA_ID {model} WIDTH HEIGHT {' '.join(names)}"
        raise InputError(f"{where}: {needed} is needed, with numbers; correct that line.")
    lens = dict(zip(names, parameters))
    lens.update(cx=lens["cx"] - 0.5, cy=lens["cy"] - 0.5)
    return _camera(where, lens, size)


def nerf_camera(path: Path, values: dict, sizes: Counter[Size]) -> Camera | None:
    """The camera of a transforms.json with these values; None where it tells no focal length.

    fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2, or the field of view camera_angle_x in radians.
    """
    if values.get("is_fisheye") or "FISHEYE" in str(values.get("camera_model", "")):
        raise InputError(f"{path} is of a fisheye lens: undistort the images first.")
    ((common, _),) = sizes.most_common(1) or [((0, 0), 0)]
    try:
        size = int(values.get("w", common[0])), int(values.get("h", common[1]))
        lens = {
            name: float(values[name]) for name in ("k1", "k2", "p1", "p2", "k3") if name in values
        }
        if "fl_x" in values:
            lens["fx"] = float(values["fl_x"])
        elif "camera_angle_x" in values:
            lens["fx"] = size[0] / 2 / math.tan(float(values["camera_angle_x"]) / 2)
        else:
            return None
        lens["fy"] = float(values.get("fl_y", lens["fx"]))
        lens["cx"] = float(values.get("cx", size[0] / 2)) - 0.5
        lens["cy"] = float(values.get("cy", size[1] / 2)) - 0.5
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise InputError(f"{path}: its lens (fl_x, cx, w …) cannot be read: {error}.") from None
    return _camera(path, lens, size)
