"""Two processes train classes as one does."""

import subprocess
import sys
from pathlib import Path

import torch

from recognition.classification import Adversary, ClassObjective
from tests.recognition.test_classification import Images, batches_of, small_model
from train import train

PROCESS = """
import sys, torch
import torch.distributed as dist
from tests.recognition.test_class_processes import train_classes
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save(train_classes(), f"{folder}/{rank}.pth")
dist.destroy_process_group()
"""
ROOT = Path(__file__).parents[2]


def train_classes() -> dict:
    """Weights and what was shown after two epochs, one of each group."""
    from training.distributed import sum_over_processes

    model = small_model()
    objective = ClassObjective(model, [3, 5], "cosface", 0.01, 0.0, Adversary(4, 0.3))
    loader = batches_of(objective, batch_size=4, targets=Images(6, begin=100))
    history = train(
        model, loader, (), "cpu", 2, 1e-3, objective=objective, sum_over_processes=sum_over_processes
    )  # fmt: skip
    shown = [(record["train_loss"], record["domain accuracy"]) for record in history]
    weights = {**model.state_dict(), **objective.state_dict()}
    return {"shown": torch.tensor(shown), **weights}


def test_two_processes_train_classes_as_one_does(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    alone = train_classes()
    for name, value in alone.items():
        if name != "adversary.counted":
            torch.testing.assert_close(one[name], value, atol=2e-4, rtol=0, msg=name)
            torch.testing.assert_close(one[name], two[name], msg=name)
