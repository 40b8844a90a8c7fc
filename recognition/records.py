"""What a run leaves in logs/<save_dir>/DATE: info.log, debug.log, metrics.json."""

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import TextIO

import torch

from model import DescriptorModel, InputError
from reporting.handin import write_whole
from reporting.screen import versions


def new_run_folder(save_dir: str) -> Path:
    """A new folder logs/<save_dir>/YYYY-MM-DD_HH-mm-ss. InputError if it cannot be made."""
    while True:
        folder = Path("logs") / save_dir / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run of this second
            time.sleep(0.2)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be made ({error}): name another --save_dir."
            ) from None


class _Tee:
    """A stream that also writes whole lines into files, the last one with the time of each line."""

    def __init__(self, stream: TextIO, plain: TextIO, dated: TextIO, only: str = "") -> None:
        self.stream, self.plain, self.dated, self.only = stream, plain, dated, only
        self.line = ""

    def write(self, text: str) -> int:
        self.line += text
        *lines, self.line = self.line.split("\n")
        for line in lines:
            line = line.rpartition("\r")[2]  # what a progress bar wrote before is gone
            if line.startswith(self.only):
                self.plain.write(line + "\n")
                self.dated.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
                self.plain.flush()
                self.dated.flush()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def logged(run: Path, argv: Sequence[str] | None) -> Iterator[None]:
    """Whatever is printed inside goes into info.log too, with times and errors into debug.log.

    A run that goes on adds to its files.
    """
    how = {"mode": "a", "encoding": "utf-8", "errors": "backslashreplace"}
    with open(run / "info.log", **how) as info, open(run / "debug.log", **how) as debug:
        out = _Tee(sys.stdout, info, debug)
        warnings = _Tee(sys.stderr, info, debug, "WARNING")
        with redirect_stdout(out), redirect_stderr(warnings):
            command = shlex.join(
                [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
            )
            print(f"Command: {command}")
            print(f"Output: {run}")
            print("Machine: " + ", ".join(f"{k} {v}" for k, v in versions().items()))
            try:
                yield
            except BaseException as error:
                if isinstance(error, InputError):
                    info.write(f"{error}\n")
                debug.write(traceback.format_exc())
                raise


def print_arguments(settings: Mapping, device: torch.device) -> None:
    """Print all settings, and what is computed on."""
    print("Arguments: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"Device: {device}")


def print_model(model: DescriptorModel, work: dict, size: Sequence[int]) -> None:
    """Print what a model is and takes. work: of recipes.count_work."""
    print(
        f"Model: {work['parameters']:,} parameters, {work['trained']:,} trained, {work['mb']:.1f} MB, "
        f"{work['gflops']:.2f} GFLOPs at {size[0]} x {size[1]} (two for each multiply-add)."
    )
    print(f"Descriptor dimension: {work['descriptor_dim']}. Weights: {model.weights_origin}.")


def plain(args: argparse.Namespace, names: Sequence[str] | None = None) -> dict:
    """Arguments as JSON has them, those of `names` or all."""
    values = vars(args) if names is None else {name: getattr(args, name) for name in names}
    return {k: _plain(v) for k, v in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def read(run: Path) -> dict:
    """What metrics.json holds; {} where there is none of a run."""
    try:
        found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("recall"), dict) else {}


def write(run: Path, metrics: dict) -> None:
    """metrics.json, whole or not at all."""
    metrics = {**metrics, "date": datetime.now().isoformat(sep=" ", timespec="seconds")}
    text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
    content = text.encode("utf-8", "backslashreplace")
    write_whole(run / "metrics.json", lambda part: part.write_bytes(content))
