"""Several scenes at once: cameras, worlds, and which queries are localized with which index images."""

import numpy as np

from localization.cameras import TARTANAIR, Camera, poses_to_file
from localization.matching import View
from localization.scenes import calibrate_scenes, localize_scenes, worlds_of

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


def test_each_query_is_found_in_its_own_scene(random_world, random_poses):
    poses = {"a": random_poses(9, 1), "b": random_poses(8, 2)}
    views, scene_of, rows = frames_of({"a": random_world(1), "b": random_world(2)}, poses)
    queries, index = [0, 9], [*range(1, 9), *range(10, 17)]
    truth = [views[q].c_world for q in queries]
    for view in views:
        view.R_world_from_cam = view.c_world = None
    found = calibrate_scenes(views, scene_of, rows, index, {"a": CAMERA, "b": CAMERA}, {"a": None, "b": None})
    assert {scene: c.convention for scene, c in found.items()} == {"a": TARTANAIR, "b": TARTANAIR}
    assert views[0].c_world is None and views[1].c_world is not None
    descriptors = np.eye(17)
    estimates = localize_scenes(
        views, scene_of, queries, index, descriptors, top_k=30, seed=0, progress=lambda *_: None, tested=lambda *_: None
    )
    for query, c in zip(queries, truth, strict=True):
        assert float((estimates[query].c_world - c).norm()) < 0.02


def test_scenes_of_one_world_are_joined_and_others_are_not(random_world, random_poses, capsys):
    one = random_world(1)
    poses = {"a": random_poses(4, 1), "b": random_poses(4, 2), "c": random_poses(4, 3)}
    views, scene_of, _ = frames_of({"a": one, "b": random_world(2), "c": one}, poses)
    worlds = worlds_of(views, scene_of, range(12), np.ones((12, 1)))
    assert sorted(map(sorted, worlds)) == [["a", "c"], ["b"]]
    assert "a and c share one world" in capsys.readouterr().out
    no_index_in_b = [row for row in range(12) if scene_of[row] != "b"]
    estimates = localize_scenes(
        views,
        scene_of,
        [5],
        no_index_in_b,
        np.ones((12, 1)),
        top_k=30,
        seed=0,
        progress=lambda *_: None, tested=lambda *_: None,
    )
    assert estimates == {}


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
