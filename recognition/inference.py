"""From images to descriptors and rankings at test: methods for queries, scales, PCA, search in blocks.

Definitions: deep-visual-geo-localization-benchmark (Berton et al., CVPR 2022), test.py.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset, Subset

from eval import compute_embeddings, load_image, normalized, search
from model import (
    IMAGE_CHANNELS,
    DescriptorModel,
    InputError,
    half_type,
)
from training.inputs import Store

BILINEAR = Image.Resampling.BILINEAR
RESIZE = [480, 640]  # height, width; eval.py takes those of the checkpoint
METHODS = (
    "hard_resize",
    "single_query",
    "central_crop",
    "five_crops",
    "nearest_crop",
    "maj_voting",
)
OF_CROPS = ("five_crops", "nearest_crop", "maj_voting")
VOTING_LEVELS = (1, 5, 10)  # among the first so many of each crop images are counted
BLOCK_CELLS = 2**26  # most numbers of descriptors that are computed at a time
WHITENING_EPS = 1e-12
MOST_PIXELS = 2**26  # of an image at a scale


# ---------------------------------------------------------------- images


def transform_for(method: str, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """What turns a query image into the network's input by one of METHODS.

    size: height, width. -> (3, h, w), or five crops one after the other, (15, s, s).
    """
    height, width = size
    side = min(size)

    def transform(image: Image.Image) -> Tensor:
        if method == "hard_resize":
            return normalized(image.resize((width, height), BILINEAR))
        if method == "central_crop":
            scale = max(height / image.height, width / image.width)
            grown = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            x, y = round((grown[0] - width) / 2), round((grown[1] - height) / 2)
            return normalized(image.resize(grown, BILINEAR).crop((x, y, x + width, y + height)))
        tensor = normalized(with_shorter_side(image, side))
        if method not in OF_CROPS:
            return tensor
        y, x = tensor.shape[1] - side, tensor.shape[2] - side
        corners = (0, 0), (0, x), (y, 0), (y, x), (round(y / 2), round(x / 2))
        return torch.cat([tensor[:, y : y + side, x : x + side] for y, x in corners])

    return transform


def with_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """An image re-sized so that its shorter side has `side` pixels."""
    shape = [int(side * length / min(image.size)) for length in image.size]
    return image.resize(tuple(shape), BILINEAR)


def framing(resize: Sequence[int], method: str = "hard_resize") -> Callable[[Image.Image], Tensor]:
    """What turns an image into the network's input.

    resize: height and width (method: how queries get them, transform_for); or the shorter
    side alone; or nothing, which leaves images as large as they are.
    """
    if len(resize) == 2:
        return transform_for(method, tuple(resize))
    if method != "hard_resize":
        raise InputError(f"--test_method {method} needs a size: add --resize H W.")

    def transform(image: Image.Image) -> Tensor:
        return normalized(with_shorter_side(image, *resize) if resize else image)

    return transform


class Plain(Dataset):
    """Image files whose names say nothing: item (image, index, path)."""

    def __init__(
        self, paths: Sequence[Path], transform: Callable, at_least: int | None = None
    ) -> None:
        self.paths, self.transform, self.at_least = paths, transform, at_least

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        return self.transform(load_image(self.paths[i], self.at_least)), i, str(self.paths[i])


def for_inference(model: DescriptorModel, device: torch.device | str) -> DescriptorModel:
    """A copy whose descriptors are those of the model, up to rounding, and cost less; no more to be trained.

    A BatchNorm that follows a convolution is part of it, and the trunk's weights are kept in what
    `device` computes in, else they are converted for every batch.
    """
    model = copy.deepcopy(model).eval()
    for module in model.trunk.modules():
        children = list(module.named_children())
        for (name, convolution), (next_name, norm) in itertools.pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, next_name, nn.Identity())
    for module in model.trunk.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(half_type(device, model.precision))
    return model


class Pipeline(nn.Module):
    """A model on several scales of its images, and on crops: descriptors side by side.

    Images (B, 3, H, W) -> (B, V · D): one D for each scale and, with several scales, all of norm 1, one
    more for their normalized mean. Of crops (B, 15, s, s): (B, 5 · V · D).
    """

    def __init__(self, model: nn.Module, scales: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.model, self.scales = model, tuple(scales)
        self.autocast = model.autocast

    @property
    def variants(self) -> list[str]:
        """Names of the V descriptors."""
        single = [f"scale {scale:g}" for scale in self.scales]
        return [*single, "all scales"] if len(single) > 1 else [""]

    @property
    def unit_norm(self) -> bool:
        """Whether descriptors have norm 1."""
        return len(self.scales) > 1 or self.model.unit_norm

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        images = x.unflatten(1, (-1, IMAGE_CHANNELS)).flatten(0, 1)  # crops as images
        found = []
        for scale in self.scales:
            size = [max(1, round(scale * side)) for side in images.shape[2:]]
            scaled = images
            if scale != 1:
                scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
            one = self.model(scaled).float()
            found.append(F.normalize(one, dim=1) if self.unit_norm else one)
        if len(found) > 1:
            found.append(F.normalize(torch.stack(found).mean(0), dim=1))
        return torch.cat(found, 1).view(len(x), -1)


def refuse_sizes(
    model: DescriptorModel, sizes: Iterable[tuple[int, int]], scales: Sequence[float] = (1.0,)
) -> None:
    """InputError if the model cannot describe images of some size (height, width) at some scale."""
    device, training = next(model.parameters()).device, model.training
    for (height, width), scale in itertools.product(sizes, scales):
        size = [max(1, round(scale * side)) for side in (height, width)]
        try:
            if math.prod(size) > MOST_PIXELS:
                raise ValueError("they are too large")
            with torch.inference_mode():
                model.eval()(torch.zeros(1, IMAGE_CHANNELS, *size, device=device))
        except (RuntimeError, ValueError) as error:
            at_scale = f" at scale {scale:g}" if scale != 1 else ""
            raise InputError(
                f"the network cannot describe images of {height} x {width} pixels{at_scale} "
                f"({str(error).partition(chr(10))[0]}): give another size, or other --scales."
            ) from error
    model.train(training)


class Combined(Pipeline):
    """A model on several scales of its images: the last descriptor of a Pipeline alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, D)."""
        return super().forward(x)[:, -self.model.descriptor_dim :]


def describe_images(
    pipeline: Pipeline,
    dataset: Dataset,
    device: torch.device,
    store: Store,
    batch_size: int,
    crops: int = 1,
) -> np.ndarray:
    """Descriptors (V, n, crops, D) of a data set of (image, index, path), in memory or in a file."""
    found, variants = None, len(pipeline.variants)
    step = max(1, BLOCK_CELLS // (crops * variants * pipeline.model.descriptor_dim))
    for begin in range(0, len(dataset), step):
        rows = range(begin, min(begin + step, len(dataset)))
        part, _, _ = compute_embeddings(pipeline, Subset(dataset, rows), device, batch_size)
        part = part.reshape(len(rows), crops, variants, -1).transpose(2, 0, 1, 3)
        if found is None:
            shape = (part.shape[0], len(dataset), *part.shape[2:])
            found = store.empty(shape, torch.float32).numpy()
        found[:, rows.start : rows.stop] = part
    return found


# ---------------------------------------------------------------- descriptors


@dataclass(frozen=True)
class Pca:
    """Projection of descriptors (n, D) to (n, d): (x - mean) @ axes, then to norm 1."""

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, dim: int, whiten: bool) -> "Pca":
        """The `dim` principal axes of x (n, D), divided by the standard deviation if whitened.

        InputError if there are fewer images, or numbers in a descriptor, than `dim`.
        """
        cls.refuse(dim, min(x.shape))
        mean = x.mean(axis=0)
        _, singular, axes = torch.linalg.svd(torch.from_numpy(x - mean), full_matrices=False)
        axes = axes[:dim].T
        if whiten:
            axes = axes / (singular[:dim].square() / max(1, len(x) - 1) + WHITENING_EPS).sqrt()
        return cls(mean, axes.numpy())

    @staticmethod
    def refuse(dim: int, most: int) -> None:
        """InputError if `most`, the images to fit or the numbers in a descriptor, are fewer than dim."""
        if dim > most:
            raise InputError(
                f"--pca_dim {dim} is more than the images to fit it on, or than the numbers in a "
                f"descriptor: use {most} or less."
            )

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (..., D), which may be a mapped file -> (..., d), rows of norm 1."""
        rows = x.reshape(-1, x.shape[-1])
        found = np.empty((len(rows), self.axes.shape[1]), np.float32)
        step = max(1, BLOCK_CELLS // rows.shape[1])
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            found[part] = unit((rows[part] - self.mean) @ self.axes)
        return found.reshape(*x.shape[:-1], -1)


def unit(x: np.ndarray) -> np.ndarray:
    """x (..., D) with rows of norm 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def rank(
    queries: np.ndarray,
    index: np.ndarray,
    k: int,
    method: str,
    device: torch.device | str = "cpu",
    majority_weight: float = 0.01,
    by_distance: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and index rows (nq, min(k, nd)) by one of METHODS, best first.

    queries: (nq, C, D), C descriptors a query; index: (nd, D). by_distance: as eval.search.
    """
    k = min(k, len(index))
    if method not in ("nearest_crop", "maj_voting"):
        mean = queries.mean(axis=1)
        return search(mean if by_distance else unit(mean), index, k, device, by_distance)
    count, crops, dim = queries.shape
    similarity, found = search(queries.reshape(-1, dim), index, k, device, by_distance)
    distance = (2 - 2 * similarity).reshape(count, crops, k)
    found = found.reshape(count, crops, k)
    if method == "maj_voting":
        distance = np.stack([vote(d, f, majority_weight) for d, f in zip(distance, found)])
    merged = [merge_crops(d, f, k) for d, f in zip(distance, found)]
    return 1 - np.stack([d for d, _ in merged]) / 2, np.stack([f for _, f in merged])


def vote(distance: np.ndarray, found: np.ndarray, weight: float) -> np.ndarray:
    """Distances (C, k) of one query less what images gain that several crops found.

    Of each level n an image that the first n of `found` (C, k) name c > 1 times gains weight · c / n.
    """
    distance = distance.copy()
    for level in VOTING_LEVELS:
        images, counts = np.unique(found[:, :level], return_counts=True)
        for image, count in zip(images, counts):
            if count > 1:
                distance[:, :level][found[:, :level] == image] -= weight * count / level
    return distance


def merge_crops(distance: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest images of all crops' lists (C, k), each at its smallest distance."""
    order = np.argsort(distance.ravel(), kind="stable")
    images = found.ravel()[order]
    _, first = np.unique(images, return_index=True)
    kept = np.sort(first)[:k]
    return distance.ravel()[order][kept], images[kept]
