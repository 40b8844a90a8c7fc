"""Cameras and pose files: the only place that knows file formats.

Inside this project a pose is ``R_world_from_cam`` (3, 3) and ``c_world`` (3,) in float64, with OpenCV's camera axes
(x right, y down, z forward). A pose file may use any quaternion order, direction and camera axes; a `Convention` says
which, and `poses_from_file` / `poses_to_file` convert once, at the file boundary. Pixels have the center of the top-left
pixel at (0, 0).
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

QUATERNION_ORDERS = ("xyzw", "wxyz")
DIRECTIONS = ("camera_to_world", "world_to_camera")

# Each word as a unit vector in OpenCV's camera axes.
_WORD_CV = {
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "down": (0, 1, 0),
    "up": (0, -1, 0),
    "forward": (0, 0, 1),
    "back": (0, 0, -1),
}


@dataclass(frozen=True)
class Camera:
    """Pinhole camera without distortion: focal lengths and principal point in pixels, image size in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    def matrix(self) -> Tensor:
        """The calibration matrix K (3, 3), float64."""
        return torch.tensor(
            [[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]], dtype=torch.float64
        )


def default_camera(width: int, height: int) -> Camera:
    """The first guess for a camera nobody described (TartanAir's): f = width / 2, principal point in the middle."""
    return Camera(width / 2, width / 2, width / 2, height / 2, width, height)


def rays(camera: Camera, xy_px: Tensor) -> Tensor:
    """Viewing rays (..., 3) with z = 1 in camera axes, float64, of the pixels xy_px (..., 2)."""
    xy = xy_px.to(torch.float64)
    x = (xy[..., 0] - camera.cx) / camera.fx
    y = (xy[..., 1] - camera.cy) / camera.fy
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def project(camera: Camera, point_cam: Tensor) -> Tensor:
    """Pixels (..., 2) of points (..., 3) in camera axes; points at or behind the camera give meaningless numbers."""
    z = point_cam[..., 2:]
    z = torch.where(z.abs() < 1e-12, torch.full_like(z, 1e-12), z)
    xy = point_cam[..., :2] / z
    focal = torch.tensor([camera.fx, camera.fy], dtype=xy.dtype, device=xy.device)
    center = torch.tensor([camera.cx, camera.cy], dtype=xy.dtype, device=xy.device)
    return xy * focal + center


@dataclass(frozen=True)
class Convention:
    """How a pose file writes a pose.

    quaternion: order of its four numbers, "xyzw" or "wxyz". direction: "camera_to_world" (the translation is the
    camera's position) or "world_to_camera" (x_cam = R x_world + t). axes: where the file's camera axes x, y, z point
    in the image, in words, as ("forward", "right", "down").
    """

    quaternion: str
    direction: str
    axes: tuple[str, str, str]

    def file_from_cv(self) -> Tensor:
        """Signed permutation (3, 3), float64: coordinates in the file's camera axes from OpenCV's."""
        return torch.tensor([_WORD_CV[word] for word in self.axes], dtype=torch.float64)

    def describe(self) -> str:
        """One readable line, which `parse_convention` reads back."""
        return f"{self.quaternion} {self.direction} {'-'.join(self.axes)}"


TARTANAIR = Convention("xyzw", "camera_to_world", ("forward", "right", "down"))
OPENCV = Convention("xyzw", "camera_to_world", ("right", "down", "forward"))
OPENGL = Convention("xyzw", "camera_to_world", ("right", "up", "back"))
_NAMED = {"tartanair": TARTANAIR, "opencv": OPENCV, "opengl": OPENGL}


def _right_handed_axes() -> list[tuple[str, str, str]]:
    """The 24 triples of axis words that form a rotation (determinant +1)."""
    triples = itertools.permutations(_WORD_CV, 3)
    return [t for t in triples if round(np.linalg.det(np.array([_WORD_CV[w] for w in t], dtype=float))) == 1]


def all_conventions() -> list[Convention]:
    """The 96 conventions: quaternion order x direction x 24 right-handed camera axes."""
    return [
        Convention(q, d, axes)
        for q, d, axes in itertools.product(QUATERNION_ORDERS, DIRECTIONS, _right_handed_axes())
    ]


def parse_convention(text: str) -> Convention:
    """The convention a user wrote: "tartanair", "opencv", "opengl", or "xyzw camera_to_world forward-right-down".

    Raises ValueError when the text is none of these.
    """
    if text.strip().lower() in _NAMED:
        return _NAMED[text.strip().lower()]
    words = text.replace(",", " ").split()
    if len(words) == 3:
        convention = Convention(words[0], words[1], tuple(words[2].split("-")))
        if convention in all_conventions():
            return convention
    raise ValueError(
        f"convention {text!r} is not understood: use tartanair, opencv, opengl or, for example, "
        f'"{TARTANAIR.describe()}"'
    )


def rotation_from_quaternion(q_xyzw: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in order x y z w, which need not be of unit length."""
    x, y, z, w = (q_xyzw / q_xyzw.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def quaternion_from_rotation(R: Tensor) -> Tensor:
    """Unit quaternions (..., 4) in order x y z w, with w >= 0, of rotation matrices R (..., 3, 3).

    All four of Shepperd's forms are computed and the one with the largest divisor is taken, which is stable for any
    angle.
    """
    m = [[R[..., i, j] for j in range(3)] for i in range(3)]
    squares = torch.stack(
        [
            1 + m[0][0] - m[1][1] - m[2][2],
            1 - m[0][0] + m[1][1] - m[2][2],
            1 - m[0][0] - m[1][1] + m[2][2],
            1 + m[0][0] + m[1][1] + m[2][2],
        ],
        dim=-1,
    )
    xy, xz, yz = m[0][1] + m[1][0], m[0][2] + m[2][0], m[1][2] + m[2][1]
    xw, yw, zw = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    forms = torch.stack(
        [
            torch.stack([squares[..., 0], xy, xz, xw], dim=-1),
            torch.stack([xy, squares[..., 1], yz, yw], dim=-1),
            torch.stack([xz, yz, squares[..., 2], zw], dim=-1),
            torch.stack([xw, yw, zw, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )
    best = squares.argmax(dim=-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = forms.gather(-2, best).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q)


def poses_from_file(pose7, convention: Convention) -> tuple[Tensor, Tensor]:
    """R_world_from_cam (n, 3, 3) and c_world (n, 3), float64, of the rows ``tx ty tz`` + quaternion of a pose file.

    pose7 is an array or tensor (n, 7). Rows of NaN stay NaN.
    """
    pose7 = torch.as_tensor(pose7, dtype=torch.float64)
    t, q = pose7[..., :3], pose7[..., 3:]
    if convention.quaternion == "wxyz":
        q = q.roll(-1, dims=-1)
    R_file = rotation_from_quaternion(q)
    if convention.direction == "world_to_camera":
        R_file = R_file.transpose(-1, -2)
        t = -(R_file @ t[..., None]).squeeze(-1)
    return R_file @ convention.file_from_cv().to(R_file.device), t


def poses_to_file(R_world_from_cam: Tensor, c_world: Tensor, convention: Convention) -> Tensor:
    """The inverse of `poses_from_file`: rows (n, 7), float64, the quaternion with w >= 0."""
    R = R_world_from_cam.to(torch.float64) @ convention.file_from_cv().to(R_world_from_cam.device).T
    t = c_world.to(torch.float64)
    if convention.direction == "world_to_camera":
        R = R.transpose(-1, -2)
        t = -(R @ t[..., None]).squeeze(-1)
    q = quaternion_from_rotation(R)
    if convention.quaternion == "wxyz":
        q = q.roll(1, dims=-1)
    return torch.cat([t, q], dim=-1)


def _pose_row(words: list[str], where: str) -> list[float]:
    """The seven numbers of one line of a pose file, all NaN if the pose was taken away; `where` names file and line."""
    if len(words) == 1 and words[0].lower() == "nan":
        return [math.nan] * 7
    if len(words) != 7:
        raise ValueError(
            f"{where}: {len(words)} columns where 7 are needed (tx ty tz and a quaternion, or nan); correct that line"
        )
    try:
        row = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{where}: not a number in {' '.join(words)!r}; correct that line") from None
    if all(math.isnan(v) for v in row):
        return row
    if not all(math.isfinite(v) for v in row):
        raise ValueError(f"{where}: a value is not finite; write seven numbers, or nan for a pose that is not known")
    if math.hypot(*row[3:]) < 1e-6:
        raise ValueError(f"{where}: the quaternion is zero; write a unit quaternion, or nan for a pose not known")
    return row


def read_poses(path: str | Path, count: int | None = None) -> np.ndarray:
    """Rows (n, 7) float64 of a pose file: ``tx ty tz`` and a quaternion a line, NaN where the line says ``nan``.

    count: the number of images; the shorter of the two rules. Empty lines are skipped. Raises ValueError, naming file
    and line, for a missing file, a wrong number of columns, something that is no number, and a zero quaternion.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the pose file cannot be read ({type(error).__name__}); put one there") from None
    rows = [
        _pose_row(line.split(), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    return np.array(rows[:count], dtype=np.float64).reshape(-1, 7)


def read_intrinsics(path: str | Path) -> tuple[float, float, float, float]:
    """(fx, fy, cx, cy) in pixels from a file with these four numbers.

    Raises ValueError, naming the file, if it cannot be read, has other than four numbers, or a focal length is not
    positive.
    """
    path = Path(path)
    try:
        values = [float(word) for word in path.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError):
        raise ValueError(f"{path}: cannot be read as numbers; it must hold the four numbers fx fy cx cy") from None
    if len(values) != 4 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{path}: {len(values)} values found; it must hold the four numbers fx fy cx cy")
    if min(values[:2]) <= 0:
        raise ValueError(f"{path}: the focal lengths must be positive, found fx={values[0]:g}, fy={values[1]:g}")
    return tuple(values)
