"""SuperVLAD's three commands as printed, on a tiny data set; resuming, other recipes, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.gsv_cities import image_name
from recognition import eval_command, gsv_cities, train_command, vit
from recognition.backbones import BACKBONES, Backbone
from recognition.vit import build_vit
from tests.dataset.test_gsv_cities import rows_of, write_city
from tests.recognition.toy import picture, write_data_set

TINY = vit.VitSize(32, 5, 4)
PRINTED = [
    "--eval_datasets_folder=D", "--eval_dataset_name=pitts30k", "--backbone=dino",
    "--supervlad_clusters=4", "--crossimage_encoder",
]  # fmt: skip
TRAINED = [
    "--foundation_model_path=dinov2_vitb14_pretrain.pth", "--patience=3", "--lr=0.00005",
    "--epochs_num=2", "--train_batch_size=5", "--freeze_te", "3", "--train_resize", "42", "56",
    "--resize", "56", "70", "--precision=float32", "--ms_base=mean",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs of this file lie: D/pitts30k, D/gsv_cities, DINOv2's weights and logs/."""
    folder = tmp_path_factory.mktemp("gsv")
    write_data_set(folder / "D" / "pitts30k")
    for number, city in enumerate(("Here", "There")):
        rows = rows_of(city, dict.fromkeys(range(6), 5))
        write_city(folder / "D" / "gsv_cities", city, rows)
        for i, row in enumerate(rows):
            name, place = image_name(row, folder, i)
            path = folder / "D" / "gsv_cities" / "Images" / city / name
            picture(100 + 10 * number + place, i).save(path, quality=95)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "tiny", TINY)
        trunk, _ = build_vit("tiny", "random")
    state = {key.partition(".")[2]: value for key, value in trunk.state_dict().items()}
    torch.save({**state, "mask_token": torch.zeros(1, 32)}, folder / "dinov2_vitb14_pretrain.pth")
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATASETS_FOLDER", raising=False)
    monkeypatch.setitem(vit.SIZES, "tiny", TINY)
    monkeypatch.setitem(BACKBONES, "dino", Backbone("tiny", 2, TINY.dim, 1))


def run_of(save_dir: str, argv: list[str]) -> Path:
    assert train_command.main([*argv, f"--save_dir={save_dir}"]) == 0
    (run,) = Path("logs", save_dir).absolute().iterdir()
    return run


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(vit.SIZES, "tiny", TINY)
        patch.setitem(BACKBONES, "dino", Backbone("tiny", 2, TINY.dim, 1))
        return run_of("trained", [*PRINTED, *TRAINED])


def weights(file: Path) -> dict:
    return torch.load(file, weights_only=True)["model_state_dict"]


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_training_leaves_its_numbers_and_moves_what_is_not_frozen(trained):
    log = (trained / "info.log").read_text()
    for line in (
        "GSV-Cities: 2 cities, 12 places, 60 images.", "pitts30k val: 6 queries",
        "Weights: DINOv2, file dinov2_vitb14_pretrain.pth.", "Descriptor dimension: 128.",
        "val R@1 + R@5", "pitts30k test  ",
    ):  # fmt: skip
        assert line in log, line
    assert "violating" not in log and "nan" not in log
    run = metrics(trained)
    assert len(run["epochs"]) == 2 and run["settings"]["recipe"] == "supervlad"
    assert run["settings"]["recall_values"] == [1, 5, 10, 100]
    official = torch.load("dinov2_vitb14_pretrain.pth", weights_only=True)
    last = weights(trained / "last_model.pth")
    begun = {k for k, v in last.items() if k.startswith("trunk.")}
    moved = {k for k in begun if not torch.equal(last[k], official[k[len("trunk.0.") :]])}
    assert moved and all(k.startswith(("trunk.1.blocks.3", "trunk.1.blocks.4")) for k in moved)


def test_evaluating_repeats_what_training_said(trained, capsys):
    argv = [*PRINTED, f"--resume={trained / 'best_model.pth'}", "--precision=float32"]
    assert eval_command.command([*argv, "--save_dir=repeated"]) == 0
    (run,) = Path("logs/repeated").iterdir()
    assert metrics(run)["recall"]["pitts30k test"] == metrics(trained)["recall"]["pitts30k test"]
    assert eval_command.command([*argv, "--encoder_mode=batch", "--infer_batch_size=3"]) == 0
    assert "depends on the other images of its batch" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_result(trained, monkeypatch):
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
    assert train_command.main([*PRINTED, *TRAINED, "--save_dir=stopped"]) == 130
    monkeypatch.setattr(train_command, "save_tensors", save)
    (last,) = stopped
    assert train_command.main([f"--resume={last}"]) == 0
    mine, theirs = weights(last), weights(trained / "last_model.pth")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert metrics(last.parent)["recall"] == metrics(trained)["recall"]


@pytest.mark.parametrize(
    "more",
    [
        ["--recipe=mixvpr", "--mix_out_channels=8", "--mix_depth=1"],
        ["--recipe=convap", "--convap_dim=8", "--kmeans_images=eval"],
        ["--recipe=supervlad", "--crossimage_encoder", "--encoder_once", "--micro_batch=8",
         "--kmeans_images=eval", "--no_augmentation"],
    ],
)  # fmt: skip
def test_other_recipes_train_on_the_same_data(more):
    run = run_of(more[0][9:], [
        "--eval_datasets_folder=D", "--backbone=resnet18conv4", "--weights=none", "--resize", "48",
        "64", "--train_resize", "48", "64", "--epochs_num=2", "--train_batch_size=6",
        "--precision=float32", "--lr=1e-3", *more,
    ])  # fmt: skip
    losses = [epoch["train_loss"] for epoch in metrics(run)["epochs"]]
    assert losses and np.isfinite(losses).all()


def test_bad_input_is_one_sentence(folder, trained, capsys):
    def says(argv: list[str], command=train_command.main) -> str:
        assert command([*argv, "--save_dir=bad"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    given = [*PRINTED, *TRAINED]
    assert "nowhere.pth does not exist: download tiny_pretrain.pth of DINOv2" in says(
        [*given, "--weights=nowhere.pth"]
    )
    assert "needs DINOv2's weights" in says([*PRINTED, *TRAINED[1:]])
    assert "--freeze_te 9 is not possible" in says([*given, "--freeze_te=9"])
    assert "has 6 images, the most has 5" in says([*given, "--images_per_place=6"])
    assert "--images_per_place 1 leaves no positives" in says([*given, "--images_per_place=1"])
    assert "--gsv_cities_folder none is no folder" in says([*given, "--gsv_cities_folder=none"])
    argv = [*given, "--aggregation=gem"]
    assert "--crossimage_encoder belongs to --aggregation supervlad" in says(argv)
    argv = [*given, "--aggregation=supervlad", "--fc_output_dim=8"]
    assert "belongs to --aggregation supervlad without --fc_output_dim" in says(argv)
    argv = ["--recipe=netvlad", "--datasets_folder=D", "--aggregation=supervlad"]
    argv += ["--weights=none", "--backbone=resnet18conv4", "--crossimage_encoder"]
    assert "--crossimage_encoder is trained on GSV-Cities only" in says(argv)
    argv = [word for word in given if word != "--crossimage_encoder"]
    assert "--encoder_once needs --crossimage_encoder" in says([*argv, "--encoder_once"])
    (folder / "E").mkdir(exist_ok=True)
    shutil.copytree("D/pitts30k", "E/pitts30k", dirs_exist_ok=True)
    argv = ["--eval_datasets_folder=E", *given[1:]]
    assert "GSV-Cities, the training images, is not in E" in says(argv)
    single = [
        *PRINTED[:3], "--supervlad_clusters=1", "--ghost_clusters=2", "--resume=SuperVLAD.pth",
    ]  # fmt: skip
    state = weights(trained / "best_model.pth")
    renamed = {}
    for key, value in state.items():
        key = key.replace("trunk.0.", "backbone.").replace("trunk.1.", "backbone.")
        key = key.replace("aggregation.assignment", "aggregation.conv")
        renamed["module." + key.replace("aggregation.encoder", "encoder")] = value
    torch.save({"model_state_dict": renamed, "recalls": np.zeros(4)}, "SuperVLAD.pth")
    assert "has 5 clusters, ghosts included" in says(single, eval_command.command)
    argv = [*PRINTED, "--resume=SuperVLAD.pth", "--save_dir=published"]
    assert eval_command.command([*argv, "--resize", "56", "70", "--precision=float32"]) == 0
    (run,) = Path("logs/published").iterdir()
    of_pitts = metrics(run)["recall"]["pitts30k test"]
    assert of_pitts == metrics(trained)["recall"]["pitts30k test"]
    argv = ["--recipe=supervlad", *PRINTED[2:], "--resume=SuperVLAD.pth", "--save_dir=elsewhere"]
    argv += ["--resize", "56", "70", "--precision=float32", "--encoder_mode=alone"]
    folders = ["--test_set_folder=D/pitts30k/images/test"]  # CosPlace's flag for the same images
    assert eval_command.command([*argv, *folders]) == 0
    (run,) = Path("logs/elsewhere").iterdir()
    assert metrics(run)["recall"]["images test"] == of_pitts


def test_the_sample_is_taken_where_there_is_no_data(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    sample = folder / "D" / "sample"
    if not sample.is_dir():
        shutil.copytree(folder / "D" / "pitts30k", sample)
    monkeypatch.setattr("recognition.benchmark.sample_folders.locate_sample", lambda: folder / "D")
    monkeypatch.setattr(gsv_cities, "locate_gsv_cities", lambda: folder / "D" / "gsv_cities")
    argv = [
        "--recipe=supervlad",
        "--epochs_num=1",
        "--resize",
        "48",
        "64",
        "--train_resize",
        "48",
        "64",
    ]
    assert train_command.main([*argv, "--weights=none", "--precision=float32"]) == 0
    said = capsys.readouterr()
    assert "using the built-in one" in said.out
    assert "SAMPLE: supervlad is shown with --backbone resnet18conv4 instead of dino" in said.err
