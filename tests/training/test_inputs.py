"""What the trained part is fed: images, their frozen outputs, in memory or in a file, mirrored."""

import numpy as np
import pytest
import torch

from model import InputError, NetVLADModel
from training import inputs as inputs_py
from training.inputs import Inputs, Store


def images(count: int, seed: int = 0) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    return [(x,) for x in torch.randn(count, 3, 32, 32, generator=generator)]


def a_model(**options) -> NetVLADModel:
    torch.manual_seed(0)
    return NetVLADModel(4, pretrained=False, **options)


def inputs_of(model, *datasets, store) -> Inputs:
    return Inputs(model, datasets, torch.device("cpu"), store)


def test_rows_count_through_the_data_sets_and_are_the_frozen_outputs_of_their_images(tmp_path):
    model, queries, index = a_model(), images(3), images(20, seed=1)
    inputs = inputs_of(model, queries, index, store=Store(tmp_path))
    assert len(inputs) == 23
    rows = [22, 0, 3, 2]
    stacked = torch.stack([(queries + index)[row][0] for row in rows])
    for mirrored in (False, True):
        found = inputs.take(rows, mirrored)
        with torch.no_grad(), model.autocast("cpu"):
            expected = model.frozen_part(stacked.flip(3) if mirrored else stacked)
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
    assert set(inputs.cached) == {False, True}
    assert inputs.bytes_each() == found[0].numel() * found.element_size()
    whole = inputs_of(a_model(train_from="conv1"), queries, index, store=Store(tmp_path))
    assert torch.equal(whole.take(rows), stacked)
    assert torch.equal(whole.take(rows, mirrored=True), stacked.flip(3)) and not whole.cached


def test_descriptors_from_frozen_outputs_are_those_of_the_images(tmp_path):
    model, queries = a_model(), images(5)
    model.precision = "float32"
    inputs = inputs_of(model, queries, store=Store(tmp_path))
    with torch.no_grad():
        expected = model.eval()(torch.stack([x for (x,) in queries]))
    found = inputs.describe(model, np.arange(5), "")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_model_whose_outputs_were_cached_can_be_trained_on_them(tmp_path):
    inputs = inputs_of(a_model(), images(4), store=Store(tmp_path))
    inputs.describe(inputs.model, range(4), "")
    descriptors = inputs.model.train()(inputs.take(range(4)))
    descriptors[0, 0].backward()
    assert inputs.model.trunk[24].weight.grad.abs().max() > 0


def test_one_budget_serves_all_caches_and_what_is_beyond_goes_to_a_file(tmp_path):
    model = a_model()
    in_memory = inputs_of(model, images(20), store=Store(tmp_path))
    expected = in_memory.take(range(20))
    each = in_memory.bytes_each()
    store = Store(tmp_path, budget=30 * each)  # the images' outputs fit, those of both kinds do not
    inputs = inputs_of(model, images(20), store=store)
    assert store.fits(20 * each, 20 * each).startswith("0.00 GB of memory and 0.0 GB of files in")
    assert torch.equal(inputs.take(range(20)), expected) and store.left == 10 * each
    mirrored = inputs.take(range(20), mirrored=True)
    assert store.left == 10 * each  # they are in a file
    assert torch.equal(mirrored, in_memory.take(range(20), mirrored=True))
    assert not list(tmp_path.iterdir())  # which has no name
    inputs.release()
    assert store.left == 30 * each
    for precision, kind in (("float32", torch.float32), ("auto", torch.bfloat16)):
        model.precision = precision
        mapped = inputs_of(model, images(20), store=Store(tmp_path, budget=0)).cache()
        assert mapped.shape == (20, 512, 2, 2) and mapped.dtype == kind


def test_a_disk_too_small_is_said_before_anything_is_computed(tmp_path):
    with pytest.raises(InputError, match=r"take 8000.0 GB, of which .* are free: name another"):
        Store(tmp_path, budget=0).fits(4 * 10**12, 4 * 10**12)


def test_the_budget_is_a_share_of_the_memory_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(inputs_py, "usable_memory", lambda: 10**10)
    assert Store(tmp_path).left == int(inputs_py.MEMORY_SHARE * 10**10)
    assert 2**28 < inputs_py.MEMORY_SHARE * 2**33


def test_an_unreadable_image_is_named_whichever_thread_met_it(tmp_path):
    class Broken:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i == 33:
                raise InputError("the image 33 cannot be read: replace it.")
            return images(1)[0]

    with pytest.raises(InputError, match="image 33"):
        inputs_of(a_model(), Broken(), store=Store(tmp_path)).cache()


def test_a_gpu_with_room_keeps_the_outputs_then_memory_does(tmp_path, monkeypatch):
    model = a_model()
    expected = inputs_of(model, images(6), store=Store(tmp_path)).take(range(6))
    each = expected[0].numel() * expected.element_size()
    monkeypatch.setattr(inputs_py, "free_memory", lambda device: 20 * each)
    store = Store(tmp_path, budget=7 * each, device=torch.device("cuda"))
    assert (store.left_on_device, store.left) == (10 * each, 7 * each)
    store.device = torch.device("cpu")  # as far as the hardware goes
    assert store.fits(6 * each, 6 * each, 6 * each) == (
        f"{6 * each / 1e9:.2f} GB on cpu and {6 * each / 1e9:.2f} GB of memory and "
        f"{6 * each / 1e9:.1f} GB of files in {tmp_path}"
    )
    inputs = inputs_of(model, images(6), store=store)
    assert torch.equal(inputs.take([5, 2]), expected[[5, 2]])
    assert (store.left_on_device, store.left) == (4 * each, 7 * each)
    inputs.take([0], mirrored=True)
    assert (store.left_on_device, store.left) == (4 * each, each)
    inputs.release()
    assert (store.left_on_device, store.left) == (10 * each, 7 * each)
    assert Store(tmp_path, budget=1).left_on_device == 0
