"""What happens when a run is stopped, resumed, or does not fit."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import base
from model import load_checkpoint
from reporting.handin import CHECKPOINT, LAST
from tests.dataset.places import make_lists
from training.inputs import Inputs


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "base.py", *map(str, words)]
    return subprocess.Popen(
        command, cwd=Path(base.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_killed_then_resumed_ends_with_the_weights_of_an_unbroken_run(tmp_path, capsys):
    for split, queries in (("train", 6), ("val", 1)):
        make_lists(tmp_path / "data", queries, 2 * queries, split)
    words = ["--dataset", tmp_path / "data", "--weights", "none", "--epochs", 2, "--batch-size", 2,
             "--clusters", 4, "--image-size", 96]  # fmt: skip
    outputs = tmp_path / "broken", tmp_path / "whole"
    killed = start(*words, "--output", outputs[0])
    wait_for(outputs[0] / "train_log.csv", killed)  # the first epoch is done and saved
    killed.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    killed.communicate()
    assert not (outputs[0] / "checkpoints/netvlad_final.pth").exists()
    last = torch.load(outputs[0] / LAST, weights_only=True)
    assert last["training"]["epoch"] == 2

    lists = tmp_path / "data" / "query_train.txt", tmp_path / "data" / "gt/pitts30k_train.npz"
    kept = [file.read_bytes() for file in lists]
    lists[0].write_text(lists[0].read_text().split("\n", 1)[1])
    truth = np.load(lists[1])
    np.savez(lists[1], utmQ=truth["utmQ"][1:], utmDb=truth["utmDb"], posDistThr=25)
    resume = ["--resume", "--output", str(outputs[0])]
    said = "had other training images or positions (6 and 12 of them; now {} and 12)"
    assert base.main(resume) == 2 and said.format(5) in capsys.readouterr().err
    lists[0].write_text("".join(reversed(kept[0].decode().splitlines(keepends=True))))
    lists[1].write_bytes(kept[1])
    assert base.main(resume) == 2 and said.format(6) in capsys.readouterr().err
    for file, content in zip(lists, kept):
        file.write_bytes(content)

    assert base.main(resume) == 0
    said = capsys.readouterr().out
    assert "calibrating" not in said and "k-means" not in said and "Epoch 1/2" not in said
    assert "Epoch 2/2" in said
    assert base.main([*map(str, words), "--output", str(outputs[1])]) == 0
    first, second = (
        torch.load(output / "checkpoints/netvlad_final.pth", weights_only=True) for output in outputs
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [list(csv.DictReader((output / "train_log.csv").open())) for output in outputs]
    assert [row["epoch"] for row in logs[0]] == ["1", "2"]
    assert [{**row, "seconds": 0} for row in logs[0]] == [{**row, "seconds": 0} for row in logs[1]]


def test_interrupting_ends_with_a_line_on_how_to_go_on(tmp_path):
    # Tests that run in the background may ignore Ctrl-C, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for split, queries in (("train", 6), ("val", 1)):
        make_lists(tmp_path / "data", queries, 2 * queries, split)
    output = tmp_path / "o"
    process = start("--dataset", tmp_path / "data", "--weights", "none", "--output", output)
    wait_for(output / LAST, process)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate()
    assert process.returncode == 130
    assert complaints.splitlines()[-1].endswith(f"python base.py --resume --output {output}")
    assert "Traceback" not in complaints


def test_out_of_gpu_memory_names_the_flag(tmp_path, monkeypatch, capsys):
    def full(args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base, "run", full)
    assert base.main(["--output", str(tmp_path), "--batch-size", "64"]) == 2
    assert "lower --batch-size (now 64)" in capsys.readouterr().err


def run_small(folder: Path, *words: object) -> int:
    """base.py on two small lists, one epoch, 4 clusters."""
    for split in ("train", "val"):
        if not (folder / f"data/query_{split}.txt").exists():
            make_lists(folder / "data", 4, 8, split)
    return base.main(["--dataset", str(folder / "data"), "--epochs", "1", "--quiet", *map(str, words)])


def test_another_image_size_is_kept_with_the_checkpoint_and_a_training_goes_on_from_it(
    tmp_path, capsys
):
    first = ["--weights", "none", "--clusters", 4, "--image-size", 64, "--output", tmp_path / "a"]
    assert run_small(tmp_path, *first) == 0
    checkpoint = tmp_path / "a/checkpoints/netvlad_final.pth"
    assert load_checkpoint(checkpoint).image_size == 64
    assert run_small(tmp_path, "--init", checkpoint, "--lr", 1e-30, "--output", tmp_path / "b") == 0
    assert "Weights: checkpoint netvlad_final.pth" in capsys.readouterr().out
    old, new = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "b" / CHECKPOINT))
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)
    assert load_checkpoint(tmp_path / "b" / CHECKPOINT).image_size == 64
    metrics = json.loads((tmp_path / "b/metrics.json").read_text())["base"]
    assert metrics["clusters"] == 4 and metrics["settings"]["image_size"] == 64
    assert run_small(tmp_path, "--resume", "--output", tmp_path / "b") == 0  # of 4 clusters, not 16
    for more, words in {
        ("--clusters", 8): "has 4 clusters",
        ("--weights", "none"): "has its own",
        ("--backbone", "resnet18conv4"): "has its own",
    }.items():
        assert run_small(tmp_path, "--init", checkpoint, "--output", tmp_path / "c", *more) == 2
        assert words in capsys.readouterr().err


def test_parts_of_other_systems_are_trained_on_the_assignment_s_lists(tmp_path):
    words = ["--backbone", "resnet18", "--aggregation", "gem", "--weights", "none"]
    assert run_small(tmp_path, *words, "--image-size", 64, "--output", tmp_path / "a") == 0
    state = torch.load(tmp_path / "a" / CHECKPOINT, weights_only=True)
    assert state["aggregation.p"].shape == (1,) and "netvlad.centers" not in state


def test_a_run_stopped_before_its_clusters_goes_on_as_an_unbroken_one(tmp_path, monkeypatch, capsys):
    for split, queries in (("train", 20), ("val", 1)):  # so many that a start could be chosen
        make_lists(tmp_path / "data", queries, 2 * queries, split)
    words = ["--dataset", tmp_path / "data", "--weights", "none", "--epochs", 0, "--clusters", 4,
             "--image-size", 32]  # fmt: skip
    outputs = tmp_path / "broken", tmp_path / "whole"

    def stop(inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Inputs, "cache", stop)
        assert base.main([*map(str, words), "--output", str(outputs[0])]) == 130
    assert base.main(["--resume", "--output", str(outputs[0])]) == 0
    assert "choosing the start" not in capsys.readouterr().out  # that is for weights that learned
    assert base.main([*map(str, words), "--output", str(outputs[1])]) == 0
    first, second = (torch.load(output / CHECKPOINT, weights_only=True) for output in outputs)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_queries_without_any_index_image_near_cannot_be_trained_on(tmp_path, capsys):
    make_lists(tmp_path / "data", 4, 8)
    truth = tmp_path / "data" / "gt/pitts30k_train.npz"
    arrays = dict(np.load(truth))
    np.savez(truth, **{**arrays, "utmQ": arrays["utmQ"] + 500})
    words = ["--weights", "none", "--clusters", 4, "--image-size", 32, "--output", tmp_path / "o"]
    assert run_small(tmp_path, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "training queries has an index image within 25 m" in said and "--epochs 0" in said
