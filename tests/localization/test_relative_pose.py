"""Five-point, RANSAC, E5+1, directions and means against PoseLib, OpenCV and closed forms."""

import math

import cv2
import numpy as np
import poselib
import pytest
import torch

from localization.absolute_pose import rotation_from_vector
from localization.relative_pose import (
    decompose_essential,
    essential_from_pose,
    essential_ransac,
    five_point,
    in_front,
    query_in_world,
    refine_relative_pose,
    sampson_squared,
    score_essentials,
)

FOCAL_PX = 320.0
F64 = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=F64)


def uniform(*shape, generator):
    return torch.rand(*shape, generator=generator, dtype=F64)


def homogeneous(xy):
    return torch.cat([xy, torch.ones_like(xy[..., :1])], -1)


def unit(v):
    return torch.nn.functional.normalize(v, dim=-1)


def angle_deg(R, S):
    return math.degrees(2 * math.asin(min(1.0, float((R - S).norm()) / math.sqrt(8))))


def between_deg(u, v):
    return math.degrees(2 * math.asin(min(1.0, float((unit(u) - unit(v)).norm()) / 2)))


def pinhole():
    return {"model": "PINHOLE", "width": 640, "height": 480, "params": [FOCAL_PX, FOCAL_PX, 0, 0]}


def two_views(seed, count=100, *, outliers=0.0, noise_px=0.0, baseline=1.0):
    """R, t (of length baseline) and matched points in front of both cameras; outliers first."""
    generator = seeded(seed)
    R = rotation_from_vector(0.2 * normal(3, generator=generator))
    t = baseline * unit(normal(3, generator=generator))
    xy_a = 2 * uniform(4 * count, 2, generator=generator) - 1
    cam_b = homogeneous(xy_a) * (4 + 5 * uniform(4 * count, 1, generator=generator)) @ R.T + t
    seen = torch.nonzero(cam_b[:, 2] > 0.5)[:count, 0]
    xy_a, xy_b = xy_a[seen], cam_b[seen, :2] / cam_b[seen, 2:]
    wrong = int(outliers * count)
    xy_b[:wrong] = 2 * uniform(wrong, 2, generator=generator) - 1
    noise = noise_px / FOCAL_PX * normal(2, count, 2, generator=generator)
    return R, t, xy_a + noise[0], xy_b + noise[1]


def normalized(E):
    return E / E.flatten(-2).norm(dim=-1)[..., None, None] * math.sqrt(2)


def gap_to_nearest(E, candidates, valid):
    """Distance of E (..., 3, 3) up to sign to the nearest valid candidate (..., k, 3, 3)."""
    E = normalized(E)[..., None, :, :]
    same = (candidates - E).flatten(-2).norm(dim=-1)
    opposite = (candidates + E).flatten(-2).norm(dim=-1)
    return torch.where(valid, torch.minimum(same, opposite), math.inf).amin(-1)


# ---------------------------------------------------------------- five points


def five_point_problems(count, first_seed):
    problems = [two_views(first_seed + i, 5) for i in range(count)]
    R, t, xy_a, xy_b = (torch.stack(part) for part in zip(*problems, strict=True))
    return essential_from_pose(R, t), homogeneous(xy_a), homogeneous(xy_b)


def test_five_point_contains_the_truth():
    E, ray_a, ray_b = five_point_problems(1000, 0)
    found, valid = five_point(ray_a, ray_b)
    gaps = gap_to_nearest(E, found, valid)
    assert gaps.max() < 1e-4 and torch.quantile(gaps, 0.99) < 1e-7


def test_five_point_solutions_are_essential_and_satisfy_the_matches():
    _, ray_a, ray_b = five_point_problems(200, 5000)
    found, valid = five_point(3 * ray_a, 0.5 * ray_b)
    E = found[valid]
    values = torch.linalg.svdvals(E)
    assert torch.allclose(values, torch.tensor([1.0, 1.0, 0.0], dtype=F64), atol=1e-5)
    residual = torch.einsum("npi,nsij,npj->nsp", ray_b, found, ray_a)
    assert residual[valid].abs().max() < 1e-10
    assert (found[~valid] == 0).all()


def test_five_point_agrees_with_poselib():
    _, ray_a, ray_b = five_point_problems(200, 6000)
    found, valid = five_point(ray_a, ray_b)
    accurate, as_many = 0, 0
    for i in range(200):
        theirs = poselib.essential_matrix_5pt(unit(ray_a[i]).numpy(), unit(ray_b[i]).numpy())
        as_many += len(theirs) == int(valid[i].sum())  # some versions drop solutions near each other
        theirs = normalized(torch.tensor(np.array(theirs)))
        # PoseLib polishes nothing: near double roots its matrices are not essential.
        theirs = theirs[torch.linalg.svdvals(theirs)[:, 2] < 1e-7]
        accurate += len(theirs)
        assert (gap_to_nearest(theirs, found[i], valid[i]) < 1e-3).all()
    assert accurate > 800 and as_many > 180


def test_five_point_keeps_batch_shape_and_survives_degenerate_samples():
    _, ray_a, ray_b = five_point_problems(6, 7000)
    found, valid = five_point(ray_a.reshape(2, 3, 5, 3), ray_b.reshape(2, 3, 5, 3))
    assert found.shape == (2, 3, 10, 3, 3) and valid.shape == (2, 3, 10)
    ray_a[0], ray_b[0] = ray_a[0, :1], ray_b[0, :1]  # one match five times
    ray_a[1, 4], ray_b[1, 4] = ray_a[1, 3], ray_b[1, 3]  # one match twice
    ray_b[2] = ray_a[2] @ rotation_from_vector(torch.tensor([0.1, 0.2, 0.3], dtype=F64)).T
    ray_b[3] = ray_a[3]  # identical images
    ray_a[4, 2, 1] = math.nan
    ray_a[5], ray_b[5] = 0, 0
    found, valid = five_point(ray_a, ray_b)
    assert torch.isfinite(found).all() and not valid[4].any()
    E = found[valid]
    assert torch.allclose(
        2 * E @ E.mT @ E, (E @ E.mT).diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * E, atol=1e-5
    )
    assert five_point(ray_a[:0], ray_b[:0])[0].shape == (0, 10, 3, 3)


# ---------------------------------------------------------------- errors and scores


def test_sampson_distance_agrees_with_opencv():
    R, t, xy_a, xy_b = two_views(10, 30, noise_px=3)
    E = torch.stack([essential_from_pose(R, t), normal(3, 3, generator=seeded(11))])
    ours = sampson_squared(E, xy_a, xy_b)
    for k in range(2):
        for i in range(30):
            a, b = homogeneous(xy_a[i]).numpy(), homogeneous(xy_b[i]).numpy()
            assert float(ours[k, i]) == pytest.approx(cv2.sampsonDistance(a, b, E[k].numpy()))


def test_scores_of_essential_matrices_are_msac(monkeypatch):
    R, t, xy_a, xy_b = two_views(12, 50, noise_px=2, outliers=0.3)
    turn = rotation_from_vector(0.01 * normal(9, 3, generator=seeded(14)))
    E = essential_from_pose(turn @ R, t.expand(9, 3))
    gain = (1 - sampson_squared(E, xy_a, xy_b) / 0.02**2).clamp_min(0)
    monkeypatch.setattr("localization.relative_pose.SCORE_CHUNK", 120)
    assert torch.allclose(score_essentials(E, xy_a, xy_b, 0.02), gain.sum(1), atol=1e-3)
    assert score_essentials(E[:0], xy_a, xy_b, 0.02).shape == (0,)


def test_decomposition_returns_the_pose_whatever_the_sign():
    for seed in range(20, 30):
        R, t, xy_a, xy_b = two_views(seed, 20)
        E = essential_from_pose(R, t)
        everything = torch.ones(2, 20, dtype=torch.bool)
        found_R, found_t = decompose_essential(torch.stack([E, -4 * E]), xy_a, xy_b, everything)
        assert torch.allclose(found_R, R.expand(2, 3, 3), atol=1e-9)
        assert torch.allclose(found_t, t.expand(2, 3), atol=1e-9)


def test_only_masked_matches_vote_on_the_decomposition():
    R, t, xy_a, xy_b = two_views(30, 20)
    # Matches of the mirrored pose (R, -t) outvote the true ones, unless masked.
    cam_b = homogeneous(xy_a) * 6 @ R.T - t
    both_a = torch.cat([xy_a[:5], xy_a])
    both_b = torch.cat([xy_b[:5], cam_b[:, :2] / cam_b[:, 2:]])
    E = essential_from_pose(R, t)[None]
    for mask, expected in ((torch.arange(25) < 25, -t), (torch.arange(25) < 5, t)):
        _, found = decompose_essential(E, both_a, both_b, mask[None])
        assert torch.allclose(found[0], expected, atol=1e-9)


def test_in_front_tells_the_true_pose_from_its_three_twins():
    R, t, xy_a, xy_b = two_views(31, 40)
    half_turn = 2 * t[:, None] * t - torch.eye(3, dtype=F64)
    twins_R = torch.stack([R, R, half_turn @ R, half_turn @ R])
    front = in_front(twins_R, torch.stack([t, -t, t, -t]), xy_a, xy_b)
    assert front.sum(1).tolist() == [40, 0, 0, 0]


# ---------------------------------------------------------------- refinement and RANSAC


def robust_epipolar_cost(R, t, xy_a, xy_b, threshold, weights):
    c2 = threshold**2 / 4
    squared = sampson_squared(essential_from_pose(R, t), xy_a, xy_b)
    loss = torch.clamp(c2 * torch.log(1 + squared / c2), max=threshold**2)
    return (loss * weights).sum()


def test_relative_refinement_reaches_a_stationary_point():
    R, t, xy_a, xy_b = two_views(40, 120, noise_px=0.7, outliers=0.2)
    weights = uniform(3, 120, generator=seeded(41))
    threshold = 3 / FOCAL_PX
    turn = rotation_from_vector(0.005 * normal(3, 3, generator=seeded(42)))
    start_t = unit(t + 0.03 * normal(3, 3, generator=seeded(43)))
    found_R, found_t, cost = refine_relative_pose(
        turn @ R, start_t, xy_a, xy_b, threshold, weights
    )
    for i in range(3):

        def moved(delta, i=i):
            zero = torch.zeros((), dtype=F64)
            x, y, z = delta[:3]
            K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
            return robust_epipolar_cost(
                torch.matrix_exp(K) @ found_R[i],
                unit(found_t[i] + delta[3:]),
                xy_a,
                xy_b,
                threshold,
                weights[i],
            )

        here = torch.zeros(6, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(moved(here), here)
        hessian = torch.autograd.functional.hessian(moved, here.detach())
        # Moving along t changes nothing: five of six directions are determined.
        assert (torch.linalg.pinv(hessian, rtol=1e-9) @ gradient).abs().max() < 1e-5
        assert float(moved(here.detach())) == pytest.approx(float(cost[i]), rel=1e-9)
        assert between_deg(found_t[i], t) < 2 and angle_deg(found_R[i], R) < 0.5
    assert torch.allclose(found_t.norm(dim=1), torch.ones(3, dtype=F64))


def test_relative_refinement_agrees_with_poselib():
    for seed in range(50, 54):
        R, t, xy_a, xy_b = two_views(seed, 100, noise_px=0.7)
        initial = poselib.CameraPose()
        turned = rotation_from_vector(torch.tensor([0.003, -0.004, 0.002], dtype=F64)) @ R
        initial.R, initial.t = turned.numpy(), t.numpy()
        theirs, _ = poselib.refine_relative_pose(
            (xy_a * FOCAL_PX).numpy(),
            (xy_b * FOCAL_PX).numpy(),
            initial,
            pinhole(),
            pinhole(),
            {"loss_type": "CAUCHY", "loss_scale": 2.0, "max_iterations": 200},
        )
        ones = torch.ones(1, 100)
        found_R, found_t, _ = refine_relative_pose(
            turned[None], t[None], xy_a, xy_b, 4 / FOCAL_PX, ones
        )
        assert angle_deg(found_R[0], torch.tensor(theirs.R)) < 5e-3
        assert between_deg(found_t[0], torch.tensor(theirs.t)) < 5e-2


@pytest.mark.parametrize(("count", "outliers"), [(60, 0.2), (200, 0.5)])
def test_essential_ransac_is_as_good_as_poselib(count, outliers):
    for seed in range(60, 64):
        R, t, xy_a, xy_b = two_views(seed, count, noise_px=0.7, outliers=outliers)
        pose = essential_ransac(xy_a, xy_b, 2 / FOCAL_PX, generator=seeded(seed))
        theirs, info = poselib.estimate_relative_pose(
            (xy_a * FOCAL_PX).numpy(),
            (xy_b * FOCAL_PX).numpy(),
            pinhole(),
            pinhole(),
            {"max_epipolar_error": 2.0},
            {"loss_type": "CAUCHY", "loss_scale": 1.0},
        )
        E = essential_from_pose(torch.tensor(theirs.R), torch.tensor(theirs.t))[None]
        ours = essential_from_pose(pose.R_b_from_a, pose.t_b_from_a)[None]
        scores = score_essentials(torch.cat([ours, E]), xy_a, xy_b, 2 / FOCAL_PX)
        assert scores[0] > scores[1] - 1.5
        assert int(pose.inliers.sum()) >= info["num_inliers"] - 3
        assert angle_deg(pose.R_b_from_a, R) < 0.7
        assert between_deg(pose.t_b_from_a, t) < 5
        assert float(pose.t_b_from_a.norm()) == pytest.approx(1)


def test_essential_ransac_states_the_parallax_and_keeps_the_rotation_where_there_is_none():
    R, _t, xy_a, xy_b = two_views(70, 150)
    ray_a, ray_b = unit(homogeneous(xy_a) @ R.T), unit(homogeneous(xy_b))
    parallax = torch.rad2deg(torch.acos((ray_a * ray_b).sum(1))).median()
    pose = essential_ransac(xy_a, xy_b, 2 / FOCAL_PX, generator=seeded(70))
    assert pose.parallax_deg == pytest.approx(float(parallax), rel=0.05)

    R, _, xy_a, xy_b = two_views(71, 150, noise_px=0.5, baseline=0.0)
    pose = essential_ransac(xy_a, xy_b, 2 / FOCAL_PX, generator=seeded(71))
    assert angle_deg(pose.R_b_from_a, R) < 0.5
    assert pose.parallax_deg < 0.4
    assert torch.isfinite(pose.t_b_from_a).all()


def test_essential_ransac_of_bad_input():
    _, _, xy_a, xy_b = two_views(72, 60)
    search = {"generator": seeded(72), "iterations": 400}
    assert essential_ransac(xy_a[:0], xy_b[:0], 0.005, **search) is None
    assert essential_ransac(xy_a[:5], xy_b[:5], 0.005, **search) is None
    same = essential_ransac(xy_a[:1].expand(60, 2), xy_b[:1].expand(60, 2), 0.005, **search)
    still = essential_ransac(xy_a, xy_a, 0.005, **search)
    for pose in (same, still):
        assert (
            pose is None
            or torch.isfinite(torch.cat([pose.R_b_from_a.flatten(), pose.t_b_from_a])).all()
        )


# ---------------------------------------------------------------- from relative to absolute


def test_query_in_world_undoes_the_relative_pose():
    generator = seeded(80)
    R_query, R_a = rotation_from_vector(normal(2, 3, generator=generator))
    c_query, c_a = normal(2, 3, generator=generator)
    found, direction = query_in_world(R_a, R_query.T @ R_a, unit(R_query.T @ (c_a - c_query)))
    assert torch.allclose(found, R_query)
    assert torch.allclose(c_a + (c_query - c_a).norm() * direction, c_query)
