"""The start of pretrained weights: whitening against its definition, the choice against its own ranks."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dataset.lists import read_split
from eval import describe, positives_within
from model import (
    CALIBRATION_IMAGES,
    DescriptorModel,
    NetVLAD,
    calibrate_trunk,
    initialize_netvlad,
)
from training import start
from training.mining import reciprocal_rank
from training.start import choose_start, whiten_last


def a_model(seed: int = 0) -> DescriptorModel:
    """Two convolutions whose outputs are correlated and of very different variance, and NetVLAD."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 3))
    with torch.no_grad():
        trunk[2].weight += 0.5 * trunk[2].weight[:1]
        trunk[2].weight *= torch.logspace(-1, 1, 8)[:, None, None, None]
    model = DescriptorModel(trunk, NetVLAD(3, 8), 24)
    model.precision = "float32"
    return model


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_whitened_outputs_have_the_covariance_that_shrinkage_leaves(shrinkage, monkeypatch):
    monkeypatch.setattr(start, "SHRINKAGE", shrinkage)
    model, images = a_model(), torch.randn(40, 3, 32, 32)

    @torch.no_grad()
    def outputs() -> np.ndarray:
        return model.trunk(images).double().transpose(0, 1).flatten(1).numpy()

    before = np.cov(outputs(), bias=True)
    values, vectors = np.linalg.eigh(before)
    whiten_last(model, images)
    after = outputs()
    np.testing.assert_allclose(after.mean(axis=1), 0, atol=1e-3)
    expected = values / ((1 - shrinkage) * values + shrinkage * values.mean())
    found = vectors.T @ np.cov(after, bias=True) @ vectors
    np.testing.assert_allclose(found, np.diag(expected), atol=5e-3)


def test_the_start_that_ranks_training_queries_best_is_taken_and_said(pittsburgh):
    data, model = read_split(pittsburgh, "train"), a_model()
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    line = choose_start(model, data, torch.device("cpu"), seed=0)
    scores = {name: float(re.search(rf"{name} (\d\.\d+)", line)[1]) for name in start.STARTS}
    best = max(scores, key=scores.get)
    assert line.endswith(f"Taken: {best}.") and "36 training queries" in line
    assert model.weights_origin == ("random" if best == "as they are" else f"random, {best}")
    same = torch.equal(model.trunk[2].weight, before["2.weight"])
    assert same == (best == "as they are")
    assert not model.aggregation.initialized  # its clusters come from all images, later


def test_each_start_is_judged_by_descriptors_of_the_whole_network(pittsburgh):
    """Though the candidates share what lies below their last convolution."""
    data, device = read_split(pittsburgh, "train"), torch.device("cpu")
    line = choose_start(a_model(), data, device, seed=0)
    queries, index = start._some_places(data)
    rows = [data.queries[int(i)][0] for i in queries], [data.index[int(i)][0] for i in index]
    pictures, others = map(torch.stack, rows)
    positives = positives_within(data.utm_query[queries], data.utm_index[index], data.threshold)
    for name, (calibrated, whitened) in start.STARTS.items():
        model = a_model()
        if calibrated:
            few = np.linspace(0, len(others) - 1, min(CALIBRATION_IMAGES, len(others))).astype(int)
            calibrate_trunk(model, others[few])
        if whitened:
            whiten_last(model, others)
        initialize_netvlad(model, others.split(start.BATCH), device, seed=0)
        found = [describe(model.eval(), images, device).numpy() for images in (pictures, others)]
        ranks = [reciprocal_rank(*pair) for pair in zip(found[0] @ found[1].T, positives)]
        assert f"{name} {np.mean(ranks):.3f}" in line


def test_the_start_is_chosen_by_what_each_candidate_ranks(pittsburgh, monkeypatch):
    def spoil(model: DescriptorModel, images: torch.Tensor) -> None:
        model.trunk[2].weight.data.zero_()

    monkeypatch.setattr(start, "whiten_last", spoil)
    monkeypatch.setattr(start, "STARTS", {"as they are": (False, False), "spoiled": (False, True)})
    data, model = read_split(pittsburgh, "train"), a_model()
    assert choose_start(model, data, torch.device("cpu"), seed=0).endswith("Taken: as they are.")
    assert model.trunk[2].weight.abs().max() > 0 and model.weights_origin == "random"


def test_too_few_queries_choose_nothing():
    data = SimpleNamespace(utm_query=np.zeros((3, 2)), utm_index=np.zeros((5, 2)), threshold=25.0)
    data.index = range(5)
    line = choose_start(a_model(), data, torch.device("cpu"), seed=0)
    assert "3 queries are too few" in line
