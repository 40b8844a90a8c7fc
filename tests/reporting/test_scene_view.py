"""The scene to turn: what its page holds, decoded as the page decodes it."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from localization.cameras import OPENCV, poses_to_file
from localization.structure import structure_of
from localization.triangulation import triangulate_views
from model import WARNINGS
from reporting import check, handin, scene_view
from reporting.poses import PosedFrames
from tests.reporting.posed import make_views

NAME = 'a <!--<script> "1".png'


@pytest.fixture
def run(tmp_path):
    """A room in a tilted world: three queries, one of unknown truth, and four index images."""
    views = make_views([[0.3 * i, 0.1 * (i % 3), 0.05 * i] for i in range(7)])
    R = torch.tensor(Rotation.from_rotvec([0.4, -0.7, 0.9]).as_matrix())
    for view in views:
        view.R_world_from_cam, view.c_world = R @ view.R_world_from_cam, R @ view.c_world + 100
    queries, index = [0, 3, 5], [1, 2, 4, 6]
    chosen = [views[row] for row in index]
    structure = structure_of([(index, chosen, triangulate_views(chosen))])
    rows = poses_to_file(
        torch.stack([v.R_world_from_cam for v in views]),
        torch.stack([v.c_world for v in views]),
        OPENCV,
    ).numpy()
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path in paths:
        Image.new("RGB", (640, 480), (10, 20, 30)).save(path)
    paths[0] = tmp_path / NAME
    answers = [
        {
            "pose": rows[q].tolist(),
            "found": q != 5,
            "method": "pnp",
            "inliers": 9,
            "confidence": 0.5,
            "error_m": 0.012,
            "error_deg": 0.1,
        }
        for q in queries
    ]
    answers[0]["pose"][0] += 0.5
    rows[3], answers[1]["error_m"] = np.nan, float("nan")
    return (
        PosedFrames(paths, ["P001"] * 7, rows, views, queries, index, {"P001": OPENCV}),
        answers,
        structure,
    )


def decoded(page: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """The data of a page, its points (n, 3) and their colors (n, 3)."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    data = json.loads(text)
    raw, count = base64.b64decode(data["points"]), data["count"]
    levels = np.frombuffer(raw[: 6 * count], "<u2").reshape(-1, 3)
    colors = np.frombuffer(raw[6 * count :], np.uint8).reshape(-1, 3)
    assert len(levels) == len(colors) == count
    return data, np.array(data["low"]) + data["step"] * levels, colors


def test_the_page_shows_the_run_as_it_was(run):
    frames, _, structure = run
    data, points, colors = decoded(scene_view.scene_page(*run, "P001"))
    kinds = [camera["kind"] for camera in data["cameras"]]
    assert [kinds.count(kind) for kind in ("index", "estimate", "truth")] == [4, 3, 2]
    assert (colors == [10, 20, 30]).all() and len(points) > 100
    # A rigid motion of the world: distances between cameras and points are the scene's.
    centers = {c["text"].split("\n")[0] + c["kind"]: np.array(c["c"]) for c in data["cameras"]}
    true = {f"{frames.paths[r].name}index": frames.views[r].c_world.numpy() for r in frames.index}
    true[f"{NAME}truth"] = frames.views[0].c_world.numpy()
    true[f"{NAME}estimate"] = true[f"{NAME}truth"] + [0.5, 0, 0]
    names = list(true)
    here = np.array([centers[name] for name in names])
    there = np.array([true[name] for name in names])
    for one, other in ((here, there),):
        apart = [np.linalg.norm(v[:, None] - v, axis=-1) for v in (one, other)]
        np.testing.assert_allclose(*apart, atol=1e-3)
    spread = [np.sort(np.linalg.norm(p - c, axis=1)) for p, c in
              ((points, here[0]), (structure.position.numpy(), there[0]))]  # fmt: skip
    np.testing.assert_allclose(*spread, atol=1e-3)
    # An error is a line between an estimate and the truth of the same query.
    for a, b in data["errors"]:
        first, second = data["cameras"][a], data["cameras"][b]
        assert (first["kind"], second["kind"]) == ("estimate", "truth")
        assert first["text"].split("\n")[0] == second["text"].split("\n")[0]
    told = {c["text"].split("\n")[0]: c for c in data["cameras"] if c["kind"] == "estimate"}
    assert "error 1.2 cm, 0.10°" in told[NAME]["text"] and told[NAME]["found"]
    assert "error" not in told["3.png"]["text"] and not told["5.png"]["found"]
    assert told["5.png"]["text"].endswith("confidence 0.50: not found")


def test_up_is_the_top_of_the_images_and_away_is_where_they_look(run):
    data, *_ = decoded(scene_view.scene_page(*run, "P001"))
    for camera in data["cameras"]:
        corners = np.array(camera["corners"])  # top left, top right, bottom right, bottom left
        up = corners[:2].mean(axis=0) - corners[2:].mean(axis=0)
        assert up[2] > 0.99 * np.linalg.norm(up)
        assert (corners.mean(axis=0) - camera["c"])[1] > 0
        right = corners[1] - corners[0]
        forward = corners.mean(axis=0) - camera["c"]
        assert np.cross(right, forward) @ up > 0  # not mirrored


@pytest.mark.parametrize("seed", range(6))
def test_axes_are_right_handed_in_any_world(seed):
    """Cameras in a row that look across it, up to rolls, in a world turned at random."""
    rng = np.random.default_rng(seed)
    world = Rotation.random(rng=rng).as_matrix()  # its columns: the row, down, ahead
    turns = world @ Rotation.from_euler("z", rng.normal(0, 0.2, (9, 1))).as_matrix()
    row = np.column_stack([np.arange(9) * 3.0, rng.normal(0, 0.1, (9, 2))]) @ world.T
    axes = scene_view._upright(turns, row[:: 1 - 2 * (seed % 2)])
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    across, down, ahead = world.T
    assert abs(axes[0] @ across) > 0.95 and axes[1] @ ahead > 0.95 and axes[2] @ down < -0.95


def test_the_number_of_points_is_bounded_and_those_far_out_are_not_shown(run, monkeypatch):
    frames, answers, structure = run
    structure.position[7] += 1e6
    data, *_ = decoded(scene_view.scene_page(frames, answers, structure, "P001"))
    assert data["count"] == len(structure.position) - 1 and data["step"] < 1e-3
    monkeypatch.setattr(scene_view, "MAX_POINTS", 50)
    assert decoded(scene_view.scene_page(frames, answers, structure, "P001"))[0]["count"] == 50


def test_a_scene_without_points_or_with_one_camera_is_drawn(run):
    frames, answers, structure = run
    none = structure.within([])
    data, *_ = decoded(scene_view.scene_page(frames, answers, none, "P001"))
    assert data["count"] == 0 and len(data["cameras"]) == 9 and data["radius"] > 0
    alone = PosedFrames(**{**vars(frames), "index": [1], "queries": []})
    assert decoded(scene_view.scene_page(alone, [], none, "P001"))[0]["radius"] > 0
    lost = PosedFrames(**{**vars(frames), "index": [], "queries": [3]})
    assert decoded(scene_view.scene_page(lost, answers[1:2], none, "P001"))[0]["radius"] > 0


def test_files_of_this_run_replace_those_of_the_one_before(run, tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("scene_P009.html", "scene_mine.html"):
        (tmp_path / "report" / name).touch()
    handin.update_metrics(tmp_path, "test", {"views": [{"file": "scene_P009.html"}]}, "one")
    written = scene_view.write_scene_views(tmp_path, *run)
    assert [view["file"] for view in written] == ["scene_P001.html"] and not WARNINGS
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "scene_P001.html",
        "scene_mine.html",
    }
    assert check._views(tmp_path, {"test": {"views": written}}).holds
