"""Task 3: descriptors, exact search and recall@K.

    python eval.py --checkpoint output/checkpoints/netvlad_final.pth --dataset dataset --split val
    python eval.py --query photo.jpg --index folder --picture found.png   # in any folder of images

As a module: compute_embeddings(), evaluate_recall(). Works when copied out alone together with
model.py; only --split needs base.py, which reads the lists, and --picture reporting/.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputError,
    NetVLADModel,
    blame_input,
    choose_device,
    load_checkpoint,
    refuse,
)

SEARCH_CELLS = 2**25  # most entries of a queries x database matrix held at a time
BOOTSTRAP_DRAWS = 1000
RECALL_VALUES = tuple(range(1, 21))
IMAGE_SIZE = 224
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRANSFORM = transforms.Compose([
    transforms.Resize((IMAGE_SIZE, IMAGE_SIZE)),
    transforms.ToTensor(),
    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
])  # fmt: skip


def load_image(path: Path | str, at_least: int | None = None) -> Image.Image:
    """An 8-bit RGB image, upright, 16-bit gray reduced. InputError naming a file that does not decode.

    at_least: a JPEG may be decoded to a half, a quarter or an eighth of its size, down to this many
    pixels a side, which takes a fraction of the time.
    """
    try:
        with Image.open(path) as file:
            if at_least:
                file.draft("RGB", (at_least, at_least))
            image = ImageOps.exif_transpose(file)  # photos of a phone note how it was held
            if image.mode.startswith("I"):  # Pillow clips 16 bit to 8 instead of scaling
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {path} cannot be read ({error}): replace it.") from None


def rank_and_world() -> tuple[int, int]:
    """The number of this process among those of torchrun, and how many there are; (0, 1) without."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def own_batches(count: int, size: int) -> list[list[int]]:
    """The batches of range(count) that this process computes, one for each round of `all_batches`.

    Their bounds do not depend on the number of processes. When the batches run out in the last round,
    the last one is computed by several.
    """
    rank, world = rank_and_world()
    batches = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    return [batches[min(i + rank, len(batches) - 1)] for i in range(0, len(batches), world)]


def all_batches(results: Iterable[torch.Tensor], count: int, size: int) -> Iterator[torch.Tensor]:
    """The results (B, …) for all batches in order, from those that each process has for its own."""
    _, world = rank_and_world()
    done = 0
    for result in results:
        parts = [result]
        if world > 1:
            padded = result.new_zeros(size, *result.shape[1:])
            padded[: len(result)] = result
            raw = padded.view(torch.uint8)  # gloo knows no bfloat16
            raws = [torch.empty_like(raw) for _ in range(world)]
            dist.all_gather(raws, raw)
            parts = [part.view(result.dtype) for part in raws]
        for part in parts:
            yield part[: max(0, min(size, count - done))]
            done += size


def embed(
    models: Sequence[NetVLADModel], dataset: Dataset, device: torch.device | str,
    batch_size: int = 32, workers: int = 0, desc: str = "embedding",
) -> tuple[list[np.ndarray], list[int], list[str]]:  # fmt: skip
    """Descriptors of a data set by several models that share their frozen trunk, read once.

    dataset: items (image (3, H, W), index, path). All models must have the same `first_trained` and
    the same weights below it. -> (a float32 array (n, D) for each model, indices, paths).
    """
    device = torch.device(device)
    for model in models:
        model.to(device, memory_format=torch.channels_last).eval()
    shared = models[0].first_trained if len(models) > 1 else 0
    named: dict[int, tuple[int, str]] = {}
    batches = own_batches(len(dataset), batch_size)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)

    def descriptors() -> Iterator[torch.Tensor]:
        for rows, (images, numbers, names) in zip(batches, loader):
            named.update(zip(rows, zip(map(int, numbers), names)))
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), models[0].autocast(device):
                trunk = models[0].trunk[:shared](images)
                yield torch.cat([model(trunk, shared).float() for model in models], dim=1)

    width = models[0].netvlad.centers.numel()
    found, done = torch.empty(len(models), len(dataset), width), 0
    with tqdm(total=len(dataset), desc=desc, unit="image", leave=False, disable=None) as bar:
        for part in all_batches(descriptors(), len(dataset), batch_size):
            each = part.unflatten(1, (len(models), width)).transpose(0, 1)
            found[:, done : done + len(part)] = each.cpu()
            done += len(part)
            bar.update(len(part))
    if rank_and_world()[1] > 1:
        everyone: list = [None] * rank_and_world()[1]
        dist.all_gather_object(everyone, named)
        named = {row: item for items in everyone for row, item in items.items()}
    indices, paths = zip(*(named[row] for row in range(len(dataset)))) if named else ((), ())
    return list(found.numpy()), list(indices), list(paths)


def compute_embeddings(
    model: NetVLADModel, dataset: Dataset, device: torch.device | str, batch_size: int = 32
) -> tuple[np.ndarray, list[int], list[str]]:
    """Descriptors of a data set of (image, index, path): (array (n, D) float32, indices, paths)."""
    (descriptors,), indices, paths = embed([model], dataset, device, batch_size)
    return descriptors, indices, paths


def search(
    queries: np.ndarray, database: np.ndarray, k: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `database` for each query, exactly, by inner product.

    queries (nq, D), database (nd, D), rows of norm 1 -> similarity, index, both (nq, min(k, nd)),
    best first; equal similarities in the order of the database. At most SEARCH_CELLS similarities
    are held at a time.
    """
    k = min(k, len(database))
    base = torch.from_numpy(database).to(device)
    rows = max(1, SEARCH_CELLS // max(1, len(database)))
    values, indices = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.long)]
    for chunk in torch.from_numpy(queries).split(rows):
        similarity = chunk.to(device) @ base.T
        value, index = _stable_topk(similarity, k)
        values.append(value.cpu())
        indices.append(index.cpu())
    return torch.cat(values).numpy(), torch.cat(indices).numpy()


def _stable_topk(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk with ties in column order: torch.topk itself promises no order among equal values."""
    value, index = similarity.topk(k, dim=1)
    index, by_index = index.sort(dim=1)
    value, by_value = value.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, by_value)
    split_tie = ((similarity >= value[:, -1:]).sum(dim=1) > k).nonzero().flatten()
    if len(split_tie):  # more columns equal the k-th value than fit: take the first of them
        full, order = similarity[split_tie].sort(dim=1, descending=True, stable=True)
        value[split_tie], index[split_tie] = full[:, :k], order[:, :k]
    return value, index


def positives_within(utmQ: np.ndarray, utmDb: np.ndarray, threshold: float) -> list[np.ndarray]:
    """For each query the database rows at most `threshold` meters away; the nearest if there is none."""
    found: list[np.ndarray] = []
    rows = max(1, SEARCH_CELLS // 8 // max(1, len(utmDb)))
    for begin in range(0, len(utmQ), rows):
        difference = utmQ[begin : begin + rows, None] - utmDb[None]
        distance = np.hypot(difference[..., 0], difference[..., 1])
        for row in distance:
            near = np.flatnonzero(row <= threshold)
            found.append(near if len(near) else row.argmin(keepdims=True))
    return found


def first_hits(ranking: np.ndarray, positives: Sequence[np.ndarray]) -> np.ndarray:
    """Rank (0 = best) of each query's first positive in `ranking` (nq, k); k if none is among them."""
    right = np.array([np.isin(row, p) for row, p in zip(ranking, positives)], dtype=bool)
    right = right.reshape(ranking.shape)
    return np.where(right.any(axis=1), right.argmax(axis=1), ranking.shape[1])


def recall_interval(
    hits: np.ndarray, recall_values: Sequence[int], seed: int = 0
) -> tuple[list[float], list[float]]:
    """95 % bootstrap interval (percentiles, queries redrawn) of recall at each K from `first_hits`."""
    answered = hits[:, None] < np.asarray(recall_values)
    weights = np.random.default_rng(seed).multinomial(
        len(hits), np.full(len(hits), 1 / len(hits)), BOOTSTRAP_DRAWS
    )
    low, high = np.percentile(weights @ answered / len(hits), [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()


def chance_recall(
    positives: Sequence[np.ndarray], database_size: int, recall_values: Sequence[int]
) -> list[float]:
    """Expected recall at each K of a random ranking: 1 - C(D - P, K) / C(D, K), mean over queries."""
    counts = np.array([len(p) for p in positives])
    drawn = np.arange(min(max(recall_values), database_size))
    miss = np.clip(database_size - counts[:, None] - drawn, 0, None) / (database_size - drawn)
    recall = 1 - miss.cumprod(axis=1).mean(axis=0)
    return [float(recall[min(k, database_size) - 1]) for k in recall_values]


def print_recall(hits: np.ndarray, recall_values: Sequence[int]) -> dict[int, int]:
    """Print the assignment's line for each K; K -> number of queries answered."""
    answered = {k: int((hits < k).sum()) for k in recall_values}
    for k, count in answered.items():
        print(f"Recall@{k}: {count}/{len(hits)} = {100 * count / len(hits):.2f}%")
    return answered


@dataclass(frozen=True)
class Recall:
    """Recall of a model on one split. section: curves for metrics.json, lists over K = 1 … 20 in 0..1.

    similarity, ranking: (nq, 20) of the last model; hits: (nq,) rank of the first positive, 0 = best.
    """

    section: dict
    similarity: np.ndarray
    ranking: np.ndarray
    hits: np.ndarray
    positives: list[np.ndarray]


def measure_recall(
    models: Sequence[NetVLADModel], query_ds: Dataset, db_ds: Dataset, utm_query: np.ndarray,
    utm_index: np.ndarray, threshold: float, device: torch.device, *, workers: int = 0, seed: int = 0,
    desc: str = "",
) -> Recall:  # fmt: skip
    """Recall@1..20 of the last of `models` ("trained") beside the first ("untrained") and chance."""
    options = {"device": device, "workers": workers}
    queries, _, _ = embed(models, query_ds, desc=f"{desc} queries", **options)
    index, _, _ = embed(models, db_ds, desc=f"{desc} index images", **options)
    positives = positives_within(utm_query, utm_index, threshold)
    found = [search(q, d, RECALL_VALUES[-1], device) for q, d in zip(queries, index)]
    hits = [first_hits(ranking, positives) for _, ranking in found]
    curves = [[float((h < k).mean()) for k in RECALL_VALUES] for h in hits]
    low, high = recall_interval(hits[-1], RECALL_VALUES, seed)
    section = {
        "queries": len(query_ds), "index": len(db_ds), "k": list(RECALL_VALUES),
        "trained": curves[-1], "untrained": curves[0], "low": low, "high": high,
        "chance": chance_recall(positives, len(db_ds), RECALL_VALUES),
    }  # fmt: skip
    return Recall(section, *found[-1], hits[-1], positives)


def evaluate_recall(
    model: NetVLADModel,
    query_ds: Dataset,
    db_ds: Dataset,
    utmQ: np.ndarray,
    utmDb: np.ndarray,
    posDistThr: float,
    device: torch.device | str,
    recall_values: Sequence[int] = [1, 5, 10],
) -> dict[int, int]:
    """Recall@K by cosine similarity: prints a line a K, returns K -> number of queries answered.

    query_ds, db_ds: items (image, index, path); utmQ (nq, 2), utmDb (nd, 2) in meters, in their
    order. A positive is a database image within posDistThr; a query with none takes its nearest.
    """
    queries, _, _ = compute_embeddings(model, query_ds, device)
    database, _, _ = compute_embeddings(model, db_ds, device)
    _, ranking = search(queries, database, max(recall_values), device)
    positives = positives_within(np.asarray(utmQ), np.asarray(utmDb), float(posDistThr))
    return print_recall(first_hits(ranking, positives), recall_values)


class ImageFiles(Dataset):
    """Image files: item (image (3, H, W) as the network wants it, index, path)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        return TRANSFORM(load_image(self.paths[i], IMAGE_SIZE)), i, str(self.paths[i])


def find_images(folder: Path, left_out: Sequence[Path]) -> list[Path]:
    """The image files in a folder and below, sorted, without those of `left_out`. InputError if none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    others = {path.resolve() for path in left_out}
    kept = [path for path in found if path.resolve() not in others]
    if not kept:
        raise InputError(f"{folder} holds no image ({' '.join(IMAGE_SUFFIXES)}) to search: name another --index.")
    return kept


def search_folder(args: argparse.Namespace) -> None:
    """Print each query's most similar images of a folder, and draw them if --picture says so."""
    if args.index is None:
        raise InputError("--query needs --index FOLDER, the images to search in.")
    if args.top_k < 1:
        raise InputError(f"--top-k {args.top_k} names no image: use 1 or more.")
    index = find_images(args.index, args.query)
    model, device = load_checkpoint(args.checkpoint), choose_device(args.device)
    queries, _, _ = compute_embeddings(model, ImageFiles(args.query), device)
    database, _, _ = compute_embeddings(model, ImageFiles(index), device)
    similarity, ranking = search(queries, database, args.top_k, device)
    print(f"{len(args.query)} queries, {len(index)} images in {args.index}; cosine similarity, best first.")
    for query, values, rows in zip(args.query, similarity, ranking):
        print(query)
        for rank, (value, row) in enumerate(zip(values, rows), start=1):
            print(f"{rank:4d}  {value:.4f}  {index[row]}")
    if args.picture:
        from reporting import figures  # only here: this file works without reporting/

        rows = [
            figures.GalleryRow(str(query), [(str(index[row]), float(value), None, None) for value, row in zip(*found)], None)
            for query, *found in zip(args.query, similarity, ranking)
        ]
        with blame_input():
            figures.retrieval_picture(args.picture, rows, f"The most similar images in {args.index}")
        print(f"Written: {args.picture}")


def recall_of_lists(args: argparse.Namespace) -> None:
    """Recall@1/5/10 of a checkpoint on the lists of a data set."""
    from base import find_dataset, read_split  # only here: this file works without base.py

    model = load_checkpoint(args.checkpoint)
    split = read_split(find_dataset(args.dataset)[0], args.split)
    if split is None:
        raise InputError(f"there is no {args.split} list: choose --split val.")
    evaluate_recall(
        model, split.queries, split.index, split.utm_query, split.utm_index, split.threshold,
        choose_device(args.device),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Recall of a checkpoint, or with --query a search in a folder. Exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description="Recall@1/5/10 of a trained model, or retrieval in a folder.")
    option = parser.add_argument
    option(
        "--checkpoint", type=Path, default=Path("output/checkpoints/netvlad_final.pth"),
        help="state dict that base.py wrote (default: %(default)s)",
    )  # fmt: skip
    option("--dataset", type=Path, help="folder of the lists (default: as base.py)")
    option("--split", default="val", choices=["train", "val", "test"], help="default: %(default)s")
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="search these images in --index instead")
    option("--index", type=Path, metavar="FOLDER", help="images to search in, also in folders below")
    option("--top-k", type=int, default=5, help="images to name for a query (default: %(default)s)")
    option("--picture", type=Path, metavar="FILE", help="draw the queries and what was found (.png)")
    option("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a path in letters that the console lacks is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.query:
            search_folder(args)
        else:
            recall_of_lists(args)
    except InputError as error:
        return refuse("eval.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
