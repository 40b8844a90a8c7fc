"""The atlas: what the index images of some scenes tell, kept in a file and found again.

It holds the calibration of each scene and a map of each world, so that queries need none of the
images.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from localization.calibration import Calibration
from localization.cameras import Camera, Convention
from localization.expectation import Expectation
from localization.feature_cache import touch
from localization.features import Features
from localization.localize import Estimate, build_map, localize
from localization.map import Map, SelfTest, load, save
from localization.matching import View
from localization.posed_pairs import StillCells
from localization.scenes import calibrate_scenes, worlds_of
from localization.self_test import false_poses
from localization.triangulation import Points
from model import InputError, warn

# Points that lie farther than this from the images that show them, or all nearer, are hardly in meters.
FAR_M, NEAR_M = 300.0, 0.1
_UNIT = (
    "its points lie {:.3g} m from the images that show them, if poses are in meters: are they in another "
    "unit? Confidence tells how likely errors are below 0.25 of it"
)
_NONE_FOUND = (
    "none of the index images that were left out in turn is found where its pose says, and no answer is "
    "trusted: do poses, lens and images belong together, and do the images overlap?"
)
_FALSE = (
    "the pose of {} contradicts the image, which by its matches was taken {:.2f} m and {:.1f} deg from "
    "there (unless two places look alike): it is left out of the map"
)


@dataclass(frozen=True)
class World:
    """Scenes of one world, the rows of their index images in the atlas, and the map of them."""

    scenes: list[str]
    rows: list[int]
    map: Map


@dataclass
class Atlas:
    """All that the n index images of some scenes tell, and what it was made of.

    paths, scene_of: of each image; poses (n, 7): their rows in the pose files; descriptors (n, d)
    by which the like of an image is found; views, posed; calibrations: of each scene; worlds; key:
    of all that went into it; checkpoint: of the network that made the descriptors.
    """

    paths: list[str]
    scene_of: list[str]
    poses: np.ndarray
    descriptors: np.ndarray
    views: list[View]
    calibrations: dict[str, Calibration]
    worlds: list[World]
    key: str = ""
    checkpoint: str = ""

    @property
    def conventions(self) -> dict[str, Convention]:
        """How the poses of each scene are written."""
        return {scene: found.convention for scene, found in self.calibrations.items()}

    @property
    def root(self) -> Path | None:
        """The folder of the scenes where it was made, if its images lay as in the assignment."""
        path, inside = Path(self.paths[0]), (*Path(self.scene_of[0]).parts, "images")
        folders = (p.parts for p in path.parents if p.parts[-len(inside) :] == inside)
        return next((Path(*parts[: -len(inside)]) for parts in folders), None)

    @classmethod
    def load(cls, file: Path) -> "Atlas":
        """What `keep` wrote; InputError for any other file."""
        kinds = (Features, View, Camera, Convention, StillCells, Calibration)
        found = load(file, cls, World, Map, SelfTest, Points, Expectation, *kinds)
        if not isinstance(found, cls):
            raise InputError(f"{file} is no map: name another file.")
        return found

    def keep(self, file: Path) -> None:
        """Write it whole, and say so; a warning where that cannot be."""
        try:
            save(self, file)
            print(f"Map of the index images: {file}, {file.stat().st_size / 1e6:.0f} MB")
        except OSError as error:
            warn(f"the map cannot be kept in {file} ({error.strerror or error}).")

    def tell(self) -> None:
        """Print what it says of its scenes, and warn."""
        for scene, calibration in self.calibrations.items():
            print(f"Camera of {scene}: {calibration.describe()}")
            for sentence in calibration.warnings:
                warn(f"{scene}: {sentence}" + "." * (not sentence.endswith("?")))
        for world in self.worlds:
            print(f"Map of {' '.join(world.scenes)}: {world.map.test.describe()}.")

    def localize(
        self,
        views: list[View],
        scene_of: Sequence[str],
        descriptors: np.ndarray,
        *,
        top_k: int,
        seed: int,
        progress: Callable[[str, int, int], None] = lambda name, done, of: None,
    ) -> list[Estimate | None]:
        """An estimate for each query view, by its scene and descriptor; None where its world has no
        index image. See `localize`.
        """
        found: list[Estimate | None] = [None] * len(views)
        for world in self.worlds:
            queries = [k for k, scene in enumerate(scene_of) if scene in world.scenes]
            if not queries:
                continue
            similarity = descriptors[queries] @ self.descriptors[world.rows].T
            best = min(top_k, len(world.rows))
            ranking = np.argpartition(-similarity, best - 1, axis=1)[:, :best]
            ranking.sort(axis=1)
            order = np.argsort(-np.take_along_axis(similarity, ranking, 1), axis=1, kind="stable")
            estimates = localize(
                world.map,
                [views[k] for k in queries],
                np.take_along_axis(ranking, order, 1),
                seed=seed,
                trust=min(self.calibrations[s].trust for s in world.scenes),
                progress=lambda name, done, of, world=world: progress(
                    f"{' '.join(world.scenes)}: {name}", done, of
                ),
            )
            for k, estimate in zip(queries, estimates):
                found[k] = estimate
        return found


def build_atlas(
    paths: Sequence[Path],
    scene_of: Sequence[str],
    poses: np.ndarray,
    views: list[View],
    descriptors: np.ndarray,
    index: list[int],
    cameras: dict[str, Camera | None],
    conventions: dict[str, Convention | None],
    lenses: Sequence[Camera | None] = (),
    *,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Atlas:
    """The atlas of the rows `index` of some frames; see `calibrate_scenes`, which changes poses and
    views. lenses: of each frame, those of scenes of several cameras.

    Frames without scene ("") are let be. Rows read in another order can leave images at an end
    without a pose: they leave the index. An image whose pose is false stays, but is in no map.
    """
    known = [row for row, scene in enumerate(scene_of) if scene]
    own_poses, own_views = poses[known], [views[row] for row in known]
    place = {row: k for k, row in enumerate(known)}
    calibrations = calibrate_scenes(
        own_views,
        [scene_of[row] for row in known],
        own_poses,
        [place[row] for row in index],
        cameras,
        conventions,
        [lenses[row] for row in known] if lenses else (),
        [Path(paths[row]).name for row in known],
    )
    poses[known] = own_poses
    for row, view in zip(known, own_views):
        views[row] = view
    index[:] = [row for row in index if np.isfinite(poses[row]).all()]
    its_views, its_scenes = [views[row] for row in index], [scene_of[row] for row in index]
    worlds = []
    for scenes in worlds_of(its_views, its_scenes, range(len(index)), descriptors[index]):
        rows = [k for k, scene in enumerate(its_scenes) if scene in scenes]
        show = partial(progress, f"{' '.join(scenes)}: map")
        doubt = {"seed": seed, "in_doubt": not all(calibrations[name].healthy for name in scenes)}
        built = build_map([its_views[k] for k in rows], progress=show, **doubt)
        if false := false_poses(built, descriptors[index][rows], **doubt):
            for k, off in false.items():
                own, name = its_scenes[rows[k]], Path(paths[index[rows[k]]]).name
                calibrations[own] = calibrations[own].warning(_FALSE.format(name, *off))
            rows = [row for k, row in enumerate(rows) if k not in false]
            built = build_map([its_views[k] for k in rows], progress=show, **doubt)
        trusted = all(calibrations[scene].trusted for scene in scenes)
        if trusted and len(built.test.errors) > 1 and not built.test.found:
            calibrations[scenes[0]] = calibrations[scenes[0]].warning(_NONE_FOUND)
        vouched = built.test.vouched
        calibrations.update({scene: calibrations[scene].tested(vouched) for scene in scenes})
        if built.typical_m and not NEAR_M <= built.typical_m <= FAR_M:
            doubt = _UNIT.format(built.typical_m)
            calibrations[scenes[0]] = calibrations[scenes[0]].warning(doubt)
        worlds.append(World(scenes, rows, built))
    names = [str(paths[row]) for row in index]
    tables = poses[index], descriptors[index]
    return Atlas(names, its_scenes, *tables, its_views, calibrations, worlds)


def key_of(said: object, images: Sequence[tuple[Path, str, int]], code: Sequence[Path]) -> str:
    """Of all that an atlas is made of: images (path, scene, frame), settings, code; "" where an image
    cannot be read.
    """
    key = hashlib.sha256(repr((said, np.__version__, torch.__version__)).encode())
    for file in [*sorted(Path(__file__).parent.glob("*.py")), *code]:
        key.update(file.read_bytes())
    for path, scene, frame in images:
        key.update(repr((str(path), scene, frame)).encode())
        try:
            key.update(path.read_bytes())
        except OSError:
            return ""
    return key.hexdigest()[:32]


def kept(file: Path | None, key: str, named: bool) -> Atlas | None:
    """The atlas of this key that `file` holds, if any; InputError if it was `named` and holds
    another.
    """
    if file is None or not file.exists():
        return None
    try:
        atlas = Atlas.load(file)
    except InputError:
        if named:
            raise
        return None
    if atlas.key != key:
        raise InputError(
            f"{file} is a map of other images or settings: give --query IMAGE, without --camera, to find "
            "images in it, or name another file to keep a new map."
        )
    touch(file)
    return atlas
