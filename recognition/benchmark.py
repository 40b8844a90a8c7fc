"""The family of the visual geo-localization benchmark: tuples of folders of queries and database.

    python train.py --dataset_name=pitts30k                       # ResNet-18 + NetVLAD
    python train.py                                               # on the built-in sample
    python train.py --backbone=vgg16 --aggregation=gem --fc_output_dim=512 --night 0.3

Definitions: deep-visual-geo-localization-benchmark (Berton et al., CVPR 2022).
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from dataset.folders import FolderSplit, find_data_set, read_split
from dataset.sample import folders as sample_folders
from model import DescriptorModel, InputError
from recognition.augmentation import SMART, Augmentation
from recognition.batches import MINING, BenchmarkTuples, RandomTriplets
from recognition.flags import above_zero, positive, share, strength
from recognition.inference import transform_for
from recognition.job import Job, Where, read_val, report_split, val_judge
from recognition.objectives import CRITERIA, build_objective
from training.inputs import Inputs, Store
from training.resume import digest

RECIPE = "netvlad"
FLAGS = {"--dataset_name", "--datasets_folder", "--mining", "--criterion"}
LAST = "last_model.pth"
SCORED_K = 5
SCORED = f"val R@{SCORED_K}"
VAL_LOSS_QUERIES = 200
# On the built-in sample: ends in minutes on two cores.
# The sample's 95 queries are soon learned by heart unless they look different each time.
SAMPLE_SETTINGS = {
    "resize": [168, 224],
    "netvlad_clusters": 16,
    "epochs_num": 8,
    "patience": 8,
    "horizontal_flip": True,
    "random_resized_crop": 0.3,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "queries_per_epoch": 240,
    "cache_refresh_rate": 120,
    "negs_num_per_query": 4,
    "lr": 1e-4,
}


# ---------------------------------------------------------------- flags


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data is."""
    option = parser.add_argument_group("data").add_argument
    option(
        "--datasets_folder",
        type=Path,
        help="default: $DATASETS_FOLDER, ../datasets_vg/datasets, dataset/",
    )
    option("--dataset_name", help="folder below it (default: pitts30k, or the built-in sample)")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Tuples, and what is done to their queries."""
    option = parser.add_argument_group("tuples").add_argument
    option("--train_batch_size", type=positive, default=4, help="tuples a step (default: 4)")
    option("--criterion", choices=CRITERIA, default="triplet", help="default: triplet")
    option("--margin", type=above_zero, default=0.1, help="of triplet (default: 0.1)")
    option("--mining", choices=MINING, default="partial", help="of negatives (default: partial)")
    option("--cache_refresh_rate", type=positive, default=1000, help="queries (default: 1000)")
    option("--queries_per_epoch", type=positive, default=5000, help="default: 5000")
    option("--negs_num_per_query", type=positive, default=10, help="default: 10")
    option("--neg_samples_num", type=positive, default=1000, help="to mine in (default: 1000)")
    option("--train_positives_dist_threshold", type=above_zero, default=10.0, metavar="M")
    option(
        "--plain_start",
        action="store_true",
        help="keep pretrained weights as they are, as published",
    )
    option = parser.add_argument_group("augmentation of queries").add_argument
    for name in ("brightness", "contrast", "saturation", "hue"):
        option(f"--{name}", type=strength, default=0.0, help="strength, as of ColorJitter")
    option("--rand_perspective", type=share, default=0.0, help="distortion, of every second query")
    option("--random_resized_crop", type=share, default=0.0, help="down to 1 - this of the area")
    option("--random_rotation", type=strength, default=0.0, help="up to so many degrees")
    option("--horizontal_flip", action="store_true", help="mirror half of the batches")
    option("--night", type=share, default=0.0, metavar="P", help="share of queries made dark")
    option("--augment", choices=["smart"], help="color, blur, erasing, perspective, crop by chance")


def settle(args: argparse.Namespace) -> None:
    """InputError for settings that contradict each other."""
    queries = getattr(args, "queries_per_epoch", 0)  # eval.py has none
    if queries and queries % args.cache_refresh_rate:
        raise InputError(
            f"--queries_per_epoch {queries} must be a multiple of "
            f"--cache_refresh_rate {args.cache_refresh_rate}."
        )
    near, far = getattr(args, "train_positives_dist_threshold", 0), args.val_positive_dist_threshold
    if near > far:
        raise InputError(
            f"--train_positives_dist_threshold {near:g} is more than --val_positive_dist_threshold "
            f"{far:g}, beyond which images are negatives: an image would be both."
        )


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


# ---------------------------------------------------------------- data and training


def locate(args: argparse.Namespace, training: bool) -> Where:
    """The splits of the data set that is named or found, tested on val if it has no test; else the sample's."""
    folder, name = find(args)
    parts = [part for part in ("val", "test") if (folder / part).is_dir()] or ["test"]
    return Where(
        {f"{name} {part}": folder / part for part in (parts if training else parts[-1:])},
        folder / "train",
        folder / "val",
        name == "sample",
    )


def find(args: argparse.Namespace) -> tuple[Path, str]:
    """The images/ folder of the data set, and its name."""
    wanted = args.dataset_name or "pitts30k"
    of_sample = wanted in sample_folders.DATA_SETS and args.datasets_folder is None
    found = None if of_sample else find_data_set(args.datasets_folder, wanted)
    if found:
        return found, wanted
    if args.dataset_name and not of_sample:
        raise InputError(
            f"the data set {wanted} is in none of the usual places: name the folder that holds "
            f"{wanted}/images/ with --datasets_folder."
        )
    name = args.dataset_name or "sample"
    print(f"No data set is named or found: using the built-in one, {name!r}, a rendered town.")
    return sample_folders.locate_sample() / name / "images", name


def read(args: argparse.Namespace, where: Where) -> dict[str, FolderSplit]:
    """The splits train and val."""
    how = (transform_for("hard_resize", tuple(args.resize)), max(args.resize))
    name = where.train.parent.parent.name
    train = read_split(where.train, args.val_positive_dist_threshold, *how)
    report_split(f"{name} train", train, 0)
    return {"train": train, "val": read_val(args, where.val, f"{name} val", *how)}


def prepare(
    args: argparse.Namespace,
    data: dict[str, FolderSplit],
    model: DescriptorModel,
    device: torch.device,
    store: Store,
) -> Job:
    """Tuples of train, recall on val."""
    inputs = {k: Inputs(model, [s.queries, s.index], device, store) for k, s in data.items()}
    train, val = data["train"], data["val"]
    tuples = BenchmarkTuples(
        train,
        inputs["train"],
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
    if tuples.dropped:
        radius = args.train_positives_dist_threshold
        print(
            f"{tuples.dropped} training queries without an image within {radius:g} m are dropped."
        )
    rows = np.flatnonzero([len(rows) > 0 for rows in val.positives])
    rows = rows[np.linspace(0, len(rows) - 1, min(VAL_LOSS_QUERIES, len(rows))).astype(int)]
    of_train = train.queries.paths, train.index.paths, train.utm_query, train.utm_index
    return Job(
        tuples,
        build_objective(args.criterion, args.margin),
        val_judge(val, inputs["val"], args.recall_values, SCORED_K),
        start=inputs["train"],
        images=[len(train), len(train.index), digest(*of_train)],
        size=tuple(args.resize),
        val_loader=RandomTriplets(val, inputs["val"], rows, args.train_batch_size, args.seed),
        kept=list(inputs.values()),
        split=None if args.plain_start else train,
        record={"dropped_queries": tuples.dropped},
    )
