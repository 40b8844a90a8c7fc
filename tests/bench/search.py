"""Exact search of 6,816 queries among 10,000 descriptors of 8,192 dimensions: seconds and memory.

    python tests/bench/search.py

Run by hand on a quiet machine. To reach: 1.3 x the time of the bare chunked product and top-k, and at
most 1 GiB of memory beyond the descriptors.
"""

import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import search

QUERIES, INDEX, WIDTH, K = 6816, 10_000, 8192, 20
CHUNK = 512


def peak_gib() -> float:
    """Largest memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bare(queries: torch.Tensor, index: torch.Tensor) -> None:
    """Product and top-k of each chunk, nothing else."""
    for chunk in queries.split(CHUNK):
        (chunk @ index.T).topk(K, dim=1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, index = (
        torch.randn(count, WIDTH, generator=generator).div_(WIDTH**0.5) for count in (QUERIES, INDEX)
    )
    before = peak_gib()
    seconds = {"bare": [], "search": []}
    search(queries[:64].numpy(), index.numpy(), K)
    for _ in range(3):
        began = time.perf_counter()
        search(queries.numpy(), index.numpy(), K)
        seconds["search"].append(time.perf_counter() - began)
        if len(seconds["search"]) == 1:
            print(f"{peak_gib() - before:.2f} GiB beyond the descriptors (at most: 1)")
        began = time.perf_counter()
        bare(queries, index)
        seconds["bare"].append(time.perf_counter() - began)
    ours, theirs = min(seconds["search"]), min(seconds["bare"])
    print(f"search {ours:.2f} s, bare {theirs:.2f} s: {ours / theirs:.2f} x (at most: 1.3)")


if __name__ == "__main__":
    main()
