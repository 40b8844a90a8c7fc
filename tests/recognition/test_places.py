"""Batches of places x images, and RandAugment."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from dataset.gsv_cities import GsvCities
from model import WARNINGS, InputError
from recognition import places, randaugment
from recognition.places import PlaceBatches
from recognition.randaugment import rand_augment
from tests.dataset.test_gsv_cities import rows_of, write_city

CPU = torch.device("cpu")
SIZE = (16, 24)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> GsvCities:
    folder: Path = tmp_path_factory.mktemp("gsv")
    for city in ("Here", "There"):
        write_city(folder, city, rows_of(city, dict.fromkeys(range(5), 4) | {5: 6}))
    return GsvCities(folder, 4)


def epochs(data: GsvCities, number: int, done: int = 0, **more) -> list[list[torch.Tensor]]:
    batches = PlaceBatches(data, SIZE, CPU, **({"places": 4, "images": 3} | more))
    return list(batches.epoch(torch.nn.Linear(1, 1), number, done))


def test_a_batch_is_places_of_images_mostly_of_one_city(data):
    batches = PlaceBatches(data, SIZE, CPU, places=4, images=3)
    found = epochs(data, 1)
    assert len(found) == len(batches) == 3 and batches.size(0) == 12
    seen = []
    for images, labels, _ in found:
        assert images.shape == (12, 3, *SIZE) and images.dtype == torch.float32
        assert torch.equal(labels, labels[::3].repeat_interleave(3))
        seen += labels[::3].tolist()
    assert sorted(seen) == list(range(12))
    cities = data.city_of[np.array(seen)]
    assert (np.diff(cities) != 0).sum() == 1
    order = batches.draw(1)
    assert all(len(set(row)) == 3 for row in order.tolist())


def test_each_epoch_draws_anew_and_can_be_taken_up(data):
    first, second = epochs(data, 1), epochs(data, 2)
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(first, second))
    for whole, rest in zip(first[1:], epochs(data, 1, done=1)):
        assert all(torch.equal(a, b) for a, b in zip(whole, rest))
    assert not torch.equal(epochs(data, 1, seed=1)[0][0], first[0][0])
    plain = epochs(data, 1, augment=False)
    assert torch.equal(plain[0][1], first[0][1]) and not torch.equal(plain[0][0], first[0][0])


def test_processes_share_a_batch(data, monkeypatch):
    whole = epochs(data, 1)
    monkeypatch.setattr(places, "share_buffers", lambda _model, _device: None)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(places, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(epochs(data, 1))
    for step, (images, labels, key) in enumerate(whole):
        pairs = [shares[rank][step] for rank in (0, 1)]
        assert all(int(part[2]) == int(key) for part in pairs)
        by_place = [labels.view(4, 3)[rank::2].flatten() for rank in (0, 1)]
        assert all(torch.equal(part[1], mine) for part, mine in zip(pairs, by_place))
        assert torch.equal(pairs[1][0], images.view(4, 3, 3, *SIZE)[1::2].flatten(0, 1))


def test_a_batch_of_more_places_than_there_are_has_all(data):
    batches = PlaceBatches(data, SIZE, CPU, places=40, images=2)
    assert len(batches) == 1 and batches.size(0) == 24
    assert "all 12 places there are, fewer than 40" in WARNINGS[0]
    with pytest.raises(InputError, match="a batch of 1 places is too small"):
        PlaceBatches(data, SIZE, CPU, places=1)
    list(batches.epoch(torch.nn.Linear(1, 1), 1))
    assert len(batches.names(0)) == 24 and batches.names(0)[0].endswith(".jpg")


# ------------------------------------------------ RandAugment


def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((64, 48), Image.Resampling.BICUBIC)


NAMES = [
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Identity", "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number, name", [*enumerate(NAMES)])
def test_each_operation_is_torchvision_s(number, name, sign):
    magnitudes, signed = RandAugment()._augmentation_space(31, (48, 64))[name]
    strength = float(magnitudes[9]) if magnitudes.ndim else 0.0
    how = (InterpolationMode.BILINEAR, None)
    expected = _apply_op(photo(), name, strength * (sign if signed else 1), *how)

    class Rng:
        def integers(self, _most: int, size: int | None = None) -> object:
            return np.array([number]) if size else int(sign < 0)

    found = rand_augment(photo(), Rng(), count=1)
    difference = np.asarray(found, int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # magnitudes' float32
    assert len(NAMES) == len(randaugment.BOTH_WAYS) + len(randaugment.ONE_WAY)


def test_operations_are_drawn_from_the_generator_alone():
    drawn = [np.asarray(rand_augment(photo(), np.random.default_rng(s))) for s in (1, 1, 2, 3)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[2], drawn[3])
