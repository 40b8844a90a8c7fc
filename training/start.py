"""Which weights a training starts from: clusters, and pretrained weights as they are or rescaled.

What learned from photographs for another task may rank places badly until its channels have one
variance and no correlation; which change helps depends on the weights and the data, so the run finds
out: by ranking a few training queries before anything is trained.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from dataset.folders import FolderSplit
from dataset.lists import LoadDataset
from eval import describe, positives_within
from model import CALIBRATION_IMAGES, DescriptorModel, calibrate_trunk, initialize_netvlad, progress
from training.inputs import Inputs
from training.mining import reciprocal_rank

QUERIES, NEAR, OTHERS = 64, 2, 64  # ranked; index images near each; index images elsewhere
FEWEST = 16  # queries, below which a ranking says nothing
KMEANS_IMAGES = 500
BATCH = 16
SHRINKAGE = 0.1  # share of the mean variance in the covariance that is whitened


def calibration_images(inputs: Inputs, rows: range) -> Tensor:
    """Images (n, 3, H, W), on the device, on which random weights are calibrated: some of `rows`."""
    chosen = _evenly_spaced(rows, CALIBRATION_IMAGES)
    return torch.stack([inputs.item(int(row))[0] for row in chosen]).to(inputs.device)


def initialize_clusters(model: DescriptorModel, inputs: Inputs, rows: range, seed: int) -> None:
    """Cluster local descriptors of some of `rows` for the model's aggregation."""
    chosen = _evenly_spaced(rows, KMEANS_IMAGES)
    parts = np.array_split(chosen, max(1, len(chosen) // BATCH))
    batches = (inputs.take(part) for part in parts)
    initialize_netvlad(model.eval(), batches, inputs.device, seed=seed)


def _evenly_spaced(rows: range, most: int) -> np.ndarray:
    return rows.start + np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)


@torch.no_grad()
def whiten_last(model: DescriptorModel, images: Tensor) -> None:
    """Fold into the trunk's last convolution what makes its outputs uncorrelated, of unit variance.

    images: (N, 3, H, W), or what the stages below `first_trained` made of them, on the model's device,
    some 200. W = ((1 - s) C + s mean(eig C) I)^(-1/2)
    with C the covariance of the outputs over all locations, s SHRINKAGE: w <- W w, b <- W (b - mean).
    """
    count, total, square = 0, 0.0, 0.0
    for batch in images.split(BATCH):
        with torch.inference_mode(), model.autocast(images.device):
            outputs = model.local_descriptors(batch)
        outputs = outputs.float().transpose(0, 1).flatten(1)  # (C, locations)
        count += outputs.shape[1]
        total = total + outputs.sum(dim=1).cpu().double()
        square = square + (outputs @ outputs.T).cpu().double()
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    values = (1 - SHRINKAGE) * values.clamp(min=0) + SHRINKAGE * values.mean()
    whiten = (vectors * values.rsqrt()) @ vectors.T
    last = [module for module in model.trunk if isinstance(module, nn.Conv2d)][-1]
    weight, bias = last.weight.cpu().double(), last.bias.cpu().double()
    last.weight.copy_((whiten @ weight.flatten(1)).view_as(weight))
    last.bias.copy_(whiten @ (bias - mean))


def choose_start(
    model: DescriptorModel, data: LoadDataset | FolderSplit, device: torch.device, seed: int
) -> str:
    """Give the model's trunk the best of three starts; -> a line that says which, and by how much.

    The starts: as it is; the last convolution whitened; every convolution rescaled as random ones are
    (calibrate_trunk), and the last whitened. Judged by the mean reciprocal rank of training queries
    with freshly clustered descriptors.
    """
    queries, index = _some_places(data)
    if len(queries) < FEWEST:
        return f"Start: the weights as they are ({len(queries)} queries are too few to choose by)."
    pictures = [data.queries[int(i)][0] for i in progress(queries, desc="queries to choose by")]
    pictures += [data.index[int(i)][0] for i in progress(index, desc="index images to choose by")]
    images = torch.stack(pictures).to(device)
    utm_query, utm_index = data.utm_query[queries], data.utm_index[index]
    positives = positives_within(utm_query, utm_index, data.threshold)
    model.to(device, memory_format=torch.channels_last).eval()
    last = max(i for i, stage in enumerate(model.trunk) if isinstance(stage, nn.Conv2d))
    ranks, trunks, maps = {}, {}, None  # maps: what the trunk makes of the images below `last`
    for name, (calibrated, whitened) in STARTS.items():
        candidate = copy.deepcopy(model)
        if calibrated:
            rows = _evenly_spaced(range(len(queries), len(images)), CALIBRATION_IMAGES)
            calibrate_trunk(candidate, images[rows])
        candidate.first_trained = last
        if calibrated or maps is None:
            maps = _below(candidate, images, name)
        if whitened:
            whiten_last(candidate, maps[len(queries) :])
        initialize_netvlad(candidate, maps[len(queries) :].split(BATCH), device, seed=seed)
        found = torch.cat([describe(candidate, batch, device).cpu() for batch in maps.split(BATCH)])
        similarity = (found[: len(queries)] @ found[len(queries) :].T).numpy()
        ranks[name] = np.array([reciprocal_rank(*pair) for pair in zip(similarity, positives)])
        trunks[name] = candidate.trunk.state_dict()
    best = max(ranks, key=lambda name: ranks[name].mean())
    model.trunk.load_state_dict(trunks[best])
    gain = ranks[best] - ranks["as they are"]
    scores = ", ".join(f"{name} {rank.mean():.3f}" for name, rank in ranks.items())
    line = (
        f"Start: {len(queries)} training queries among {len(index)} index images have MRR {scores}"
    )
    if gain.any():
        model.weights_origin += f", {best}"
        line += f"; gain {gain.mean():.3f} ± {gain.std() / np.sqrt(len(gain)):.3f}"
    return f"{line}. Taken: {best}."


# Of each start: whether all convolutions are rescaled, and whether the last one's outputs are whitened.
STARTS = {
    "as they are": (False, False),
    "last convolution whitened": (False, True),
    "all convolutions calibrated, the last whitened": (True, True),
}


def _below(model: DescriptorModel, images: Tensor, name: str) -> Tensor:
    """What the stages below `model.first_trained` make of images."""
    batches = progress(images.split(BATCH), desc=name, unit="batch")
    with torch.inference_mode(), model.autocast(images.device):
        parts = [
            model.frozen_part(x.contiguous(memory_format=torch.channels_last)) for x in batches
        ]
    return torch.cat(parts)


def _some_places(data: LoadDataset | FolderSplit) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries, evenly spaced, with an index image near, and of index images near and far."""
    distance = [np.hypot(*(data.utm_index - utm).T) for utm in data.utm_query]
    near = [np.flatnonzero(row <= data.threshold) for row in distance]
    found = np.array([i for i, rows in enumerate(near) if len(rows)], dtype=int)
    queries = found[np.linspace(0, len(found) - 1, min(QUERIES, len(found))).astype(int)]
    beside = [near[i][np.linspace(0, len(near[i]) - 1, NEAR).astype(int)] for i in queries]
    others = np.linspace(0, len(data.index) - 1, min(OTHERS, len(data.index))).astype(int)
    return queries, np.unique(np.concatenate([*beside, others])).astype(int)
