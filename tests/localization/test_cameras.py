"""cameras.py: pose files, conventions, quaternions, intrinsics."""

import math

import numpy as np
import pytest
import torch

from localization.cameras import (
    OPENCV,
    OPENGL,
    TARTANAIR,
    Camera,
    all_conventions,
    default_camera,
    parse_convention,
    poses_from_file,
    poses_to_file,
    project,
    quaternion_from_rotation,
    rays,
    read_intrinsics,
    read_poses,
    rotation_from_quaternion,
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
        np.testing.assert_allclose(rotation_from_quaternion(torch.tensor(3 * q)).numpy() @ v, turned, atol=1e-12)


def test_quaternion_from_rotation_inverts_also_half_turns():
    q = torch.cat([random_quaternions(500), torch.eye(4, dtype=torch.float64), torch.tensor([[0.6, 0.8, 0, 1e-9]])])
    back = quaternion_from_rotation(rotation_from_quaternion(q))
    assert (back[:, 3] >= 0).all()
    agreement = (back * q / q.norm(dim=1, keepdim=True)).sum(1).abs()
    torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=1e-12, rtol=0)


def test_conventions_are_96_different_ones_and_read_back():
    conventions = all_conventions()
    assert len(set(conventions)) == 96
    for convention in conventions:
        assert torch.det(convention.file_from_cv()) == pytest.approx(1)
        assert parse_convention(convention.describe()) == convention
    assert [parse_convention(n) for n in ("TartanAir", "opencv", "OpenGL")] == [TARTANAIR, OPENCV, OPENGL]
    with pytest.raises(ValueError, match="ned"):
        parse_convention("ned")
    with pytest.raises(ValueError, match="left-down-forward"):
        parse_convention("xyzw camera_to_world left-down-forward")  # determinant -1


def test_round_trip_in_every_convention():
    q = random_quaternions(10)
    t = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for convention in all_conventions():
        order = q if convention.quaternion == "xyzw" else q[:, [3, 0, 1, 2]]
        pose7 = torch.cat([t, order], dim=1)
        back = poses_to_file(*poses_from_file(pose7, convention), convention)
        torch.testing.assert_close(back[:, :3], t, atol=1e-12, rtol=0)
        sign = (back[:, 3:] * pose7[:, 3:]).sum(1, keepdim=True).sign()
        torch.testing.assert_close(back[:, 3:] * sign, pose7[:, 3:], atol=1e-12, rtol=0)


def test_known_poses():
    """An identity quaternion: TartanAir looks along x with y to the right, OpenGL along -z with y up."""
    identity = torch.tensor([[1.0, 2, 3, 0, 0, 0, 1]])
    R, c = poses_from_file(identity, TARTANAIR)
    assert c[0].tolist() == [1, 2, 3]
    assert R[0].T.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # camera x, y, z in the world
    R, _ = poses_from_file(identity, OPENGL)
    assert R[0].T.tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, -1]]
    half = math.sqrt(0.5)  # 90 degrees about z, world to camera: x_cam = R x + t
    R, c = poses_from_file([[1.0, 0, 0, half, 0, 0, half]], parse_convention("wxyz world_to_camera right-down-forward"))
    torch.testing.assert_close(R[0] @ torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, -1.0, 0]).double())
    torch.testing.assert_close(c[0], torch.tensor([0, 1.0, 0]).double(), atol=1e-12, rtol=0)


def test_nan_rows_stay_nan():
    R, c = poses_from_file(np.full((1, 7), np.nan), TARTANAIR)
    assert R.isnan().all() and c.isnan().all()


def test_rays_and_projection():
    camera = Camera(500.0, 400.0, 310.0, 250.0, 640, 480)
    torch.testing.assert_close(
        rays(camera, torch.tensor([[310.0, 250.0], [810.0, 650.0]])), torch.tensor([[0, 0, 1.0], [1, 1, 1]]).double()
    )
    xy = torch.rand(50, 2, dtype=torch.float64) * 400
    torch.testing.assert_close(project(camera, 3 * rays(camera, xy)), xy)
    torch.testing.assert_close(camera.matrix() @ rays(camera, xy)[0], torch.tensor([*xy[0].tolist(), 1.0]).double())
    assert default_camera(640, 480) == Camera(320, 320, 320, 240, 640, 480)


def test_read_poses(tmp_path):
    file = tmp_path / "pose.txt"
    file.write_text("1 2 3 0 0 0 2\n\nnan\nnan nan nan nan nan nan nan\n-1e-3 0 0 1 0 0 0\n")
    poses = read_poses(file)
    assert poses.shape == (4, 7) and poses.dtype == np.float64
    assert poses[0].tolist() == [1, 2, 3, 0, 0, 0, 2] and np.isnan(poses[1:3]).all()
    assert len(read_poses(file, 2)) == 2 and len(read_poses(file, 9)) == 4
    file.write_text("")
    assert read_poses(file).shape == (0, 7)


@pytest.mark.parametrize(
    "line, says",
    [
        ("1 2 3 0 0 0", "6 columns"),
        ("1 2 3 0 0 0 1 9", "8 columns"),
        ("1 2 x 0 0 0 1", "not a number"),
        ("1 2 3 0 0 0 0", "quaternion is zero"),
        ("1 2 inf 0 0 0 1", "not finite"),
        ("1 2 nan 0 0 0 1", "not finite"),
    ],
)
def test_read_poses_names_the_bad_line(tmp_path, line, says):
    file = tmp_path / "pose.txt"
    file.write_text(f"0 0 0 0 0 0 1\n{line}\n")
    with pytest.raises(ValueError, match=says) as error:
        read_poses(file)
    assert "pose.txt, line 2" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_pose_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt"):
        read_poses(tmp_path / "nowhere.txt")
    (tmp_path / "pose.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="pose.txt"):
        read_poses(tmp_path / "pose.txt")


def test_read_intrinsics(tmp_path):
    file = tmp_path / "intrinsics.txt"
    file.write_text("500 501\n 320.5 240\n")
    assert read_intrinsics(file) == (500, 501, 320.5, 240)
    for text in ("1 2 3", "1 2 3 4 5", "a b c d", "0 500 1 1", "nan 1 1 1"):
        file.write_text(text)
        with pytest.raises(ValueError, match="intrinsics.txt"):
            read_intrinsics(file)
    with pytest.raises(ValueError, match="nowhere"):
        read_intrinsics(tmp_path / "nowhere")
