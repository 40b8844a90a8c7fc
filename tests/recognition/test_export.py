"""ONNX files describe as the model does, whatever the length of the batch."""

from inspect import signature

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from model import DescriptorModel, InputError, Trunk
from recognition import export, vit
from recognition.aggregation import build_aggregation
from recognition.export import export_onnx

SETTINGS = {
    "gem": {"fc_output_dim": 5},
    "mixvpr": {"mix_out_channels": 4, "mix_out_rows": 2, "mix_depth": 1},
    "supervlad": {"supervlad_clusters": 2, "crossimage_encoder": True},
}


def network(aggregation: str) -> DescriptorModel:
    torch.manual_seed(0)
    if aggregation == "supervlad":
        size = vit.VitSize(16, 1, 2)
        trunk = nn.Sequential(vit.FirstStage(size, 0), vit.LastStage(size, 0, False))
        nn.init.normal_(trunk[0].pos_embed)
    else:
        trunk = Trunk(nn.Conv2d(3, 16, 3, 8), nn.BatchNorm2d(16), nn.ReLU())
    return DescriptorModel(trunk, *build_aggregation(aggregation, 16, SETTINGS[aggregation]))


@pytest.mark.skipif(
    "dynamic_shapes" not in signature(torch.onnx.export).parameters, reason="needs torch 2.5"
)
@pytest.mark.parametrize("aggregation", SETTINGS)
def test_onnx_finds_the_same_descriptors(aggregation, tmp_path):
    model, file = network(aggregation).eval(), tmp_path / "model.onnx"
    model(torch.zeros(1, 3, 42, 56))
    export_onnx(model, (42, 56), file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = torch.randn(count, 3, 42, 56)
        with torch.inference_mode():
            expected = model(images).numpy()
        (found,) = session.run(["descriptors"], {"images": images.numpy()})
        assert found.shape == expected.shape == (count, model.descriptor_dim)
        assert np.abs(found - expected).max() < 1e-4


def test_what_export_needs_is_said(tmp_path, monkeypatch):
    model = network("gem")
    with pytest.raises(InputError, match=r"m\.pth must end in \.onnx"):
        export_onnx(model, (42, 56), tmp_path / "m.pth")
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f: None)  # as before torch 2.5
    with pytest.raises(InputError, match="needs PyTorch 2.5 or newer, not"):
        export_onnx(model, (42, 56), tmp_path / "m.onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        InputError, match="needs the package onnxscript, .* pip install onnx onnxscr"
    ):
        export_onnx(model, (42, 56), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
