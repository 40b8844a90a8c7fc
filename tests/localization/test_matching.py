"""matching.py: by descriptor, and guided by known poses."""

from dataclasses import replace

import numpy as np
import pycolmap
import pytest
import torch

from localization.absolute_pose import rotation_from_vector
from localization.cameras import Camera, rays
from localization.features import Features
from localization.matching import (
    View,
    epipolar_pairs,
    guided_matches,
    in_band,
    laid_over,
    mutual_matches,
    near_pairs,
    same_picture,
)


def right_matches(a: View, b: View, matches) -> torch.Tensor:
    """Which matches join keypoints of one point (clutter never does)."""
    point_a = torch.cat([a.seen, torch.full((len(a.features.xy_px) - len(a.seen),), -1)])
    point_b = torch.cat([b.seen, torch.full((len(b.features.xy_px) - len(b.seen),), -2)])
    return point_a[matches.a] == point_b[matches.b]


def features_at(xy: list, descriptors: torch.Tensor) -> Features:
    n = len(xy)
    return Features(torch.tensor(xy), torch.ones(n), torch.zeros(n), torch.ones(n), descriptors)


def test_mutual_matches_by_hand():
    """Ratio and mutuality on unit vectors at known angles; a second neighbor nearby does not count."""

    def at(*degrees):
        angle = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    a = features_at([[0.0, 0], [50, 0], [90, 0]], at(0.0, 90.0, 9.0))
    b = features_at([[0.0, 0], [3, 0], [100, 0]], at(1.0, 5.0, 60.0))
    matches = mutual_matches(a, b)
    assert matches.a.tolist() == [0, 1, 2] and matches.b.tolist() == [0, 2, 1]
    np.testing.assert_allclose(matches.similarity, np.cos(np.deg2rad([1, 30, 4])), atol=1e-6)
    half = np.sin(np.deg2rad([1, 30, 4]) / 2), np.sin(np.deg2rad([60, 85, 51]) / 2)
    np.testing.assert_allclose(matches.ratio, half[0] / half[1], rtol=1e-3)


def test_of_equal_descriptors_one_is_matched(random_world, random_poses):
    """Pixel-identical tiles: no keypoint has two matches in an image."""
    world = random_world(1)
    world.descriptors[10:20] = world.descriptors[10]
    a, b = (world.view(*pose, noise_px=0.0, clutter=0, spread=0.0) for pose in random_poses(2, 1))
    for matches in (mutual_matches(a.features, b.features), guided_matches(a, b)):
        assert len(matches) > 50
        for side in (matches.a, matches.b):
            assert len(side.unique()) == len(side)


def test_mutual_matches_find_the_points(random_world, random_poses):
    world = random_world(0)
    a, b = (world.view(*pose) for pose in random_poses(2, 1))
    matches = mutual_matches(a.features, b.features)
    distinct = matches.select(matches.ratio < 0.8)
    common = len(set(a.seen.tolist()) & set(b.seen.tolist()))
    assert len(distinct) > 0.95 * common > 50
    assert right_matches(a, b, distinct).double().mean() > 0.99
    back = mutual_matches(b.features, a.features)
    assert sorted(zip(back.b.tolist(), back.a.tolist())) == sorted(zip(matches.a.tolist(), matches.b.tolist()))


TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    "change", [1.6 * torch.eye(2), 0.5 * torch.eye(2), torch.diag(torch.tensor([1.3, 1.0])), TURN, -torch.eye(2)]
)
def test_versions_of_one_picture_are_told_from_pictures_of_one_scene(random_world, random_poses, change):
    """Cut, scaled, squeezed, turned, each with noise and much that only one of them shows; not moved or turned about."""
    world = random_world(3, count=500)
    generator = torch.Generator().manual_seed(4)
    (R, c), elsewhere = random_poses(2, 5)
    a, b = world.view(R, c), world.view(R, c, clutter=200).features
    xy_px = (b.xy_px - 300.0) @ change + 310.0 + 0.3 * torch.randn(b.xy_px.shape, generator=generator)
    version = replace(b, xy_px=xy_px)
    assert same_picture(a.features, version) and same_picture(version, a.features)
    about = rotation_from_vector(torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64))
    moved = c + torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)
    for other in (world.view(*elsewhere), world.view(R, moved), world.view(R @ about, c)):
        assert not same_picture(a.features, other.features)
    assert not same_picture(a.features, version.select(slice(20)))


@pytest.mark.parametrize("n_a, n_b", [(0, 0), (0, 3), (3, 0), (1, 1), (3, 2)])
def test_few_keypoints(n_a, n_b):
    xy = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    a, b = (
        Features(xy[:n], torch.ones(n), torch.zeros(n), torch.ones(n), torch.eye(128)[:n]) for n in (n_a, n_b)
    )
    matches = mutual_matches(a, b)
    assert len(matches) == min(n_a, n_b)
    assert torch.isfinite(matches.ratio).all()


def test_in_band_is_pycolmaps_sampson_test(random_world, random_poses):
    """Pixels from the line in one image and the other, by pycolmap's essential matrix."""
    world = random_world(2)
    a, b = (world.view(*pose) for pose in random_poses(2, 3))
    R, c = b.R_world_from_cam.T @ a.R_world_from_cam, b.R_world_from_cam.T @ (a.c_world - b.c_world)
    pose = pycolmap.Rigid3d(pycolmap.Rotation3d(R.numpy()), c.numpy())
    E = torch.tensor(pycolmap.essential_matrix_from_pose(pose))
    x_a, x_b = rays(a.camera, a.features.xy_px), rays(b.camera, b.features.xy_px)
    residual = (x_a @ E.T @ x_b.T).abs() * a.camera.fx
    lines_b, lines_a = (x_a @ E.T)[:, :2].norm(dim=1), (x_b @ E)[:, :2].norm(dim=1)
    away = torch.maximum(residual / lines_b[:, None], residual / lines_a)
    mask = allowed(a, b)
    assert mask.sum() > 100 and away[mask].max() < 3.001
    common = [(i, int((b.seen == p).nonzero()[0])) for i, p in enumerate(a.seen) if p in b.seen]
    assert all(mask[i, j] == (away[i, j] <= 3) for i, j in common)


def every_pair(a: View, b: View) -> tuple[torch.Tensor, torch.Tensor]:
    i, j = torch.cartesian_prod(*(torch.arange(len(v.features)) for v in (a, b))).T
    return i, j


def allowed(a: View, b: View) -> torch.Tensor:
    """`in_band` of every pair (n_a, n_b)."""
    return in_band(a, b, *every_pair(a, b)).reshape(len(a.features), len(b.features))


@pytest.mark.parametrize("seed", range(4))
def test_epipolar_pairs_are_all_in_the_band(random_world, random_poses, look_at, seed):
    """Wherever the epipole is: beside the image, in it (the camera goes ahead), on a keypoint."""
    world = random_world(seed)
    (R, c), pose = random_poses(2, 5 + seed)
    ahead = [pose, (R, c + 0.4 * R[:, 2]), (R, c + 0.5 * R[:, 0]), (R, c - 0.2 * R[:, 2])][seed]
    a, b = world.view(R, c), world.view(*ahead)
    if seed == 1:
        b.features.xy_px[0] = torch.tensor([b.camera.cx, b.camera.cy])
    i, j, similarity = epipolar_pairs(a, b)
    expected = allowed(a, b)
    assert len(set(zip(i.tolist(), j.tolist()))) == len(i) == int(expected.sum()) > 100
    assert expected[i, j].all()
    products = a.features.descriptors @ b.features.descriptors.T
    torch.testing.assert_close(similarity, products[i, j])


def test_in_band_keeps_true_pairs_and_few_others(random_world, random_poses):
    world = random_world(4)
    a, b = (world.view(*pose, clutter=0) for pose in random_poses(2, 5))
    mask = allowed(a, b)
    common = [(i, int((b.seen == p).nonzero()[0])) for i, p in enumerate(a.seen) if p in b.seen]
    assert all(mask[i, j] for i, j in common)
    assert mask.double().mean() < 0.05
    torch.testing.assert_close(allowed(b, a), mask.T)


def test_in_band_refuses_points_behind(look_at):
    """Two parallel cameras a meter apart: a pixel must move against the baseline, by any positive disparity."""
    R = look_at(torch.zeros(3).double(), torch.tensor([0.0, 5.0, 0.0]).double())
    camera_xy = [[320.0, 240.0], [420.0, 240.0]]
    camera = Camera(320, 320, 320, 240, 640, 480)
    a = View(features_at([[370.0, 240.0]], torch.eye(128)[:1]), camera, R, torch.zeros(3).double())
    b = View(features_at(camera_xy, torch.eye(128)[:2]), camera, R, torch.tensor([1.0, 0, 0]).double())
    assert allowed(a, b).tolist() == [[True, False]]


def test_guided_matches_see_through_repetition(corridor, look_at):
    """Along a wall of equal tiles descriptors alone are mostly wrong; inside the epipolar band most are right."""
    world = corridor(0, difference=0.05)
    # The baseline is not along the repetition, as with a camera that bobs.
    spots = [torch.tensor([5.0, 0.0, 0.0]).double(), torch.tensor([5.3, 0.3, 0.9]).double()]
    a, b = (world.view(look_at(c, c + torch.tensor([0.3, 3.0, -0.3])), c, spread=0.3) for c in spots)
    raw, guided = mutual_matches(a.features, b.features), guided_matches(a, b)
    raw = raw.select(raw.ratio < 0.9)
    assert len(guided) > 5 * len(raw)
    assert right_matches(a, b, guided).double().mean() > 0.8


def test_guided_matches_of_one_place(random_world, random_poses):
    """No baseline at all: nothing can be triangulated, nothing breaks; in the band are parallel rays."""
    world = random_world(6)
    (R, c), (R2, _) = random_poses(2, 7)
    a, b = world.view(R, c, clutter=0), world.view(R2, c, clutter=0)
    assert len(guided_matches(a, b)) == 0
    common = [(i, int((b.seen == p).nonzero()[0])) for i, p in enumerate(a.seen) if p in b.seen]
    mask = allowed(a, b)
    assert all(mask[i, j] for i, j in common) and mask.double().mean() < 0.01


def test_near_pairs(look_at):
    """All pairs of a few; of many no more than the limit allows, and never cameras back to back."""
    c = torch.stack([torch.tensor([0.1 * i, 0.0, 0.0]) for i in range(100)]).double()
    R = torch.stack([look_at(v, v + torch.tensor([0.0, 1.0, 0.0])) for v in c])
    assert len(near_pairs(R[:6], c[:6], 20)) == 15
    pairs = near_pairs(R, c, 20)
    assert len(pairs) <= 100 * 20 and len(set(pairs)) == len(pairs) and all(i < j for i, j in pairs)
    gaps = [j - i for i, j in pairs if i == 0]
    assert 1 in gaps and max(gaps) > 40  # neighbors, and wide baselines too
    R[50:] = torch.stack([look_at(v, v - torch.tensor([0.0, 1.0, 0.0])) for v in c[50:]])
    assert all((i < 50) == (j < 50) for i, j in near_pairs(R, c, 20))
    assert {0 in pair for pair in near_pairs(R[:6], c[:6], 20, [0])} == {True}
    place = c[:1] + 1e-3 * torch.arange(300)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    here = near_pairs(R[:1].expand(300, 3, 3), place.double(), 20)
    assert max(torch.bincount(torch.tensor(here).flatten())) <= 40  # no hub, whoever asks
    assert near_pairs(R[:1], c[:1], 20) == [] and near_pairs(R[:0], c[:0], 20) == []


def test_rays_of_matches_meet(random_world, random_poses):
    """Guided matches without noise obey the epipolar constraint exactly."""
    world = random_world(8)
    a, b = (world.view(*pose, noise_px=0.0, clutter=0) for pose in random_poses(2, 9))
    m = guided_matches(a, b)
    x_a, x_b = rays(a.camera, a.features.xy_px[m.a]), rays(b.camera, b.features.xy_px[m.b])
    d_a, d_b = x_a @ a.R_world_from_cam.T, x_b @ b.R_world_from_cam.T
    residual = torch.linalg.cross(d_a, d_b) @ (b.c_world - a.c_world)
    residual = residual[right_matches(a, b, m)]
    assert len(residual) > 50 and residual.abs().max() < 1e-5


@pytest.mark.parametrize(
    "share, moved_px, is_overlay",
    [(0.5, None, True), (0.5, 50.0, True), (0.5, 1.0, False), (1.0, None, False), (0.02, None, False)],
)
def test_what_is_laid_over_a_part_of_two_images_is_no_match(share, moved_px, is_overlay):
    """The left part of two images shows the same, as a menu does, the rest another place or, of a copy
    or from nearby, the same a little aside."""
    generator = torch.Generator().manual_seed(1)
    count, size = 800, torch.tensor([640.0, 480.0])

    def image() -> tuple[torch.Tensor, torch.Tensor]:
        xy = torch.rand(count, 2, generator=generator) * size
        descriptors = torch.randn(count, 128, generator=generator)
        return xy, descriptors / descriptors.norm(dim=1, keepdim=True)

    (xy, descriptors), (other_xy, other) = image(), image()
    inside = xy[:, 0] < share * 640
    other_xy[inside], other[inside] = xy[inside], descriptors[inside]
    if moved_px is not None:
        other_xy[~inside], other[~inside] = xy[~inside] + moved_px, descriptors[~inside]
    camera = Camera(500.0, 500.0, 320.0, 240.0, 640, 480)
    a, b = (View(features_at(p.tolist(), d), camera) for p, d in ((xy, descriptors), (other_xy, other)))
    matches = mutual_matches(a.features, b.features)
    laid = laid_over(a, b, matches)
    equal = (matches.a == matches.b) & inside[matches.a]
    assert bool(equal.any()) and torch.equal(laid, equal if is_overlay else torch.zeros_like(equal))
