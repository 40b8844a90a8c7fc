"""Fills output/, the folder that is handed in, and says what it still lacks.

    python -m reporting.handin                      # check output/ as a grader would (check.py)
    python -m reporting.handin DIR --zip pa1.zip    # and pack it if all holds

The scripts call `write_whole`, `copy_code`, `update_metrics` and `missing`; nothing here calls them
back.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

SCRIPTS = ("base.py", "model.py", "train.py", "eval.py", "test.py")
PACKAGES = ("localization", "reporting", "training")
SAMPLE_FILES = ("dataset/__init__.py", "dataset/lists.py", "dataset/sample.py")
OTHER_FILES = ("requirements.txt", "LICENSE")
IGNORED_FOLDERS = {"__pycache__", ".cache"}

CHECKPOINT = "checkpoints/netvlad_final.pth"
DESCRIPTION = "checkpoints/netvlad_final.json"
# What a hand-in holds besides the code, and which script makes it.
RESULTS = {
    CHECKPOINT: "base.py",
    DESCRIPTION: "base.py",
    "task3_result.png": "base.py",
    "result_pose_eval.txt": "test.py",
    "estimated_poses.tsv": "test.py",
    "metrics.json": "base.py and test.py",
    "report/report.md": "base.py and test.py",
    "report/report.pdf": "base.py and test.py",
}
SECTIONS = {"base": "base.py", "test": "test.py"}


# ---------------------------------------------------------------- writing

def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Whoever reads `path` sees the old file or the new one, never half of one. The temporary file has
    the suffix of `path`, by which Pillow chooses the format. ValueError when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write {path}: {reason}; choose another --output") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal: what ties results to a checkpoint."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_checkpoint(checkpoint: Path, section: dict) -> str:
    """Write beside a checkpoint, as .json, what it was made of, from a section of metrics.json.

    -> the checkpoint's hash.
    """
    sha256 = file_sha256(checkpoint)
    keys = ("weights", "data", "seed", "clusters", "versions", "settings")
    text = json.dumps(
        {"sha256": sha256, **{key: section[key] for key in keys}}, indent=2, ensure_ascii=False
    )
    content = text.encode("utf-8", "backslashreplace")
    write_whole(checkpoint.with_suffix(".json"), lambda part: _write_bytes(part, content))
    return sha256


def write_log(output: Path, epochs: list[dict]) -> None:
    """train_log.csv: the numbers of each epoch, a line each."""
    rows = [epochs[0], *(epoch.values() for epoch in epochs)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_whole(output / "train_log.csv", lambda part: _write_bytes(part, text.encode()))


def code_files(project: Path) -> list[str]:
    """The code that is handed in, as paths relative to `project` with forward slashes."""
    packaged = [
        file.relative_to(project).as_posix()
        for package in PACKAGES
        for file in sorted((project / package).rglob("*"))
        if file.is_file()
        and not file.name.startswith(".")
        and not IGNORED_FOLDERS & set(file.relative_to(project).parts)
    ]
    single = [name for name in (*SCRIPTS, *SAMPLE_FILES, *OTHER_FILES) if (project / name).is_file()]
    return single + packaged


def copy_code(project: Path, output: Path) -> None:
    """Copy the code to `output`, so that it runs from there; nothing when both are one folder.

    A .py file in the copied packages that the project no longer has is removed: it would be
    imported. ValueError when something cannot be written.
    """
    project, output = Path(project).resolve(), Path(output).resolve()
    if project == output:
        return
    names = code_files(project)
    for name in names:
        content = (project / name).read_bytes()
        target = output / name
        if not (target.is_file() and target.read_bytes() == content):
            write_whole(target, lambda part, content=content: _write_bytes(part, content))
    for package in PACKAGES:
        for copy in (output / package).rglob("*.py"):
            if copy.relative_to(output).as_posix() not in names:
                copy.unlink()


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# ---------------------------------------------------------------- metrics.json

def read_metrics(output: Path) -> dict:
    """What metrics.json holds; {} without the file; ValueError when it is broken."""
    path = Path(output) / "metrics.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and run again") from error


def update_metrics(output: Path, section: str, data: dict, checkpoint_sha256: str) -> dict:
    """Replace one script's section of metrics.json, and return the whole.

    The section gets the checkpoint's hash and the date; sections of another checkpoint are marked
    `"stale": true`, those of this one are unmarked. A broken file is begun anew, and its "warnings"
    say so. Numbers that JSON does not have (NaN, infinities) become null.
    """
    output = Path(output)
    try:
        metrics = read_metrics(output)
    except ValueError:
        lost = f"metrics.json was broken and was begun anew on {_now()}: earlier sections are lost"
        metrics = {"warnings": [lost]}
    metrics[section] = {**data, "checkpoint": checkpoint_sha256, "date": _now()}
    for value in metrics.values():
        if isinstance(value, dict) and "checkpoint" in value:
            value.pop("stale", None)
            if value["checkpoint"] != checkpoint_sha256:
                value["stale"] = True
    metrics = _plain(metrics)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is no valid Unicode has lone surrogates, which UTF-8 cannot hold.
    content = text.encode("utf-8", "backslashreplace")
    write_whole(output / "metrics.json", lambda part: _write_bytes(part, content))
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


# ---------------------------------------------------------------- what is missing

def missing(output: Path) -> list[str]:
    """What the hand-in still lacks, a short sentence each; [] when it looks complete.

    Cheap enough for the last lines of both scripts.
    """
    output = Path(output)
    lacks = [
        f"{name}: {maker} writes it" for name, maker in RESULTS.items()
        if not (output / name).is_file()
    ]
    lacks += [f"{name}: base.py copies it" for name in SCRIPTS if not (output / name).is_file()]
    try:
        metrics = read_metrics(output)
    except ValueError as error:
        return [*lacks, str(error)]
    for section, script in SECTIONS.items():
        if section not in metrics:
            lacks.append(f"the results of {script}: run it")
        elif metrics[section].get("stale"):
            lacks.append(f"results of {script} for this checkpoint: run it again")
    if sample := sample_sections(metrics):
        lacks.append(f"results on the course's data: {sample} used the built-in sample")
    return lacks


def sample_sections(metrics: dict) -> str:
    """The scripts whose results come from the built-in sample, joined by "and"; "" for none."""
    return " and ".join(
        script for section, script in SECTIONS.items()
        if metrics.get(section, {}).get("data", {}).get("is_sample")
    )


if __name__ == "__main__":
    from reporting.check import main  # only here: it imports this module

    sys.exit(main())
