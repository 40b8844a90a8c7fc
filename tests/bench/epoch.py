"""Seconds of an epoch of the NetVLAD benchmark's training, beside a loop that follows its definition.

    python tests/bench/epoch.py FOLDER [--queries 440] [--size 240 320]    # FOLDER/{database,queries}

Run by hand on a quiet machine. ResNet-18 (conv4) + NetVLAD 64, partial mining in one window, 10 negatives, the
negatives' pool as large as the window (as published). The other loop computes in float32, reads an image whenever
it needs one, and keeps nothing but descriptors. To reach: half of its time.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.folders import FolderSplit, read_split
from eval import positives_within
from model import DescriptorModel, progress
from recognition.batches import BenchmarkTuples
from recognition.inference import transform_for
from recognition.recipes import build_model
from train import train
from training.inputs import Inputs, Store

SETTINGS = {
    "backbone": "resnet18conv4", "aggregation": "netvlad", "netvlad_clusters": 64,
    "fc_output_dim": None, "l2": "before_pool",
}  # fmt: skip
NEGATIVES, BATCH, RADIUS_M, LR = 10, 4, 10.0, 1e-5
DEVICE = torch.device("cpu")


def fresh_model() -> DescriptorModel:
    """Weights as they are drawn: timing asks nothing of them."""
    torch.manual_seed(0)
    model = build_model(SETTINGS)
    model.trunk.initialized = model.aggregation.initialized = True
    return model


def ours(data: FolderSplit, queries: int) -> list[float]:
    """Seconds of two epochs of train(): the first fills the cache of the frozen part's outputs."""
    model = fresh_model()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(model, [data.queries, data.index], DEVICE, Store(Path(folder)))
        tuples = BenchmarkTuples(
            data, inputs, negatives=NEGATIVES, pool=queries, refresh=queries, queries_per_epoch=queries
        )
        return [epoch["seconds"] for epoch in train(model, tuples, (), DEVICE, 2, LR)]


@torch.no_grad()
def described(model: DescriptorModel, dataset: torch.utils.data.Dataset, rows: np.ndarray) -> torch.Tensor:
    """Descriptors (n, D) of some images, read now."""
    model.eval()
    parts = [torch.stack([dataset[i][0] for i in part]) for part in np.array_split(rows, max(1, len(rows) // 16))]
    return torch.cat([model(part) for part in parts])


def plain(data: FolderSplit, queries: int) -> float:
    """Seconds of an epoch as Berton et al. (CVPR 2022) define it."""
    model, rng, begun = fresh_model(), np.random.default_rng(0), time.perf_counter()
    model.precision = "float32"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], LR)
    criterion = torch.nn.TripletMarginLoss(0.1, reduction="sum")
    near = positives_within(data.utm_query, data.utm_index, RADIUS_M)
    drawn = rng.choice(np.flatnonzero([len(rows) for rows in near]), queries, replace=False)
    pool = rng.choice(len(data.index), queries, replace=False)
    rows = np.unique(np.concatenate([pool, *(near[i] for i in drawn)]).astype(int))
    of_index = dict(zip(rows.tolist(), described(model, data.index, rows)))
    of_queries = described(model, data.queries, drawn)
    tuples = []
    for query, descriptor in zip(drawn, of_queries):
        far, chosen = np.setdiff1d(pool, data.positives[query]), []
        for candidates, count in ((np.asarray(near[query]), 1), (far, NEGATIVES)):
            away = (torch.stack([of_index[int(i)] for i in candidates]) - descriptor).norm(dim=1)
            chosen += candidates[away.argsort()[:count].numpy()].tolist()
        tuples.append((query, *chosen))
    model.train()
    for begin in range(0, queries - BATCH + 1, BATCH):
        batch = tuples[begin : begin + BATCH]
        images = [data.queries[t[0]][0] for t in batch] + [data.index[i][0] for t in batch for i in t[1:]]
        out = model(torch.stack(images))
        q, others = out[:BATCH], out[BATCH:].unflatten(0, (BATCH, -1))
        loss = sum(criterion(q, others[:, 0], others[:, 1 + k]) for k in range(NEGATIVES))
        optimizer.zero_grad()
        (loss / (BATCH * NEGATIVES)).backward()
        optimizer.step()
    return time.perf_counter() - begun


def main() -> None:
    """Print seconds of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, default=440)
    parser.add_argument("--size", type=int, nargs=2, default=[240, 320])
    args = parser.parse_args()
    progress.hidden = True
    data = read_split(args.folder, 25.0, transform_for("hard_resize", tuple(args.size)), max(args.size))
    first, second = ours(data, args.queries)
    theirs = plain(data, args.queries)
    print(
        f"ours {first:.1f} s with filling the cache, then {second:.1f} s; plain {theirs:.1f} s: "
        f"{first / theirs:.2f} and {second / theirs:.2f} x (at most: 0.5)"
    )


if __name__ == "__main__":
    main()
