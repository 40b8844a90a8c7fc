"""Task 4's frames: the images of scenes with the rows of their pose files, in one list."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from eval import load_image
from localization.atlas import Atlas, build_atlas
from localization.cameras import Camera, Convention
from localization.lens_files import given_camera
from localization.localize import Estimate
from localization.matching import View
from localization.pose_files import SceneFiles, read_scene
from model import InputError

ASSIGNED_SCENES = ("P001", "P002", "P003", "P004")


class IndoorDataset(Dataset):
    """Posed frames of scenes: item (image, pose float32 (7,), path, scene, frame index).

    base_dir: holds `<scene>/images/*.png` and `<scene>/pose.txt`, a line an image in sorted order;
    the shorter of the two rules. What else is read: localization/pose_files.py. scenes: their names;
    None takes the assignment's four, or all that are there if one of them is missing. transform:
    applied to the RGB image; None leaves it a PIL image. `poses` holds the 7 numbers in float64, NaN
    where they were removed, `files` what each scene's files say besides, `camera` and `convention`
    what was said of all scenes, and counts instead.
    Raises InputError for a scene that is not there, has no image or no readable pose.txt.
    """

    camera: Camera | None = None
    convention: Convention | None = None

    def __init__(
        self, base_dir: Path | str, transform: Callable | None = None,
        scenes: list[str] | None = None,
    ) -> None:  # fmt: skip
        base_dir = Path(base_dir)
        self.scenes = named_scenes(base_dir, scenes) if scenes else find_scenes(base_dir)
        self.transform = transform
        self.frames: list[tuple[Path, str, int]] = []
        self.files: dict[str, SceneFiles] = {}
        poses = []
        for scene in self.scenes:
            folder = base_dir / scene / "images"
            if not folder.is_dir():
                there = ", ".join(_scenes_in(base_dir)) or "none"
                raise InputError(
                    f"{folder} is not there: the scenes under {base_dir} are: {there}."
                )
            self.files[scene] = files = read_scene(base_dir / scene)
            self.frames += [(path, scene, i) for i, path in enumerate(files.paths)]
            poses.append(files.poses)
        self.poses = np.concatenate(poses)

    @classmethod
    def of_map(cls, atlas: Atlas) -> "IndoorDataset":
        """The index images of a map, whose files need not be there."""
        frames = cls.__new__(cls)
        frames.scenes, frames.transform, frames.files = list(atlas.calibrations), None, {}
        frames.frames = [
            (Path(p), s, i) for i, (p, s) in enumerate(zip(atlas.paths, atlas.scene_of))
        ]
        frames.poses = atlas.poses.copy()
        return frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple:
        path, scene, frame = self.frames[i]
        image = load_image(path)
        image = self.transform(image) if self.transform else image
        return image, torch.tensor(self.poses[i], dtype=torch.float32), str(path), scene, frame

    def lens_of(self, row: int) -> Camera | None:
        """The camera of a frame whose scene tells several."""
        path, scene, _ = self.frames[row]
        if self.camera or scene not in self.files:
            return None
        return self.files[scene].lenses.get(path)

    def atlas(
        self,
        index: list[int],
        views: list[View],
        descriptors: np.ndarray,
        *,
        seed: int,
        progress: Callable[[str, int, int], None],
    ) -> Atlas:
        """Cameras and maps from the rows `index`; poses and views (one a frame) get what is found out."""
        paths, scene_of, _ = zip(*self.frames)
        return build_atlas(
            paths,
            scene_of,
            self.poses,
            views,
            descriptors,
            index,
            {scene: self.camera or files.camera for scene, files in self.files.items()},
            {scene: self.convention or files.convention for scene, files in self.files.items()},
            [self.lens_of(row) for row in range(len(self))],
            seed=seed,
            progress=progress,
        )

    def localize(
        self,
        queries: Sequence[int],
        atlas: Atlas,
        views: list[View],
        descriptors: np.ndarray,
        intrinsics: Sequence[float] | None = None,
        **how,
    ) -> list[Estimate | None]:
        """An estimate for each row of `queries`, see `Atlas.localize`; views (one a query) get the cameras
        they were found to be taken with. intrinsics: fx, fy, cx, cy of all, where these are known.
        """
        scene_of = [self.frames[row][1] for row in queries]
        for k, (row, scene) in enumerate(zip(queries, scene_of)):
            views[k] = atlas.calibrations[scene].applied(views[k], self.lens_of(row))
            if intrinsics:
                own = views[k].camera
                lens = given_camera("--query-intrinsics", intrinsics, (own.width, own.height))
                views[k] = replace(views[k], camera=lens, lens_is_sure=True)
        estimates = atlas.localize(views, scene_of, descriptors, **how)
        for k, (row, estimate) in enumerate(zip(queries, estimates)):
            if estimate and estimate.camera:
                views[k] = replace(views[k], camera=estimate.camera)
                name = self.frames[row][0].name
                print(f"{name} has a lens of its own: {estimate.camera.describe()}.")
        return estimates

    def keep(self, rows: list[int], *parts: list[int]) -> list[list[int]]:
        """Reduce the data set to these rows; -> the new rows of each of `parts`, as far as they are kept."""
        self.frames, self.poses = [self.frames[row] for row in rows], self.poses[rows]
        new = {row: i for i, row in enumerate(rows)}
        return [[new[row] for row in part if row in new] for part in parts]

    def add_queries(self, paths: list[Path]) -> list[int]:
        """Append new images, whose scene and pose are unknown; -> their rows."""
        first = len(self.frames)
        self.frames += [(path, "", i) for i, path in enumerate(paths)]
        self.poses = np.concatenate([self.poses, np.full((len(paths), 7), np.nan)])
        return list(range(first, len(self.frames)))

    def place_queries(self, queries: list[int], index: list[int], best: np.ndarray) -> None:
        """Give new images the scenes of their most similar index images, best (queries, 1)."""
        for row, (match,) in zip(queries, best):
            path, _, number = self.frames[row]
            self.frames[row] = (path, self.frames[index[match]][1], number)


def _scenes_in(base_dir: Path) -> list[str]:
    return (
        sorted(p.name for p in base_dir.iterdir() if (p / "images").is_dir())
        if base_dir.is_dir()
        else []
    )


def named_scenes(base_dir: Path, names: Sequence[str]) -> list[str]:
    """The scenes of these names, each once however it is written: `hall/` and `./hall` are `hall`.

    InputError for a folder that is not below `base_dir`: pictures are named by their scene.
    """
    found = {}
    for name in names:
        if not name.strip():
            raise InputError("--scenes names an empty scene: name folders of --camera.")
        inside = Path(os.path.normpath(name))
        if inside.is_absolute() and inside.is_relative_to(base_dir.absolute()):
            inside = inside.relative_to(base_dir.absolute())
        if inside.is_absolute() or inside.parts[:1] in ((), ("..",)):
            folder = (base_dir / name).resolve()
            raise InputError(
                f"the scene {name} is no folder in {base_dir}: give --camera {folder.parent} "
                f"--scenes {folder.name}."
            )
        found.setdefault((base_dir / inside).resolve(), inside.as_posix())
    return list(found.values())


def find_scenes(base_dir: Path) -> list[str]:
    """The assignment's four scenes if all are there, else all found, saying so. InputError if none."""
    found = _scenes_in(base_dir)
    if set(ASSIGNED_SCENES) <= set(found):
        return list(ASSIGNED_SCENES)
    if not found:
        deeper = next(base_dir.glob("*/*/images"), None)
        hint = f", but there is {deeper.parent}: name {deeper.parents[1]}" if deeper else ""
        if (base_dir / "images").is_dir():
            here = base_dir.resolve()
            hint = f", but is one itself: give --camera {here.parent} --scenes {here.name}"
        raise InputError(f"{base_dir} holds no scene (<scene>/images/, <scene>/pose.txt){hint}.")
    print(
        f"Scenes: not all of {' '.join(ASSIGNED_SCENES)} are in {base_dir}; taking {' '.join(found)}."
    )
    return found
