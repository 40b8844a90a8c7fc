"""The built-in sample: a small town and four indoor scenes, in exactly the assignment's layout.

    python -m dataset.sample                       # renders dataset/sample/rendered/
    python -m dataset.sample --output DIR --seed 1

Everything is a textured parallelogram (render.py) with a painted texture (paint.py), put together
to streets (town.py) and rooms (rooms.py); so the truth is exact by construction.
"""

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import SAMPLE
from dataset.sample.rooms import render_room
from dataset.sample.town import POS_DIST_THR_M, SPLITS, Panorama, plan_town, render_street
from model import InputError, progress, usable_cores

STALE_SECONDS = 3600


@dataclass(frozen=True)
class Size:
    """How much is rendered: streets of each split, panoramas of a street (queries, index), yaws of
    a panorama, pixels; scenes, their frames and pixels."""

    streets: tuple[int, int, int] = (20, 10, 6)
    panoramas: tuple[int, int] = (2, 2)
    yaws: int = 5
    town_px: tuple[int, int] = (320, 240)
    scenes: int = 4
    frames: int = 24
    room_px: tuple[int, int] = (640, 480)


FULL = Size()
TINY = Size((5, 2, 1), (1, 2), 2, (128, 96), scenes=2, frames=12, room_px=(320, 240))


def settings(seed: int, size: Size | None) -> dict:
    """What a rendering depends on: this code, the seed and the size, as JSON would give it back."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return json.loads(
        json.dumps({"code": code.hexdigest(), "seed": seed, "size": size and asdict(size)})
    )


def is_rendered(root: Path, seed: int = 0, size: Size = FULL) -> bool:
    """Whether `root` holds a complete rendering by this very code with this seed and size."""
    return is_made(root, settings(seed, size))


def is_made(root: Path, made: dict) -> bool:
    """Whether `root` holds a complete rendering of which `made` says all."""
    try:
        return json.loads((Path(root) / "sample.json").read_text()) == made
    except (OSError, ValueError):
        return False


def render_sample(root: Path = SAMPLE, seed: int = 0, workers: int = 0, size: Size = FULL) -> None:
    """Render the sample into `root`, replacing an older one; on `workers` threads (0: every core)."""
    workers = workers or usable_cores()
    write_rendering(
        root, settings(seed, size), lambda partial: _render_all(partial, seed, size, workers)
    )


def write_rendering(root: Path, made: dict, fill: Callable[[Path], None]) -> None:
    """Let `fill` render into `root`, replacing an older rendering; `made` says all of it.

    The work is done in a folder beside it which takes its name when complete, so that a rendering
    cut short leaves nothing that looks finished. Raises InputError if `root` holds anything else,
    or if it cannot be written.
    """
    root = Path(root)
    ours = root.is_dir() and ((root / "sample.json").exists() or not any(root.iterdir()))
    if root.exists() and not ours:
        raise InputError(
            f"{root} is there already and is not a rendered sample; name an empty folder"
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for stale in root.parent.glob(f".{root.name}.partial-*"):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
        try:
            fill(partial)
            (partial / "sample.json").write_text(json.dumps(made))
            if root.exists():
                shutil.rmtree(root)
            partial.chmod(0o755)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = f"the sample (60 MB) cannot be written to {root} ({error.strerror or error})"
        raise InputError(f"{reason}: free the disk or name a folder that is writable") from error


def _render_all(root: Path, seed: int, size: Size, workers: int) -> None:
    """Render everything into the empty folder `root`; rooms first, they take longest."""
    for name in ("query", "index", "gt"):
        (root / name).mkdir()
    bar = progress(unit="image", desc="rendering the sample")
    jobs: list[tuple] = [
        (render_room, root, scene, size.frames, size.room_px, seed) for scene in range(size.scenes)
    ]
    bar.total = size.scenes * size.frames
    for number, (split, streets) in enumerate(zip(SPLITS, size.streets)):
        panoramas = plan_town(split, streets, *size.panoramas, size.yaws, seed)
        bar.total += _write_lists(root, split, panoramas)
        for street in range(streets):
            here = [p for p in panoramas if p.street == street]
            jobs.append((render_street, root, here, size.town_px, [seed, number, street]))
    run_jobs(jobs, workers, bar)


def run_jobs(jobs: list[tuple], workers: int, bar: tqdm) -> None:
    """Call each job, (function, arguments …), with a last argument to be called after each image."""
    cancelled, lock = threading.Event(), threading.Lock()

    def tick() -> None:
        with lock:
            bar.update()
        if cancelled.is_set():
            raise InterruptedError("another part of the sample could not be rendered")

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in as_completed([pool.submit(*job, tick) for job in jobs]):
            done.result()
    finally:  # after an error or Ctrl-C the others stop at their next image
        cancelled.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        bar.close()


def _write_lists(root: Path, split: str, panoramas: list[Panorama]) -> int:
    """Lists and positions of a split, in the assignment's format; the number of images."""
    images, utm = {}, {}
    for name, is_query in (("query", True), ("index", False)):
        chosen = [p for p in panoramas if p.is_query == is_query]
        images[name] = [file for p in chosen for file in p.files()]
        utm[name] = np.array([p.utm_m for p in chosen for _ in p.views_deg])
        (root / f"{name}_{split}.txt").write_text("".join(f"{file}\n" for file in images[name]))
    truth = root / "gt" / f"pitts30k_{split}.npz"
    np.savez(truth, utmQ=utm["query"], utmDb=utm["index"], posDistThr=POS_DIST_THR_M)
    return sum(map(len, images.values()))
