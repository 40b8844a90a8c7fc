"""Keypoints and local descriptors: SIFT (Lowe, IJCV 2004) and RootSIFT, in batched torch.

The stages are those of the paper: a Gaussian pyramid that starts with the doubled image, extrema of
the difference of Gaussians refined by a quadratic, up to two orientations, a 4x4x8 histogram of
gradients. Pixels follow the project's convention: the center of the top-left pixel is (0, 0), x to
the right, y down; the image is doubled so that pixel x lands exactly on 2x, hence no half-pixel
shift. Everything runs on the CPU and is the same from run to run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = 3  # layers of an octave in which keypoints are sought
SIGMA_FIRST = 1.6  # nominal blur of an octave's first layer, in its own pixels
# Blur applied to the doubled image. Lowe's is 1.25, for he takes a camera's image to have a blur of
# 0.5 px already. More of it finds and repeats finer structure: on image pairs of five scenes,
# rendered and real, right matches were 1.2 to 2.2 times as many and their share rose as well.
FIRST_BLUR = 1.8
BORDER = 5  # octave pixels along the edge where no keypoint is sought
MIN_SIDE = 24  # an octave smaller than this is not built; must exceed the widest kernel's radius
TILE = 32  # rows or columns blurred in one matrix product
BAND = 64  # rows in which extrema are sought at once: they stay in a core's cache
MAX_MOVES = 5  # steps to a neighboring sample while an extremum is refined
# Samples from which an extremum moves on. At Lowe's 0.5 one halfway between two samples goes to and
# fro and is lost: with 0.6 (as VLFeat) repeatability rises from 0.68 to 0.74, right matches by 8 %.
MAX_OFFSET = 0.6

ORIENTATION_BINS = 36
ORIENTATION_SIGMA = 1.5  # weight of the orientation window, in keypoint scales
ORIENTATION_SPACING = 0.5  # distance of its samples, in keypoint scales
ORIENTATION_PEAK = 0.8  # a second orientation is kept at this share of the first

CELLS = 4  # cells along a side of the descriptor
CELL_WIDTH = 3.0  # in keypoint scales
CELL_SAMPLES = 4  # gradient samples along a side of a cell
CELL_BINS = 8  # orientations in a cell
CLIP = 0.2  # of the L2 norm, for an entry of the descriptor

MAX_SIDE = 1024  # pixels of the longer side at which keypoints are sought, unless told

CHUNK_KEYPOINTS = 256  # keypoints whose gradient patches are in memory together (about 8 MB)


@dataclass(frozen=True)
class Features:
    """The n keypoints of an image, strongest first.

    xy_px: (n, 2) float32, centers in pixels.
    scale_px: (n,) float32, standard deviation of the Gaussian at which the keypoint was found, in
        pixels of the image (OpenCV's `size` is twice that).
    angle_rad: (n,) float32 in [0, 2 pi), orientation from the x axis towards the y axis, thus
        clockwise on the screen (as OpenCV's `angle`).
    response: (n,) float32, |D| at the refined extremum for intensities in 0..1.
    descriptors: (n, 128) float32, RootSIFT with L2 norm 1, ordered by row, column, orientation.
    """

    xy_px: Tensor
    scale_px: Tensor
    angle_rad: Tensor
    response: Tensor
    descriptors: Tensor

    def __len__(self) -> int:
        return len(self.xy_px)

    def select(self, keep: Tensor | slice) -> "Features":
        """The keypoints that a mask, an index tensor or a slice picks."""
        return Features(*(v[keep] for v in vars(self).values()))


class _Keypoints(NamedTuple):
    """Keypoints on their way through the stages, in the pixels of their octave; each (n,)."""

    octave: Tensor  # int64, 0 is the doubled image
    layer: Tensor  # int64, 0..SCALES-1: which gradient field is nearest in scale
    x: Tensor
    y: Tensor
    sigma: Tensor
    response: Tensor

    def take(self, index: Tensor) -> "_Keypoints":
        return _Keypoints(*(values[index] for values in self))


@torch.no_grad()
def extract_features(
    grey: Tensor,
    *,
    max_keypoints: int = 2000,
    contrast: float = 0.005,
    edge_ratio: float = 20.0,
    max_side: int = MAX_SIDE,
) -> Features:
    """SIFT keypoints with RootSIFT descriptors.

    grey: (H, W) float tensor, intensities in 0..1.
    max_keypoints: rows returned at most, those of largest response; a keypoint with two
        orientations is two rows.
    contrast: a keypoint needs |D| * SCALES >= contrast (OpenCV's contrastThreshold).
    edge_ratio: largest ratio of the principal curvatures of D (OpenCV's edgeThreshold).
    max_side: an image whose longer side has more pixels is shrunk to that first, which bounds time
        and memory; positions and scales are in pixels of the image as given all the same.
    A flat or tiny image has no keypoints, which is a valid answer.
    Raises ValueError if grey is no two-dimensional float tensor.
    """
    if grey.ndim != 2 or not grey.is_floating_point():
        raise ValueError(
            f"the image is a {tuple(grey.shape)} tensor of {grey.dtype}; "
            "give one gray channel (H, W) as floats in 0..1"
        )
    given, grey = grey, _shrunk(grey.float(), max_side)
    fields, found = [], []
    base = _doubled(grey)
    while min(base.shape) >= MIN_SIDE:
        layers = _gaussian_layers(base)
        found.append(_detect(layers[1:] - layers[:-1], len(fields), contrast, edge_ratio))
        fields.append([_gradient(layer) for layer in layers[1 : SCALES + 1]])
        base = layers[SCALES, ::2, ::2]
    if not found:
        return _no_features()

    keypoints = _strongest(_Keypoints(*map(torch.cat, zip(*found))), max_keypoints)
    angles = _per_layer(_orientations, fields, keypoints, keypoints.sigma.new_zeros(0, 2))
    row, rank = torch.nonzero(~angles.isnan(), as_tuple=True)
    keypoints, angle = keypoints.take(row[:max_keypoints]), angles[row, rank][:max_keypoints]
    descriptors = _per_layer(
        _descriptors, fields, keypoints, angle.new_zeros(0, CELLS * CELLS * CELL_BINS), angle
    )
    zoom = 0.5 * 2.0**keypoints.octave
    xy_px = torch.stack([keypoints.x, keypoints.y], 1) * zoom[:, None]
    shrink = torch.tensor(grey.shape[::-1]) / torch.tensor(given.shape[::-1])
    return Features(
        xy_px=xy_px / shrink + (1 / shrink - 1) / 2,  # (x' + 0.5) / s - 0.5
        scale_px=keypoints.sigma * zoom / shrink.prod().sqrt(),
        angle_rad=angle,
        response=keypoints.response,
        descriptors=descriptors,
    )


def _no_features() -> Features:
    none = torch.zeros(0)
    return Features(
        none.reshape(0, 2), none, none, none, none.reshape(0, CELLS * CELLS * CELL_BINS)
    )


# ---------------------------------------------------------------------------------------------
# Scale space


def _shrunk(grey: Tensor, max_side: int) -> Tensor:
    """An (H, W) image with at most max_side pixels on its longer side: each the mean of those it
    covers.
    """
    scale = max_side / max(grey.shape)
    if scale >= 1:
        return grey
    size = [max(1, round(side * scale)) for side in grey.shape]
    return F.interpolate(grey[None, None], size, mode="bilinear", antialias=True)[0, 0]


def _doubled(grey: Tensor) -> Tensor:
    """(H, W) -> (2H - 1, 2W - 1), the first octave's first layer; pixel x lands exactly on 2x."""
    height, width = grey.shape
    doubled = F.interpolate(
        grey[None, None],
        size=(2 * height - 1, 2 * width - 1),
        mode="bilinear",
        align_corners=True,
    )[0, 0]
    if min(doubled.shape) < MIN_SIDE:
        return doubled
    blurred = torch.empty_like(doubled)
    _blur(doubled, [FIRST_BLUR], blurred[None])
    return blurred


def _gaussian_layers(base: Tensor) -> Tensor:
    """(H, W) -> (SCALES + 3, H, W), blurred to SIGMA_FIRST * 2^(i / SCALES)."""
    layers = base.new_empty(SCALES + 3, *base.shape)
    layers[0] = base
    growth = [2 ** (i / SCALES) for i in range(1, SCALES + 3)]
    _blur(base, [SIGMA_FIRST * math.sqrt(g * g - 1) for g in growth], layers[1:])
    return layers


def _blur(image: Tensor, sigmas: list[float], out: Tensor) -> None:
    """Gaussian blurs of an (H, W) image whose sides exceed 4 sigma, mirrored at the edges, into out
    (sigmas, H, W).

    Products with banded matrices, a tile of rows, then of columns, at a time: for one channel on a
    CPU several times faster than shifted sums, and 20 times faster than conv2d.
    """
    count, height, width = out.shape
    radius = math.ceil(4 * max(sigmas))
    bands = torch.stack([_band(sigma, radius) for sigma in sigmas])  # (sigmas, TILE, TILE + 2 r)
    padded = F.pad(image[None, None], (radius,) * 4, mode="reflect")[0, 0]
    padded = F.pad(padded, (0, -width % TILE, 0, -height % TILE))
    for top in range(0, height, TILE):
        rows = bands.flatten(0, 1) @ padded[top : top + TILE + 2 * radius]
        windows = rows.unflatten(0, (count, TILE)).unfold(2, TILE + 2 * radius, TILE)
        blurred = torch.bmm(windows.flatten(1, 2), bands.transpose(1, 2)).unflatten(1, (TILE, -1))
        out[:, top : top + TILE] = blurred.flatten(2)[:, : height - top, :width]


def _band(sigma: float, radius: int) -> Tensor:
    """(TILE, TILE + 2 radius): the Gaussian of unit sum in each row, one column further each time;
    zero beyond 4 sigma, where it would be a slow, denormal number.
    """
    offset = torch.arange(TILE + 2 * radius) - radius - torch.arange(TILE)[:, None]
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2) * (offset.abs() <= 4 * sigma)
    return (weight / weight.sum(1, keepdim=True)).float()


def _gradient(layer: Tensor) -> Tensor:
    """(H, W) -> (2, H, W): central differences in x and y, zero on the outermost pixels."""
    field = layer.new_zeros(2, *layer.shape)
    field[0, 1:-1, 1:-1] = layer[1:-1, 2:] - layer[1:-1, :-2]
    field[1, 1:-1, 1:-1] = layer[2:, 1:-1] - layer[:-2, 1:-1]
    return field


# ---------------------------------------------------------------------------------------------
# Keypoints


def _detect(dog: Tensor, octave: int, contrast: float, edge_ratio: float) -> _Keypoints:
    """Refined extrema of a (SCALES + 2, H, W) difference of Gaussians (Lowe 2004, sections 3-4)."""
    position = _refine(dog, _extrema(dog, 0.5 * contrast / SCALES))
    offset, value, hessian = _quadratic_fit(dog, position)
    trace = hessian[:, 1, 1] + hessian[:, 2, 2]
    determinant = hessian[:, 1, 1] * hessian[:, 2, 2] - hessian[:, 1, 2] ** 2
    keep = (
        (offset.abs() <= MAX_OFFSET).all(1)
        & (value.abs() * SCALES >= contrast)
        & (determinant > 0)
        & (trace**2 * edge_ratio < (edge_ratio + 1) ** 2 * determinant)
    )
    position, offset, value = position[keep], offset[keep], value[keep]
    scale, y, x = (position + offset).unbind(1)
    return _Keypoints(
        octave=torch.full_like(position[:, 0], octave),
        layer=position[:, 0] - 1,
        x=x.float(),
        y=y.float(),
        sigma=(SIGMA_FIRST * 2 ** (scale / SCALES)).float(),
        response=value.abs().float(),
    )


def _extrema(dog: Tensor, threshold: float) -> Tensor:
    """Positions (n, 3) int64 (layer, y, x) of samples beyond threshold whose size no neighbor of
    the 26 exceeds.
    """
    found = []
    for top in range(BORDER, dog.shape[1] - BORDER, BAND):
        bottom = min(top + BAND, dog.shape[1] - BORDER)
        region = dog[:, top - 1 : bottom + 1, BORDER - 1 : dog.shape[2] - BORDER + 1].abs()
        center, largest = region[1:-1, 1:-1, 1:-1], region
        for dim in range(3):
            size = largest.shape[dim] - 2
            first, second, third = (largest.narrow(dim, i, size) for i in range(3))
            largest = torch.maximum(torch.maximum(first, second), third)
        found.append(torch.nonzero((center > threshold) & (center >= largest)))
        found[-1] += torch.tensor([1, top, BORDER])
    return torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.long)


def _refine(dog: Tensor, position: Tensor) -> Tensor:
    """Moves each position (n, 3) until it is within MAX_OFFSET of the quadratic's extremum.

    Those that leave the volume are dropped, those that arrive at one sample become one, in the
    order of their positions. One that has not settled after MAX_MOVES is returned as it is.
    """
    low = torch.tensor([1, BORDER, BORDER])
    high = torch.tensor(dog.shape) - 1 - low
    limit = max(dog.shape)  # moves farther than this leave the volume anyway, and may not be finite
    settled = []
    for _ in range(MAX_MOVES):
        offset, _, _ = _quadratic_fit(dog, position)
        step = torch.where(offset.abs() > MAX_OFFSET, offset.clamp(-limit, limit), 0).round().long()
        still = (step == 0).all(1)
        settled.append(position[still])
        position = (position + step)[~still]
        position = position[((position >= low) & (position <= high)).all(1)]
    return torch.unique(torch.cat([*settled, position]), dim=0)


def _quadratic_fit(dog: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quadratic through the 3x3x3 neighborhood of each position (n, 3) (Brown & Lowe 2002).

    Returns the offset of its extremum (n, 3) in (layer, y, x), the value there (n,) and the Hessian
    (n, 3, 3), all float64. A singular Hessian gives a very large offset.
    """
    _, height, width = dog.shape
    shift = torch.arange(-1, 2)
    around = (shift[:, None, None] * height + shift[:, None]) * width + shift
    index = (position[:, 0] * height + position[:, 1]) * width + position[:, 2]
    cube = dog.flatten()[index[:, None, None, None] + around].double()

    center = cube[:, 1, 1, 1]
    gradient, hessian = cube.new_zeros(len(cube), 3), cube.new_zeros(len(cube), 3, 3)
    for i in range(3):
        ahead, behind = (_neighbor(cube, {i: sign}) for sign in (1, -1))
        gradient[:, i] = 0.5 * (ahead - behind)
        hessian[:, i, i] = ahead - 2 * center + behind
        for j in range(i):
            same = _neighbor(cube, {i: 1, j: 1}) + _neighbor(cube, {i: -1, j: -1})
            mixed = _neighbor(cube, {i: 1, j: -1}) + _neighbor(cube, {i: -1, j: 1})
            hessian[:, i, j] = hessian[:, j, i] = 0.25 * (same - mixed)

    # Rows of the adjugate are cross products of the (symmetric) Hessian's rows; unlike
    # linalg.solve this has no trouble with one singular matrix in the batch.
    a, b, c = hessian.unbind(1)
    adjugate = torch.stack([b.cross(c, dim=1), c.cross(a, dim=1), a.cross(b, dim=1)], 1)
    determinant = (a * adjugate[:, 0]).sum(1)
    tiny = torch.finfo(determinant.dtype).tiny
    determinant = torch.where(determinant.abs() < tiny, tiny, determinant)
    offset = -(adjugate @ gradient[:, :, None])[:, :, 0] / determinant[:, None]
    return offset, center + 0.5 * (gradient * offset).sum(1), hessian


def _neighbor(cube: Tensor, shifts: dict[int, int]) -> Tensor:
    """(n,) samples of (n, 3, 3, 3) neighborhoods, `shifts` (axis -> -1 or 1) from the center."""
    return cube[(slice(None), *(1 + shifts.get(axis, 0) for axis in range(3)))]


def _strongest(keypoints: _Keypoints, count: int) -> _Keypoints:
    order = torch.sort(keypoints.response, descending=True, stable=True).indices
    return keypoints.take(order[:count])


# ---------------------------------------------------------------------------------------------
# Orientations and descriptors


def _per_layer(
    function: Callable[..., Tensor],
    fields: list[list[Tensor]],
    keypoints: _Keypoints,
    empty: Tensor,
    *extra: Tensor,
) -> Tensor:
    """Applies `function(field, keypoints, *extra)` to the keypoints of each layer, in chunks.

    Returns the rows in the order of the keypoints; `empty` (0, d) has the shape of no row.
    """
    out = empty.new_zeros(len(keypoints.x), empty.shape[1])
    for octave, layers in enumerate(fields):
        for layer, field in enumerate(layers):
            here = (keypoints.octave == octave) & (keypoints.layer == layer)
            for index in torch.nonzero(here)[:, 0].split(CHUNK_KEYPOINTS):
                out[index] = function(field, keypoints.take(index), *(e[index] for e in extra))
    return out


def _orientations(field: Tensor, keypoints: _Keypoints) -> Tensor:
    """(n, 2) angles in [0, 2 pi) of the highest peaks of each gradient histogram; NaN for none."""
    radius = 3 * ORIENTATION_SIGMA
    steps = int(radius / ORIENTATION_SPACING)
    line = ORIENTATION_SPACING * torch.arange(-steps, steps + 1)
    grid = torch.cartesian_prod(line, line)
    grid = grid[grid.norm(dim=1) <= radius]
    weight = torch.exp(-0.5 * (grid.norm(dim=1) / ORIENTATION_SIGMA) ** 2)

    gx, gy = _sample(field, keypoints, grid)
    below, above, shares = _shares(
        weight * torch.hypot(gx, gy), torch.atan2(gy, gx), ORIENTATION_BINS
    )
    histogram = gx.new_zeros(len(gx), ORIENTATION_BINS)
    histogram.scatter_add_(1, below, shares[0]).scatter_add_(1, above, shares[1])
    smooth = sum(
        share / 16 * histogram.roll(shift, 1) for shift, share in zip(range(-2, 3), (1, 4, 6, 4, 1))
    )

    before, after = smooth.roll(1, 1), smooth.roll(-1, 1)
    peak = (smooth > before) & (smooth > after)
    peak &= smooth >= ORIENTATION_PEAK * smooth.amax(1, keepdim=True)
    height, highest = torch.where(peak, smooth, -1.0).topk(2, dim=1)
    left, middle, right = (values.gather(1, highest) for values in (before, smooth, after))
    offset = 0.5 * (left - right) / (left - 2 * middle + right)
    angle = (highest + offset) * (2 * math.pi / ORIENTATION_BINS)
    return torch.where(height > 0, angle.remainder(2 * math.pi), math.nan)


def _descriptors(field: Tensor, keypoints: _Keypoints, angle: Tensor) -> Tensor:
    """(n, 128) RootSIFT descriptors (Lowe 2004, section 6; Arandjelovic & Zisserman, CVPR 2012).

    The patch is sampled on a grid that turns and scales with the keypoint, so that a sample's
    shares of the cells are the same for all and the spatial histogram is one matrix product.
    """
    samples = (CELLS + 1) * CELL_SAMPLES
    line = (torch.arange(samples) + 0.5) / CELL_SAMPLES - 0.5 * (CELLS + 1)
    cell = torch.arange(CELLS) - 0.5 * (CELLS - 1)
    share = (1 - (line - cell[:, None]).abs()).clamp(min=0)  # (cells, samples)
    share = share * torch.exp(-0.5 * (line / (0.5 * CELLS)) ** 2)
    shares = torch.kron(share, share)  # (rows * columns, samples * samples), row-major

    y, x = torch.cartesian_prod(line, line).unbind(1)
    gx, gy = _sample(field, keypoints, CELL_WIDTH * torch.stack([x, y], 1), angle)
    # The minus sign: orientations count counterclockwise on the screen, as everybody's SIFT does.
    below, above, votes = _shares(torch.hypot(gx, gy), -torch.atan2(gy, gx), CELL_BINS)
    by_bin = gx.new_zeros(*gx.shape, CELL_BINS)
    by_bin.scatter_(2, below[..., None], votes[0][..., None])
    by_bin.scatter_(2, above[..., None], votes[1][..., None])
    histogram = (shares @ by_bin).flatten(1)
    histogram = F.normalize(histogram, dim=1).clamp(max=CLIP)
    return F.normalize(histogram, p=1.0, dim=1).sqrt()


def _sample(
    field: Tensor, keypoints: _Keypoints, grid: Tensor, angle: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients around each keypoint, in its own frame: two (n, p) tensors.

    grid: (p, 2) points (x, y) in keypoint scales; with `angle` (n,) the frame is turned by it.
    Beyond the image the gradient is zero.
    """
    angle = torch.zeros_like(keypoints.x) if angle is None else angle
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    u, v = grid[:, 0], grid[:, 1]
    x = keypoints.x[:, None] + keypoints.sigma[:, None] * (cos * u - sin * v)
    y = keypoints.y[:, None] + keypoints.sigma[:, None] * (sin * u + cos * v)
    height, width = field.shape[1:]
    points = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], 2)
    gx, gy = F.grid_sample(field[None], points[None], align_corners=True)[0]
    return cos * gx + sin * gy, cos * gy - sin * gx


def _shares(
    magnitude: Tensor, angle: Tensor, bins: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of (n, p) gradients the two orientations beside each, and what of its magnitude either gets."""
    place = angle * (bins / (2 * math.pi))
    below = place.floor()
    upper_share = magnitude * (place - below)
    below = below.long().remainder(bins)
    return below, (below + 1).remainder(bins), (magnitude - upper_share, upper_share)
