"""Fills output/, the folder that is handed in: files written whole, metrics.json, copies of the code.

The scripts call this room; it calls none of them back. check.py looks at what lies there.
"""

import hashlib
import itertools
import json
import math
import os
import re
import runpy
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch

from model import InputError, warn

SCRIPTS = ("base.py", "model.py", "train.py", "eval.py", "test.py")
OTHER_FILES = (
    "requirements.txt",
    "LICENSE",
    "reporting/method.md",
    "reporting/project.md",
    "reporting/fonts/LICENSE",
)
# Whose code is handed in; not what lies deeper, where data may be.
FOLDERS = "dataset dataset/sample localization recognition reporting reporting/fonts training"
RESULT_FILES = (
    "README.md",
    "metrics.json",
    "task3_result.png",
    "result_pose_eval.txt",
    "estimated_poses.tsv",
    "query_poses.tsv",
)
CODE_SUFFIXES = {".py", ".ttf", ".html"}

CHECKPOINT = "checkpoints/netvlad_final.pth"
DESCRIPTION = "checkpoints/netvlad_final.json"
LAST = "checkpoints/last.pth"  # what an unfinished run goes on from
SECTIONS = {"base": "base.py", "test": "test.py"}  # of metrics.json, and who writes them
PARTS = (
    "data",
    "settings",
    "weights",
    "recall",
    "retrieval",
    "methods",
    "cameras",
    "phases",
)  # of these
README_TITLE = "# The hand-in of the NetVLAD project"
README = f"""{README_TITLE}

`python base.py` and `python test.py` write into this folder: checkpoint, recall picture, pose results,
report, copies of the code. Nothing in here is made by hand. Git ignores all of it but this file.
"""
UNSEEN = {"Thumbs.db", "desktop.ini"}  # what file managers leave behind, beside hidden files
PAUSES_S = (0.1, 0.3, 1.0)  # before each new try to replace a file that is open elsewhere

T = TypeVar("T")


def check_output(folder: Path) -> None:
    """InputError if `folder` cannot be written, or holds files and is not ours.

    It is by our README, which claim_output puts there, metrics.json or an unfinished run's checkpoint.
    """
    folder = Path(folder)
    try:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(
            f"cannot read {folder}: {error.strerror}; choose another folder."
        ) from error
    names = [name for name in names if not name.startswith(".") and name not in UNSEEN]
    if (checkpoint := folder / CHECKPOINT).is_dir():
        raise InputError(f"{checkpoint} is a folder, where a file is to be: remove or rename it.")
    if names and not _is_ours(folder):
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise InputError(
            f"{folder} holds files that this program did not write ({some}): name a new or an empty "
            "folder with --output."
        )
    refuse_unwritable(folder)


def refuse_unwritable(folder: Path) -> None:
    """InputError if nothing can be written into `folder`, which is made if need be."""
    probe = folder / f".{uuid4().hex}.probe"
    write_text(probe, "")
    probe.unlink()


def claim_output(folder: Path) -> None:
    """Make a folder that check_output allows ours, before a run writes into it."""
    readme = Path(folder) / "README.md"
    if not readme.exists() or _has_title(readme):
        write_text(readme, README)


def is_own(folder: Path, path: Path) -> bool:
    """Whether a run that writes into `folder` writes `path` too, or something below it."""
    path, folder = path.resolve(), folder.resolve()
    if not path.is_relative_to(folder):
        return folder.is_relative_to(path)
    first = path.relative_to(folder).parts[:1]
    return not first or first[0] in {
        *SCRIPTS, *RESULT_FILES, *(name.split("/")[0] for name in (*OTHER_FILES, *FOLDERS.split())),
        "checkpoints", "report",
    }  # fmt: skip


def _is_ours(folder: Path) -> bool:
    try:
        sections = [read_metrics(folder).get(name) for name in SECTIONS]
    except InputError:
        sections = []
    return (
        _has_title(folder / "README.md")
        or any(isinstance(section, dict) and "checkpoint" in section for section in sections)
        or (folder / LAST).exists()
    )


def _has_title(readme: Path) -> bool:
    try:
        return readme.read_text(encoding="utf-8").startswith(README_TITLE)
    except (OSError, ValueError):
        return False


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Whoever reads `path` sees the old file or the new one, never half of one. The temporary file has
    the suffix of `path`, by which Pillow chooses the format, and a name that no other thread or run
    takes. InputError when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid4().hex}.part{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        mend = "close what has it open, or " if isinstance(error, PermissionError) else ""
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; {mend}choose another folder."
        ) from error


def forget_parts(folder: Path) -> None:
    """Remove the temporary files of `write_whole` that a run that was killed left behind."""
    for part in folder.glob(".*.part*"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.part(\.\w+)?", part.name):
            part.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """os.replace; Windows refuses while another program has the target open: tried a few times."""
    for pause_s in PAUSES_S:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause_s)
    return os.replace(source, target)


def write_or_warn(path: Path, write: Callable[[Path], object]) -> None:
    """As write_whole, but what cannot be written now costs a warning, not the run."""
    try:
        write_whole(path, write)
    except InputError as error:
        warn(f"{error} The run goes on without.")


def draw_or_warn(what: str, draw: Callable[[], T]) -> T | None:
    """What `draw` returns; None when it fails, which costs this picture and a warning that names it.

    The traceback of what is not bad input goes to stderr.
    """
    try:
        return draw()
    except Exception as error:  # noqa: BLE001, whatever fails in a picture must not cost the run
        if not isinstance(error, InputError):
            traceback.print_exc()
        warn(f"{what} is missing, it could not be made: {type(error).__name__}: {error}")
        return None


def tensors(state: object) -> Callable[[Path], None]:
    """What `write_whole` needs to torch.save `state`; on a full disk an OSError, as of any file."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # of closing an archive whose writing failed
                raise error.__context__ or error

    return write


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with \\n line ends, whole; what is no valid Unicode in file names as escapes."""
    content = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda part: part.write_bytes(content))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal: what ties results to a checkpoint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_checkpoint(checkpoint: Path, section: dict) -> str:
    """Write beside a checkpoint, as .json, what it was made of, from a section of metrics.json.

    -> the checkpoint's hash.
    """
    sha256 = file_sha256(checkpoint)
    keys = ("weights", "data", "seed", "clusters", "versions", "settings")
    described = {"sha256": sha256, **{key: section[key] for key in keys}}
    write_text(checkpoint.with_suffix(".json"), json.dumps(described, indent=2, ensure_ascii=False))
    return sha256


def write_log(output: Path, epochs: list[dict]) -> None:
    """train_log.csv: the numbers of each epoch, a line each; a warning where it cannot be written."""
    rows = [epochs[0], *(epoch.values() for epoch in epochs)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_or_warn(output / "train_log.csv", lambda part: part.write_bytes(text.encode()))


def code_files(project: Path) -> list[str]:
    """The code that is handed in, as paths relative to `project` with forward slashes."""
    single = [name for name in (*SCRIPTS, *OTHER_FILES) if (project / name).is_file()]
    return single + [
        file.relative_to(project).as_posix()
        for folder in FOLDERS.split()
        for file in sorted((project / folder).glob("[!.]*"))
        if file.is_file() and file.suffix in CODE_SUFFIXES
    ]


def copy_code(project: Path, output: Path) -> None:
    """Copy the code to `output`, so that it runs from there; nothing when both are one folder.

    metrics.json keeps the hash of each copy. A file that is no copy, or was edited since, is neither
    replaced nor removed; a warning names it. InputError when something cannot be written.
    """
    project, output = Path(project).resolve(), Path(output).resolve()
    if project == output:
        return
    metrics = _metrics_or_new(output)
    copies = metrics.setdefault("copies", {})
    names, kept = code_files(project), []
    try:
        for name in names:
            target, content = output / name, (project / name).read_bytes()
            there = file_sha256(target) if target.is_file() else None
            wanted = hashlib.sha256(content).hexdigest()
            if there not in (None, wanted, copies.get(name)):
                kept.append(name)
                continue
            if there != wanted:
                write_whole(
                    target, lambda part, content=content: part.write_bytes(content) and None
                )
            copies[name] = wanted
        for name in sorted(copies.keys() - set(names)):  # the project has it no more
            target = output / name
            if target.is_file() and file_sha256(target) == copies[name]:
                target.unlink()
            del copies[name]
    finally:
        _write_metrics(output, metrics)
    if kept:
        warn(
            f"{', '.join(kept)} in {output} were not written by this program, or edited since, and "
            "are kept as they are: move them away and run again to have the project's."
        )


def read_metrics(output: Path) -> dict:
    """What metrics.json holds; {} without the file; InputError when it is broken."""
    path = Path(output) / "metrics.json"
    if not path.exists():
        return {}
    try:
        metrics = dict(json.loads(path.read_text(encoding="utf-8")))
        if wrong := [name for name in SECTIONS if not isinstance(metrics.get(name, {}), dict)]:
            raise ValueError(f"its {wrong[0]} is no section")
        parts = itertools.product(SECTIONS.keys() & metrics.keys(), PARTS)
        if wrong := [a for a in parts if not isinstance(metrics[a[0]].get(a[1]) or {}, dict)]:
            raise ValueError(f"{wrong[0][1]} of its {wrong[0][0]} is no table")
        return metrics
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run again.") from error


def update_metrics(output: Path, section: str, data: dict, checkpoint_sha256: str) -> dict:
    """Replace one script's section of metrics.json, and return the whole.

    The section gets the checkpoint's hash and the date; sections of another checkpoint are marked
    `"stale": true`, those of this one are unmarked. Numbers that JSON does not have (NaN, infinities)
    become null.
    """
    metrics = _metrics_or_new(output)
    metrics[section] = {**data, "checkpoint": checkpoint_sha256, "date": _now()}
    for name in SECTIONS.keys() & metrics.keys():
        metrics[name].pop("stale", None)
        if metrics[name].get("checkpoint") != checkpoint_sha256:
            metrics[name]["stale"] = True
    return _write_metrics(output, metrics)


def _metrics_or_new(output: Path) -> dict:
    """What metrics.json holds; a broken file is begun anew, and its "warnings" say so."""
    try:
        return read_metrics(output)
    except InputError:
        lost = f"metrics.json was broken and was begun anew on {_now()}: earlier sections are lost"
        return {"warnings": [lost]}


def _write_metrics(output: Path, metrics: dict) -> dict:
    metrics = _plain(metrics)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(Path(output) / "metrics.json", text)
    return metrics


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _plain(value):
    """`value` in the types JSON has: arrays and tensors as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


if __name__ == "__main__":
    runpy.run_module("reporting.project", run_name="__main__")  # it imports this file
