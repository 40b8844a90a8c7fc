"""Poses of versions of a query: half the size, turned, cut, zoomed, squeezed, stretched, one by one.

    python tests/bench/versions.py ../shared/data/camera CHECKPOINT --scenes castle fountain

A few frames of each scene are taken out and become the queries; nothing is said of their lenses. Wrong
is farther than 25 cm or 2 degrees from the truth (of a turned picture: about its axis too). To reach:
none wrong with a confidence of 0.5 or more.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import test as task4
from localization.absolute_pose import angle_deg, rotation_from_vector
from localization.cameras import poses_from_file
from localization.frames import IndoorDataset
from localization.localize import RIGHT_DEG, RIGHT_M
from localization.search import SURE

QUARTERS = {"turned 90": 1, "turned 180": 2}


def versions(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures."""
    (w, h), resize = image.size, Image.Resampling.BICUBIC

    def cut(times: float, right: float = 0.0, down: float = 0.0) -> Image.Image:
        size = np.array([w, h]) / times
        low = ((w, h) - size) / 2 * (1 + np.array([right, down]))
        return image.crop((*low.round().astype(int), *(low + size).round().astype(int)))

    yield "plain", image
    yield "half", image.resize((w // 2, h // 2), Image.Resampling.LANCZOS)
    yield "cut", cut(1.4)
    yield "cut beside", cut(1.4, 0.7, -0.6)
    yield "zoomed 1.4", cut(1.4).resize((w, h), resize)
    yield "zoomed 1.8", cut(1.8).resize((w, h), resize)
    yield "stretched", image.resize((w * 5 // 4, h), resize)
    yield "squeezed", image.resize((w * 3 // 4, h), resize)
    yield "turned 90", image.transpose(Image.Transpose.ROTATE_90)
    yield "turned 180", image.transpose(Image.Transpose.ROTATE_180)


def measure(camera: Path, scene: str, count: int, checkpoint: Path, folder: Path) -> np.ndarray:
    """Answers, wrong ones, wrong and sure ones, right and unsure ones of a scene."""
    frames = IndoorDataset(camera, scenes=[scene])
    rows = [int((k + 0.5) * len(frames) / count) for k in range(count)]
    files = {}
    for row in rows:
        with Image.open(frames.frames[row][0]) as image:
            for name, picture in versions(image.convert("RGB")):
                files[folder / f"{row} {name}.png"] = (row, name)
                picture.save(folder / f"{row} {name}.png")
    model = task4.load_any(checkpoint)
    paths = [frames.frames[row][0] for row in range(len(frames))] + list(files)
    views, descriptors, _ = task4.look_at(
        paths, [], model, torch.device("cpu"), None, {}, lambda *_: None
    )
    index = [row for row in range(len(frames)) if row not in rows]
    atlas = frames.atlas(index, views, descriptors, seed=42, progress=lambda *_: None)
    calibration, total = atlas.calibrations[scene], np.zeros(4, int)
    for k, (row, name) in enumerate(files.values(), len(frames)):
        view = calibration.applied(views[k])
        (found,) = atlas.localize([view], [scene], descriptors[k : k + 1], top_k=30, seed=42)
        R, c = poses_from_file(frames.poses[row], calibration.convention)
        turn = torch.tensor([0.0, 0.0, QUARTERS.get(name, 0) * np.pi / 2], dtype=torch.float64)
        meters = float((found.c_world - c).norm())
        degrees = min(
            float(angle_deg(found.R_world_from_cam.T @ R @ rotation_from_vector(sign * turn)))
            for sign in (1, -1)
        )
        wrong, sure = meters > RIGHT_M or degrees > RIGHT_DEG, found.confidence >= SURE
        total += [1, wrong, wrong and sure, not wrong and not sure]
        if wrong or not sure:
            said = "wrong" if wrong else "unsure"
            print(
                f"  {row:4d} {name:11s} {meters:7.3f} m {degrees:6.2f} deg, sigma {found.sigma_m:.3f} m, "
                f"{found.inliers} inliers, confidence {found.confidence:.2f}: {said}",
                flush=True,
            )
    print(f"{scene}: {total[0]} answers, {total[1]} wrong, {total[2]} of them sure, {total[3]} right but unsure")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("camera", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", nargs="+")
    parser.add_argument("--queries", type=int, default=4)
    args = parser.parse_args()
    total = np.zeros(4, int)
    for scene in args.scenes or IndoorDataset(args.camera).scenes:
        folder = Path(tempfile.mkdtemp())
        try:
            total += measure(args.camera, scene, args.queries, args.checkpoint, folder)
        finally:
            shutil.rmtree(folder)
    print("all: {} answers, {} wrong, {} of them sure, {} right but unsure".format(*total))


if __name__ == "__main__":
    main()
