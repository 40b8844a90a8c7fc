"""What a family of recipes (families.py) hands to the commands: where its data is, and what to train."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.folders import FolderSplit, read_split
from eval import first_hits, search
from model import DescriptorModel, InputError, warn
from training.inputs import Inputs

Judge = Callable[[DescriptorModel], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Where:
    """Folders: of training, of the split that chooses the epoch, and by name those tested in the end.

    A tested folder holds database/ and queries/. is_sample: whether it is the built-in sample.
    """

    tests: dict[str, Path]
    train: Path | None = None
    val: Path | None = None
    is_sample: bool = False


@dataclass
class Job:
    """A training: what train() is given, and what the command prints and keeps of it.

    loader, val_loader, objective, judge: as train() wants them; the loader has `epoch`, `state_dict`
    and so on. start: the training images, of which random weights are calibrated and clusters begin.
    kept: inputs whose frozen outputs are computed once if there is room. images: two numbers of
    training images, and their digest, which must be the same when the run is taken up. size: height
    and width at which the work is counted. split: places by which to choose how pretrained weights
    begin. record: more numbers for metrics.json.
    """

    loader: Iterable
    objective: nn.Module
    judge: Judge
    start: Inputs
    images: list[int]
    size: tuple[int, int]
    val_loader: Iterable = ()
    kept: Sequence[Inputs] = ()
    split: FolderSplit | None = None
    record: dict = field(default_factory=dict)


def recall_at(hits: np.ndarray, ranked: int, values: Sequence[int]) -> list[float]:
    """Recall in 0..1 at each K of ranks of first hits; K beyond the `ranked` images count as all."""
    return [float((hits < min(k, ranked)).mean()) for k in values]


def read_val(args: argparse.Namespace, folder: Path, name: str, *how: object) -> FolderSplit:
    """The split that chooses the epoch, printed. InputError where it cannot choose any.

    how: the rest of read_split's arguments.
    """
    split = read_split(folder, args.val_positive_dist_threshold, *how)
    report_split(name, split, max(args.recall_values))
    if args.epochs_num and split.without_positives == len(split):
        raise InputError(
            f"none of the {len(split)} queries in {folder} has a database image within "
            f"{split.threshold:g} m, so no epoch can be chosen by them: raise "
            "--val_positive_dist_threshold, or give other val images."
        )
    return split


def val_judge(split: FolderSplit, inputs: Inputs, values: Sequence[int], scored_k: int) -> Judge:
    """Recall on val, for train(): the score of an epoch is R@scored_k.

    inputs: of the queries, then of the index images.
    """

    def judge(model: DescriptorModel) -> tuple[Tensor, dict[str, float]]:
        rows = np.arange(len(inputs))
        queries = inputs.describe(model, rows[: len(split)], "val queries")
        index = inputs.describe(model, rows[len(split) :], "val database")
        where = inputs.device, not model.unit_norm
        return judged(split, queries, index, values, scored_k, *where)

    return judge


def judged(
    split: FolderSplit,
    queries: np.ndarray,
    index: np.ndarray,
    values: Sequence[int],
    scored_k: int,
    device: torch.device,
    by_distance: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """What a judge says of descriptors (nq, D), (nd, D); by_distance: as eval.search."""
    shown = sorted({*values, 1, scored_k})
    _, ranking = search(queries, index, shown[-1], device, by_distance)
    found = recall_at(first_hits(ranking, split.positives), ranking.shape[1], shown)
    recall = {f"val R@{k}": value for k, value in zip(shown, found)}
    return torch.tensor([recall[f"val R@{scored_k}"]]), recall


def report_split(name: str, split: FolderSplit, most: int) -> None:
    """Print how large a split is and, where recall up to K = `most` is asked for, what cannot be answered."""
    print(f"{name}: {len(split)} queries, {len(split.index)} database images.")
    if split.without_positives and most:
        say = warn if split.without_positives == len(split) else print
        say(
            f"{name}: {split.without_positives} queries have no database image within "
            f"{split.threshold:g} m; each counts as a miss."
        )
    if most > len(split.index):
        print(f"{name}: recall beyond {len(split.index)} is that of all database images.")
