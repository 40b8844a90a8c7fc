"""Tasks 1-3 in one command: data -> train -> recall -> output/.

    python base.py                                   # dataset/, or the built-in sample if it is empty
    python base.py --dataset DIR --epochs 5 --seed 1 # other data in the assignment's layout
    python base.py --epochs 0                        # evaluate the initialized model, no training
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from dataset import LISTS, locate
from eval import (
    IMAGE_SIZE,
    TRANSFORM,
    Recall,
    load_image,
    measure_recall,
    positives_within,
    print_recall,
)
from model import (
    CALIBRATION_IMAGES,
    TRAIN_FROM,
    WARNINGS,
    InputError,
    NetVLADModel,
    blame_input,
    calibrate_trunk,
    choose_device,
    half_precision,
    initialize_netvlad,
    refuse,
)
from reporting import figures, handin, report
from reporting.screen import aloud, on_screen, phase, versions
from train import MARGIN, cache_trunk, split_by_place, train, validate

KMEANS_IMAGES = 500


def read_list(list_file: Path | str, root_dir: Path | str, inside_first: bool = False) -> list[Path]:
    """The image paths of a list, one a line. InputError for a missing or empty list.

    A line is tried as it stands, then under `root_dir`, then under it without its leading
    `dataset/`; `inside_first` tries the last first.
    """
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list {list_file} cannot be read ({error}): unpack it there.") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise InputError(f"the list {list_file} is empty: it must name one image a line.")
    return [_resolve(line, Path(root_dir), inside_first) for line in lines]


def _resolve(line: str, root_dir: Path, inside_first: bool) -> Path:
    inside = root_dir / line.removeprefix("./").removeprefix("dataset/")
    places = [Path(line), root_dir / line, inside]
    places = [inside, *places] if inside_first else places
    return next((place for place in places if place.is_file()), inside)


def read_truth(gt_npz: Path | str) -> tuple[np.ndarray, np.ndarray, float]:
    """utmQ (nq, 2), utmDb (nd, 2) in meters, posDistThr. InputError for a missing file or key."""
    try:
        with np.load(gt_npz) as file:
            missing = [key for key in ("utmQ", "utmDb", "posDistThr") if key not in file]
            if missing:
                raise InputError(f"{gt_npz} has no {', '.join(missing)}: take the assignment's file.")
            query, index = (np.asarray(file[key], dtype=np.float64) for key in ("utmQ", "utmDb"))
            threshold = float(file["posDistThr"])
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{gt_npz} is missing: unpack the assignment's gt/ there.") from None
    except Exception as error:  # zip, pickle and numpy each raise their own for a damaged file
        raise InputError(f"{gt_npz} cannot be read ({error}): take the assignment's file.") from error
    if query.ndim != 2 or index.ndim != 2 or query.shape[1] != 2 or index.shape[1] != 2:
        raise InputError(f"{gt_npz}: utmQ and utmDb must be (n, 2), not {query.shape}, {index.shape}.")
    return query, index, threshold


class ImageListDataset(Dataset):
    """The images of a list file: item (image, index, path). See read_list for where they are looked for.

    transform: applied to the RGB image; None leaves it a PIL image.
    """

    def __init__(
        self, list_file: Path | str, root_dir: Path | str, transform: Callable | None = None, *,
        inside_first: bool = False,
    ) -> None:  # fmt: skip
        self.paths = read_list(list_file, root_dir, inside_first)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        image = load_image(self.paths[i])
        return self.transform(image) if self.transform else image, i, str(self.paths[i])


class LoadDataset(Dataset):
    """Triplets: item i is (q, p, n) for the i-th query.

    p: a random index image closer than posDistThr, the nearest if there is none; n: a random one
    farther than 10 posDistThr, the farthest if there is none. Drawn anew at each access from
    torch's generator, or with `seed` always the same for one i.
    Once `cached` holds (query outputs, index outputs) of the trunk, items are those, not images.
    Raises InputError when the lists and gt_npz differ in length.
    """

    def __init__(
        self, query_file: Path | str, db_file: Path | str, root_dir: Path | str, gt_npz: Path | str,
        transform: Callable | None = None, *, inside_first: bool = False, seed: int | None = None,
    ) -> None:  # fmt: skip
        self.queries = ImageListDataset(query_file, root_dir, transform, inside_first=inside_first)
        self.index = ImageListDataset(db_file, root_dir, transform, inside_first=inside_first)
        self.utm_query, self.utm_index, self.threshold = read_truth(gt_npz)
        for name, list_file, images, rows in (
            ("utmQ", query_file, self.queries, self.utm_query),
            ("utmDb", db_file, self.index, self.utm_index),
        ):
            if len(images) != len(rows):
                raise InputError(
                    f"{list_file} has {len(images)} images but {name} in {gt_npz} has {len(rows)} "
                    "rows: take the two from the same archive."
                )
        self.seed = seed
        self.cached: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.queries)

    def draw(self, i: int) -> tuple[int, int]:
        """Rows in the index list of a positive and a negative for query i."""
        distance = np.linalg.norm(self.utm_index - self.utm_query[i], axis=1)
        near = np.flatnonzero(distance < self.threshold)
        far = np.flatnonzero(distance > 10 * self.threshold)
        near = near if len(near) else [distance.argmin()]
        far = far if len(far) else [distance.argmax()]
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + i)
        p, n = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return int(near[int(p * len(near))]), int(far[int(n * len(far))])

    def __getitem__(self, i: int) -> tuple:
        p, n = self.draw(i)
        if self.cached is not None:
            return self.cached[0][i], self.cached[1][p], self.cached[1][n]
        return self.queries[i][0], self.index[p][0], self.index[n][0]

    def keep(self, queries: np.ndarray, index: np.ndarray) -> None:
        """Reduce the data set to these rows of the two lists."""
        for images, rows in ((self.queries, queries), (self.index, index)):
            images.paths = [images.paths[row] for row in rows]
        self.utm_query, self.utm_index = self.utm_query[queries], self.utm_index[index]


def find_dataset(given: Path | None) -> tuple[Path, bool]:
    """The folder with the lists and whether it is the sample; InputError says what is missing."""
    with blame_input():
        return locate(given, LISTS)


def read_split(
    root: Path, split: str, limit: int | None = None, seed: int | None = None
) -> LoadDataset | None:
    """One of train, val, test; None for a `test` that is not there. InputError for missing images.

    limit: keep this many queries, evenly spaced, the index images near them and as many others.
    """
    files = [root / f"query_{split}.txt", root / f"index_{split}.txt", root / f"gt/pitts30k_{split}.npz"]
    if split == "test" and not any(file.exists() for file in files):
        return None
    data = LoadDataset(files[0], files[1], root, files[2], TRANSFORM, inside_first=True, seed=seed)
    for list_file, images in zip(files, (data.queries, data.index)):
        absent = [path for path in images.paths if not path.is_file()]
        if absent:
            deeper = next(root.rglob(absent[0].name), None)
            mend = f"it is at {deeper}: move" if deeper else "unpack"
            raise InputError(
                f"{len(absent)} of {len(images)} images of {list_file} are missing, the first is "
                f"{absent[0]}; {mend} the archive's images to where the list says."
            )
    if limit is not None and limit < len(data):
        queries = np.linspace(0, len(data) - 1, limit).round().astype(int)
        positives = positives_within(data.utm_query[queries], data.utm_index, data.threshold)
        near = np.unique(np.concatenate(positives))
        others = np.setdiff1d(np.arange(len(data.index)), near)
        spaced = others[np.linspace(0, len(others) - 1, min(len(near), len(others))).astype(int)]
        data.keep(queries, np.union1d(near, spaced))
    return data


def look_at(splits: dict[str, LoadDataset]) -> list[str]:
    """What is odd about the data though it can be used, a line each."""
    found = []
    names = {name: {*data.queries.paths, *data.index.paths} for name, data in splits.items()}
    for name, data in splits.items():
        twice = len(data.queries) + len(data.index) - len(names[name])
        if twice:
            found.append(f"{name}: {twice} images are listed more than once.")
        positives = positives_within(data.utm_query, data.utm_index, data.threshold)
        nearest = [np.linalg.norm(data.utm_index[p[0]] - q) for p, q in zip(positives, data.utm_query)]
        alone = int((np.array(nearest) > data.threshold).sum())
        if alone:
            found.append(f"{name}: {alone} queries have no index image within {data.threshold:g} m.")
        if name != "train" and (shared := len(names["train"] & names[name])):
            found.append(f"{shared} images are both in train and in {name}: recall there is flattered.")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the assignment's."""
    parser = argparse.ArgumentParser(description="Train NetVLAD and measure its recall.")
    option = parser.add_argument
    option("--dataset", type=Path, help="folder of the lists (default: dataset/, or the sample)")
    option("--output", type=Path, default=Path("output"), help="default: %(default)s")
    option("--epochs", type=_count, default=5, help="0 evaluates the initialized model (default: 5)")
    option("--lr", type=float, default=1e-4, help="of Adam (default: %(default)s)")
    option("--batch-size", type=_positive, default=8, help="triplets a step (default: 8)")
    option("--margin", type=float, default=MARGIN, help="of the ranking loss (default: %(default)s)")
    option("--clusters", type=_positive, default=16, help="of NetVLAD (default: %(default)s)")
    option("--train-from", choices=TRAIN_FROM, default="conv5", help="first trained part (default: conv5)")
    option(
        "--weights", default="imagenet",
        help="of VGG16: imagenet (downloaded), none (random, calibrated), or a file (default: imagenet)",
    )  # fmt: skip
    option("--seed", type=int, default=42, help="of everything random (default: %(default)s)")
    option("--workers", type=_count, default=0, help="processes that read images (default: none)")
    option("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
    option("--quiet", action="store_true", help="print results and warnings only")
    option("--limit", type=_positive, help="use this many queries of each list, to try things out")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def announce(
    args: argparse.Namespace, model: NetVLADModel, splits: dict[str, LoadDataset], steps: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Print what is about to be done, with the minutes it will take, from the speed measured here."""
    images = {name: len(data.queries) + len(data.index) for name, data in splits.items()}
    for name, data in splits.items():
        print(f"{name:6s}{len(data.queries):6d} queries {len(data.index):6d} index images")
    probe = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    speed = [image_seconds(model, probe, device) for _ in range(2)][-1]
    head = model.trunk_share(model.first_trained)
    triplet_images = 3 * steps * args.batch_size * args.epochs
    cost = images["train"] * (1 - head) * (model.first_trained > 0)
    cost += sum(images[name] for name in splits if name != "train") * (1 + head)
    cost += triplet_images * 3 * head
    print(
        f"{args.epochs} epochs of {steps} steps on {device}; {1 / speed:.1f} images a second through the "
        f"trunk: about {cost * speed / 60 + 0.3:.1f} minutes; 60 MB on disk in {args.output}."
    )


@torch.no_grad()
def image_seconds(model: NetVLADModel, images: torch.Tensor, device: torch.device) -> float:
    """Seconds an image takes through the trunk."""
    model.to(device, memory_format=torch.channels_last)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    began = time.perf_counter()
    with half_precision(device):
        float(model.trunk(images).float().sum())
    return (time.perf_counter() - began) / len(images)


def initialize(
    model: NetVLADModel, data: LoadDataset, seed: int, workers: int, device: torch.device,
    seconds: dict[str, float],
) -> None:  # fmt: skip
    """Calibrate random weights, cache the frozen trunk's outputs in `data`, cluster descriptors."""
    if not model.trunk_initialized:
        with phase("calibrating random weights", seconds):
            rows = np.linspace(0, len(data.index) - 1, min(CALIBRATION_IMAGES, len(data.index)))
            images = torch.stack([data.index[int(row)][0] for row in rows])
            calibrate_trunk(model, images.to(device))
    start = model.first_trained
    if start:
        with phase("frozen trunk, once per training image", seconds):
            options = {"device": device, "workers": workers}
            data.cached = (
                cache_trunk(model, data.queries, desc="queries", **options),
                cache_trunk(model, data.index, desc="index images", **options),
            )
    with phase("k-means", seconds):
        rows = np.linspace(0, len(data.index) - 1, min(KMEANS_IMAGES, len(data.index))).astype(int)
        source = data.cached[1] if start else None
        batches = (
            torch.stack([data.index[row][0] for row in part] if source is None else [source[row] for row in part])
            for part in np.array_split(rows, max(1, len(rows) // 16))
        )
        initialize_netvlad(model, batches, device, start=start, seed=seed)


def gallery(data: LoadDataset, result: Recall) -> list[figures.GalleryRow]:
    """A few queries with their top 5, for the picture: right at once, right by rank 10 only, wrong."""
    listed = result.ranking.shape[1]
    ranks = [int(hit) + 1 if hit < listed else None for hit in result.hits]
    rows = []
    for query in figures.choose_gallery(ranks):
        top = result.ranking[query][:5]
        distance = np.linalg.norm(data.utm_index[top] - data.utm_query[query], axis=1)
        matches = [
            (data.index.paths[i], float(s), float(d), bool(i in result.positives[query]))
            for i, s, d in zip(top, result.similarity[query], distance)
        ]
        rows.append(figures.GalleryRow(data.queries.paths[query], matches, ranks[query]))
    return rows


def run(args: argparse.Namespace) -> None:
    """All of tasks 1-3; raises InputError for bad input."""
    torch.manual_seed(args.seed)
    seconds: dict[str, float] = {}
    device = choose_device(args.device)
    with blame_input():
        handin.write_whole(args.output / ".writable", lambda path: path.touch())
        (args.output / ".writable").unlink()
    root, is_sample = find_dataset(args.dataset)
    splits = {
        name: data for name in ("train", "val", "test") if (data := read_split(root, name, args.limit))
    }
    remarks = look_at(splits)
    for line in remarks:
        print(f"Data: {line}")
    data = splits["train"]
    parts, dropped = split_by_place(data.utm_query, data.utm_index, data.threshold, args.seed)
    print(f"Training queries by place: {', '.join(f'{len(r)} {n}' for n, r in parts.items())}, {dropped} dropped.")

    file = None if args.weights in ("imagenet", "none") else args.weights
    model = NetVLADModel(
        args.clusters, pretrained=args.weights == "imagenet", weights=file, train_from=args.train_from
    )
    announce(args, model, splits, -(-len(parts["train"]) // args.batch_size), device)
    initialize(model, data, args.seed, args.workers, device, seconds)
    print(f"VGG16 weights: {model.weights_origin}.")
    initial = copy.deepcopy(model)

    start = model.first_trained
    fixed = copy.copy(data)
    fixed.seed = args.seed
    loaders = {
        name: DataLoader(
            Subset(data if name == "train" else fixed, rows.tolist()), args.batch_size,
            shuffle=name == "train", num_workers=0 if start else args.workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
        for name, rows in parts.items()
    }  # fmt: skip
    with phase("training", seconds):
        history = train(
            model, loaders["train"], loaders["val"], device, args.epochs, args.lr,
            margin=args.margin, start=start,
        )  # fmt: skip
        test_loss = validate(model, loaders["test"], device, margin=args.margin, start=start)
    print(f"Test loss {test_loss:.4f}")
    checkpoint = args.output / "checkpoints" / "netvlad_final.pth"
    with blame_input():
        handin.write_whole(checkpoint, lambda path: torch.save(model.state_dict(), path))
    data.cached = fixed.cached = None

    recall, rows = {}, []
    with phase("recall", seconds):
        models = [initial, model] if args.epochs else [model]
        for name in [name for name in splits if name != "train"]:
            held_out = splits[name]
            result = measure_recall(
                models, held_out.queries, held_out.index, held_out.utm_query, held_out.utm_index,
                held_out.threshold, device, workers=args.workers, seed=args.seed, desc=name,
            )  # fmt: skip
            print(f"{name} lists, trained {args.epochs} epochs:")
            print_recall(result.hits, [1, 5, 10])
            recall[name] = result.section
            rows = rows or gallery(held_out, result)

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    sizes = {f"{n}_{kind}": len(getattr(d, a)) for n, d in splits.items() for kind, a in (("queries", "queries"), ("index", "index"))}
    section = {
        "data": {"name": "built-in sample" if is_sample else root.resolve().name, "root": str(root),
                 "is_sample": is_sample, "posDistThr": data.threshold, **sizes, "remarks": remarks},
        "settings": settings, "clusters": args.clusters, "seed": args.seed, "device": str(device),
        "weights": {"origin": model.weights_origin, "pretrained": not model.weights_origin.startswith("random")},
        "split": {**{name: len(r) for name, r in parts.items()}, "dropped": dropped},
        "epochs": history, "test_loss": test_loss, "recall": recall, "phases": seconds,
        "versions": versions(), "warnings": WARNINGS,
    }  # fmt: skip
    with blame_input(), aloud():
        finish(args.output, checkpoint, section, rows)


def finish(output: Path, checkpoint: Path, section: dict, rows: list[figures.GalleryRow]) -> None:
    """Write metrics, description of the checkpoint, picture, report and the copies of the code."""
    described = {k: section[k] for k in ("weights", "data", "seed", "clusters", "versions", "settings")}
    described = {"sha256": handin.file_sha256(checkpoint), **described}
    text = json.dumps(described, indent=2, ensure_ascii=False)
    handin.write_whole(checkpoint.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    metrics = handin.update_metrics(output, "base", section, described["sha256"])
    figures.recall_picture(output / "task3_result.png", metrics["base"], rows)
    report.write_report(output)
    handin.copy_code(Path(__file__).resolve().parent, output)
    print(f"\n{'':10s}{'R@1':>8s}{'R@5':>8s}{'R@10':>8s}   (%)")
    for name, recall in section["recall"].items():
        for kind in ("trained", "untrained", "chance"):
            values = "".join(f"{100 * recall[kind][k - 1]:8.1f}" for k in (1, 5, 10))
            print(f"{name:4s} {kind:10s}{values}")
    print(f"Weights: {section['weights']['origin']}. Data: {section['data']['name']}.")
    print(f"Written: {checkpoint}, {output / 'task3_result.png'}, {output / 'report' / 'report.md'}.")
    for line in handin.missing(output):
        print(f"Still missing in {output}: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run tasks 1-3; 0, or 2 for bad input."""
    args = parse(argv)
    try:
        with on_screen(args.quiet):
            run(args)
    except InputError as error:
        return refuse("base.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
