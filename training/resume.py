"""What a stopped run left to go on from, `checkpoints/last.pth`: writing it and taking it up."""

import argparse
import shlex
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from model import DAMAGED, WARNINGS, DescriptorModel, InputError, described_settings
from reporting import handin

SAVED = {"settings", "images", "model", "clustered", "origin", "warnings", "training"}  # its keys
RULES = 3  # by which runs draw and train: raised where one could not go on as it began
ANY_TIME = {"output", "device", "quiet", "resume"}  # settings that may differ when resuming


def read_saved(output: Path) -> dict:
    """What a run saved in `output`. InputError if there is nothing, or nothing of base.py's."""
    file = output / handin.LAST
    if not file.is_file():
        raise InputError(f"there is no {file} to resume from: run without --resume.")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        complete = isinstance(saved, dict) and saved.keys() >= SAVED
    except DAMAGED:
        complete = False
    if not complete:
        raise InputError(
            f"{file} is no checkpoint of base.py, or damaged: remove it and run without --resume."
        )
    return saved


def resume_settings(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str] | None
) -> argparse.Namespace:
    """The settings of the run that stopped in args.output, as `args.saved` all that it saved.

    The run goes on where it lies now. InputError if nothing was saved there, or by another version,
    or argv names another value for a setting, or what was saved is not finite.
    """
    saved = read_saved(args.output)
    if (saved["settings"].keys(), saved.get("rules")) != (settings_of(args).keys(), RULES):
        raise InputError(
            f"{args.output / handin.LAST} was saved by another version of base.py: go on with that "
            "version, or begin anew with another --output."
        )
    handin.forget_parts((args.output / handin.LAST).parent)
    if name := _not_finite(saved):
        raise InputError(
            f"{args.output / handin.LAST} holds values that are not finite ({name}): remove it and "
            "run without --resume."
        )
    known = {k: v for k, v in saved["settings"].items() if k not in ANY_TIME}
    parser.set_defaults(**known)
    args = parser.parse_args(argv)
    for name, value in settings_of(args).items():
        # The data may have moved: whether it is the same its digest tells.
        if name in known.keys() - {"dataset"} and value != known[name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} is {value} but was {known[name]} in the run to resume: leave {flag} out, or "
                "begin anew with another --output."
            )
    args.saved = saved
    return args


def _not_finite(saved: object) -> str | None:
    """The name of a tensor with a value that is not finite, if there is one anywhere in `saved`."""
    if isinstance(saved, torch.Tensor):
        return None if torch.isfinite(saved).all() else ""
    for name, part in saved.items() if isinstance(saved, dict) else ():
        if (inside := _not_finite(part)) is not None:
            return f"{name}.{inside}".removesuffix(".")
    return None


def settings_of(args: argparse.Namespace) -> dict:
    """The command line's values, paths as text."""
    settings = {k: v for k, v in vars(args).items() if k != "saved"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def refuse_to_overwrite(args: argparse.Namespace) -> None:
    """InputError if a new run would replace an unfinished one, or a full one by a mere trial."""
    checkpoint = args.output / handin.CHECKPOINT
    if (args.output / handin.LAST).is_file():
        saved = read_saved(args.output)
        training, epochs = saved["training"], saved["settings"]["epochs"]
        if training and (training["epoch"] <= epochs or not checkpoint.is_file()):
            raise InputError(
                f"{args.output} holds a run that stopped in epoch {min(training['epoch'], epochs)} of "
                f"{epochs}: go on with --resume, or name another --output."
            )
    if (args.limit or not args.epochs) and checkpoint.is_file() and not _was_trial(checkpoint):
        flag = f"--limit {args.limit}" if args.limit else "--epochs 0"
        raise InputError(
            f"{checkpoint} is of a full training, which {flag} would replace: name another --output."
        )


def _was_trial(checkpoint: Path) -> bool:
    """Whether a checkpoint's description says that it comes of --limit or of no epoch."""
    settings = described_settings(checkpoint)
    return settings.keys() >= {"limit", "epochs"} and (
        bool(settings["limit"]) or not settings["epochs"]
    )


def saver(
    args: argparse.Namespace, model: DescriptorModel, images: list[int]
) -> Callable[[dict | None], None]:
    """A function that writes what --resume needs: the untrained model, or the state of its training.

    images: how many training queries and index images there are, and their `digest`.
    """
    if args.saved:
        refuse_other_data(args.saved["images"], images)
    untrained = {k: v for k, v in (args.saved or {}).items() if k != "training"}

    def save(training: dict | None = None) -> None:
        if training is None:
            untrained.update(
                model={name: value.cpu().clone() for name, value in model.state_dict().items()},
                clustered=model.initialized,
                images=images,
                origin=model.weights_origin,
                warnings=list(WARNINGS),
                settings=settings_of(args),
                rules=RULES,
            )
        state = {**untrained, "training": training}
        handin.write_or_warn(args.output / handin.LAST, handin.tensors(state))
        if training and training["history"]:
            handin.write_log(args.output, training["history"])

    return save


def digest(*parts: Iterable[Path | str] | np.ndarray) -> int:
    """A number that tells lists of files, wherever they lie, and arrays from others."""
    found = 0
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        names = "" if is_array else "\n".join(Path(p).name for p in part)
        data = part.tobytes() if is_array else names.encode("utf-8", "backslashreplace")
        found = zlib.crc32(data, found)
    return found


def refuse_other_data(saved: list[int], now: list[int]) -> None:
    """InputError if a run to resume had other numbers of training images, or another digest of them."""
    if len(saved) < len(now):
        raise InputError(
            "the run to resume is of another version of this program: go on with that version, or "
            "begin anew."
        )
    if saved != now:
        had, have = (" and ".join(map(str, numbers[:-1])) for numbers in (saved, now))
        raise InputError(
            f"the run to resume had other training images or positions ({had} of them; now {have}): "
            "bring back its data, or begin anew."
        )


def how_to_resume(args: argparse.Namespace | None) -> str:
    """What to type after an interruption."""
    if args is None or not (args.output / handin.LAST).is_file():
        return "Interrupted before anything was saved: start again."
    return (
        f"Interrupted. To go on: python base.py --resume --output {shlex.quote(str(args.output))}"
    )
