"""The three handed-in files on another Python: they import, train, evaluate, and keep their promises.

    python3.8 tests/bench/lowest_python.py

In a folder of its own that holds model.py, train.py and eval.py alone, as on graders' machines: runs
tests/course_driver/base.py, then what CONTRACT.md promises beyond it. Needs the five packages only.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = ROOT / "tests" / "course_driver"
HANDED_IN = ("model.py", "train.py", "eval.py")


def prepared(folder: Path) -> None:
    """The three files, the driver, and data: places for its lists, queries that copy index images."""
    for file in (*(ROOT / name for name in HANDED_IN), DRIVERS / "base.py"):
        shutil.copy(file, folder)
    sys.path.insert(0, str(DRIVERS))
    data = importlib.import_module("tiny_data")
    data.write_places(folder / "dataset", n_train=10)


def promises(folder: Path) -> None:
    """What the section on graders' machines says, beyond what the driver does."""
    import torch
    from torch import nn

    from eval import compute_embeddings, evaluate_recall
    from model import NetVLADModel
    from train import train, validate

    model = NetVLADModel(4, pretrained=False)
    images = torch.rand(4, 3, 64, 64)
    batches = [(images[:2], images[2:], images[2:].flip(0))]
    wrapped = nn.DataParallel(model)
    train(wrapped, batches, batches, "cpu", epochs=1)
    assert validate(wrapped, batches, "cpu") >= 0
    with torch.no_grad():
        expected = model.eval()(images)
    file = folder / "whole.pth"
    torch.save(model, file)
    whole = {"weights_only": False} if "weights_only" in torch.load.__kwdefaults__ else {}
    copies = {
        "pickle": pickle.loads(pickle.dumps(model)),
        "deep copy": copy.deepcopy(model),
        "file": torch.load(file, **whole),
    }
    for name, other in copies.items():
        with torch.no_grad():
            assert torch.equal(other.eval()(images), expected), name
    torch.save(model.state_dict(), file)
    bare = NetVLADModel(4, pretrained=False)
    bare.load_state_dict(torch.load(file))
    items = [(image, i, Path(f"{i}.png"), "scene", i) for i, image in enumerate(images)]
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    utm = 1000.0 * np.arange(8).reshape(4, 2)
    for any_model in (bare, wrapped, plain):
        found, indices, paths = compute_embeddings(any_model, items, "cpu", batch_size=3)
        assert (
            found.dtype == np.float32 and len(found) == len(paths) == 4 and indices == [0, 1, 2, 3]
        )
        recall = evaluate_recall(any_model, items, items, utm, utm, 25.0, "cpu", [1, 4])
        assert recall == {1: 4, 4: 4}, recall


def main() -> None:
    """Run both; an error keeps its traceback."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        subprocess.run([sys.executable, "base.py"], cwd=folder, check=True)
        for script in ("eval.py", "train.py"):  # without the rest of the project: one sentence
            ended = subprocess.run(
                [sys.executable, script], cwd=folder, capture_output=True, text=True, check=False
            )
            assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
        sys.path.insert(0, str(folder))
        promises(folder)
        import torch

        print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: all as promised.")


if __name__ == "__main__":
    main()
