"""From posed images of several scenes to their cameras, and to the worlds that they share.

All frames of a run stand in one list; a frame's row is its place in it. Each belongs to a scene,
and scenes whose index images prove it share a world, in which the queries of all of them are
localized together.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localization.calibration import Calibration, calibrate, seen_with, taken_with
from localization.cameras import Camera, Convention, poses_from_file
from localization.localize import share_world
from localization.matching import View
from localization.threads import in_threads


def calibrate_scenes(
    views: list[View],
    scene_of: Sequence[str],
    poses: np.ndarray,
    index: Sequence[int],
    cameras: dict[str, Camera | None],
    conventions: dict[str, Convention | None],
    lenses: Sequence[Camera | None] = (),
    names: Sequence[str] = (),
) -> dict[str, Calibration]:
    """Convention and cameras of each scene from its index rows.

    views: one a frame, whose camera tells its size; they get the camera found, those of the index
    their poses. poses (n, 7): rows of the pose files, put in the order in which they belong to the
    frames. cameras, conventions: of each scene, None where it has to be found out. lenses: of each
    frame, where those of a scene are known to have several: they are judged as if the scene's camera
    had taken all, and keep their own. names: of each frame's file, by which rows may have been
    written in another order.
    """
    scenes = list(dict.fromkeys(scene_of))
    rows_of = {scene: [row for row, own in enumerate(scene_of) if own == scene] for scene in scenes}
    indexed = set(index)
    own = {row: lens for row, lens in enumerate(lenses) if lens}

    def find_out(scene: str) -> Calibration:
        rows, camera = rows_of[scene], cameras[scene]
        numbers = [number for number, row in enumerate(rows) if row in indexed]
        chosen = [views[rows[number]] for number in numbers]
        for i, number in enumerate(numbers):
            if lens := own.get(rows[number]):
                chosen[i] = seen_with(taken_with(chosen[i], lens), camera.pinhole())
        orders = _by_letters([names[row] for row in rows]) if names else {}
        found = calibrate(
            chosen, poses[rows], camera, conventions[scene], frames=numbers, orders=orders
        )
        if known := {(own[row].width, own[row].height): own[row] for row in rows if row in own}:
            found = replace(found, camera=camera, cameras=known)
        return found

    found = dict(zip(scenes, in_threads(find_out, scenes)))
    reorder_rows(poses, scene_of, found)
    for row, scene in enumerate(scene_of):
        views[row] = found[scene].applied(views[row], own.get(row))
    for row in index:
        if np.isfinite(poses[row]).all():
            R, c = poses_from_file(poses[row], found[scene_of[row]].convention)
            views[row].R_world_from_cam, views[row].c_world = R, c
    return found


def _by_letters(names: Sequence[str]) -> dict[str, list[int]]:
    """The row of each frame if the rows were written in the order of the letters of the names, in
    words, where that is another order.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    if order == list(range(len(names))):
        return {}
    return {"the rows in the order of the letters of the names": np.argsort(order).tolist()}


def reorder_rows(
    poses: np.ndarray, scene_of: Sequence[str], calibrations: dict[str, Calibration]
) -> None:
    """Put rows of pose files (n, 7), as they stand, in the order in which they belong to the frames."""
    for scene, calibration in calibrations.items():
        rows = [row for row, own in enumerate(scene_of) if own == scene]
        unknown = np.full((1, 7), np.nan)
        poses[rows] = np.vstack([poses[rows], unknown])[calibration.rows]


def worlds_of(
    views: list[View], scene_of: Sequence[str], index: Sequence[int], descriptors: np.ndarray
) -> list[list[str]]:
    """Scenes grouped by the world they share, as far as their index images prove it, the most alike
    pairs first.
    """
    scenes = list(dict.fromkeys(scene_of))
    rows_of = {scene: [row for row in index if scene_of[row] == scene] for scene in scenes}

    def share(couple: tuple[str, str]) -> bool:
        rows, columns = (rows_of[scene] for scene in couple)
        ranked = np.argsort(-(descriptors[rows] @ descriptors[columns].T), axis=None, kind="stable")
        pairs = ((rows[i // len(columns)], columns[i % len(columns)]) for i in ranked)
        return share_world((views[a], views[b]) for a, b in pairs)

    couples = list(itertools.combinations(scenes, 2))
    worlds = [[scene] for scene in scenes]
    for first, second in itertools.compress(couples, in_threads(share, couples)):
        joined = [world for world in worlds if first in world or second in world]
        rest = [world for world in worlds if world not in joined]
        worlds = [*rest, [scene for world in joined for scene in world]]
        print(f"Scenes {first} and {second} share one world: their index images match.")
    return worlds
