"""Writes tiny data sets in the assignment's layout, for the contract and bad-input tests.

Everything is written from CONTRACT.md: lists of paths that begin with `dataset/`, npz files with
`utmQ`, `utmDb`, `posDistThr`, and camera scenes of `images/*.png` with a `pose.txt`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

POS_DIST_THR_M = 25.0


def texture(seed: int, width_px: int = 96, height_px: int = 96) -> Image.Image:
    """A smooth random color pattern; two seeds give images that share nothing."""
    rng = np.random.default_rng(seed)
    cells = int(rng.integers(3, 13))
    coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)


def write_part(
    data_dir: Path,
    part: str,
    query_images: list[Image.Image],
    index_images: list[Image.Image],
    utm_query_m: np.ndarray,
    utm_index_m: np.ndarray,
) -> None:
    """Write one of train, val, test: both lists, the images and the npz, below `data_dir`."""
    for kind, images in (("query", query_images), ("index", index_images)):
        (data_dir / kind).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, image in enumerate(images):
            name = f"{kind}/{part}_{i:03d}.png"
            image.save(data_dir / name)
            lines.append(f"dataset/{name}\n")
        (data_dir / f"{kind}_{part}.txt").write_text("".join(lines), encoding="utf-8")
    (data_dir / "gt").mkdir(exist_ok=True)
    np.savez(
        data_dir / "gt" / f"pitts30k_{part}.npz",
        utmQ=np.asarray(utm_query_m, dtype=np.float64),
        utmDb=np.asarray(utm_index_m, dtype=np.float64),
        posDistThr=POS_DIST_THR_M,
    )


def write_places(data_dir: Path, n_train: int) -> None:
    """A whole data set of lone places, 400 m apart: `n_train`, 3 for val and 3 for test.

    Each place has one query and one index image, 5 m from each other, so that the places fall
    apart into any split and every query has positives and negatives.
    """
    seed = 0
    for part, n_places in (("train", n_train), ("val", 3), ("test", 3)):
        places_m = np.stack([400.0 * np.arange(n_places), np.zeros(n_places)], axis=1)
        images = []
        for _ in range(2 * n_places):
            images.append(texture(seed))
            seed += 1
        write_part(
            data_dir, part, images[:n_places], images[n_places:], places_m, places_m + [3.0, 4.0]
        )


def pose_lines(n_frames: int, seed: int) -> list[str]:
    """`tx ty tz qx qy qz qw` for a camera that moves forward and turns a little at each frame."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n_frames):
        quaternion = np.append(rng.normal(0.0, 0.2, 3), 1.0)
        quaternion /= np.linalg.norm(quaternion)
        position_m = np.array([0.4 * i, 0.0, 0.0]) + rng.normal(0.0, 0.1, 3)
        lines.append(" ".join(f"{v:.9f}" for v in (*position_m, *quaternion)))
    return lines


def write_scene(
    camera_dir: Path, scene: str, n_frames: int, seed: int, size_px: tuple[int, int] = (96, 72)
) -> list[str]:
    """One scene of `camera/`; returns the lines of its pose.txt."""
    images_dir = camera_dir / scene / "images"
    images_dir.mkdir(parents=True)
    for i in range(n_frames):
        texture(1000 * seed + i, *size_px).save(images_dir / f"{i:06d}_left.png")
    lines = pose_lines(n_frames, seed)
    (camera_dir / scene / "pose.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
