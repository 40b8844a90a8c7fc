"""Images a second, JPEG files to descriptors: this project, a plain hand-in, the bare trunk.

    python tests/bench/embedding.py ../shared/data/tower ../shared/bench/plain_handin.py

Run by hand on a quiet machine. Each round takes the three one after another on the same images; the
best round of each counts. To reach: 2.4 x the plain hand-in, 88 % of the bare bf16 trunk.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lists import ImageListDataset
from eval import IMAGE_SIZE, TRANSFORM, compute_embeddings, load_image
from model import NetVLADModel

BATCH = 32


def load_plain(file: Path) -> torch.nn.Module:
    """The model of plain_handin.py."""
    spec = importlib.util.spec_from_file_location("plain_handin", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Plain().eval()


def plain_embedding(model: torch.nn.Module, paths: list[Path]) -> None:
    """As plain_handin.py does it: one image after another, float32."""
    with torch.no_grad():
        for i in range(0, len(paths), BATCH):
            model(torch.stack([TRANSFORM(load_image(path)) for path in paths[i : i + BATCH]]))


def bare_trunk(model: NetVLADModel, count: int) -> None:
    """The trunk's modules alone, on images that are there already, a whole batch at a time."""
    trunk = torch.nn.Sequential(*model.trunk)
    images = torch.zeros(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), model.autocast("cpu"):
        for i in range(0, count, BATCH):
            trunk(images[: min(BATCH, count - i)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = ImageListDataset(args.dataset / "index_val.txt", args.dataset, TRANSFORM, inside_first=True, at_least=IMAGE_SIZE)
    data.paths = data.paths[: args.images]
    plain, ours = load_plain(args.plain), NetVLADModel(pretrained=False).eval()
    count = len(data)
    contestants: dict[str, Callable[[], object]] = {
        "plain hand-in": lambda: plain_embedding(plain, data.paths),
        "bare trunk": lambda: bare_trunk(ours, count),
        "this project": lambda: compute_embeddings(ours, data, "cpu"),
    }
    best = dict.fromkeys(contestants, 0.0)
    bare_trunk(ours, BATCH)
    for _ in range(args.rounds):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            best[name] = max(best[name], count / (time.perf_counter() - began))
    for name, speed in best.items():
        print(f"{name:14s} {speed:6.2f} images a second")
    mine = best["this project"]
    print(f"{mine / best['plain hand-in']:.2f} x the plain hand-in (to reach: 2.4)")
    print(f"{100 * mine / best['bare trunk']:.0f} % of the bare trunk (to reach: 88)")


if __name__ == "__main__":
    main()
