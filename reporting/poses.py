"""The pictures of task 4, computed from the views and poses of a run and drawn by pose_figures.py.

Only three queries are shown with their matches, so these are found again instead of being carried
along for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eval import load_image
from localization.cameras import Convention, poses_from_file, project
from localization.matching import Matches, View, in_band, mutual_matches
from localization.structure import Structure
from localization.threads import in_threads
from localization.triangulation import Points
from model import InputError
from reporting.canvas import Block, save
from reporting.figures import meters
from reporting.handin import draw_or_warn, read_metrics
from reporting.pose_figures import ShownMatches, draw_errors, draw_matches, draw_poses

SHOWN_RATIO = 0.9  # matches less distinct than this are neither drawn nor counted
SKETCH = 800  # strongest keypoints by whose matches the index image to show is chosen


@dataclass(frozen=True)
class PosedFrames:
    """All frames of a run: path, scene, row (7,) of the pose file and view of each, in one order.

    queries, index: their rows; the views of the index are posed. conventions: of each scene's file.
    """

    paths: Sequence[Path]
    scenes: Sequence[str]
    poses: np.ndarray
    views: Mapping[int, View]
    queries: Sequence[int]
    index: Sequence[int]
    conventions: dict[str, Convention]


def write_pose_pictures(
    output: Path, frames: PosedFrames, answers: Sequence[dict], points: Mapping[int, Points]
) -> list[dict]:
    """Write errors, scenes and matches into `output`/report; -> {"file", "caption"} of each.

    answers: the dictionaries "per_query" of metrics.json, one a query in the order of frames.queries;
    points: of the keypoints of each row of frames.index.
    A picture that fails is left out with a warning. Pictures that metrics.json names, those of the
    run before, are removed: so this comes before update_metrics.
    """
    folder = Path(output) / "report"
    for old in earlier_files(output, "pictures"):
        (folder / old).unlink(missing_ok=True)
    curves = "Share of queries below a position or rotation error."
    drawings = [("errors.png", curves, partial(_errors, answers))]
    for scene in dict.fromkeys(frames.scenes):
        caption = f"Scene {scene}: index cameras, true and estimated query cameras."
        name = f"poses_{in_file_name(scene)}.png"
        drawings.append((name, caption, partial(_scene, frames, answers, scene)))
    drawings += _matches(frames, answers, points)

    def drawn(drawing: tuple[str, str, Callable]) -> bool | None:
        name, _, draw = drawing
        return draw_or_warn(f"report/{name}", partial(_write, folder / name, draw))

    written = in_threads(drawn, drawings)
    return [
        {"file": name, "caption": caption}
        for (name, caption, _), there in zip(drawings, written)
        if there
    ]


def _write(file: Path, draw: Callable[[], Block | None]) -> bool:
    """Draw a picture and write it, if there is something to draw."""
    picture = draw()
    if picture is not None:
        save(file, picture)
    return picture is not None


def in_file_name(scene: str) -> str:
    """A scene as a part of the name of a file, which no folder that it lies in may split."""
    return scene.replace("/", "__")


def earlier_files(output: Path, kind: str) -> list[str]:
    """The names of the "pictures" or "views" that the run before wrote."""
    try:
        files = (read_metrics(output).get("test") or {}).get(kind) or []
    except InputError:
        return []
    return [Path(each["file"]).name for each in files]


def _errors(answers: Sequence[dict]) -> Block | None:
    """The curves of the errors; None where none is known."""
    ours, retrieval = (
        np.array([[answer[f"{kind}_m"], answer[f"{kind}_deg"]] for answer in answers], float)
        for kind in ("error", "retrieval")
    )
    known = np.isfinite(ours).all(axis=1).any()
    return draw_errors(ours, retrieval) if known else None


def _scene(frames: PosedFrames, answers: Sequence[dict], scene: str) -> Block:
    index = [row for row in frames.index if frames.scenes[row] == scene]
    shown = [
        (row, answer)
        for row, answer in zip(frames.queries, answers, strict=True)
        if frames.scenes[row] == scene
    ]
    true = frames.poses[[row for row, _ in shown]]
    estimated = np.array([answer["pose"] for _, answer in shown]).reshape(-1, 7)
    cameras = (
        _centers_and_directions(poses, frames.conventions[scene])
        for poses in (frames.poses[index], true, estimated)
    )
    return draw_poses(scene, *cameras, [answer["path"] for _, answer in shown])


def _centers_and_directions(
    poses: np.ndarray, convention: Convention
) -> tuple[np.ndarray, np.ndarray]:
    """Camera centers (n, 3) and viewing directions (n, 3) in the world, of rows of a pose file."""
    R, c = poses_from_file(poses, convention)
    return c.numpy(), R[:, :, 2].numpy()


def _matches(
    frames: PosedFrames, answers: Sequence[dict], points: Mapping[int, Points]
) -> list[tuple[str, str, Callable]]:
    """Worst, median and best query: the name of its picture, the caption, and what draws it."""
    errors = np.array([answer["error_m"] for answer in answers], float)
    measured = bool(np.isfinite(errors).any())
    doubts = errors if measured else 1 - np.array([answer["confidence"] for answer in answers])
    ranks: dict[int, list[str]] = {}
    for rank, number in choose_queries(doubts).items():
        ranks.setdefault(number, []).append(rank)
    by = "position error" if measured else "confidence"
    drawings = []
    for number, names in reversed(ranks.items()):
        answer, path = answers[number], Path(answers[number]["path"])
        caption = f"{' and '.join(names).capitalize()} query by {by}: {_verdict(answer)}."
        draw = partial(_match_picture, frames, answers[number], number, caption, points)
        scene = in_file_name(frames.scenes[frames.queries[number]])
        drawings.append((f"matches_{scene}_{path.stem}.png", caption, draw))
    return drawings


def choose_queries(error_m: Sequence[float]) -> dict[str, int]:
    """The queries with the smallest, the median and the largest error; {} if no error is known."""
    order = [int(query) for query in np.argsort(error_m) if np.isfinite(error_m[query])]
    if not order:
        return {}
    return {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}


def _match_picture(
    frames: PosedFrames, answer: dict, number: int, caption: str, points: Mapping[int, Points]
) -> Block | None:
    """A query with the index image that its pose explains best; None where its scene has none."""
    query = frames.queries[number]
    index = [row for row in frames.index if frames.scenes[row] == frames.scenes[query]]
    if not index:
        return None
    view = placed(frames, query, answer)
    row, shown = _best_explained(view, {row: frames.views[row] for row in index}, points)
    return draw_matches((frames.paths[query], frames.paths[row]), shown, caption)


def _verdict(answer: dict) -> str:
    """Errors, method and confidence of an answer, as far as they are known."""
    facts = [f"method {answer['method']}", f"confidence {answer['confidence']:.2f}"]
    if np.isfinite(answer["error_m"]):
        facts.insert(0, f"{meters(answer['error_m'])} and {answer['error_deg']:.2f}° off")
    return ", ".join(facts)


def placed(frames: PosedFrames, query: int, answer: dict) -> View:
    """The view of a query at its estimated pose."""
    R, c = poses_from_file([answer["pose"]], frames.conventions[frames.scenes[query]])
    return replace(frames.views[query], R_world_from_cam=R[0], c_world=c[0])


def _best_explained(
    query: View, views: Mapping[int, View], points: Mapping[int, Points]
) -> tuple[int, ShownMatches]:
    """The row of the index view in which most matches of a posed query fit its pose, and these."""
    sketch = _only(query, slice(SKETCH))

    def fitting(row: int) -> int:
        return int(_fitting_matches(sketch, _only(views[row], slice(SKETCH)))[1].sum())

    row = max(views, key=fitting)
    view, of_view = views[row], points[row]
    matches, inlier = _fitting_matches(query, view)
    in_camera = (of_view.position[matches.b] - query.c_world) @ query.R_world_from_cam
    seen = of_view.valid[matches.b] & (in_camera[:, 2] > 0)
    projected = project(query.camera, in_camera).where(seen[:, None], torch.nan)
    pixels = (query.features.xy_px[matches.a], view.features.xy_px[matches.b], inlier, projected)
    return row, ShownMatches(*(values.numpy() for values in pixels))


def _fitting_matches(query: View, view: View) -> tuple[Matches, torch.Tensor]:
    """The distinct matches of two posed views, and which of them (m,) the poses allow."""
    matches = mutual_matches(query.features, view.features)
    matches = matches.select(matches.ratio < SHOWN_RATIO)
    return matches, in_band(query, view, matches.a, matches.b)


def _only(view: View, keypoints: torch.Tensor | slice) -> View:
    """A view with some of its keypoints."""
    return replace(view, features=view.features.select(keypoints))


def point_colors(
    structure: Structure, frames: PosedFrames, points: np.ndarray | None = None
) -> np.ndarray:
    """(n, 3) uint8: the colors of `points` (n,), their numbers in rising order, all by default.

    A point has the color of the first image that shows it; gray where that cannot be read any more.
    """
    number, first = np.unique(structure.point.numpy(), return_index=True)
    if points is not None:
        number, first = points, first[points]
    view, keypoint = structure.view.numpy()[first], structure.keypoint.numpy()[first]
    colors = np.full((len(number), 3), 128, dtype=np.uint8)
    for row in np.unique(view):
        mine = np.flatnonzero(view == row)
        try:
            pixels = np.asarray(load_image(Path(frames.paths[row])).convert("RGB"))
        except InputError:
            continue
        xy = frames.views[row].features.xy_px[keypoint[mine]].round().long().numpy()
        x, y = (xy[:, i].clip(0, pixels.shape[1 - i] - 1) for i in (0, 1))
        colors[mine] = pixels[y, x]
    return colors
