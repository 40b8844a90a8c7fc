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
