"""The CosPlace project's commands on a toy data set: what they print, refuse, and take up."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recognition import eval_command, train_command
from recognition.recipes import build_model, load_model
from reporting import compare, labels, project
from tests.recognition.toy import EAST, NORTH, name, picture, write_split

PROJECT = Path(__file__).resolve().parents[2]
FAST = [
    "--weights=none", "--image_size=48", "--batch_size=3", "--iterations_per_epoch=2",
    "--epochs_num=2", "--lr=1e-4", "--min_images_per_class=3", "--precision=float32",
    "--backbone=resnet18conv4", "--fc_output_dim=16",
]  # fmt: skip


def write_xs(folder: Path) -> None:
    """sf_xs/{train,val,test}: eight classes of three in two groups; one val query is larger."""
    (folder / "train" / "deep").mkdir(parents=True)
    for place in range(4):
        for heading in (10, 100):
            for view in range(3):
                at = (EAST + 50 * place + view, NORTH)
                file = name(*at, zone="10", letter="S", heading=f"{heading + view:03d}")
                look = picture(2 * place + heading // 100, view)
                look.save(folder / "train" / ("deep" if view else "") / file, quality=95)
    write_split(folder / "val", range(20, 24))
    write_split(folder / "test", range(40, 44))
    turned = folder / "val" / "queries" / name(EAST + 2100, NORTH, pano="large")
    picture(21, 0).resize((100, 90)).save(turned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cosplace")
    write_xs(folder / "sf_xs")
    write_split(folder / "tokyo_xs" / "test", range(50, 53), note="night")
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("recognition.classification.EXPANDED", 32)


ON_TOKYO = "--test_set_folder=tokyo_xs/test"


def run_of(folder: Path, save_dir: str, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["--dataset_folder", "sf_xs", "--groups_num", "1", *FAST, f"--save_dir={save_dir}"]
        assert train_command.main([*argv, *more]) == 0
    (run,) = (folder / "logs" / save_dir).iterdir()
    return run


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    return run_of(folder, "trained")


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_the_document_s_command_trains_and_tests_on_all_sets(trained):
    log = (trained / "info.log").read_text()
    for line in (
        "sf_xs train: 24 images in 8 classes of 10 m and 30 degrees; 0 with less than 3",
        "Used: 1 of 2 groups, 4 classes (4 a group), 12 images; images a class: 4 x 3.",
        "sf_xs val: 5 queries, 12 database images.", "Descriptor dimension: 16.", "Epoch 2/2: train loss", "val R@20", "tokyo_xs test   ",
    ):  # fmt: skip
        assert line in log, line
    assert "violating" not in log and "nan" not in log
    run = metrics(trained)
    assert list(run["recall"]) == ["sf_xs val", "sf_xs test", "tokyo_xs test"]
    assert run["classes"] == [4] and run["settings"]["recipe"] == "cosplace"
    assert {"last_checkpoint.pth", "best_model.pth"} <= {file.name for file in trained.iterdir()}


def test_the_trained_model_is_tested_elsewhere_with_pictures(trained):
    argv = ["--resume_model", str(trained / "best_model.pth"), "--test_set_folder", "tokyo_xs/test"]
    more = ["--num_preds_to_save", "3", "--precision=float32", "--save_dir=tested"]
    assert eval_command.command([*argv, *more]) == 0
    (run,) = Path("logs/tested").iterdir()
    assert metrics(run)["recall"]["tokyo_xs test"] == metrics(trained)["recall"]["tokyo_xs test"]
    assert len(list((run / "preds").glob("*.jpg"))) == 3


def test_sets_of_one_name_are_saved_apart_and_within_the_run(trained, folder):
    sets = [folder / place / "tokyo_xs" / "test" for place in ("here", "there")]
    for place in sets:
        shutil.copytree(folder / "tokyo_xs" / "test", place)
    argv = ["--resume_model", str(trained / "best_model.pth"), "--test_set_folder", *map(str, sets)]
    assert eval_command.command([*argv, "--num_preds_to_save=1", "--save_dir=twice"]) == 0
    (run,) = Path("logs/twice").iterdir()
    assert len(list(run.glob("*_tokyo_xs_test.png"))) == 2
    assert sorted(len(list(part.glob("*.jpg"))) for part in (run / "preds").iterdir()) == [3, 3]
    assert not list(folder.glob("*ere/**/*.png"))


def test_a_stopped_run_with_all_its_parts_goes_on_to_the_same_result(folder, monkeypatch):
    more = [
        "--ssl=vicreg",
        "--target_folder=tokyo_xs/test/queries",
        "--grl_weight=0.3",
        "--night=0.5",
    ]
    more += [ON_TOKYO, "--optim=adamw", "--groups_num=2"]
    whole = run_of(folder, "whole", *more)
    assert "domain accuracy" in (whole / "info.log").read_text()
    assert metrics(whole)["transductive"] == ["tokyo_xs test"]
    monkeypatch.setattr("train.SAVE_SECONDS", 0)
    save = train_command.save_tensors

    def save_and_stop(path: Path, content: dict) -> None:
        save(path, content)
        training = content.get("training")
        if training and (training["epoch"], training["step"]) == (2, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "save_tensors", save_and_stop)
    argv = ["--dataset_folder", "sf_xs", *FAST, "--save_dir=stopped", *more]
    assert train_command.main(argv) == 130
    monkeypatch.setattr(train_command, "save_tensors", save)
    (run,) = Path("logs/stopped").iterdir()
    assert train_command.main([f"--resume_train={run / 'last_checkpoint.pth'}"]) == 0
    mine, theirs = (torch.load(r / "last_checkpoint.pth", weights_only=True) for r in (run, whole))
    for part in ("weights", "optimizer"):
        assert same(mine["training"][part], theirs["training"][part]), part
    assert metrics(run)["recall"] == metrics(whole)["recall"]
    assert (
        metrics(run)["epochs"][1]["domain accuracy"]
        == metrics(whole)["epochs"][1]["domain accuracy"]
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "more, says",
    [
        (
            ["--groups_num=3"],
            "--groups_num 3 is more than there are: the classes of sf_xs/train make 2",
        ),
        (["--min_images_per_class=9"], "none of the 8 classes has 9 images, the largest has 3"),
        (["--dataset_folder=nowhere"], "--dataset_folder nowhere is no folder"),
        (
            ["--dataset_folder=tokyo_xs"],
            "the folder of the train images tokyo_xs/train is not there",
        ),
        (
            ["--train_set_folder=sf_xs/val"],
            "have no heading in their names, the first is sf_xs/val/",
        ),
        (["--val_set_folder=sf_xs/train"], "sf_xs/train has no folder queries/"),
        (["--grl_weight=1"], "--grl_weight needs --target_folder"),
        (["--target_folder=sf_xs/nothing"], "--target_folder sf_xs/nothing holds no image"),
        (["--loss_function=none"], "leaves nothing to learn: add --ssl vicreg"),
        (["--alpha=50"], "--alpha 50 times --L 2 does not divide 360"),
        (["--test_method=five_crops"], "--test_method five_crops needs a size: add --resize H W"),
    ],
)
def test_bad_settings_are_one_sentence(more, says, capsys):
    argv = ["--dataset_folder", "sf_xs", "--groups_num", "1", *FAST, "--save_dir=bad", *more]
    assert train_command.main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and err[-1].startswith("train.py: ")


@pytest.mark.parametrize(
    "more",
    [
        ["--aggregation=mixvpr", "--mix_out_channels=8", "--optim=asgd", "--scheduler=plateau",
         "--loss_function=arcface"],
        ["--aggregation=attention", "--loss_function=none", "--ssl=vicreg", "--optim=sgd",
         "--random_erasing=0.5", "--rand_perspective=0.5", "--resize_test_imgs", "--train_all_layers",
         "--epochs_num=1"],
        ["--aggregation=convap", "--convap_dim=8",
         "--loss_function=sphereface", "--scheduler=cosine", "--epochs_num=1"],
    ],
)  # fmt: skip
def test_other_parts_train_too(more, folder):
    run = run_of(folder, more[0].partition("=")[2], ON_TOKYO, *more)
    losses = [epoch["train_loss"] for epoch in metrics(run)["epochs"]]
    assert losses and np.isfinite(losses).all()
    again = ["--resume", str(run / "best_model.pth"), "--test_set_folder", "sf_xs/val"]
    save_dir = f"again_{run.parent.name}"
    assert eval_command.main([*again, "--precision=float32", f"--save_dir={save_dir}"]) == 0
    (other,) = Path("logs", save_dir).iterdir()
    assert metrics(other)["recall"]["sf_xs val"] == metrics(run)["recall"]["sf_xs val"]
    wanted = metrics(run)["settings"]
    asked = [word for word in more if word.startswith(("--aggregation", "--resize_test_imgs"))]
    args, _ = eval_command.parse([*again, *asked])
    assert (args.resize or wanted["resize"]) == wanted["resize"]


def test_published_weights_are_tested_on_other_layouts(folder):
    model = build_model({"backbone": "ResNet18", "aggregation": "gem", "fc_output_dim": 512})
    names = {"trunk.": "backbone.", "aggregation.pool.p": "aggregation.1.p",
             "aggregation.fc.": "aggregation.2."}  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        ours = next(part for part in names if key.startswith(part))
        state[key.replace(ours, names[ours])] = value
    torch.save(state, "ResNet18_512_cosplace.pth")
    write_split(folder / "vg" / "toy" / "images" / "test", range(3))
    argv = ["--resume=ResNet18_512_cosplace.pth", "--recipe=cosplace", "--save_dir=other"]
    assert eval_command.command([*argv, "--datasets_folder=vg", "--dataset_name=toy"]) == 0
    (run,) = Path("logs/other").iterdir()
    assert list(metrics(run)["recall"]) == ["toy test"] and metrics(run)["gflops"] > 0


def test_a_model_is_a_beginning(trained, folder):
    model = f"--resume_model={trained / 'best_model.pth'}"
    run = run_of(folder, "begun", model, "--epochs_num=0")
    assert metrics(run)["recall"] == metrics(trained)["recall"]
    argv = ["--dataset_folder=sf_xs", "--groups_num=1", *FAST, model, "--backbone=VGG16"]
    assert train_command.main(argv) == 2


@pytest.mark.parametrize(
    "settings, rename",
    [
        ({"backbone": "ResNet18"}, [("trunk.", "backbone."), ("aggregation.pool.p", "aggregation.1.p"),
                                    ("aggregation.fc", "aggregation.3")]),
        ({"backbone": "EfficientNet_B0"}, [("trunk.", "backbone.0."), ("aggregation.fc", "aggregation.3"),
                                           ("aggregation.pool.p", "aggregation.1.p")]),
        ({"backbone": "resnet18conv4", "aggregation": "mixvpr", "fc_output_dim": None,
          "mix_out_channels": 8},
         [("trunk.0.", "backbone.model.conv1."), ("trunk.1.", "backbone.model.bn1."),
          *((f"trunk.{i + 3}.", f"backbone.model.layer{i}.") for i in (1, 2, 3)),
          ("aggregation.", "aggregator.")]),
    ],
)  # fmt: skip
def test_files_that_others_published_load(settings, rename, tmp_path):
    settings = {"aggregation": "gem", "fc_output_dim": 512} | settings
    torch.manual_seed(0)
    model = build_model(settings).eval()
    images = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        wanted = model(images)
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in rename:
            key = key.replace(ours, theirs) if key.startswith(ours) else key
        state[key] = value
    torch.save(state, tmp_path / "published.pth")
    loaded, _ = load_model(tmp_path / "published.pth", settings)
    with torch.inference_mode():
        assert torch.equal(loaded(images), wanted)


# ------------------------------------------------ what is drawn and handed in


def test_labels_are_counted_and_drawn(tmp_path, capsys):
    argv = ["sf_xs", "--output", str(tmp_path), "--min_images_per_class", "3"]
    assert labels.main(argv) == 0
    out = capsys.readouterr().out
    assert (
        "sf_xs train: 8 classes of 10 m and 30 degrees, 8 with 3 images or more, in 2 groups."
        in out
    )
    assert "sf_xs val: 3.0 positives within 25 m a query in the mean; 0 queries" in out
    assert {p.name for p in tmp_path.iterdir()} == {
        f"sf_xs_{part}_{kind}.png" for part in ("train", "val", "test") for kind in ("labels", "images")
    }  # fmt: skip
    assert labels.main(["nowhere"]) == 2
    assert capsys.readouterr().err == (
        "reporting.labels: nowhere is no folder: name the one of a data set.\n"
    )
    assert labels.binned([1, 1, 3]) == {"1": 2, "3": 1}
    wide = labels.binned(range(240))
    assert len(wide) == 12 and sum(wide.values()) == 240 and "0–19" in wide


def test_the_project_is_a_report_and_a_zip(trained, folder, tmp_path, capsys):
    runs = [str(trained), *map(str, Path("logs/whole").iterdir())] if Path("logs/whole").is_dir() else [
        str(trained)
    ]  # fmt: skip
    output = tmp_path / "project"
    assert project.main(["--project", *runs, "nothing", "--output", str(output)]) == 0
    text = (output / "report.md").read_text()
    for chapter in ("Introduction", "Related work", "Method", "Experiments", "Conclusion"):
        assert f"## {chapter}\n" in text
    for part in ("contrastive loss looks at pairs", "Classes of the groups that were used here: 4.",
                 "within one of the 50 groups two classes are at least 40 m or 30° apart"):  # fmt: skip
        assert part in text
    row = metrics(trained)["recall"]["sf_xs val"]["own size"]["recall"]
    assert f"{100 * row[0]:.1f} / {100 * row[1]:.1f}" in text
    assert "{" not in text and (output / "report.html").read_text().count("data:image/jpeg") >= 4
    with zipfile.ZipFile(tmp_path / "project.zip") as packed:
        names = packed.namelist()
    assert {"train.py", "recognition/cosplace.py", "report/report.html"} <= set(names)
    assert any(name.endswith("info.log") for name in names)
    assert compare.main([*runs, "--output", str(tmp_path)]) == 0
    head = capsys.readouterr().out.splitlines()
    assert any("| sf_xs val | sf_xs test | tokyo_xs test |" in line for line in head)


def test_the_report_says_which_queries_training_saw_and_speaks_of_all_queries(folder, tmp_path):
    for number, path in enumerate(sorted(Path("tokyo_xs/test/queries").iterdir())):
        day = tmp_path / "tokyo_xs" / "test" / "queries" / path.name.replace("night", "")
        shutil.copytree("tokyo_xs/test/database", day.parents[1] / "database", dirs_exist_ok=True)
        day.parent.mkdir(exist_ok=True)
        shutil.copy(path, day if number else day.with_name(path.name))
    test = tmp_path / "tokyo_xs" / "test"
    run = run_of(folder, "saw", f"--target_folder={test / 'queries'}", "--epochs_num=1")
    argv = ["--resume", str(run / "best_model.pth"), f"--test_set_folder={test}", "--save_dir=seen"]
    assert eval_command.main(argv) == 0
    (later,) = Path("logs/seen").iterdir()
    name, output = "tokyo_xs test", tmp_path / "project"
    assert metrics(later)["transductive"] == [name]
    assert project.main(["--project", str(run), str(later), "--output", str(output)]) == 0
    text = (output / "report.md").read_text()
    assert f"saw the queries of {name} without their labels" in text
    rows = [row for row in compare.read_rows([run, later]) if name in row["recall"]]
    assert len(rows) == 3  # all, day, night
    rows[1]["recall"][name] = {1: 2.0}
    assert project.best_of(rows, name) is rows[0]


def test_handin_hands_over(tmp_path):
    command = [sys.executable, "-m", "reporting.handin", "--project", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "none of these folders holds the recall of a run" in done.stderr


def test_images_of_any_size_are_described(trained):
    sizes = {Image.open(p).size for p in Path("sf_xs/val/queries").iterdir()}
    assert len(sizes) == 2  # what the runs above have met
