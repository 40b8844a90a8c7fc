"""What --resume takes from last.pth and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch

import base
from model import InputError
from reporting.handin import CHECKPOINT, LAST
from training.resume import RULES, SAVED, digest, refuse_to_overwrite, settings_of


def saved_run(output: Path, training: dict | None = None, rules: int | None = RULES, **settings) -> None:
    """A last.pth as a run with these settings leaves it."""
    settings = settings_of(base.parse(["--output", str(output)])) | settings
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    saved = dict.fromkeys(SAVED) | {"settings": settings, "training": training, "rules": rules}
    torch.save(saved, output / LAST)


def test_resuming_takes_the_settings_of_the_run_and_refuses_others(tmp_path):
    output = ["--resume", "--output", str(tmp_path)]
    with pytest.raises(InputError, match=r"no .*last\.pth to resume from: run without --resume"):
        base.parse(output)
    saved_run(tmp_path, lr=3e-4, batch_size=2, dataset="there", train_from="conv4")
    args = base.parse(output)
    assert (args.lr, args.batch_size, args.dataset) == (3e-4, 2, Path("there"))
    assert base.parse([*output, "--lr", "3e-4", "--device", "cuda"]).device == "cuda"
    assert base.parse([*output, "--dataset", "moved"]).dataset == Path("moved")
    with pytest.raises(InputError, match="--batch-size is 4 but was 2 in the run to resume"):
        base.parse([*output, "--batch-size", "4"])
    for damage in ("cut", "foreign"):
        if damage == "cut":
            whole = (tmp_path / LAST).read_bytes()
            (tmp_path / LAST).write_bytes(whole[: len(whole) // 2])
        else:
            torch.save({"settings": {}}, tmp_path / LAST)
        with pytest.raises(InputError, match=r"last\.pth is no checkpoint of base\.py"):
            base.parse(output)


def test_a_moved_run_goes_on_where_it_lies_now_and_quiet_may_differ(tmp_path):
    saved_run(tmp_path / "old", lr=3e-4)
    (tmp_path / "old").rename(tmp_path / "new")
    args = base.parse(["--resume", "--quiet", "--output", str(tmp_path / "new")])
    assert args.output == tmp_path / "new" and args.quiet and args.lr == 3e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_was_saved_of_a_run_without_numbers_is_named(value, tmp_path):
    damaged = {
        "epoch": 2,
        "best": {},
        "weights": {"a": torch.ones(2), "b": torch.tensor([1, value])},
    }
    saved_run(tmp_path, damaged)
    with pytest.raises(InputError, match=r"last\.pth holds .* not finite \(training\.weights\.b\)"):
        base.parse(["--resume", "--output", str(tmp_path)])


@pytest.mark.parametrize("of_old", [{"a_setting_of_old": "x"}, {"rules": RULES - 1}, {"rules": None}])
def test_what_another_version_saved_is_named_as_such(of_old, tmp_path):
    saved_run(tmp_path, **of_old)
    with pytest.raises(InputError, match=r"last\.pth was saved by another version of base\.py"):
        base.parse(["--resume", "--output", str(tmp_path)])


def test_a_new_run_replaces_no_unfinished_one(tmp_path):
    args = base.parse(["--output", str(tmp_path)])
    refuse_to_overwrite(args)  # an empty folder
    saved_run(tmp_path, {"epoch": 6})  # stopped before its checkpoint was written
    with pytest.raises(InputError, match="stopped in epoch 5 of 5: go on with --resume"):
        refuse_to_overwrite(args)
    (tmp_path / CHECKPOINT).touch()
    for training, allowed in (({"epoch": 3}, False), ({"epoch": 6}, True), (None, True)):
        saved_run(tmp_path, training)
        before = (tmp_path / LAST).read_bytes()
        if allowed:  # it was finished, or nothing was trained yet
            refuse_to_overwrite(args)
        else:
            with pytest.raises(InputError, match="stopped in epoch 3 of 5: go on with --resume"):
                refuse_to_overwrite(args)
        assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("trial", [["--limit", "20"], ["--epochs", "0"]])
def test_a_trial_replaces_the_checkpoint_of_a_trial_only(trial, tmp_path):
    args = base.parse(["--output", str(tmp_path), *trial])
    refuse_to_overwrite(args)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / CHECKPOINT).touch()
    description = (tmp_path / CHECKPOINT).with_suffix(".json")
    refused = "is of a full training, which " + " ".join(trial)
    with pytest.raises(InputError, match=refused):  # nothing says what it is of
        refuse_to_overwrite(args)
    for settings, allowed in (
        ({"limit": None, "epochs": 5}, False),
        ({"limit": 8, "epochs": 5}, True),
        ({"limit": None, "epochs": 0}, True),
    ):
        description.write_text(json.dumps({"settings": settings}))
        if allowed:
            refuse_to_overwrite(args)
        else:
            with pytest.raises(InputError, match=refused):
                refuse_to_overwrite(args)
    refuse_to_overwrite(base.parse(["--output", str(tmp_path)]))


def test_names_that_are_no_text_have_a_digest():
    names = [os.fsdecode(b"caf\xe9.jpg"), "b.jpg"]
    assert digest(names) == digest([f"elsewhere/{name}" for name in names]) != digest(names[::-1])
