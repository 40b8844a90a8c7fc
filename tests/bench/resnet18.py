"""ResNet-18 (conv4) + NetVLAD on JPEG files of 480 x 640: images a second, beside its bare trunk.

    python tests/bench/resnet18.py FOLDER      # of JPEG files, any number

Run by hand on a quiet machine. Rounds alternate on the same number of images; the best of each counts.
To reach: 90 % of the bare trunk's images a second.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import compute_embeddings
from recognition.inference import Plain, for_inference, transform_for
from recognition.recipes import build_model

BATCH, SIZE = 16, (480, 640)
SETTINGS = {
    "backbone": "resnet18conv4", "aggregation": "netvlad", "netvlad_clusters": 64,
    "fc_output_dim": None, "l2": "before_pool",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    paths = sorted(args.folder.rglob("*.jpg"))[: args.images]
    files = Plain(paths, transform_for("hard_resize", SIZE), max(SIZE))
    model = build_model(SETTINGS).to(memory_format=torch.channels_last).eval()
    ready = for_inference(model, "cpu")
    trunk = torch.nn.Sequential(*model.trunk)  # its modules alone, a whole batch at a time
    images = torch.zeros(BATCH, 3, *SIZE).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.inference_mode(), model.autocast("cpu"):
            for begin in range(0, len(paths), BATCH):
                trunk(images[: len(paths) - begin])

    contestants = {
        "bare trunk": bare,
        "JPEG to descriptor": lambda: compute_embeddings(ready, files, "cpu", BATCH),
    }
    best = dict.fromkeys(contestants, 0.0)
    bare()
    for _ in range(args.rounds):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            best[name] = max(best[name], len(paths) / (time.perf_counter() - began))
    for name, speed in best.items():
        print(f"{name:18s} {speed:6.2f} images a second")
    share = best["JPEG to descriptor"] / best["bare trunk"]
    print(f"{100 * share:.0f} % of the bare trunk (to reach: 90)")


if __name__ == "__main__":
    main()
