"""What the pictures of task 4 show: matches and points of a synthetic room, and which files are written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localization.cameras import OPENCV, poses_to_file
from localization.triangulation import triangulate_views
from model import WARNINGS
from reporting import handin, poses
from tests.reporting.posed import SWAPPED, make_views


def test_wrong_matches_are_outliers_and_points_fall_on_their_keypoints():
    query, *index = make_views([[0, 0, 0], [0.5, 0.1, 0], [-0.4, 0.3, 0.2], [0.2, -0.5, 0.1]])
    _, shown = poses._best_explained(query, dict(enumerate(index)), triangulate_views(index))
    assert len(shown.inlier) == 200
    assert shown.inlier[SWAPPED:].all() and shown.inlier[:SWAPPED].sum() <= 3
    distance = np.linalg.norm(shown.projected_px - shown.query_px, axis=1)
    assert (distance[SWAPPED:] < 0.1).all() and np.median(distance[:SWAPPED]) > 20


def test_the_index_image_that_the_pose_explains_best_is_shown():
    query, *index = make_views([[0, 0, 0], [0.5, 0.1, 0], [-0.4, 0.3, 0.2], [0.2, -0.5, 0.1]])
    for view in (index[0], index[2]):  # their descriptors tell nothing of where they look
        view.features.descriptors[:] = view.features.descriptors.flip(0)
    assert poses._best_explained(query, dict(enumerate(index)), triangulate_views(index))[0] == 1


@pytest.fixture
def run(tmp_path) -> tuple[poses.PosedFrames, list[dict], dict]:
    """Seven frames of one scene, three of them queries, the answers to these, and the others' points."""
    centers = [[0.3 * i, 0.1 * (i % 3), 0.05 * i] for i in range(7)]
    views = make_views(centers)
    rows = poses_to_file(
        torch.stack([v.R_world_from_cam for v in views]), torch.stack([v.c_world for v in views]), OPENCV
    ).numpy()  # fmt: skip
    paths = [tmp_path / "P001" / "images" / f"{i}.png" for i in range(7)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        Image.new("RGB", (640, 480), "teal").save(path)
    queries, index = [0, 3, 5], [1, 2, 4, 6]
    answers = [
        {"path": str(paths[q]), "pose": rows[q].tolist(), "error_m": e, "error_deg": 0.1, "method": "pnp",
         "retrieval_m": 0.4, "retrieval_deg": 1.0, "confidence": s}
        for q, e, s in zip(queries, (0.2, 0.001, 3.0), (0.9, 0.1, 0.5))
    ]  # fmt: skip
    frames = poses.PosedFrames(paths, ["P001"] * 7, rows, views, queries, index, {"P001": OPENCV})
    points = triangulate_views([views[row] for row in index])
    return frames, answers, dict(zip(index, points))


def test_worst_median_and_best_query_are_shown_and_those_of_the_run_before_go(run, tmp_path):
    (tmp_path / "report").mkdir()
    earlier = ["matches_P009_000001.png", "poses_P009.png", "../gone.png"]
    pictures = [{"file": name, "caption": ""} for name in earlier]
    handin.update_metrics(tmp_path, "test", {"pictures": pictures}, "one")
    mine = "poses_of_my_own.png"
    for name in (*earlier, mine):
        (tmp_path / "report" / name).touch()
    written = poses.write_pose_pictures(tmp_path, *run)
    assert [picture["file"] for picture in written] == [
        "errors.png",
        "poses_P001.png",
        "matches_P001_5.png",
        "matches_P001_0.png",
        "matches_P001_3.png",
    ]
    assert [picture["caption"].split()[0] for picture in written[2:]] == ["Worst", "Median", "Best"]
    assert "3 m and 0.10° off" in written[2]["caption"]
    there = {p.name for p in (tmp_path / "report").iterdir()}
    assert there == {picture["file"] for picture in written} | {mine}
    assert (tmp_path / "gone.png").exists()  # outside the report, whatever metrics.json says


def test_a_picture_that_fails_costs_itself_and_a_warning(run, tmp_path, monkeypatch, capsys):
    WARNINGS.clear()
    monkeypatch.setattr(poses, "draw_poses", lambda *given: 1 / 0)
    written = poses.write_pose_pictures(tmp_path, *run)
    assert len(written) == 4 and not any(p["file"].startswith("poses") for p in written)
    assert "report/poses_P001.png" in WARNINGS[0] and "ZeroDivision" in WARNINGS[0]
    assert "Traceback" in capsys.readouterr().err
    WARNINGS.clear()


def test_without_truth_the_confidence_chooses_and_there_is_no_error_curve(run, tmp_path):
    frames, answers, points = run
    for answer in answers:
        answer["error_m"] = answer["error_deg"] = float("nan")
    frames.poses[frames.queries] = np.nan
    written = poses.write_pose_pictures(tmp_path, frames, answers, points)
    files = [Path(picture["file"]).stem for picture in written]
    assert files == ["poses_P001", "matches_P001_3", "matches_P001_5", "matches_P001_0"]
    assert "off" not in written[1]["caption"] and "by confidence" in written[1]["caption"]


def test_one_query_is_worst_median_and_best_at_once(run, tmp_path):
    frames, answers, points = run
    alone = poses.PosedFrames(**{**vars(frames), "queries": frames.queries[:1]})
    written = poses.write_pose_pictures(tmp_path, alone, answers[:1], points)
    assert len(written) == 3 and written[2]["caption"].startswith("Best and median and worst query")
