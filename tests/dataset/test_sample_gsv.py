"""The sample's cities in the layout of GSV-Cities."""

import numpy as np
from PIL import Image

from dataset.gsv_cities import GsvCities
from dataset.sample.gsv_cities import FULL, GsvSize, render_gsv_cities

TINY = GsvSize(streets=2, photographs=3, size_px=(48, 36))


def test_places_are_seen_on_several_days_and_the_same_again(tmp_path):
    for name in ("one", "two"):
        render_gsv_cities(tmp_path / name, seed=3, size=TINY)
    data, again = (GsvCities(tmp_path / name, 3) for name in ("one", "two"))
    assert data.cities == ["Aville", "Beton"] and np.bincount(data.place).tolist() == [3] * 4
    assert data.names == again.names and data.dropped == 0
    images = [np.asarray(data[i][0], int) for i in range(len(data))]
    assert all(np.array_equal(image, again[i][0]) for i, image in enumerate(images))
    assert images[0].shape == (36, 48, 3) and len({image.tobytes() for image in images}) == 12
    with Image.open(data.path(0)) as file:
        assert file.format == "JPEG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_places_are_seen_in_the_directions_of_the_samples_panoramas(tmp_path):
    render_gsv_cities(tmp_path / "cities", size=GsvSize(streets=3, photographs=3, size_px=(8, 6)))
    data = GsvCities(tmp_path / "cities", 3)
    north = np.array([int(name.split("_")[4]) for name in data.names])
    beside = (north + 36) % 72 - 36
    assert np.abs(beside).max() <= 15 and beside.std() > 5
    assert len(set((north + 36) // 72 % 5)) > 1


def test_the_sample_has_enough_places():
    assert 2 * FULL.streets >= 40 and FULL.photographs >= 4
