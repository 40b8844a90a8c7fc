"""Flags that the recipes share, and the types of their values."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model import PRECISIONS, warn
from recognition.aggregation import AGGREGATION_SETTINGS, AGGREGATIONS, L2_PLACES
from recognition.backbones import BACKBONES, backbone_name
from recognition.inference import METHODS, RESIZE
from recognition.optimization import OPTIMIZERS, SCHEDULERS
from recognition.recipes import RECIPES
from recognition.reranking import RERANKED
from recognition.supervlad import ENCODER_MODES

SIZES = {  # whole numbers among the settings of aggregations
    "netvlad_clusters": "netvlad",
    "mix_out_channels": "mixvpr",
    "mix_out_rows": "mixvpr",
    "mix_depth": "mixvpr",
    "convap_dim": "convap",
    "convap_cells": "convap, a side",
    "supervlad_clusters": "supervlad",
    "salad_clusters": "salad",
    "salad_cluster_dim": "salad",
    "salad_token_dim": "salad, of the class token",
}
RERANKINGS = ("clusters", "geometric", "expansion")
LARGEST = 2**31  # numbers of a command line are smaller


def _of_layer(name: str, layer: str) -> tuple:
    return (name,), lambda args: args.aggregation != layer, f"without --aggregation {layer}"


# Flags that have an effect only where others say so: when they have none, and in words why.
IDLE = (
    (
        ("brightness", "contrast", "saturation", "hue", "rand_perspective", "random_resized_crop", "random_rotation"),
        lambda args: getattr(args, "augment", None), "beside --augment smart",
    ),
    (("margin",), lambda args: args.criterion != "triplet", "without --criterion triplet"),
    (("neg_samples_num",), lambda args: args.mining == "random", "with --mining random"),
    (("scheduler_milestones",), lambda args: args.scheduler != "multistep", "without --scheduler multistep"),
    (("scheduler_factor",), lambda args: args.scheduler in ("none", "cosine"), "with this --scheduler"),
    (("scheduler_epochs",), lambda args: args.scheduler not in ("step", "plateau"), "with this --scheduler"),
    (("ssl_weight",), lambda args: not args.ssl, "without --ssl"),
    (("weights", "foundation_model_path"), lambda args: args.resume_model, "beside --resume_model"),
    (("pca_whiten", "pca_dataset_folder"), lambda args: not args.pca_dim, "without --pca_dim"),
    (("majority_weight",), lambda args: args.test_method != "maj_voting", "without --test_method maj_voting"),
    (("save_only_wrong_preds",), lambda args: not args.num_preds_to_save, "without --num_preds_to_save"),
    (("freeze_te",), lambda args: not args.backbone.startswith("dino"), "on another backbone than DINOv2"),
    (("encoder_mode",), lambda args: not args.crossimage_encoder, "without --crossimage_encoder"),
    _of_layer("l2", "gem"),
    _of_layer("ghost_clusters", "supervlad"),
    *(_of_layer(name, what.partition(",")[0]) for name, what in SIZES.items()),
    (
        ("rerank", "test_method", "pca_dim", "save_descriptors", "num_preds_to_save", "recall_values",
         "night_queries", "dataset_name", "datasets_folder"),
        lambda args: getattr(args, "query", None), "with --query",
    ),
    (("scales", "pca_dim", "rerank"), lambda args: getattr(args, "export", None), "with --export"),
)  # fmt: skip


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    if not 1 <= (value := whole(text)) < LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is less than 1, or too large")
    return value


def not_negative(text: str) -> int:
    """A whole number, 0 or above."""
    if not 0 <= (value := whole(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is less than 0, or too large")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    if not 0 < (value := number(text)) < LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or too large")
    return value


def strength(text: str) -> float:
    """A number, 0 or above."""
    if not 0 <= (value := number(text)) < LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or above, or too large")
    return value


def share(text: str) -> float:
    """A number between 0 and 1."""
    if not 0 <= (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def with_recipe(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    recipe: str,
    more: Mapping = {},
) -> argparse.Namespace:
    """Parsed arguments whose defaults are those of the recipe, and `more`."""
    actions = {action.dest: action for action in parser._actions}
    defaults = {"recipe": recipe, **RECIPES[recipe].defaults, **more}
    for name, value in defaults.items():
        if name in actions:
            of_paths = isinstance(value, list) and actions[name].type is Path
            parser.set_defaults(**{name: [Path(v) for v in value] if of_paths else value})
    return parser.parse_args(argv)


def warn_of_idle(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Warn of each flag on a command line that has no effect beside the others."""
    given = {word.split("=")[0] for word in argv}
    for names, is_idle, why in IDLE:
        for flag in (f"--{name}" for name in names):
            if flag in given and is_idle(args):
                warn(f"{flag} has no effect {why}.")


def half_precision_flag(option: Callable, flag: str) -> None:
    """The name that a published program has for --precision fp16."""
    option(
        flag, dest="precision", action="store_const", const="fp16", default=argparse.SUPPRESS,
        help="as --precision fp16",
    )  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where the run goes, on what it runs."""
    option = parser.add_argument_group("run").add_argument
    option("--save_dir", default="default", help="the run goes to logs/SAVE_DIR/DATE")
    option(
        "--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)"
    )
    option(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="auto: bf16 where it is fast; fp16: float16 on GPUs without bf16",
    )
    option("--seed", type=not_negative, default=0, help="of everything random (default: 0)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The architecture."""
    option = parser.add_argument_group("model").add_argument
    option("--recipe", choices=RECIPES, help="default: the one whose flags are given, or netvlad")
    option("--backbone", type=backbone_name, choices=BACKBONES, help="default: the recipe's")
    option("--aggregation", choices=AGGREGATIONS, help="default: the recipe's")
    option("--fc_output_dim", type=positive, help="a linear layer to so many numbers at the end")
    option("--l2", choices=L2_PLACES, default=L2_PLACES[0], help="of GeM (default: before_pool)")
    for name, what in SIZES.items():
        default = AGGREGATION_SETTINGS[name]
        option(f"--{name}", type=positive, default=default, help=f"of {what} (default: {default})")
    option("--ghost_clusters", type=not_negative, default=1, help="of supervlad (default: 1)")
    option(
        "--crossimage_encoder", action="store_true", help="of supervlad: images attend to images"
    )
    option(
        "--encoder_mode", choices=ENCODER_MODES, default="alone", help="at test (default: alone)"
    )
    option(
        "--freeze_te", type=not_negative, metavar="N",
        help="train DINOv2's blocks from N on, 0: everything (default: the last 4)",
    )  # fmt: skip


def add_training_flags(parser: argparse.ArgumentParser, last: str) -> None:
    """Of every training; last: the name of its last checkpoint."""
    option = parser.add_argument_group("training").add_argument
    option("--resume", "--resume_train", type=Path, metavar="FILE", help=f"go on with this {last}")
    option(
        "--weights", "--foundation_model_path",
        help="of the backbone: imagenet (default), none (random, calibrated), a file",
    )  # fmt: skip
    option("--resume_model", type=Path, metavar="FILE", help="begin with this model's weights")
    option("--epochs_num", type=not_negative, help="at most; 0: test only")
    option("--lr", type=above_zero, help="peak rate")
    option("--optim", choices=OPTIMIZERS, default="adam", help="default: adam")
    option("--weight_decay", type=strength, help="default: 0, of adamw 1e-2, of sgd 1e-3")
    option("--scheduler", choices=SCHEDULERS, default="none", help="of the rate (default: none)")
    option("--scheduler_epochs", type=positive, default=5, help="of step, patience of plateau")
    option("--scheduler_factor", type=above_zero, default=0.3, help="of all but cosine")
    option("--scheduler_milestones", type=positive, nargs="+", default=[], help="of multistep")
    option("--warmup_epochs", type=strength, default=0.0, help="may be a share of one (default: 0)")
    option("--patience", type=positive, help="epochs without a better val recall")
    option(
        "--drift_batchnorm", action="store_true", help="let frozen statistics drift, as published"
    )


def add_test_flags(parser: argparse.ArgumentParser) -> None:
    """How queries and index images are described and ranked."""
    option = parser.add_argument_group("test").add_argument
    option("--resize", type=positive, nargs=2, default=RESIZE, metavar=("H", "W"))
    option("--infer_batch_size", type=positive, default=16, help="default: 16")
    option("--test_method", choices=METHODS, default="hard_resize", help="of queries")
    option("--majority_weight", type=strength, default=0.01, help="of maj_voting (default: 0.01)")
    option(
        "--scales", type=above_zero, nargs="+", default=[1.0], help="of queries and index images"
    )
    option("--pca_dim", type=positive, help="reduce descriptors to so many numbers")
    option("--pca_dataset_folder", type=Path, help="images to fit it on, below --datasets_folder")
    option("--pca_whiten", action="store_true", help="divide by the standard deviations")
    option("--rerank", choices=RERANKINGS, help=f"the first {RERANKED} once more")
    option(
        "--val_positive_dist_threshold", "--positive_dist_threshold", type=above_zero,
        default=25.0, metavar="M",
    )  # fmt: skip
    option("--recall_values", type=positive, nargs="+", default=[1, 5, 10, 20], metavar="K")
    option("--night_queries", type=Path, metavar="FILE", help="names of night queries, one a line")
    option(
        "--num_preds_to_save",
        type=not_negative,
        default=0,
        metavar="N",
        help="pictures of the first N found",
    )
    option("--save_only_wrong_preds", action="store_true", help="of wrongly answered queries only")
    option(
        "--save_descriptors", type=Path, metavar="FILE.npz",
        help="of several data sets a file each, with its name added",
    )  # fmt: skip
