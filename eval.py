"""Task 3: descriptors, exact search and recall@K.

    python eval.py --checkpoint output/checkpoints/netvlad_final.pth --dataset dataset --split val
    python eval.py --query photo.jpg --index folder --picture found.png   # in any folder of images
    python eval.py --dataset_name=pitts30k --resume=logs/…/best_model.pth     # recognition/'s systems

As a module: compute_embeddings(), evaluate_recall(). Works when copied out alone together with
model.py; only --split needs dataset/, which reads the lists, and --picture reporting/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset

from model import (
    IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputError,
    choose_device,
    load_checkpoint,
    progress,
    refuse,
    usable_cores,
    warn,
)

SEARCH_CELLS = 2**25  # most entries of a queries x database matrix held at a time
SEARCH_BLOCK = 2**26  # most numbers of the database that are read at a time
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
UNREAD_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".pgm", ".ppm", ".exr", ".dng")
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)  # of floats; of 8, 10, 12, 14 and 16 bits
# What does not decode is named by its file; Pillow's own words name none.
warnings.filterwarnings("ignore", module=r"PIL\.")


def transform_to(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """What makes of an RGB image the network's input (3, size, size)."""
    return partial(_squared, size)


def _squared(size: int, image: Image.Image) -> torch.Tensor:
    return normalized(image.resize((size, size), Image.Resampling.BILINEAR))


def normalized(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W) float32, normalized by ImageNet's statistics."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.div(255).sub_(mean).div_(std)


TRANSFORM = transform_to(IMAGE_SIZE)


def transform_of(model: nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    """What makes of an RGB image the input of a model: its own `transform`, or squares of its size."""
    return getattr(model, "transform", None) or transform_to(model.image_size)


def load_image(path: Path | str, at_least: int | None = None) -> Image.Image:
    """An 8-bit RGB image, upright. InputError naming a file that does not decode.

    at_least: a JPEG may be decoded to a half, a quarter or an eighth of its size, down to this many
    pixels a side, which takes a fraction of the time.
    """
    try:
        with Image.open(path) as file:
            if at_least:
                file.draft("RGB", (at_least, at_least))
            image = ImageOps.exif_transpose(file)  # photos of a phone note how it was held
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(to_8_bit(np.asarray(image)))
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"the image {path} does not exist: correct the name.") from None
    except Image.DecompressionBombError:
        most = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise InputError(f"the image {path} has more than {most}: make it smaller.") from None
    except Exception as error:  # Pillow raises all kinds for a damaged file
        mend = "name the images in it" if os.path.isdir(path) else "replace it"
        raise InputError(f"the image {path} cannot be read ({error}): {mend}.") from error


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of gray values of more bits, or floats, by the least full scale that holds them.

    What lies far above zero in a small part of its scale, as a thermal camera's temperatures do,
    and what no scale holds, is stretched from its least to its largest value, a few pixels aside.
    """
    values = np.asarray(values, dtype=np.float64)
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(known, [0.5, 99.5])
    top = next((scale for scale in FULL_SCALES if known.max() <= scale), None)
    if top is None or low < 0 or high - low < min(low, top / 4):
        low, top = (low, high - low) if high > low else (0, max(top or high, 1))
    else:
        low = 0
    return (np.nan_to_num(values - low).clip(0, top) * 255 / top).astype(np.uint8)


def read_batches(
    read: Callable[[int], tuple], batches: Iterable[Sequence[int]]
) -> Iterator[list[tuple]]:
    """The items `read(row)` of each batch of rows, in order, read by threads two batches ahead."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        ahead: deque = deque()
        try:
            for rows in batches:
                ahead.append([pool.submit(read, int(row)) for row in rows])
                if len(ahead) > 2:
                    yield [item.result() for item in ahead.popleft()]
            while ahead:
                yield [item.result() for item in ahead.popleft()]
        finally:  # what nobody will ask for any more need not be read
            for item in (item for items in ahead for item in items):
                item.cancel()


def describe(model: nn.Module, inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Descriptors (B, D) float32, on `device`, of a batch of images or other inputs of `model`.

    The model is any module that maps them to (B, D), on `device` and in evaluation mode.
    """
    inputs = inputs.to(device).contiguous(memory_format=torch.channels_last)
    autocast = model.autocast(device) if hasattr(model, "autocast") else contextlib.nullcontext()
    with torch.inference_mode(), autocast:
        return model(inputs).float()


def compute_embeddings(
    model: nn.Module, dataset: Dataset, device: torch.device | str, batch_size: int = 32
) -> tuple[np.ndarray, list[int], list[str]]:
    """Descriptors of a data set of (image, index, path, …): (array (n, D) float32, indices, paths).

    model: a NetVLADModel, or any module that maps (B, 3, H, W) to (B, D); within nn.DataParallel too.
    Where the hardware computes in bfloat16, ours does, unless its `precision` is "float32".
    """
    device = torch.device(device)
    model = getattr(model, "module", model).to(device, memory_format=torch.channels_last).eval()
    count = len(dataset)
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    found, indices, paths = np.empty((0, 0), np.float32), [], []
    with progress(total=count, desc="descriptors", unit="image") as bar:
        for rows, items in zip(batches, read_batches(dataset.__getitem__, batches)):
            part = _describe_each(model, [torch.as_tensor(item[0]) for item in items], device)
            if not indices:
                found = np.empty((count, part.shape[1]), np.float32)
            found[rows.start : rows.stop] = part
            indices += [int(item[1]) for item in items]
            paths += [str(item[2]) for item in items]
            bar.update(len(items))
    return found, indices, paths


def _describe_each(
    model: nn.Module, images: list[torch.Tensor], device: torch.device
) -> np.ndarray:
    """Descriptors (B, D) of images, those of one size together."""
    shapes = [image.shape for image in images]
    parts = {}
    for shape in dict.fromkeys(shapes):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        found = describe(model, torch.stack([images[row] for row in rows]), device).cpu().numpy()
        parts.update(zip(rows, found))
    return np.stack([parts[row] for row in range(len(images))])


def search(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    device: torch.device | str = "cpu",
    by_distance: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `database` for each query, exactly, by inner product.

    queries (nq, D), database (nd, D), rows of norm 1 -> similarity, index, both (nq, min(k, nd)),
    best first; equal similarities in the order of the database. At most SEARCH_CELLS similarities
    are held at a time, and SEARCH_BLOCK numbers of the database are read, which may be a mapped file.
    by_distance: for rows of any norm, by Euclidean distance d: the similarity is 1 - d^2 / 2, as
    between rows of norm 1.
    """
    queries = torch.from_numpy(queries)
    values, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    step = max(1, SEARCH_BLOCK // max(1, database.shape[1]))
    for begin in range(0, len(database), step):
        block = database[begin : begin + step]
        block = block if block.flags.writeable else block.copy()  # torch takes no file read only
        base = torch.from_numpy(block).to(device)
        found = []
        for chunk in queries.split(max(1, SEARCH_CELLS // len(base))):
            chunk = chunk.to(device)
            similarity = chunk @ base.T
            if by_distance:
                of_query, of_base = (torch.linalg.vector_norm(x, dim=1).square() / 2 for x in (chunk, base))
                similarity += 1 - of_query[:, None] - of_base
            found.append([part.cpu() for part in _stable_topk(similarity, min(k, len(base)))])
        value, index = (torch.cat(parts) for parts in zip(*found))
        values, best = torch.cat([values, value], 1).sort(dim=1, descending=True, stable=True)
        values = values[:, :k]
        indices = torch.cat([indices, index + begin], 1).gather(1, best[:, :k])
    return values.numpy(), indices.numpy()


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


def print_recall(hits: np.ndarray, recall_values: Sequence[int]) -> dict[int, int]:
    """Print the assignment's line for each K; K -> number of queries answered."""
    answered = {k: int((hits < k).sum()) for k in recall_values}
    for k, count in answered.items():
        print(f"Recall@{k}: {count}/{len(hits)} = {100 * count / len(hits):.2f}%")
    return answered


def evaluate_recall(
    model: nn.Module,
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
    InputError where images and positions differ in number, there are none, or one is not finite.
    """
    utmQ, utmDb, threshold = (np.asarray(value, dtype=float) for value in (utmQ, utmDb, posDistThr))
    for name, utm, images in (("utmQ", utmQ, query_ds), ("utmDb", utmDb, db_ds)):
        if len(utm) != len(images):
            raise InputError(f"{name} has {len(utm)} rows for {len(images)} images: give a row an image.")
        if not len(utm) or not np.isfinite(utm).all():
            wrong = "values that are not finite" if len(utm) else "no row"
            raise InputError(f"{name} has {wrong}: give the positions of the images, in meters.")
    queries, _, _ = compute_embeddings(model, query_ds, device)
    database, _, _ = compute_embeddings(model, db_ds, device)
    unit_norm = getattr(getattr(model, "module", model), "unit_norm", None)
    if unit_norm is None:  # not one of ours: the cosine divides by the lengths
        queries, database = (
            rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
            for rows in (queries, database)
        )
    by_distance = unit_norm is False
    _, ranking = search(queries, database, max(recall_values), device, by_distance)
    positives = positives_within(utmQ, utmDb, threshold.item())
    return print_recall(first_hits(ranking, positives), recall_values)


class ImageFiles(Dataset):
    """Image files: item (image as `model` wants it, index, path).

    model: its `image_size` is the side of the square images it is given, or if it has a `transform`,
    what this shrinks an image to at least.
    spare_unreadable: a file that cannot be read gives a black image; its row is in `unreadable`.
    """

    def __init__(
        self, paths: Sequence[Path], model: nn.Module, spare_unreadable: bool = False
    ) -> None:
        self.paths, self.size, self.transform = paths, model.image_size, transform_of(model)
        self.spare_unreadable = spare_unreadable
        self.unreadable: dict[int, InputError] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        try:
            image = load_image(self.paths[i], self.size)
        except InputError as error:
            if not self.spare_unreadable:
                raise
            self.unreadable[i] = error
            image = Image.new("RGB", (self.size, self.size))
        return self.transform(image), i, str(self.paths[i])

    def readable(self) -> list[int]:
        """The rows that could be read, once all have been asked for; a warning names the others."""
        if self.unreadable:
            first = self.unreadable[min(self.unreadable)]
            warn(f"{len(self.unreadable)} of {len(self)} images are left out: {first}")
        return [row for row in range(len(self)) if row not in self.unreadable]


def list_images(folder: Path, pattern: str = "*") -> list[Path]:
    """The image files in a folder that match `pattern`, numbers in their names in order of size.

    Hidden files are passed over: a Mac leaves a `._name.png` beside each image. Files that look
    like images but are of a kind that is not read are warned of.
    """
    there = [
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    unread = [path.name for path in there if path.suffix.lower() in UNREAD_SUFFIXES]
    if unread:
        warn(
            f"{folder} holds {len(unread)} files of a kind that is not read ({min(unread)} …): "
            "left out; convert them to .png or .jpg."
        )
    # A link whose image is gone counts: the others keep their places.
    images = [p for p in there if p.suffix.lower() in IMAGE_SUFFIXES and (p.is_file() or p.is_symlink())]
    return sorted(images, key=lambda path: (number_order(str(path)), str(path)))


def number_order(name: str) -> str:
    """A key that puts frame_2 before frame_10; digits after a decimal point stay as they are."""
    return re.sub(r"(?<![0-9])(?<![0-9]\.)[0-9]+", lambda digits: digits[0].zfill(20), name)


def find_images(folder: Path, left_out: Sequence[Path]) -> list[Path]:
    """The image files in a folder and below without those of `left_out`. InputError if none."""
    others = {path.resolve() for path in left_out}
    kept = [path for path in list_images(folder, "**/*") if path.resolve() not in others]
    if not kept:
        raise InputError(
            f"{folder} holds no image ({' '.join(IMAGE_SUFFIXES)}) to search: name another --index."
        )
    return kept


def search_folder(args: argparse.Namespace, load: Callable[[], nn.Module]) -> None:
    """Print each query's most similar images of a folder, and draw them if --picture says so."""
    if args.index is None:
        raise InputError("--query needs --index FOLDER, the images to search in.")
    if args.top_k < 1:
        raise InputError(f"--top-k {args.top_k} names no image: use 1 or more.")
    written = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if args.picture and args.picture.suffix.lower() not in written:
        raise InputError(f"--picture {args.picture} has no ending of an image: name a .png file.")
    if args.picture and importlib.util.find_spec("reporting") is None:
        raise InputError("--picture needs the program's reporting/ beside eval.py.")
    index = find_images(args.index, args.query)
    model, device = load(), choose_device(args.device)
    queries, _, _ = compute_embeddings(model, ImageFiles(args.query, model), device)
    files = ImageFiles(index, model, spare_unreadable=True)
    database, _, _ = compute_embeddings(model, files, device)
    rows = files.readable()
    index, database = [index[row] for row in rows], database[rows]
    if not index:
        raise InputError(f"no image of {args.index} can be read: name another --index.")
    by_distance = not getattr(model, "unit_norm", True)
    similarity, ranking = search(queries, database, args.top_k, device, by_distance)
    measure = "1 - squared distance / 2" if by_distance else "cosine similarity"
    print(f"{len(args.query)} queries, {len(index)} images in {args.index}; {measure}, best first.")
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
        figures.retrieval_picture(args.picture, rows, f"The most similar images in {args.index}")
        print(f"Written: {args.picture}")


def open_streams() -> None:
    """Let what is printed go nowhere where standard output or errors are closed, as of a service."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, for good


class Screen:
    """An output stream that goes on into nowhere where nobody reads it (`| head`) or a disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or forget, `text`."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what waits to be written."""
        self._try(self.stream.flush)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unusable_files_named() -> Iterator[None]:
    """What the file system refuses, as a name too long or a folder that may not be read, is bad input."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"{error.filename} cannot be used ({error.strerror}): name another, or allow it."
        raise InputError(reason) from error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Recall@1/5/10 of a trained model, or retrieval in a folder.",
        epilog="Flags of recognition/'s systems: python eval.py --recipe=netvlad --help",
    )
    option = parser.add_argument
    option(
        "--checkpoint",
        type=Path,
        default=Path("output/checkpoints/netvlad_final.pth"),
        help="state dict that base.py wrote (default: %(default)s)",
    )
    option("--dataset", type=Path, help="folder of the lists (default: as base.py)")
    option("--split", default="val", choices=["train", "val", "test"], help="default: %(default)s")
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="search these in --index instead")
    option("--index", type=Path, metavar="FOLDER", help="images to search in, also in folders below")
    option("--top-k", type=int, default=5, help="images to name for a query (default: %(default)s)")
    option("--picture", type=Path, metavar="FILE", help="draw the queries and what was found (.png)")
    option("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    return parser


def main(
    argv: list[str] | None = None,
    recall_of_lists: Callable[[argparse.Namespace], None] | None = None,
    load: Callable[[Path], nn.Module] = load_checkpoint,
) -> int:
    """Recall of a checkpoint, or with --query a search in a folder. Exit code 2 for bad input.

    recall_of_lists: measures recall on the lists of --dataset; None where this file stands alone.
    load: reads the checkpoint of a search; its `transform`, if any, is what the images need.
    """
    open_streams()
    args = build_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a path in letters that the console lacks stops nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(Screen(sys.stdout)) as screen, unusable_files_named():
            if args.query:
                search_folder(args, lambda: load(args.checkpoint))
            elif args.index or args.picture:
                raise InputError("--index and --picture need --query, the images to look for.")
            elif recall_of_lists is None:
                raise InputError("--split needs the program's recognition/ and dataset/ beside eval.py.")
            else:
                recall_of_lists(args)
            screen.flush()
    except InputError as error:
        return refuse("eval.py", error)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was measured.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if importlib.util.find_spec("recognition") is None:
        sys.exit(main())
    from recognition.eval_command import command  # lists, and other systems' flags

    sys.exit(command())
