"""Work shared among threads, and localization under every way of starting processes."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localization.threads import in_threads

SCENE = """
import multiprocessing
import torch
from localization.features import Features
from localization.cameras import Camera, project
from localization.localize import build_map, localize
from localization.matching import View

def main():
    multiprocessing.set_start_method({method!r})
    draw = {{"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}}
    points = torch.rand(150, 3, **draw) * torch.tensor([6.0, 5, 3]) + torch.tensor([-3.0, -2.5, 5])
    descriptors = torch.nn.functional.normalize(torch.randn(150, 128, **draw), dim=1).float()
    camera = Camera(320.0, 320.0, 320.0, 240.0, 640, 480)
    views = []
    for center in torch.rand(20, 3, **draw) - 0.5:
        xy = project(camera, points - center).float()
        features = Features(xy, torch.full((150,), 2.0), torch.zeros(150), torch.ones(150), descriptors)
        views.append(View(features, camera, torch.eye(3, dtype=torch.float64), center))
    queries = [View(view.features, camera) for view in views[18:]]
    order = [list(range(18))] * 2
    found = localize(build_map(views[:18], seed=0), queries, order, seed=0)
    assert not multiprocessing.active_children()
    print(max(float((e.c_world - v.c_world).norm()) for e, v in zip(found, views[18:])) < 0.01)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", [m for m in multiprocessing.get_all_start_methods() if m != "fork"])
def test_twenty_views_are_localized_whatever_starts_processes(method, tmp_path):
    """Python 3.14's forkserver once ended this: tensors handed to processes were too many files."""
    script = tmp_path / "scene.py"
    script.write_text(SCENE.format(method=method))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_results_come_in_order_and_errors_reach_the_caller():
    told = []
    assert in_threads(lambda n: n * n, range(20), lambda *done: told.append(done)) == [
        n * n for n in range(20)
    ]
    assert told == [(n, 20) for n in range(1, 21)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [1, 0])
    assert in_threads(str, []) == []
