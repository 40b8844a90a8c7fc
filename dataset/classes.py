"""Images as classes of a place and a direction, and groups of classes that are no neighbors (CosPlace).

Berton et al., "Rethinking Visual Geo-localization for Large-Scale Applications", CVPR 2022, section 3.1.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model import InputError

CIRCLE_DEG = 360


@dataclass(frozen=True)
class Grid:
    """M: meters a side of a class's cell. alpha: degrees of its directions. N, L: two classes of one
    group are at least M (N - 1) meters or alpha (L - 1) degrees apart. at_least: images of a class.

    InputError where one is less than 1, or the directions of a group would meet again after a full turn.
    """

    M: int = 10
    alpha: int = 30
    N: int = 5
    L: int = 2
    at_least: int = 10

    def __post_init__(self) -> None:
        flags = {"M": self.M, "alpha": self.alpha, "N": self.N, "L": self.L}
        for name, value in {**flags, "min_images_per_class": self.at_least}.items():
            if value < 1:
                raise InputError(f"--{name} {value}: give a whole number of 1 or more.")
        if CIRCLE_DEG % (self.alpha * self.L):
            raise InputError(
                f"--alpha {self.alpha} times --L {self.L} does not divide 360: classes on both sides "
                "of north would be neighbors in one group; choose others, as 30 and 2."
            )

    def cells(self, utm: np.ndarray, headings_deg: np.ndarray) -> np.ndarray:
        """(n, 3) whole numbers of the classes of positions (n, 2) and headings (n,): east, north, sector."""
        sector = np.floor(np.mod(headings_deg, CIRCLE_DEG) / self.alpha)
        return np.column_stack([np.floor(np.asarray(utm) / self.M), sector]).astype(np.int64)

    def groups(self, cells: np.ndarray) -> np.ndarray:
        """(n, 3) groups of classes (n, 3)."""
        return np.mod(cells, [self.N, self.N, self.L])


@dataclass(frozen=True)
class Classes:
    """groups: of each group, by first appearance, its classes: the rows of their images.

    sizes: images of each class of `cells`, also of those with too few. cells (c, 3): see Grid.
    """

    groups: list[list[np.ndarray]]
    cells: np.ndarray
    sizes: np.ndarray


def find_classes(
    utm: np.ndarray, headings_deg: Sequence[float | None], names: Sequence[object], grid: Grid
) -> Classes:
    """The classes of images with at least grid.at_least of them, by group.

    InputError naming the first image without a heading, or if no class is large enough.
    """
    empty = [str(name) for name, heading in zip(names, headings_deg) if heading is None]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(names)} images have no heading in their names, the first is "
            f"{empty[0]}: write degrees into the tenth piece between the @ (0 in all for one "
            "direction a place)."
        )
    cells = grid.cells(utm, np.array(headings_deg, dtype=float))
    found, first, of_image = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    of_image = of_image.reshape(-1)  # numpy 2.0 gives a column
    sizes = np.bincount(of_image, minlength=len(found))
    rows = np.split(np.argsort(of_image, kind="stable"), np.cumsum(sizes)[:-1])
    groups: dict[tuple, list[np.ndarray]] = {}
    for number in np.argsort(first):
        if sizes[number] >= grid.at_least:
            key = tuple(grid.groups(found[number][None])[0])
            groups.setdefault(key, []).append(rows[number])
    if not groups:
        raise InputError(
            f"none of the {len(found)} classes has {grid.at_least} images, the largest has "
            f"{sizes.max()}: lower --min_images_per_class or raise --M or --alpha."
        )
    return Classes(list(groups.values()), found, sizes)


def histogram(values: Sequence[int]) -> dict[int, int]:
    """How often each number occurs, in order."""
    return dict(sorted(Counter(map(int, values)).items()))
