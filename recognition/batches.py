"""Which images meet in a batch: the benchmark's tuples (query, positive, ten negatives).

Definitions: deep-visual-geo-localization-benchmark (Berton et al., CVPR 2022), datasets_ws.py.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dataset.folders import FolderSplit, true_positives
from dataset.lists import draw_random
from eval import read_batches
from model import DescriptorModel, InputError
from recognition.augmentation import Augmentation, augment_normalized
from training.distributed import from_first, rank_and_world, share_buffers
from training.inputs import Inputs
from training.mining import Tuples

MINING = ("partial", "full", "random")
REMEMBERED = 10  # hardest negatives of a query that join its next pool in full mining


class BenchmarkTuples:
    """The batches (q, p, n) of an epoch for train(): queries_per_epoch / refresh windows of freshly drawn queries.

    Queries without an index image within `positive_radius` m are dropped (`dropped` of them). A window:
    `refresh` queries; the positive of each is the one of those index images that is nearest by
    descriptor; negatives, never within data.threshold, are
    random: any;
    full: the nearest among `pool` random index images and those that the query had last;
    partial: the nearest among `pool` random index images, the same for all queries of the window.
    augmentation: of the queries' images. flip: whether half of the batches are mirrored.
    A query to which all index images are positives is not used. Draws are keyed by (seed, epoch, window
    or step). InputError if no query is left.
    """

    def __init__(
        self,
        data: FolderSplit,
        inputs: Inputs,
        *,
        mining: str = "partial",
        batch_size: int = 4,
        seed: int = 0,
        negatives: int = 10,
        pool: int = 1000,
        refresh: int = 1000,
        queries_per_epoch: int = 5000,
        positive_radius: float = 10.0,
        augmentation: Augmentation | None = None,
        flip: bool = False,
    ) -> None:
        self.data, self.inputs, self.mining = data, inputs, mining
        self.batch_size, self.seed, self.negatives, self.pool = batch_size, seed, negatives, pool
        self.augmentation, self.flip = augmentation or Augmentation(), flip
        self.first_index = len(data)  # row of the first index image in the inputs
        self.hard_positives = true_positives(data.utm_query, data.utm_index, positive_radius)
        self.rows = np.flatnonzero([len(rows) > 0 for rows in self.hard_positives])
        self.dropped = len(data) - len(self.rows)
        if not len(self.rows):
            raise InputError(
                f"none of the {len(data)} training queries has an index image within "
                f"{positive_radius:g} m: raise --train_positives_dist_threshold."
            )
        self.windows = queries_per_epoch // refresh
        self.in_window = min(refresh, len(self.rows))
        self.window_steps = -(-self.in_window // batch_size)
        self.remembered = np.full((len(data), REMEMBERED), -1)
        self.window = Tuples.zeros(0, negatives)
        self.mirrored = False

    def __len__(self) -> int:
        return self.windows * self.window_steps

    @property
    def queries_per_epoch(self) -> int:
        """Queries of an epoch, each as often as windows draw it."""
        return self.windows * self.in_window

    # ------------------------------------------------ what train() asks for

    def epoch(self, model: DescriptorModel, number: int, done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of epoch `number` after the first `done` ones; an empty list for none. InputError in the
        end if all were empty.
        """
        used = done
        for step in range(done, len(self)):
            window, inside = divmod(step, self.window_steps)
            if not inside:
                self.window = self.draw_window(model, number, window)
                used += len(self.window)
            self.drawn = torch.Generator().manual_seed(
                int(np.random.default_rng([self.seed, number, 1, step]).integers(2**62))
            )
            self.mirrored = self.flip and bool(torch.rand((), generator=self.drawn) < 0.5)
            rank, world = rank_and_world()
            yield self.fetch(self.in_step(step)[rank::world])
        if not used:
            raise InputError(
                f"all index images that negatives are sought among lie within {self.data.threshold:g} m "
                "of the training queries, so there is nothing to learn: lower "
                "--val_positive_dist_threshold, or raise --neg_samples_num."
            )
        share_buffers(model, self.inputs.device)

    def size(self, step: int) -> int:
        """Tuples that all processes together train on in `step`."""
        return len(self.in_step(step))

    def share(self, step: int) -> float:
        """Share of the epoch that is done in the middle of `step`."""
        return (step + 0.5) / len(self)

    def names(self, step: int) -> list[str]:
        """The files of a step's tuples."""
        tuples, index = self.in_step(step), self.data.index.paths
        found = [self.data.queries.paths[i] for i in tuples.queries]
        found += [index[i] for i in (*tuples.positives, *tuples.negatives.flat)]
        return [str(path) for path in found]

    def state_dict(self) -> dict[str, Tensor]:
        """What mining has found so far, for `load_state_dict`."""
        state = {"remembered": self.remembered, **vars(self.window)}
        return {key: torch.from_numpy(value.copy()) for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        arrays = {key: value.numpy() for key, value in state.items()}
        self.remembered = arrays.pop("remembered")
        self.window = Tuples(**arrays)

    # ------------------------------------------------ tuples

    def in_step(self, step: int) -> Tuples:
        """The tuples that `step` trains on."""
        begin = step % self.window_steps * self.batch_size
        return self.window[begin : begin + self.batch_size]

    def fetch(self, tuples: Tuples) -> list[Tensor]:
        """Inputs of tuples: q (B, …), p (B, …), n (B, N, …), q of augmented images."""
        if not len(tuples):
            return []
        rows = np.concatenate([tuples.positives[:, None], tuples.negatives], 1)
        others = self.inputs.take(self.first_index + rows.ravel(), self.mirrored)
        others = others.unflatten(0, rows.shape)
        if self.augmentation:
            (items,) = read_batches(self.inputs.item, [tuples.queries])
            images = torch.stack([item[0] for item in items]).to(self.inputs.device)
            images = augment_normalized(images, self.augmentation, self.drawn)
            q = self.inputs.of_images(images.flip(-1) if self.mirrored else images).to(others)
        else:
            q = self.inputs.take(tuples.queries, self.mirrored)
        return [q, others[:, 0], others[:, 1:]]

    def draw_window(self, model: DescriptorModel, epoch: int, window: int) -> Tuples:
        """The tuples of a window, by descriptors of the model as it is."""
        rng = np.random.default_rng([self.seed, epoch, 0, window])
        queries = rng.choice(self.rows, self.in_window, replace=False)
        size = len(self.data.utm_index)
        shared = rng.choice(size, min(self.pool, size), replace=False)
        hard = np.unique(np.concatenate([self.hard_positives[q] for q in queries]))
        needed = {"random": hard, "partial": np.union1d(hard, shared), "full": np.arange(size)}
        candidates = needed[self.mining]
        similarity = np.full((len(queries), size), -np.inf, np.float32)
        of_queries = self.inputs.describe(model, queries, "queries")
        of_index = self.inputs.describe(model, self.first_index + candidates, "candidates")
        similarity[:, candidates] = of_queries @ of_index.T
        if not model.unit_norm:  # nearest by distance, as between descriptors of norm 1
            similarity[:, candidates] -= np.square(of_index).sum(axis=1) / 2
        found, used = Tuples.zeros(len(queries), self.negatives), np.zeros(len(queries), bool)
        found.queries[:] = queries
        for i, query in enumerate(queries):
            near = self.hard_positives[query]
            found.positives[i] = near[similarity[i, near].argmax()]
            rows = self.choose_negatives(query, similarity[i], shared, rng)
            if len(rows):
                found.negatives[i], used[i] = np.resize(rows, self.negatives), True
        if rank_and_world()[1] > 1:  # another kind of processor may round otherwise
            for array in (found.positives, found.negatives, used, self.remembered):
                array[:] = from_first(torch.from_numpy(array), self.inputs.device).numpy()
        model.train()
        return found[used]

    def choose_negatives(
        self, query: int, similarity: np.ndarray, shared: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Rows of at most self.negatives index images that are no positives, hardest first."""
        soft, size = self.data.positives[query], len(similarity)
        if self.mining == "random":
            others = np.setdiff1d(np.arange(size), soft)
            return rng.choice(others, min(self.negatives, len(others)), replace=False)
        rows = shared
        if self.mining == "full":
            own = rng.choice(size, min(self.pool, size), replace=False)
            before = self.remembered[query]
            rows = np.union1d(own, before[before >= 0])
        rows = np.setdiff1d(rows, soft)
        rows = rows[np.argsort(-similarity[rows], kind="stable")][: self.negatives]
        if self.mining == "full":
            self.remembered[query, : len(rows[:REMEMBERED])] = rows[:REMEMBERED]
        return rows


class RandomTriplets:
    """Batches (q, p, n) of a query each, its positive and negative drawn once by seed: to validate on."""

    def __init__(
        self, data: FolderSplit, inputs: Inputs, rows: np.ndarray, batch_size: int, seed: int
    ) -> None:
        self.inputs, self.rows, self.batch_size = inputs, rows, batch_size
        at = data.utm_index, data.threshold, 1
        drawn = [
            draw_random(data.utm_query[i], *at, np.random.default_rng([seed, i])) for i in rows
        ]
        self.others = len(data) + np.array([(p, n[0]) for p, n in drawn], int).reshape(-1, 2)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for begin in range(0, len(self.rows), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            yield [self.inputs.take(rows) for rows in (self.rows[part], *self.others[part].T)]
