"""What other tools read: the map with the queries in it as COLMAP's text model, the estimated poses
as TUM's trajectory or as hloc's list.

The world is right-handed and the camera's axes are OpenCV's, whatever pose.txt has; pixels count
from the corner of the top left one, as COLMAP's do. Queries that count as not found are left out.
Only new files and folders are written: nothing that is there is touched.
"""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from eval import number_order
from localization.cameras import Camera, project, quaternion_from_rotation
from localization.matching import View
from localization.structure import Structure
from model import InputError, warn
from reporting.handin import is_own, refuse_unwritable, write_text
from reporting.pose_file import one_line
from reporting.poses import PosedFrames, in_file_name, placed, point_colors

FORMATS = ("colmap", "tum", "hloc")
NOTE = "# Written by test.py --export\n"
Export = tuple[str, str]  # format, path


def check_exports(
    exports: Sequence[Export],
    scenes: Sequence[str],
    images: Sequence[tuple[Path, str]],
    root: Path,
    output: Path,
    map_file: Path | None,
) -> None:
    """InputError for what could not be written at the end of a run: a format that is not known, a
    target that is there already, cannot be made or is the run's own, names of images that a format
    cannot hold or tell apart.

    images: path and scene of each; root: the folder of the scenes; output, map_file: what the run
    writes besides.
    """
    taken: list[Path] = []
    for name, path in exports:
        option = f"--export {name} {path}"
        if not path.strip():
            raise InputError(f"{option}: the path is empty: name a new file or folder.")
        if name not in FORMATS:
            raise InputError(f"{option}: the format is one of {', '.join(FORMATS)}.")
        names: dict[str, set[str]] = {scene: set() for _, scene in images}
        for image, scene in images if name != "tum" else ():
            called = _name(image, root / scene / "images" if name == "colmap" else root)
            if re.search(r"\s", called):
                raise InputError(
                    f"{option}: no name may hold a blank there, as {called!r} does: rename it."
                )
            # A new image may be found in any scene.
            if called in (names[scene] if scene else set().union(*names.values())):
                raise InputError(
                    f"{option}: two images would be called {called} there: rename one."
                )
            names[scene].add(called)
        for target in _targets(name, path, scenes).values():
            if _is_there(target, name == "colmap"):
                raise InputError(
                    f"{option}: {target} is there already and is not overwritten: remove it, or "
                    "name another."
                )
            whole = target.resolve()
            if is_own(output, whole) or (map_file and whole == map_file.resolve()):
                raise InputError(f"{option}: the run itself writes {target}: name another.")
            if any(whole.is_relative_to(t) or t.is_relative_to(whole) for t in taken):
                raise InputError(f"{option}: two exports go to {target}: name another.")
            taken.append(whole)
            refuse_unwritable(target.parent)


def write_exports(
    exports: Sequence[Export],
    frames: PosedFrames,
    answers: Sequence[dict],
    structure: Structure,
    root: Path,
) -> list[Path]:
    """Write the exports, each whole or not at all; the files and folders written.

    answers: as for write_pose_pictures; structure: its views are rows of the frames; root: the
    folder of the scenes, from which the list of hloc names images.
    """
    scenes = list(dict.fromkeys(frames.scenes))
    found = [(row, answer) for row, answer in zip(frames.queries, answers) if answer["found"]]
    written = []
    for name, path in exports:
        targets = _targets(name, path, scenes)
        if name == "colmap":
            part = Path(path).with_name(f".{uuid4().hex}.part")
            try:
                for scene in scenes:
                    for file, text in _colmap(frames, found, structure, scene, root).items():
                        write_text(part / scene / file, text)
                _move(part, Path(path))
            finally:
                shutil.rmtree(part, ignore_errors=True)
        elif name == "tum":
            for scene, target in targets.items():
                of_scene = [pair for pair in found if frames.scenes[pair[0]] == scene]
                write_text(target, _tum(frames, of_scene, target))
        else:
            (target,) = targets.values()
            write_text(target, _hloc(frames, found, root))
        written += targets.values()
    return written


def _targets(name: str, path: str, scenes: Sequence[str]) -> dict[str, Path]:
    """What an export writes, by scene: TUM's trajectories are of one world, hence of one scene."""
    target = Path(path)
    if name != "tum" or len(scenes) == 1:
        return {scenes[0]: target}
    return {
        scene: target.with_name(f"{target.stem}_{in_file_name(scene)}{target.suffix}")
        for scene in scenes
    }


def _is_there(target: Path, is_folder: bool) -> bool:
    """Whether something is there already; an empty folder is nothing where one is to be made."""
    if is_folder and target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return target.exists() or target.is_symlink()


def _move(part: Path, target: Path) -> None:
    """Give a finished folder its name."""
    try:
        if target.is_dir():
            target.rmdir()
        part.rename(target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; name another folder."
        ) from error


def _name(path: Path, folder: Path) -> str:
    """How a model names an image: from the folder of the images, or as given if it is elsewhere."""
    inside = path.is_relative_to(folder)
    return one_line((path.relative_to(folder) if inside else path).as_posix())


def _words(values: Sequence[float] | np.ndarray | Tensor) -> str:
    return " ".join(f"{float(value):.12g}" for value in values)


def _from_world(view: View) -> str:
    """qw qx qy qz tx ty tz of a posed view, camera from world."""
    R = view.R_world_from_cam.T
    q = quaternion_from_rotation(R).roll(1)
    return _words([*q, *(-(R @ view.c_world))])


def _hloc(frames: PosedFrames, found: Sequence[tuple[int, dict]], root: Path) -> str:
    """A line an image: name qw qx qy qz tx ty tz."""
    return "".join(
        f"{_name(Path(frames.paths[row]), root)} {_from_world(placed(frames, row, answer))}\n"
        for row, answer in found
    )


def _tum(frames: PosedFrames, found: Sequence[tuple[int, dict]], target: Path) -> str:
    """A line an image, by time: time, position and quaternion of the camera in the world.

    The time is the last number in an image's name; where these do not rise with the names, as seconds
    of a clock do not, their place in the order of the frames, with a warning that names the target.
    """
    found = sorted(found, key=lambda pair: number_order(Path(frames.paths[pair[0]]).name))
    runs = [re.findall(r"[0-9]+(?:\.[0-9]+)?", Path(frames.paths[row]).stem) for row, _ in found]
    times = [run[-1] for run in runs if run]
    rising = all(float(a) < float(b) for a, b in itertools.pairwise(times))
    if len(times) < len(found) or not rising:
        found = sorted(found, key=lambda pair: pair[0])
        times = [str(row) for row, _ in found]
        warn(
            f"{target}: no numbers rise with the images' names, so times are places in their order."
        )
    lines = []
    for time, (row, answer) in zip(times, found):
        view = placed(frames, row, answer)
        q = quaternion_from_rotation(view.R_world_from_cam)
        lines.append(f"{time} {_words([*view.c_world, *q])}\n")
    return "".join([NOTE, "# timestamp tx ty tz qx qy qz qw, camera to world\n", *lines])


def _colmap(
    frames: PosedFrames,
    found: Sequence[tuple[int, dict]],
    structure: Structure,
    scene: str,
    root: Path,
) -> dict[str, str]:
    """The three files of a scene's model: index images with their points, queries without."""
    index = [row for row in frames.index if frames.scenes[row] == scene]
    views = {row: frames.views[row] for row in index}
    views |= {
        row: placed(frames, row, answer) for row, answer in found if frames.scenes[row] == scene
    }
    cameras = {
        camera: n for n, camera in enumerate(dict.fromkeys(v.camera for v in views.values()), 1)
    }
    camera_lines = [f"{n} {_camera(camera)}\n" for camera, n in cameras.items()]

    structure = structure.within(index)
    tracks: list[list[str]] = [[] for _ in structure.position]
    errors: list[list[float]] = [[] for _ in structure.position]
    colors = point_colors(structure, frames)
    image_lines = []
    for number, (row, view) in enumerate(sorted(views.items()), 1):
        seen = torch.nonzero(structure.view == row)[:, 0]
        point = structure.point[seen]
        xy = view.features.xy_px[structure.keypoint[seen]].double()
        local = (structure.position[point] - view.c_world) @ view.R_world_from_cam
        off = (project(view.camera, local) - xy).norm(dim=1)
        for place, (p, error) in enumerate(zip(point.tolist(), off.tolist())):
            tracks[p].append(f"{number} {place}")
            errors[p].append(error)
        image = _name(Path(frames.paths[row]), root / scene / "images")
        image_lines.append(f"{number} {_from_world(view)} {cameras[view.camera]} {image}\n")
        corners = (xy + 0.5).tolist()
        image_lines.append(
            " ".join(f"{x:.3f} {y:.3f} {p + 1}" for (x, y), p in zip(corners, point.tolist()))
            + "\n"
        )
    point_lines = [
        f"{n} {_words(position)} {' '.join(map(str, color))} {np.mean(error):.4f} {' '.join(track)}\n"
        for n, (position, color, error, track) in enumerate(
            zip(structure.position, colors, errors, tracks), 1
        )
    ]
    return {
        "cameras.txt": "".join([NOTE, "# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]\n", *camera_lines]),
        "images.txt": "".join(
            [
                NOTE,
                "# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME\n# POINTS2D[] as X Y POINT3D_ID\n",
                *image_lines,
            ]
        ),
        "points3D.txt": "".join(
            [NOTE, "# POINT3D_ID X Y Z R G B ERROR TRACK[] as IMAGE_ID POINT2D_IDX\n", *point_lines]
        ),
    }


def _camera(camera: Camera) -> str:
    """MODEL WIDTH HEIGHT PARAMS[]: PINHOLE, or OPENCV where there is distortion."""
    focal, center = [camera.fx, camera.fy], [camera.cx + 0.5, camera.cy + 0.5]
    size = f"{camera.width} {camera.height}"
    if camera == camera.pinhole():
        return f"PINHOLE {size} {_words([*focal, *center])}"
    return f"OPENCV {size} {_words([*focal, *center, camera.k1, camera.k2, camera.p1, camera.p2])}"
