"""The map of posed images: their points, what scores to expect among them, how it tested itself.

A map is built once and serves any number of queries. It is plain data, which an atlas keeps in a file.
"""

import dataclasses
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from localization.expectation import Expectation
from localization.matching import View
from localization.triangulation import Points, triangulate_views
from model import InputError

# Poses nearer than this share of the typical distance of the points, or this angle, are one mode.
SAME_MODE, SAME_MODE_DEG = 0.03, 2.0
# Answers nearer than this share of the typical distance and this angle are of one place.
SAME_PLACE, SAME_PLACE_DEG = 0.1, 10.0


@dataclass(frozen=True)
class SelfTest:
    """Errors in meters and degrees of the index images tested; how many were found, what answers
    deserve at most, whether the test proves the scene right, and how much errors exceed the standard
    deviations claimed for them, in meters and degrees."""

    errors: list[tuple[float, float]]
    found: int
    trust: float = 1.0
    vouched: bool = False
    beyond_m: float = 0.0
    beyond_deg: float = 0.0

    def describe(self) -> str:
        """One line for the screen."""
        if not self.errors:
            return "too few index images to test themselves"
        meters, degrees = (sorted(column)[len(column) // 2] for column in zip(*self.errors))
        return (
            f"index images find themselves to {meters:.4f} m, {degrees:.2f} deg: "
            f"{self.found} of {len(self.errors)}"
        )


@dataclass(frozen=True)
class Map:
    """Posed views, the points of their keypoints and their typical distance, what the views tell of
    scores, and the outcome of the map's test of itself (see self_test.py)."""

    views: list[View]
    points: list[Points]
    typical_m: float
    expected: Expectation
    test: SelfTest = SelfTest([], 0)

    @classmethod
    def build(
        cls, views: list[View], progress: Callable[[int, int], None] = lambda done, of: None
    ) -> "Map":
        """From posed views; progress(done, of) is called as pairs of them are matched."""
        views = [view.prepared() for view in views]
        points = triangulate_views(views, progress=progress)
        away = [(p.position[p.valid] - v.c_world).norm(dim=1) for v, p in zip(views, points)]
        distance_m = torch.cat(away)
        typical_m = float(distance_m.median()) if len(distance_m) else 0.0
        return cls(views, points, typical_m, Expectation.learn(views, points, typical_m))

    @property
    def same_m(self) -> float:
        """How near two poses of one mode are."""
        return SAME_MODE * self.typical_m

    @property
    def place_m(self) -> float:
        """How near two poses of one place are."""
        return SAME_PLACE * self.typical_m

    def extended(self, more: list[View]) -> "Map":
        """With further posed views, whose points are triangulated from all; all that was known
        stays.
        """
        views = self.views + more
        points = self.points + triangulate_views(views, range(len(self.views), len(views)))
        return replace(self, views=views, points=points)


def save(value: object, file: Path) -> None:
    """Write a value of dataclasses, containers, arrays and plain values whole, under a name of its
    own first: two threads or runs may write the same file.
    """
    content = io.BytesIO()  # first: of a full disk PyTorch's writer raises no OSError
    torch.save(_packed(value), content)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid4().hex}.part")
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, file)
    except OSError:
        # Windows replaces no file that another run reads at this moment: then it is there.
        if not file.exists():
            raise
    finally:
        part.unlink(missing_ok=True)


def load(file: Path, *kinds: type) -> object:
    """What `save` wrote; kinds: the dataclasses that may stand in it.

    Raises InputError for a file that cannot be read, is damaged or of another version of this
    program.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # whose sums torch.load does not look at
            if (member := archive.testzip()) is not None:
                raise ValueError(member)
        packed = torch.load(file, weights_only=True)
        return _unpacked(packed, {kind.__name__: kind for kind in kinds})
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}): name another file."
        ) from error
    except Exception as error:
        raise InputError(
            f"{file} is no map, damaged or of another version: name another file."
        ) from error


_CLASS, _ARRAY = "class", "array"


def _packed(value: object) -> object:
    """Plain containers, tensors, strings and numbers for a value, as torch.load(weights_only) takes."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _packed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_CLASS: type(value).__name__, **fields}
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value)}
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_packed(item) for item in value)
    return value


def _unpacked(value: object, kinds: dict[str, type]) -> object:
    if isinstance(value, dict) and _CLASS in value:
        fields = {name: _unpacked(item, kinds) for name, item in value.items() if name != _CLASS}
        return kinds[value[_CLASS]](**fields)
    if isinstance(value, dict) and _ARRAY in value:
        return value[_ARRAY].numpy()
    if isinstance(value, dict):
        return {key: _unpacked(item, kinds) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(item, kinds) for item in value)
    return value
