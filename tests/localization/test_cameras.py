"""cameras.py: pose files, conventions, quaternions, intrinsics."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from localization.cameras import (
    OPENCV,
    OPENGL,
    TARTANAIR,
    Camera,
    Convention,
    all_conventions,
    camera_for,
    default_camera,
    parse_convention,
    poses_from_file,
    poses_to_file,
    project,
    quaternion_from_rotation,
    rays,
    rotation_from_quaternion,
    turned,
    unusual_conventions,
)


def random_quaternions(n: int, seed: int = 0) -> torch.Tensor:
    q = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return q / q.norm(dim=1, keepdim=True)


def test_rotation_matches_the_sandwich_product():
    """R v is q v q* by Hamilton's multiplication, written out here on its own."""

    def times(a, b):
        ax, ay, az, aw = a
        bx, by, bz, bw = b
        return np.array(
            [
                aw * bx + ax * bw + ay * bz - az * by,
                aw * by - ax * bz + ay * bw + az * bx,
                aw * bz + ax * by - ay * bx + az * bw,
                aw * bw - ax * bx - ay * by - az * bz,
            ]
        )

    v = np.array([0.3, -1.2, 2.0])
    for q in random_quaternions(20).numpy():
        turned = times(times(q, [*v, 0.0]), q * [-1, -1, -1, 1])[:3]
        np.testing.assert_allclose(
            rotation_from_quaternion(torch.tensor(3 * q)).numpy() @ v, turned, atol=1e-12
        )


def test_quaternion_from_rotation_inverts_also_half_turns():
    q = torch.cat(
        [
            random_quaternions(500),
            torch.eye(4, dtype=torch.float64),
            torch.tensor([[0.6, 0.8, 0, 1e-9]]),
        ]
    )
    back = quaternion_from_rotation(rotation_from_quaternion(q))
    assert (back[:, 3] >= 0).all()
    agreement = (back * q / q.norm(dim=1, keepdim=True)).sum(1).abs()
    torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=1e-12, rtol=0)


def test_conventions_are_96_and_240_different_ones_and_read_back():
    usual, unusual = all_conventions(), unusual_conventions()
    assert len(set(usual)) == 96 and len(set(unusual)) == 240 and not set(usual) & set(unusual)
    assert all(torch.det(convention.file_from_cv()) == pytest.approx(1) for convention in usual)
    assert sum(bool(torch.det(convention.file_from_cv()) < 0) for convention in unusual) == 96
    assert all(c.unusual() for c in unusual) and not any(c.unusual() for c in usual)
    assert sum("left-handed" in c.unusual() for c in unusual) == 96
    for convention in [*usual[::7], *unusual[::7]]:
        assert parse_convention(convention.describe()) == convention
    assert [parse_convention(n) for n in ("TartanAir", "opencv", "OpenGL")] == [
        TARTANAIR,
        OPENCV,
        OPENGL,
    ]
    with pytest.raises(ValueError, match="ned"):
        parse_convention("ned")
    with pytest.raises(ValueError, match="left-right-forward"):
        parse_convention("xyzw camera_to_world left-right-forward")


def test_round_trip_in_every_convention():
    q = random_quaternions(10)
    t = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for convention in [*all_conventions(), *unusual_conventions()]:
        order = q if convention.quaternion.startswith("xyzw") else q[:, [3, 0, 1, 2]]
        first = convention.quaternion.endswith("-first")
        pose7 = torch.cat([order, t] if first else [t, order], dim=1)
        R, c = poses_from_file(pose7, convention)
        torch.testing.assert_close(torch.det(R), torch.ones(10).double())
        back = poses_to_file(R, c, convention)
        numbers = slice(0, 4) if first else slice(3, 7)
        sign = (back[:, numbers] * order).sum(1, keepdim=True).sign()
        back[:, numbers] *= sign
        torch.testing.assert_close(back, pose7, atol=1e-12, rtol=0)


def test_left_handed_files_keep_distances_and_angles():
    """Unity: x right, y up, z forward. A camera at (1, 2, 3) turned 90 degrees about y, which
    turns z towards x.
    """
    unity = parse_convention("xyzw camera_to_world right-up-forward")
    half = math.sqrt(0.5)
    R, c = poses_from_file([[0.0, 0, 0, 0, 0, 0, 1], [1, 2, 3, 0, half, 0, half]], unity)
    ahead_file = torch.tensor(
        [1.0, 0, 0]
    ).double()  # where the second camera looks, in the file's world
    mirror = unity.world_from_file()
    torch.testing.assert_close(R[1][:, 2], mirror @ ahead_file)
    torch.testing.assert_close(c[1], mirror @ torch.tensor([1.0, 2, 3]).double())
    down_file = torch.tensor([0.0, -1, 0]).double()
    torch.testing.assert_close(R[1][:, 1], mirror @ down_file)
    plain = Convention("wxyz-first", "world_to_camera", OPENCV.axes).plain()
    assert plain == Convention("wxyz", "camera_to_world", OPENCV.axes)


def test_rotation_of_one_direction_beside_a_position():
    """world_to_camera_at_position: the rotation of world_to_camera, the translation of
    camera_to_world.
    """
    pose7 = torch.cat([torch.tensor([[1.0, 2, 3]]).double(), random_quaternions(1)], dim=1)
    mixed, there, back = (
        poses_from_file(pose7, Convention("xyzw", direction, OPENCV.axes))
        for direction in ("world_to_camera_at_position", "world_to_camera", "camera_to_world")
    )
    torch.testing.assert_close(mixed[0], there[0])
    torch.testing.assert_close(mixed[1], back[1])


def test_known_poses():
    """An identity quaternion: TartanAir looks along x with y to the right, OpenGL along -z with y
    up.
    """
    identity = torch.tensor([[1.0, 2, 3, 0, 0, 0, 1]])
    R, c = poses_from_file(identity, TARTANAIR)
    assert c[0].tolist() == [1, 2, 3]
    assert R[0].T.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # camera x, y, z in the world
    R, _ = poses_from_file(identity, OPENGL)
    assert R[0].T.tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, -1]]
    half = math.sqrt(0.5)  # 90 degrees about z, world to camera: x_cam = R x + t
    R, c = poses_from_file(
        [[1.0, 0, 0, half, 0, 0, half]], parse_convention("wxyz world_to_camera right-down-forward")
    )
    torch.testing.assert_close(
        R[0] @ torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, -1.0, 0]).double()
    )
    torch.testing.assert_close(c[0], torch.tensor([0, 1.0, 0]).double(), atol=1e-12, rtol=0)


def test_nan_rows_stay_nan():
    R, c = poses_from_file(np.full((1, 7), np.nan), TARTANAIR)
    assert R.isnan().all() and c.isnan().all()


def test_rays_and_projection():
    camera = Camera(500.0, 400.0, 310.0, 250.0, 640, 480)
    torch.testing.assert_close(
        rays(camera, torch.tensor([[310.0, 250.0], [810.0, 650.0]])),
        torch.tensor([[0, 0, 1.0], [1, 1, 1]]).double(),
    )
    xy = torch.rand(50, 2, dtype=torch.float64) * 400
    torch.testing.assert_close(project(camera, 3 * rays(camera, xy)), xy)
    torch.testing.assert_close(
        camera.matrix() @ rays(camera, xy)[0], torch.tensor([*xy[0].tolist(), 1.0]).double()
    )
    assert default_camera(640, 480) == Camera(320, 320, 320, 240, 640, 480)


@pytest.mark.parametrize("k1, k2", [(-0.3, 0.0), (-0.1, 0.02), (0.2, 0.0)])
def test_distortion_is_undone(k1, k2):
    """Against the polynomial written out; and a point too far out to be seen is not folded back
    into the image.
    """
    camera = Camera(400.0, 410.0, 320.0, 240.0, 640, 480, k1, k2)
    point = torch.tensor([[0.4, -0.3, 1.0], [1.0, 0.5, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    xy = project(camera, point)
    for (x, y, z), pixel in zip(point.tolist(), xy.tolist()):
        r2 = (x / z) ** 2 + (y / z) ** 2
        grown = 1 + k1 * r2 + k2 * r2 * r2
        assert pixel == pytest.approx([400 * grown * x / z + 320, 410 * grown * y / z + 240])
    torch.testing.assert_close(rays(camera, xy), point / point[:, 2:], atol=1e-9, rtol=0)
    assert camera.pinhole() == Camera(400.0, 410.0, 320.0, 240.0, 640, 480)
    far = project(camera, torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64))
    assert not 0 <= float(far[0]) < 640


def test_distortion_is_opencvs_and_is_undone():
    camera = Camera(400.0, 410.0, 320.0, 240.0, 640, 480, -0.2, 0.05, 0.01, -0.02)
    xy = np.random.default_rng(0).uniform(-0.7, 0.7, (200, 2))
    points = np.column_stack([2 * xy, np.full(200, 2.0)])
    lens = np.array([camera.k1, camera.k2, camera.p1, camera.p2])
    seen, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), camera.matrix().numpy(), lens)
    found = project(camera, torch.from_numpy(points))
    np.testing.assert_allclose(found, seen[:, 0], atol=1e-9)
    np.testing.assert_allclose(rays(camera, found)[:, :2], xy, atol=1e-7)
    tangential = replace(camera, k1=0.0, k2=0.0)
    back = rays(tangential, project(tangential, torch.from_numpy(points)))
    np.testing.assert_allclose(back[:, :2], xy, atol=1e-7)
    assert camera.pinhole() == Camera(400.0, 410.0, 320.0, 240.0, 640, 480)


def test_turned_lens_sees_the_turned_image():
    """A pixel of the image and its place after a clockwise turn, moved by hand, have rays turned
    alike.
    """
    camera = Camera(500.0, 510.0, 330.0, 230.0, 640, 480, -0.1, 0.0, 0.01, -0.02)
    x, y = 100.0, 60.0
    places = [(x, y), (479 - y, x), (639 - x, 479 - y), (y, 639 - x)]
    ray = rays(camera, torch.tensor([x, y]))
    for turns, place in enumerate(places):
        lens = turned(camera, turns)
        assert (lens.width, lens.height) == ((640, 480) if turns % 2 == 0 else (480, 640))
        angle = turns * math.pi / 2
        c, s = math.cos(angle), math.sin(angle)
        expected = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ ray
        torch.testing.assert_close(rays(lens, torch.tensor(place)), expected, atol=1e-9, rtol=0)


def test_lens_on_an_image_of_another_size():
    camera = Camera(500.0, 510.0, 330.0, 230.0, 640, 480, k1=0.1)
    assert camera_for(camera, 640, 480) == camera
    assert camera_for(camera, 320, 240) == Camera(250.0, 255.0, 164.75, 114.75, 320, 240, 0.1)
    assert camera_for(camera, 240, 320, quarter_turns=3) == camera_for(turned(camera, 3), 240, 320)
    upright = camera_for(camera, 480, 640)  # turned nobody knows which way
    assert (upright.fx, upright.fy, upright.cx, upright.cy) == (510.0, 500.0, 239.5, 319.5)


@pytest.mark.parametrize("lens", [(0, 0, 9, -7), (5, 50, 90, 70), (0, 0, 1e5, 0)])
def test_rays_are_numbers_whatever_the_lens(lens):
    """A file may claim a distortion that no image has."""
    k1, k2, p1, p2 = lens
    camera = Camera(320.0, 320.0, 320.0, 240.0, 640, 480, k1=k1, k2=k2, p1=p1, p2=p2)
    xy_px = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 640
    assert torch.isfinite(rays(camera, xy_px)).all()
