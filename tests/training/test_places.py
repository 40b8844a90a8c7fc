"""The split of the training queries by place."""

import numpy as np
import pytest

from model import InputError
from training.places import split_by_place


@pytest.mark.parametrize("seed", range(5))
def test_split_by_place_shares_no_index_image(seed):
    rng = np.random.default_rng(seed)
    streets = rng.uniform(0, 3000, (30, 2))
    utm_query = np.repeat(streets, 6, axis=0) + rng.uniform(-60, 60, (180, 2))
    utm_index = np.repeat(streets, 15, axis=0) + rng.uniform(-60, 60, (450, 2))
    parts, dropped = split_by_place(utm_query, utm_index, 25, seed)
    rows = np.concatenate(list(parts.values()))
    assert len(set(rows)) == len(rows) == 180 - dropped
    assert (
        len(parts["train"]) > 120 and 8 <= len(parts["val"]) <= 18 and 8 <= len(parts["test"]) <= 18
    )
    distance = np.linalg.norm(utm_query[:, None] - utm_index[None], axis=2)
    near = [set(np.flatnonzero((distance[part] <= 25).any(axis=0))) for part in parts.values()]
    assert not (near[0] & near[1] or near[0] & near[2] or near[1] & near[2])
    again, _ = split_by_place(utm_query, utm_index, 25, seed)
    assert all(np.array_equal(parts[k], again[k]) for k in parts)


def test_split_of_one_place_is_refused():
    with pytest.raises(InputError, match="three places"):
        split_by_place(np.zeros((20, 2)), np.zeros((5, 2)), 25, 0)
