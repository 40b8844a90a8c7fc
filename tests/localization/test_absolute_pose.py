"""P3P, MSAC scores and refinement against PoseLib, autograd and counts by hand."""

import math

import numpy as np
import poselib
import pytest
import torch

from localization.absolute_pose import (
    pose_deviation,
    refine_pose,
    rotation_from_vector,
    scaled_inverse,
    score_poses,
    squared_errors,
)
from localization.p3p import p3p

FOCAL_PX = 320.0
F64 = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=F64)


def uniform(*shape, generator):
    return torch.rand(*shape, generator=generator, dtype=F64)


def random_poses(count, generator):
    axis = torch.nn.functional.normalize(normal(count, 3, generator=generator), dim=1)
    R = rotation_from_vector(axis * math.pi * uniform(count, 1, generator=generator))
    return R, 3 * normal(count, 3, generator=generator)


def homogeneous(xy):
    return torch.cat([xy, torch.ones_like(xy[..., :1])], -1)


def seen_points(R, t, count, generator, depth=(3.0, 8.0)):
    """Image points all over a 640×480 frame, and world points on their rays."""
    xy = (2 * uniform(count, 2, generator=generator) - 1) * torch.tensor([1.0, 0.75], dtype=F64)
    far = depth[0] + (depth[1] - depth[0]) * uniform(count, 1, generator=generator)
    return xy, (homogeneous(xy) * far - t) @ R


def center_of(R, t):
    return -(R.transpose(-1, -2) @ t[..., None])[..., 0]


def exponential(omega):
    x, y, z = omega.unbind(-1)
    zero = torch.zeros_like(x)
    rows = (zero, -z, y, z, zero, -x, -y, x, zero)
    return torch.matrix_exp(torch.stack(rows, -1).reshape(*omega.shape, 3))


def angle_deg(R, S):
    return math.degrees(2 * math.asin(min(1.0, float((R - S).norm()) / math.sqrt(8))))


def pinhole():
    return {"model": "PINHOLE", "width": 640, "height": 480, "params": [FOCAL_PX, FOCAL_PX, 0, 0]}


# ---------------------------------------------------------------- rotations


def test_rotation_from_vector_is_the_matrix_exponential():
    omega = normal(50, 3, generator=seeded(0))
    omega[0] = 0
    omega[1] *= 1e-9
    assert torch.allclose(rotation_from_vector(omega), exponential(omega), atol=1e-13)


# ---------------------------------------------------------------- P3P


def p3p_problems(count, seed):
    generator = seeded(seed)
    R, t = random_poses(count, generator)
    ray = homogeneous(2 * uniform(count, 3, 2, generator=generator) - 1)
    point = (ray * (1 + 9 * uniform(count, 3, 1, generator=generator)) - t[:, None]) @ R
    return R, t, ray, point


def test_p3p_contains_the_truth_in_twenty_thousand_samples():
    R, t, ray, point = p3p_problems(20_000, seed=1)
    found_R, found_t, valid = p3p(ray, point)
    error = (found_R - R[:, None]).flatten(2).norm(dim=2) + (found_t - t[:, None]).norm(dim=2)
    assert torch.where(valid, error, math.inf).amin(1).max() < 1e-6


def test_every_valid_p3p_pose_projects_the_points_onto_the_rays_in_front():
    _, _, ray, point = p3p_problems(2000, seed=2)
    R, t, valid = p3p(ray, point)
    cam = (point[:, None] @ R.transpose(2, 3) + t[:, :, None])[valid]
    expected = ray[:, None].expand(-1, 4, -1, -1)[valid]
    assert cam[..., 2].min() > 0
    assert torch.allclose(cam[..., :2] / cam[..., 2:], expected[..., :2], atol=1e-7)
    assert torch.allclose(torch.linalg.det(R), torch.ones(2000, 4, dtype=F64))


def test_p3p_agrees_with_poselib():
    _, _, ray, point = p3p_problems(300, seed=3)
    R, t, valid = p3p(ray, point)
    unit = torch.nn.functional.normalize(ray, dim=2)
    for i in range(300):
        theirs = poselib.p3p(unit[i].numpy(), point[i].numpy())
        assert len(theirs) == int(valid[i].sum())
        for pose in theirs:
            gap = (R[i] - torch.tensor(pose.R)).flatten(1).norm(dim=1)
            gap = gap + (t[i] - torch.tensor(pose.t)).norm(dim=1)
            assert torch.where(valid[i], gap, math.inf).min() < 1e-5


def test_p3p_keeps_batch_shape_and_ignores_the_length_of_rays():
    _, _, ray, point = p3p_problems(6, seed=4)
    R, t, valid = p3p(ray.reshape(2, 3, 3, 3), point.reshape(2, 3, 3, 3))
    assert R.shape == (2, 3, 4, 3, 3) and t.shape == (2, 3, 4, 3) and valid.shape == (2, 3, 4)
    scaled = p3p(ray * torch.tensor([0.1, 5.0, 40.0], dtype=F64)[:, None], point)
    assert torch.equal(scaled[2], valid.reshape(6, 4))
    assert torch.allclose(scaled[0][scaled[2]], R.reshape(6, 4, 3, 3)[scaled[2]], atol=1e-8)
    empty = p3p(ray[:0], point[:0])
    assert empty[0].shape == (0, 4, 3, 3)


def test_p3p_turns_degenerate_samples_down():
    _, _, ray, point = p3p_problems(7, seed=5)
    point[0, 2] = 0.3 * point[0, 0] + 0.7 * point[0, 1]  # collinear
    point[1, 1] = point[1, 0]  # a point twice
    point[2] = point[2, :1]  # one point thrice
    ray[3, 1], point[3, 1] = ray[3, 0], point[3, 0]  # a correspondence twice
    point[4, 0, 0] = math.nan
    ray[5] = 0
    point[6, 2] = point[6, 0] + 0.3 * (point[6, 1] - point[6, 0]) + 1e-6  # nearly collinear
    R, t, valid = p3p(ray, point)
    assert not valid.any()
    assert torch.equal(R, torch.eye(3, dtype=F64).expand(7, 4, 3, 3)) and not t.any()


def test_p3p_survives_two_points_on_one_ray():
    _, _, ray, point = p3p_problems(200, seed=6)
    ray[:, 1] = ray[:, 0]
    R, t, valid = p3p(ray, point)
    assert torch.isfinite(R).all() and torch.isfinite(t).all()
    cam = (point[:, None] @ R.transpose(2, 3) + t[:, :, None])[valid]
    assert (cam[..., 2] > 0).all()


# ---------------------------------------------------------------- scoring


def scoring_problem(seed=7, poses=20, count=60):
    generator = seeded(seed)
    R, t = random_poses(1, generator)
    xy, points = seen_points(R[0], t[0], count, generator)
    cam = points[:5] @ R[0].T + t[0]
    cam[:, 2] *= -1  # behind the camera, and on the pixel but for the sign of the depth
    points[:5] = (cam - t[0]) @ R[0]
    turn = rotation_from_vector(0.01 * normal(poses, 3, generator=generator))
    return turn @ R, t + 0.02 * normal(poses, 3, generator=generator), xy, points


def gains_by_hand(R, t, xy, points, threshold):
    gain = np.zeros((len(R), len(points)))
    for h in range(len(R)):
        for i in range(len(points)):
            x, y, z = (R[h] @ points[i] + t[h]).tolist()
            if z > 0:
                squared = (x / z - float(xy[i, 0])) ** 2 + (y / z - float(xy[i, 1])) ** 2
                gain[h, i] = max(0.0, 1 - squared / threshold**2)
    return gain


def test_scores_are_msac_with_weights_and_one_vote_a_keypoint():
    R, t, xy, points = scoring_problem()
    threshold = 6 / FOCAL_PX
    gain = gains_by_hand(R, t, xy, points, threshold)
    assert 0.1 < (gain > 0).mean() < 0.95
    expected = gain.sum(1)
    ones = torch.ones(60)
    assert np.allclose(score_poses(R, t, xy, points, threshold, ones), expected, atol=1e-3)

    weights = uniform(60, generator=seeded(8))
    gain = gain * weights.numpy()
    scores = score_poses(R, t, xy, points, threshold, weights)
    assert np.allclose(scores, gain.sum(1), atol=1e-3)

    keypoints = torch.randint(100, 117, (60,), generator=seeded(9))
    best = [gain[:, keypoints.numpy() == k].max(1) for k in keypoints.unique().tolist()]
    scores = score_poses(R, t, xy, points, threshold, weights, keypoint_ids=keypoints)
    assert np.allclose(scores, np.sum(best, 0), atol=1e-3)


def test_scores_do_not_depend_on_the_chunks_or_on_a_distant_origin(monkeypatch):
    R, t, xy, points = scoring_problem()
    ones = torch.ones(len(xy))
    whole = score_poses(R, t, xy, points, 0.02, ones)
    monkeypatch.setattr("localization.absolute_pose.SCORE_CHUNK", 130)
    assert torch.equal(score_poses(R, t, xy, points, 0.02, ones), whole)
    far = torch.tensor([5000.0, -3000.0, 100.0], dtype=F64)
    shifted = score_poses(R, t - R @ far, xy, points + far, 0.02, ones)
    assert torch.allclose(shifted, whole, atol=1e-2)


def test_scores_of_nothing():
    R, t, xy, points = scoring_problem()
    nothing = torch.zeros(0)
    assert score_poses(R[:0], t[:0], xy, points, 0.02, torch.ones(len(xy))).shape == (0,)
    none = score_poses(R, t, xy[:0], points[:0], 0.02, nothing, keypoint_ids=nothing.long())
    assert torch.equal(none, torch.zeros(len(R), dtype=F64))


def test_squared_errors_are_infinite_behind_the_camera():
    R, t, xy, points = scoring_problem()
    errors = squared_errors(R, t, xy, points)
    assert torch.isinf(errors[:, :5]).all()
    gain = (1 - errors / 0.02**2).clamp_min(0)
    assert np.allclose(gain, gains_by_hand(R, t, xy, points, 0.02), atol=1e-9)
    assert torch.equal(squared_errors(R[0], t[0], xy, points), errors[0])


# ---------------------------------------------------------------- refinement


def noisy_problem(seed, count=80, noise_px=1.0):
    generator = seeded(seed)
    R, t = random_poses(1, generator)
    xy, points = seen_points(R[0], t[0], count, generator)
    xy = xy + noise_px / FOCAL_PX * normal(count, 2, generator=generator)
    return R[0], t[0], xy, points


def disturbed(R, c, count, generator, angle=0.01, shift=0.03):
    turn = rotation_from_vector(angle * normal(count, 3, generator=generator))
    return turn @ R, c + shift * normal(count, 3, generator=generator)


def refined(R, c, xy, points, threshold, weights=None):
    """refine_pose of one pose."""
    weights = torch.ones(len(xy)) if weights is None else weights
    R, c, cost = refine_pose(R[None], c[None], xy[None], points[None], threshold, weights[None])
    return R[0], c[0], cost[0]


def robust_cost(R, c, xy, points, threshold, weights=None):
    cam = (points - c) @ R.T
    squared = (cam[:, :2] / cam[:, 2:] - xy).square().sum(1)
    c2 = threshold**2 / 4
    loss = torch.clamp(c2 * torch.log(1 + squared / c2), max=threshold**2)
    loss = torch.where(cam[:, 2] > 0, loss, threshold**2)
    return (loss if weights is None else loss * weights).sum()


def test_refinement_reaches_a_stationary_point_of_the_cost_it_states():
    R, t, xy, points = noisy_problem(10)
    xy[:20] = uniform(20, 2, generator=seeded(11))
    weights = uniform(80, generator=seeded(12))
    threshold = 4 / FOCAL_PX
    start_R, start_c = disturbed(R, center_of(R, t), 1, seeded(13))
    found_R, found_c, stated = refined(start_R[0], start_c[0], xy, points, threshold, weights)

    def cost(delta):
        turned = exponential(delta[:3]) @ found_R
        return robust_cost(turned, found_c + delta[3:], xy, points, threshold, weights)

    start = robust_cost(start_R[0], start_c[0], xy, points, threshold, weights)
    here = torch.zeros(6, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cost(here), here)
    hessian = torch.autograd.functional.hessian(cost, here.detach())
    assert float(cost(here.detach())) == pytest.approx(float(stated), rel=1e-9)
    assert stated < start
    assert torch.linalg.eigvalsh(hessian).min() > 0
    assert torch.linalg.solve(hessian, gradient).abs().max() < 1e-6  # the step to the minimum
    assert angle_deg(found_R, R) < 0.2


def test_refinement_agrees_with_poselib():
    for seed in range(20, 26):
        R, t, xy, points = noisy_problem(seed)
        start_R, start_c = disturbed(R, center_of(R, t), 1, seeded(seed + 100))
        found_R, found_c, _ = refined(start_R[0], start_c[0], xy, points, 4 / FOCAL_PX)
        initial = poselib.CameraPose()
        initial.R, initial.t = start_R[0].numpy(), -(start_R[0] @ start_c[0]).numpy()
        theirs, _ = poselib.refine_absolute_pose(
            (xy * FOCAL_PX).numpy(),
            points.numpy(),
            initial,
            pinhole(),
            {"loss_type": "CAUCHY", "loss_scale": 2.0, "max_iterations": 200},
        )
        assert angle_deg(found_R, torch.tensor(theirs.R)) < 1e-3
        assert (-(found_R @ found_c) - torch.tensor(theirs.t)).norm() < 1e-4


def test_many_poses_refine_as_they_do_alone():
    R, t, xy, points = noisy_problem(30)
    start_R, start_c = disturbed(R, center_of(R, t), 7, seeded(31))
    weights = uniform(7, 80, generator=seeded(32)) > 0.3
    own_xy = xy + 1e-3 * normal(7, 80, 2, generator=seeded(33))
    many = refine_pose(start_R, start_c, own_xy, points.expand(7, 80, 3), 0.0125, weights)
    for i in range(7):
        alone = refined(start_R[i], start_c[i], own_xy[i], points, 0.0125, weights[i])
        used = weights[i]
        left_out = refined(start_R[i], start_c[i], own_xy[i][used], points[used], 0.0125)
        for one in (alone, left_out):
            for ours, theirs in zip(many, one):
                assert torch.allclose(ours[i], theirs, atol=1e-7)


def test_a_point_behind_the_camera_costs_what_an_outlier_costs():
    R, t, xy, points = noisy_problem(34)
    threshold, center = 4 / FOCAL_PX, center_of(R, t)
    clean_R, _, clean = refined(R, center, xy, points, threshold)
    behind = torch.cat([points, 2 * center - points[:3]])
    found_R, _, cost = refined(R, center, torch.cat([xy, xy[:3]]), behind, threshold)
    assert torch.allclose(found_R, clean_R, atol=1e-7)
    assert float(cost - clean) == pytest.approx(3 * threshold**2, rel=1e-6)


def test_a_pose_that_nothing_fixes_stays():
    R, t, xy, points = noisy_problem(42)
    for weights in (torch.zeros(80), None):
        some = slice(0, 80 if weights is not None else 0)
        found_R, found_c, cost = refined(R, center_of(R, t), xy[some], points[some], 0.0125, weights)
        assert torch.allclose(found_R, R) and torch.allclose(found_c, center_of(R, t)) and cost == 0
    none = refine_pose(R[None][:0], t[None][:0], xy[None][:0], points[None][:0], 0.0125, torch.ones(0, 80))
    assert none[0].shape == (0, 3, 3) and none[2].shape == (0,)


def test_covariances_are_infinite_where_nothing_is_determined():
    J = normal(3, 40, 6, generator=seeded(45))
    J[1, :, 5] = 2 * J[1, :, 4]  # two parameters that only act together
    information = J.transpose(1, 2) @ J
    variance = torch.tensor([4.0, 4.0, 4.0], dtype=F64)
    found = scaled_inverse(information, variance, torch.tensor([True, True, False]))
    assert torch.allclose(found[0], 4 * torch.linalg.inv(information[0]))
    assert torch.isinf(torch.stack(pose_deviation(found[1:]))).all()
    assert not torch.isnan(found).any()
    sigma_m, sigma_deg = pose_deviation(torch.diag(torch.tensor([1, 4, 4, 1, 2, 6], dtype=F64)))
    assert (float(sigma_m), float(sigma_deg)) == pytest.approx((3.0, math.degrees(3)))
