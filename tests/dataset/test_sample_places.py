"""The towns in CosPlace's layout: classes as promised, two domains, nights, whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.classes import Grid, find_classes
from dataset.folders import parse_name, read_split
from dataset.sample import is_made, places


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("places") / "towns"
    places.render_places(root, size=places.TINY)
    return root


def test_the_plan_has_classes_enough_in_groups_enough():
    train, streets = places.PARTS[0], places.FULL.streets[0]
    files = [
        Path(view.file)
        for street in range(streets)
        for view in places.plan_street(train, street, places.FULL, np.random.default_rng(street))
    ]
    found = [parse_name(file) for file in files]
    utm = np.array([label.utm for label in found])
    classes = find_classes(utm, [label.heading_deg for label in found], files, Grid())
    assert len(classes.groups) == 4 and [len(group) for group in classes.groups] == [24] * 4
    assert set(classes.sizes) == {12} and len(files) == len(set(files)) == 1152


def test_what_is_rendered_is_what_names_say(rendered):
    assert is_made(rendered, places._made(0, places.TINY))
    assert not is_made(rendered, places._made(1, places.TINY))
    sizes, brightness = {}, {}
    for part in ("sf_xs/val", "sf_xs/test", "tokyo_xs/test"):
        split = read_split(rendered / part, 25.0)
        assert len(split) == 2 and len(split.index) == 16 and not split.without_positives
        assert None not in split.index.headings_deg
        sizes[part] = {Image.open(path).size for path in split.queries.paths}
        for path, note in zip(split.queries.paths, split.queries.notes):
            mean = np.asarray(Image.open(path).convert("L")).mean()
            brightness.setdefault(note, []).append(mean)
    assert sizes["sf_xs/val"] == {(64, 64)}  # the car's, as the database
    assert sizes["sf_xs/test"] <= {(60, 80), (80, 60)}  # a phone's
    assert brightness.keys() == {"", "night"}
    assert max(brightness["night"]) < 0.6 * np.mean(brightness[""])


def test_an_image_shows_its_own_place_and_direction(rendered):
    """Images of a class are more alike than those of other classes, in the mean."""
    files = sorted((rendered / "sf_xs" / "train").iterdir())
    labels = [parse_name(file) for file in files]
    cells = Grid().cells([label.utm for label in labels], [label.heading_deg for label in labels])
    names = [tuple(cell) for cell in cells]
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB"), float).ravel() for f in files])
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    alike = pixels @ pixels.T
    same = np.array([[a == b for b in names] for a in names]) & ~np.eye(len(names), dtype=bool)
    other = ~same & ~np.eye(len(names), dtype=bool)
    assert alike[same].mean() > alike[other].mean() + 0.1
