"""The benchmark's tuples against a plain loop over its definitions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dataset.folders import true_positives
from model import DescriptorModel, InputError
from recognition.augmentation import Augmentation
from recognition.batches import BenchmarkTuples
from training.inputs import Inputs, Store


class Vectors:
    """A data set whose images are vectors, which the model below passes on."""

    def __init__(self, vectors: torch.Tensor, letter: str) -> None:
        self.vectors = vectors
        self.paths = [f"{letter}{i}" for i in range(len(vectors))]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, i: int) -> tuple:
        return self.vectors[i].expand(1, 1, -1).movedim(2, 0), i, self.paths[i]


def places(queries: int = 12, index: int = 60, seed: int = 0) -> SimpleNamespace:
    """Queries and index images anywhere on 200 x 200 m, with random descriptors of 8 numbers."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    utm_query, utm_index = rng.uniform(0, 200, (queries, 2)), rng.uniform(0, 200, (index, 2))
    utm_query[:8] = utm_index[:8] + 3
    utm_query[8] = [900, 900]  # nothing near
    data = SimpleNamespace(
        utm_query=utm_query,
        utm_index=utm_index,
        threshold=25.0,
        queries=Vectors(torch.randn(queries, 8, generator=generator), "q"),
        index=Vectors(torch.randn(index, 8, generator=generator), "i"),
        positives=true_positives(utm_query, utm_index, 25.0),
    )
    return type("Data", (SimpleNamespace,), {"__len__": lambda self: queries})(**vars(data))


def tuples_of(data, **options) -> tuple[BenchmarkTuples, DescriptorModel]:
    model = DescriptorModel(nn.Sequential(nn.Identity()), nn.Flatten(), 8)
    model.precision = "float32"
    inputs = Inputs(model, [data.queries, data.index], torch.device("cpu"), Store(Path(".")))
    options = {"batch_size": 3, "negatives": 4, "pool": 30, "refresh": 6} | options
    return BenchmarkTuples(data, inputs, **({"queries_per_epoch": 12} | options)), model


def similarities(data) -> np.ndarray:
    q, d = (nn.functional.normalize(v.vectors, dim=1) for v in (data.queries, data.index))
    return (q @ d.T).numpy()


def distances(data) -> np.ndarray:
    return np.linalg.norm(data.utm_query[:, None] - data.utm_index[None], axis=2)


@pytest.mark.parametrize("mining", ["random", "full", "partial"])
def test_tuples_are_those_that_a_plain_loop_finds(mining):
    data = places()
    tuples, model = tuples_of(data, mining=mining)
    alike, away = similarities(data), distances(data)
    usable = [q for q in range(12) if (away[q] <= 10).any()]
    assert tuples.rows.tolist() == usable and tuples.dropped == 12 - len(usable) >= 1
    remembered = {q: set() for q in range(12)}
    for window in range(2):
        found = tuples.draw_window(model, 1, window)
        rng = np.random.default_rng([0, 1, 0, window])
        queries = rng.choice(usable, 6, replace=False)
        shared = rng.choice(60, 30, replace=False)
        assert found.queries.tolist() == queries.tolist()
        for query, positive, negatives in zip(queries, found.positives, found.negatives):
            near = [i for i in range(60) if away[query, i] <= 10]
            assert positive == max(near, key=lambda i: alike[query, i])
            assert all(away[query, i] > 25 for i in negatives) and len(set(negatives)) == 4
            if mining == "random":
                far = [i for i in range(60) if away[query, i] > 25]
                assert negatives.tolist() == rng.choice(far, 4, replace=False).tolist()
                continue
            pool = set(shared)
            if mining == "full":
                pool = set(rng.choice(60, 30, replace=False)) | remembered[query]
            far = sorted((i for i in pool if away[query, i] > 25), key=lambda i: -alike[query, i])
            assert negatives.tolist() == far[:4]
            remembered[query] = set(far[:4])


def test_descriptors_of_other_norms_are_mined_by_distance():
    data = places()
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    data.index.vectors *= scale
    tuples, model = tuples_of(data)
    model.aggregation.unit_norm = False
    found = tuples.draw_window(model, 1, 0)
    q, d = data.queries.vectors.numpy(), data.index.vectors.numpy()
    distance, away = np.linalg.norm(q[:, None] - d[None], axis=2), distances(data)
    rng = np.random.default_rng([0, 1, 0, 0])
    rng.choice(tuples.rows, 6, replace=False)
    shared = rng.choice(60, 30, replace=False)
    for query, positive, negatives in zip(found.queries, found.positives, found.negatives):
        near = [i for i in range(60) if away[query, i] <= 10]
        assert positive == min(near, key=lambda i: distance[query, i])
        far = sorted((i for i in shared if away[query, i] > 25), key=lambda i: distance[query, i])
        assert negatives.tolist() == far[:4]


def test_an_epoch_is_windows_of_fresh_queries_and_can_be_taken_up():
    data = places()
    tuples, model = tuples_of(data, mining="full")
    assert len(tuples) == 4 and tuples.queries_per_epoch == 12
    batches = list(tuples.epoch(model, 1))
    assert [len(q) for q, _, _ in batches] == [3] * 4 and batches[0][2].shape == (3, 4, 8, 1, 1)
    stopped, _ = tuples_of(data, mining="full")
    for _ in zip(range(2), stopped.epoch(model, 1)):
        pass
    state = stopped.state_dict()
    other, _ = tuples_of(data, mining="full")
    other.load_state_dict(state)
    rest = list(other.epoch(model, 1, 2))
    for mine, theirs in zip(rest, batches[2:]):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert not torch.equal(next(iter(tuples.epoch(model, 2)))[0], batches[0][0])


def test_small_data_sets_are_no_trouble():
    data = places(queries=9, index=20)
    tuples, model = tuples_of(data, refresh=1000, queries_per_epoch=1000, pool=1000, negatives=40)
    (window,) = [tuples.draw_window(model, 1, 0)]
    assert len(window.queries) == len(tuples.rows) < 9 and window.negatives.shape[1] == 40
    assert all((distances(data)[q, n] > 25).all() for q, n in zip(window.queries, window.negatives))
    data.positives = [np.arange(20)] * 9  # everything is near: there is no negative
    tuples, _ = tuples_of(data)
    assert not len(tuples.draw_window(model, 1, 0))
    assert next(iter(tuples.epoch(model, 1))) == []
    with pytest.raises(InputError, match="so there is nothing to learn"):
        list(tuples.epoch(model, 1))
    data.utm_query = data.utm_query + 1e5
    with pytest.raises(InputError, match="none of the 9 training queries .* within 10 m"):
        tuples_of(data)


class Images(Vectors):
    """A data set of random images."""

    def __init__(self, count: int, letter: str) -> None:
        super().__init__(torch.zeros(count, 1), letter)
        self.images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))

    def __getitem__(self, i: int) -> tuple:
        return self.images[i], i, self.paths[i]


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_queries_are_augmented_also_where_the_trunk_is_frozen(frozen):
    data = places()
    data.queries, data.index = Images(12, "q"), Images(60, "i")
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    model = DescriptorModel(trunk, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 8)
    model.precision = "float32"
    model.freeze_below(frozen)
    device = torch.device("cpu")
    inputs = Inputs(model, [data.queries, data.index], device, Store(Path("."), 10**6))
    options = {"batch_size": 3, "negatives": 4, "pool": 30, "refresh": 6, "queries_per_epoch": 6}
    plain = BenchmarkTuples(data, inputs, **options)
    dark = BenchmarkTuples(data, inputs, augmentation=Augmentation(night=1.0), **options)
    flipped = BenchmarkTuples(data, inputs, flip=True, **options)
    mirrored = []
    model.train()
    for a, b, c in zip(*(tuples.epoch(model, 1) for tuples in (plain, dark, flipped))):
        assert not torch.allclose(a[0], b[0]) and b[0].shape == a[0].shape
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
        turned = not torch.equal(a[1], c[1])
        mirrored.append(turned)
        assert all(torch.allclose(x.flip(-1) if turned else x, y) for x, y in zip(a, c))
        assert model.training and not b[0].requires_grad
        torch.cat([b[0], b[1]]).sum()
        model(b[0]).sum().backward()  # what the frozen part made can be trained on
    assert len(mirrored) == 2
