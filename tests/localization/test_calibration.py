"""calibration.py: conventions and focal lengths from matches of posed views, and when not to decide."""

import numpy as np
import pytest
import torch

from localization.calibration import Calibration, calibrate
from localization.cameras import (
    OPENCV,
    TARTANAIR,
    Camera,
    all_conventions,
    default_camera,
    parse_convention,
    poses_to_file,
)
from localization.features import Features
from localization.matching import View

TRUE = Camera(420.0, 420.0, 320.0, 240.0, 640, 480)




def unposed(views: list[View]) -> list[View]:
    return [View(v.features, default_camera(v.camera.width, v.camera.height)) for v in views]


def written(poses, convention) -> np.ndarray:
    return poses_to_file(*(torch.stack(v) for v in zip(*poses)), convention).numpy()


def test_every_convention_is_found_with_the_focal_length(random_world, random_poses):
    world, poses = random_world(0, camera=TRUE, count=200), random_poses(6, 1)
    views = unposed([world.view(*pose, clutter=20) for pose in poses])
    for convention in all_conventions()[::19]:
        found = calibrate(views, written(poses, convention), default_camera(640, 480), False)
        assert found.convention == convention and found.convention_from == "evidence"
        assert found.camera.fx == pytest.approx(420, rel=0.01) and found.focal_from == "evidence"
        assert found.margin > 1.5 and found.pairs >= 6 and found.inlier_share > 0.5


def test_every_convention_is_found_with_a_known_camera(random_world, random_poses):
    world, poses = random_world(2, camera=TRUE, count=120), random_poses(6, 3)
    views = unposed([world.view(*pose, clutter=10) for pose in poses])
    for convention in all_conventions():
        found = calibrate(views, written(poses, convention), TRUE, True)
        assert found.convention == convention
        assert found.camera == TRUE and found.focal_from == "given"


def test_principal_point_is_refined_when_it_is_off(random_world, random_poses):
    true = Camera(500.0, 500.0, 331.0, 229.0, 640, 480)
    world, poses = random_world(4, camera=true, count=600), random_poses(10, 5)
    views = unposed([world.view(*pose) for pose in poses])
    camera = calibrate(views, written(poses, OPENCV), default_camera(640, 480), False).camera
    assert camera.fx == pytest.approx(500, rel=0.01)
    assert (camera.cx, camera.cy) == (pytest.approx(331, abs=2.5), pytest.approx(229, abs=2.5))


def test_right_prior_camera_stays_as_it_is(random_world, random_poses):
    world, poses = random_world(6), random_poses(8, 7)
    views = [world.view(*pose) for pose in poses]
    found = calibrate(views, written(poses, TARTANAIR), default_camera(640, 480), False)
    assert found.camera == default_camera(640, 480) and found.focal_from == "prior"
    assert found.convention == TARTANAIR


def test_portrait_images(random_world, random_poses):
    true = Camera(600.0, 600.0, 240.0, 320.0, 480, 640)
    world, poses = random_world(8, camera=true, count=800), random_poses(10, 9)
    views = unposed([world.view(*pose) for pose in poses])
    found = calibrate(views, written(poses, OPENCV), default_camera(480, 640), False)
    assert found.convention == OPENCV and found.camera.fx == pytest.approx(600, rel=0.015)


def test_given_convention_is_kept(random_world, random_poses):
    world, poses = random_world(10, camera=TRUE), random_poses(8, 11)
    views = unposed([world.view(*pose) for pose in poses])
    found = calibrate(views, written(poses, OPENCV), default_camera(640, 480), False, OPENCV)
    assert found.convention == OPENCV and found.convention_from == "given"
    assert found.camera.fx == pytest.approx(420, rel=0.01)


def test_weak_evidence_leaves_the_prior(random_world, random_poses):
    """Two images in OpenCV axes are too few to leave TartanAir's; so are images that share nothing, or one, or none."""
    world, poses = random_world(12, camera=TRUE), random_poses(8, 13)
    pose7, prior = written(poses, OPENCV), default_camera(640, 480)
    views = unposed([world.view(*pose) for pose in poses])
    other = [random_world(20 + i).view(*pose) for i, pose in enumerate(poses)]
    for some, rows in ((views[:2], 2), (views[:1], 1), ([], 0), (unposed(other), 8)):
        found = calibrate(some, pose7[:rows], prior, False)
        assert (found.convention, found.camera) == (TARTANAIR, prior)
        assert found.convention_from == "prior" and found.focal_from == "prior"
        assert np.isfinite(found.margin) and np.isfinite(found.inlier_share)


def test_blind_spot_translation_alone_takes_the_prior(random_world, look_at):
    """Identity rotations: xyzw or wxyz cannot be told apart (nor reversed motion, say), so TartanAir's order stays."""
    world = random_world(14)
    R = look_at(torch.zeros(3).double(), torch.tensor([0.0, 7.0, 0.0]).double())
    draw = torch.rand(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    poses = [(R, c) for c in draw]
    views = unposed([world.view(*pose) for pose in poses])
    # The world turned so that the file's camera axes are its own.
    position = draw @ R @ TARTANAIR.file_from_cv().T
    identity = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(8, 4)
    pose7 = torch.cat([position, identity], dim=1).numpy()
    found = calibrate(views, pose7, default_camera(640, 480), True)
    assert found.convention == TARTANAIR


def test_rows_without_a_pose_are_left_out(random_world, random_poses):
    world, poses = random_world(16, camera=TRUE), random_poses(8, 17)
    views, pose7 = unposed([world.view(*pose) for pose in poses]), written(poses, OPENCV)
    pose7[2] = np.nan
    found = calibrate(views, pose7, TRUE, True)
    assert found.convention == OPENCV and found.images == 7


def test_without_keypoints(random_world, random_poses):
    none = Features(torch.zeros(0, 2), *(torch.zeros(0) for _ in range(3)), torch.zeros(0, 128), torch.zeros(0))
    views = [View(none, TRUE) for _ in range(8)]
    found = calibrate(views, written(random_poses(8, 1), OPENCV), TRUE, True)
    assert found.convention == TARTANAIR and found.pairs == 0


def test_report():
    found = Calibration(OPENCV, TRUE, 3.0, 12, 6, 0.5, "evidence", "evidence")
    assert parse_convention(found.as_dict()["convention"]) == OPENCV
    assert found.as_dict()["fx"] == 420.0 and found.as_dict()["margin"] == 3.0
    line = found.describe()
    assert "margin 3.0" in line and "12 pairs" in line and "420.0" in line and "\n" not in line
