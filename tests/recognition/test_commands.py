"""The command lines on a tiny data set: what they print, write, refuse, and take up."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.lists import read_split
from dataset.sample.folders import DATA_SETS
from model import InputError
from recognition import benchmark, eval_command, records, train_command
from recognition.augmentation import SMART
from recognition.inference import transform_for
from recognition.recipes import build_model, load_any, load_model
from reporting import compare
from tests.recognition.toy import EAST, NORTH, name, picture, write_data_set, write_split

PROJECT = Path(__file__).resolve().parents[2]
TINY = [
    "--dataset_name=toy", "--weights=none", "--resize", "48", "64", "--netvlad_clusters=4",
    "--epochs_num=2", "--cache_refresh_rate=4", "--queries_per_epoch=8", "--negs_num_per_query=3",
    "--lr=1e-4", "--precision=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs of this file lie: dataset/toy and logs/."""
    folder = tmp_path_factory.mktemp("runs")
    write_data_set(folder / "dataset" / "toy")
    mixed = folder / "dataset" / "mixed" / "images" / "test"
    write_split(mixed, range(60, 63), note="day_forward")
    write_split(mixed, range(63, 65), note="night_forward")
    write_split(folder / "dataset" / "toyval" / "images" / "test", range(20, 26))  # toy's val
    empty = write_data_set(folder / "dataset" / "untested") / "test" / "queries"
    for file in empty.iterdir():
        file.unlink()
    picture(99, 0).save(mixed / "queries" / name(EAST, NORTH - 900, note="night"))
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATASETS_FOLDER", raising=False)


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """A training of two epochs."""
    return run_of(folder, "trained", [])


def run_of(folder: Path, save_dir: str, more: list[str]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_command.main([*TINY, f"--save_dir={save_dir}", *more]) == 0
    (run,) = (folder / "logs" / save_dir).iterdir()
    return run


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def weights(file: Path) -> dict:
    return torch.load(file, weights_only=True)["model_state_dict"]


def test_a_run_leaves_all_that_was_printed_and_its_numbers(trained):
    found = {file.name for file in trained.iterdir()}
    assert found == {
        "info.log", "debug.log", "last_model.pth", "best_model.pth", "metrics.json",
        "toy_val.png", "toy_test.png",
    }  # fmt: skip
    log = (trained / "info.log").read_text()
    for line in (
        "Command: ", "Arguments: ", "Device: c", "Machine: python", "toy train: 8 queries, 24 database images.",
        "Descriptor dimension: 1024", "2,784,836 parameters, 2,101,764 trained, 11.1 MB, 0.17 GFLOPs",
        "WARNING: the backbone's weights are RANDOM", "Epoch 1/2: train loss", "val R@20",
        "chosen by the val queries.", "toy test   ", "recall beyond 18 is that of all",
    ):  # fmt: skip
        assert line in log, line
    assert (trained / "debug.log").read_text().count("\n") == log.count("\n")
    run = metrics(trained)
    assert run["kind"] == "train" and len(run["epochs"]) == 2 and run["descriptor_dim"] == 1024
    row = run["recall"]["toy test"]["hard_resize"]
    hits = np.array(row["hits"])
    assert row["recall"] == [float((hits < min(k, 15)).mean()) for k in (1, 5, 10, 20)]
    assert row["recall"][3] == 1.0 and row["recall"][0] >= 0.6
    assert Image.open(trained / "toy_test.png").width > 500


def test_a_stopped_run_goes_on_to_the_same_result(trained, folder, monkeypatch):
    stopped = []
    monkeypatch.setattr("train.SAVE_SECONDS", 0)
    save = train_command.save_tensors

    def save_and_stop(path: Path, content: dict) -> None:
        save(path, content)
        training = content.get("training")
        if training and (training["epoch"], training["step"]) == (2, 1):
            stopped.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "save_tensors", save_and_stop)
    assert train_command.main([*TINY, "--save_dir=stopped", "--night=0.0"]) == 130
    monkeypatch.setattr(train_command, "save_tensors", save)
    (last,) = stopped
    assert train_command.main([f"--resume={last}"]) == 0
    for file in ("last_model.pth", "best_model.pth"):
        mine, theirs = weights(last.parent / file), weights(trained / file)
        assert mine.keys() == theirs.keys()
        seen = [mine[f"trunk.{stage}.0.bn1.num_batches_tracked"] for stage in (5, 6)]
        # The statistics of what is trained are those of the training; the best may be untrained.
        assert seen[1] > seen[0] or file == "best_model.pth"
        assert [k for k, v in mine.items() if not torch.equal(v, theirs[k])] == []
    before, after = metrics(trained), metrics(last.parent)
    assert before["recall"] == after["recall"]
    for a, b in zip(before["epochs"], after["epochs"]):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert "Command: " in (last.parent / "info.log").read_text()


def test_resuming_refuses_other_settings_and_other_files(trained, capsys):
    last = trained / "last_model.pth"
    assert train_command.main([f"--resume={last}", "--lr=1"]) == 2
    assert "--lr is 1.0 but was 0.0001 in the run to resume" in capsys.readouterr().err
    assert train_command.main([f"--resume={trained / 'best_model.pth'}"]) == 2
    assert "is no last checkpoint of train.py" in capsys.readouterr().err
    assert train_command.main(["--resume=nowhere.pth"]) == 2
    assert "nowhere.pth does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, says",
    [
        (["--queries_per_epoch=7"], "must be a multiple of --cache_refresh_rate 4"),
        (["--pca_dim=4"], "--pca_dim needs --pca_dataset_folder"),
        (["--dataset_name=other"], "the data set other is in none of the usual places"),
        (["--datasets_folder=elsewhere"], "--datasets_folder elsewhere has no toy/images/"),
        (["--weights=nothing.pth"], "nothing.pth does not exist"),
        (["--device=cuda:77"], "--device cuda:77 is not available"),
        (["--train_positives_dist_threshold=0.1"], "has an index image within 0.1 m"),
        (["--dataset_name=untested"], "untested/images/test/queries holds no image"),
        (["--pca_dim=4", "--pca_dataset_folder=nowhere"], "nowhere is no folder"),
        (["--night_queries=nowhere.txt"], "--night_queries nowhere.txt cannot be read"),
    ],
)
def test_bad_settings_are_one_sentence_before_the_training(more, says, capsys):
    assert train_command.main([*TINY, "--save_dir=bad", *more]) == 2
    said = capsys.readouterr()
    err = said.err.splitlines()
    assert says in err[-1] and err[-1].startswith("train.py: ") and "Untrained" not in said.out


@pytest.mark.parametrize(
    "more",
    [
        ["--aggregation=gem", "--fc_output_dim=16", "--criterion=sare_joint", "--augment=smart"],
        ["--backbone=resnet18conv5", "--aggregation=gem", "--mining=full", "--night=0.5",
         "--l2=none", "--horizontal_flip", "--optim=asgd", "--train_batch_size=2",
         "--scheduler=plateau", "--drift_batchnorm"],
        ["--mining=random", "--optim=sgd", "--scheduler=cosine", "--warmup_epochs=1",
         "--brightness=1", "--rand_perspective=0.5", "--epochs_num=1"],
    ],
)  # fmt: skip
def test_other_parts_train_too(more, folder, request):
    run = run_of(folder, f"other{len(more)}{more[0][-4:]}", more)
    losses = [epoch["train_loss"] for epoch in metrics(run)["epochs"]]
    assert losses and np.isfinite(losses).all()
    averaged = run / "averaged_model.pth"
    assert averaged.is_file() == ("--optim=asgd" in more)
    if averaged.is_file():  # that of the last epoch is a model like any other
        last = metrics(run)["epochs"][-1]
        found = evaluated(run, "averaged", file="averaged_model.pth", data="toyval")
        (row,) = metrics(found)["recall"]["toyval test"].values()
        assert row["recall"][1] == pytest.approx(last["averaged val R@5"])
        mean, raw = weights(averaged), weights(run / "last_model.pth")
        assert any(not torch.equal(value, raw[key]) for key, value in mean.items())


def test_a_start_is_chosen_for_pretrained_weights_of_vgg16(folder, capsys):
    trunk = build_model({"backbone": "vgg16", "aggregation": "netvlad"}, "none").trunk
    torch.save({f"features.{name}": v for name, v in trunk.state_dict().items()}, "vgg16.pth")
    words = ["--backbone=vgg16", "--weights=vgg16.pth", "--epochs_num=0"]
    run_of(folder, "chosen", words)
    assert "Start: the weights as they are (8 queries are too few" in capsys.readouterr().out
    run_of(folder, "plain", [*words, "--plain_start"])
    assert "Start:" not in capsys.readouterr().out


def evaluated(
    trained: Path, save_dir: str, *more: str, data: str = "toy", file: str = "best_model.pth"
) -> Path:
    argv = [
        f"--dataset_name={data}",
        f"--resume={trained / file}",
        f"--save_dir={save_dir}",
    ]
    assert eval_command.command([*argv, "--precision=float32", *more]) == 0
    return max(Path("logs", save_dir).iterdir())


def test_evaluating_repeats_what_training_said(trained):
    run = evaluated(trained, "repeated")
    assert metrics(run)["recall"]["toy test"] == metrics(trained)["recall"]["toy test"]
    assert metrics(run)["checkpoint"] == metrics(trained)["checkpoint"]
    assert "val_positive_dist_threshold 25.0" in (run / "info.log").read_text()


def test_all_of_the_test_options_together(trained, tmp_path):
    descriptors = tmp_path / "found.npz"
    run = evaluated(
        trained, "options", "--scales", "0.75", "1", "--test_method=maj_voting", "--pca_dim=8",
        "--pca_dataset_folder=dataset/toy/images/train", "--pca_whiten", "--rerank=expansion",
        "--num_preds_to_save=2", f"--save_descriptors={descriptors}", "--recall_values", "1", "3",
    )  # fmt: skip
    table = metrics(run)["recall"]["toy test"]
    assert list(table) == ["scale 0.75", "scale 1", "all scales", "re-ranked, expansion"]
    assert all(len(row["recall"]) == 2 for row in table.values())
    lines = (run / "info.log").read_text().splitlines()
    gains = [line.partition("  ")[0] for line in lines if ", over scale 1 " in line]
    assert gains == ["scale 0.75", "all scales", "re-ranked, expansion"]
    with np.load(descriptors) as saved:
        assert saved["queries"].shape == (5, 5, 8) and saved["database"].shape == (15, 8)
        assert np.allclose(np.linalg.norm(saved["database"], axis=1), 1, atol=1e-5)
        assert saved["database_paths"][0].endswith("@.jpg")
    text = (run / "preds" / "003.txt").read_text()
    assert text.startswith("Query path:\n") and "Positives paths:\n" in text
    with Image.open(run / "preds" / "000.jpg") as sheet:
        assert sheet.size == (3 * 512 + 2 * 50, 572)
        red, green, _ = sheet.getpixel((562 + 4, 300))
        right = table["re-ranked, expansion"]["hits"][0] == 0
        assert (green if right else red) > 150 and (red if right else green) < 100


def test_what_is_saved_of_several_data_sets_lies_apart(folder):
    night = folder / "night_of_test.txt"
    queries = folder / "dataset" / "toy" / "images" / "test" / "queries"
    night.write_text(min(path.name for path in queries.iterdir()) + "\n")
    saved = ["--num_preds_to_save=1", "--save_descriptors=vectors", f"--night_queries={night}"]
    run = run_of(folder, "saved", [*saved, "--epochs_num=0"])
    for split, count, rows in (("toy_val", 6, 1), ("toy_test", 5, 3)):
        assert len(list((run / "preds" / split).glob("*.txt"))) == count
        assert len(metrics(run)["recall"][split.replace("_", " ")]) == rows
        with np.load(folder / f"vectors_{split}") as file:
            assert len(file["queries"]) == count
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("rerank", ["clusters", "geometric"])
def test_reranking_is_a_line_of_its_own(trained, rerank):
    table = metrics(evaluated(trained, rerank, f"--rerank={rerank}"))["recall"]["toy test"]
    assert list(table) == ["hard_resize", f"re-ranked, {rerank}"]
    assert table["hard_resize"]["recall"][-1] == table[f"re-ranked, {rerank}"]["recall"][-1]


def test_day_and_night_and_queries_without_positives_are_told_apart(trained, folder, capsys):
    images = folder / "dataset" / "mixed" / "images" / "test"
    run = evaluated(trained, "mixed", data="mixed")
    table = metrics(run)["recall"]["mixed test"]
    assert [len(row["hits"]) for row in table.values()] == [6, 3, 3]
    assert list(table) == ["hard_resize", "hard_resize, day", "hard_resize, night"]
    assert table["hard_resize, night"]["recall"][-1] == pytest.approx(2 / 3)
    assert (
        "1 queries have no database image within 25 m; each counts as a miss."
        in (run / "info.log").read_text()
    )
    night = folder / "night.txt"
    night.write_text(min(p.name for p in (images / "queries").iterdir()) + "\n")
    table = metrics(evaluated(trained, "listed", f"--night_queries={night}", data="mixed"))
    assert [len(r["hits"]) for r in table["recall"]["mixed test"].values()] == [6, 5, 1]
    night.write_text("nothing.jpg\n")
    argv = ["--dataset_name=mixed", f"--resume={trained / 'best_model.pth'}", "--save_dir=none"]
    assert eval_command.command([*argv, f"--night_queries={night}"]) == 2
    assert "names none of the queries' files" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--resize", "48", "64", "--picture=found.png"]])
def test_any_checkpoint_searches_a_folder_in_its_own_way(trained, checkpoint, folder, more, capsys):
    """As reading, resizing, describing and ranking by hand; without other flags and with some."""
    images = folder / "dataset" / "toy" / "images" / "test"
    query, index = min((images / "queries").iterdir()), images / "database"
    argv = ["--query", str(query), "--index", str(index), "--top-k=2", "--device=cpu"]
    for file in (trained / "best_model.pth", checkpoint):
        model, settings = load_model(file, {})
        how = transform_for(
            "hard_resize", settings["resize"] if file != checkpoint or not more else [48, 64]
        )
        paths = sorted(index.iterdir())
        batch = torch.stack([how(Image.open(path).convert("RGB")) for path in [query, *paths]])
        with torch.inference_mode(), model.autocast("cpu"):
            found = model(batch).float()
        best = (found[1:] @ found[0]).argsort(descending=True)[:2]
        assert eval_command.command([*argv, "--checkpoint", str(file), *more]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[1] == [str(query)] and len(lines) == 4 + bool(more)
        assert [line[2] for line in lines[2:4]] == [str(paths[i]) for i in best]
        similarity = float(found[1 + best[0]] @ found[0])  # in bfloat16, folded weights round anew
        assert float(lines[2][1]) == pytest.approx(similarity, abs=1e-2)
    assert Path("found.png").is_file() == bool(more)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--night_queries=binary"], "--night_queries binary cannot be read"),
        (["--pca_dim=2", "--pca_dataset_folder=empty"], "empty holds no image to fit the PCA on"),
        (["--pca_dim=2", "--pca_dataset_folder=nowhere"], "nowhere is no folder"),
        (
            ["--pca_dim=99", "--pca_dataset_folder=dataset/toy/images/test"],
            "--pca_dim 99 is more than the images",
        ),
        (["--query=no.jpg", "--index=empty"], "empty holds no image"),
        (["--backbone=vgg16"], "was made with another --backbone than vgg16: give --backbone resnet18conv4"),
    ],
)
def test_bad_settings_of_a_test_are_one_sentence(trained, more, says, capsys):
    Path("empty").mkdir(exist_ok=True)
    Path("binary").write_bytes(b"\x00\xff\xfe\x80")
    argv = ["--dataset_name=toy", f"--resume={trained / 'best_model.pth'}", "--save_dir=bad"]
    assert eval_command.command([*argv, *more]) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and err[-1].startswith("eval.py: ")


def test_any_checkpoint_is_evaluated_on_lists(trained, sample, capsys):
    argv = ["--dataset", str(sample), "--split=val", "--device=cpu"]
    assert eval_command.command([*argv, "--checkpoint", str(trained / "best_model.pth")]) == 0
    found = [int(n) for n in re.findall(r"Recall@\d+: (\d+)/", capsys.readouterr().out)]
    split = read_split(sample, "val")
    model, _ = load_model(trained / "best_model.pth", {})
    how = transform_for("hard_resize", (48, 64))
    q, d = (
        torch.stack([how(Image.open(path)) for path in part.paths])
        for part in (split.queries, split.index)
    )
    with torch.inference_mode(), model.autocast("cpu"):
        ranking = (model(q).float() @ model(d).float().T).argsort(dim=1, descending=True)
    apart = np.hypot(*(split.utm_query[:, None] - split.utm_index[None]).transpose(2, 0, 1))
    right = np.take_along_axis(apart <= 25, ranking.numpy(), 1)
    expected = [int(right[:, :k].any(1).sum()) for k in (1, 5, 10)]
    assert max(abs(a - b) for a, b in zip(found, expected)) <= 1  # bf16 rounds by the batch


def test_a_network_that_base_py_trained_is_read_by_its_description(tmp_path):
    model = build_model({
        "backbone": "resnet18conv4", "aggregation": "netvlad", "netvlad_clusters": 3,
        "fc_output_dim": None, "l2": "before_pool",
    })  # fmt: skip
    file = tmp_path / "netvlad_final.pth"
    torch.save(model.state_dict(), file)
    settings = {"backbone": "resnet18conv4", "aggregation": "netvlad", "image_size": 64}
    file.with_suffix(".json").write_text(json.dumps({"settings": settings}))
    found, of_file = load_model(file, {})
    assert of_file["resize"] == [64, 64] and load_any(file).image_size == 64
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found(x), model.eval()(x))


def test_programs_hand_over_and_the_assignment_s_flags_stay(capsys):
    for script, argv, says in (
        ("train.py", ["--dataset_name=nowhere"], "train.py: the data set nowhere"),
        ("eval.py", ["--dataset_name=x", "--resume=y.pth"], "eval.py: y.pth does not exist"),
    ):
        command = [sys.executable, str(PROJECT / script), *argv]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(says), done.stderr
    assert eval_command.command(["--checkpoint=z.pth", "--query", "a.jpg"]) == 2
    assert capsys.readouterr().err.startswith("eval.py: --query needs --index")
    for argv, says in (
        (["--help"], "--recipe=netvlad --help"),
        (["--recipe=cosplace", "-h"], "--rerank"),
    ):
        with pytest.raises(SystemExit):
            eval_command.command(argv)
        assert says in capsys.readouterr().out


def test_the_sample_and_its_night_are_found_by_name(trained, monkeypatch, tmp_path, capsys):
    for data in DATA_SETS:
        write_split(tmp_path / data / "images" / "test", range(3))
    monkeypatch.setattr(benchmark.sample_folders, "locate_sample", lambda: tmp_path)
    args = eval_command.build_parser(benchmark).parse_args(["--resume=x"])
    found = benchmark.locate(args, training=False)
    assert found.tests == {"sample test": tmp_path / "sample" / "images" / "test"}
    assert found.is_sample and "using the built-in one" in capsys.readouterr().out
    args.dataset_name = "night"
    found = benchmark.locate(args, training=False)
    assert found.tests == {"night test": tmp_path / "night" / "images" / "test"}
    assert not found.is_sample
    log = (evaluated(trained, "by_night", data="night") / "info.log").read_text()
    assert "using the built-in one, 'night'" in log and "night test: 3 queries" in log


def test_a_data_set_without_test_is_evaluated_on_val(tmp_path):
    for part in ("train", "val"):
        write_split(tmp_path / "street" / "images" / part, range(3))
    argv = ["--resume=x", f"--datasets_folder={tmp_path}", "--dataset_name=street"]
    args = eval_command.build_parser(benchmark).parse_args(argv)
    found = benchmark.locate(args, training=False)
    assert found.tests == {"street val": tmp_path / "street" / "images" / "val"}


def test_smart_takes_night_along():
    args, _ = train_command.parse(["--augment=smart", "--night=0.3"])
    found = benchmark.augmentation_of(args)
    assert found.night == 0.3 and found.chosen and found.crop == SMART.crop


def test_compared_runs_are_one_table(trained, capsys, tmp_path):
    evaluated(trained, "repeated")
    evaluated(trained, "scaled", "--scales", "0.75", "1", data="mixed")
    foreign = metrics(trained)  # of weights whose training nobody knows
    foreign["settings"] = {"recipe": "netvlad", "scales": [1.0]}
    (tmp_path / "metrics.json").write_text(json.dumps({**foreign, "checkpoint": "another"}))
    runs = [trained, *Path("logs/repeated").iterdir(), *Path("logs/scaled").iterdir(), tmp_path]
    capsys.readouterr()
    assert compare.main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert "toy test R@1" in header and "mixed test R@5" in header and "scales" in header
    assert "lr" not in header and "save_dir" not in header
    assert [row[1] for row in rows].count("hard_resize") == 2  # the evaluation joined its training
    assert rows[-1][header.index("scales")] == "1.0" and "weights" not in header
    assert "all scales" in [row[1] for row in rows]
    assert text.startswith("| run |") and (tmp_path / "out" / "compare.png").is_file()
    assert compare.main([str(tmp_path / "out")]) == 2


def test_a_log_has_whole_lines_only(tmp_path, capsys):
    with records.logged(tmp_path, ["--a", "b c"]):
        print("one", end=" ")
        print("line")
        sys.stderr.write("\r 50% of a bar\r")
        print("WARNING: mind", file=sys.stderr)
    log = (tmp_path / "info.log").read_text().splitlines()
    assert log[-2:] == ["one line", "WARNING: mind"] and log[0].endswith("--a 'b c'")
    with pytest.raises(InputError), records.logged(tmp_path, []):
        raise InputError("nothing there.")
    assert (tmp_path / "info.log").read_text().endswith("\nnothing there.\n")


def test_a_run_killed_between_its_files_ends_as_one_that_was_not(trained, monkeypatch):
    """The best checkpoint is never older than the last, from which a run goes on."""
    save, written = train_command.save_tensors, []

    def save_and_die(path: Path, content: dict) -> None:
        save(path, content)
        written.append(path.name)
        if written.count("best_model.pth") == 2:  # of the second and last epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "save_tensors", save_and_die)
    assert train_command.main([*TINY, "--save_dir=killed"]) == 130
    assert written[-2:] == ["last_model.pth", "best_model.pth"]
    monkeypatch.setattr(train_command, "save_tensors", save)
    (run,) = Path("logs/killed").iterdir()
    (run / f".{'0' * 32}.part.pth").write_bytes(b"left behind")
    assert train_command.main([f"--resume={run / 'last_model.pth'}"]) == 0
    mine, theirs = weights(run / "best_model.pth"), weights(trained / "best_model.pth")
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert metrics(run)["recall"] == metrics(trained)["recall"]
    assert not list(run.glob(".*.part*"))


def test_an_ended_run_is_tested_anew_wherever_it_and_its_data_lie(trained, folder, tmp_path, capsys):
    last = tmp_path / "last_model.pth"
    last.write_bytes((trained / "last_model.pth").read_bytes())
    moved = tmp_path / "moved"
    (folder / "dataset").rename(moved)
    try:
        words = [f"--datasets_folder={moved}", "--recall_values", "1", "2", "--rerank=expansion"]
        assert train_command.main([f"--resume={last}", *words]) == 0
    finally:
        moved.rename(folder / "dataset")
    assert weights(tmp_path / "best_model.pth").keys() == weights(trained / "best_model.pth").keys()
    run = metrics(tmp_path)
    assert run["recall_values"] == [1, 2] and "re-ranked, expansion" in run["recall"]["toy test"]
    assert run["seconds"] >= sum(epoch["seconds"] for epoch in run["epochs"])
    before = run["recall"]
    capsys.readouterr()
    assert train_command.main([f"--resume={last}", "--save_descriptors=/dev/null/x.npz"]) == 2
    assert "cannot write /dev/null" in capsys.readouterr().err
    assert metrics(tmp_path)["recall"] == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--val_positive_dist_threshold=0.001", "--train_positives_dist_threshold=0.0001"],
         "none of the 6 queries in .*val has a database image within 0.001 m"),
        (["--train_positives_dist_threshold=100"], "is more than --val_positive_dist_threshold 25"),
        (["--val_positive_dist_threshold=1e6"], "so there is nothing to learn"),
        (["--scheduler=multistep"], "needs --scheduler_milestones"),
        (["--pca_dim=99", "--pca_dataset_folder=dataset/toy/images/test"], "--pca_dim 99 is more than"),
        (["--pca_dim=2000000", "--pca_dataset_folder=dataset/toy/images/test"], "is more than the images"),
        (["--backbone=vgg16", "--resize", "8", "8"], "cannot describe images of 8 x 8 pixels"),
        (["--scales", "1", "1e6"], "cannot describe images of 48 x 64 pixels at scale 1e\\+06"),
        (["--save_descriptors=/dev/null/x.npz"], "cannot write /dev/null"),
    ],
)  # fmt: skip
def test_what_cannot_come_to_an_end_is_one_sentence_before_it_begins(more, says, capsys):
    assert train_command.main([*TINY, "--save_dir=bad", *more]) == 2
    err = capsys.readouterr().err.splitlines()
    assert re.search(says, err[-1]) and err[-1].startswith("train.py: ")


def test_flags_without_effect_are_said(capsys):
    words = ["--augment=smart", "--brightness=0.5", "--pca_whiten", "--ghost_clusters=2", "--margin=0.2"]
    train_command.parse([*words, "--freeze_te=3", "--recipe=netvlad"])
    err = capsys.readouterr().err
    for said in (
        "--brightness has no effect beside --augment smart",
        "--pca_whiten has no effect without --pca_dim",
        "--ghost_clusters has no effect without --aggregation supervlad",
        "--freeze_te has no effect on another backbone",
    ):
        assert said in err
    assert "--margin" not in err and "--augment has" not in err


DAMAGES = {
    "settings are a list": {"settings": []},
    "no settings": {"settings": None},
    "recall is a number": {"recall": 5},
    "recall in percent": {"recall": {"toy test": {"x": {"recall": [55.0] * 4, "hits": [0]}}}},
    "recall is no number": {"recall": {"toy test": {"x": {"recall": [float("nan")] * 4, "hits": [0]}}}},
    "too few recalls": {"recall": {"toy test": {"x": {"recall": [0.5], "hits": [0]}}}},
    "hits are words": {"recall": {"toy test": {"x": {"recall": [0.5] * 4, "hits": ["a"]}}}},
    "seconds are words": {"seconds": "long"},
    "nothing measured yet": {"recall": {}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_left_out_of_the_comparison_and_said(damage, trained, tmp_path, capsys):
    content = json.dumps({**metrics(trained), **DAMAGES[damage]})
    (tmp_path / "metrics.json").write_text(content)
    out = ["--output", str(tmp_path / "out")]
    assert compare.main([str(trained), str(tmp_path), *out]) == 0
    said = capsys.readouterr()
    assert str(tmp_path / "metrics.json") in said.err and "left out" in said.err
    assert said.out.count(trained.name) > 0 and f"| {tmp_path.name} |" not in said.out
    assert compare.main([str(tmp_path), str(tmp_path / "nowhere"), *out]) == 2
