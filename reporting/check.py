"""Looks at a hand-in as a grader would, and packs it: `python -m reporting.handin [OUTPUT]`.

Each check looks at what lies in the folder and says what it found; none trusts another.
"""

import argparse
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PdfParser

from reporting import handin
from reporting.screen import on_screen

PROJECT = Path(__file__).resolve().parents[1]
ASSIGNED_SCENES = ["P001", "P002", "P003", "P004"]
RUN_TIMEOUT_S = 120
POSE_HEAD = (
    ("Top-1 retrieval pose evaluation", r"Top-1 retrieval pose evaluation"),
    ("(queries=N, index=M)", r"\(queries=(\d+), index=(\d+)\)"),
    ("", r""),
)
POSE_ENTRY = (
    ("Query: <path>", r"Query: (.+)"),
    ("Best Match: <path>", r"Best Match: (.+)"),
    ("Embed Dist: <4 decimals>", r"Embed Dist: (\d+\.\d{4})"),
    ("Translation Error: <4 decimals> m, Rotation Error: <2 decimals> deg",
     r"Translation Error: (\d+\.\d{4}|nan) m, Rotation Error: (\d+\.\d{2}|nan) deg"),
    ("", r""),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a check says: it holds (True), fails (False), or a word of warning (None); and why."""

    holds: bool | None
    subject: str
    detail: str


def examine(output: Path, allow_sample: bool = False) -> list[Finding]:
    """The findings on the hand-in that lies in `output`."""
    output = Path(output)
    findings = [_files(output), _checkpoint(output)]
    try:
        metrics = handin.read_metrics(output)
    except ValueError as error:
        metrics = {}
        findings.append(Finding(False, "metrics.json", str(error)))
    sha256 = handin.file_sha256(output / handin.CHECKPOINT) if findings[1].holds else None
    return [
        *findings, _pose_file(output, metrics.get("test") or {}), _pictures(output, metrics),
        _code(output), _scripts(output), *_sections(output, metrics, sha256),
        _report(output, sha256), *_data(metrics, allow_sample),
    ]  # fmt: skip


# ---------------------------------------------------------------- the checks

def _files(output: Path) -> Finding:
    absent = [
        f"{name} ({maker} writes it)"
        for name, maker in handin.RESULTS.items() if not (output / name).is_file()
    ]
    detail = f"missing: {', '.join(absent)}" if absent else f"all {len(handin.RESULTS)} are there"
    return Finding(not absent, "result files", detail)


def _checkpoint(output: Path) -> Finding:
    """Whether the state dict is one of the module that the course builds, and describes an image."""
    import torch  # only here: the other checks do without

    from model import NetVLADModel  # likewise

    try:
        state = torch.load(output / handin.CHECKPOINT, map_location="cpu", weights_only=True)
        model = NetVLADModel(num_clusters=16, pretrained=False)
        model.load_state_dict(state)
        with torch.inference_mode():
            norm = float(model.eval()(torch.rand(1, 3, 64, 64)).norm())
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
            pickle.UnpicklingError) as error:  # what torch raises for damaged and for other files
        reason = " ".join(str(error).split())[:200]
        return Finding(False, "checkpoint", f"no state dict of NetVLADModel(num_clusters=16): {reason}")
    if not math.isclose(norm, 1, abs_tol=1e-3):
        return Finding(False, "checkpoint", f"its descriptors have norm {norm:g}, not 1")
    return Finding(True, "checkpoint", "loads into NetVLADModel(num_clusters=16), descriptors of norm 1")


def _pose_file(output: Path, test: dict) -> Finding:
    """result_pose_eval.txt: to the letter, and with the numbers of metrics.json."""
    subject = "result_pose_eval.txt"
    try:
        text = (output / subject).read_bytes().decode("utf-8")
        found = parse_pose_text(text)
    except (OSError, ValueError) as error:
        return Finding(False, subject, str(error))
    expected = [(a["path"], _said(a["error_m"], 4), _said(a["error_deg"], 2))
                for a in test.get("per_query") or []]
    if found != expected:
        return Finding(False, subject, "its queries and errors are not those of metrics.json; run test.py again")
    return Finding(True, subject, f"{len(found)} queries, to the letter, errors as in metrics.json")


def _said(value: float | None, decimals: int) -> str:
    return "nan" if value is None else f"{value:.{decimals}f}"


def parse_pose_text(text: str) -> list[tuple[str, str, str]]:
    """(query, translation error, rotation error) of each entry of a result_pose_eval.txt, as written.

    ValueError naming the first line that is not as the assignment has it.
    """
    lines = text.split("\n")
    if lines.pop():
        raise ValueError("its last line does not end")
    fields = []
    for number, line in enumerate(lines):
        head = number < len(POSE_HEAD)
        shape, pattern = POSE_HEAD[number] if head else POSE_ENTRY[(number - len(POSE_HEAD)) % len(POSE_ENTRY)]
        match = re.fullmatch(pattern, line)
        if not match:
            raise ValueError(f"line {number + 1} is {line[:60]!r}, not {shape!r}")
        fields.append(match.groups())
    entries = fields[len(POSE_HEAD):]
    if len(fields) < len(POSE_HEAD) or len(entries) % len(POSE_ENTRY):
        raise ValueError(f"it ends after {len(lines)} lines in the middle of an entry")
    if int(fields[1][0]) != len(entries) // len(POSE_ENTRY):
        raise ValueError(f"it announces {fields[1][0]} queries and holds {len(entries) // len(POSE_ENTRY)}")
    return [
        (entries[start][0], *entries[start + 3]) for start in range(0, len(entries), len(POSE_ENTRY))
    ]


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
    detail = f"missing or not to be opened: {', '.join(bad)}" if bad else f"{len(names)} open"
    return Finding(not bad, "pictures", detail)


def _code(output: Path) -> Finding:
    """Whether the copies are byte for byte the project's."""
    subject = "copies of the code"
    if PROJECT == output.resolve():
        return Finding(None, subject, "this is the copy: run the check from the project to compare")
    names = handin.code_files(PROJECT)
    copied = set(handin.code_files(output))
    absent = [name for name in names if not (output / name).is_file()]
    changed = [
        name for name in names
        if name not in absent and (output / name).read_bytes() != (PROJECT / name).read_bytes()
    ]
    faults = [
        f"{word} {', '.join(found)}"
        for word, found in (("missing", absent), ("not the project's", changed),
                            ("not in the project", sorted(copied - set(names)))) if found
    ]
    detail = "; ".join(faults) if faults else f"{len(names)} files, identical to the project's"
    return Finding(not faults, subject, detail)


def _scripts(output: Path) -> Finding:
    """Whether each script starts in the folder, with what lies there alone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    runs = {
        name: subprocess.Popen(
            [sys.executable, name, "--help"], cwd=output, env=environment, text=True, encoding="utf-8",
            errors="replace", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for name in handin.SCRIPTS
    }  # fmt: skip
    faults = []
    for name, run in runs.items():
        try:
            said = run.communicate(timeout=RUN_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            run.kill()
            said = run.communicate()[1] + f"no end within {RUN_TIMEOUT_S} s"
        if run.returncode:
            faults.append(f"{name}: {(said.strip().splitlines() or ['fails without a word'])[-1]}")
    detail = "; ".join(faults) if faults else f"all {len(handin.SCRIPTS)} run where they lie"
    return Finding(not faults, "scripts", detail)


def _sections(output: Path, metrics: dict, sha256: str | None) -> list[Finding]:
    """Whether both scripts' results and the description are of the checkpoint that lies there."""
    findings = []
    for section, script in handin.SECTIONS.items():
        subject = f"results of {script}"
        if section not in metrics:
            findings.append(Finding(False, subject, f"not in metrics.json: run {script}"))
        elif metrics[section].get("checkpoint") != sha256:
            findings.append(Finding(False, subject, f"of another checkpoint: run {script} again"))
        else:
            findings.append(Finding(True, subject, f"of this checkpoint, {metrics[section].get('date')}"))
    try:
        text = (output / handin.DESCRIPTION).read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if sha256 is None or sha256 not in text:
        findings.append(Finding(False, handin.DESCRIPTION, "missing or of another checkpoint: run base.py again"))
    return findings


def _report(output: Path, sha256: str | None) -> Finding:
    """Whether both forms of the report are of this checkpoint, and its pictures are there."""
    folder = output / "report"
    faults = []
    try:
        text = (folder / "report.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        faults.append("report.md cannot be read")
    else:
        if set(re.findall(r"\b[0-9a-f]{64}\b", text)) != {sha256}:
            faults.append("report.md is of another checkpoint")
        links = re.findall(r"!\[.*?\]\(<(.+?)>\)", text)
        faults += [f"report.md shows {link}, which is missing" for link in links
                   if not (folder / link).is_file()]
    try:
        with PdfParser.PdfParser(folder / "report.pdf") as pdf:
            pages = len(pdf.pages)
            if getattr(pdf.info, "Subject", None) != f"checkpoint {sha256}":
                faults.append("report.pdf is of another checkpoint")
    except (OSError, ValueError, PdfParser.PdfFormatError):
        faults.append("report.pdf cannot be read")
    if faults:
        return Finding(False, "report", "; ".join(faults) + ": run base.py or test.py again")
    return Finding(True, "report", f"of this checkpoint, {pages} pages, all its pictures there")


def _data(metrics: dict, allow_sample: bool) -> list[Finding]:
    """Whether the figures are of the course's data, and what else a grader should know."""
    findings = []
    if sample := handin.sample_sections(metrics):
        detail = f"{sample} used the built-in sample, not the course's data"
        findings.append(Finding(None if allow_sample else False, "data", detail))
    elif metrics:
        findings.append(Finding(True, "data", "not the built-in sample"))
    base, test = metrics.get("base") or {}, metrics.get("test") or {}
    weights = base.get("weights") or {}
    if weights.get("pretrained") is False:
        findings.append(Finding(None, "weights", f"VGG16's were {weights.get('origin')}, not ImageNet's"))
    if limit := (base.get("settings") or {}).get("limit"):
        findings.append(Finding(None, "queries", f"base.py used {limit} of each list (--limit)"))
    if test and test.get("scenes") != ASSIGNED_SCENES:
        findings.append(Finding(None, "scenes", f"{' '.join(test.get('scenes') or [])}, not {' '.join(ASSIGNED_SCENES)}"))
    return findings


# ---------------------------------------------------------------- the command

def table(findings: list[Finding]) -> str:
    """A line a finding: tick, cross or exclamation mark, subject, detail."""
    signs = {True: "✓", False: "✗", None: "!"}
    try:
        "".join(signs.values()).encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        signs = {True: "+", False: "x", None: "!"}
    width = max(len(finding.subject) for finding in findings)
    return "\n".join(f"{signs[f.holds]} {f.subject:{width}s}  {f.detail}" for f in findings)


def pack(output: Path, archive: Path) -> int:
    """Zip what lies in `output`, in a folder of the archive's name; the number of files.

    ValueError when it cannot be written.
    """
    files = [
        file for file in sorted(output.rglob("*"))
        if file.is_file() and file.resolve() != archive.resolve() and _is_packed(file.relative_to(output))
    ]

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in files:
                packed.write(file, f"{archive.stem}/{file.relative_to(output).as_posix()}")

    handin.write_whole(archive, write)
    return len(files)


def _is_packed(file: Path) -> bool:
    """Whether a file of the folder goes into the archive: no caches, hidden files, rendered sample, and
    nothing that only resuming a training needs."""
    if any(part.startswith(".") or part == "__pycache__" for part in file.parts):
        return False
    if file.parts[0] == "checkpoints":
        return file.as_posix() in handin.RESULTS
    return file.parts[:2] != ("dataset", "sample")


def main(argv: list[str] | None = None) -> int:
    """The command: 0 when all holds, 1 when something fails, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m reporting.handin", description="Check a hand-in as a grader would.")
    parser.add_argument("output", type=Path, nargs="?", default=Path("output"), help="default: %(default)s")
    parser.add_argument("--zip", type=Path, metavar="NAME", help="pack the folder into this file if all holds")
    parser.add_argument("--allow-sample", action="store_true", help="accept results on the built-in sample")
    args = parser.parse_args(argv)
    with on_screen():
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Print the findings, and pack what holds; the exit code."""
    if not args.output.is_dir():
        print(f"reporting.handin: {args.output} is no folder: run base.py, or name its --output.", file=sys.stderr)
        return 2
    findings = examine(args.output, args.allow_sample)
    print(table(findings))
    failed = sum(finding.holds is False for finding in findings)
    if failed:
        not_packed = "" if args.zip is None else f" {args.zip} was not written."
        print(f"Not ready to be handed in: {failed} {'check fails' if failed == 1 else 'checks fail'}.{not_packed}")
        return 1
    print("Ready to be handed in.")
    if args.zip is not None:
        archive = args.zip if args.zip.suffix else args.zip.with_suffix(".zip")
        try:
            count = pack(args.output, archive)
        except ValueError as error:
            print(f"reporting.handin: {error}", file=sys.stderr)
            return 2
        print(f"{count} files packed into {archive}.")
    return 0
