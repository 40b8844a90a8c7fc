"""What --resume takes from last.pth and what it refuses."""

from pathlib import Path

import pytest
import torch

import base
from model import InputError
from training.resume import LAST, SAVED, settings_of


def saved_run(output: Path, **settings) -> None:
    """A last.pth as a run with these settings leaves it."""
    settings = settings_of(base.parse(["--output", str(output)])) | settings
    (output / "checkpoints").mkdir(parents=True)
    torch.save(dict.fromkeys(SAVED) | {"settings": settings}, output / LAST)


def test_resuming_takes_the_settings_of_the_run_and_refuses_others(tmp_path):
    output = ["--resume", "--output", str(tmp_path)]
    with pytest.raises(InputError, match=r"no .*last\.pth to resume from: run without --resume"):
        base.parse(output)
    saved_run(tmp_path, lr=3e-4, batch_size=2, dataset="there", train_from="conv4")
    args = base.parse(output)
    assert (args.lr, args.batch_size, args.dataset) == (3e-4, 2, Path("there"))
    assert base.parse([*output, "--lr", "3e-4", "--workers", "2"]).workers == 2
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
