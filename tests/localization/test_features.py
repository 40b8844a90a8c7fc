"""SIFT against OpenCV's on one image and under known homographies, and against closed forms."""

import math

import cv2
import numpy as np
import pytest
import torch

import localization.features as features_module
from localization.features import Features, extract_features

CONTRAST, EDGE_RATIO = 0.01, 15.0


def textured_image(width: int, height: int, seed: int) -> np.ndarray:
    """(H, W) float32 in 0..1: random shapes and letters over smooth noise, slightly blurred."""
    rng = np.random.default_rng(seed)
    zoom = 3
    size = (height * zoom, width * zoom)
    image = np.full(size, 0.5, np.float32)
    for step, strength in ((96, 0.25), (24, 0.08), (9, 0.06), (4, 0.05)):
        noise = rng.normal(0, strength, (size[0] // step + 2, size[1] // step + 2))
        image += cv2.resize(noise.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    canvas = as_bytes(image.clip(0, 1))
    for _ in range(width * height // 1200):
        center = rng.uniform((0, 0), size[::-1])
        value = int(rng.integers(256))
        corners = center + rng.normal(0, rng.uniform(10, 70), (rng.integers(3, 6), 2))
        cv2.fillPoly(canvas, [corners.astype(np.int32)], value, cv2.LINE_AA)
        at = tuple(rng.integers((0, 0), size[::-1]).tolist())
        font = cv2.FONT_HERSHEY_SIMPLEX, float(rng.uniform(0.6, 3))
        cv2.putText(canvas, chr(rng.integers(65, 91)), at, *font, 255 - value, 4)
        axes = tuple(rng.integers(4, 40, 2).tolist())
        cv2.ellipse(canvas, at, axes, rng.uniform(0, 180), 0, 360, 255 - value, 3, cv2.LINE_AA)
    image = cv2.GaussianBlur(canvas / np.float32(255), (0, 0), 0.5 * zoom)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.clip(image + rng.normal(0, 0.006, image.shape), 0, 1).astype(np.float32)


def as_bytes(image: np.ndarray) -> np.ndarray:
    return np.round(255 * image).astype(np.uint8)


def ours(image: np.ndarray, **settings) -> Features:
    settings = {"contrast": CONTRAST, "edge_ratio": EDGE_RATIO, **settings}
    return extract_features(torch.from_numpy(as_bytes(image)).float() / 255, **settings)


def opencv(image: np.ndarray, max_keypoints: int = 2000) -> Features:
    """OpenCV's SIFT in this project's terms; its precise upscaling avoids the half-pixel shift."""
    sift = cv2.SIFT_create(
        max_keypoints, 3, CONTRAST, EDGE_RATIO, 1.6, cv2.CV_32F, enable_precise_upscale=True
    )
    keypoints, descriptors = sift.detectAndCompute(as_bytes(image), None)
    roots = np.sqrt(descriptors / descriptors.sum(1, keepdims=True))
    return Features(
        xy_px=torch.tensor([k.pt for k in keypoints]),
        scale_px=torch.tensor([k.size / 2 for k in keypoints]),
        angle_rad=torch.tensor([math.radians(k.angle) for k in keypoints]),
        response=torch.tensor([k.response for k in keypoints]),
        descriptors=torch.from_numpy(roots),
    )


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, 2), (m, 2) -> (n, m); in float32 cdist is off by 0.05 px."""
    return torch.cdist(a.double(), b.double())


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - b + math.pi).remainder(2 * math.pi) - math.pi).abs()


@pytest.mark.parametrize("size", [(320, 240), (150, 260)])
def test_keypoints_coincide_with_opencv(size, monkeypatch):
    # OpenCV's settings; the other tests run with the project's own.
    monkeypatch.setattr(features_module, "FIRST_BLUR", math.sqrt(1.6**2 - 1.0**2))
    monkeypatch.setattr(features_module, "MAX_OFFSET", 0.5)
    image = textured_image(*size, seed=1)
    mine, theirs = ours(image), opencv(image)
    assert len(mine) > 200
    distance = distances(mine.xy_px, theirs.xy_px)
    assert (distance.amin(1) < 1).float().mean() > 0.95
    assert (distance.amin(0) < 1).float().mean() > 0.95

    # The same keypoint and orientation: close in place, scale and angle.
    pair = distance < 0.5
    pair &= (mine.scale_px[:, None] / theirs.scale_px).log().abs() < 0.1
    pair &= angle_between(mine.angle_rad[:, None], theirs.angle_rad) < 0.2
    i, j = torch.nonzero(pair, as_tuple=True)
    assert len(i) > 0.85 * len(mine)
    shift = (mine.xy_px[i] - theirs.xy_px[j]).abs()
    assert (mine.xy_px[i] - theirs.xy_px[j]).median(0).values.abs().max() < 0.005
    assert shift.median() < 0.005
    assert (mine.scale_px[i] / theirs.scale_px[j] - 1).abs().median() < 0.005
    assert angle_between(mine.angle_rad[i], theirs.angle_rad[j]).median() < math.radians(2)
    assert (mine.response[i] / theirs.response[j] - 1).abs().median() < 0.01
    similarity = (mine.descriptors[i] * theirs.descriptors[j]).sum(1)
    assert similarity.median() > 0.996


def warped(image: np.ndarray, homography: np.ndarray, seed: int) -> np.ndarray:
    size = image.shape[::-1]
    border = cv2.BORDER_REFLECT
    out = cv2.warpPerspective(image, homography, size, flags=cv2.INTER_CUBIC, borderMode=border)
    noise = np.random.default_rng(seed).normal(0, 0.006, out.shape)
    return np.clip(0.9 * out + 0.03 + noise, 0, 1).astype(np.float32)


def homography(size: tuple[int, int], degrees: float, zoom: float, tilt: float) -> np.ndarray:
    to_center = np.eye(3)
    to_center[:2, 2] = [-(size[0] - 1) / 2, -(size[1] - 1) / 2]
    turn = np.eye(3)
    turn[:2] = cv2.getRotationMatrix2D((0, 0), degrees, zoom)
    turn[2, :2] = [tilt, -0.5 * tilt]
    return np.linalg.inv(to_center) @ turn @ to_center


def transfer(matrix: np.ndarray, xy_px: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cv2.perspectiveTransform(xy_px.numpy()[None], matrix)[0])


def scores(first: Features, second: Features, matrix: np.ndarray, size: tuple[int, int]):
    """Repeatability and matching score over the keypoints in common view, median error in px."""
    limit = torch.tensor(size) - 1.0
    there = transfer(matrix, first.xy_px)
    back = transfer(np.linalg.inv(matrix), second.xy_px)
    seen = ((there >= 0) & (there <= limit)).all(1)
    seen_back = ((back >= 0) & (back <= limit)).all(1)
    common = min(int(seen.sum()), int(seen_back.sum()))
    repeated = (distances(there[seen], second.xy_px[seen_back]).amin(1) < 1.5).sum().item()

    similarity = first.descriptors @ second.descriptors.T
    best, j = similarity.topk(2, dim=1)
    distance = (2 - 2 * best).clamp(min=0).sqrt()
    mutual = similarity.argmax(0)[j[:, 0]] == torch.arange(len(j))
    kept = mutual & (distance[:, 0] < 0.8 * distance[:, 1])
    error = (there[kept] - second.xy_px[j[kept, 0]]).norm(dim=1)
    right = error < 3
    return repeated / common, int(right.sum()) / common, error[right].median().item()


def test_repeats_and_matches_as_well_as_opencv_under_homographies():
    size = (320, 240)
    mine, theirs = [], []
    for seed, change in enumerate(
        [(8, 1.0, 4e-4), (35, 1.2, 0.0), (-120, 0.85, 2e-4), (90, 0.7, -3e-4)]
    ):
        image = textured_image(*size, seed=10 + seed)
        matrix = homography(size, *change)
        other = warped(image, matrix, seed)
        mine.append(scores(ours(image), ours(other), matrix, size))
        theirs.append(scores(opencv(image), opencv(other), matrix, size))
    repeatability, matching, error_px = np.mean(mine, 0)
    their_repeatability, their_matching, their_error_px = np.mean(theirs, 0)
    assert repeatability > 0.98 * their_repeatability
    assert matching > 0.98 * their_matching
    assert error_px < 1.02 * their_error_px


def test_gaussian_blobs_are_found_where_they_are():
    """A blob exp(-r^2 / 2 b^2) is an extremum of the difference of Gaussians at its center.

    Layers nominally sigma and k sigma are blurred by sigma^2 - c and k^2 sigma^2 - c, where -c is
    the variance of linear interpolation, 1/8, and what FIRST_BLUR, in half pixels, exceeds 1.6 by.
    There D is prop. to 1 / (b^2 + sigma^2 - c) - 1 / (b^2 + k^2 sigma^2 - c), which is extremal at
    sigma^2 = (b^2 - c) / k.
    """
    c = -1 / 8 - (features_module.FIRST_BLUR**2 - 1.6**2) / 4
    x = torch.tensor([40.0, 110.25, 180.6, 44.3, 115.5, 185.1])
    y = torch.tensor([40.0, 45.5, 40.9, 120.75, 115.5, 122.4])
    centers = torch.stack([x, y], 1)
    blob = torch.tensor([1.3, 1.6, 2.5, 3.0, 5.0, 6.0])
    y, x = torch.meshgrid(torch.arange(170.0), torch.arange(230.0), indexing="ij")
    squared = (x - centers[:, :1, None]) ** 2 + (y - centers[:, 1:, None]) ** 2
    sign = torch.tensor([1, -1, 1, -1, 1, -1])[:, None, None]
    image = 0.5 + 0.4 * (sign * torch.exp(-0.5 * squared / blob[:, None, None] ** 2)).sum(0)

    features = extract_features(image, contrast=0.05)
    distance, nearest = distances(centers, features.xy_px).min(1)
    assert distance.max() < 0.06
    expected = ((blob**2 - c) / 2 ** (1 / 3)).sqrt()
    assert (features.scale_px[nearest] / expected - 1).abs().max() < 0.015


def test_quarter_turn_turns_keypoints_and_keeps_descriptors():
    # Sides 32 k + 1 keep every octave's sampling grid symmetric, so that the turn is exact.
    image = torch.from_numpy(textured_image(161, 129, seed=3))
    upright = extract_features(image)
    turned = extract_features(image.rot90(-1))  # clockwise: (x, y) -> (H - 1 - y, x)
    assert len(upright) == len(turned) > 300
    expected = torch.stack([128 - upright.xy_px[:, 1], upright.xy_px[:, 0]], 1)
    same = distances(expected, turned.xy_px) < 0.01
    same &= angle_between(upright.angle_rad[:, None] + math.pi / 2, turned.angle_rad) < 0.01
    i, j = torch.nonzero(same, as_tuple=True)
    assert len(set(i.tolist())) > 0.98 * len(upright)
    similarity = (upright.descriptors[i] * turned.descriptors[j]).sum(1)
    assert similarity.quantile(0.02) > 0.999


def test_cropping_leaves_what_lies_inside_as_it_was():
    image = torch.from_numpy(textured_image(320, 240, seed=8))
    whole, cropped = (
        extract_features(image, max_keypoints=10_000),
        extract_features(image[64:, 64:]),
    )
    # Far enough from the cut for the descriptor's patch and the blur of their layer.
    inside = (whole.xy_px - 64).amin(1) > 18 * whole.scale_px
    assert inside.sum() > 300
    distance = distances(whole.xy_px[inside] - 64, cropped.xy_px)
    distance += angle_between(whole.angle_rad[inside][:, None], cropped.angle_rad)
    distance, nearest = distance.min(1)
    assert distance.max() < 0.001
    similarity = (whole.descriptors[inside] * cropped.descriptors[nearest]).sum(1)
    assert similarity.min() > 0.99999


def test_orientation_is_the_direction_of_the_gradient_with_y_down():
    """A dark dot on a ramp: its ring of gradients cancels, the ramp's direction remains."""
    y, x = torch.meshgrid(torch.arange(81.0), torch.arange(81.0), indexing="ij")
    for degrees in (0.0, 30.0, 137.0, 290.0):
        along = math.cos(math.radians(degrees)) * x + math.sin(math.radians(degrees)) * y
        dot = torch.exp(-((x - 40) ** 2 + (y - 40) ** 2) / (2 * 2.0**2))
        features = extract_features((0.5 + 0.008 * (along - along.mean()) - 0.05 * dot).float())
        center = (features.xy_px - 40).norm(dim=1).argmin()
        error = angle_between(features.angle_rad[center], torch.tensor(math.radians(degrees)))
        assert error < math.radians(3)


def test_descriptors_are_clipped_root_sift():
    features = ours(textured_image(200, 200, seed=4))
    histogram = features.descriptors.square()
    assert features.descriptors.shape == (len(features), 128)
    assert torch.allclose(histogram.sum(1), torch.ones(len(features)), atol=1e-5)
    # Clipped at 0.2 of the L2 norm, the largest entries of most descriptors are equal.
    first, second = histogram.topk(2, dim=1).values.T
    assert (first - second < 1e-6).float().mean() > 0.5


def test_limit_keeps_the_strongest_and_runs_repeat():
    image = textured_image(200, 160, seed=5)
    everything, again, few = ours(image), ours(image), ours(image, max_keypoints=50)
    assert (everything.response.diff() <= 0).all()
    for name in ("xy_px", "scale_px", "angle_rad", "response", "descriptors"):
        assert torch.equal(getattr(everything, name), getattr(again, name))
        assert torch.allclose(getattr(everything, name)[:50], getattr(few, name), atol=1e-5)


def test_at_most_two_orientations_a_keypoint():
    features = ours(textured_image(320, 240, seed=6))
    places = torch.cat([features.xy_px, features.scale_px[:, None]], 1)
    _, place, counts = places.unique(dim=0, return_inverse=True, return_counts=True)
    assert counts.max() == 2
    assert 0.05 < (counts == 2).float().mean() < 0.5
    rows = torch.stack([place, features.angle_rad], 1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_contrast_and_edge_ratio_thin_out_keypoints():
    image = textured_image(200, 160, seed=7)
    loose = ours(image)
    firm = ours(image, contrast=0.04)
    assert 0 < len(firm) < len(loose)
    assert (3 * firm.response >= 0.04).all()
    assert len(firm) == (3 * loose.response >= 0.04).sum()
    assert len(ours(image, edge_ratio=3.0)) < 0.9 * len(loose)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 200), (16, 16), (17, 33), (90, 41)])
def test_flat_and_tiny_images_give_valid_features(shape):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for image in (torch.full(shape, 0.7), noise):
        features = extract_features(image)
        assert features.xy_px.shape == (len(features), 2)
        assert features.descriptors.shape == (len(features), 128)
        assert features.descriptors.isfinite().all() and features.xy_px.isfinite().all()
        assert (features.xy_px >= 0).all()
        assert (features.xy_px <= torch.tensor(shape[::-1]) - 1).all()
    assert len(extract_features(torch.full(shape, 0.7))) == 0
    if min(shape) >= 40:
        assert len(extract_features(noise)) > 0


@pytest.mark.parametrize("image", [torch.zeros(3, 20, 20), torch.zeros(20, 20, dtype=torch.uint8)])
def test_anything_but_a_float_image_is_refused(image):
    with pytest.raises(ValueError, match="one gray channel"):
        extract_features(image)


def test_a_large_image_is_searched_at_a_bounded_size_and_answered_in_its_own_pixels():
    """Blobs drawn at known places of a large image: found there, though sought in a third of it."""
    rng = np.random.default_rng(3)
    places = np.array([(x, y) for x in range(150, 1700, 200) for y in range(150, 1200, 200)]) + rng.uniform(-30, 30, (48, 2))
    y, x = np.mgrid[0:1350, 0:1803].astype(np.float32)
    image = np.full(x.shape, 0.5, np.float32)
    for px, py in places:
        image += 0.4 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 12.0**2))
    found = extract_features(torch.from_numpy(image), max_side=600)
    distance = np.linalg.norm(found.xy_px.numpy()[None] - places[:, None], axis=2)
    nearest = found.scale_px[distance.argmin(axis=1)]
    assert np.median(distance.min(axis=1)) < 0.5  # of its own pixels, three to one of the search
    assert np.median(nearest) == pytest.approx(12, rel=0.15)  # a blob of sigma s is found at s
    small = extract_features(torch.from_numpy(image[:400, :600].copy()))
    bounded = extract_features(torch.from_numpy(image[:400, :600].copy()), max_side=600)
    assert torch.equal(small.xy_px, bounded.xy_px)
