"""Batches of images of classes, a group an epoch, augmented on the device (CosPlace, train.py)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as tvf

from eval import read_batches
from model import IMAGENET_MEAN, IMAGENET_STD, DescriptorModel
from recognition.augmentation import Augmentation
from recognition.classification import ClassObjective
from training.distributed import rank_and_world, share_buffers


def square(size: int):
    """A transform to a uint8 image (3, size, size): the shorter side shrunk or grown, the middle cut out."""

    def transform(image: Image.Image) -> Tensor:
        return tvf.pil_to_tensor(tvf.center_crop(tvf.resize(image, [size]), [size, size]))

    return transform


class ClassBatches:
    """The batches of an epoch for train(): images (B, 3, S, S), labels (B,), perhaps views and targets.

    images: items (uint8 image (3, S, S), …). groups: of each group its classes, rows of their images.
    Epoch e trains group (e - 1) mod groups with `iterations` batches of `batch_size`: classes in random
    order, over and over, a random image of each. two_views: a second augmentation of each image.
    targets: as many images of another domain. Draws are keyed by (seed, epoch, step).
    """

    def __init__(
        self,
        images: Dataset,
        groups: Sequence[Sequence[np.ndarray]],
        objective: ClassObjective,
        augmentation: Augmentation,
        *,
        batch_size: int,
        iterations: int,
        epochs: int,
        seed: int,
        device: torch.device,
        two_views: bool = False,
        targets: Dataset | None = None,
    ) -> None:
        self.images, self.groups, self.objective = images, groups, objective
        self.augmentation, self.two_views, self.targets = augmentation, two_views, targets
        self.batch_size, self.iterations, self.epochs = batch_size, iterations, epochs
        self.seed, self.device, self.number = seed, device, 1

    def __len__(self) -> int:
        return self.iterations

    # ------------------------------------------------ what train() asks for

    def epoch(self, model: DescriptorModel, number: int, done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of epoch `number` after the first `done` ones; an empty list for none."""
        self.number = number
        self.objective.use((number - 1) % len(self.groups))
        rank, world = rank_and_world()
        steps = range(done, self.iterations)
        wanted = (self._wanted(step)[:, rank::world].ravel() for step in steps)
        for step, items in zip(steps, read_batches(self._read, wanted)):
            self.objective.share = (number - 1 + self.share(step)) / self.epochs
            labels = self.drawn(step)[1][rank::world]
            yield self._batch(items, labels, step, rank)
        share_buffers(model, self.device)

    def size(self, _step: int) -> int:
        """Images that all processes together train on in a step."""
        return self.batch_size

    def share(self, step: int) -> float:
        """Share of the epoch that is done in the middle of `step`."""
        return (step + 0.5) / self.iterations

    def names(self, step: int) -> list[str]:
        """The files of a step's images."""
        return [str(self.images.paths[row]) for row in self.drawn(step)[0]]

    def state_dict(self) -> dict:
        """Nothing: all draws are keyed."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """See `state_dict`."""

    # ------------------------------------------------ draws

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B,) and labels (B,) of a step."""
        classes = self.groups[(self.number - 1) % len(self.groups)]
        passes = max(1, len(classes) // self.batch_size)  # steps of a pass over the classes
        turn, inside = divmod(step, passes)
        rng = np.random.default_rng([self.seed, self.number, 0, turn])
        copies = -(-self.batch_size // len(classes))
        order = np.concatenate([rng.permutation(len(classes)) for _ in range(copies)])
        labels = order[inside * self.batch_size :][: self.batch_size]
        rng = np.random.default_rng([self.seed, self.number, 1, step])
        return np.array([rng.choice(classes[label]) for label in labels]), labels

    def _wanted(self, step: int) -> np.ndarray:
        """(1 or 2, B) rows to read in a step: of images and, counted on from these, of targets."""
        rows = self.drawn(step)[0]
        if self.targets is None:
            return rows[None]
        rng = np.random.default_rng([self.seed, self.number, 2, step])
        return np.stack([rows, len(self.images) + rng.integers(len(self.targets), size=len(rows))])

    def _read(self, row: int) -> Tensor:
        beyond = row - len(self.images)
        return (self.images[row] if beyond < 0 else self.targets[beyond])[0]

    def _batch(self, items: list, labels: np.ndarray, step: int, rank: int) -> list[Tensor]:
        if not items:
            return []
        drawn = int(np.random.default_rng([self.seed, self.number, 3, step, rank]).integers(2**62))
        generator = torch.Generator().manual_seed(drawn)
        images, *targets = torch.stack(items).to(self.device).split(len(labels))
        views = [images] * (2 if self.two_views else 1)
        first, *others = (self._augmented(part, generator) for part in (*views, *targets))
        return [first, torch.from_numpy(labels), *others]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = self.augmentation(images.float() / 255, generator)
        return tvf.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
