"""Both commands on a tiny rendered set, and the copies of the code in output/."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import NetVLADModel

ROOT = Path(__file__).parents[1]
FILES = (
    "checkpoints/netvlad_final.pth", "checkpoints/netvlad_final.json", "task3_result.png",
    "result_pose_eval.txt", "estimated_poses.tsv", "metrics.json", "report/report.md",
    "base.py", "model.py", "train.py", "eval.py", "test.py", "localization/localize.py",
    "reporting/figures.py", "dataset/sample/town.py",
)  # fmt: skip


def run(script: str, *words: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def both(sample, tmp_path_factory) -> tuple[Path, str, str]:
    """The output folder of both scripts, and what they printed."""
    output = tmp_path_factory.mktemp("both") / "out"
    said = run(
        "base.py", "--dataset", sample, "--output", output, "--epochs", 1, "--weights", "none",
        "--image-size", 96,
    )  # fmt: skip
    checkpoint = output / "checkpoints" / "netvlad_final.pth"
    poses = run(
        "test.py", "--camera", sample / "camera", "--checkpoint", checkpoint, "--output", output,
        "--no-cache",
    )  # fmt: skip
    return output, said, poses


def test_every_file_of_the_hand_in_is_there_and_nothing_half_written(both):
    output, said, poses = both
    assert [name for name in FILES if not (output / name).is_file()] == []
    assert not [p for p in output.rglob("*") if p.name.startswith(".") or "tmp" in p.name]
    assert re.search(r"^Recall@1: \d+/\d+ = \d+\.\d\d%$", said, re.MULTILINE)
    assert re.search(r"^Mean Pose Error: \d+\.\d{4}$", poses, re.MULTILINE)
    assert re.search(r"^Mean Rotation Error: \d+\.\d\d deg$", poses, re.MULTILINE)
    state = torch.load(output / "checkpoints/netvlad_final.pth", weights_only=True)
    NetVLADModel(num_clusters=16, pretrained=False).load_state_dict(state)


def test_metrics_hold_what_was_printed_and_say_what_fell_back(both):
    output, said, poses = both
    metrics = json.loads((output / "metrics.json").read_text())
    recall = metrics["base"]["recall"]["val"]
    hits, queries = re.search(r"Recall@5: (\d+)/(\d+)", said).groups()
    assert recall["trained"][4] == pytest.approx(int(hits) / int(queries))
    mean = re.search(r"Mean Pose Error: (\S+)", poses).group(1)
    assert metrics["test"]["mean_m"] == pytest.approx(float(mean), abs=1e-4)
    assert metrics["base"]["weights"]["origin"].startswith("random, calibrated on")
    assert metrics["base"]["checkpoint"] == metrics["test"]["checkpoint"]
    described = json.loads((output / "checkpoints/netvlad_final.json").read_text())
    assert described["sha256"] == metrics["base"]["checkpoint"]
    assert "random" in (output / "report/report.md").read_text()


def test_pictures_of_task_four_are_there_and_in_the_report(both):
    output, _, _ = both
    section = json.loads((output / "metrics.json").read_text())["test"]
    files = [picture["file"] for picture in section["pictures"]]
    worst = max(section["per_query"], key=lambda row: row["error_m"])
    assert "errors.png" in files and f"matches_{worst['scene']}_{Path(worst['path']).stem}.png" in files
    assert {f"poses_{scene}.png" for scene in section["scenes"]} <= set(files)
    assert sum(file.startswith("matches_") for file in files) == min(3, section["queries"])
    assert sorted(p.name for p in (output / "report").glob("*.png")) == sorted(files)
    text = (output / "report/report.md").read_text()
    assert all(f"](<{file}>)" in text for file in files)


def test_copies_run_from_output_and_copy_nothing_onto_themselves(both, sample):
    output, _, _ = both
    assert "--camera" in run("test.py", "--help", cwd=output)
    before = (output / "eval.py").read_bytes()
    run(
        "eval.py", "--checkpoint", "checkpoints/netvlad_final.pth", "--dataset", sample, cwd=output
    )  # fmt: skip
    assert (output / "eval.py").read_bytes() == before
