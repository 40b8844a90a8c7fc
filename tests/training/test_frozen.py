"""The cache of the frozen trunk's outputs: in memory, in a file, refused, of mirror images."""

import pytest
import torch

from model import InputError, NetVLADModel
from training import frozen


def test_a_large_trunk_cache_is_a_file_and_one_too_large_is_refused(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = [(image, i) for i, image in enumerate(torch.randn(20, 3, 32, 32))]
    there = {"device": torch.device("cpu"), "desc": "", "folder": tmp_path}
    in_memory = frozen.cache_trunk(model, images, **there)
    monkeypatch.setattr(frozen, "CACHE_BYTES", 1000)
    for precision, kind in (("float32", torch.float32), ("auto", torch.bfloat16)):
        model.precision = precision
        mapped = frozen.cache_trunk(model, images, **there)
        assert mapped.shape == (20, 512, 2, 2) and mapped.dtype == kind
    assert torch.equal(in_memory, mapped)
    assert "take 0.0 GB: they go to a memory-mapped file" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="for 4000000000 images take .* GB free: name another"):
        frozen._room((4 * 10**9, 512, 14, 14), torch.bfloat16, tmp_path)


def test_mirrored_outputs_are_those_of_the_mirror_images():
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = torch.randn(20, 3, 32, 32)
    there = {"device": torch.device("cpu"), "desc": ""}
    mirrored = frozen.cache_trunk(model, [(x,) for x in images], **there, mirrored=True)
    assert torch.equal(mirrored, frozen.cache_trunk(model, [(x,) for x in images.flip(3)], **there))
    assert not torch.equal(mirrored, frozen.cache_trunk(model, [(x,) for x in images], **there))
