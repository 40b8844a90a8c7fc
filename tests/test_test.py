"""Task 4's script: frames, split, errors, and that true poses only measure."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from localization.cameras import OPENCV, Convention, as_camera_to_world, poses_to_file
from model import InputError
from reporting import poses
from tests.course_driver.tiny_data import write_scene

_spec = importlib.util.spec_from_file_location("task4", Path(__file__).parents[1] / "test.py")
task4 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(task4)


def random_pose(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.normal(size=3), Rotation.random(random_state=rng).as_quat()])


def test_pose_error_is_scipys_angle_for_any_order_sign_and_length():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = random_pose(rng), random_pose(rng)
        angle = (Rotation.from_quat(a[3:]).inv() * Rotation.from_quat(b[3:])).magnitude()
        expected = (np.linalg.norm(a[:3] - b[:3]), np.degrees(angle))
        assert task4.pose_error(a, b) == pytest.approx(expected)
        scaled = np.concatenate([b[:3], -3 * b[3:]])
        assert task4.pose_error(a, scaled) == pytest.approx(expected)
        rolled = [np.concatenate([p[:3], np.roll(p[3:], 1)]) for p in (a, b)]
        assert task4.pose_error(*rolled) == pytest.approx(expected)


def test_world_to_camera_poses_are_compared_as_camera_to_world():
    rng = np.random.default_rng(1)
    convention = Convention("wxyz", "world_to_camera", OPENCV.axes)
    R = torch.from_numpy(Rotation.random(2, random_state=rng).as_matrix())
    c = torch.tensor([[1.0, 2, 3], [1, 2, 7]], dtype=torch.float64)
    rows = poses_to_file(R, c, convention).numpy()
    turned = [as_camera_to_world(row, convention) for row in rows]
    assert task4.pose_error(*turned)[0] == pytest.approx(4)
    assert task4.pose_error(*rows)[0] != pytest.approx(4)


def test_split_is_the_assignments_draw_and_frames_without_pose_become_queries():
    poses = np.tile([0, 0, 0, 0, 0, 0, 1.0], (23, 1))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(42)).tolist()
    queries, index = task4.split_frames(poses, 42)
    assert queries == order[:4] and index == order[4:]
    poses[[order[0], order[7], order[9]]] = np.nan
    queries, index = task4.split_frames(poses, 42)
    assert queries == order[:4] + sorted([order[7], order[9]])
    assert set(index) == set(order[4:]) - {order[7], order[9]}
    assert task4.split_frames(poses[:2] * 0 + 1, 0)[0] == task4.split_frames(poses[:2] * 0 + 1, 0)[0]
    with pytest.raises(InputError, match="index image"):
        task4.split_frames(poses[:1], 0)


def test_shorter_of_images_and_poses_rules_and_scene_choice(sample, tmp_path, capsys):
    camera = tmp_path / "camera"
    shutil.copytree(sample / "camera", camera)
    scenes = sorted(p.name for p in camera.iterdir())
    count = len(list((camera / scenes[0] / "images").iterdir()))
    lines = (camera / scenes[0] / "pose.txt").read_text().splitlines()
    (camera / scenes[0] / "pose.txt").write_text("\n".join(lines[:-2]) + "\n")
    frames = task4.IndoorDataset(camera, scenes=scenes[:1] * 2)
    assert len(frames) == count - 2
    _, pose, path, scene, number = frames[3]
    assert pose.dtype == torch.float32 and pose.shape == (7,)
    assert (scene, number) == (scenes[0], 3) and Path(path).is_file()
    np.testing.assert_allclose(pose.numpy(), np.array(lines[3].split(), dtype=float), atol=1e-5)
    task4.IndoorDataset(camera)
    assert "not all of P001 P002 P003 P004" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"nowhere.*{scenes[0]}"):
        task4.IndoorDataset(camera, scenes=["nowhere"])
    (camera / "in").mkdir()
    (camera / scenes[1]).rename(camera / "in" / "it")
    same = [scenes[0], f"./{scenes[0]}/", f"{scenes[0]}/../{scenes[0]}", str(camera.absolute() / scenes[0])]
    frames = task4.IndoorDataset(camera, scenes=[*same, "in//it"])
    assert frames.scenes == [scenes[0], "in/it"]
    assert "/" not in poses.in_file_name("in/it") != poses.in_file_name("in_it")
    for outside in ("..", "../camera", str(tmp_path), "."):
        with pytest.raises(InputError, match=f"{outside} is no folder in .*: give --camera .* --scenes"):
            task4.IndoorDataset(camera, scenes=[outside])


def test_an_interrupted_run_ends_with_a_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(task4, "run", interrupted)
    assert task4.main([]) == 130
    assert capsys.readouterr().err.startswith("\nInterrupted: ")


def test_a_folder_that_is_a_scene_itself_is_told_how_to_name_it(sample):
    scene = min((sample / "camera").iterdir())
    with pytest.raises(InputError, match=f"one itself: give --camera {scene.parent} --scenes {scene.name}"):
        task4.IndoorDataset(scene)


def read_estimates(output: Path) -> dict[str, list[str]]:
    lines = (output / "estimated_poses.tsv").read_text().splitlines()[1:]
    return {Path(line.split("\t")[0]).name: line.split("\t")[1:] for line in lines}


@pytest.fixture(scope="module", autouse=True)
def features_found_once(tmp_path_factory):
    """These tests look at the same images: what is found in them is kept as long as they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task4, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def truthful(sample, checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """A scene and the output of test.py on it."""
    root = tmp_path_factory.mktemp("truthful")
    scene = min(p.name for p in (sample / "camera").iterdir())
    shutil.copytree(sample / "camera" / scene, root / "camera" / "room")
    run = ["--camera", root / "camera", "--checkpoint", checkpoint, "--output", root / "out",
           "--export", "colmap", root / "model", "--export", "hloc", root / "hloc.txt"]  # fmt: skip
    assert task4.main([str(word) for word in run]) == 0
    return root / "camera" / "room", root / "out"


def test_rendered_room_is_recovered_to_a_centimeter_and_a_tenth_of_a_degree(truthful):
    import json

    section = json.loads((truthful[1] / "metrics.json").read_text())["test"]
    assert section["median_m"] < 0.01 and section["median_deg"] < 0.1
    assert section["retrieval"]["median_m"] > 0.2


def test_the_exported_model_is_the_room_to_a_pixel(truthful):
    """pycolmap's cameras see the points where their keypoints are; the poses are those of pose.txt."""
    scene, output = truthful
    model = pycolmap.Reconstruction(str(output.parent / "model" / "room"))
    true = np.loadtxt(scene / "pose.txt")
    names = [path.name for path in sorted((scene / "images").iterdir())]
    assert {image.name for image in model.images.values()} == set(names)
    for image in model.images.values():
        assert np.linalg.norm(image.projection_center() - true[names.index(image.name), :3]) < 0.02
    errors = [
        np.linalg.norm(model.images[e.image_id].project_point(p.xyz) - model.images[e.image_id].points2D[e.point2D_idx].xy)
        for p in model.points3D.values() for e in p.track.elements
    ]  # fmt: skip
    assert len(model.points3D) > 300 and np.mean(errors) < 1.0
    lines = (output.parent / "hloc.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"room/images/{name}" for name in read_estimates(output)]
    page = (output / "report/scene_room.html").read_text(encoding="utf-8")
    assert all(name in page for name in names) and "scene_room.html" in (output / "report/report.html").read_text()


def test_true_poses_and_file_names_of_queries_influence_nothing(truthful, checkpoint, tmp_path, monkeypatch):
    """Garbage for the queries' poses, their images renamed and moved in the file order: same estimates."""
    scene, output = truthful
    rows = (scene / "pose.txt").read_text().splitlines()
    images = sorted((scene / "images").iterdir())
    queries, index = task4.split_frames(np.zeros((len(rows), 7)), 42)
    rng = np.random.default_rng(0)
    shuffled = tmp_path / "camera" / "room" / "images"
    shuffled.mkdir(parents=True)
    # The queries go to the end of the file order, in another order, with other names and poses.
    order, poses, new_name = [], [], {}
    for place, row in enumerate([*sorted(index), *rng.permutation(queries)]):
        name = f"{place:06d}.png"
        shutil.copy(images[row], shuffled / name)
        new_name[images[row].name] = name
        garbage = " ".join(f"{v:.6f}" for v in 100 * random_pose(rng))
        poses.append(garbage if row in queries else rows[row])
        order.append(row)
    (shuffled.parent / "pose.txt").write_text("\n".join(poses) + "\n")
    place_of = {row: place for place, row in enumerate(order)}
    split = [place_of[row] for row in queries], [place_of[row] for row in index]
    monkeypatch.setattr(task4, "split_frames", lambda *_: split)
    run = ["--camera", tmp_path / "camera", "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    assert task4.main([str(word) for word in run]) == 0
    before, after = read_estimates(output), read_estimates(tmp_path / "out")
    assert len(after) == len(before)
    for name, estimate in before.items():
        assert after[new_name[name]] == estimate


@pytest.fixture(scope="module")
def room_and_photos(sample, tmp_path_factory) -> tuple[Path, list[Path], np.ndarray]:
    """camera/ with a room and another scene, two frames taken out of the room, one of them at half
    its size, and the rows these had in pose.txt."""
    root = tmp_path_factory.mktemp("photos")
    scene, other = sorted((sample / "camera").iterdir())
    shutil.copytree(scene, root / "camera" / "room")
    shutil.copytree(other, root / "camera" / "other")
    room = root / "camera" / "room"
    rows = (room / "pose.txt").read_text().splitlines()
    images = sorted((room / "images").iterdir())
    taken = (3, 8)
    photos = [root / "whole.png", root / "half.png"]
    shutil.move(images[taken[0]], photos[0])
    with Image.open(images[taken[1]]) as image:
        image.reduce(2).save(photos[1])
    images[taken[1]].unlink()
    kept = [row for number, row in enumerate(rows) if number not in taken]
    (room / "pose.txt").write_text("\n".join(kept) + "\n")
    return root / "camera", photos, np.array([rows[number].split() for number in taken], dtype=float)


def test_poses_of_new_images_in_a_posed_scene(room_and_photos, checkpoint, tmp_path, capsys):
    camera, photos, truth = room_and_photos
    argv = ["--camera", camera, "--scenes", "room", "--query", *photos, "--checkpoint", checkpoint,
            "--output", tmp_path / "out", "--quiet", "--export", "colmap", tmp_path / "model"]  # fmt: skip
    assert task4.main([str(word) for word in argv]) == 0
    model = pycolmap.Reconstruction(str(tmp_path / "model" / "room"))
    assert {p.as_posix() for p in photos} < {image.name for image in model.images.values()} and len(model.points3D) > 300
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "query_poses.tsv"]
    lines = (tmp_path / "out/query_poses.tsv").read_text().splitlines()[1:]
    for line, photo, pose, limit_m in zip(lines, photos, truth, (0.02, 0.05), strict=True):
        path, *numbers = line.split("\t")[:8]
        meters, degrees = task4.pose_error(np.array(numbers, dtype=float), pose)
        assert path == str(photo) and meters < limit_m and degrees < 0.5
    said = capsys.readouterr()
    assert said.out.startswith(f"{photos[0]}: in scene room") and said.err == ""
    assert len(said.out.splitlines()) == 3 * len(photos) + 2 and said.out.endswith(f"Exported: {tmp_path / 'model'}\n")


def test_a_map_is_enough_without_the_images_and_known_from_others(
    room_and_photos, checkpoint, tmp_path, capsys
):
    camera, photos, _ = room_and_photos
    words = ["--map", tmp_path / "room.map", "--query", photos[0], "--checkpoint", checkpoint]

    def run(output: str, *more: object) -> int:
        return task4.main([str(w) for w in (*words, "--output", tmp_path / output, "--quiet", *more)])

    assert run("with", "--camera", camera, "--scenes", "room") == 0
    assert run("alone") == 0
    assert run("again", "--camera", camera, "--scenes", "room") == 0
    made, alone, again = (
        (tmp_path / name / "query_poses.tsv").read_bytes() for name in ("with", "alone", "again")
    )
    assert made == alone == again
    capsys.readouterr()
    write_scene(tmp_path / "camera", "other", 7, seed=2)
    refused = {
        ("--camera", tmp_path / "camera"): "is a map of other images or settings",
        ("--intrinsics", 400, 400, 320, 240): "has what --intrinsics says of its own",
        ("--map", tmp_path / "rom.map"): "rom.map does not exist: name a map",
    }
    for more, says in refused.items():
        assert run("refused", *more) == 2
        assert says in capsys.readouterr().err


def test_an_index_image_that_cannot_be_read_is_left_out_and_said(checkpoint, tmp_path, capsys):
    write_scene(tmp_path / "camera", "room", 7, seed=1)
    _, index = task4.split_frames(np.zeros((7, 7)), 42)
    spoiled = tmp_path / f"camera/room/images/{index[2]:06d}_left.png"
    spoiled.write_bytes(spoiled.read_bytes()[:200])
    words = ["--camera", tmp_path / "camera", "--output", tmp_path / "o", "--checkpoint", checkpoint]
    assert task4.main([*map(str, words), "--device", "cpu", "--min-confidence", "0.9"]) == 0
    said = capsys.readouterr()
    assert "Not found, with a confidence below 0.9: 1 of 1 queries." in said.out
    assert (tmp_path / "o/estimated_poses.tsv").read_text().splitlines()[1].endswith("\tnot found")
    assert f"WARNING: 1 of 7 images are left out: the image {spoiled} cannot be read" in said.err
    text = (tmp_path / "o/result_pose_eval.txt").read_text(encoding="utf-8")
    assert "(queries=1, index=5)" in text and str(spoiled) not in text


def test_bad_input_of_new_images(room_and_photos, checkpoint, tmp_path, capsys):
    camera, photos, _ = room_and_photos
    for scenes, query, named in (
        (["room"], tmp_path / "nothing.png", "nothing.png"), (["attic"], photos[0], "attic"),
    ):  # fmt: skip
        argv = ["--camera", camera, "--scenes", *scenes, "--query", query, "--checkpoint", checkpoint,
                "--output", tmp_path / "out"]  # fmt: skip
        assert task4.main([str(word) for word in argv]) == 2
        said = capsys.readouterr()
        assert named in said.err and len(said.err.splitlines()) == 1 and "descriptors" not in said.out


@pytest.mark.parametrize("option", [
    "--top-k 0", "--top-k -3", "--seed -1", f"--seed {10**30}", "--intrinsics 0 0 320 240",
    "--intrinsics -320 320 320 240", "--intrinsics nan 320 320 240", "--intrinsics 320 320 inf 240",
    "--query-intrinsics 35 35 160 120", "--query-intrinsics 400 400 3000 3000", "--min-confidence 1.5", "--min-confidence nan", "--min-confidence -0.1", "--export ply model", "--export colmap .",
    "--convention ned",
])  # fmt: skip
def test_a_bad_option_is_one_sentence(option, room_and_photos, checkpoint, tmp_path, capsys):
    argv = ["--camera", str(room_and_photos[0]), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert task4.main([*argv, *option.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"test.py: {option.split()[0]}") and len(said.splitlines()) == 1


def test_poses_are_written_before_pictures_and_survive_one_that_fails(
    room_and_photos, checkpoint, tmp_path, monkeypatch, capsys
):
    """The scene's picture fails: the poses were there before, the other pictures and the report come all the same."""
    there = []

    def fail(*_):
        there.extend(p.name for p in tmp_path.iterdir())
        raise RuntimeError("no ink")

    monkeypatch.setattr(poses, "draw_poses", fail)
    argv = ["--camera", room_and_photos[0], "--scenes", "room", "--checkpoint", checkpoint, "--output", tmp_path]
    assert task4.main([str(word) for word in argv]) == 0
    assert {"result_pose_eval.txt", "estimated_poses.tsv"} <= set(there)
    assert (tmp_path / "report/errors.png").is_file() and (tmp_path / "report/report.md").is_file()
    assert any((tmp_path / "report").glob("matches_*.png"))
    assert "RuntimeError: no ink" in capsys.readouterr().err
