"""RandAugment (Cubuk et al. 2020) as torchvision has it, drawn from a generator of one's own.

torchvision's draws from the global state of PyTorch, which the threads that read images share.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

BINS = 31  # of magnitudes
SHIFT = 150 / 331  # of the image's side


def _affine(
    image: Image.Image,
    slope: tuple[float, float] = (0.0, 0.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> Image.Image:
    return tvf.affine(
        image,
        angle=0.0,
        translate=[int(share * side) for share, side in zip(shift, image.size)],
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in slope],
        interpolation=InterpolationMode.BILINEAR,
        center=[0, 0] if any(slope) else None,
    )


Operation = Callable[[Image.Image, float], Image.Image]
# Operations that go both ways, and their strength at the last magnitude.
BOTH_WAYS: tuple[tuple[Operation, float], ...] = (
    (lambda image, m: _affine(image, slope=(m, 0)), 0.3),
    (lambda image, m: _affine(image, slope=(0, m)), 0.3),
    (lambda image, m: _affine(image, shift=(m, 0)), SHIFT),
    (lambda image, m: _affine(image, shift=(0, m)), SHIFT),
    (lambda image, m: tvf.rotate(image, m, InterpolationMode.BILINEAR), 30),
    (lambda image, m: tvf.adjust_brightness(image, 1 + m), 0.9),
    (lambda image, m: tvf.adjust_saturation(image, 1 + m), 0.9),
    (lambda image, m: tvf.adjust_contrast(image, 1 + m), 0.9),
    (lambda image, m: tvf.adjust_sharpness(image, 1 + m), 0.9),
)
# Of a magnitude in 0..1.
ONE_WAY: tuple[Operation, ...] = (
    lambda image, m: image,
    lambda image, m: tvf.posterize(image, 8 - round(4 * m)),
    lambda image, m: tvf.solarize(image, 255 * (1 - m)),
    lambda image, m: tvf.autocontrast(image),
    lambda image, m: tvf.equalize(image),
)


def rand_augment(
    image: Image.Image, rng: np.random.Generator, count: int = 3, magnitude: int = 9
) -> Image.Image:
    """`count` random operations one after the other, each of this magnitude of BINS. image: RGB."""
    share = magnitude / (BINS - 1)
    for number in rng.integers(len(BOTH_WAYS) + len(ONE_WAY), size=count):
        if number < len(BOTH_WAYS):
            operation, most = BOTH_WAYS[number]
            image = operation(image, most * share * (1 - 2 * rng.integers(2)))
        else:
            image = ONE_WAY[number - len(BOTH_WAYS)](image, share)
    return image
