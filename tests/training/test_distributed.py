"""Two processes train as one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.places import a_model, places, tuples_of
from train import RankingLoss, train

PROCESS = """
import sys, torch
import torch.distributed as dist
from tests.training.places import a_model, places, tuples_of
from train import RankingLoss, train
from training.distributed import share_weights, sum_over_processes
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
results = {}
for mining in ("random", "hard"):
    model = a_model(seed=rank)  # process 0's weights are what counts
    share_weights(model, "cpu")
    model.precision = "float32"
    tuples, _ = tuples_of(places(8), model, mining=mining, batch_size=3)
    fetched, fetch = [], tuples.fetch
    tuples.fetch = lambda t, flipped: fetched.append(t.queries.tolist()) or fetch(t, flipped)
    history = train(
        model, tuples, [], "cpu", epochs=2, objective=RankingLoss(0.5), judge=tuples.judge,
        sum_over_processes=sum_over_processes,
    )
    weights = model.state_dict()["trunk.28.weight"]
    results[mining] = {"history": history, "fetched": fetched, "weights": weights}
torch.save(results, f"{folder}/{rank}.pth")
"""
ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_does_on_items_of_their_own(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for mining in ("random", "hard"):
        one = a_model()
        one.precision = "float32"
        tuples, _ = tuples_of(places(8), one, mining=mining, batch_size=3)
        judged = {"objective": RankingLoss(0.5), "judge": tuples.judge}
        history = train(one, tuples, [], "cpu", epochs=2, **judged)
        first, second = (result[mining] for result in results)
        assert torch.equal(first["weights"], second["weights"])
        alone = one.state_dict()["trunk.28.weight"]
        torch.testing.assert_close(first["weights"], alone, atol=1e-4, rtol=0)
        for mine, theirs in zip(history, first["history"]):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
            assert mine["skipped"] == theirs["skipped"]
        for a, b in zip(first["fetched"], second["fetched"]):
            assert not set(a) & set(b)
        if mining == "random":
            seen = [query for a, b in zip(first["fetched"], second["fetched"]) for query in a + b]
            assert sorted(seen) == sorted(2 * list(range(7)))


REFUSED = """
import sys, torch.distributed as dist
from training.distributed import first_process_first
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
try:
    with first_process_first():
        raise ValueError("bad input")
except ValueError:
    sys.exit(2)
"""


def test_what_the_first_process_refuses_the_others_refuse_too(tmp_path):
    command = [sys.executable, "-c", REFUSED]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [2, 2]
