"""Recall by chance, its bootstrap interval, the paired gain."""

import itertools

import numpy as np
import pytest
import torch

from reporting.recall import chance_recall, measure_recall, recall_gain, recall_interval
from reporting.screen import print_recall_table


def test_gain_is_paired():
    before = np.array([0, 5, 5, 0] * 25)
    assert recall_gain(before, before) == (0, 0, 0)
    mean, low, high = recall_gain(np.where(before == 5, 0, before), before)
    assert mean == 0.5 and 0.38 < low < 0.45 and 0.55 < high < 0.62  # 2 sqrt(0.25 / 100)
    assert recall_gain(before, before + 1, 7) == (0, 0, 0)
    assert recall_gain(np.zeros(4), np.array([0, 5, 5, 0]), 5)[0] == 0.5
    # Answers that change together have a narrow interval, wherever recall itself is uncertain.
    few = np.where(np.arange(100) < 2, 0, before + 1)
    assert recall_gain(few, before + 1)[2] <= 0.06


def test_chance_recall_by_enumeration():
    positives = [np.array([0]), np.array([1, 2, 4])]
    for k, value in zip((1, 2, 5, 9), chance_recall(positives, 5, (1, 2, 5, 9))):
        draws = list(itertools.combinations(range(5), min(k, 5)))
        counted = np.mean([np.mean([bool(set(d) & set(p)) for d in draws]) for p in positives])
        assert value == pytest.approx(counted)


def test_bootstrap_interval_is_the_binomial_one_for_many_queries():
    hits = np.array([0] * 700 + [5] * 300)
    low, high = recall_interval(hits, [1, 10])
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert low[0] == pytest.approx(0.7 - half_width, abs=0.006)
    assert high[0] == pytest.approx(0.7 + half_width, abs=0.006)
    assert (low[1], high[1]) == (1, 1)


def test_what_training_gained_is_measured_and_printed(capsys):
    """Four places: untrained, three queries find the next place; trained, two of them their own."""
    places, at = np.eye(4, dtype=np.float32), np.arange(4)[:, None] * [100.0, 0.0]
    embedded = [(places[found], places) for found in ([0, 2, 3, 0], [0, 1, 2, 0])]
    section = measure_recall(embedded, at, at, 25.0, torch.device("cpu")).section
    assert (section["untrained"][0], section["trained"][0]) == (0.25, 0.75)
    gain, low, high = section["gain"]
    assert gain == 0.5 and 0 <= low < 0.5 < high <= 1
    print_recall_table({"val": section})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " gain " in line]
    assert line.split()[:3] == ["val", "gain", "+50.0"]
    assert line.endswith(f"{100 * low:+.1f} to {100 * high:+.1f})")
