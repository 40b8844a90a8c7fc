"""calibration.py, readings.py, posed_pairs.py: what a scene's own matches tell of its pose file
and its lens.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from localization.absolute_pose import rotation_from_vector
from localization.calibration import Calibration, calibrate
from localization.cameras import (
    OPENCV,
    TARTANAIR,
    Camera,
    Convention,
    all_conventions,
    default_camera,
    parse_convention,
    poses_to_file,
    unusual_conventions,
)
from localization.features import Features
from localization.lens_fit import PosedMatches, _gauss_newton
from localization.matching import View
from localization.posed_pairs import matched_pairs
from localization.readings import limit_of, relative, sampson, sampson_by_pose

TRUE = Camera(420.0, 420.0, 320.0, 240.0, 640, 480)
TURN = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)


def unposed(views: list[View]) -> list[View]:
    return [View(v.features, default_camera(v.camera.width, v.camera.height)) for v in views]


def written(poses, convention=OPENCV) -> np.ndarray:
    return poses_to_file(*(torch.stack(v) for v in zip(*poses)), convention).numpy()


@pytest.fixture
def scene(random_world, random_poses):
    """Factory: views without pose of n images of a random world, and their poses."""

    def build(seed: int, n: int = 8, camera: Camera = TRUE, count: int = 300, **noise):
        world, poses = random_world(seed, camera=camera, count=count), random_poses(n, seed + 1)
        return unposed([world.view(*pose, **noise) for pose in poses]), poses

    return build


@pytest.fixture
def path(random_world, look_at):
    """Factory: views without pose and poses of n images along one smooth path beside a random
    world.
    """

    def build(seed: int, n: int, camera: Camera = TRUE, count: int = 600):
        world, poses = random_world(seed, camera=camera, count=count), []
        for s in torch.linspace(0, 1, n, dtype=torch.float64):
            c = torch.stack([4 * s - 2, 0.8 * torch.sin(3 * s), 0.4 * torch.sin(5 * s)])
            target = torch.stack([3 * s - 1.5, 7 + 0 * s, 0.5 * torch.cos(4 * s)])
            poses.append((look_at(c, target, 0.2 * math.sin(4 * s)), c))
        return unposed([world.view(*pose) for pose in poses]), poses

    return build


def fan(look_at, centers: list, directions: int) -> list:
    """Poses that look `directions` ways, 12 degrees apart, from each of the centers."""
    poses = []
    for k in range(directions):
        angle = math.radians(60 + 12 * k)
        ahead = torch.tensor(
            [math.cos(angle), math.sin(angle), 0.1 * math.sin(7 * k)], dtype=torch.float64
        )
        poses += [(look_at(c, c + ahead, 0.1 * k), c) for c in centers]
    return poses


def test_every_convention_is_found_with_the_focal_length(scene):
    views, poses = scene(0, clutter=20)
    for convention in [*all_conventions()[5::45], *unusual_conventions()[20::100]]:
        found = calibrate(views, written(poses, convention))
        assert found.convention == convention and found.convention_from == "evidence"
        assert found.camera.fx == pytest.approx(420, rel=0.01) and found.focal_from == "evidence"
        assert found.margin > 1.5 and found.pairs >= 6 and found.explained > 0.5 and found.trusted
        unusual = convention in unusual_conventions()
        assert len(found.warnings) == unusual and unusual == (
            convention.describe() in "".join(found.warnings)
        )


def test_every_convention_is_found_with_a_known_camera(scene):
    views, poses = scene(2, n=6, count=120, clutter=10)
    for convention in all_conventions()[::19]:
        found = calibrate(views, written(poses, convention), TRUE)
        assert found.convention == convention
        assert found.camera == TRUE and found.focal_from == "given"


def test_principal_point_is_refined_when_it_is_off(scene):
    views, poses = scene(4, n=10, camera=Camera(500.0, 500.0, 331.0, 229.0, 640, 480), count=600)
    camera = calibrate(views, written(poses)).camera
    assert camera.fx == pytest.approx(500, rel=0.01)
    assert (camera.cx, camera.cy) == (pytest.approx(331, abs=2.5), pytest.approx(229, abs=2.5))


def test_right_prior_camera_stays_as_it_is(scene):
    views, poses = scene(6, camera=Camera(320.0, 320.0, 320.0, 240.0, 640, 480))
    found = calibrate(views, written(poses, TARTANAIR))
    assert found.camera == default_camera(640, 480) and found.focal_from == "prior"
    assert found.convention == TARTANAIR and not found.warnings


def test_radial_distortion_is_found_beside_a_known_and_an_unknown_lens(scene):
    true = Camera(400.0, 400.0, 320.0, 240.0, 640, 480, k1=-0.1)
    views, poses = scene(60, n=10, camera=true, count=900)
    for given, source in ((None, "evidence"), (true.pinhole(), "given, k1 from evidence")):
        found = calibrate(views, written(poses), given)
        assert found.camera.k1 == pytest.approx(-0.1, abs=0.02)
        assert found.camera.fx == pytest.approx(400, rel=0.01) and found.focal_from == source
    # Poses of other images: whatever distortion fits something is none.
    shuffled = [poses[i] for i in (3, 7, 1, 9, 0, 5, 8, 2, 6, 4)]
    found = calibrate(views, written(shuffled), true.pinhole())
    assert found.explained < 0.3 and found.camera.k1 == 0 and found.focal_from == "given"
    straight, poses = scene(62, n=10, camera=true.pinhole(), count=900)
    assert calibrate(straight, written(poses), true.pinhole()).camera == true.pinhole()


def test_unequal_focal_lengths_of_a_known_lens_are_kept_to(scene):
    wide = Camera(400.0, 480.0, 320.0, 240.0, 640, 480)
    views, poses = scene(70, camera=wide)
    found = calibrate(views, written(poses), wide)
    assert found.camera == wide and found.explained > 0.9


def test_unequal_focal_lengths_of_an_unknown_lens_are_found(scene):
    """As of images brought to another shape; those of a usual lens stay equal."""
    true = Camera(400.0, 300.0, 320.0, 240.0, 640, 480)
    views, poses = scene(71, n=12, camera=true, count=700)
    camera = calibrate(views, written(poses)).camera
    assert camera.fx == pytest.approx(true.fx, rel=0.01)
    assert camera.fy == pytest.approx(true.fy, rel=0.01)
    views, poses = scene(72, n=12, camera=replace(true, fy=true.fx), count=700)
    camera = calibrate(views, written(poses)).camera
    assert camera.fx == camera.fy == pytest.approx(true.fx, rel=0.01)


@pytest.mark.parametrize("seed", [30, 35])
def test_noisy_reference_poses_do_not_draw_the_lens_off(scene, seed):
    """Index poses err by 1 % of the depth and half a degree, alike in all matches of an image."""
    views, poses = scene(
        seed, n=20, camera=Camera(537.0, 537.0, 320.0, 240.0, 640, 480), count=1000, noise_px=0.7
    )
    draw = torch.Generator().manual_seed(seed)
    noisy = []
    for R, c in poses:
        turn, move = torch.randn(2, 3, generator=draw, dtype=torch.float64)
        noisy.append((R @ rotation_from_vector(math.radians(0.5) * turn), c + 0.07 * move))
    camera = calibrate(views, written(noisy), convention=OPENCV).camera
    assert camera.fx == pytest.approx(537, rel=0.03)
    assert math.hypot(camera.cx - 320, camera.cy - 240) < 5


@pytest.mark.parametrize("n", [100, 200])
def test_more_frames_of_a_smooth_path_do_not_hurt(path, n):
    views, poses = path(5, n)
    found = calibrate(views, written(poses))
    assert found.convention == OPENCV and found.convention_from == "evidence"
    assert found.camera.fx == pytest.approx(420, rel=0.01)
    assert found.pairs <= 40 and found.images > 30


def test_each_size_of_image_has_its_own_camera(random_world, random_poses):
    """Landscape and turned images of one off-center lens, and others cut out of its middle,
    whichever comes first.
    """
    lens = Camera(450.0, 450.0, 331.0, 229.0, 640, 480)
    upright, cut = (
        Camera(450.0, 450.0, 250.0, 331.0, 480, 640),
        Camera(450.0, 450.0, 211.0, 229.0, 400, 480),
    )
    world, poses = random_world(8, count=700), random_poses(14, 9)
    cameras = [lens] * 8 + [upright] * 3 + [cut] * 3
    poses = [
        (R @ TURN, c) if camera == upright else (R, c) for camera, (R, c) in zip(cameras, poses)
    ]
    views = [world.view(*pose, camera=camera) for pose, camera in zip(poses, cameras)]
    for given in (None, replace(lens, width=0, height=0)):
        found = [
            calibrate(unposed(views[::step]), written(poses[::step]), given) for step in (1, -1)
        ]
        for one in found:
            assert one.convention == OPENCV and one.trusted and not one.warnings
            for true in (lens, cut):
                camera = one.camera_of(true.width, true.height)
                assert camera.fx == pytest.approx(450, rel=0.015)
                assert (camera.cx, camera.cy) == (
                    pytest.approx(true.cx, abs=3),
                    pytest.approx(true.cy, abs=3),
                )
            assert one.camera_of(480, 640).fx == pytest.approx(450, rel=0.02)
            assert one.camera_of(1280, 960).fx == pytest.approx(900, rel=0.015)


def test_known_lens_of_another_size_is_scaled_and_said(scene):
    views, poses = scene(10)
    found = calibrate(views, written(poses), Camera(1260.0, 1260.0, 959.5, 719.5, 640, 480))
    assert found.camera.fx == pytest.approx(420, rel=0.01) and found.trusted
    assert "959.5 719.5 is far from the middle of images 640 x 480" in found.warnings[0]


def test_wrong_known_focal_length_is_said_and_left(scene):
    views, poses = scene(12)
    found = calibrate(views, written(poses), replace(TRUE, fx=546.0, fy=546.0))
    assert found.camera.fx == pytest.approx(420, rel=0.01) and found.focal_from == "evidence"
    assert "a focal length 0.7" in found.warnings[0]


def test_given_convention_is_kept_even_where_another_explains_more(scene):
    views, poses = scene(14)
    found = calibrate(views, written(poses), convention=OPENCV)
    assert found.convention == OPENCV and found.convention_from == "given" and not found.warnings
    assert found.camera.fx == pytest.approx(420, rel=0.01)
    found = calibrate(views, written(poses), TRUE, convention=TARTANAIR)
    assert found.convention == TARTANAIR and not found.trusted
    assert "not the given convention but xyzw camera_to_world right-down-forward" in " ".join(
        found.warnings
    )


@pytest.mark.parametrize("shift", [-2, 1])
def test_shifted_rows_are_read_as_they_were_meant(scene, shift):
    views, poses = scene(16, n=12)
    found = calibrate(views, np.roll(written(poses), -shift, axis=0))
    assert (
        found.convention == OPENCV
        and found.trusted
        and found.camera.fx == pytest.approx(420, rel=0.01)
    )
    meant = np.arange(12) - shift
    assert found.rows.tolist() == np.where((meant >= 0) & (meant < 12), meant, -1).tolist()
    assert f"frame i in row i {'-' if shift > 0 else '+'} {abs(shift)}" in found.warnings[0]


def test_rows_missing_in_the_middle_are_found(scene):
    """Two of fourteen rows are gone: frames after them are shifted, and two have none. The last
    two were cut off.
    """
    views, poses = scene(18, n=14)
    pose7 = np.delete(written(poses), [6, 7], axis=0)
    found = calibrate(views, pose7)
    assert found.trusted and found.rows.tolist() == [*range(6), -1, -1, *range(6, 12)]


def test_order_that_the_names_suggest_is_taken_when_it_fits(scene):
    """Images in the order of their names as strings (0, 1, 10, 11, 2, ...), rows in that of their
    numbers.
    """
    views, poses = scene(20, n=12)
    order = sorted(range(12), key=str)
    told = {"numbers in the names": order}
    found = calibrate([views[i] for i in order], written(poses), orders=told)
    assert (
        found.rows.tolist() == order
        and found.trusted
        and "numbers in the names" in found.warnings[0]
    )
    found = calibrate(views, written(poses), orders=told)
    assert found.rows.tolist() == [*range(12)] and not found.warnings


def test_frames_between_the_views_take_part_in_an_order(scene):
    """Every third frame is no index image; its row may still be another's."""
    views, poses = scene(22, n=15)
    frames = [i for i in range(15) if i % 3]
    found = calibrate([views[i] for i in frames], np.roll(written(poses), 1, axis=0), frames=frames)
    assert found.rows.tolist() == [*range(1, 15), -1] and found.trusted


def test_rows_from_the_last_to_the_first_are_turned(scene):
    views, poses = scene(24, n=12)
    found = calibrate(views, written(poses)[::-1].copy())
    assert found.rows.tolist() == [*range(11, -1, -1)] and found.trusted
    assert "from the last to the first" in found.warnings[0]


def test_poses_of_other_images_are_not_trusted(scene):
    views, poses = scene(24, n=12)
    order = np.random.default_rng(0).permutation(12)
    for camera in (None, TRUE):
        found = calibrate(views, written(poses)[order], camera)
        assert found.explained < 0.3 and not found.trusted
        assert "% of the matches between the scene's own index images" in " ".join(found.warnings)


def test_few_images_give_a_guess(scene):
    """Two images in OpenCV axes: the winner, though not to be trusted; in TartanAir's axes the
    prior.
    """
    views, poses = scene(26)
    found = calibrate(views[:2], written(poses[:2]))
    assert (found.convention, found.convention_from, found.trusted) == (OPENCV, "guess", False)
    assert found.camera.fx == pytest.approx(420, rel=0.1) and found.focal_from == "guess"
    found = calibrate(views[:3], written(poses[:3], TARTANAIR), TRUE)
    assert (found.convention, found.convention_from, found.trusted) == (TARTANAIR, "prior", True)


def test_without_evidence_the_prior_stays(scene, random_world, random_poses):
    poses = random_poses(8, 13)
    strangers = unposed([random_world(20 + i).view(*pose) for i, pose in enumerate(poses)])
    none = Features(torch.zeros(0, 2), *(torch.zeros(0) for _ in range(3)), torch.zeros(0, 128))
    empty = [View(none, TRUE)] * 8
    for views in (strangers, strangers[:1], [], empty):
        found = calibrate(views, written(poses)[: len(views)])
        assert (found.convention, found.convention_from, found.focal_from) == (
            TARTANAIR,
            "prior",
            "prior",
        )
        assert found.pairs == 0 and not found.trusted
        said = "only 0 pairs of the 8 index images match, too few to judge poses and lens by"
        assert [w.partition(":")[0] for w in found.warnings] == [said] * (len(views) == 8)
        assert np.isfinite(found.margin) and found.explained == 0


@pytest.mark.parametrize("convention", [OPENCV, Convention("wxyz", "world_to_camera", OPENCV.axes)])
def test_pairs_from_one_center_do_not_spoil_the_vote(random_world, look_at, convention):
    """Cut-outs of three panoramas: most pairs have no baseline, and tell the rotation alone."""
    world = random_world(80, camera=TRUE, count=900)
    centers = [
        torch.tensor(c, dtype=torch.float64)
        for c in ([0.0, 0, 0], [0.8, 0.3, 0.1], [-0.5, 0.7, -0.1])
    ]
    poses = fan(look_at, centers, 6)
    found = calibrate(unposed([world.view(*pose) for pose in poses]), written(poses, convention))
    assert found.convention == convention and found.convention_from == "evidence" and found.trusted
    assert found.camera.fx == pytest.approx(420, rel=0.01)


def test_images_from_one_place_leave_a_lens_as_the_others_tell_it(scene):
    """A pair without a baseline has no epipolar lines, however large its errors across them would be."""
    views, poses = scene(4, n=10, count=600)
    pairs, _ = matched_pairs(views, torch.as_tensor(written(poses)))
    R, c = (torch.stack(part) for part in zip(*poses))
    R, t = relative((R, c), (R, c), pairs)
    start = torch.tensor([math.log(0.9 * 420 / 640), 0, 0, 0, 0], dtype=torch.float64)
    others = PosedMatches(pairs.select(torch.arange(3, len(t))), R[3:], t[3:], limit_of(640))
    t[:3] = 0
    found, sigma = _gauss_newton(PosedMatches(pairs, R, t, limit_of(640)), start, [0])
    expected, expected_sigma = _gauss_newton(others, start, [0])
    assert torch.equal(found, expected) and torch.equal(sigma, expected_sigma)
    assert float(found[0].exp()) == pytest.approx(420 / 640, rel=0.01)


@pytest.mark.parametrize("jitter", [0.0, 1e-4])
def test_a_scene_seen_from_one_place_says_so(random_world, look_at, jitter):
    world = random_world(82, camera=TRUE, count=900)
    draw = torch.Generator().manual_seed(0)
    centers = jitter * torch.randn(8, 3, generator=draw, dtype=torch.float64)
    poses = [(R, c) for (R, _), c in zip(fan(look_at, [torch.zeros(3).double()], 8), centers)]
    found = calibrate(unposed([world.view(*pose) for pose in poses]), written(poses))
    assert not found.trusted and "from one place" in found.warnings[0]


@pytest.mark.parametrize(("count", "turned"), [(150, True), (400, True), (150, False)])
def test_what_stands_still_neither_votes_nor_stays_a_keypoint(scene, random_world, look_at, count, turned):
    """A time stamp in all images: more distinct matches than the scene has, all of a camera that
    never moved; 400 leave no other keypoint among the strongest. The camera may only move.
    """
    views, poses = scene(84, n=10, count=250)
    if not turned:
        world = random_world(84, camera=TRUE, count=250)
        R = look_at(torch.zeros(3).double(), torch.tensor([0.0, 7.0, 0.0]).double())
        poses = [(R, torch.tensor([0.2 * k, 0.1 * k, 0.05 * k]).double()) for k in range(-5, 5)]
        views = unposed([world.view(*pose) for pose in poses])
    draw = torch.Generator().manual_seed(1)
    at = torch.rand(count, 2, generator=draw) * torch.tensor([300.0, 24.0]) + torch.tensor(
        [10.0, 450.0]
    )
    letters = torch.nn.functional.normalize(torch.randn(count, 128, generator=draw), dim=1)
    stamped = []
    for view in views:
        f = view.features
        more = Features(
            torch.cat([at, f.xy_px]),
            torch.cat([torch.full((count,), 2.0), f.scale_px]),
            torch.cat([torch.zeros(count), f.angle_rad]),
            torch.cat([torch.ones(count), f.response]),
            torch.cat([letters, f.descriptors]),
        )
        stamped.append(replace(view, features=more))
    known = () if turned else (TRUE, OPENCV)  # without turns these cannot be told
    found = calibrate(stamped, written(poses), *known)
    assert found.convention == OPENCV and found.camera.fx == pytest.approx(420, rel=0.01)
    assert found.explained > 0.8 and found.trusted
    kept = found.applied(stamped[0])
    assert kept.camera == found.camera and not (kept.features.xy_px[:, None] == at).all(2).any()
    assert len(kept.features) > 0.85 * len(views[0].features)
    assert found.camera_of(480, 640).width == 480
    assert len(found.applied(replace(stamped[0], camera=default_camera(480, 640))).features) == len(
        stamped[0].features
    )
    clean = calibrate(views, written(poses), *known)
    assert clean.still is None and len(clean.applied(views[0]).features) == len(views[0].features)


def test_rows_without_a_pose_are_left_out(scene):
    views, poses = scene(86)
    pose7 = written(poses)
    pose7[2] = np.nan
    found = calibrate(views, pose7, TRUE)
    assert found.convention == OPENCV and found.images == 7 and found.trusted


def test_blind_spot_translation_alone_takes_the_prior(random_world, look_at):
    """Identity rotations: xyzw or wxyz cannot be told apart (nor reversed motion, say), so
    TartanAir's order stays.
    """
    world = random_world(14)
    R = look_at(torch.zeros(3).double(), torch.tensor([0.0, 7.0, 0.0]).double())
    draw = torch.rand(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    views = unposed([world.view(R, c) for c in draw])
    # The world turned so that the file's camera axes are its own.
    position = draw @ R @ TARTANAIR.file_from_cv().T
    identity = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(8, 4)
    found = calibrate(
        views, torch.cat([position, identity], dim=1).numpy(), default_camera(640, 480)
    )
    assert found.convention == TARTANAIR


def test_pairs_are_bounded_and_move(path):
    """Of 120 frames of a slow video at most 40 pairs are matched, and their matches move."""
    views, poses = path(90, 120)
    pairs, still = matched_pairs(views, torch.as_tensor(written(poses)))
    assert 30 <= len(pairs.a) <= 40 and pairs.images() > 30 and still is None
    motion = (pairs.uv_a - pairs.uv_b).norm(dim=2)[pairs.used]
    assert float(motion.median()) > 0.05


def test_sampson_distance_and_its_derivatives():
    """Against the first-order distance to the epipolar constraint written out, and central
    differences.
    """
    draw = torch.Generator().manual_seed(3)
    R = rotation_from_vector(0.5 * torch.randn(4, 3, generator=draw, dtype=torch.float64))
    t = torch.nn.functional.normalize(torch.randn(4, 3, generator=draw, dtype=torch.float64), dim=1)
    xy = torch.randn(2, 4, 20, 2, generator=draw, dtype=torch.float64)
    x_a, x_b = torch.cat([xy, torch.ones(2, 4, 20, 1, dtype=torch.float64)], dim=3)
    distance, by_pose = sampson_by_pose(R, t, x_a, x_b)
    for p in range(4):
        tx = torch.tensor(
            [[0, -t[p, 2], t[p, 1]], [t[p, 2], 0, -t[p, 0]], [-t[p, 1], t[p, 0], 0]]
        ).double()
        E = tx @ R[p]
        lines = torch.cat([(x_a[p] @ E.T)[:, :2], (x_b[p] @ E)[:, :2]], dim=1)
        expected = (x_b[p] * (x_a[p] @ E.T)).sum(1) / lines.norm(dim=1)
        torch.testing.assert_close(distance[p], expected)
    for k in range(6):
        step = 1e-6 * torch.eye(6, dtype=torch.float64)[k]
        ahead, behind = (
            sampson(rotation_from_vector(sign * step[None, :3]) @ R, t + sign * step[3:], x_a, x_b)
            for sign in (1, -1)
        )
        torch.testing.assert_close(by_pose[..., k], (ahead - behind) / 2e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("explained", "vouched", "trusted", "said"),
    [
        (0.6, False, True, 0),
        (0.4, False, True, 1),
        (0.4, True, True, 0),
        (0.2, False, False, 1),
        (0.2, True, True, 1),
    ],
)
def test_the_maps_test_of_itself_restores_trust_or_leaves_a_doubt(
    scene, explained, vouched, trusted, said
):
    """By the share explained: below 45 % there is a sentence unless images left out found themselves."""
    views, poses = scene(24, n=12)
    pose7 = written(poses)
    if explained < 0.3:
        pose7 = pose7[np.random.default_rng(0).permutation(12)]
        found = calibrate(views, pose7, TRUE)
    else:
        found = replace(calibrate(views, pose7, TRUE), explained=explained)
    tested = found.tested(vouched)
    assert tested.trusted == trusted
    assert sum("healthy: 45 to 90 %" in sentence for sentence in tested.warnings) == said


def test_report():
    found = Calibration(
        OPENCV,
        TRUE,
        {(640, 480): TRUE},
        np.arange(6),
        None,
        0.5,
        3.0,
        12,
        6,
        "evidence",
        "evidence",
        True,
    )
    told = found.as_dict()
    assert parse_convention(told["convention"]) == OPENCV and told["trusted"] is True
    assert told["fx"] == 420.0 and told["margin"] == 3.0 and told["cameras"]["640x480"][0] == 420.0
    line = found.describe()
    assert "margin 3.0" in line and "12 pairs" in line and "420.0" in line and "\n" not in line
