"""DINOv2 ViT-B/14 + SuperVLAD at 224 x 224: images a second, a step of training, beside bare loops.

    python tests/bench/vit.py [--batch 16] [--rounds 3]

Run by hand on a quiet machine. Contestants take turns on the same images; the best round of each
counts. To reach: 90 % of the images a second that the network's matrix products alone allow in bf16
(each product of its own shape and weights, one after another); a step of training 1.5 x as fast as
float32 autograd which records nothing of the frozen blocks either.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recognition.inference import for_inference
from recognition.multi_similarity import MultiSimilarity, multi_similarity
from recognition.recipes import RECIPES, build_model
from recognition.vit import PATCH_PX, SIZES

CPU, SIDE, PER_PLACE, RATE = torch.device("cpu"), 224, 4, 5e-5


def bare_products(batch: int) -> Callable[[], object]:
    """What multiplies matrices as the network does for a batch, in bf16, and nothing else."""
    size = SIZES["dinov2_vitb14"]
    patches = (SIDE // PATCH_PX) ** 2
    tokens, heads = patches + 1, batch * size.heads
    shapes = [(size.dim, 3 * size.dim), (size.dim, size.dim)]
    shapes += [(size.dim, 4 * size.dim), (4 * size.dim, size.dim)]
    made = {"dtype": torch.bfloat16}
    inputs = {width: torch.randn(batch * tokens, width, **made) for width, _ in shapes}
    weights = [torch.randn(b, a, **made) for a, b in shapes * size.depth]
    pixels = torch.randn(batch * patches, 3 * PATCH_PX**2, **made)
    embedding = torch.randn(size.dim, 3 * PATCH_PX**2, **made)
    query, key = (torch.randn(heads, tokens, size.dim // size.heads, **made) for _ in range(2))
    attention = torch.randn(heads, tokens, tokens, **made)

    @torch.inference_mode()
    def multiply() -> None:
        F.linear(pixels, embedding)
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)
        for _ in range(size.depth):
            torch.bmm(query, key.transpose(1, 2))
            torch.bmm(attention, key)

    return multiply


def best_seconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each, which take turns; the first round warms up."""
    best = dict.fromkeys(contestants, math.inf)
    for number in range(rounds + 1):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            if number:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = build_model(RECIPES["supervlad"].defaults)
    images = torch.randn(args.batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(args.batch) // PER_PLACE
    same, itself = labels[:, None] == labels, torch.eye(args.batch, dtype=torch.bool)
    objective = MultiSimilarity()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE)

    ready = for_inference(model, CPU)

    @torch.inference_mode()
    def describe() -> None:
        with ready.autocast(CPU):
            ready(images)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        objective(model, [images, labels, torch.tensor(0)], CPU).mean().backward()
        optimizer.step()

    def plain_step() -> None:
        model.train()
        optimizer.zero_grad()
        with torch.no_grad():
            tokens = model.trunk[0](images)
        found = model.aggregation(model.trunk[1](tokens))
        multi_similarity(found @ found.T, same, itself).mean().backward()
        optimizer.step()

    found = best_seconds({"products": bare_products(args.batch), "network": describe}, args.rounds)
    for name, seconds in found.items():
        print(f"{name:9s} {args.batch / seconds:7.2f} images a second")
    share = found["products"] / found["network"]
    print(f"{100 * share:.0f} % of the bare products (to reach: 90)")
    found = best_seconds({"step": step, "plain": plain_step}, args.rounds)
    for name, seconds in found.items():
        print(f"{name:9s} {seconds:7.2f} s a step of {args.batch} images")
    print(f"{found['plain'] / found['step']:.2f} x as fast as the plain step (to reach: 1.5)")


if __name__ == "__main__":
    main()
