"""Reading of the assignment's data: lists, truth, limits, what is odd about them; resuming."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import base
from model import InputError
from training.resume import LAST


def make_lists(root: Path, queries: int = 3, index: int = 6, split: str = "train") -> None:
    """A row of places 1 km apart: query i stands 5 m beside index image 2 i, 15 m beside 2 i + 1."""
    rng = np.random.default_rng(0)
    for kind, count in (("query", queries), ("index", index)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{split}{i}.jpg")
            lines.append(f"dataset/{kind}/{split}{i}.jpg")
        (root / f"{kind}_{split}.txt").write_text("\n".join(lines) + "\n")
    place = np.arange(queries)[:, None] * [1000.0, 0]
    beside = np.repeat(np.arange(index // 2)[:, None] * [1000.0, 0], 2, axis=0)
    (root / "gt").mkdir(exist_ok=True)
    np.savez(
        root / "gt" / f"pitts30k_{split}.npz", utmQ=place,
        utmDb=beside + np.tile([[0, 5.0], [0, 15.0]], (index // 2, 1)), posDistThr=25,
    )  # fmt: skip


def test_a_line_is_looked_for_in_three_places_and_inside_first_on_demand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("dataset/query/a.jpg", "root/dataset/query/a.jpg", "root/query/a.jpg"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
    Path("list.txt").write_text("./dataset/query/a.jpg\n\n")
    expected = ["dataset/query/a.jpg", "root/dataset/query/a.jpg", "root/query/a.jpg"]
    assert base.read_list("list.txt", "root", inside_first=True) == [Path(expected[2])]
    for place in expected:
        assert base.read_list("list.txt", "root") == [Path(place)]
        Path(place).unlink()
    assert base.read_list("list.txt", "root") == [Path(expected[2])]  # named where it should be


def test_seeded_draws_repeat_and_others_do_not(tmp_path):
    make_lists(tmp_path, 3, 60)
    fixed = base.read_split(tmp_path, "train", seed=3)
    assert [fixed.draw(i) for i in range(3)] == [fixed.draw(i) for i in range(3)]
    free = base.read_split(tmp_path, "train")
    assert len({free.draw(0) for _ in range(40)}) > 10


def test_limit_keeps_the_index_images_of_the_queries_it_keeps(tmp_path):
    make_lists(tmp_path, 10, 20)
    data = base.read_split(tmp_path, "train", limit=3)
    assert [path.name for path in data.queries.paths] == ["train0.jpg", "train4.jpg", "train9.jpg"]
    names = {path.name for path in data.index.paths}
    assert {f"train{i}.jpg" for i in (0, 1, 8, 9, 18, 19)} < names
    assert len(names) == len(data.utm_index) == 12
    for i in range(3):
        assert np.linalg.norm(data.utm_index - data.utm_query[i], axis=1).min() == 5


def test_oddities_are_told(tmp_path):
    make_lists(tmp_path, split="train")
    make_lists(tmp_path, split="val")
    lines = (tmp_path / "index_val.txt").read_text().splitlines()
    lines[1], lines[2] = lines[0], "dataset/index/train0.jpg"
    (tmp_path / "index_val.txt").write_text("\n".join(lines))
    val = np.load(tmp_path / "gt/pitts30k_val.npz")
    np.savez(tmp_path / "gt/pitts30k_val.npz", utmQ=val["utmQ"] + [[0, 0], [0, 0], [0, 500]],
             utmDb=val["utmDb"], posDistThr=25)  # fmt: skip
    splits = {name: base.read_split(tmp_path, name) for name in ("train", "val")}
    told = "\n".join(base.look_at(splits))
    assert "val: 1 images are listed more than once" in told
    assert "val: 1 queries have no index image within 25 m" in told
    assert "1 images are both in train and in val" in told
    assert "train:" not in told


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    assert base.load_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)


def test_only_our_own_transform_gets_a_reduced_image(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    sizes = []
    seen = base.ImageListDataset(tmp_path / "list.txt", tmp_path, lambda image: sizes.append(image.size))
    seen[0]
    assert seen.paths and sizes == [(640, 480)]
    assert base.ImageListDataset(tmp_path / "list.txt", tmp_path)[0][0].size == (640, 480)


def test_absent_test_lists_are_no_error_but_half_of_them_are(tmp_path):
    make_lists(tmp_path)
    assert base.read_split(tmp_path, "test") is None
    (tmp_path / "query_test.txt").write_text("dataset/query/train0.jpg\n")
    with pytest.raises(InputError, match="index_test.txt"):
        base.read_split(tmp_path, "test")


# ---------------------------------------------------------------- resuming


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


def test_killed_then_resumed_ends_with_the_weights_of_an_unbroken_run(tmp_path):
    for split, queries in (("train", 6), ("val", 1)):
        make_lists(tmp_path / "data", queries, 2 * queries, split)
    words = ["--dataset", tmp_path / "data", "--weights", "none", "--epochs", 2, "--batch-size", 2,
             "--clusters", 4]  # fmt: skip
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
    refused = start("--resume", "--output", outputs[0])
    assert "had [6, 12] training queries and index images" in refused.communicate()[1]
    assert refused.returncode == 2
    for file, content in zip(lists, kept):
        file.write_bytes(content)

    resumed = start("--resume", "--output", outputs[0])
    said, complaints = resumed.communicate()
    assert resumed.returncode == 0, complaints
    assert "calibrating" not in said and "k-means" not in said and "Epoch 1/2" not in said
    assert "Epoch 2/2" in said
    whole = start(*words, "--output", outputs[1])
    assert whole.wait() == 0, whole.communicate()
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
