"""The pictures of task 4, computed from the views and poses of a run and drawn by figures.py.

Only three queries are shown with their matches, so matches and points are found again for these
instead of being carried along for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from localization.cameras import Convention, poses_from_file, project
from localization.matching import Matches, View, epipolar_mask, mutual_matches
from localization.triangulation import triangulate_views
from reporting import figures

SHOWN_RATIO = 0.9  # matches less distinct than this are neither drawn nor counted
PARTNERS = 8  # index images, nearest to the shown one, from which its points are triangulated
SKETCH = 800  # strongest keypoints by whose matches the index image to show is chosen


@dataclass(frozen=True)
class PosedFrames:
    """All frames of a run: path, scene, row (7,) of the pose file and view of each, in one order.

    queries, index: their rows; the views of the index are posed. conventions: of each scene's file.
    """

    paths: Sequence[Path]
    scenes: Sequence[str]
    poses: np.ndarray
    views: Sequence[View]
    queries: Sequence[int]
    index: Sequence[int]
    conventions: dict[str, Convention]


def write_pose_pictures(output: Path, frames: PosedFrames, answers: Sequence[dict]) -> list[dict]:
    """Write errors, scenes and matches into `output`/report; -> {"file", "caption"} of each.

    answers: the dictionaries "per_query" of metrics.json, one a query in the order of frames.queries.
    Pictures of an earlier run are removed.
    """
    folder = Path(output) / "report"
    for old in (*folder.glob("poses_*.png"), *folder.glob("matches_*.png"), folder / "errors.png"):
        old.unlink(missing_ok=True)
    return [
        *_errors(folder, answers),
        *(_scene(folder, scene, frames, answers) for scene in dict.fromkeys(frames.scenes)),
        *_matches(folder, frames, answers),
    ]


def _errors(folder: Path, answers: Sequence[dict]) -> list[dict]:
    ours, retrieval = (
        np.array([[answer[f"{kind}_m"], answer[f"{kind}_deg"]] for answer in answers], float)
        for kind in ("error", "retrieval")
    )
    if not np.isfinite(ours).all(axis=1).any():
        return []
    figures.error_curve_picture(folder / "errors.png", ours, retrieval)
    return [{"file": "errors.png", "caption": "Share of queries below a position or rotation error."}]


def _scene(folder: Path, scene: str, frames: PosedFrames, answers: Sequence[dict]) -> dict:
    convention = frames.conventions[scene]
    index = [row for row in frames.index if frames.scenes[row] == scene]
    shown = [(row, answer) for row, answer in zip(frames.queries, answers, strict=True)
             if frames.scenes[row] == scene]
    true = frames.poses[[row for row, _ in shown]]
    estimated = np.array([answer["pose"] for _, answer in shown]).reshape(-1, 7)
    name = f"poses_{scene}.png"
    figures.poses_picture(
        folder / name, scene, *_centers_and_directions(frames.poses[index], convention),
        *_centers_and_directions(true, convention), *_centers_and_directions(estimated, convention),
        [answer["path"] for _, answer in shown],
    )
    return {"file": name, "caption": f"Scene {scene}: index cameras, true and estimated query cameras."}


def _centers_and_directions(poses: np.ndarray, convention: Convention) -> tuple[np.ndarray, np.ndarray]:
    """Camera centers (n, 3) and viewing directions (n, 3) in the world, of rows of a pose file."""
    R, c = poses_from_file(poses, convention)
    return c.numpy(), R[:, :, 2].numpy()


def _matches(folder: Path, frames: PosedFrames, answers: Sequence[dict]) -> list[dict]:
    """The best, the median and the worst query, each with the index image that its pose explains best."""
    errors = [answer["error_m"] for answer in answers]
    measured = np.isfinite(errors).any()
    doubts = errors if measured else [1 - answer["confidence"] for answer in answers]
    ranks: dict[int, list[str]] = {}
    for rank, number in figures.choose_queries(doubts).items():
        ranks.setdefault(number, []).append(rank)
    pictures = []
    for number, names in reversed(ranks.items()):
        query, answer = frames.queries[number], answers[number]
        index = [row for row in frames.index if frames.scenes[row] == frames.scenes[query]]
        if not index:
            continue
        shown = _best_explained(
            _placed(frames, query, answer), [frames.views[row] for row in index])
        by = "position error" if measured else "confidence"
        caption = f"{' and '.join(names).capitalize()} query by {by}: {_verdict(answer)}"
        file = figures.matches_name(answer["path"])
        figures.matches_picture(
            folder / file, frames.paths[query], frames.paths[index[shown.number]], shown.query_px,
            shown.index_px, shown.inlier, shown.projected_px, caption)
        pictures.append({"file": file, "caption": f"{caption}."})
    return pictures


def _verdict(answer: dict) -> str:
    """Errors, method and confidence of an answer, as far as they are known."""
    facts = [f"method {answer['method']}", f"confidence {answer['confidence']:.2f}"]
    if np.isfinite(answer["error_m"]):
        facts.insert(0, f"{figures.meters(answer['error_m'])} and {answer['error_deg']:.2f}° off")
    return ", ".join(facts)


def _placed(frames: PosedFrames, query: int, answer: dict) -> View:
    """The view of a query at its estimated pose."""
    R, c = poses_from_file([answer["pose"]], frames.conventions[frames.scenes[query]])
    view = frames.views[query]
    device = view.features.xy_px.device
    return replace(view, R_world_from_cam=R[0].to(device), c_world=c[0].to(device))


@dataclass(frozen=True)
class _Shown:
    """Number of an index view and m matches with it: px in both images (m, 2), which the pose allows
    (m,), and the matched points as the pose projects them into the query, px (m, 2), NaN for none."""

    number: int
    query_px: np.ndarray
    index_px: np.ndarray
    inlier: np.ndarray
    projected_px: np.ndarray


def _best_explained(query: View, views: Sequence[View]) -> _Shown:
    """The matches of a posed query with the index view in which most of them fit its pose."""
    sketch = _only(query, slice(SKETCH))
    fitting = [int(_fitting_matches(sketch, _only(view, slice(SKETCH)))[1].sum()) for view in views]
    number = int(np.argmax(fitting))
    view = views[number]
    matches, inlier = _fitting_matches(query, view)
    others = [other for other in views if other is not view]
    others.sort(key=lambda other: float((other.c_world - view.c_world).norm()))
    (points,) = triangulate_views([view, *others[:PARTNERS]], [0])
    in_camera = (points.position[matches.b] - query.c_world) @ query.R_world_from_cam
    seen = points.valid[matches.b] & (in_camera[:, 2] > 0)
    projected = project(query.camera, in_camera).where(seen[:, None], torch.nan)
    pixels = (query.features.xy_px[matches.a], view.features.xy_px[matches.b], inlier, projected)
    return _Shown(number, *(values.cpu().numpy() for values in pixels))


def _fitting_matches(query: View, view: View) -> tuple[Matches, torch.Tensor]:
    """The distinct matches of two posed views, and which of them (m,) the poses allow."""
    matches = mutual_matches(query.features, view.features)
    matches = matches.select(matches.ratio < SHOWN_RATIO)
    allowed = epipolar_mask(_only(query, matches.a), _only(view, matches.b))
    return matches, allowed.diagonal()


def _only(view: View, keypoints: torch.Tensor | slice) -> View:
    """A view with some of its keypoints."""
    return replace(view, features=view.features.select(keypoints))
