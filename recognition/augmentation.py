"""Augmentation of a batch of images on its device, each image with a draw of its own.

Color and night work on (B, 3, H, W) with values 0..1; crop, perspective, rotation are one homography
that is sampled once. What is drawn comes from a generator, so that a run can be taken up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from model import IMAGENET_MEAN, IMAGENET_STD

LUMA = (0.299, 0.587, 0.114)
# RGB -> Y, I, Q of NTSC: hue is the angle of (I, Q).
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
NIGHT_LAMPS = 5
SKY_GAP = 0.08  # of the width
SKY_STEP = 0.03  # largest change of its brightness from a row to the next, after a blur of 5 pixels
BLUR_SIGMA_PX = 1.5
ERASED = (0.02, 0.2)  # share of the image's area

Draw = Callable[[float, float], Tensor]  # (B, 1, 1, 1) numbers between two bounds


@dataclass(frozen=True)
class Augmentation:
    """What is done to images. Strengths as in torchvision; 0 leaves it out.

    brightness, contrast, saturation: factors between 1 - x and 1 + x; hue: turns up to x of a circle.
    perspective: distortion, of every second image. crop: down to 1 - x of the area. rotation: up to
    x degrees. erasing, blur, night: shares of the images. chosen: whether each image has each of the
    first six with probability 1/2 only.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    perspective: float = 0.0
    crop: float = 0.0
    rotation: float = 0.0
    erasing: float = 0.0
    blur: float = 0.0
    night: float = 0.0
    chosen: bool = False

    def __bool__(self) -> bool:
        """Whether anything is done at all."""
        return any(value for name, value in vars(self).items() if name != "chosen")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images (B, 3, H, W) in 0..1 -> the same shape."""

        def draw(low: float, high: float) -> Tensor:
            numbers = torch.rand(len(images), 1, 1, 1, generator=generator)
            return (low + (high - low) * numbers).to(images.device)

        def some(share: float) -> Tensor:
            return draw(0, 1) < share

        every = 0.5 if self.chosen else 1.0
        x = self._color(images, draw, lambda: some(every))
        if self.perspective or self.crop or self.rotation:
            x = warp(x, self._homographies(images, draw, lambda: some(every)))
        if self.blur:
            x = torch.where(some(self.blur), gaussian_blur(x, [7, 7], [BLUR_SIGMA_PX] * 2), x)
        if self.night:
            x = torch.where(some(self.night), night(x, draw, generator), x)
        if self.erasing:
            x = torch.where(some(self.erasing) & _rectangle(x, draw), x.mean((2, 3), True), x)
        return x

    def _color(self, x: Tensor, draw: Draw, chosen: Callable[[], Tensor]) -> Tensor:
        def factor(strength: float) -> Tensor:
            return torch.where(chosen(), draw(max(0.0, 1 - strength), 1 + strength), 1.0)

        if self.brightness:
            x = (x * factor(self.brightness)).clamp(0, 1)
        if self.contrast:
            x = blend(x, gray(x).mean((2, 3), True), factor(self.contrast))
        if self.saturation:
            x = blend(x, gray(x), factor(self.saturation))
        if self.hue:
            x = turn_hue(x, torch.where(chosen(), draw(-self.hue, self.hue), 0.0))
        return x

    def _homographies(self, x: Tensor, draw: Draw, chosen: Callable[[], Tensor]) -> Tensor:
        """For each image (B, 3, 3): where in it (-1..1) a pixel of the result (-1..1) is from."""
        b, aspect = len(x), x.shape[3] / x.shape[2]
        every = torch.eye(3, device=x.device).repeat(b, 1, 1)
        if self.rotation:
            angle = torch.where(chosen(), draw(-self.rotation, self.rotation), 0.0)
            cos, sin = (f(torch.deg2rad(angle)).flatten() for f in (torch.cos, torch.sin))
            turn = every.clone()
            turn[:, 0, 0], turn[:, 0, 1] = cos, -sin / aspect
            turn[:, 1, 0], turn[:, 1, 1] = sin * aspect, cos
            every = every @ turn
        if self.crop:
            area = torch.where(chosen(), draw(1 - self.crop, 1), 1.0).flatten()
            ratio = torch.exp(
                draw(math.log(3 / 4), math.log(4 / 3))
            ).flatten()  # beside the own one
            size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
            shift = torch.stack([draw(-1, 1).flatten(), draw(-1, 1).flatten()], 1) * (1 - size)
            cut = torch.diag_embed(F.pad(size, (0, 1), value=1.0))
            cut[:, :2, 2] = shift
            every = every @ cut
        if self.perspective:
            inward = torch.stack([draw(0, self.perspective).flatten() for _ in range(8)], 1)
            inward = torch.where((draw(0, 1) < 0.5).view(b, 1) & chosen().view(b, 1), inward, 0.0)
            corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], device=x.device)
            every = every @ homography(
                corners.expand(b, 4, 2) * (1 - inward.view(b, 4, 2)), corners
            )
        return every


# Each image with its own choice among what a night photograph lacks.
SMART = Augmentation(
    brightness=0.5, contrast=0.4, saturation=0.5, hue=0.05, perspective=0.3, crop=0.3,
    erasing=0.3, blur=0.3, chosen=True,
)  # fmt: skip


def augment_normalized(
    images: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """An augmentation of images as the network wants them."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (augmentation(images * std + mean, generator) - mean) / std


def gray(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor of x and 1 - factor of the other, in 0..1."""
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def turn_hue(x: Tensor, share: Tensor) -> Tensor:
    """Turn the hue by `share` (B, 1, 1, 1) of the circle, at the same luma."""
    to_yiq = x.new_tensor(YIQ)
    cos, sin = (f(2 * math.pi * share.flatten()) for f in (torch.cos, torch.sin))
    turn = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return (matrix @ x.flatten(2)).view_as(x).clamp(0, 1)


def homography(source: Tensor, target: Tensor) -> Tensor:
    """(B, 3, 3) that takes `target` (4, 2) to `source` (B, 4, 2): eight linear equations."""
    b = len(source)
    p = F.pad(target.expand(b, 4, 2), (0, 1), value=1.0)  # (B, 4, 3)
    zero = torch.zeros_like(p)
    rows_x = torch.cat([p, zero, -source[..., :1] * p[..., :2]], 2)
    rows_y = torch.cat([zero, p, -source[..., 1:] * p[..., :2]], 2)
    equations = torch.cat([rows_x, rows_y], 1)
    right = torch.cat([source[..., 0], source[..., 1]], 1)
    solution = torch.linalg.solve(equations, right)
    return F.pad(solution, (0, 1), value=1.0).view(b, 3, 3)


def warp(x: Tensor, from_result: Tensor) -> Tensor:
    """Sample images at where the homographies (B, 3, 3) take the result's pixels; borders reflect."""
    b, _, h, w = x.shape
    grid = F.affine_grid(torch.eye(2, 3, device=x.device)[None], [1, 1, h, w], align_corners=False)
    at = F.pad(grid.view(1, -1, 2), (0, 1), value=1.0) @ from_result.transpose(1, 2)
    at = (at[..., :2] / at[..., 2:].clamp(min=1e-6)).view(b, h, w, 2)
    return F.grid_sample(x, at, padding_mode="reflection", align_corners=False)


def night(x: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """Images as if by night: a dark sky, less light, more of it below, less color, lamps and noise.

    The sky keeps 0.05 … 0.3 of its light. Gamma 1 … 1.8; the light falls to 0.4 … 1 times as much at the
    top; then a mean of 0.06 … 0.25, contrast 0.7 … 1.1, saturation 0.3 … 1, red 0.9 … 1.15, blue
    0.75 … 1.1, up to NIGHT_LAMPS lamps (Gaussians of 1 … 5 % of the width), noise sigma 0.01 … 0.05
    times the root of the intensity.
    """
    h, w = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in (h, w))
    x = x.clamp(0, 1)
    x = x * (1 - sky(x) * draw(0.7, 0.95))
    x = x.pow(draw(1.0, 1.8)) * (1 - draw(0, 0.6) * (1 - rows / h)[:, None])
    x = (x * draw(0.06, 0.25) / x.mean((1, 2, 3), True).clamp(min=0.01)).clamp(0, 1)
    x = blend(x, x.mean((1, 2, 3), True), draw(0.7, 1.1))
    x = blend(x, gray(x), draw(0.3, 1.0))
    x = x * torch.cat([draw(0.9, 1.15), torch.ones_like(x[:, :1, :1, :1]), draw(0.75, 1.1)], 1)
    count = draw(0, NIGHT_LAMPS + 1).floor()
    warm = x.new_tensor([1.0, 0.8, 0.5])[:, None, None]
    for number in range(NIGHT_LAMPS):
        across, down, radius = draw(0, w), draw(0, h), draw(0.01, 0.05) * w
        square = (columns - across).square() + (rows[:, None] - down).square()
        lamp = torch.exp(-square / (2 * radius.square())) * draw(0.3, 1.0)
        x = x + (number < count) * lamp * warm
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + noise * draw(0.01, 0.05) * (x + 0.02).sqrt()).clamp(0, 1)


def sky(x: Tensor) -> Tensor:
    """Share of sky (B, 1, H, W), guessed: from the top down to the first edge of each column.

    Only where the top is brighter than the image is on average; gaps narrower than SKY_GAP are none.
    """
    h, w = x.shape[2:]
    light = F.avg_pool2d(gray(x), 5, 1, 2, count_include_pad=False)
    step = F.pad(light.diff(dim=2).abs(), (0, 0, 1, 0))
    smooth = (step < SKY_STEP) & (light[:, :, :1] > light.mean((2, 3), True))
    height = smooth.to(x.dtype).cumprod(dim=2).sum(dim=2)  # (B, 1, W)
    across = 2 * round(SKY_GAP * w / 2) + 1
    for sign in (-1, 1):  # what is high over a few columns only is lowered: an opening
        height = sign * F.max_pool1d(sign * height, across, 1, across // 2)
    height = height + 2 * (height > 0)  # the blur shows an edge two rows early
    below = torch.arange(h, device=x.device)[:, None] < height[:, :, None]
    return F.avg_pool2d(below.to(x.dtype), 5, 1, 2, count_include_pad=False)


def _rectangle(x: Tensor, draw: Draw) -> Tensor:
    """A mask (B, 1, H, W) of one rectangle an image, of ERASED of its area."""
    h, w = x.shape[2:]
    area, ratio = draw(*ERASED), torch.exp(draw(math.log(0.3), math.log(3.3)))
    high, wide = (area * ratio).sqrt().clamp(max=1) * h, (area / ratio).sqrt().clamp(max=1) * w
    top, left = draw(0, 1) * (h - high), draw(0, 1) * (w - wide)
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    inside_rows = (row >= top) & (row < top + high)
    return inside_rows & (column >= left) & (column < left + wide)
