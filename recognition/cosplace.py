"""The family of CosPlace: images of classes, a classifier a group (Berton et al., CVPR 2022).

python train.py --dataset_folder sf_xs --groups_num 1         # sf_xs/{train,val,test}
python train.py --train_set_folder D/train --val_set_folder D/val --test_set_folder D/test
python train.py --recipe cosplace                             # on the built-in sample
python train.py --recipe cosplace --ssl vicreg --ssl_weight 0.1
python train.py --recipe cosplace --target_folder tokyo_xs/test/queries --grl_weight 0.3
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms
from torchvision.transforms import functional as tvf

from dataset.classes import Classes, Grid, find_classes, histogram
from dataset.folders import FolderImages, FolderSplit, same_size
from dataset.sample import places as sample_places
from eval import compute_embeddings, list_images
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DescriptorModel,
    InputError,
    choose_device,
    warn,
)
from recognition.augmentation import Augmentation
from recognition.class_batches import ClassBatches, square
from recognition.classification import LOSS_FUNCTIONS, Adversary, ClassObjective
from recognition.flags import above_zero, half_precision_flag, positive, share, strength
from recognition.inference import Plain, framing
from recognition.job import Job, Judge, Where, judged, read_val, val_judge
from training.inputs import Inputs, Store
from training.resume import digest

RECIPE = "cosplace"
FLAGS = {
    "--groups_num", "--dataset_folder", "--train_set_folder", "--val_set_folder",
    "--test_set_folder", "--min_images_per_class", "--iterations_per_epoch", "--classifiers_lr",
    "--resize_test_imgs", "--loss_function", "--ssl", "--ssl_weight", "--target_folder", "--grl_weight",
}  # fmt: skip
LAST = "last_checkpoint.pth"
SCORED_K = 1
SCORED = f"val R@{SCORED_K}"
# On the built-in sample: ends in minutes on two cores.
SAMPLE_SETTINGS = {
    "image_size": 128,
    "resize_test_imgs": True,
    "groups_num": 4,
    "epochs_num": 12,
    "iterations_per_epoch": 40,
    "batch_size": 16,
    "lr": 1e-3,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.05,  # houses are told by their colors there
    "random_resized_crop": 0.4,
}
JITTER = ("brightness", "contrast", "hue", "saturation")
OTHERS = ("rand_perspective", "random_erasing", "random_rotation", "blur", "night")


# ---------------------------------------------------------------- flags


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data is, and how test images are sized."""
    option = parser.add_argument_group("data").add_argument
    option("--dataset_folder", type=Path, metavar="DIR", help="that holds train/, val/, test/")
    option("--train_set_folder", type=Path, metavar="DIR", help="images, also below")
    option("--val_set_folder", type=Path, metavar="DIR", help="that holds database/ and queries/")
    option("--test_set_folder", type=Path, nargs="+", metavar="DIR", help="so does each of these")
    option("--image_size", type=positive, default=512, help="pixels a side, trained on (512)")
    option("--resize_test_imgs", action="store_true", help="shorter side of test images to these")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Classes, objective, augmentation."""
    option = parser.add_argument_group("classes").add_argument
    option("--M", type=positive, default=10, help="meters a side of a class's cell (10)")
    option("--alpha", type=positive, default=30, help="degrees of a class (30)")
    option("--N", type=positive, default=5, help="classes of a group are M (N - 1) m apart (5)")
    option("--L", type=positive, default=2, help="or alpha (L - 1) degrees (2)")
    option("--groups_num", type=positive, default=8, help="of them used (8)")
    option("--min_images_per_class", type=positive, default=10, help="default: 10")
    option("--batch_size", type=positive, default=32, help="images a step (32)")
    option("--iterations_per_epoch", type=positive, default=10000, help="default: 10000")
    option("--train_all_layers", action="store_true", help="freeze nothing")
    half_precision_flag(option, "--use_amp16")
    option("--augmentation_device", choices=["cuda", "cpu"], help="default: where it is trained")
    option = parser.add_argument_group("objective").add_argument
    option("--loss_function", choices=LOSS_FUNCTIONS, default="cosface", help="default: cosface")
    option("--classifiers_lr", type=above_zero, default=0.01, help="of their own Adam (0.01)")
    option("--ssl", choices=["vicreg"], help="of two views of each image")
    option("--ssl_weight", type=above_zero, default=0.1, help="default: 0.1")
    option("--target_folder", type=Path, metavar="DIR", help="images of another domain, no labels")
    option("--grl_weight", type=above_zero, help="of the adversary that tells the domains (0.3)")
    option = parser.add_argument_group("augmentation").add_argument
    for name, default in zip(JITTER, (0.7, 0.7, 0.5, 0.7)):
        option(f"--{name}", type=strength, default=default, help=f"as of ColorJitter ({default})")
    option("--random_resized_crop", type=share, default=0.5, help="down to 1 - this of the area")
    option("--rand_perspective", type=share, default=0.0, help="distortion, of every second image")
    option("--random_rotation", type=strength, default=0.0, help="up to so many degrees")
    for name in ("random_erasing", "blur", "night"):
        option(f"--{name}", type=share, default=0.0, metavar="P", help="share of the images")


def settle(args: argparse.Namespace) -> None:
    """Sizes of test images; InputError for settings that contradict each other."""
    if args.resize_test_imgs and not args.resize:
        args.resize = [args.image_size]
    if not hasattr(args, "target_folder"):  # eval.py
        return
    if args.aggregation == "mixvpr" and len(args.resize) < 2:
        args.resize = [args.image_size, args.image_size]
    if args.grl_weight and args.target_folder is None:
        raise InputError("--grl_weight needs --target_folder DIR, images of the other domain.")
    if args.loss_function == "none" and args.ssl is None:
        raise InputError("--loss_function none leaves nothing to learn: add --ssl vicreg.")
    if args.ssl and args.batch_size < 2:
        raise InputError("--ssl vicreg compares images: raise --batch_size to 2 or more.")
    if args.target_folder and args.grl_weight is None:
        args.grl_weight = 0.3
    Grid(args.M, args.alpha, args.N, args.L, args.min_images_per_class)


def augmentation_of(args: argparse.Namespace) -> Augmentation:
    """What is done to the images of classes."""
    return Augmentation(
        **{name: getattr(args, name) for name in (*JITTER, "blur", "night")},
        crop=args.random_resized_crop,
        perspective=args.rand_perspective,
        rotation=args.random_rotation,
        erasing=args.random_erasing,
    )


# ---------------------------------------------------------------- data


def locate(args: argparse.Namespace, training: bool) -> Where:
    """The folders that are named, or those of the built-in sample.

    --dataset_folder D means D/train, D/val, D/test and, where it is there, tokyo_xs/test beside D.
    """
    root, tests = args.dataset_folder, list(args.test_set_folder or [])
    named = (root, args.train_set_folder, args.val_set_folder, *tests)
    is_sample = not any(named)
    if is_sample:
        print(
            "No data set is named: using the built-in one, 'sf_xs' and 'tokyo_xs', rendered towns."
        )
        root = sample_places.locate_places() / "sf_xs"
    train, val = args.train_set_folder, args.val_set_folder
    if root:
        if not root.is_dir():
            raise InputError(
                f"--dataset_folder {root} is no folder: name the one with train/, val/."
            )
        train, val = train or root / "train", val or root / "val"
        beside = root.absolute().parent / "tokyo_xs" / "test"
        tests = tests or [part for part in (root / "test", beside) if part.is_dir()]
    wanted = {"train": train, "val": val} if training else {}
    for part, folder in wanted.items():
        if folder is None or not folder.is_dir():
            why = "is not named" if folder is None else f"{folder} is not there"
            raise InputError(
                f"the folder of the {part} images {why}: name it with --{part}_set_folder, or all "
                "three with --dataset_folder."
            )
    if training or not tests:
        tests = [part for part in (val, *tests) if part is not None]
    if not tests:
        raise InputError("there is nothing to test: name --test_set_folder DIR.")
    names = [_name_of(folder) for folder in tests]
    names = [str(f) if names.count(n) > 1 else n for f, n in zip(tests, names)]
    return Where(dict(zip(names, tests)), train, val, is_sample)


def _name_of(folder: Path) -> str:
    """What a split is called in tables: sf_xs/val -> "sf_xs val"."""
    whole = folder.absolute()
    return f"{whole.parent.name} {whole.name}".strip()


@dataclass
class Data:
    """Training images and their classes, the used groups of them, val, and images of another domain."""

    train: FolderImages
    classes: Classes
    groups: list[list[np.ndarray]]
    val: FolderSplit
    targets: Plain | None
    transductive: list[str]  # tests whose queries the targets are


def read(args: argparse.Namespace, where: Where) -> Data:
    """Classes of the training images, val, and the target's images."""
    size = args.image_size
    train = FolderImages([where.train], square(size), size)
    if not len(train):
        raise InputError(f"{where.train} holds no image: name another --train_set_folder.")
    grid = Grid(args.M, args.alpha, args.N, args.L, args.min_images_per_class)
    classes = find_classes(train.utm, train.headings_deg, train.paths, grid)
    groups = classes.groups[: args.groups_num]
    if args.groups_num > len(classes.groups):
        raise InputError(
            f"--groups_num {args.groups_num} is more than there are: the classes of {where.train} "
            f"make {len(classes.groups)} groups."
        )
    small = int((classes.sizes < grid.at_least).sum())
    used = [len(rows) for group in groups for rows in group]
    print(
        f"{_name_of(where.train)}: {len(train)} images in {len(classes.sizes)} classes of "
        f"{grid.M} m and {grid.alpha} degrees; {small} with less than {grid.at_least} images are left "
        f"out."
    )
    print(
        f"Used: {len(groups)} of {len(classes.groups)} groups, {len(used)} classes "
        f"({', '.join(str(len(group)) for group in groups)} a group), {sum(used)} images; "
        f"images a class: {', '.join(f'{n} x {size}' for size, n in histogram(used).items())}."
    )
    for group in groups:
        if len(group) < 2:
            raise InputError(
                "a group has one class only, which leaves nothing to tell apart: lower --N, --L or "
                "--min_images_per_class."
            )
    frame, least = framing(args.resize), max(args.resize, default=None)
    val = read_val(args, where.val, _name_of(where.val), frame, least)
    for name, folder in (("val", where.val), *where.tests.items()):
        if _within(where.train, folder):
            warn(
                f"the training images, {where.train}, and those of {name}, {folder}, are in one folder: "
                "recall there says nothing about places that were never seen."
            )
    targets = None
    if args.target_folder:
        targets = Plain(list_images(args.target_folder, "**/*"), square(size), size)
        if not len(targets):
            raise InputError(f"--target_folder {args.target_folder} holds no image: name another.")
        print(f"{args.target_folder}: {len(targets)} images of the other domain, without labels.")
    tested = seen_in_training(args.target_folder, where.tests)
    return Data(train, classes, groups, val, targets, tested)


def seen_in_training(target_folder: Path | str | None, tests: Mapping[str, Path]) -> list[str]:
    """The tests, by name, whose images are those of the other domain: said in a warning."""
    seen = [
        name
        for name, folder in tests.items()
        if target_folder and _within(Path(target_folder), folder)
    ]
    if seen:
        warn(
            f"the images of the other domain are test queries of {', '.join(seen)} (their labels "
            "are not used): say so beside the figures, other methods do not see them."
        )
    return seen


def _within(folder: Path, other: Path) -> bool:
    folder, other = folder.resolve(), other.resolve()
    return folder == other or other in folder.parents or folder in other.parents


def prepare(
    args: argparse.Namespace,
    data: Data,
    model: DescriptorModel,
    device: torch.device,
    store: Store,
) -> Job:
    """Batches of classes, recall on val."""
    if args.train_all_layers:
        model.freeze_below(0)
    same = args.augmentation_device in (None, device.type)
    where = device if same else choose_device(args.augmentation_device)
    adversary = None
    if data.targets:
        with torch.inference_mode():
            size = args.image_size
            channels = model.eval().local_descriptors(torch.zeros(1, 3, size, size, device=device))
        adversary = Adversary(channels.shape[1], args.grl_weight)
    objective = ClassObjective(
        model,
        [len(group) for group in data.groups],
        args.loss_function,
        args.classifiers_lr,
        args.ssl_weight if args.ssl else 0.0,
        adversary,
    )
    batches = ClassBatches(
        data.train,
        data.groups,
        objective,
        augmentation_of(args),
        batch_size=args.batch_size,
        iterations=args.iterations_per_epoch,
        epochs=max(1, args.epochs_num),
        seed=args.seed,
        device=where,
        two_views=bool(args.ssl),
        targets=data.targets,
    )
    begin = copy.copy(data.train)
    as_floats = [transforms.ConvertImageDtype(torch.float32), _normalized]
    begin.transform = transforms.Compose([square(args.image_size), *as_floats])
    start = Inputs(model, [begin], device, store)
    start.keep = False
    judge, kept = judge_of(args, data.val, model, device, store)
    return Job(
        batches,
        objective,
        judge,
        start=start,
        images=[
            len(data.train),
            len(data.groups),
            digest(data.train.paths, data.train.utm),
        ],
        size=(args.image_size, args.image_size),
        kept=kept,
        record={
            "classes": [len(group) for group in data.groups],
            "target_images": len(data.targets) if data.targets else 0,
            "transductive": data.transductive,
        },
    )


def _normalized(image: torch.Tensor) -> torch.Tensor:
    return tvf.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def judge_of(
    args: argparse.Namespace,
    val: FolderSplit,
    model: DescriptorModel,
    device: torch.device,
    store: Store,
) -> tuple[Judge, list[Inputs]]:
    """Recall on val; images of one size may have their frozen outputs kept."""
    values = args.recall_values
    if len(args.resize) == 2 or same_size([*val.queries.paths, *val.index.paths]):
        inputs = Inputs(model, [val.queries, val.index], device, store)
        return val_judge(val, inputs, values, SCORED_K), [inputs]

    def judge(model: DescriptorModel) -> tuple[torch.Tensor, dict[str, float]]:
        batch = args.infer_batch_size
        described = [
            compute_embeddings(model, d, device, batch)[0] for d in (val.queries, val.index)
        ]
        return judged(val, *described, values, SCORED_K, device)

    return judge, []
