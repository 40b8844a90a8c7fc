"""Augmentation: closed forms, each image its own draw, nothing where nothing is asked for."""

import pytest
import torch
from torchvision.transforms import functional as tvf

from recognition.augmentation import (
    SMART,
    Augmentation,
    augment_normalized,
    blend,
    gray,
    homography,
    night,
    sky,
    turn_hue,
    warp,
)


def images(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 5, 7, generator=generator)
    return torch.nn.functional.interpolate(small, (40, 60), mode="bicubic").clamp(0, 1)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "name", ["brightness", "contrast", "saturation", "hue", "perspective", "crop", "rotation",
             "erasing", "blur", "night"],
)  # fmt: skip
def test_each_image_has_its_own_draw_that_a_seed_repeats(name):
    strength = 20.0 if name == "rotation" else 1.0 if name in ("erasing", "blur", "night") else 0.5
    augmentation, x = Augmentation(**{name: strength}), images(1).repeat(8, 1, 1, 1)
    found = augmentation(x, seeded())
    assert found.shape == x.shape and 0 <= found.min() and found.max() <= 1
    assert torch.equal(found, augmentation(x, seeded()))
    assert not torch.equal(found, augmentation(x, seeded(2))) or name == "blur"
    changed = (found - x).abs().amax((1, 2, 3)) > 1e-4
    assert changed.sum() >= 2
    if name != "blur":
        assert (found[1:] - found[:1]).abs().amax() > 1e-3


def test_nothing_is_done_where_nothing_is_asked_for():
    x = images()
    assert not Augmentation() and not Augmentation(chosen=True) and SMART
    assert torch.equal(Augmentation()(x, seeded()), x)
    normalized = torch.randn(2, 3, 8, 8).clamp(-1, 1)
    same = augment_normalized(normalized, Augmentation(), seeded())
    assert torch.allclose(same, normalized, atol=1e-6)


def test_smart_leaves_some_images_alone_and_differs_between_images():
    x = images(1).repeat(200, 1, 1, 1)
    color = Augmentation(brightness=0.5, chosen=True)(x, seeded())
    kept = ((color - x).abs().amax((1, 2, 3)) < 1e-6).float().mean()
    assert 0.4 < kept < 0.6
    assert SMART(x[:8], seeded()).isfinite().all()


def test_colors_are_those_of_torchvision():
    x = images()
    half = torch.full((4, 1, 1, 1), 0.4)
    assert torch.allclose(blend(x, gray(x), half), tvf.adjust_saturation(x, 0.4), atol=1e-3)
    mean = gray(x).mean((2, 3), True)
    assert torch.allclose(blend(x, mean, half), tvf.adjust_contrast(x, 0.4), atol=1e-3)
    turned = turn_hue(0.4 + 0.2 * x, torch.full((4, 1, 1, 1), 0.3))
    assert torch.allclose(gray(turned), gray(0.4 + 0.2 * x), atol=2e-3)
    assert torch.allclose(
        turn_hue(turned, torch.full((4, 1, 1, 1), -0.3)), 0.4 + 0.2 * x, atol=2e-3
    )


def test_a_homography_takes_corners_to_corners():
    target = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    source = target + 0.3 * torch.rand(2, 4, 2, generator=seeded())
    h = homography(source, target)
    points = torch.cat([target, torch.ones(4, 1)], 1) @ h.transpose(1, 2)
    assert torch.allclose(points[..., :2] / points[..., 2:], source, atol=1e-5)


def test_a_quarter_turn_and_a_crop_are_exact():
    x = torch.arange(9.0).view(1, 1, 3, 3).repeat(1, 3, 1, 1)
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    found = warp(x, turn)[0, 0]
    assert torch.allclose(found, torch.rot90(x[0, 0], 1)) or torch.allclose(
        found, torch.rot90(x[0, 0], -1)
    )
    same = warp(x, torch.eye(3)[None])
    assert torch.allclose(same, x, atol=1e-5)


def test_night_is_darker_and_noisy_and_has_lamps():
    x = images(64) * 0.5 + 0.5
    generator = seeded()

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(64, 1, 1, 1, generator=generator)

    found = night(x, draw, generator)
    assert 0.05 < found.mean() < 0.3 < 0.5 * x.mean() and found.median() < 0.3
    lit = (found.amax((1, 2, 3)) > 0.75).float().mean()
    assert 0.2 < lit < 1.0


def test_the_sky_turns_darker_than_the_houses():
    """A smooth bright sky above houses with windows; by night it is the other way round."""
    x = torch.full((8, 3, 60, 80), 0.7) + torch.linspace(-0.1, 0.1, 60)[:, None]
    houses = torch.zeros(60, 80, dtype=torch.bool)
    houses[30:, :50] = houses[45:, 50:] = True
    checks = (torch.arange(60)[:, None] // 4 + torch.arange(80) // 4) % 2
    x = torch.where(houses, 0.25 + 0.2 * checks, x)
    share = sky(x)[0, 0]
    inside = torch.zeros_like(houses)  # of the sky, away from its edge
    inside[:24] = inside[:40, 58:] = True
    assert share[inside].min() > 0.9 and share[34:, :44].max() < 0.1
    assert sky(x.flip(2))[..., :20, :].max() == 0  # a dark top is none
    generator = seeded()

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(8, 1, 1, 1, generator=generator)

    by_night = gray(night(x, draw, generator))[:, 0]
    darker = by_night[:, inside].median(1).values < by_night[:, houses].median(1).values
    assert darker.float().mean() > 0.8 and x[0, 0][inside].median() > x[0, 0][houses].median()
