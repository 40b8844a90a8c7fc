"""COLMAP's models in binary: cameras.bin and images.bin (src/colmap/scene/reconstruction_io.cc).

Little-endian, without padding; the points that an image sees are passed over.
"""

import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np

from localization.cameras import Camera
from localization.lens_files import COLMAP_MODELS, colmap_camera
from localization.pose_rows import PoseRow, colmap_pose
from model import InputError

_POINT = struct.calcsize("<ddq")  # x, y, number of the 3D point


class _Reader:
    """The bytes of a file from front to back; InputError where they end too early."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}).") from None

    def take(self, form: str) -> tuple:
        """The next values of a struct format."""
        self.skip(size := struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, self.at - size)

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        if self.at + size > len(self.data):
            raise self.damaged(f"ends after {len(self.data)} bytes, in the middle of an entry")
        self.at += size

    def name(self) -> str:
        """A text up to the next zero byte."""
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise self.damaged("ends in the middle of a name")
        text = self.data[self.at : end].decode("utf-8", "surrogateescape")
        self.at = end + 1
        return text

    def end(self) -> None:
        """Nothing may follow."""
        if self.at != len(self.data):
            raise self.damaged(f"goes on after its last entry, at byte {self.at}")

    def damaged(self, how: str) -> InputError:
        return InputError(
            f"{self.path} {how}: it is damaged, or no binary model of COLMAP; export it again."
        )


def binary_images(path: Path) -> list[PoseRow]:
    """The poses of an images.bin, world to camera, each with its name and its camera."""
    file, rows = _Reader(path), []
    (count,) = file.take("Q")
    for number in range(1, count + 1):
        _, qw, qx, qy, qz, *t, camera = file.take("I7dI")
        name = file.name()
        (points,) = file.take("Q")
        file.skip(points * _POINT)
        values = np.array([*t, qx, qy, qz, qw])
        rows.append(colmap_pose(f"{path}, image {number}", number, values, name, str(camera)))
    file.end()
    return rows


def binary_cameras(path: Path, used: Collection[str] | None) -> dict[str, Camera]:
    """Number -> camera of a cameras.bin, as far as they are used; None for all, one at least."""
    file, cameras = _Reader(path), {}
    (count,) = file.take("Q")
    for _ in range(count):
        number, model, width, height = file.take("IiQQ")
        if not 0 <= model < len(COLMAP_MODELS):
            raise file.damaged(f"has a camera {number} of the unknown model {model}")
        name, (parameters, _) = list(COLMAP_MODELS.items())[model]
        values = file.take(f"{parameters}d")
        if used is None or str(number) in used:
            where = f"{path}, camera {number}"
            cameras[str(number)] = colmap_camera(where, name, (width, height), values)
    file.end()
    if not cameras and used is None:
        raise InputError(f"{path} describes no camera: export it again from COLMAP.")
    return cameras
