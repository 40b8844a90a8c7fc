"""How well a hypothesis explains a query: evidence from every index image, weighed so that aliases
show.

A corridor of equal tiles offers each wrong pose plenty of inliers. What tells the true place apart
is that its index images match a little better than those of its aliases. So every query keypoint
brings its best mutual match in every index image, without ratio test, each of less weight the less
alike it is than the keypoint's best; a hypothesis gets from a keypoint the weight of the best match
it explains. Taking the best, not the sum, is what keeps a place that many index images show from
winning by their number.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localization.absolute_pose import rotation_from_vector
from localization.cameras import Camera, project, rays
from localization.matching import Matches, View, best_of
from localization.triangulation import Points

# A match has 1/e of the weight of the keypoint's best when its similarity is that much lower.
SIMILARITY_SCALE = 0.015
# Ratios of matches that may move a pose: those with a point, which other images confirm, and others.
POINT_RATIO, SINGLE_RATIO = 0.97, 0.8
# A rough pose is scored with one threshold for all; a polished one with each match's own noise,
# within these bounds.
SAMPSON_PX = 2.0
NOISE_PX = (0.75, 3.0)
# A point seen farther from its keypoint contradicts a pose, however near the epipolar line is: the
# lines of two aliases always meet somewhere. Where things repeat some points are wrong themselves.
CONTRADICTION_PX, AGREEING_SHARE = 16.0, 0.75
# A point counts for poses that see it from within 75 degrees of where its index image does.
MIN_COSINE = 0.25
# Hypothesis x match pairs scored at once.
_SCORE_CHUNK = 1 << 16
# Differences for derivatives: in radians, and in shares of the distance of what is seen.
_DELTA = 3e-4


@dataclass(frozen=True)
class Evidence:
    """All m matches of one query, taken with `camera`, with its index images, in flat arrays.

    keypoint (m,): the query's; view (m,): the index image; similarity, ratio (m,); weight (m,): 1
    for a keypoint's best match; xy_px (m, 2): pixels in the query; index_px (m, 2): pixels in the
    index image; point (m, 3) and has_point (m,): the index keypoint's 3D point; noise_px (m,): half
    the two keypoints' mean scale. For the epipolar score, relative to `origin` (3,): ray_world (m,
    3) of the index keypoint (z = 1 in its camera), its camera's center (m, 3), axes (m, 2, 3):
    camera x and y over f_x, f_y.
    """

    camera: Camera
    keypoint: Tensor
    view: Tensor
    similarity: Tensor
    ratio: Tensor
    weight: Tensor
    xy_px: Tensor
    index_px: Tensor
    point: Tensor
    has_point: Tensor
    noise_px: Tensor
    origin: Tensor
    ray_world: Tensor
    center: Tensor
    axes: Tensor

    def __len__(self) -> int:
        return len(self.keypoint)

    @property
    def focal_px(self) -> float:
        """The query camera's mean focal length."""
        return (self.camera.fx + self.camera.fy) / 2

    @property
    def xy_norm(self) -> Tensor:
        """Normalized coordinates (m, 2) in the query."""
        return rays(self.camera, self.xy_px)[:, :2]

    def distinct(self) -> Tensor:
        """Which matches (m,) may move a pose: of those that no point confirms the distinct ones."""
        return self.ratio <= torch.where(self.has_point, POINT_RATIO, SINGLE_RATIO)

    def select(self, rows: Tensor) -> "Evidence":
        """The matches that a mask or an index tensor picks."""
        one = ("camera", "origin")
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if k not in one})

    def seen_with(self, camera: Camera) -> "Evidence":
        """The same matches, the query taken with another camera."""
        return replace(self, camera=camera)


def gather_evidence(
    query: View, views: list[View], points: list[Points], matches: dict[int, Matches]
) -> Evidence:
    """The evidence of a query's matches with index images (keys of `matches`; empty matches are
    fine).
    """
    numbers = list(matches)
    keypoint = torch.cat([matches[i].a for i in numbers])
    similarity = torch.cat([matches[i].similarity for i in numbers])
    origin = torch.stack([views[i].c_world for i in numbers]).mean(0)
    scale_i = torch.cat([views[i].features.scale_px[matches[i].b] for i in numbers])
    index_px = {i: views[i].features.xy_px[matches[i].b] for i in numbers}
    axes = {}
    for i in numbers:
        focal = torch.tensor([[views[i].camera.fx], [views[i].camera.fy]], dtype=torch.float64)
        axes[i] = (views[i].R_world_from_cam.T[:2] / focal).expand(len(matches[i]), 2, 3)
    return Evidence(
        camera=query.camera,
        keypoint=keypoint,
        view=torch.cat([torch.full_like(matches[i].a, i) for i in numbers]),
        similarity=similarity,
        ratio=torch.cat([matches[i].ratio for i in numbers]),
        weight=match_weight(keypoint, similarity, len(query.features.xy_px)),
        xy_px=query.features.xy_px[keypoint].double(),
        index_px=torch.cat(list(index_px.values())).double(),
        point=torch.cat([points[i].position[matches[i].b] for i in numbers]),
        has_point=torch.cat([points[i].valid[matches[i].b] for i in numbers]),
        noise_px=(query.features.scale_px[keypoint] + scale_i) / 4,
        origin=origin,
        ray_world=torch.cat(
            [rays(views[i].camera, index_px[i]) @ views[i].R_world_from_cam.T for i in numbers]
        ),
        center=torch.cat([(views[i].c_world - origin).expand(len(matches[i]), 3) for i in numbers]),
        axes=torch.cat(list(axes.values())),
    )


def match_weight(keypoint: Tensor, similarity: Tensor, count: int) -> Tensor:
    """exp((similarity - best) / SIMILARITY_SCALE) (m,), best being the most alike match of the same
    keypoint.
    """
    top = best_of(similarity, keypoint, count)
    return ((similarity - top[keypoint]) / SIMILARITY_SCALE).exp()


def epipolar_scores(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor, *, polished: bool = False
) -> Tensor:
    """How much of the query h hypotheses explain, (h,): the sum over keypoints of the best match's
    gain.

    R_cam_from_world (h, 3, 3), c_world (h, 3). The gain of a match is weight * max(0, 1 - error^2 /
    limit^2)^2, error being Sampson's and limit SAMPSON_PX or, for poses as exact as the matches,
    the match's noise. It is nothing where the rays do not meet in front of both cameras, or under
    more than 75 degrees. The score of such poses is at most what their matches' points do not
    contradict, over AGREEING_SHARE.
    """
    m = len(evidence)
    if m == 0:
        return torch.zeros(len(c_world), dtype=torch.float64)
    step = max(1, _SCORE_CHUNK // m)
    keypoints, keypoint = torch.unique(evidence.keypoint, return_inverse=True)
    parts = [torch.zeros(0)]
    for start in range(0, len(c_world), step):
        rows = slice(start, start + step)
        of_poses = evidence, R_cam_from_world[rows], c_world[rows]
        gains = epipolar_gains(*of_poses, polished=polished)
        score = _sum_of_best(gains, keypoint, len(keypoints))
        if polished:
            agreed = _sum_of_best(gains * _agreeing(*of_poses), keypoint, len(keypoints))
            score = score.minimum(agreed / AGREEING_SHARE)
        parts.append(score)
    return torch.cat(parts).double()


def _sum_of_best(gains: Tensor, keypoint: Tensor, count: int) -> Tensor:
    """(h,): each of `count` keypoints' best of the gains (h, m) of its matches, summed; keypoint (m,)."""
    best = gains.new_zeros(len(gains), count)
    return best.scatter_reduce_(1, keypoint.expand_as(gains), gains, "amax").sum(1)


def epipolar_gains(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor, *, polished: bool = False
) -> Tensor:
    """The gains (h, m) of every match under h hypotheses (h, 3, 3), (h, 3): see `epipolar_scores`."""
    error, weight = epipolar_errors(evidence, R_cam_from_world, c_world)
    limit = evidence.noise_px.clamp(*NOISE_PX) if polished else SAMPSON_PX
    return weight * (1 - (error / limit).square()).clamp_min(0).square()


def epipolar_errors(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor
) -> tuple[Tensor, Tensor]:
    """Signed Sampson errors in pixels and weights (h, m), the latter zero for matches that cannot
    be.

    With d the rays (z = 1) in world axes and b the baseline from index to query camera the epipolar
    residual is d_q . (b x d_i); its gradients in the two images are the x, y components of R_q (b x
    d_i) and of R_i (d_q x b). Evaluated in float32 about the middle of the index cameras.
    """
    R, c = R_cam_from_world.float(), (c_world - evidence.origin).float()
    ray_q, ray_i = rays(evidence.camera, evidence.xy_px).float(), evidence.ray_world.float()
    world_q = ray_q @ R  # (h, m, 3): R^T applied to each ray
    baseline = c[:, None] - evidence.center.float()  # (h, m, 3)
    normal_i = torch.linalg.cross(baseline, ray_i.expand_as(baseline))
    normal_q = torch.linalg.cross(world_q, baseline)
    residual = (world_q * normal_i).sum(-1)
    in_query = torch.einsum("hij,hmj->hmi", R[:, :2], normal_i) / evidence.focal_px
    in_index = torch.einsum("mij,hmj->hmi", evidence.axes.float(), normal_q)
    gradient2 = in_query.square().sum(-1) + in_index.square().sum(-1)
    # Both rays' parameters at their nearest points, up to a positive factor.
    product = (world_q * ray_i).sum(-1)
    length2_q, length2_i = ray_q.square().sum(-1), ray_i.square().sum(-1)
    along_q, along_i = (world_q * baseline).sum(-1), (ray_i * baseline).sum(-1)
    front = (along_i * length2_q > product * along_q) & (product * along_i > along_q * length2_i)
    possible = front & (product >= MIN_COSINE * (length2_q * length2_i).sqrt())
    return residual * gradient2.clamp_min(1e-20).rsqrt(), evidence.weight.float() * possible


def match_errors(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor
) -> tuple[Tensor, Tensor]:
    """Errors (h, 2, m) in pixels and weights (h, m), the latter zero for matches that cannot be.

    A match that has a point errs by the point's reprojection in x and y, another across its epipolar
    line only.
    """
    error, weight = epipolar_errors(evidence, R_cam_from_world, c_world)
    error, weight = error.double(), weight.double()
    beside = torch.stack([error, torch.zeros_like(error)], dim=1)
    off, front = _off_points(evidence, R_cam_from_world, c_world)
    possible = torch.where(evidence.has_point, evidence.weight * front, weight)
    return torch.where(evidence.has_point, off, beside), possible


def _agreeing(evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor) -> Tensor:
    """Which matches (h, m) have no point that contradicts h poses."""
    off, front = _off_points(evidence, R_cam_from_world, c_world)
    return ~evidence.has_point | (front & (off.norm(dim=1) <= CONTRADICTION_PX))


def _off_points(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor
) -> tuple[Tensor, Tensor]:
    """How far from the keypoints (h, 2, m) in pixels the matches' points are seen, and whether in front (h, m)."""
    local = R_cam_from_world @ (evidence.point - c_world[:, None]).transpose(1, 2)
    off = project(evidence.camera, local.transpose(1, 2)) - evidence.xy_px
    return off.transpose(1, 2), local[:, 2] > 0


def match_slopes(
    evidence: Evidence, R_cam_from_world: Tensor, c_world: Tensor, distance_m: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`match_errors` and weights of h poses, and the errors' derivatives (h, 6, 2, m) by a rotation
    vector in camera axes and the center; distance_m: about how far away things are.
    """
    step = R_cam_from_world.new_full((6,), _DELTA)
    step[3:] *= distance_m
    moves = torch.cat([step.new_zeros(1, 6), torch.diag(step)])
    R = rotation_from_vector(moves[:, :3]) @ R_cam_from_world[:, None]
    c = c_world[:, None] + moves[:, 3:]
    error, weight = match_errors(evidence, R.flatten(0, 1), c.flatten(0, 1))
    error, weight = (value.unflatten(0, R.shape[:2]) for value in (error, weight))
    return error[:, 0], weight[:, 0], (error[:, 1:] - error[:, :1]) / step[:, None, None]
