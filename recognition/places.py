"""Batches of P places x K images of GSV-Cities, for objectives over all pairs of a batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as tvf

from dataset.gsv_cities import GsvCities
from eval import load_image, read_batches
from model import IMAGENET_MEAN, IMAGENET_STD, DescriptorModel, InputError, warn
from recognition.randaugment import rand_augment
from training.distributed import rank_and_world, share_buffers


class PlaceBatches:
    """The batches (images (n, 3, H, W), labels (n,), key) of an epoch for train(), n = P * K.

    In each epoch the cities, and the places within each, are put into a new order; a batch is the next
    P places, so mostly of one city, which makes negatives hard; what does not fill a batch waits for
    another epoch. Each place shows K of its images, drawn anew. Every draw is keyed by the seed, the
    epoch and the place's position in it.

    size: height, width. augment: RandAugment of each image. InputError if a batch has fewer places
    than there are processes.
    """

    def __init__(
        self,
        data: GsvCities,
        size: tuple[int, int],
        device: torch.device,
        *,
        places: int = 120,
        images: int = 4,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        self.data, self.image_size, self.device = data, size, device
        self.images, self.seed, self.augment = images, seed, augment
        self.places = min(places, len(data.city_of))
        if self.places < places:
            warn(f"a batch has all {self.places} places there are, fewer than {places}.")
        if self.places < max(2, rank_and_world()[1]):
            raise InputError(
                f"a batch of {self.places} places is too small: it takes two, and one a process; "
                "raise --train_batch_size."
            )
        order = np.argsort(data.place, kind="stable")
        self.of_place = np.split(order, np.cumsum(np.bincount(data.place))[:-1])
        self.order = np.zeros((0, images), int)  # of an epoch: images of each place in turn
        self.number = 0

    def __len__(self) -> int:
        return len(self.of_place) // self.places

    # ------------------------------------------------ what train() asks for

    def epoch(self, model: DescriptorModel, number: int, done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of epoch `number` after the first `done` ones: this process's share of each."""
        self.number, self.order = number, self.draw(number)
        rank, world = rank_and_world()
        steps = range(done, len(self))
        own = [
            np.arange(step * self.places, (step + 1) * self.places)[rank::world] for step in steps
        ]
        batches = ((part[:, None] * self.images + np.arange(self.images)).ravel() for part in own)
        for step, items in zip(steps, read_batches(self.read, batches)):
            images, labels = zip(*items)
            key = torch.tensor(self._number(0, step))
            yield [torch.stack(images), torch.tensor(labels), key]
        share_buffers(model, self.device)

    def size(self, step: int) -> int:
        """Images that all processes together train on in `step`."""
        return self.places * self.images

    def share(self, step: int) -> float:
        """Share of the epoch that is done in the middle of `step`."""
        return (step + 0.5) / len(self)

    def names(self, step: int) -> list[str]:
        """The files of a step."""
        rows = self.order[step * self.places : (step + 1) * self.places]
        return [str(self.data.path(int(i))) for i in rows.ravel()]

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: every draw is keyed."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `state_dict`."""

    # ------------------------------------------------ draws

    def draw(self, number: int) -> np.ndarray:
        """Images (places, K) of epoch `number`, in the order they are shown."""
        rng = np.random.default_rng([self.seed, number])
        cities = rng.permutation(len(self.data.cities))
        places = [rng.permutation(np.flatnonzero(self.data.city_of == city)) for city in cities]
        return np.stack(
            [
                rng.choice(self.of_place[p], self.images, replace=False)
                for p in np.concatenate(places)
            ]
        )

    def read(self, position: int) -> tuple[Tensor, int]:
        """The image at a position of the epoch as the network wants it, and the number of its place."""
        row = int(self.order.ravel()[position])
        image = load_image(self.data.path(row), max(self.image_size))
        image = tvf.resize(image, list(self.image_size))
        if self.augment:
            image = rand_augment(image, np.random.default_rng(self._key(1, position)))
        tensor = tvf.normalize(tvf.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
        return tensor, int(self.data.place[row])

    def _key(self, kind: int, position: int) -> list[int]:
        return [self.seed, self.number, kind, position]

    def _number(self, kind: int, position: int) -> int:
        return int(np.random.default_rng(self._key(kind, position)).integers(2**62))
