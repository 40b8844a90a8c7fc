"""What the scripts say while they work."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import PIL
import torch
import torchvision


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Name a phase on the screen and note in `seconds` how long it took."""
    began = time.perf_counter()
    print(f"- {name} …", flush=True)
    yield
    seconds[name] = time.perf_counter() - began


def versions() -> dict[str, str]:
    """Versions of Python and of the packages, for metrics and report."""
    packages = {"torch": torch, "torchvision": torchvision, "numpy": numpy, "pillow": PIL}
    return {"python": platform.python_version(), **{k: v.__version__ for k, v in packages.items()}}


def print_recall_table(recall: dict[str, dict]) -> None:
    """Recall at 1, 5 and 10 in %, a line for each list and model. recall: as in metrics.json."""
    print(f"\n{'':14s}{'R@1':>8s}{'R@5':>8s}{'R@10':>8s}   (%)")
    for name, curves in recall.items():
        for kind in ("trained", "untrained", "chance"):
            values = "".join(f"{100 * curves[kind][k - 1]:8.1f}" for k in (1, 5, 10))
            print(f"{name:4s} {kind:9s}{values}")
