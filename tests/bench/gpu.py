"""Pittsburgh-sized random data on a GPU: seconds of each phase, share of the card's peak, bf16 and float32.

    python tests/bench/gpu.py FOLDER [--places 417] [--steps 100] [--precisions auto]

Run by hand. FOLDER gets the images, 24 views at each place and 18 queries beside it, unless it has them.
The peak is what a product of two matrices of SIDE x SIDE reaches here in the same precision; shares count
the network's products, three times as many in a step of training. Nothing can be learned from these images.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lists import LoadDataset, read_split
from eval import compute_embeddings, search
from model import (
    NetVLADModel,
    calibrate_trunk,
    choose_device,
    half_type,
    initialize_netvlad,
    usable_cores,
)
from train import train
from training.inputs import Inputs, Store
from training.mining import REFRESH_QUERIES, TupleLoader

SIDE = 8192
VIEWS, QUERIES, STREET_PLACES = 24, 18, 20  # at a place; places in a row
STEP_M, STREET_M, BESIDE_M = 10.0, 60.0, 4.0
PHOTO_PX = (640, 480)


def write_data(root: Path, places: int) -> None:
    """Lists, positions and photographs of colored noise in the assignment's layout."""
    rng = np.random.default_rng(0)
    at = np.array([[STEP_M * (i % STREET_PLACES), STREET_M * (i // STREET_PLACES)] for i in range(places)])
    counts = {"index": VIEWS, "query": QUERIES}
    (root / "gt").mkdir(parents=True)
    utm = {kind: np.repeat(at, count, axis=0) for kind, count in counts.items()}
    utm["query"] = utm["query"] + rng.uniform(-BESIDE_M, BESIDE_M, utm["query"].shape)
    for kind, rows in utm.items():
        (root / kind).mkdir()
        names = [f"{kind}/{row}.jpg" for row in range(len(rows))]
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda name: _photo(root / name), names))
        for split in ("train", "val"):
            (root / f"{kind}_{split}.txt").write_text("".join(f"dataset/{name}\n" for name in names))
    for split in ("train", "val"):
        truth = root / "gt" / f"pitts30k_{split}.npz"
        np.savez(truth, utmQ=utm["query"], utmDb=utm["index"], posDistThr=25.0)


def _photo(path: Path) -> None:
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(PHOTO_PX, Image.Resampling.BICUBIC).save(path, quality=85)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, what the device still does included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large product."""
    side = SIDE if device.type == "cuda" else SIDE // 8
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    took = [seconds(lambda: [a @ b for _ in range(5)], device) / 5 for _ in range(3)]
    return 2 * side**3 / min(took)


def measure(data: LoadDataset, precision: str, device: torch.device, steps: int) -> None:
    """Print every phase in one precision."""
    dtype = half_type(device, precision) or torch.float32
    most = peak(device, dtype)
    print(f"\n{precision} ({dtype}): {most / 1e12:.1f} TFLOP/s in a large product", flush=True)
    torch.manual_seed(0)
    model = NetVLADModel(pretrained=False)
    model.precision = precision
    model.to(device)
    calibrate_trunk(model, torch.stack([data.index[i][0] for i in range(16)]).to(device))
    initialize_netvlad(model, [torch.stack([data.index[i][0] for i in range(32)])], device)
    flops, frozen = (flops_of(work, data.index[0][0].to(device)) for work in (model, model.frozen_part))
    inputs = Inputs(model, [data.queries, data.index], device, Store(Path("."), device=device))

    def say(what: str, took: float, images: int = 0, each: float = 0.0) -> None:
        rate = f", {images / took:8.0f} images a second" if images else ""
        share = f", {100 * images * each / took / most:5.1f} % of the peak" if each else ""
        print(f"{what:52s} {took:7.2f} s{rate}{share}", flush=True)

    batch = torch.zeros(64, *data.index[0][0].shape, device=device).contiguous(memory_format=torch.channels_last)

    def network() -> None:
        with torch.inference_mode(), model.autocast(device):
            for _ in range(10):
                model(batch)

    network()
    say("network alone, batches of 64", seconds(network, device), 640, flops)
    say("JPEG to the frozen trunk's outputs, all", seconds(inputs.cache, device), len(inputs), frozen)
    rows = np.arange(len(data))
    tuples = TupleLoader(data, inputs, rows[:-100], rows[-100:])
    took = seconds(lambda: tuples.describe_index(model), device)
    say("descriptors of the index from them", took, len(data.index), flops - frozen)
    took = seconds(lambda: tuples.draw(model, rows[:REFRESH_QUERIES], [0, 0], True), device)
    say(f"hard negatives of {REFRESH_QUERIES} queries among them", took)
    drawn = tuples.draw(model, rows[: steps * tuples.batch_size], [0, 0], True)
    batches = [tuples.fetch(drawn[i : i + tuples.batch_size]) for i in range(0, len(drawn), tuples.batch_size)]
    images = sum(len(q) + len(p) + n.shape[0] * n.shape[1] for q, p, n in batches)
    train(model, batches[:8], [], device, epochs=1)
    took = seconds(lambda: train(model, batches, [], device, epochs=1), device)
    say(f"{len(batches)} steps of {tuples.batch_size} tuples", took, images, 3 * (flops - frozen))
    few = data.index
    took = seconds(lambda: compute_embeddings(model, few, device), device)
    say("JPEG to descriptor, the index", took, len(few), flops)
    rng = np.random.default_rng(0)
    q, d = (rng.standard_normal((n, model.descriptor_dim), np.float32) for n in (len(data), len(few)))
    say(f"search {len(q)} x {len(d)}", seconds(lambda: search(q, d, 10, device), device))


def flops_of(work: Callable[[torch.Tensor], object], image: torch.Tensor) -> float:
    """Multiplications and additions of the products in a network."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work(image[None])
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--places", type=int, default=417)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precisions", nargs="+", default=["auto", "float32"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    if not args.folder.exists():
        print(f"writing images: {seconds(lambda: write_data(args.folder, args.places), device):.0f} s")
    data = read_split(args.folder, "train")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    print(f"{name}, {usable_cores()} cores; {len(data)} queries, {len(data.index)} index images")
    for precision in args.precisions:
        measure(data, precision, device, args.steps)


if __name__ == "__main__":
    main()
