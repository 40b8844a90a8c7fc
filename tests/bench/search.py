"""Exact search of 2,048 queries among 10,000 descriptors of 16,384 dimensions: seconds and memory.

    python tests/bench/search.py

Run by hand on a quiet machine. Beside it, in turns and with as many threads: the bare product and top-k of each
chunk, and faiss-cpu's IndexFlatIP. To reach: 1.1 x faiss's time, at most 1 GiB of memory beyond the descriptors.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import search

QUERIES, INDEX, WIDTH, K = 2048, 10_000, 16_384, 20
CHUNK = 512
ROUNDS = 3


def peak_gib() -> float:
    """Largest memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bare(queries: torch.Tensor, index: torch.Tensor) -> None:
    """Product and top-k of each chunk, nothing else."""
    for chunk in queries.split(CHUNK):
        (chunk @ index.T).topk(K, dim=1)


def seconds(of: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    of()
    return time.perf_counter() - began


def main() -> None:
    """Print the best of some rounds."""
    generator = torch.Generator().manual_seed(0)
    queries, index = (
        torch.randn(count, WIDTH, generator=generator).div_(WIDTH**0.5) for count in (QUERIES, INDEX)
    )
    search(queries[:64].numpy(), index.numpy(), K)
    before = peak_gib()
    ours = [seconds(lambda: search(queries.numpy(), index.numpy(), K))]
    print(f"{peak_gib() - before:.2f} GiB beyond the descriptors (at most: 1)")
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(index.numpy())
    products, theirs = [], []
    for _ in range(ROUNDS):
        products.append(seconds(lambda: bare(queries, index)))
        theirs.append(seconds(lambda: flat.search(queries.numpy(), K)))
        ours.append(seconds(lambda: search(queries.numpy(), index.numpy(), K)))
    best = min(ours)
    for name, others, bar in (("faiss", theirs, 1.1), ("bare products", products, 1.3)):
        print(f"search {best:.2f} s, {name} {min(others):.2f} s: {best / min(others):.2f} x (at most: {bar})")


if __name__ == "__main__":
    main()
