"""What is exported: pycolmap opens the model and reprojects its points; poses in TUM's and hloc's words."""

from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

import model
from localization.cameras import OPENCV, Camera, poses_to_file, project, rays
from localization.structure import structure_of
from localization.triangulation import triangulate_views
from model import InputError
from reporting import export
from reporting.poses import PosedFrames
from tests.reporting.posed import make_views

CENTERS = [[0.3 * i, 0.1 * (i % 3), 0.05 * i] for i in range(7)]
COLOR = (200, 30, 60)

OUTPUT = Path("output")


@pytest.fixture
def run(tmp_path):
    """Two scenes of one world, seven frames of P001 and four of P002; the queries 0, 3, 5 and 7, the
    second of which was not found; P002 has a lens with distortion."""
    views = make_views(CENTERS) + make_views(CENTERS[3:], seed=1)
    R = Rotation.from_rotvec([0.1, -0.2, 0.3]).as_matrix()  # any world will do
    for view in views:
        view.R_world_from_cam = torch.tensor(R) @ view.R_world_from_cam
        view.c_world = torch.tensor(R) @ view.c_world
    scenes = ["P001"] * 7 + ["P002"] * 4
    queries, index = [0, 3, 5, 7], [1, 2, 4, 6, 8, 9, 10]
    worlds = [[row for row in index if row < 7], [row for row in index if row >= 7]]
    structure = structure_of(
        (rows, chosen, triangulate_views(chosen))
        for rows, chosen in ((rows, [views[row] for row in rows]) for rows in worlds)
    )
    wide = Camera(300.0, 310.0, 322.0, 238.0, 640, 480, -0.1, 0.01, 0.01, -0.02)
    for view in views[7:]:
        view.features.xy_px[:] = project(wide, rays(view.camera, view.features.xy_px))
        view.camera = wide
    rows = poses_to_file(
        torch.stack([v.R_world_from_cam for v in views]),
        torch.stack([v.c_world for v in views]),
        OPENCV,
    ).numpy()
    root = tmp_path / "camera"
    paths = [root / scene / "images" / f"{i:04d}.png" for i, scene in enumerate(scenes)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 480), COLOR).save(path)
    answers = [{"pose": rows[q].tolist(), "found": q != 3} for q in queries]
    conventions = {"P001": OPENCV, "P002": OPENCV}
    frames = PosedFrames(paths, scenes, rows, views, queries, index, conventions)
    return frames, answers, structure, root


def pose_of(frames: PosedFrames, row: int) -> tuple[np.ndarray, np.ndarray]:
    view = frames.views[row]
    return view.R_world_from_cam.numpy(), view.c_world.numpy()


@pytest.mark.parametrize(("scene", "rows"), [("P001", [0, 1, 2, 4, 5, 6]), ("P002", [7, 8, 9, 10])])
def test_pycolmap_opens_the_model_and_reprojects_its_points(scene, rows, run, tmp_path):
    frames, _, structure, _ = run
    target = tmp_path / "new" / "model"
    assert export.write_exports([("colmap", str(target))], *run) == [target]
    model = pycolmap.Reconstruction(str(target / scene))
    assert {image.name for image in model.images.values()} == {f"{row:04d}.png" for row in rows}
    for row in rows:  # the query that was not found is left out
        image = model.find_image_with_name(f"{row:04d}.png")
        R, c = pose_of(frames, row)
        np.testing.assert_allclose(image.projection_center(), c, atol=1e-9)
        np.testing.assert_allclose(image.cam_from_world().rotation.matrix(), R.T, atol=1e-9)
        assert (image.num_points3D > 50) == (row in frames.index)
        lens = frames.views[row].camera
        assert (image.camera.principal_point_x, image.camera.focal_length_y) == (
            lens.cx + 0.5,
            lens.fy,
        )
    index = [row for row in rows if row in frames.index]
    assert len(model.points3D) == len(structure.within(index).position) > 100
    errors = [
        np.linalg.norm(
            model.images[element.image_id].project_point(point.xyz)
            - model.images[element.image_id].points2D[element.point2D_idx].xy
        )
        for point in model.points3D.values()
        for element in point.track.elements
    ]
    assert np.median(errors) < 0.01 and max(errors) < 4
    assert all(tuple(point.color) == COLOR for point in model.points3D.values())
    said = np.mean([point.error for point in model.points3D.values()])
    model.update_point_3d_errors()
    assert said == pytest.approx(np.mean([p.error for p in model.points3D.values()]), abs=1e-3)


def test_poses_as_hlocs_list(run, tmp_path):
    frames = run[0]
    export.write_exports([("hloc", str(tmp_path / "poses.txt"))], *run)
    lines = [line.split() for line in (tmp_path / "poses.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [
        "P001/images/0000.png",
        "P001/images/0005.png",
        "P002/images/0007.png",
    ]
    for line, row in zip(lines, (0, 5, 7), strict=True):
        qw, *numbers = map(float, line[1:])
        R, c = pose_of(frames, row)
        np.testing.assert_allclose(
            Rotation.from_quat([*numbers[:3], qw]).as_matrix(), R.T, atol=1e-9
        )
        np.testing.assert_allclose(numbers[3:], -R.T @ c, atol=1e-9)


def test_poses_as_tums_trajectory_of_each_scene(run, tmp_path):
    frames = run[0]
    written = export.write_exports([("tum", str(tmp_path / "est.txt"))], *run)
    assert [path.name for path in written] == ["est_P001.txt", "est_P002.txt"]
    rows = [np.loadtxt(path, ndmin=2) for path in written]
    assert rows[0][:, 0].tolist() == [0, 5] and rows[1][:, 0].tolist() == [7]
    for line, row in zip([*rows[0], *rows[1]], (0, 5, 7), strict=True):
        R, c = pose_of(frames, row)
        np.testing.assert_allclose(line[1:4], c, atol=1e-9)
        np.testing.assert_allclose(Rotation.from_quat(line[4:]).as_matrix(), R, atol=1e-9)


@pytest.mark.parametrize(
    ("stems", "times"),
    [
        (["t2_10.5", "t2_9.25", "t2_100", "x"], ["9.25", "10.5"]),
        (["a1", "a2", "a1", "x"], ["0", "5"]),  # numbers that are one: the rows
        (["left", "right", "top", "x"], ["0", "5"]),
        (["12-33-59", "12-34-01", "a", "x"], ["0", "5"]),  # a clock's seconds
    ],
)
def test_times_are_the_last_numbers_of_names_that_these_tell_apart(
    stems, times, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(model, "WARNINGS", [])
    frames, answers, *rest = run
    for row, stem in zip((0, 5, 3, 7), stems):
        frames.paths[row] = frames.paths[row].with_name(f"{stem}.png")
    frames.paths[5] = frames.paths[5].with_name(f"{stems[2] if stems[0] == 'a1' else stems[1]}.png")
    export.write_exports([("tum", str(tmp_path / "est.txt"))], frames, answers, *rest)
    lines = (tmp_path / "est_P001.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if line[0] != "#"] == times
    said = capsys.readouterr().err
    assert ("est_P001.txt: no numbers rise with the images' names" in said) == (times == ["0", "5"])


def test_an_image_from_elsewhere_is_named_as_it_was_given(run, tmp_path):
    frames, *rest = run
    frames.paths[0] = Path("photos/new.png")
    export.write_exports(
        [("hloc", str(tmp_path / "p")), ("colmap", str(tmp_path / "m"))], frames, *rest
    )
    assert (tmp_path / "p").read_text().startswith("photos/new.png ")
    model = pycolmap.Reconstruction(str(tmp_path / "m/P001"))
    assert model.find_image_with_name("photos/new.png") is not None


def test_a_model_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    def full(path, text):
        if path.name == "points3D.txt":
            raise InputError(f"cannot write {path}: the disk is full.")
        write(path, text)

    write = export.write_text
    monkeypatch.setattr(export, "write_text", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match="the disk is full"):
        export.write_exports([("colmap", str(tmp_path / "m"))], *run)
    assert set(tmp_path.iterdir()) == before


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file_P002.txt").touch()
    scenes = ["P001", "P002"]
    for name, file in (
        ("colmap", "folder"),
        ("colmap", "file_P002.txt"),
        ("hloc", "folder"),
        ("hloc", "empty"),
        ("hloc", "file_P002.txt"),
        ("tum", "file.txt"),
    ):
        with pytest.raises(InputError, match="is there already and is not overwritten"):
            export.check_exports([(name, str(tmp_path / file))], scenes, [], tmp_path, OUTPUT, None)
    before = sorted(tmp_path.iterdir())
    targets = [("colmap", "empty"), ("hloc", "new.txt"), ("tum", "new.txt")]
    export.check_exports([(n, str(tmp_path / f)) for n, f in targets], scenes, [], tmp_path, OUTPUT, None)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    export.write_exports([("colmap", str(tmp_path / "empty"))], *run)
    assert (tmp_path / "empty/P002/points3D.txt").is_file()


@pytest.mark.parametrize(
    ("exports", "paths", "says"),
    [
        ([("ply", "x")], [], "--export ply x: the format is one of colmap, tum, hloc"),
        ([("tum", "x"), ("hloc", "x")], [], "two exports go to x"),
        ([("colmap", "x")], ["my scans/the hall/images/a b.png"], "as 'a b.png' does: rename it"),
        ([("hloc", "x")], ["my scans/the hall/images/a.png"], "as 'the hall/images/a.png' does"),
        ([("hloc", "x")], ["a\u00a0b.png"], "no name may hold a blank"),
        ([("hloc", "/dev/null/x")], [], "cannot write /dev/null"),
        ([("colmap", "x"), ("hloc", "x/y/z.txt")], [], "two exports go to x/y/z.txt"),
        ([("hloc", "m")], [], "the run itself writes m"),
        ([("colmap", "o")], [], "the run itself writes o"),
        ([("hloc", "o/metrics.json")], [], "the run itself writes o/metrics.json"),
        ([("tum", "o/report/x.txt")], [], "the run itself writes o/report/x.txt"),
        ([("colmap", "x")], ["my scans/the hall/images/a.png", "a.png"], "two images would be called a.png"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_before_the_run(
    exports, paths, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        images = [(Path(path), "the hall" if "/" in path else "") for path in paths]
        export.check_exports(exports, ["the hall"], images, Path("my scans"), tmp_path / "o", Path("m"))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_blanks_that_are_in_no_name_are_no_fault(tmp_path):
    root = tmp_path / "my scans"
    images = [(root / "the hall" / "images" / "a.png", "the hall")]
    export.check_exports([("colmap", str(tmp_path / "x"))], ["the hall"], images, root, OUTPUT, None)
    export.check_exports(
        [("hloc", str(tmp_path / "x"))], ["hall"], [(root / "hall/images/a.png", "hall")], root, OUTPUT, None
    )
    export.check_exports([("tum", str(tmp_path / "x"))], ["hall"], [(Path("a b.png"), "")], root, tmp_path, None)
