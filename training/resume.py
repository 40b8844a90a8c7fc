"""What a stopped run left to go on from, `checkpoints/last.pth`: writing it and taking it up."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from eval import rank_and_world
from model import DAMAGED, WARNINGS, InputError, NetVLADModel, blame_input
from reporting import handin

LAST = "checkpoints/last.pth"  # what --resume goes on from
SAVED = {"settings", "images", "model", "clustered", "origin", "warnings", "training"}  # its keys
ANY_TIME = {"output", "device", "workers", "resume"}  # settings that may differ when resuming


def take_up(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str] | None
) -> argparse.Namespace:
    """The settings of the run that stopped in args.output, as `args.saved` all that it saved.

    Raises InputError if nothing was saved there, or argv names another value for a setting.
    """
    file = args.output / LAST
    if not file.is_file():
        raise InputError(f"there is no {file} to resume from: run without --resume.")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        complete = isinstance(saved, dict) and saved.keys() >= SAVED
    except DAMAGED:
        complete = False
    if not complete:
        raise InputError(f"{file} is no checkpoint of base.py: run without --resume.")
    parser.set_defaults(**saved["settings"])
    args = parser.parse_args(argv)
    for name, value in settings_of(args).items():
        if name not in ANY_TIME and value != saved["settings"][name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} is {value} but was {saved['settings'][name]} in the run to resume: leave "
                f"{flag} out, or run without --resume."
            )
    args.saved = saved
    return args


def settings_of(args: argparse.Namespace) -> dict:
    """The command line's values, paths as text."""
    settings = {k: v for k, v in vars(args).items() if k != "saved"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def saver(
    args: argparse.Namespace, model: NetVLADModel, images: list[int]
) -> Callable[[dict | None], None]:
    """A function that writes what --resume needs: the untrained model, or the state of its training.

    images: how many training queries and index images there are. What an earlier run left is removed,
    unless it is the run that is resumed; InputError if that one had another number of images.
    """
    file = args.output / LAST
    if args.saved and args.saved["images"] != images:
        raise InputError(
            f"the run to resume had {args.saved['images']} training queries and index images, now "
            f"there are {images}: bring back its data, or run without --resume."
        )
    untrained = {k: v for k, v in (args.saved or {}).items() if k != "training"}

    def save(training: dict | None = None) -> None:
        if rank_and_world()[0] > 0:
            return
        if training is None:
            untrained.update(
                model={name: value.cpu().clone() for name, value in model.state_dict().items()},
                clustered=model.netvlad.initialized, images=images, origin=model.weights_origin,
                warnings=list(WARNINGS), settings=settings_of(args),
            )  # fmt: skip
        with blame_input():
            state = {**untrained, "training": training}
            handin.write_whole(file, lambda path: torch.save(state, path))
            if training and training["history"]:
                handin.write_log(args.output, training["history"])

    if not args.saved and rank_and_world()[0] == 0:
        file.unlink(missing_ok=True)
    return save


def how_to_resume(args: argparse.Namespace | None) -> str:
    """What to type after an interruption."""
    if args is None or not (args.output / LAST).is_file():
        return "Interrupted before anything was saved: start again."
    return f"Interrupted. To go on: python base.py --resume --output {shlex.quote(str(args.output))}"
