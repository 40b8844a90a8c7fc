"""CosPlace's classes and groups: the published example, a hand count, what is never neighbors."""

import itertools

import numpy as np
import pytest

from dataset.classes import Grid, find_classes
from model import InputError


def test_the_published_example():
    cells = Grid().cells([[584291.21, 4476924.92]], [95])
    assert (cells * [10, 10, 30]).tolist() == [[584290, 4476920, 90]]
    assert Grid().groups(cells).tolist() == [[4, 2, 1]]


def test_a_full_turn_is_north_and_south_of_the_equator_counts_on():
    cells = Grid().cells([[0, 0], [0, 0], [-0.5, -10]], [360, 0, -1])
    assert cells.tolist() == [[0, 0, 0], [0, 0, 0], [-1, -1, 11]]


def test_classes_and_groups_are_a_hand_count():
    # Two places 50 m apart share a group, one 10 m beside does not, nor does the other direction.
    places = [(0, 0, 10), (50, 0, 10), (10, 0, 10), (0, 0, 40), (100, 0, 10)]
    counts = [3, 2, 4, 2, 1]
    rows = [place for place, count in zip(places, counts) for _ in range(count)]
    shuffled = np.random.default_rng(0).permutation(len(rows))
    table = np.array(rows, float)[shuffled]
    utm, headings = table[:, :2] + 0.5, table[:, 2]
    found = find_classes(utm, headings.tolist(), range(len(utm)), Grid(at_least=2))
    assert sorted(map(len, found.groups)) == [1, 1, 2]  # the class of one image is left out
    assert len(found.sizes) == 5 and sorted(found.sizes) == [1, 2, 2, 3, 4]
    used = [row for group in found.groups for rows in group for row in rows]
    assert len(used) == len(set(used)) == 11  # no image is in two classes
    for rows in itertools.chain(*found.groups):
        assert len({(*utm[row], headings[row]) for row in rows}) == 1
    first = shuffled.tolist().index  # groups are in the order in which the list names them
    assert found.groups[0][0].min() == min(rows.min() for g in found.groups for rows in g) or first


def test_classes_of_a_group_are_never_neighbors():
    rng = np.random.default_rng(1)
    utm, headings = rng.uniform(0, 120, (4000, 2)), rng.uniform(0, 360, 4000)
    grid = Grid(at_least=1)
    found = find_classes(utm, headings.tolist(), range(4000), grid)
    assert len(found.groups) == 50
    for group in found.groups[:10]:
        for a, b in itertools.combinations(group[:25], 2):
            apart = np.abs(utm[a][:, None] - utm[b][None]).max(2).min()
            turn = np.abs((headings[a][:, None] - headings[b][None] + 180) % 360 - 180).min()
            assert apart >= 10 * 4 or turn >= 30 * 1


@pytest.mark.parametrize(
    "headings, grid, says",
    [
        ([10, None, None], {}, "2 of 3 images have no heading in their names, the first is 1"),
        ([10, 10, 100], {"at_least": 3}, "none of the 2 classes has 3 images, the largest has 2"),
    ],
)
def test_what_makes_no_classes_is_one_sentence(headings, grid, says):
    with pytest.raises(InputError, match=says):
        find_classes(np.zeros((3, 2)), headings, range(3), Grid(**grid))


def test_directions_that_meet_again_are_refused():
    with pytest.raises(InputError, match="--alpha 50 times --L 2 does not divide 360"):
        Grid(alpha=50)


@pytest.mark.parametrize("flag", [{"M": 0}, {"alpha": -30}, {"L": 0}, {"N": 0}, {"at_least": -3}])
def test_numbers_of_no_grid_are_refused(flag):
    with pytest.raises(InputError, match="give a whole number of 1 or more"):
        Grid(**flag)
