"""A tiny data set in the assignment's layout, whose positives are known."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_lists(root: Path, queries: int = 3, index: int = 6, split: str = "train") -> None:
    """A row of places 1 km apart: query i stands 5 m beside index image 2 i, 15 m beside 2 i + 1."""
    rng = np.random.default_rng(0)
    for kind, count in (("query", queries), ("index", index)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{split}{i}.jpg")
            lines.append(f"dataset/{kind}/{split}{i}.jpg")
        (root / f"{kind}_{split}.txt").write_text("\n".join(lines) + "\n")
    place = np.arange(queries)[:, None] * [1000.0, 0]
    beside = np.repeat(np.arange(index // 2)[:, None] * [1000.0, 0], 2, axis=0)
    (root / "gt").mkdir(exist_ok=True)
    np.savez(
        root / "gt" / f"pitts30k_{split}.npz", utmQ=place,
        utmDb=beside + np.tile([[0, 5.0], [0, 15.0]], (index // 2, 1)), posDistThr=25,
    )  # fmt: skip
