"""What several test files share: a tiny rendered sample and a checkpoint."""

import os
from pathlib import Path

if beside := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1:  # before torch is imported
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (beside + 1)))

import pytest
import torch

from dataset.sample import TINY, render_sample
from model import WARNINGS, NetVLADModel, calibrate_trunk, initialize_netvlad
from tests.pittsburgh import write_pittsburgh

# A process runs whole files. Those that take longest come first, so that none waits for one in the end.
LONG = ("end_to_end", "test", "localize", "calibration", "commands", "base", "contract", "check")


def pytest_collection_modifyitems(items):
    """The files in LONG before all others."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True)
def unsaid():
    """No warning was said before a test, or before what a module's tests share, so that it is said again."""
    WARNINGS.clear()
    yield
    WARNINGS.clear()


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The folder of a tiny rendered sample, in the assignment's layout."""
    root = tmp_path_factory.mktemp("sample") / "tiny"
    render_sample(root, size=TINY)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A netvlad_final.pth of a random, calibrated model with 4 clusters."""
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = torch.rand(8, 3, 64, 64)
    calibrate_trunk(model, images)
    initialize_netvlad(model, [images], torch.device("cpu"))
    file = tmp_path_factory.mktemp("checkpoint") / "netvlad_final.pth"
    torch.save(model.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def pittsburgh(tmp_path_factory) -> Path:
    """The folder of a miniature of Pittsburgh 30k, tests/pittsburgh.py."""
    return write_pittsburgh(tmp_path_factory.mktemp("pittsburgh"))
