"""`python train.py --dataset_name=…`: train a recipe on folders of named images.

    python train.py --dataset_name=pitts30k                       # ResNet-18 + NetVLAD
    python train.py                                               # on the built-in sample
    python train.py --backbone=vgg16 --aggregation=gem --fc_output_dim=512 --night 0.3
    python train.py --resume=logs/default/DATE/last_model.pth     # goes on exactly
    torchrun --nproc_per_node=2 train.py …                        # data-parallel

The run is in logs/<save_dir>/DATE: info.log, debug.log, last_model.pth, best_model.pth, metrics.json.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dataset.folders import FolderSplit, read_split
from eval import first_hits, search
from model import (
    CALIBRATION_IMAGES,
    DAMAGED,
    WARNINGS,
    DescriptorModel,
    InputError,
    choose_device,
    initialize_netvlad,
    refuse,
    warn,
)
from recognition import records
from recognition.augmentation import SMART, Augmentation
from recognition.backbones import calibrate
from recognition.batches import MINING, BenchmarkTuples, RandomTriplets
from recognition.eval_command import (
    TEST_SETTINGS,
    above_zero,
    add_data_flags,
    add_model_flags,
    add_test_flags,
    evaluate,
    locate,
    positive,
    recall_at,
    report_split,
    with_recipe,
)
from recognition.inference import transform_for
from recognition.objectives import CRITERIA, build_objective
from recognition.optimization import OPTIMIZERS, SCHEDULERS, make_optimizer, make_rate, make_stop
from recognition.recipes import (
    ARCHITECTURE,
    SAMPLE_SETTINGS,
    build_model,
    count_work,
    let_batchnorm_drift,
)
from reporting.handin import file_sha256, write_whole
from reporting.screen import on_screen
from train import train
from training.distributed import (
    first_process_first,
    join_processes,
    leave_processes,
    rank_and_world,
    share_weights,
    silent_unless_first,
    sum_over_processes,
)
from training.inputs import Inputs, Store

LAST, BEST = "last_model.pth", "best_model.pth"
SAVED = {"settings", "images", "model_state_dict", "origin", "training"}
ANY_TIME = {"device", "resume"}  # settings that may differ when resuming
KMEANS_IMAGES = 500
VAL_LOSS_QUERIES = 200
SCORED_K = 5  # the best epoch has the highest val recall at this


def build_parser() -> argparse.ArgumentParser:
    """The command line of the training."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.partition("\n")[0])
    option = parser.add_argument_group("training").add_argument
    option("--resume", type=Path, metavar="FILE", help=f"go on with the run of this {LAST}")
    option(
        "--weights", help="of the backbone: imagenet (default), none (random, calibrated), a file"
    )
    option("--train_batch_size", type=positive, default=4, help="tuples a step (default: 4)")
    option("--criterion", choices=CRITERIA, default="triplet", help="default: triplet")
    option("--margin", type=above_zero, default=0.1, help="of triplet (default: 0.1)")
    option("--epochs_num", type=int, default=1000, help="at most (default: 1000); 0: test only")
    option(
        "--patience", type=positive, default=3, help="epochs without a better val R@5 (default: 3)"
    )
    option("--lr", type=above_zero, default=1e-5, help="default: 1e-5")
    option("--optim", choices=OPTIMIZERS, default="adam", help="default: adam")
    option("--weight_decay", type=float, help="default: 0, of adamw 1e-2, of sgd 1e-3")
    option("--scheduler", choices=SCHEDULERS, default="none", help="of the rate (default: none)")
    option("--scheduler_epochs", type=positive, default=5, help="of step, patience of plateau")
    option("--scheduler_factor", type=above_zero, default=0.3, help="of step and plateau")
    option("--warmup_epochs", type=float, default=0.0, help="may be a share of one (default: 0)")
    option("--mining", choices=MINING, default="partial", help="of negatives (default: partial)")
    option("--cache_refresh_rate", type=positive, default=1000, help="queries (default: 1000)")
    option("--queries_per_epoch", type=positive, default=5000, help="default: 5000")
    option("--negs_num_per_query", type=positive, default=10, help="default: 10")
    option("--neg_samples_num", type=positive, default=1000, help="to mine in (default: 1000)")
    option("--train_positives_dist_threshold", type=above_zero, default=10.0, metavar="M")
    option(
        "--drift_batchnorm", action="store_true", help="let frozen statistics drift, as published"
    )
    option = parser.add_argument_group("augmentation of queries").add_argument
    for name in ("brightness", "contrast", "saturation", "hue"):
        option(f"--{name}", type=float, default=0.0, help="strength, as of ColorJitter")
    option("--rand_perspective", type=float, default=0.0, help="distortion, of every second query")
    option("--random_resized_crop", type=float, default=0.0, help="down to 1 - this of the area")
    option("--random_rotation", type=float, default=0.0, help="up to so many degrees")
    option("--horizontal_flip", action="store_true", help="mirror half of the batches")
    option("--night", type=float, default=0.0, metavar="P", help="share of queries made dark")
    option("--augment", choices=["smart"], help="color, blur, erasing, perspective, crop by chance")
    for add in (add_data_flags, add_model_flags, add_test_flags):
        add(parser)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; with --resume the settings of that run, and what it saved as args.saved."""
    parser = build_parser()
    first = with_recipe(parser, argv)
    if not first.resume:
        first.saved = None
        return first
    saved = read_saved(first.resume)
    known = {k: v for k, v in saved["settings"].items() if k not in ANY_TIME}
    args = with_recipe(parser, argv, known)
    for name, value in records.plain(args).items():
        if name in known and value != known[name]:
            raise InputError(
                f"--{name} is {value} but was {known[name]} in the run to resume: leave it out, or "
                "begin anew without --resume."
            )
    for name in ("datasets_folder", "pca_dataset_folder", "night_queries", "save_descriptors"):
        if isinstance(getattr(args, name), str):
            setattr(args, name, Path(getattr(args, name)))
    args.saved = saved
    return args


def read_saved(file: Path) -> dict:
    """What a run saved. InputError if the file is nothing of the kind."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: name the {LAST} of a run.") from None
    except DAMAGED:
        saved = None
    if not isinstance(saved, dict) or not saved.keys() >= SAVED:
        raise InputError(
            f"{file} is no {LAST} of train.py, or damaged: name one, or give other weights with "
            "--weights."
        )
    return saved


def check(args: argparse.Namespace) -> None:
    """InputError for settings that contradict each other."""
    if args.queries_per_epoch % args.cache_refresh_rate:
        raise InputError(
            f"--queries_per_epoch {args.queries_per_epoch} must be a multiple of "
            f"--cache_refresh_rate {args.cache_refresh_rate}."
        )
    if args.pca_dim and args.pca_dataset_folder is None:
        raise InputError("--pca_dim needs --pca_dataset_folder, the images to fit the PCA on.")


def augmentation_of(args: argparse.Namespace) -> Augmentation:
    """What is done to queries."""
    if args.augment:
        return dataclasses.replace(SMART, night=args.night)
    same = {k: getattr(args, k) for k in ("brightness", "contrast", "saturation", "hue", "night")}
    return Augmentation(
        **same,
        perspective=args.rand_perspective,
        crop=args.random_resized_crop,
        rotation=args.random_rotation,
    )


# ---------------------------------------------------------------- a run


def build(args: argparse.Namespace) -> DescriptorModel:
    """The model a run begins with."""
    settings = {name: getattr(args, name) for name in ARCHITECTURE}
    model = build_model(settings, "random" if args.saved else args.weights)
    model.precision = args.precision
    if args.saved:
        model.load_state_dict(args.saved["model_state_dict"])
        model.trunk.initialized = True
        model.weights_origin = args.saved["origin"]
    if args.drift_batchnorm:
        let_batchnorm_drift(model)
    return model


def initialize(model: DescriptorModel, inputs: Inputs, device: torch.device, seed: int) -> None:
    """Calibrate random weights, and cluster local descriptors, of evenly spaced training images."""
    if not model.trunk.initialized:
        rows = np.linspace(0, len(inputs) - 1, min(CALIBRATION_IMAGES, len(inputs)))
        images = torch.stack([inputs.item(int(row))[0] for row in rows])
        calibrate(model, images.to(device))
    if not getattr(model.aggregation, "initialized", True):
        print("- k-means of local descriptors ...", flush=True)
        rows = np.linspace(0, len(inputs) - 1, min(KMEANS_IMAGES, len(inputs))).astype(int)
        model.eval()
        batches = (inputs.take(part) for part in np.array_split(rows, -(-len(rows) // 16)))
        initialize_netvlad(model, batches, device, seed=seed)


def choose_kept(inputs: Sequence[Inputs], store: Store) -> None:
    """Decide, and say, which sets' frozen outputs are computed once: those there is room for."""
    sizes: list[int] = []
    for part in inputs:
        size = part.bytes_each() * len(part) if part.model.first_trained else 0
        try:
            store.fits(*sizes, size)
            sizes.append(size)
        except InputError:
            part.keep = False
            warn(
                f"the frozen trunk's outputs of {len(part)} images ({size / 1e9:.1f} GB) do not fit "
                "on the disk: they are computed each time."
            )
    if any(sizes):
        print(f"The frozen trunk's outputs are kept in {store.fits(*sizes)}.")


def val_judge(
    split: FolderSplit, inputs: Inputs, values: Sequence[int]
) -> Callable[[DescriptorModel], tuple[torch.Tensor, dict[str, float]]]:
    """Recall on val, for train(): the score of an epoch is R@5."""

    def judge(model: DescriptorModel) -> tuple[torch.Tensor, dict[str, float]]:
        rows = np.arange(len(inputs))
        queries = inputs.describe(model, rows[: len(split)], "val queries")
        index = inputs.describe(model, rows[len(split) :], "val database")
        shown = sorted({*values, 1, SCORED_K})
        _, ranking = search(queries, index, shown[-1], inputs.device)
        found = recall_at(first_hits(ranking, split.positives), ranking.shape[1], shown)
        recall = {f"val R@{k}": value for k, value in zip(shown, found)}
        return torch.tensor([recall[f"val R@{SCORED_K}"]]), recall

    return judge


def save_tensors(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    write_whole(path, lambda part: torch.save(content, part))


def run_training(
    args: argparse.Namespace, folder: Path, name: str, run: Path, device: torch.device
) -> None:
    """All of a training; raises InputError for bad input."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    first = rank_and_world()[0] == 0
    print(
        "Arguments: "
        + ", ".join(f"{k} {v}" for k, v in records.plain(args).items() if k != "saved")
    )
    size = tuple(args.resize)
    how = (transform_for("hard_resize", size), max(size))
    threshold = args.val_positive_dist_threshold
    splits = {part: read_split(folder / part, threshold, *how) for part in ("train", "val")}
    with first_process_first():
        model = build(args).to(device, memory_format=torch.channels_last)
    store = Store(run, device=device)
    inputs = {k: Inputs(model, [s.queries, s.index], device, store) for k, s in splits.items()}
    data, train_inputs = splits["train"], inputs["train"]
    tuples = BenchmarkTuples(
        data,
        train_inputs,
        mining=args.mining,
        batch_size=args.train_batch_size,
        seed=args.seed,
        negatives=args.negs_num_per_query,
        pool=args.neg_samples_num,
        refresh=args.cache_refresh_rate,
        queries_per_epoch=args.queries_per_epoch,
        positive_radius=args.train_positives_dist_threshold,
        augmentation=augmentation_of(args),
        flip=args.horizontal_flip,
    )
    for part, split in splits.items():
        report_split(f"{name} {part}", split, max(args.recall_values) if part == "val" else 0)
    if tuples.dropped:
        radius = args.train_positives_dist_threshold
        print(
            f"{tuples.dropped} training queries without an image within {radius:g} m are dropped."
        )
    images = [len(data), len(data.index)]
    if args.saved and args.saved["images"] != images:
        raise InputError(
            f"the run to resume had {args.saved['images']} training queries and database images, now "
            f"there are {images}: bring back its data."
        )
    choose_kept(list(inputs.values()), store)
    initialize(model, train_inputs, device, args.seed)
    share_weights(model, device)
    work = count_work(model, size)
    records.print_model(model, work, args.resize)
    settings = {k: v for k, v in records.plain(args).items() if k != "saved"}
    described = {"settings": settings, "origin": model.weights_origin, "images": images}
    untrained = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}

    def save(training: dict) -> None:
        whole = {**untrained, **own_weights(training["weights"])}
        last = {**described, "training": training, "model_state_dict": whole}
        save_tensors(run / LAST, last)
        if training["best"] and training["step"] == 0:
            best = {**untrained, **own_weights(training["best"]["weights"])}
            epoch = training["best"]["epoch"]
            save_tensors(run / BEST, {**described, "epoch_num": epoch, "model_state_dict": best})

    rows = np.flatnonzero([len(rows) > 0 for rows in splits["val"].positives])
    rows = rows[np.linspace(0, len(rows) - 1, min(VAL_LOSS_QUERIES, len(rows))).astype(int)]
    history = train(
        model,
        tuples,
        RandomTriplets(splits["val"], inputs["val"], rows, args.train_batch_size, args.seed),
        device,
        args.epochs_num,
        args.lr,
        objective=build_objective(args.criterion, args.margin),
        judge=val_judge(splits["val"], inputs["val"], args.recall_values),
        state=args.saved and args.saved["training"],
        save=save if first else None,
        optimizer=make_optimizer(args.optim, args.weight_decay),
        rate=make_rate(
            args.scheduler,
            args.epochs_num,
            warmup=args.warmup_epochs,
            step=args.scheduler_epochs,
            factor=args.scheduler_factor,
        ),
        stop=make_stop(args.patience, lambda record: record[f"val R@{SCORED_K}"]),
        sum_over_processes=sum_over_processes,
    )
    for part in inputs.values():
        part.release()
    if not first:
        return
    if not history:
        best = {k: v.cpu() for k, v in model.state_dict().items()}
        save_tensors(run / BEST, {**described, "epoch_num": 0, "model_state_dict": best})
    seconds = time.perf_counter() - began
    metrics = {
        "kind": "train",
        "settings": {**settings, **records.plain(args, TEST_SETTINGS)},
        "epochs": history,
        "dropped_queries": tuples.dropped,
        "recall_values": args.recall_values,
        "recall": {},
        "seconds": seconds,
        **work,
        "weights": model.weights_origin,
        "checkpoint": file_sha256(run / BEST),
        "warnings": WARNINGS,
    }
    records.write(run, metrics)
    for part in ("val", "test"):
        if (folder / part).is_dir():
            table = evaluate(model.eval(), folder / part, f"{name} {part}", args, run)
            metrics["recall"][f"{name} {part}"] = table
            records.write(run, metrics)
    print(f"Written: {run / BEST}, {run / LAST}, {run / 'metrics.json'}.")


def own_weights(weights: dict) -> dict:
    """Those of the model among all that train() changed."""
    return {k: v for k, v in weights.items() if not k.startswith("objective.")}


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 0, 2 for bad input, 130 when interrupted."""
    run = None
    try:
        args = parse(argv)
        device = join_processes(choose_device(args.device))
        first = rank_and_world()[0] == 0
        with on_screen(), silent_unless_first():
            with first_process_first():
                folder, name = locate(args)
            if name == "sample" and not args.saved:
                args = with_recipe(build_parser(), argv, SAMPLE_SETTINGS)
                args.saved = None
            check(args)
            if args.saved:
                run = args.resume.parent
            else:
                run = records.new_run_folder(args.save_dir) if first else Path("logs")
            with records.logged(run, argv) if first else contextlib.nullcontext():
                run_training(args, folder, name, run, device)
    except InputError as error:
        return refuse("train.py", error)
    except torch.cuda.OutOfMemoryError:
        sentence = "the GPU's memory is too small: lower --train_batch_size or --resize."
        return refuse("train.py", InputError(sentence))
    except KeyboardInterrupt:
        there = run is not None and (run / LAST).is_file()
        how = f"To go on: python train.py --resume={run / LAST}" if there else "Nothing was saved."
        print(f"\nInterrupted. {how}", file=sys.stderr)
        return 130
    finally:
        leave_processes()
    return 0
