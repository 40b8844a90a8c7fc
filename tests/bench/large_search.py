"""Exact search beside faiss's IndexFlatIP, and of a database that stays on the disk.

    python tests/bench/large_search.py [--queries 1000] [--folder DIR]

Run by hand on a quiet machine. 10,000 descriptors of 16,384 numbers: to reach 1.1 x faiss's time. 100,000
of 4,096, ten times Pittsburgh 30k, in a file of 1.6 GB in --folder: at most 1 GiB of memory beside it.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import search

K, ROUNDS = 20, 3
IN_MEMORY, ON_DISK = (10_000, 16_384), (100_000, 4096)
PART = 5000  # descriptors written at a time


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Random rows of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator)).numpy()


def memory() -> int:
    """Bytes of this process that are not part of a mapped file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """What the memory was at each hundredth of a second inside, in bytes."""
    seen, ended = [memory()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def beside_faiss(count: int) -> None:
    """Seconds of both, one after the other, the best of ROUNDS."""
    queries, database = vectors(count, IN_MEMORY[1], 0), vectors(*IN_MEMORY, 1)
    index = faiss.IndexFlatIP(IN_MEMORY[1])
    index.add(database)
    faiss.omp_set_num_threads(torch.get_num_threads())
    ours, theirs = [], []
    with watched() as seen:
        found = search(queries, database, K)[1]
    for _ in range(ROUNDS):
        for times, work in (
            (ours, lambda: search(queries, database, K)),
            (theirs, lambda: index.search(queries, K)),
        ):
            began = time.perf_counter()
            rows = work()[1]
            times.append(time.perf_counter() - began)
    same = (rows == found).all(axis=1).mean()
    print(f"{count} queries, {IN_MEMORY[0]} x {IN_MEMORY[1]}, {torch.get_num_threads()} threads:")
    print(f"search {min(ours):.2f} s, faiss {min(theirs):.2f} s, {min(ours) / min(theirs):.2f} x")
    print(f"the same {K} rows for {100 * same:.1f} % of the queries")
    print(f"{(max(seen) - seen[0]) / 2**30:.2f} GiB beyond the descriptors (at most: 1)")


def from_a_file(count: int, folder: Path) -> None:
    """Memory and seconds of searching a mapped file."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "database.npy"
        database = np.lib.format.open_memmap(file, "w+", np.float32, ON_DISK)
        for begin in range(0, ON_DISK[0], PART):
            database[begin : begin + PART] = vectors(PART, ON_DISK[1], begin)
        database.flush()
        del database
        database = np.load(file, mmap_mode="r")
        wanted = np.linspace(0, ON_DISK[0] - 1, count).astype(int)
        queries = np.array(database[wanted])
        began = time.perf_counter()
        with watched() as seen:
            _, found = search(queries, database, K)
        seconds = time.perf_counter() - began
        assert (found[:, 0] == wanted).all()
        print(f"{count} queries, {ON_DISK[0]} x {ON_DISK[1]} in a file: {seconds:.1f} s,")
        print(f"{(max(seen) - seen[0]) / 2**30:.2f} GiB beside the file (at most: 1)")
        del database


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="default: that of temporary files")
    args = parser.parse_args()
    beside_faiss(args.queries)
    from_a_file(args.queries, args.folder)


if __name__ == "__main__":
    main()
