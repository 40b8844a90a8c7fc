"""A model as an ONNX file, by PyTorch's own exporter, for programs without PyTorch."""

from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch

from model import DescriptorModel, InputError
from reporting.handin import write_whole

OPSET = 18
NEEDED = ("onnx", "onnxscript")  # packages of the exporter


def export_onnx(model: DescriptorModel, size: tuple[int, int], file: Path) -> None:
    """Write `file`: images (batch, 3, *size), normalized -> descriptors (batch, D), in float32.

    The batch may be of any length. InputError if a package lacks or PyTorch is too old.
    """
    if file.suffix != ".onnx":
        raise InputError(f"--export {file} must end in .onnx: name it so.")
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise InputError(
            f"--export needs the package {lacking[0]}, which is not installed: pip install "
            f"{' '.join(NEEDED)}."
        )
    if "dynamic_shapes" not in signature(torch.onnx.export).parameters:
        raise InputError(
            f"--export needs PyTorch 2.5 or newer, not {torch.__version__}: update it."
        )
    model = model.cpu().eval()
    precision, model.precision = model.precision, "float32"
    images = torch.zeros(2, 3, *size)  # of one image the exporter would think that it is always one
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["descriptors"],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    model.precision = precision
    write_whole(file, lambda part: program.save(part, external_data=False))
