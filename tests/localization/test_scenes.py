"""Several scenes at once: cameras, worlds, and which queries are localized with which index images."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from localization.atlas import Atlas, build_atlas, kept, key_of
from localization.cameras import TARTANAIR, Camera, poses_to_file
from localization.matching import View
from localization.scenes import calibrate_scenes, worlds_of
from model import InputError

CAMERA = Camera(320.0, 320.0, 320.0, 240.0, 640, 480)


def frames_of(
    worlds: dict[str, tuple], poses: dict[str, list]
) -> tuple[list[View], list[str], np.ndarray]:
    """Views, scene names and pose rows of the frames of several scenes, as they stand in a run."""
    views, scene_of, rows = [], [], []
    for scene, world in worlds.items():
        for R, c in poses[scene]:
            views.append(world.view(R, c))
            scene_of.append(scene)
            rows.append(poses_to_file(R[None], c[None], TARTANAIR)[0].numpy())
    return views, scene_of, np.array(rows)


def test_each_query_is_found_in_its_own_scene_and_again_in_the_kept_map(random_world, random_poses, tmp_path):
    poses = {"a": random_poses(9, 1), "b": random_poses(8, 2)}
    views, scene_of, rows = frames_of({"a": random_world(1), "b": random_world(2)}, poses)
    queries, index = [0, 9], [*range(1, 9), *range(10, 17)]
    truth = [views[q].c_world for q in queries]
    for view in views:
        view.R_world_from_cam = view.c_world = None
    atlas = build_atlas(
        [f"{n}.png" for n in range(17)],
        scene_of,
        rows,
        views,
        np.eye(17),
        index,
        {"a": CAMERA, "b": CAMERA},
        {"a": None, "b": None},
        seed=0,
    )
    assert {scene: c.convention for scene, c in atlas.calibrations.items()} == {"a": TARTANAIR, "b": TARTANAIR}
    assert views[0].c_world is None and views[1].c_world is not None
    assert [world.scenes for world in atlas.worlds] == [["a"], ["b"]]
    asked = [views[q] for q in queries]
    estimates = atlas.localize(asked, ["a", "b"], np.eye(17)[queries], top_k=30, seed=0)
    for estimate, c in zip(estimates, truth, strict=True):
        assert float((estimate.c_world - c).norm()) < 0.02
    assert atlas.localize(asked[:1], ["c"], np.eye(17)[:1], top_k=30, seed=0) == [None]

    file = tmp_path / "a.map"
    atlas.key = "mine"
    atlas.keep(file)
    again = kept(file, "mine", named=True).localize(asked, ["a", "b"], np.eye(17)[queries], top_k=30, seed=0)
    for one, other in zip(estimates, again, strict=True):
        assert torch.equal(one.c_world, other.c_world) and one.confidence == other.confidence
    with pytest.raises(InputError, match="other images or settings"):
        kept(file, "another", named=True)
    assert kept(tmp_path / "none.map", "mine", named=True) is None


def test_other_files_are_no_maps(tmp_path):
    file = tmp_path / "a.map"
    for write in (lambda: file.write_bytes(b"PK"), lambda: torch.save({"a": torch.zeros(2)}, file)):
        write()
        with pytest.raises(InputError, match="no map"):
            Atlas.load(file)
        assert kept(file, "key", named=False) is None
    with pytest.raises(InputError, match="cannot be read"):
        Atlas.load(tmp_path)


def test_the_key_of_a_map_is_that_of_its_inputs(tmp_path):
    image = tmp_path / "0.png"
    image.write_bytes(b"pixels")
    key = key_of("settings", [(image, "a", 0)], [])
    assert key == key_of("settings", [(image, "a", 0)], []) != key_of("others", [(image, "a", 0)], [])
    image.write_bytes(b"other pixels")
    assert key_of("settings", [(image, "a", 0)], []) != key
    assert key_of("settings", [(tmp_path / "gone.png", "a", 0)], []) == ""


def test_scenes_of_one_world_are_joined_and_others_are_not(random_world, random_poses, capsys):
    one = random_world(1)
    poses = {"a": random_poses(4, 1), "b": random_poses(4, 2), "c": random_poses(4, 3)}
    views, scene_of, _ = frames_of({"a": one, "b": random_world(2), "c": one}, poses)
    worlds = worlds_of(views, scene_of, range(12), np.ones((12, 1)))
    assert sorted(map(sorted, worlds)) == [["a", "c"], ["b"]]
    assert "a and c share one world" in capsys.readouterr().out


def test_rows_of_a_pose_file_are_put_in_the_order_that_fits(random_world, random_poses):
    """A row too many in front: the index gets the right poses, the last frame none, and it is said."""
    views, scene_of, rows = frames_of({"a": random_world(1)}, {"a": random_poses(10, 1)})
    truth = [view.c_world for view in views]
    for view in views:
        view.R_world_from_cam = view.c_world = None
    shifted = np.concatenate([rows[:1], rows[:-1]])
    found = calibrate_scenes(views, scene_of, shifted, range(10), {"a": CAMERA}, {"a": None})
    assert found["a"].rows.tolist() == [*range(1, 10), -1] and found["a"].trusted
    np.testing.assert_array_equal(shifted[:9], rows[:9])
    assert np.isnan(shifted[9]).all()
    for view, c in list(zip(views, truth))[:9]:
        assert float((view.c_world - c).norm()) < 1e-9
    assert views[9].c_world is None and "frame i in row i + 1" in found["a"].warnings[0]


def test_rows_written_in_the_order_of_the_letters_are_put_in_that_of_the_numbers(random_world, random_poses):
    """0.png 1.png … 11.png, the rows of 10 and 11 behind that of 1, as a program that sorts strings writes."""
    views, scene_of, rows = frames_of({"a": random_world(1)}, {"a": random_poses(12, 1)})
    truth = [view.c_world for view in views]
    for view in views:
        view.R_world_from_cam = view.c_world = None
    names = [f"{n}.png" for n in range(12)]
    by_letters = rows[sorted(range(12), key=names.__getitem__)]
    cameras, conventions = {"a": CAMERA}, {"a": None}
    found = calibrate_scenes(
        views, scene_of, by_letters, range(12), cameras, conventions, names=names
    )
    np.testing.assert_array_equal(by_letters, rows)
    assert all(float((view.c_world - c).norm()) < 1e-9 for view, c in zip(views, truth))
    assert found["a"].trusted and "order of the letters" in found["a"].warnings[0]


def test_images_whose_poses_are_false_are_named_and_in_no_map(random_world, random_poses, capsys):
    """Two rows that changed places and one with a wrong digit; the others keep their places."""
    views, scene_of, rows = frames_of({"a": random_world(1)}, {"a": random_poses(14, 1)})
    swapped = rows.copy()
    swapped[[3, 8]] = rows[[8, 3]]
    swapped[5, 0] += 1.0
    paths, index = [Path(f"{n:02d}.png") for n in range(14)], list(range(14))
    like = np.eye(14) + 0.1
    cameras, conventions = {"a": CAMERA}, {"a": None}
    atlas = build_atlas(paths, scene_of, swapped, views, like, index, cameras, conventions, seed=0)
    assert atlas.worlds[0].rows == [n for n in range(14) if n not in (3, 5, 8)]
    assert atlas.worlds[0].map.test.found == 3 and index == list(range(14))
    atlas.tell()
    said = re.findall(r"the pose of (\d+).png contradicts .* taken (\S+) m", capsys.readouterr().err)
    apart = float(np.linalg.norm(rows[3, :3] - rows[8, :3]))
    assert [name for name, _ in said] == ["03", "05", "08"]
    assert [float(meters) for _, meters in said] == pytest.approx([apart, 1.0, apart], abs=0.02)


@pytest.mark.parametrize("scale, doubted", [(1.0, False), (1000.0, True), (0.001, True)])
def test_poses_that_are_hardly_in_meters_are_doubted_before_the_answers(
    scale, doubted, random_world, random_poses
):
    views, scene_of, rows = frames_of({"a": random_world(1)}, {"a": random_poses(9, 1)})
    rows[:, :3] *= scale
    for view in views:
        view.R_world_from_cam = view.c_world = None
    paths, index = [f"{n}.png" for n in range(9)], list(range(9))
    atlas = build_atlas(
        paths, scene_of, rows, views, np.eye(9), index, {"a": CAMERA}, {"a": None}, seed=0
    )
    said = [w for w in atlas.calibrations["a"].warnings if "are they in another unit?" in w]
    assert bool(said) == doubted
    if doubted:  # the points of this world lie some 7 m from the cameras
        assert 4 * scale < float(re.search("lie (\\S+) m", said[0])[1]) < 12 * scale


def test_a_map_knows_where_its_scenes_were():
    atlas = Atlas(["a/b/my hall/images/left/0.png"], ["my hall"], None, None, [], {}, [])
    assert atlas.root == Path("a/b")
    atlas.paths = ["0.png"]
    assert atlas.root is None
