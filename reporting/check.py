"""Looks at a hand-in as a grader would, and packs it.

    python -m reporting.check                      # output/
    python -m reporting.check DIR --zip pa1.zip    # and pack it if all holds

Each check looks at what lies in the folder and says what it found; none trusts another.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from localization.frames import ASSIGNED_SCENES
from model import DAMAGED, InputError, NetVLADModel, refuse
from reporting import handin
from reporting.pose_file import pose_text, read_pose_text
from reporting.screen import on_screen

PROJECT = Path(__file__).resolve().parents[1]
RUN_TIMEOUT_S = 120
MOST_BYTES = 2_000_000  # of a scene to turn
RESULTS = {  # what a hand-in holds besides the code, and which script makes it
    handin.CHECKPOINT: "base.py",
    handin.DESCRIPTION: "base.py",
    "task3_result.png": "base.py",
    "result_pose_eval.txt": "test.py",
    "estimated_poses.tsv": "test.py",
    "metrics.json": "base.py and test.py",
    "report/report.md": "base.py and test.py",
    "report/report.html": "base.py and test.py",
}


@dataclass(frozen=True)
class Finding:
    """What a check says: it holds (True), fails (False), or a word of warning (None); and why."""

    holds: bool | None
    subject: str
    detail: str


def finding(subject: str, faults: list[str], else_good: str) -> Finding:
    """The finding of a check that lists what is wrong."""
    return Finding(not faults, subject, "; ".join(faults) or else_good)


def missing(output: Path) -> list[str]:
    """What the hand-in still lacks, a line each, by the checks that take no time."""
    sha256, metrics, broken = _read(Path(output))
    of_checkpoint = _sections(output, metrics, sha256) if sha256 else []
    found = [_files(output), *broken, *of_checkpoint, *_data(metrics, False)]
    return [f"{each.subject}: {each.detail}" for each in found if each.holds is False]


def examine(output: Path, allow_sample: bool = False) -> list[Finding]:
    """The findings on the hand-in that lies in `output`."""
    sha256, metrics, broken = _read(output)
    return [
        _files(output),
        _checkpoint(output),
        *broken,
        _pose_file(output, metrics.get("test") or {}),
        _pictures(output, metrics),
        _views(output, metrics),
        _code(output),
        _scripts(output),
        *_sections(output, metrics, sha256),
        _report(output, sha256),
        *_data(metrics, allow_sample),
    ]


def _read(output: Path) -> tuple[str | None, dict, list[Finding]]:
    """The checkpoint's hash, what metrics.json holds, and that it is broken if it is."""
    checkpoint = output / handin.CHECKPOINT
    sha256 = handin.file_sha256(checkpoint) if checkpoint.is_file() else None
    try:
        return sha256, handin.read_metrics(output), []
    except InputError as error:
        return sha256, {}, [Finding(False, "metrics.json", str(error))]


def _files(output: Path) -> Finding:
    lacks = [
        f"{name} ({maker})" for name, maker in RESULTS.items() if not (output / name).is_file()
    ]
    faults = [f"missing: {', '.join(lacks)}"] if lacks else []
    return finding("result files", faults, f"all {len(RESULTS)} are there")


def _checkpoint(output: Path) -> Finding:
    """Whether any computer loads the state dict into the module that the course builds."""
    subject, devices = "checkpoint", set()

    def note(storage, location: str):
        devices.add(location)
        return storage

    try:
        state = torch.load(output / handin.CHECKPOINT, map_location=note, weights_only=True)
        model = NetVLADModel(num_clusters=16, pretrained=False)
        model.load_state_dict(state)
        with torch.inference_mode():
            norm = float(model.eval()(torch.rand(1, 3, 64, 64)).norm())
    except (*DAMAGED, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        return Finding(False, subject, f"no state dict of NetVLADModel(num_clusters=16): {reason}")
    faults = []
    if elsewhere := sorted(devices - {"cpu"}):
        faults.append(
            f"tensors lie on {', '.join(elsewhere)}: a computer without one cannot load them"
        )
    if not math.isclose(norm, 1, abs_tol=1e-3):
        faults.append(f"its descriptors have norm {norm:g}, not 1")
    good = "loads anywhere into NetVLADModel(num_clusters=16), descriptors of norm 1"
    return finding(subject, faults, good)


def _pose_file(output: Path, test: dict) -> Finding:
    """result_pose_eval.txt: to the letter, and with the numbers of metrics.json."""
    subject = "result_pose_eval.txt"
    try:
        text = (output / subject).read_bytes().decode("utf-8")
        rows = read_pose_text(text)
    except (OSError, ValueError) as error:
        return Finding(False, subject, str(error))
    said = pose_text(test.get("per_query") or [], test.get("index", 0))
    faults = [] if text == said else ["it is not of the results in metrics.json: run test.py again"]
    return finding(
        subject, faults, f"{len(rows)} queries, to the letter, errors as in metrics.json"
    )


def _pictures(output: Path, metrics: dict) -> Finding:
    shown = [picture["file"] for picture in (metrics.get("test") or {}).get("pictures") or []]
    names = ["task3_result.png", *(f"report/{name}" for name in shown)]
    bad = []
    for name in names:
        try:
            with Image.open(output / name) as image:
                image.load()
        except (OSError, SyntaxError, ValueError):
            bad.append(name)
    faults = [f"missing or not to be opened: {', '.join(bad)}"] if bad else []
    return finding("pictures", faults, f"{len(names)} open")


def _views(output: Path, metrics: dict) -> Finding:
    """Whether the scenes to turn are there, each one file that asks for no other, and small."""
    subject, faults = "scenes to turn", []
    names = [view["file"] for view in (metrics.get("test") or {}).get("views") or []]
    for name in names:
        try:
            page = (output / "report" / name).read_bytes()
        except OSError:
            faults.append(f"{name} is missing: run test.py again")
            continue
        if len(page) > MOST_BYTES:
            faults.append(f"{name} has {len(page)} bytes, more than {MOST_BYTES}")
        if re.search(rb"<link|<script[^>]* src|https?://", page):
            faults.append(f"{name} asks for other files")
    return finding(subject, faults, f"{len(names)}, each one small file that needs no other")


def _code(output: Path) -> Finding:
    """Whether the copies are byte for byte the project's."""
    subject = "copies of the code"
    if PROJECT == output.resolve():
        return Finding(None, subject, "this is the copy: run the check from the project to compare")
    ours, copied = handin.code_files(PROJECT), handin.code_files(output)
    both = [name for name in ours if name in copied]
    kinds = {
        "missing": [name for name in ours if name not in copied],
        "not in the project": [name for name in copied if name not in ours],
        "not the project's": [
            name for name in both if (output / name).read_bytes() != (PROJECT / name).read_bytes()
        ],
    }
    faults = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
    return finding(subject, faults, f"{len(ours)} files, identical to the project's")


def _scripts(output: Path) -> Finding:
    """Whether each script starts in the folder, with what lies there alone."""
    with ThreadPoolExecutor(max_workers=2) as pool:  # each imports PyTorch
        faults = [fault for fault in pool.map(partial(_start, output), handin.SCRIPTS) if fault]
    return finding("scripts", faults, f"all {len(handin.SCRIPTS)} run where they lie")


def _start(output: Path, name: str) -> str:
    """What goes wrong when a script is asked for help; "" if nothing does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    command, options = [sys.executable, name, "--help"], {"cwd": output, "env": environment}
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=RUN_TIMEOUT_S, **options)
    except subprocess.TimeoutExpired:
        return f"{name}: no end within {RUN_TIMEOUT_S} s"
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip() or "fails without a word"
        return f"{name}: {said.splitlines()[-1]}"
    return ""


def _sections(output: Path, metrics: dict, sha256: str | None) -> list[Finding]:
    """Whether both scripts' results and the description are of the checkpoint that lies there."""
    findings = []
    for section, script in handin.SECTIONS.items():
        faults = []
        if section not in metrics:
            faults.append(f"not in metrics.json: run {script}")
        elif metrics[section].get("checkpoint") != sha256:
            faults.append(f"of another checkpoint: run {script} again")
        date = (metrics.get(section) or {}).get("date")
        findings.append(finding(f"results of {script}", faults, f"of this checkpoint, {date}"))
    try:
        described = json.loads((output / handin.DESCRIPTION).read_text(encoding="utf-8")).get(
            "sha256"
        )
    except (OSError, ValueError, AttributeError):
        described = None
    if described is None or described != sha256:
        fault = "missing or of another checkpoint: run base.py again"
        findings.append(Finding(False, handin.DESCRIPTION, fault))
    return findings


def _report(output: Path, sha256: str | None) -> Finding:
    """Whether both forms of the report are of this checkpoint, with all their pictures."""
    faults, pictures = [], []
    for name in ("report.md", "report.html"):
        try:
            text = (output / "report" / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            faults.append(f"{name} cannot be read")
            continue
        if set(re.findall(r"\b[0-9a-f]{64}\b", text)) != {sha256}:
            faults.append(f"{name} is of another checkpoint")
        if name == "report.md":
            pictures = re.findall(r"!\[.*?\]\(<(.+?)>\)", text)
            lost = [link for link in pictures if not (output / "report" / link).is_file()]
            faults += [f"{name} shows {link}, which is missing" for link in lost]
        elif text.count("<figure>") != len(pictures):
            faults.append(f"{name} does not hold the pictures of report.md")
    faults += ["run base.py or test.py again"] if faults else []
    return finding("report", faults, f"of this checkpoint, {len(pictures)} pictures")


def _data(metrics: dict, allow_sample: bool) -> list[Finding]:
    """Whether the figures are of the course's data, and what else a grader should know."""
    base, test = (metrics.get(section) or {} for section in handin.SECTIONS)
    samples = [
        script
        for script, section in zip(handin.SECTIONS.values(), (base, test))
        if (section.get("data") or {}).get("is_sample")
    ]
    findings = [Finding(True, "data", "not the built-in sample")] if metrics else []
    if samples:
        detail = f"{' and '.join(samples)} used the built-in sample, not the course's data"
        findings = [Finding(None if allow_sample else False, "data", detail)]
    weights, limit = base.get("weights") or {}, (base.get("settings") or {}).get("limit")
    notes = {}
    if weights.get("pretrained") is False:
        notes["weights"] = f"VGG16's were {weights.get('origin')}, not ImageNet's"
    if limit:
        notes["queries"] = f"base.py used {limit} of each list (--limit)"
    if test and test.get("scenes") != list(ASSIGNED_SCENES):
        notes["scenes"] = f"{' '.join(test.get('scenes') or [])}, not {' '.join(ASSIGNED_SCENES)}"
    return findings + [Finding(None, subject, detail) for subject, detail in notes.items()]


def table(findings: list[Finding]) -> str:
    """A line a finding: whether it holds, subject, detail."""
    words = {True: "ok", False: "FAILS", None: "note"}
    width = max(len(each.subject) for each in findings)
    return "\n".join(f"{words[f.holds]:6s}{f.subject:{width}s}  {f.detail}" for f in findings)


def pack(output: Path, archive: Path) -> int:
    """Zip what lies in `output`, in a folder of the archive's name; the number of files.

    Left out are caches, hidden files, rendered images and what only resuming a training needs.
    InputError when it cannot be written.
    """
    files = []
    for file in sorted(output.rglob("*")):
        inside = file.relative_to(output)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        resuming = inside.parts[0] == "checkpoints" and inside.as_posix() not in RESULTS
        rendered = inside.parts[:2] == ("dataset", "sample") and file.suffix != ".py"
        if file.is_file() and file.resolve() != archive.resolve():
            files += [] if hidden or resuming or rendered else [file]

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in files:
                packed.write(file, f"{archive.stem}/{file.relative_to(output).as_posix()}")

    handin.write_whole(archive, write)
    return len(files)


def main(argv: list[str] | None = None) -> int:
    """The command: 0 when all holds, 1 when something fails, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m reporting.check", description="Check a hand-in as a grader would."
    )
    option = parser.add_argument
    option("output", type=Path, nargs="?", default=Path("output"), help="default: %(default)s")
    option("--zip", type=Path, metavar="NAME", help="pack the folder into this file if all holds")
    option("--allow-sample", action="store_true", help="accept results on the built-in sample")
    args = parser.parse_args(argv)
    try:
        with on_screen():
            return run(args.output, args.zip, args.allow_sample)
    except InputError as error:
        return refuse("reporting.check", error)


def run(output: Path, archive: Path | None, allow_sample: bool) -> int:
    """Print the findings, and pack what holds; the exit code."""
    if not output.is_dir():
        raise InputError(f"{output} is no folder: run base.py, or name its --output.")
    findings = examine(output, allow_sample)
    print(table(findings))
    if failed := sum(each.holds is False for each in findings):
        not_packed = "" if archive is None else f" {archive} was not written."
        print(f"Not ready to be handed in, checks that fail: {failed}.{not_packed}")
        return 1
    print("Ready to be handed in.")
    if archive is not None:
        archive = archive if archive.suffix else archive.with_suffix(".zip")
        print(f"{pack(output, archive)} files packed into {archive}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
