"""What the frozen part of the trunk makes of every training image, computed once."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval import all_batches, own_batches
from model import InputError, NetVLADModel

CACHE_BATCH = 16
CACHE_BYTES = 2 * 2**30  # most of a cache in memory


@torch.no_grad()
def cache_trunk(
    model: NetVLADModel, dataset: Dataset, device: torch.device, *, workers: int = 0,
    folder: Path | str = ".", desc: str, mirrored: bool = False,
) -> Tensor:  # fmt: skip
    """Outputs of the frozen trunk[:first_trained], computed once for each (mirror) image of `dataset`.

    dataset: items (image, …). -> (n, C, h, w) on the CPU, bfloat16 unless the model's precision is
    float32; 0.2 MB an image at 224 x 224 and conv5. More than CACHE_BYTES go to a file in `folder`.
    """
    frozen = model.to(device, memory_format=torch.channels_last).trunk[: model.first_trained].eval()
    dtype = torch.float32 if model.precision == "float32" else torch.bfloat16
    batches = own_batches(len(dataset), CACHE_BATCH)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)

    def parts() -> Iterator[Tensor]:
        for images, *_ in loader:
            images = (images.flip(3) if mirrored else images).to(device)
            images = images.contiguous(memory_format=torch.channels_last)
            with model.autocast(device):
                yield frozen(images).to(dtype).contiguous()

    outputs: Tensor | None = None
    done = 0
    with tqdm(total=len(dataset), desc=desc, unit="image", leave=False) as bar:
        for part in all_batches(parts(), len(dataset), CACHE_BATCH):
            if outputs is None:
                outputs = _room((len(dataset), *part.shape[1:]), dtype, Path(folder))
            outputs[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    return outputs


def _room(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """An empty tensor; beyond CACHE_BYTES a nameless file in `folder`, mapped into memory."""
    size = math.prod(shape) * dtype.itemsize
    if size <= CACHE_BYTES:
        return torch.empty(shape, dtype=dtype)
    free = shutil.disk_usage(folder).free
    what = f"the frozen trunk's outputs for {shape[0]} images take {size / 1e9:.1f} GB"
    if size > free:
        raise InputError(
            f"{what} but {folder} has only {free / 1e9:.1f} GB free: name another --output, or train "
            "fewer layers (--train-from)."
        )
    tqdm.write(f"{what}: they go to a memory-mapped file in {folder}, removed at the end.")
    plain = np.float32 if dtype == torch.float32 else np.int16  # numpy has no bfloat16
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, plain, "w+", shape=shape)).view(dtype)
