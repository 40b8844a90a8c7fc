"""A scene to turn and look at: one HTML file with its points and cameras, which needs no other.

scene.html draws; here is what it draws: points with the colors of the images, index cameras, queries
where they were found and where they truly were, all in axes whose third is about the vertical.
"""

import base64
import json
import re
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from localization.cameras import poses_from_file
from localization.matching import View
from localization.structure import Structure
from reporting.figures import meters
from reporting.handin import draw_or_warn, write_text
from reporting.poses import PosedFrames, earlier_files, in_file_name, placed, point_colors

PAGE = Path(__file__).parent / "scene.html"
MAX_POINTS = 30_000  # 9 bytes each, 12 as text
ENOUGH_POINTS = 1000
FARTHEST = 6.0  # points farther out than so many radii of the scene are not shown
LEVELS = 2**16 - 1  # of a coordinate


def write_scene_views(
    output: Path, frames: PosedFrames, answers: Sequence[dict], structure: Structure
) -> list[dict]:
    """Write `output`/report/scene_<name>.html for each scene; -> {"file", "caption"} of each.

    Arguments as for write_pose_pictures and write_exports. One that fails is left out with a
    warning; those that metrics.json names, of the run before, are removed.
    """
    folder = Path(output) / "report"
    for old in earlier_files(output, "views"):
        (folder / old).unlink(missing_ok=True)
    written = []
    for scene in dict.fromkeys(frames.scenes):
        name = f"scene_{in_file_name(scene)}.html"
        draw = partial(_write, folder / name, frames, answers, structure, scene)
        if draw_or_warn(f"report/{name}", draw):
            caption = f"Scene {scene} in space, to be turned: points and cameras"
            written.append({"file": name, "caption": caption})
    return written


def _write(file: Path, *about: object) -> bool:
    write_text(file, scene_page(*about))
    return True


def scene_page(
    frames: PosedFrames, answers: Sequence[dict], structure: Structure, scene: str
) -> str:
    """The page of a scene."""
    views, facts, errors = [], [], []
    for row in frames.index:
        if frames.scenes[row] == scene:
            views.append(frames.views[row])
            facts.append({"kind": "index", "text": f"{Path(frames.paths[row]).name}\nindex image"})
    for row, answer in zip(frames.queries, answers, strict=True):
        if frames.scenes[row] != scene:
            continue
        name = Path(frames.paths[row]).name
        views.append(placed(frames, row, answer))
        facts.append(
            {"kind": "estimate", "text": _told(name, answer), "found": bool(answer["found"])}
        )
        if np.isfinite(frames.poses[row]).all():
            errors.append([len(views) - 1, len(views)])
            R, c = poses_from_file(frames.poses[row][None], frames.conventions[scene])
            views.append(View(views[-1].features, views[-1].camera, R[0], c[0]))
            facts.append({"kind": "truth", "text": f"{name}\ntrue pose of the query"})
    data = _data(views, facts, structure, frames, scene)
    text = json.dumps({**data, "errors": errors}, separators=(",", ":")).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    filled = {"{title}": escape(f"Scene {scene}"), "{data}": text}
    return re.sub(r"\{title\}|\{data\}", lambda place: filled[place[0]], page)


def _told(name: str, answer: dict) -> str:
    """What is said of a query."""
    lines = [name, f"estimated: {answer['method']}, {answer['inliers']} inliers"]
    if np.isfinite(answer["error_m"]):
        lines.append(f"error {meters(answer['error_m'])}, {answer['error_deg']:.2f}°")
    lines.append(
        f"confidence {answer['confidence']:.2f}" + ("" if answer["found"] else ": not found")
    )
    return "\n".join(lines)


def _data(
    views: list[View], facts: list[dict], structure: Structure, frames: PosedFrames, scene: str
) -> dict:
    """Points and cameras in the axes and numbers of the page."""
    structure = structure.within([row for row in frames.index if frames.scenes[row] == scene])
    points = structure.position.numpy()
    c = np.stack([view.c_world.numpy() for view in views])
    R = np.stack([view.R_world_from_cam.numpy() for view in views])
    axes = _upright(R, np.concatenate([c, points]))
    points, c, R = points @ axes.T, c @ axes.T, axes @ R
    surely = c[[fact["kind"] != "estimate" for fact in facts]]
    middle, radius = _extent(surely if len(surely) else c, points)
    shown = np.linalg.norm(points - middle, axis=1) <= FARTHEST * radius
    seen = np.bincount(structure.point.numpy(), minlength=len(points))
    if (shown & (seen > 2)).sum() >= ENOUGH_POINTS:  # what two images alone show is the least sure
        shown &= seen > 2
    near = np.flatnonzero(shown)
    if len(near) > MAX_POINTS:
        near = np.sort(np.random.default_rng(0).choice(near, MAX_POINTS, replace=False))
    points, c = points[near] - middle, c - middle
    low = points.min(axis=0, initial=0.0)
    step = float((points.max(axis=0, initial=0.0) - low).max()) / LEVELS or 1.0
    levels = ((points - low) / step).round().astype("<u2")
    colors = point_colors(structure, frames, near)
    length = _frustum_length(c, radius)
    cameras = []
    for view, fact, center, turn in zip(views, facts, c, R):
        lens = view.camera
        sides = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
        half = sides * [lens.width / lens.fx, lens.height / lens.fy]
        corners = center + length * np.column_stack([half, np.ones(4)]) @ turn.T
        cameras.append({**fact, "c": _short(center), "corners": [_short(v) for v in corners]})
    return {
        "radius": radius,
        "low": low.tolist(),
        "step": step,
        "count": len(points),
        "points": base64.b64encode(levels.tobytes() + colors.tobytes()).decode(),
        "cameras": cameras,
    }


def _upright(R: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows: axes to the right, away and up, of cameras R (n, 3, 3) and what is there (m, 3).

    Up is where the tops of most images are, to the right where the rest spreads most, away where
    most cameras look.
    """
    up = -R[:, :, 1].mean(axis=0)
    up = up / np.linalg.norm(up) if np.linalg.norm(up) > 0.1 else np.array([0.0, 0.0, 1.0])
    flat = positions - np.median(positions, axis=0)
    flat = flat - np.outer(flat @ up, up)
    distance = np.linalg.norm(flat, axis=1)
    # The second part decides where nothing spreads.
    flat = [flat[distance <= np.quantile(distance, 0.9)], 1e-9 * (np.eye(3) - np.outer(up, up))]
    right = np.linalg.svd(np.concatenate(flat), full_matrices=False)[2][0]
    right = right - (right @ up) * up
    right /= np.linalg.norm(right)
    away = np.cross(up, right)
    if R[:, :, 2].sum(axis=0) @ away < 0:
        right, away = -right, -away
    return np.stack([right, away, up])


def _extent(cameras: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float]:
    """Middle and radius of all cameras and of the middle nine tenths of the points, by each axis."""
    inner = np.quantile(points, [0.05, 0.95], axis=0) if len(points) else points
    ends = np.concatenate([cameras, inner])
    low, high = ends.min(axis=0), ends.max(axis=0)
    return (low + high) / 2, float(np.linalg.norm(high - low)) / 2 or 1.0


def _frustum_length(c: np.ndarray, radius: float) -> float:
    """How long the cameras are drawn: about as far as they stand apart, within reason."""
    apart = [np.sort(np.linalg.norm(c - center, axis=1))[1:3].max(initial=0.0) for center in c]
    return float(np.clip(0.8 * np.median(apart), 0.04 * radius, 0.12 * radius))


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
