"""Task 2: training with a ranking loss, max(0, d(q, p) + margin - d(q, n)), by Adam.

    train(model, train_loader, val_loader, device, epochs=5, lr=1e-4)

The loaders yield batches (q, p, n) of images. What is frozen need not be computed twice: with
`start=model.first_trained` they yield the outputs of trunk[:start] instead (`cache_trunk`).

Works when copied out alone together with model.py and eval.py.
"""

import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval import positives_within
from model import (
    CALIBRATION_IMAGES,
    DESCRIPTORS_PER_IMAGE,
    KMEANS_DESCRIPTORS,
    InputError,
    NetVLADModel,
    calibrate_trunk,
    half_precision,
    initialize_netvlad,
)

MARGIN = 0.1
CACHE_BATCH = 16
PARTS = {"train": 0.8, "val": 0.1, "test": 0.1}
SPLIT_DIRECTIONS = 12


def ranking_loss(q: Tensor, p: Tensor, n: Tensor, margin: float = MARGIN, squared: bool = False) -> Tensor:
    """max(0, d(q, p) + margin - d(q, n)) of every triplet.

    q, p: (B, D); n: (B, D), or (B, N, D) for several negatives a query. `squared`: squared Euclidean
    distances (the NetVLAD paper's, eq. 7) instead of plain ones (the assignment's). -> (B, N).
    """
    n = n if n.dim() == 3 else n[:, None]
    to_positive = (q - p).square().sum(dim=-1)[:, None]
    to_negatives = (q[:, None] - n).square().sum(dim=-1)
    if not squared:
        # The root's slope is infinite at 0, where a query is its own positive.
        to_positive, to_negatives = (d.clamp(min=1e-12).sqrt() for d in (to_positive, to_negatives))
    return (to_positive + margin - to_negatives).clamp(min=0)


def triplet_losses(
    model: NetVLADModel, batch: list[Tensor], device: torch.device, margin: float, start: int = 0
) -> Tensor:
    """Losses (B, N) of one batch (q, p, n), all its images in one pass. n: (B, …) or (B, N, …)."""
    q, p, n = (part.to(device, non_blocking=True) for part in batch)
    negatives = n if n.dim() == 5 else n[:, None]
    images = torch.cat([q, p, negatives.flatten(0, 1)]).contiguous(memory_format=torch.channels_last)
    with half_precision(device):
        q_d, p_d, n_d = model(images, start).split([len(q), len(p), negatives.shape[0] * negatives.shape[1]])
    return ranking_loss(q_d, p_d, n_d.unflatten(0, negatives.shape[:2]), margin)


def train(
    model: NetVLADModel,
    train_loader: Iterable,
    val_loader: Iterable,
    device: torch.device | str,
    epochs: int = 5,
    lr: float = 1e-4,
    *,
    margin: float = MARGIN,
    start: int = 0,
) -> list[dict[str, float]]:
    """Train what `model.train_only_from` left unfrozen; print both losses after each epoch.

    train_loader, val_loader: batches (q, p, n), each (B, 3, H, W), n also (B, N, 3, H, W); with
    `start` > 0 outputs of trunk[:start] in place of images. A model whose weights were neither
    initialized nor loaded is initialized from the training loader's first batches.
    Returns a dict an epoch: epoch, train_loss, val_loss, violations (share of triplets), seconds.
    """
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last)
    if not model.netvlad.initialized:
        initialize_from_loader(model, train_loader, device, start)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()
        model.train()
        losses, violations = [], []
        for batch in tqdm(train_loader, desc=f"epoch {epoch}/{epochs}", unit="batch", leave=False):
            loss = triplet_losses(model, batch, device, margin, start)
            optimizer.zero_grad()
            loss.mean().backward()
            centralize_gradients(trained)
            optimizer.step()
            losses.append(loss.detach().mean(dim=1))
            violations.append(loss.detach() > 0)
        record = {
            "epoch": epoch,
            "train_loss": _mean(losses),
            "val_loss": validate(model, val_loader, device, margin=margin, start=start),
            "violations": _mean(violations),
            "seconds": time.perf_counter() - began,
        }
        history.append(record)
        tqdm.write(
            f"Epoch {epoch}/{epochs}: train loss {record['train_loss']:.4f}, "
            f"val loss {record['val_loss']:.4f}, "
            f"violating triplets {100 * record['violations']:.1f} %, {record['seconds']:.0f} s"
        )
    return history


def centralize_gradients(parameters: Iterable[Tensor]) -> None:
    """Subtract its mean from the gradient of each convolution filter (Yong et al., ECCV 2020).

    A convolution's inputs come from a ReLU, so their mean is positive, and Adam's steps have the same
    sign all over a filter: without this, four steps move the mean of every channel so far from the
    cluster centers that all descriptors look alike (measured: mean distance 1.36 -> 0.5), and the
    training never recovers.
    """
    for parameter in parameters:
        if parameter.dim() == 4 and parameter.grad is not None:
            parameter.grad -= parameter.grad.mean(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def validate(
    model: NetVLADModel,
    loader: Iterable,
    device: torch.device | str,
    *,
    margin: float = MARGIN,
    start: int = 0,
) -> float:
    """Mean ranking loss over a loader of (q, p, n) batches; NaN for an empty one."""
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last).eval()
    batches = tqdm(loader, desc="validation", unit="batch", leave=False)
    losses = [triplet_losses(model, batch, device, margin, start).mean(dim=1) for batch in batches]
    return _mean(losses)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).float().mean()) if parts else float("nan")


def initialize_from_loader(
    model: NetVLADModel, loader: Iterable, device: torch.device, start: int = 0
) -> None:
    """Calibrate a trunk of random weights and cluster local descriptors, from the first batches."""
    if not model.trunk_initialized and start == 0:
        needed, images = CALIBRATION_IMAGES, []
        for batch in _images(loader):
            images.append(batch)
            if sum(map(len, images)) >= needed:
                break
        calibrate_trunk(model, torch.cat(images)[:needed].to(device))
    initialize_netvlad(model, _images(loader), device, start=start)


def _images(loader: Iterable) -> Iterator[Tensor]:
    """The images of a loader of (q, p, n) batches, (B, 3, H, W) each, up to what k-means asks for."""
    enough = KMEANS_DESCRIPTORS // DESCRIPTORS_PER_IMAGE
    gathered = 0
    for batch in loader:
        for part in batch:
            part = part.flatten(0, 1) if part.dim() == 5 else part
            gathered += len(part)
            yield part
            if gathered >= enough:
                return


@torch.no_grad()
def cache_trunk(
    model: NetVLADModel, dataset: Dataset, device: torch.device, *, workers: int = 0, desc: str
) -> Tensor:
    """Outputs of the frozen trunk[:first_trained], computed once for each image of `dataset`.

    dataset: items (image, …). -> (n, C, h, w) bfloat16 on the CPU; 0.2 MB an image at 224 x 224 and
    conv5.
    """
    frozen = model.to(device, memory_format=torch.channels_last).trunk[: model.first_trained].eval()
    loader = DataLoader(dataset, CACHE_BATCH, num_workers=workers)
    outputs: Tensor | None = None
    done = 0
    with tqdm(total=len(dataset), desc=desc, unit="image", leave=False) as bar:
        for images, *_ in loader:
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            with half_precision(device):
                part = frozen(images).to("cpu", torch.bfloat16)
            if outputs is None:
                outputs = torch.empty(len(dataset), *part.shape[1:], dtype=torch.bfloat16)
            outputs[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    return outputs


def split_by_place(
    utm_query: np.ndarray, utm_index: np.ndarray, threshold: float, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Queries in three parts, 80/10/10, such that no index image is near queries of two parts.

    Cuts across a direction of the map put val at one end, test at the other; queries that share an
    index image within `threshold` with another part are dropped. Of SPLIT_DIRECTIONS (the first is
    random by seed) the one that drops fewest is taken. -> (part -> rows, number dropped).
    Raises InputError if every direction leaves a part empty.
    """
    positives = positives_within(utm_query, utm_index, threshold)
    count = len(utm_query)
    held_out = max(1, round(PARTS["val"] * count))
    first = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    best: np.ndarray | None = None
    for angle in first + np.arange(SPLIT_DIRECTIONS) * 2 * np.pi / SPLIT_DIRECTIONS:
        along = np.argsort(utm_query @ [np.cos(angle), np.sin(angle)], kind="stable")
        part = np.zeros(count, dtype=int)
        part[along[:held_out]], part[along[count - held_out :]] = 1, 2
        part = _drop_between(part, positives, len(utm_index))
        kept = np.bincount(part[part >= 0], minlength=3)
        if kept.min() > 0 and (best is None or (part >= 0).sum() > (best >= 0).sum()):
            best = part
    if best is None:
        raise InputError(
            f"the {count} training queries cannot be split 80/10/10 by place: they need at least "
            f"three places that share no index image within {threshold:g} m."
        )
    return {name: np.flatnonzero(best == i) for i, name in enumerate(PARTS)}, int((best < 0).sum())


def _drop_between(part: np.ndarray, positives: list[np.ndarray], index_count: int) -> np.ndarray:
    """`part` (nq,) with -1 for queries whose index images are near a query of a later part."""
    part = part.copy()
    claimed = np.zeros(index_count, dtype=bool)
    for number in (2, 1, 0):
        for query in np.flatnonzero(part == number):
            if claimed[positives[query]].any():
                part[query] = -1
        for query in np.flatnonzero(part == number):
            claimed[positives[query]] = True
    return part
