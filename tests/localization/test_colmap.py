"""COLMAP's models, written by pycolmap, text and binary: poses, names, a camera for each image."""

import re
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from localization.atlas import build_atlas
from localization.cameras import Camera, poses_from_file, poses_to_file, project
from localization.pose_files import COLMAP, read_scene
from model import WARNINGS, InputError

PINHOLE = ("PINHOLE", 640, 480, [500, 510, 320.5, 240.5])
RADIAL = ("RADIAL", 800, 600, [600, 400.5, 300.5, 0.1, -0.02])
OPENCV = ("OPENCV", 800, 600, [600, 610, 400.5, 300.5, 0.1, -0.02, 0.01, -0.02])
NAMES = ["a/0001.png", "a/0002.png", "b/0001.png", "b/0002.png", "b/0010.png"]


def model_of(names: list[str], cameras: list[tuple]) -> pycolmap.Reconstruction:
    """Images with random poses, the first three of camera 1, the rest of the last; one has points."""
    model = pycolmap.Reconstruction()
    for number, (kind, width, height, values) in enumerate(cameras, 1):
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(camera_id=number, model=kind, width=width, height=height, params=values)
        )
    turns = Rotation.random(len(names), random_state=0).as_quat()
    for number, (name, turn) in enumerate(zip(names, turns), 1):
        image = pycolmap.Image(name=name, image_id=number)
        image.camera_id = 1 if number <= 3 else len(cameras)
        if number == 2:
            image.points2D = pycolmap.Point2DList([pycolmap.Point2D([1.5, 2.5])])
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(turn), [number, 2, 3])
        model.add_image_with_trivial_frame(image, pose)
    return model


def scene_of(folder: Path, model: pycolmap.Reconstruction, binary=True, place="sparse/0") -> Path:
    """A scene with the images of a model, and the model."""
    for image in model.images.values():
        file = folder / "images" / image.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / place).mkdir(parents=True, exist_ok=True)
    (model.write_binary if binary else model.write_text)(str(folder / place))
    return folder


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("place", [".", "images", "sparse/0", "sparse"])
def test_each_image_gets_its_pose_and_its_own_camera(binary, place, tmp_path):
    model = model_of(NAMES, [PINHOLE, OPENCV if binary else RADIAL])
    scene = scene_of(tmp_path, model, binary, place)
    found = read_scene(scene)
    assert [p.relative_to(scene / "images").as_posix() for p in found.paths] == NAMES
    assert found.convention == COLMAP and not WARNINGS
    R, c = poses_from_file(found.poses, found.convention)
    for path, rotation, center in zip(found.paths, R, c):
        image = model.find_image_with_name(path.relative_to(scene / "images").as_posix())
        np.testing.assert_allclose(image.projection_center(), center, atol=1e-9)
        turn = image.cam_from_world().rotation.matrix()
        np.testing.assert_allclose(turn, rotation.T, atol=1e-9)
        # A point is seen where pycolmap's camera sees it, half a pixel less.
        point = np.array([0.3, -0.2, 1.0])
        here = project(found.lenses[path], torch.tensor(point)) + 0.5
        np.testing.assert_allclose(image.camera.img_from_cam(point), here, atol=1e-9)
    assert found.camera == found.lenses[found.paths[0]]  # most images are of it


def test_one_camera_is_the_scenes(tmp_path):
    found = read_scene(scene_of(tmp_path, model_of(NAMES, [RADIAL])))
    assert found.camera == Camera(600, 600, 400, 300, 800, 600, 0.1, -0.02) and not found.lenses


def test_pose_txt_and_intrinsics_txt_come_first(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE, RADIAL]))
    (scene / "intrinsics.txt").write_text("1 RADIAL 800 600 700 400.5 300.5 0 0\n")
    found = read_scene(scene)
    assert found.camera.fx == 700 and not found.lenses
    flat = tmp_path / "flat"
    (flat / "images").mkdir(parents=True)
    (flat / "images" / "1.png").touch()
    (flat / "pose.txt").write_text("1 2 3 0 0 0 1\n")
    shutil.copytree(scene / "sparse", flat / "sparse")
    assert read_scene(flat).convention is None


def test_images_that_are_not_there_and_images_of_no_pose_are_said(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE, RADIAL]))
    (scene / "images" / NAMES[1]).unlink()
    (scene / "images" / "a" / "new.png").touch()
    found = read_scene(scene)
    assert [path.name for path in found.paths] == [Path(n).name for n in NAMES if n != NAMES[1]]
    assert found.poses[1, 0] == pytest.approx(3) and len(WARNINGS) == 2
    assert "5 images, 4 of which are among" in WARNINGS[0]
    assert "1 of its 5 images are not there" in WARNINGS[1]


def test_names_of_no_image_are_named(tmp_path):
    scene = scene_of(tmp_path, model_of(["x.png", "y.png"], [PINHOLE]))
    for file in (scene / "images").iterdir():
        file.rename(file.with_name(f"other_{file.name}"))
    with pytest.raises(
        InputError, match=r"images\.bin has images such as '[xy]\.png'.*other_x\.png"
    ):
        read_scene(scene)


def test_images_that_were_converted_keep_their_poses(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE]))
    for file in list((scene / "images").glob("*/*")):
        file.rename(file.with_suffix(".jpg"))
    assert read_scene(scene).poses[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_an_empty_model_and_cameras_of_other_images_are_said(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE, RADIAL]))
    for name in NAMES:
        Image.new("L", (320, 240)).save(scene / "images" / name)  # half, and 2.5 times smaller
    read_scene(scene)
    assert not WARNINGS
    Image.new("L", (240, 320)).save(scene / "images" / NAMES[4])
    read_scene(scene)
    assert (
        len(WARNINGS) == 1 and "camera 2 is of 800x600 images, but of 240x320 ones" in WARNINGS[0]
    )
    far = ("PINHOLE", 640, 480, [500, 500, 3200, 240])
    far = scene_of(tmp_path / "far", model_of(NAMES, [PINHOLE, far]))
    with pytest.raises(
        InputError, match=r"center 3199\.5 239\.5 of camera 2 is outside its 640x480"
    ):
        read_scene(far)
    (scene / "sparse/0/images.bin").write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match=r"images\.bin has no image: export it again"):
        read_scene(scene)


def test_an_image_that_is_there_twice_is_named(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE]), binary=False)
    file = scene / "sparse/0/images.txt"
    file.write_text(file.read_text().replace(NAMES[4], NAMES[3]))
    with pytest.raises(InputError, match=r"images\.txt has two images 'b/0002\.png'"):
        read_scene(scene)


@pytest.mark.parametrize("binary", [True, False])
def test_a_model_that_is_not_read_is_one_sentence_if_images_are_of_it(binary, tmp_path):
    fisheye = ("OPENCV_FISHEYE", 640, 480, [500, 500, 320, 240, 0.1, 0, 0, 0])
    scene = scene_of(tmp_path / "used", model_of(NAMES, [PINHOLE, fisheye]), binary)
    with pytest.raises(InputError, match="OPENCV_FISHEYE is none of .*: undistort") as error:
        read_scene(scene)
    assert "\n" not in str(error.value) and "cameras." in str(error.value)
    scene = scene_of(tmp_path / "unused", model_of(NAMES, [PINHOLE, fisheye, RADIAL]), binary)
    assert len(set(read_scene(scene).lenses.values())) == 2


@pytest.mark.parametrize("binary", [True, False])
def test_cameras_that_are_lost(binary, tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE, RADIAL]), binary)
    other = tmp_path / "other"
    other.mkdir()
    one = model_of(NAMES, [PINHOLE])
    (one.write_binary if binary else one.write_text)(str(other))
    cameras = next((scene / "sparse/0").glob("cameras.*"))
    shutil.copy(other / cameras.name, cameras)
    with pytest.raises(InputError, match="has no camera 2, of which there are images"):
        read_scene(scene)
    cameras.unlink()
    assert read_scene(scene).camera is None


def test_unknown_models_are_as_many_as_pycolmap_knows():
    from localization.lens_files import COLMAP_MODELS

    known = {
        int(model): (name, model)
        for name, model in pycolmap.CameraModelId.__members__.items()
        if int(model) >= 0
    }
    for number, (name, (count, _)) in enumerate(COLMAP_MODELS.items()):
        if number in known:
            camera = pycolmap.Camera(model=name, width=640, height=480)
            assert known[number][0] == name
            assert camera.model == known[number][1]
            created = pycolmap.Camera.create_from_model_id(1, known[number][1], 500, 640, 480)
            assert len(created.params) == count


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_binary_model_is_an_input_error(tmp_path, data):
    """Cut at any byte, or with any byte replaced: read, or one sentence."""
    folder = tmp_path / "whole"
    if not folder.exists():
        scene_of(folder, model_of(NAMES, [PINHOLE, RADIAL]))
    name = data.draw(st.sampled_from(["images.bin", "cameras.bin"]))
    whole = (folder / "sparse/0" / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    new = bytes([data.draw(st.integers(0, 255))])
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    file = damaged / "sparse/0" / name
    file.write_bytes(whole[:at] if cut else whole[:at] + new + whole[at + 1 :])
    if cut:
        with pytest.raises(InputError, match=re.escape(str(file))):
            read_scene(damaged)
        return
    try:
        found = read_scene(damaged)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.poses.shape == (len(found.paths), 7)


def test_what_follows_the_last_entry_is_damage(tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE]))
    with open(scene / "sparse/0/images.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="goes on after its last entry"):
        read_scene(scene)


def test_queries_are_located_among_images_of_several_cameras(random_world, random_poses):
    """Half of the views through a wide lens with distortion: all pixels mean what their own says."""
    narrow, wide = (
        Camera(400.0, 400.0, 320, 240, 640, 480),
        Camera(420.0, 430.0, 395.0, 310.0, 800, 600, -0.15, 0.02),
    )
    world, poses = random_world(5, 300), random_poses(9, 5)
    lenses = [wide if i % 2 else narrow for i in range(9)]
    views = [world.view(R, c, camera=lens) for (R, c), lens in zip(poses, lenses)]
    truth = [view.c_world for view in views]
    before = [view.features.xy_px.clone() for view in views]
    rows = poses_to_file(
        torch.stack([v.R_world_from_cam for v in views]), torch.stack(truth), COLMAP
    ).numpy()
    queries, index = [0, 1], list(range(2, 9))
    for view in views:
        view.R_world_from_cam = view.c_world = None
    atlas = build_atlas(
        [f"{n}.png" for n in range(9)],
        ["a"] * 9,
        rows,
        views,
        np.ones((9, 1)),
        index,
        {"a": narrow},
        {"a": COLMAP},
        lenses,
        seed=0,
    )
    found = atlas.calibrations
    assert found["a"].trusted and found["a"].explained > 0.9
    assert [view.camera for view in views] == lenses and views[0].lens_is_sure
    for view, xy in zip(views, before):
        assert float((view.features.xy_px - xy).abs().max()) < 0.01
    asked = [views[query] for query in queries]
    estimates = atlas.localize(asked, ["a"] * 2, np.ones((2, 1)), top_k=30, seed=0)
    for query, estimate in zip(queries, estimates):
        assert float((estimate.c_world - truth[query]).norm()) < 0.02


@pytest.mark.parametrize("binary", [True, False])
def test_cameras_beside_a_pose_txt_give_the_lens(binary, tmp_path):
    scene = scene_of(tmp_path, model_of(NAMES, [PINHOLE]), binary, ".")
    expected = read_scene(scene).camera
    for file in scene.glob("images.*"):
        file.unlink()
    (scene / "pose.txt").write_text("".join(f"{i} 0 0 0 0 0 1\n" for i in range(len(NAMES))))
    for number, name in enumerate(NAMES):
        (scene / "images" / name).rename(scene / "images" / f"{number}.png")
    assert expected is not None and read_scene(scene).camera == expected
