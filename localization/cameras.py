"""Cameras, and the conventions in which files write poses.

Inside this project a pose is ``R_world_from_cam`` (3, 3) and ``c_world`` (3,) in float64, with
OpenCV's camera axes (x right, y down, z forward). A pose file may use any quaternion order,
direction and camera axes; a `Convention` says which, and `poses_from_file` / `poses_to_file`
convert once, at the file boundary. Pixels have the center of the top-left pixel at (0, 0), so
that the middle of an image is ((W - 1) / 2, (H - 1) / 2); COLMAP and whoever counts from the
corner of that pixel write principal points 0.5 px larger.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from localization.absolute_pose import skew
from model import InputError

QUATERNION_ORDERS = ("xyzw", "wxyz")
DIRECTIONS = ("camera_to_world", "world_to_camera")
# What tools also write, and nobody means to: the quaternion before the translation; a rotation from
# the world to the camera beside the position of the camera.
_FIRST, _AT_POSITION = "-first", "world_to_camera_at_position"

_NEWTON_STEPS = 8

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
    """Focal lengths, principal point and image size in pixels, and distortion (0: a pinhole).

    A point at (x, y) = (X / Z, Y / Z), r^2 = x^2 + y^2, is seen at f ((1 + k1 r^2 + k2 r^4) (x, y)
    + (2 p1 x y + p2 (r^2 + 2 x^2), p1 (r^2 + 2 y^2) + 2 p2 x y)) + c (Brown; OpenCV's k1, k2, p1,
    p2, COLMAP's OPENCV).
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def matrix(self) -> Tensor:
        """The calibration matrix K (3, 3), float64."""
        return torch.tensor(
            [[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]], dtype=torch.float64
        )

    def describe(self) -> str:
        """Its lens in words."""
        radial = f" k1 {self.k1:.3f}" if self.k1 else ""
        center = f"center {self.cx:.1f} {self.cy:.1f} px"
        return f"f {self.fx:.1f} {self.fy:.1f} {center}{radial}"

    def pinhole(self) -> "Camera":
        """This camera without its distortion."""
        return replace(self, k1=0.0, k2=0.0, p1=0.0, p2=0.0)


def default_camera(width: int, height: int) -> Camera:
    """The first guess for a camera nobody described: TartanAir's, f = width / 2, center (W / 2, H
    / 2).
    """
    return Camera(width / 2, width / 2, width / 2, height / 2, width, height)


def turned(camera: Camera, quarter_turns: int) -> Camera:
    """The camera of an image that was turned clockwise by so many quarter turns."""
    for _ in range(quarter_turns % 4):
        camera = replace(
            camera,
            fx=camera.fy,
            fy=camera.fx,
            cx=camera.height - 1 - camera.cy,
            cy=camera.cx,
            width=camera.height,
            height=camera.width,
            p1=camera.p2,
            p2=-camera.p1,
        )
    return camera


def camera_for(camera: Camera, width: int, height: int, quarter_turns: int = 0) -> Camera:
    """A camera's lens on an image of another size, turned clockwise by so many quarter turns
    first.

    The focal lengths go with the longer side. An image that stands upright where the camera's
    lies (or the other way round), though no odd turn is given, was turned nobody knows which way:
    its center is taken in the middle.
    """
    lens = turned(camera, quarter_turns)
    unknown_turn = (lens.width - lens.height) * (width - height) < 0
    if unknown_turn:
        lens = replace(turned(lens, 1), cx=(lens.height - 1) / 2, cy=(lens.width - 1) / 2)
    if (width, height) == (lens.width, lens.height):
        return lens
    scale = max(width, height) / max(lens.width, lens.height)
    center_x = (lens.cx + 0.5) * width / lens.width - 0.5
    center_y = (lens.cy + 0.5) * height / lens.height - 0.5
    size = {"width": width, "height": height}
    return replace(lens, fx=lens.fx * scale, fy=lens.fy * scale, cx=center_x, cy=center_y, **size)


def undistorted(xy: Tensor, k1: Tensor | float, k2: Tensor | float) -> Tensor:
    """Ideal (x, y) (..., 2) of distorted normalized ones: Newton's method on r (1 + k1 r^2 + k2
    r^4).

    Where no radius is seen that far out, the position stays about as it is.
    """
    seen = xy.norm(dim=-1, keepdim=True)
    r = seen.clone()
    for _ in range(_NEWTON_STEPS):
        r2 = r.square()
        slope = (1 + 3 * k1 * r2 + 5 * k2 * r2.square()).clamp_min(0.1)
        r = (r - (r * (1 + k1 * r2 + k2 * r2.square()) - seen) / slope).clamp_min(0)
    return torch.where(r < 2 * seen, xy * (r / seen.clamp_min(1e-12)), xy)


def _tangential(camera: Camera, xy: Tensor) -> Tensor:
    """The shift (..., 2) of normalized (x, y) (..., 2) by p1 and p2."""
    x, y = xy.unbind(-1)
    r2, xy2 = x * x + y * y, 2 * x * y
    shift_x = camera.p1 * xy2 + camera.p2 * (r2 + 2 * x * x)
    return torch.stack([shift_x, camera.p1 * (r2 + 2 * y * y) + camera.p2 * xy2], -1)


def homogeneous(xy: Tensor) -> Tensor:
    """Rays (..., 3) with z = 1 of normalized coordinates (..., 2)."""
    return torch.cat([xy, torch.ones_like(xy[..., :1])], -1)


def rays(camera: Camera, xy_px: Tensor) -> Tensor:
    """Viewing rays (..., 3) with z = 1 in camera axes, float64, of the pixels xy_px (..., 2)."""
    xy = xy_px.to(torch.float64)
    xy = torch.stack(
        [(xy[..., 0] - camera.cx) / camera.fx, (xy[..., 1] - camera.cy) / camera.fy], -1
    )
    seen = xy
    if camera.k1 or camera.k2:
        xy = undistorted(seen, camera.k1, camera.k2)
    if camera.p1 or camera.p2:
        for _ in range(_NEWTON_STEPS):
            xy = undistorted(seen - _tangential(camera, xy), camera.k1, camera.k2)
        xy = torch.where(xy.isfinite(), xy, seen)  # where no lens is bent that far
    return homogeneous(xy)


def project(camera: Camera, point_cam: Tensor) -> Tensor:
    """Pixels (..., 2) of points (..., 3) in camera axes; points at or behind the camera give
    meaningless numbers.

    Beyond the radius at which the distortion turns back it is left out: such a point is outside
    the image.
    """
    z = point_cam[..., 2:]
    z = torch.where(z.abs() < 1e-12, torch.full_like(z, 1e-12), z)
    xy = point_cam[..., :2] / z
    if camera != camera.pinhole():
        r2 = xy.square().sum(-1, keepdim=True)
        rising = 1 + 3 * camera.k1 * r2 + 5 * camera.k2 * r2.square() > 0
        bent = xy * (1 + camera.k1 * r2 + camera.k2 * r2.square()) + _tangential(camera, xy)
        xy = torch.where(rising, bent, xy)
    focal = torch.tensor([camera.fx, camera.fy], dtype=xy.dtype)
    center = torch.tensor([camera.cx, camera.cy], dtype=xy.dtype)
    return xy * focal + center


@dataclass(frozen=True)
class Convention:
    """How a pose file writes a pose.

    quaternion: order of its four numbers, "xyzw" or "wxyz"; "xyzw-first" and "wxyz-first" where
    it stands before the translation. direction: "camera_to_world" (the translation is the
    camera's position), "world_to_camera" (x_cam = R x_world + t) or, a mixture,
    "world_to_camera_at_position" (R as in the second, the translation as in the first). axes:
    where the file's camera axes x, y, z point in the image, in words, as ("forward", "right",
    "down"); a left-handed triple says that the file's world is left-handed too (Unity, Unreal).
    """

    quaternion: str
    direction: str
    axes: tuple[str, str, str]

    def file_from_cv(self) -> Tensor:
        """Signed permutation (3, 3), float64: coordinates in the file's camera axes from
        OpenCV's.
        """
        return torch.tensor([_WORD_CV[word] for word in self.axes], dtype=torch.float64)

    def world_from_file(self) -> Tensor:
        """Diagonal (3, 3), float64: a left-handed world is mirrored in its third axis, others
        stay.
        """
        handed = torch.det(self.file_from_cv()).round()
        return torch.diag(torch.stack([handed.new_ones(()), handed.new_ones(()), handed]))

    def describe(self) -> str:
        """One readable line, which `parse_convention` reads back."""
        return f"{self.quaternion} {self.direction} {'-'.join(self.axes)}"

    def unusual(self) -> str:
        """What nobody means to write about it, in words, or ""."""
        told = {
            "left-handed": float(torch.det(self.file_from_cv())) < 0,
            "the quaternion before the position": self.quaternion.endswith(_FIRST),
            "rotations of the other direction than the positions": self.direction == _AT_POSITION,
        }
        return ", ".join(what for what, holds in told.items() if holds)

    def plain(self) -> "Convention":
        """The same axes with the translation first and camera to world."""
        quaternion = self.quaternion.removesuffix(_FIRST)
        return replace(self, quaternion=quaternion, direction="camera_to_world")


TARTANAIR = Convention("xyzw", "camera_to_world", ("forward", "right", "down"))
OPENCV = Convention("xyzw", "camera_to_world", ("right", "down", "forward"))
OPENGL = Convention("xyzw", "camera_to_world", ("right", "up", "back"))
_NAMED = {"tartanair": TARTANAIR, "opencv": OPENCV, "opengl": OPENGL}


def _axes(determinant: int) -> list[tuple[str, str, str]]:
    """The 24 triples of axis words of this determinant: +1 right-handed, -1 left-handed."""
    triples = itertools.permutations(_WORD_CV, 3)
    return [
        t
        for t in triples
        if round(np.linalg.det(np.array([_WORD_CV[w] for w in t], dtype=float))) == determinant
    ]


def all_conventions() -> list[Convention]:
    """The 96 usual conventions: quaternion order x direction x 24 right-handed camera axes."""
    product = itertools.product(QUATERNION_ORDERS, DIRECTIONS, _axes(1))
    return [Convention(*words) for words in product]


def unusual_conventions() -> list[Convention]:
    """240 more: left-handed axes; the quaternion before the translation; rotation and position
    mixed up.
    """
    first = [order + _FIRST for order in QUATERNION_ORDERS]
    products = (
        itertools.product(QUATERNION_ORDERS, DIRECTIONS, _axes(-1)),
        itertools.product(first, DIRECTIONS, _axes(1)),
        itertools.product(QUATERNION_ORDERS, [_AT_POSITION], _axes(1)),
    )
    return [Convention(*words) for words in itertools.chain(*products)]


def parse_convention(text: str) -> Convention:
    """The convention a user wrote: "tartanair", "opencv", "opengl", or "xyzw camera_to_world
    forward-right-down".

    Raises InputError when the text is none of these.
    """
    if text.strip().lower() in _NAMED:
        return _NAMED[text.strip().lower()]
    words = text.lower().replace(",", " ").split()
    if len(words) == 3:
        convention = Convention(words[0], words[1], tuple(words[2].split("-")))
        if convention in [*all_conventions(), *unusual_conventions()]:
            return convention
    raise InputError(
        f"--convention {text} is none: give tartanair, opencv, opengl or, for example, "
        f'"{TARTANAIR.describe()}".'
    )


def rotation_from_quaternion(q_xyzw: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in order x y z w, which need not be
    of unit length.
    """
    q = q_xyzw / q_xyzw.norm(dim=-1, keepdim=True)
    v, w = q[..., :3], q[..., 3, None, None]
    product = v[..., :, None] * v[..., None, :] + w * skew(v)
    return 2 * product + (2 * w * w - 1) * torch.eye(3, dtype=q.dtype)


def quaternion_from_rotation(R: Tensor) -> Tensor:
    """Unit quaternions (..., 4) in order x y z w, with w >= 0, of rotation matrices R (..., 3,
    3).

    All four of Shepperd's forms are computed and the one with the largest divisor is taken, which
    is stable for any angle.
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
    """R_world_from_cam (n, 3, 3) and c_world (n, 3), float64, of the rows of a pose file.

    pose7: array or tensor (n, 7), ``tx ty tz`` + quaternion unless the convention says otherwise.
    A left-handed file is mirrored: its rotations as S R C, its positions as S c. Rows of NaN stay
    NaN.
    """
    pose7 = torch.as_tensor(pose7, dtype=torch.float64)
    if convention.quaternion.endswith(_FIRST):
        pose7 = pose7.roll(3, dims=-1)
    t, q = pose7[..., :3], pose7[..., 3:]
    if convention.quaternion.startswith("wxyz"):
        q = q.roll(-1, dims=-1)
    R_file = rotation_from_quaternion(q)
    if convention.direction != "camera_to_world":
        R_file = R_file.transpose(-1, -2)
    if convention.direction == "world_to_camera":
        t = -(R_file @ t[..., None]).squeeze(-1)
    mirror = convention.world_from_file()
    return mirror @ R_file @ convention.file_from_cv(), t @ mirror


def poses_to_file(R_world_from_cam: Tensor, c_world: Tensor, convention: Convention) -> Tensor:
    """The inverse of `poses_from_file`: rows (n, 7), float64, the quaternion with w >= 0."""
    mirror = convention.world_from_file()
    R = mirror @ R_world_from_cam.double() @ convention.file_from_cv().T
    t = c_world.double() @ mirror
    if convention.direction != "camera_to_world":
        R = R.transpose(-1, -2)
    if convention.direction == "world_to_camera":
        t = -(R @ t[..., None]).squeeze(-1)
    q = quaternion_from_rotation(R)
    if convention.quaternion.startswith("wxyz"):
        q = q.roll(1, dims=-1)
    pose7 = torch.cat([t, q], dim=-1)
    return pose7.roll(-3, dims=-1) if convention.quaternion.endswith(_FIRST) else pose7


def as_camera_to_world(pose7: np.ndarray, convention: Convention) -> np.ndarray:
    """(7,) in the same convention but for the direction, which becomes camera to world."""
    return poses_to_file(*poses_from_file(pose7[None], convention), convention.plain())[0].numpy()
