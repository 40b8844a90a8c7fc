"""How well a hypothesis explains a query: evidence from every index image, weighed so that aliases show.

A corridor of equal tiles offers each wrong pose plenty of inliers. What tells the true place apart is that its index
images match a little better than those of its aliases. So every query keypoint brings its best mutual match in every
index image, without ratio test, each worth less the less alike it is than the keypoint's best; a hypothesis gets from
a keypoint the worth of the best match it explains. Taking the best, not the sum, is what keeps a place that many index
images show from winning by their number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from localization.cameras import rays
from localization.matching import Matches, View, world_rays
from localization.triangulation import Points

# A match is worth 1/e of the keypoint's best when its similarity is that much lower.
SIMILARITY_SCALE = 0.015
# A rough pose is scored with one threshold for all; a polished one with each match's own noise, within these bounds.
SAMPSON_PX = 2.0
NOISE_PX = (0.75, 3.0)
# A match's keypoints must turn and grow as the two cameras say, up to so much.
TURN_COSINE, GROWTH = 0.7, 0.6
# Hypothesis x match pairs scored at once.
_SCORE_CHUNK = 1 << 16


@dataclass(frozen=True)
class Evidence:
    """All m matches of one query with its index images, in flat arrays.

    keypoint (m,): the query's; view (m,): the index image; other (m,): that image's keypoint; similarity, ratio (m,);
    weight (m,): its worth, 1 for a keypoint's best match; xy_norm (m, 2): normalized coordinates in the
    query; index_px (m, 2): pixels in the index image;
    point (m, 3) and has_point (m,): the index keypoint's 3D point. For the epipolar score, relative to `origin` (3,):
    ray_world (m, 3) of the index keypoint, its camera's center (m, 3), axes (m, 2, 3): camera x and y over f_x, f_y.
    For the keypoints' looks: noise_px (m,), half their mean scale; tangent_world (m, 3), the index keypoint's
    orientation as a direction in the world; direction (m, 2), the query keypoint's; growth (m,), log of query scale
    over index scale, each as an angle.
    """

    keypoint: Tensor
    view: Tensor
    other: Tensor
    similarity: Tensor
    ratio: Tensor
    weight: Tensor
    xy_norm: Tensor
    index_px: Tensor
    point: Tensor
    has_point: Tensor
    origin: Tensor
    ray_world: Tensor
    center: Tensor
    axes: Tensor
    noise_px: Tensor
    tangent_world: Tensor
    direction: Tensor
    growth: Tensor
    focal_px: float

    def __len__(self) -> int:
        return len(self.keypoint)


def gather_evidence(
    query: View, views: list[View], points: list[Points], matches: dict[int, Matches]
) -> Evidence:
    """The evidence of a query's matches with index images (keys of `matches`; empty matches are fine)."""
    numbers = list(matches)
    device = query.features.xy_px.device
    keypoint = torch.cat([matches[i].a for i in numbers])
    similarity = torch.cat([matches[i].similarity for i in numbers])
    origin = torch.stack([views[i].c_world for i in numbers]).mean(0)
    scale_q = query.features.scale_px[keypoint]
    scale_i = torch.cat([views[i].features.scale_px[matches[i].b] for i in numbers])
    size_i = torch.cat([views[i].features.scale_px[matches[i].b] / views[i].camera.fx for i in numbers])
    turn_i = [unit_vectors(views[i].features.angle_rad[matches[i].b]) for i in numbers]
    focal = [torch.tensor([[1 / views[i].camera.fx], [1 / views[i].camera.fy]], device=device) for i in numbers]
    return Evidence(
        keypoint=keypoint,
        view=torch.cat([torch.full_like(matches[i].a, i) for i in numbers]),
        other=torch.cat([matches[i].b for i in numbers]),
        similarity=similarity,
        ratio=torch.cat([matches[i].ratio for i in numbers]),
        weight=match_worth(keypoint, similarity, len(query.features.xy_px)),
        xy_norm=rays(query.camera, query.features.xy_px)[keypoint, :2],
        index_px=torch.cat([views[i].features.xy_px[matches[i].b] for i in numbers]).double(),
        point=torch.cat([points[i].position[matches[i].b] for i in numbers]),
        has_point=torch.cat([points[i].valid[matches[i].b] for i in numbers]),
        origin=origin,
        ray_world=torch.cat([world_rays(views[i], views[i].features.xy_px[matches[i].b]) for i in numbers]),
        center=torch.cat([(views[i].c_world - origin).expand(len(matches[i]), 3) for i in numbers]),
        axes=torch.cat(
            [(views[i].R_world_from_cam.T[:2] * f).expand(len(matches[i]), 2, 3) for i, f in zip(numbers, focal)]
        ),
        noise_px=(scale_q + scale_i) / 4,
        tangent_world=torch.cat([turn.double() @ views[i].R_world_from_cam[:, :2].T for i, turn in zip(numbers, turn_i)]),
        direction=unit_vectors(query.features.angle_rad[keypoint]),
        growth=(scale_q / query.camera.fx).clamp_min(1e-9).log() - size_i.clamp_min(1e-9).log(),
        focal_px=(query.camera.fx + query.camera.fy) / 2,
    )


def unit_vectors(angle_rad: Tensor) -> Tensor:
    """(cos, sin) (..., 2) of angles (...)."""
    return torch.stack([angle_rad.cos(), angle_rad.sin()], dim=-1)


def match_worth(keypoint: Tensor, similarity: Tensor, count: int) -> Tensor:
    """exp((similarity - best) / SIMILARITY_SCALE) (m,), best being the most alike match of the same keypoint."""
    top = torch.full((count,), -2.0, dtype=similarity.dtype, device=similarity.device)
    top = top.scatter_reduce(0, keypoint, similarity, "amax")
    return ((similarity - top[keypoint]) / SIMILARITY_SCALE).exp()


def epipolar_scores(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor, *, polished: bool = False
) -> Tensor:
    """How much of the query h hypotheses explain, (h,): the sum over keypoints of the best match's gain.

    R_cam_from_world (h, 3, 3), c_world (h, 3). The gain of a match is worth * max(0, 1 - error^2 / limit^2)^2, error
    being Sampson's and limit SAMPSON_PX or, for poses as exact as the matches, the match's noise. It falls to nothing
    where keypoints do not turn or grow as the cameras say and where the rays do not meet in front of both.
    """
    m = len(evidence)
    if m == 0:
        return torch.zeros(len(c_world), dtype=torch.float64, device=c_world.device)
    step = max(1, _SCORE_CHUNK // m)
    keypoints, keypoint = torch.unique(evidence.keypoint, return_inverse=True)
    parts = [torch.zeros(0, device=c_world.device)]
    for start in range(0, len(c_world), step):
        rows = slice(start, start + step)
        gains = epipolar_gains(evidence, R_cam_from_world[rows], c_world[rows], polished=polished)
        best = gains.new_zeros(len(gains), len(keypoints))
        parts.append(best.scatter_reduce_(1, keypoint.expand_as(gains), gains, "amax").sum(1))
    return torch.cat(parts).double()


def epipolar_gains(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor, *, polished: bool = False
) -> Tensor:
    """The gains (h, m) of every match under h hypotheses (h, 3, 3), (h, 3): see `epipolar_scores`."""
    error, worth = epipolar_errors(evidence, R_cam_from_world, c_world)
    limit = evidence.noise_px.clamp(*NOISE_PX) if polished else SAMPSON_PX
    return worth * (1 - (error / limit).square()).clamp_min(0).square()


def epipolar_errors(evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor) -> tuple[Tensor, Tensor]:
    """Signed Sampson errors in pixels and worths (h, m), the latter zero for matches that cannot be.

    With d the rays in world axes and b the baseline from index to query camera the epipolar residual is
    d_q . (b x d_i); its gradients in the two images are the x, y components of R_q (b x d_i) and of R_i (d_q x b).
    Evaluated in float32 about the middle of the index cameras.
    """
    R, c = R_cam_from_world.float(), (c_world - evidence.origin).float()
    xy = evidence.xy_norm.float()
    ray_q, ray_i = torch.cat([xy, torch.ones_like(xy[:, :1])], dim=1), evidence.ray_world.float()
    world_q = ray_q @ R  # (h, m, 3): R^T applied to each ray
    baseline = c[:, None] - evidence.center.float()  # (h, m, 3)
    normal_i = torch.linalg.cross(baseline, ray_i.expand_as(baseline))
    normal_q = torch.linalg.cross(world_q, baseline)
    residual = (world_q * normal_i).sum(-1)
    in_query = torch.einsum("hij,hmj->hmi", R[:, :2], normal_i) / evidence.focal_px
    in_index = torch.einsum("mij,hmj->hmi", evidence.axes.float(), normal_q)
    gradient2 = in_query.square().sum(-1) + in_index.square().sum(-1)
    # Both rays' parameters at their nearest points, up to a positive factor.
    cosine = (world_q * ray_i).sum(-1)
    length2 = world_q.square().sum(-1)
    along_q, along_i = (world_q * baseline).sum(-1), (ray_i * baseline).sum(-1)
    depth_i, depth_q = along_i * length2 - cosine * along_q, cosine * along_i - along_q
    front = (depth_i > 0) & (depth_q > 0)
    looks = _turned_alike(evidence, R, xy) * _grown_alike(evidence, depth_i, depth_q * length2.sqrt())
    return residual * gradient2.clamp_min(1e-20).rsqrt(), evidence.weight.float() * front * looks


def _turned_alike(evidence: Evidence, R: Tensor, xy: Tensor) -> Tensor:
    """1 where the index keypoint's orientation, carried into the query by the rotation, is the query's; (h, m)."""
    tangent = torch.einsum("hij,mj->hmi", R, evidence.tangent_world.float())
    direction = tangent[..., :2] - xy * tangent[..., 2:]
    cosine = (direction * evidence.direction).sum(-1) / direction.norm(dim=-1).clamp_min(1e-12)
    return ((cosine - TURN_COSINE) / (1 - TURN_COSINE)).clamp_min(0)


def _grown_alike(evidence: Evidence, distance_i: Tensor, distance_q: Tensor) -> Tensor:
    """1 where the ratio of the keypoints' scales is the inverse ratio of distances (h, m), up to one factor."""
    expected = (distance_i.clamp_min(1e-12) / distance_q.clamp_min(1e-12)).log()
    return (1 - ((evidence.growth - expected) / GROWTH).square()).clamp_min(0)
