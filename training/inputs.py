"""What the trained part of a model is fed: images, or what its frozen part made of them once."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eval import describe, read_batches
from model import DescriptorModel, InputError, progress
from training.distributed import gather, shard

TRUNK_BATCH = 16
DESCRIBE_BATCH = 32
MEMORY = torch.device("cpu")
MEMORY_SHARE = 0.4  # of the machine's memory, for all caches of a run together
DEVICE_SHARE = 0.5  # of what is free on a GPU, likewise
UNKNOWN_MEMORY = 8 * 2**30


class Store:
    """Room for the caches of a run: on its GPU, in memory up to one budget for all, then in files.

    folder: where the files go; they have no name and are gone with the run.
    budget: bytes of memory; None takes MEMORY_SHARE of what the machine, or this process, may use.
    device, on_device: where the model is, and bytes for caches there; None takes DEVICE_SHARE of what
    is free on a CUDA GPU, and nothing elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        budget: int | None = None,
        *,
        device: torch.device = MEMORY,
        on_device: int | None = None,
    ) -> None:
        self.folder, self.device = folder, device
        self.left = int(MEMORY_SHARE * usable_memory()) if budget is None else budget
        if on_device is None:
            on_device = int(DEVICE_SHARE * free_memory(device)) if device.type == "cuda" else 0
        self.left_on_device = on_device
        self.taken: dict[int, tuple[str, int]] = {}  # address of a tensor -> whose room, its bytes

    def fits(self, *sizes: int) -> str:
        """Where tensors of these bytes will go, in words. InputError if the disk is too small."""
        left = {"left_on_device": self.left_on_device, "left": self.left, "disk": math.inf}
        used = dict.fromkeys(left, 0)
        for size in sizes:
            room = next(name for name, free in left.items() if size <= free)
            used[room] += size
            left[room] -= size
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if used["disk"] > free:
            raise InputError(
                f"the frozen trunk's outputs take {sum(used.values()) / 1e9:.1f} GB, of which "
                f"{used['disk'] / 1e9:.1f} GB go to {self.folder}, where {free / 1e9:.1f} GB are free: "
                "name another --output, or train fewer layers (--train-from)."
            )
        places = {
            f"{used['left_on_device'] / 1e9:.2f} GB on {self.device}": used["left_on_device"],
            f"{used['left'] / 1e9:.2f} GB of memory": used["left"] or not used["left_on_device"],
            f"{used['disk'] / 1e9:.1f} GB of files in {self.folder}": used["disk"],
        }
        return " and ".join(words for words, needed in places.items() if needed)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor on the device, in memory or, once that is used up, mapped from a file."""
        size = math.prod(shape) * dtype.itemsize
        self.fits(size)
        for room, device in (("left_on_device", self.device), ("left", MEMORY)):
            if size <= getattr(self, room):
                found = torch.empty(tuple(shape), dtype=dtype, device=device)
                setattr(self, room, getattr(self, room) - size)
                self.taken[found.data_ptr()] = room, size
                return found
        plain = np.float32 if dtype == torch.float32 else np.int16  # numpy has no bfloat16
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return torch.from_numpy(np.memmap(file, plain, "w+", shape=tuple(shape))).view(dtype)

    def release(self, tensor: Tensor) -> None:
        """Give back the room of a tensor of `empty` that nobody needs any more."""
        room, size = self.taken.pop(tensor.data_ptr(), ("left", 0))
        setattr(self, room, getattr(self, room) + size)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA GPU."""
    return torch.cuda.mem_get_info(device)[0]


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if less."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        size = UNKNOWN_MEMORY
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return size


class Inputs:
    """Inputs of a model's trained part, by row: of the data sets' images one after the other.

    datasets: items (image (3, H, W), …). They stay images where nothing of the model is frozen; else
    `cache` computes what the frozen part makes of each, (C, h, w), once, bfloat16 unless the model's
    precision is float32: 0.2 MB an image of 224 x 224 and conv5. With `keep` False, for sets too large,
    it is computed each time.
    """

    def __init__(
        self,
        model: DescriptorModel,
        datasets: Sequence[Dataset],
        device: torch.device,
        store: Store,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)
        self.datasets, self.device, self.store = datasets, device, store
        self.starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self.keep = True
        self.cached: dict[bool, Tensor] = {}  # of the images, of the mirror images

    def __len__(self) -> int:
        return int(self.starts[-1])

    def item(self, row: int) -> tuple:
        """The item of a row in its data set."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.datasets[number][row - int(self.starts[number])]

    def take(self, rows: Sequence[int], mirrored: bool = False) -> Tensor:
        """The inputs (B, …) of rows, or those of their mirror images."""
        if self.model.first_trained and self.keep:
            outputs = self.cache(mirrored)
            return outputs[torch.as_tensor(np.asarray(rows), device=outputs.device)]
        (items,) = read_batches(self.item, [rows])
        images = torch.stack([item[0] for item in items])
        return self.of_images(images.flip(-1) if mirrored else images)

    def of_images(self, images: Tensor) -> Tensor:
        """The inputs (B, …) that images (B, 3, H, W) give."""
        if not self.model.first_trained:
            return images
        return self._frozen(images, self._dtype).cpu().clone()  # one that can be trained on

    def bytes_each(self) -> int:
        """What the cache takes for an image."""
        shape, dtype = self._shape()
        return math.prod(shape) * dtype.itemsize

    def cache(self, mirrored: bool = False) -> Tensor:
        """What the frozen part makes of all (mirror) images, computed when first asked for."""
        if mirrored not in self.cached:
            shape, dtype = self._shape()
            outputs, done = self.store.empty((len(self), *shape), dtype), 0
            what = "mirror images, frozen trunk" if mirrored else "images, frozen trunk"
            with progress(total=len(self), desc=what, unit="image") as bar:
                parts = self._frozen_parts(mirrored, dtype)
                for part in gather(parts, len(self), TRUNK_BATCH):
                    outputs[done : done + len(part)] = part
                    done += len(part)
                    bar.update(len(part))
            self.cached[mirrored] = outputs
        return self.cached[mirrored]

    def release(self) -> None:
        """Forget the cache."""
        for outputs in self.cached.values():
            self.store.release(outputs)
        self.cached.clear()

    def describe(self, model: DescriptorModel, rows: Sequence[int], what: str) -> np.ndarray:
        """Descriptors (n, D) of rows, in batches bounded by n alone.

        model: one with the same frozen part; it is left in evaluation mode.
        """
        model.eval()
        rows = np.asarray(rows)
        batches = shard(len(rows), DESCRIBE_BATCH)
        bar = progress(batches, desc=f"descriptors, {what}", unit="batch")
        parts = (describe(model, self.take(rows[batch]), self.device) for batch in bar)
        found = np.empty((len(rows), model.descriptor_dim), np.float32)
        done = 0
        for part in gather(parts, len(rows), DESCRIBE_BATCH):
            found[done : done + len(part)] = part.cpu().numpy()
            done += len(part)
        return found

    def _frozen_parts(self, mirrored: bool, dtype: torch.dtype) -> Iterator[Tensor]:
        batches = shard(len(self), TRUNK_BATCH)
        for items in read_batches(self.item, batches):
            images = torch.stack([item[0] for item in items])
            yield self._frozen(images.flip(-1) if mirrored else images, dtype).cpu()

    def _frozen(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        model, training = self.model, self.model.training
        model.eval()
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), model.autocast(self.device):
            outputs = model.frozen_part(images).to(dtype).contiguous()
        model.train(training)
        return outputs

    def _shape(self) -> tuple[torch.Size, torch.dtype]:
        return self._frozen(self.item(0)[0][None], self._dtype).shape[1:], self._dtype

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.model.precision == "float32" else torch.bfloat16
