"""What the scripts say while they work."""

import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version

import numpy
import PIL
import torch

from eval import Screen, open_streams, unusable_files_named
from model import progress

_screen = sys.stdout  # what `always_printed` prints to: the standard output that `on_screen` found


@contextmanager
def on_screen(quiet: bool = False) -> Iterator[None]:
    """What a script runs in: no progress bars where nobody sees them, neither a character nor a closed
    pipe stops it, and files that cannot be used are named (InputError).

    quiet: nothing of what is printed appears, nor bars, but for what is printed inside
    `always_printed`; warnings, on stderr, do. A character that the console's encoding lacks is
    printed as an escape.
    """
    global _screen
    open_streams()
    _screen, progress.hidden = Screen(sys.stdout), quiet
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with (
            open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere,
            redirect_stdout(nowhere if quiet else _screen),
            unusable_files_named(),
        ):
            yield
    finally:
        progress.hidden = False
        _screen.flush()


@contextmanager
def always_printed() -> Iterator[None]:
    """What is printed in here appears also when the script is quiet."""
    with redirect_stdout(_screen):
        yield


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Name a phase on the screen and note in `seconds` how long it took."""
    began = time.perf_counter()
    print(f"- {name} ...", flush=True)
    yield
    seconds[name] = time.perf_counter() - began


def versions() -> dict[str, str]:
    """Versions of Python and of the packages, and the machine, for metrics and report."""
    packages = {"torch": torch, "numpy": numpy, "pillow": PIL}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    found = {name: package.__version__ for name, package in packages.items()}
    with suppress(PackageNotFoundError):  # not imported for its number: that takes a second
        found["torchvision"] = version("torchvision")
    return {"python": platform.python_version(), **found, "machine": machine}


def print_method_table(section: dict) -> None:
    """Median errors of each method, of all queries and of retrieval alone. section: of metrics.json."""
    count = {"count": section["queries"]}
    lines = {**section["methods"], "all": {**count, **section}}
    lines["top-1 retrieval alone"] = {**count, **section["retrieval"]}
    print(f"\n{'method':32s}{'queries':>8s}{'median m':>10s}{'median deg':>12s}")
    for name, line in lines.items():
        medians = line.get("median_m", math.nan), line.get("median_deg", math.nan)
        print(f"{name:32s}{line['count']:8d}{medians[0]:10.4f}{medians[1]:12.3f}")


def print_recall_table(recall: dict[str, dict]) -> None:
    """Recall at 1, 5 and 10 in %, a line for each list and model, and what training gained.

    recall: as in metrics.json.
    """
    print(f"\n{'':14s}{'R@1':>8s}{'R@5':>8s}{'R@10':>8s}   (%)")
    for name, curves in recall.items():
        for kind in ("trained", "untrained", "chance"):
            values = "".join(f"{100 * curves[kind][k - 1]:8.1f}" for k in (1, 5, 10))
            print(f"{name:4s} {kind:9s}{values}")
        gain, low, high = (100 * value for value in curves["gain"])
        interval = f"(95 %, paired bootstrap: {low:+.1f} to {high:+.1f})"
        print(f"{name:4s} gain     {gain:+8.1f}   {interval}")
