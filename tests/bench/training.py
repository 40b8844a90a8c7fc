"""Triplets a second of training from cached trunk outputs, beside a plain hand-in.

    python tests/bench/training.py ../shared/data/tower ../shared/bench/plain_handin.py

Run by hand on a quiet machine. The plain hand-in trains 20 steps. To reach: 25 x its triplets a second
with one random negative, the trunk's outputs cached.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lists import read_split
from model import NetVLADModel, calibrate_trunk, initialize_netvlad
from train import train
from training.inputs import Inputs, Store
from training.mining import NEGATIVES, TupleLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=40, help="training queries")
    args = parser.parse_args()
    device = torch.device("cpu")
    data = read_split(args.dataset, "train", args.limit)
    model = NetVLADModel(pretrained=False)
    calibrate_trunk(model, torch.stack([data.index[i][0] for i in range(16)]))
    inputs = Inputs(model, [data.queries, data.index], device, Store(Path(".")))
    initialize_netvlad(model, [inputs.take(range(len(data), len(data) + 64))], device)
    speeds = {}
    for mining in ("hard", "random"):
        rows = np.arange(len(data) - 1)
        tuples = TupleLoader(data, inputs, rows, rows[:1], mining=mining)
        batches = [batch for batch in tuples.epoch(model, 1) if batch]
        count = sum(len(batch[0]) for batch in batches)
        history = train(model, batches, [], device, epochs=3)
        speeds[mining] = count / min(epoch["seconds"] for epoch in history)
        images = speeds[mining] * (2 + NEGATIVES[mining])
        print(f"{mining}: {speeds[mining]:.2f} tuples, {images:.1f} images a second")
    command = [sys.executable, args.plain, args.dataset, "--steps", str(args.steps), "--no-eval"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    plain = 1 / float(re.search(r"train_seconds_per_triplet (\S+)", said).group(1))
    print(f"plain hand-in: {plain:.3f} triplets a second")
    print(f"{speeds['random'] / plain:.1f} x the plain hand-in (to reach: 25)")


if __name__ == "__main__":
    main()
