"""Tasks 1-3 in one command: data -> train -> recall -> output/.

    python base.py                                   # dataset/, or the built-in sample if it is empty
    python base.py --dataset DIR --epochs 5 --seed 1 # other data in the assignment's layout
    python base.py --epochs 0                        # evaluate the initialized model, no training
    python base.py --resume                          # go on where a stopped run saved last
    torchrun --nproc_per_node=2 base.py              # data-parallel, on GPUs or processors
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset

from dataset import LISTS, locate
from dataset.lists import read_list, read_truth
from eval import (
    IMAGE_SIZE,
    TRANSFORM,
    load_image,
    measure_recall,
    positives_within,
    print_recall,
    rank_and_world,
)
from model import (
    CALIBRATION_IMAGES,
    PRECISIONS,
    TRAIN_FROM,
    WARNINGS,
    InputError,
    NetVLADModel,
    blame_input,
    calibrate_trunk,
    choose_device,
    initialize_netvlad,
    refuse,
    warn,
)
from reporting import figures, handin, report
from reporting.screen import aloud, on_screen, phase, print_recall_table, versions
from train import (
    INDEX_QUERIES,
    MARGIN,
    MIRRORS,
    NEGATIVES,
    TupleLoader,
    draw_random,
    train,
    validate,
)
from training.frozen import cache_trunk
from training.places import split_by_place
from training.processes import first_process_first, join_processes, silent_unless_first
from training.resume import how_to_resume, saver, settings_of, take_up

KMEANS_IMAGES = 500
SLOWER = 1.2  # the trained layers' small maps take longer than their share of the multiplications


class ImageListDataset(Dataset):
    """The images of a list file: item (image, index, path). See read_list for where they are looked for.

    transform: applied to the RGB image; None leaves it a PIL image.
    """

    def __init__(
        self, list_file: Path | str, root_dir: Path | str, transform: Callable | None = None, *,
        inside_first: bool = False,
    ) -> None:  # fmt: skip
        with blame_input():
            self.paths = read_list(list_file, root_dir, inside_first)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        # What TRANSFORM will shrink need not be decoded in full.
        image = load_image(self.paths[i], IMAGE_SIZE if self.transform is TRANSFORM else None)
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
        with blame_input():
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
        fresh = int(torch.randint(2**62, ())) if self.seed is None else [self.seed, i]
        rng = np.random.default_rng(fresh)
        p, n = draw_random(self.utm_query[i], self.utm_index, self.threshold, 1, rng)
        return p, int(n[0])

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
    option("--mining", choices=["hard", "random"], default="hard", help="of negatives (default: hard)")
    option("--train-from", choices=TRAIN_FROM, default="conv5", help="first trained part (default: conv5)")
    option(
        "--weights", default="imagenet",
        help="of VGG16: imagenet (downloaded), none (random, calibrated), or a file (default: imagenet)",
    )  # fmt: skip
    option("--seed", type=int, default=42, help="of everything random (default: %(default)s)")
    option("--workers", type=_count, default=0, help="processes that read images (default: none)")
    option("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 where it is fast")
    option("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
    option("--quiet", action="store_true", help="print results and warnings only")
    option("--limit", type=_positive, help="use this many queries of each list, to try things out")
    option("--resume", action="store_true", help="go on with the run that stopped in --output")
    parser.set_defaults(saved=None)
    args = parser.parse_args(argv)
    return take_up(parser, args, argv) if args.resume else args


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def announce(
    args: argparse.Namespace, model: NetVLADModel, data: LoadDataset,
    splits: dict[str, LoadDataset], tuples: int, device: torch.device,
) -> None:  # fmt: skip
    """Print what is about to be done, with the minutes it will take, from the speed measured here."""
    for name, split in {"train": data, **splits}.items():
        print(f"{name:6s}{len(split):6d} queries {len(split.index):6d} index images")
    probe = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    speed = [image_seconds(model, probe, device) for _ in range(2)][-1]
    head = model.trunk_share(model.first_trained)
    passes = 1 + (MIRRORS[args.mining] and args.epochs > 1)  # the images, their mirror images
    cost = passes * (len(data) + len(data.index)) * (1 - head) * (model.first_trained > 0)
    cost += sum(len(split) + len(split.index) for split in splits.values()) * (1 + head)
    trained = 3 * tuples * (2 + NEGATIVES[args.mining])
    cost += args.epochs * head * (trained + len(data) + len(data.index))
    minutes = SLOWER * cost * speed / 60 + 0.3
    print(
        f"{args.epochs} epochs of {tuples} tuples on {device}; {1 / speed:.1f} images a second "
        f"through the trunk: at most about {minutes:.1f} minutes; 240 MB on disk in {args.output}."
    )


@torch.no_grad()
def image_seconds(model: NetVLADModel, images: torch.Tensor, device: torch.device) -> float:
    """Seconds an image takes through the trunk."""
    model.to(device, memory_format=torch.channels_last)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    began = time.perf_counter()
    with model.autocast(device):
        float(model.trunk(images).float().sum())
    return (time.perf_counter() - began) / len(images)


def build(args: argparse.Namespace) -> NetVLADModel:
    """The model a run begins with, or the untrained one of the run that is resumed."""
    resumed = args.saved["model"] if args.saved else None
    file = None if args.weights in ("imagenet", "none") or resumed else args.weights
    model = NetVLADModel(
        args.clusters, pretrained=args.weights == "imagenet" and not resumed, weights=file,
        train_from=args.train_from,
    )  # fmt: skip
    model.precision = args.precision
    if resumed:
        model.load_state_dict(resumed)
        model.netvlad.initialized = args.saved["clustered"]
        model.weights_origin = args.saved["origin"]
        for warning in args.saved["warnings"]:
            warn(warning)
    return model


def frozen_outputs(
    model: NetVLADModel, data: LoadDataset, args: argparse.Namespace, device: torch.device,
    mirrored: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Outputs of the frozen trunk for all (mirror) images of queries and index."""
    options = {"device": device, "workers": args.workers, "folder": args.output, "mirrored": mirrored}
    return (
        cache_trunk(model, data.queries, desc="queries", **options),
        cache_trunk(model, data.index, desc="index images", **options),
    )


def initialize(
    model: NetVLADModel, data: LoadDataset, args: argparse.Namespace, device: torch.device,
    seconds: dict[str, float], save: Callable[[], None],
) -> None:  # fmt: skip
    """Calibrate random weights, cache the frozen trunk's outputs in `data`, cluster descriptors."""
    if not model.trunk_initialized:
        with phase("calibrating random weights", seconds):
            rows = np.linspace(0, len(data.index) - 1, min(CALIBRATION_IMAGES, len(data.index)))
            images = torch.stack([data.index[int(row)][0] for row in rows])
            calibrate_trunk(model, images.to(device))
        save()
    start = model.first_trained
    if start:
        with phase("frozen trunk, once per training image", seconds):
            data.cached = frozen_outputs(model, data, args, device)
    if not model.netvlad.initialized:
        with phase("k-means", seconds):
            rows = np.linspace(0, len(data.index) - 1, min(KMEANS_IMAGES, len(data.index))).astype(int)
            source = data.cached[1] if start else None
            batches = (
                torch.stack([data.index[row][0] if source is None else source[row] for row in part])
                for part in np.array_split(rows, max(1, len(rows) // 16))
            )
            initialize_netvlad(model, batches, device, start=start, seed=args.seed)
        save()


def learn(
    args: argparse.Namespace, model: NetVLADModel, data: LoadDataset, parts: dict[str, np.ndarray],
    device: torch.device, save: Callable[[dict], None],
) -> tuple[list[dict], float]:  # fmt: skip
    """Train the initialized model; what happened in each epoch, and the loss on the test part."""
    tuples = TupleLoader(
        data, parts["train"], np.concatenate([parts["val"], parts["test"]]), device,
        batch_size=args.batch_size, seed=args.seed, start=model.first_trained, mining=args.mining,
        margin=args.margin, mirrored=partial(frozen_outputs, model, data, args, device, mirrored=True),
    )  # fmt: skip
    fixed = copy.copy(data)
    fixed.seed = args.seed
    val, test = (
        DataLoader(
            Subset(fixed, parts[name].tolist()), args.batch_size,
            num_workers=args.workers if data.cached is None else 0,
        )
        for name in ("val", "test")
    )  # fmt: skip
    options = {"margin": args.margin, "start": model.first_trained}
    history = train(
        model, tuples, val, device, args.epochs, args.lr, save=save,
        state=args.saved and args.saved["training"], **options,
    )  # fmt: skip
    return history, validate(model, test, device, **options)


def run(args: argparse.Namespace) -> None:
    """All of tasks 1-3; raises InputError for bad input."""
    torch.manual_seed(args.seed)
    seconds: dict[str, float] = {}
    device = join_processes(choose_device(args.device))
    first = rank_and_world()[0] == 0
    with first_process_first():
        if first:
            with blame_input():
                handin.write_whole(args.output / ".writable", lambda path: path.touch())
                (args.output / ".writable").unlink()
        root, is_sample = find_dataset(args.dataset)
    read = {name: read_split(root, name, args.limit) for name in ("train", "val", "test")}
    splits = {name: data for name, data in read.items() if data}
    remarks = look_at(splits)
    for line in remarks:
        print(f"Data: {line}")
    data = splits.pop("train")
    parts, dropped = split_by_place(data.utm_query, data.utm_index, data.threshold, args.seed)
    sizes = {**{name: len(rows) for name, rows in parts.items()}, "dropped": dropped}
    print(f"Training queries by place: {', '.join(f'{n} {name}' for name, n in sizes.items())}.")

    with first_process_first():
        model = build(args)
    drawn = len(parts["train"]) * (1 + INDEX_QUERIES[args.mining])
    announce(args, model, data, splits, drawn, device)
    save = saver(args, model, [len(data.queries), len(data.index)])
    initialize(model, data, args, device, seconds, save)
    print(f"VGG16 weights: {model.weights_origin}.")
    models = [copy.deepcopy(model), model] if args.epochs else [model]
    with phase("training", seconds):
        history, test_loss = learn(args, model, data, parts, device, save)
    print(f"Test loss {test_loss:.4f}")
    checkpoint = args.output / handin.CHECKPOINT
    if first:
        with blame_input():
            handin.write_whole(checkpoint, lambda path: torch.save(model.state_dict(), path))
    data.cached = None

    recall, rows = {}, []
    with phase("recall", seconds):
        for name, split in splits.items():
            places = (split.utm_query, split.utm_index)
            result = measure_recall(
                models, split.queries, split.index, *places, split.threshold, device,
                workers=args.workers, seed=args.seed, desc=name,
            )  # fmt: skip
            print(f"{name} lists, trained {args.epochs} epochs:")
            print_recall(result.hits, [1, 5, 10])
            recall[name] = result.section
            paths = (split.queries.paths, split.index.paths)
            rows = rows or figures.gallery_rows(*paths, *places, result)

    if not first:
        return
    counts = {f"{name}_{kind}": len(getattr(d, kind))
              for name, d in read.items() if d for kind in ("queries", "index")}  # fmt: skip
    origin = model.weights_origin
    section = {
        "data": {"name": "built-in sample" if is_sample else root.resolve().name, "root": str(root),
                 "is_sample": is_sample, "posDistThr": data.threshold, **counts, "remarks": remarks},
        "weights": {"origin": origin, "pretrained": not origin.startswith("random")},
        "settings": settings_of(args), "clusters": args.clusters, "seed": args.seed,
        "device": str(device), "split": sizes, "epochs": history, "test_loss": test_loss,
        "recall": recall, "phases": seconds, "versions": versions(), "warnings": WARNINGS,
    }  # fmt: skip
    with blame_input(), aloud():
        finish(args.output, checkpoint, section, rows)


def finish(output: Path, checkpoint: Path, section: dict, rows: list[figures.GalleryRow]) -> None:
    """Write metrics, description of the checkpoint, picture, report and the copies of the code."""
    sha256 = handin.describe_checkpoint(checkpoint, section)
    metrics = handin.update_metrics(output, "base", section, sha256)
    figures.recall_picture(output / "task3_result.png", metrics["base"], rows)
    report.write_report(output)
    handin.copy_code(Path(__file__).resolve().parent, output)
    print_recall_table(section["recall"])
    print(f"Weights: {section['weights']['origin']}. Data: {section['data']['name']}.")
    print(f"Written: {checkpoint}, {output / 'task3_result.png'}, {output / 'report' / 'report.md'}.")
    for line in handin.missing(output):
        print(f"Still missing in {output}: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run tasks 1-3; 0, 2 for bad input, 130 when interrupted."""
    args = None
    try:
        args = parse(argv)
        with on_screen(args.quiet), silent_unless_first():
            run(args)
    except InputError as error:
        return refuse("base.py", error)
    except torch.cuda.OutOfMemoryError:
        sentence = f"the GPU's memory is too small: lower --batch-size (now {args.batch_size})."
        return refuse("base.py", InputError(sentence))
    except KeyboardInterrupt:
        print("\n" + how_to_resume(args), file=sys.stderr)
        return 130
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
