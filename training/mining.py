"""Which tuples (query, positive, negatives) are trained on: random ones, or the hardest.

Hard negatives are looked for as in the NetVLAD paper, section 4 and appendix A, with descriptors of
the model as it is; a tuple takes a few of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.lists import LoadDataset, draw_random
from eval import positives_within
from model import DescriptorModel
from training.distributed import from_first, rank_and_world
from training.inputs import Inputs

NEGATIVES = {"hard": 2, "random": 1}  # a tuple
HARDEST = 10  # of a query, among which its negatives are drawn, and which join its next pool
FEW_QUERIES = 1000  # up to so many, index images join as queries and every second epoch is flipped
JOINING = 4  # index images at most that join for each query
POSITIVE_RADIUS = 0.4  # potential positives lie within this share of posDistThr
ENOUGH = 0.5  # of the queries must have one, else all within posDistThr are potential positives
SAME_POSITION_M = 1.0  # views from one position show the same pixels: nothing to learn
POOL = 1000  # random index images among which hard negatives are looked for
REFRESH_QUERIES = 1000  # after so many, and at the start of each epoch, descriptors are made anew


@dataclass
class Tuples:
    """Training tuples, one a query: rows (n,) of the inputs, (n,) and (n, N) of the index images."""

    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    @classmethod
    def zeros(cls, count: int, negatives: int) -> "Tuples":
        """Room for so many tuples."""
        return cls(np.zeros(count, int), np.zeros(count, int), np.zeros((count, negatives), int))

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, which: slice | np.ndarray) -> "Tuples":
        return Tuples(*(array[which] for array in vars(self).values()))

    def __add__(self, others: "Tuples") -> "Tuples":
        pairs = zip(vars(self).values(), vars(others).values())
        return Tuples(*(np.concatenate(pair) for pair in pairs))


class TupleLoader:
    """The batches (q, p, n) of an epoch, each n (B, N, …), for `train`.

    data: true positions and the images' paths. inputs: of data.queries and, after them, data.index.
    rows: the queries to train on; held_out: those to rank by.
    mining: "random" negatives, or "hard" ones.

    A query without an index image within POSITIVE_RADIUS is dropped; its nearest image may look
    anywhere. Where that would leave few, the radius (`radius_m`) is all of posDistThr. An index
    image's positives were taken from another position than it.
    Few queries would be learned by heart. So, with hard negatives, index images join up to FEW_QUERIES
    in all, JOINING for each query, other ones in each epoch, and every second epoch flips its inputs from
    left to right (what a frozen part made of the images, not these: it costs nothing, and served as
    well). Hard negatives are drawn among the HARDEST: the very hardest are often one place, again and
    again.
    Steps are filled with tuples that have something to teach. Every draw is keyed by the seed, the
    epoch and the query's place in it, so an epoch can be taken up at any step.
    """

    def __init__(
        self,
        data: LoadDataset,
        inputs: Inputs,
        rows: np.ndarray,
        held_out: np.ndarray,
        *,
        batch_size: int = 8,
        seed: int = 0,
        mining: str = "hard",
        margin: float = 0.1,
    ) -> None:
        if mining not in NEGATIVES:
            raise ValueError(f"mining must be 'random' or 'hard', not {mining!r}")
        self.data, self.inputs, self.rows, self.held_out = data, inputs, rows, held_out
        self.batch_size, self.seed, self.mining, self.margin = batch_size, seed, mining, margin
        self.first_index = len(data.utm_query)  # row of the first index image in the inputs
        self.utm = np.concatenate([data.utm_query, data.utm_index])
        for share in (POSITIVE_RADIUS, 1.0):
            self.radius_m = share * data.threshold
            self.positives = [self.positives_of(row) for row in range(len(self.utm))]
            have_one = np.array([len(self.positives[row]) > 0 for row in rows], bool)
            if have_one.sum() >= ENOUGH * len(rows):
                break
        if mining == "hard":
            self.rows = rows[have_one]
        self.dropped = len(rows) - len(self.rows)
        held_out_places = positives_within(data.utm_query[held_out], data.utm_index, data.threshold)
        self.near_held_out = np.zeros(len(data.utm_index), dtype=bool)
        self.near_held_out[np.concatenate([np.zeros(0, int), *held_out_places])] = True
        self.can_join = self.possible_index_queries()
        self.few = mining == "hard" and len(self.rows) <= FEW_QUERIES
        most = min(JOINING * len(self.rows), FEW_QUERIES - len(self.rows))
        self.joining = min(most, len(self.can_join)) if self.few else 0
        self.remembered = np.full((len(self.utm), HARDEST), -1)
        self.window = Tuples.zeros(0, NEGATIVES[mining])  # mined and not yet trained on
        self.window_step = 0  # the step that begins with the first of them
        self.mined = 0  # queries of the epoch that were mined
        self.index_descriptors: np.ndarray | None = None

    def positives_of(self, row: int) -> np.ndarray:
        """Potential positives of a row of the inputs: index images near it, none of its position."""
        distance = np.hypot(*(self.data.utm_index - self.utm[row]).T)
        near = distance <= self.radius_m
        if row >= self.first_index:
            near &= distance > SAME_POSITION_M
        return np.flatnonzero(near)

    def __len__(self) -> int:
        """Steps of an epoch, if no tuple were skipped."""
        return math.ceil(self.queries_per_epoch / self.batch_size)

    @property
    def queries_per_epoch(self) -> int:
        """Queries of an epoch, index images that join them included."""
        return len(self.rows) + self.joining

    def possible_index_queries(self) -> np.ndarray:
        """Rows of index images that can be queries: another is near them, no held-out query is."""
        free = np.flatnonzero(~self.near_held_out) + self.first_index
        return free[[len(self.positives[i]) > 0 for i in free]]

    # ------------------------------------------------ what train() asks for

    def epoch(self, model: DescriptorModel, number: int, done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of epoch `number` after the first `done` ones; an empty list for none of this process."""
        rng = np.random.default_rng([self.seed, number])
        joining = rng.choice(self.can_join, self.joining, replace=False)
        order = rng.permutation(np.concatenate([self.rows, joining]))
        flipped = self.few and number % 2 == 0
        if not done:
            self.window, self.window_step, self.mined = self.window[:0], 0, 0
        step = done
        while True:
            while self.mined < len(order) and self.waiting(step) < self.batch_size:
                self.window = self.window[(step - self.window_step) * self.batch_size :]
                self.window_step = step
                queries = order[self.mined :][:REFRESH_QUERIES]
                self.window += self.draw(model, queries, [number, self.mined])
                self.mined += len(queries)
                self.forget_descriptors()  # training is about to change the model
                model.train()
            if self.waiting(step) <= 0:
                return
            yield self.fetch(_own_share(self.in_step(step)), flipped)
            step += 1

    def waiting(self, step: int) -> int:
        """Tuples mined that are not trained on before `step`."""
        return len(self.window) - (step - self.window_step) * self.batch_size

    def size(self, step: int) -> int:
        """Tuples that all processes together train on in `step`."""
        return len(self.in_step(step))

    def share(self, step: int) -> float:
        """Share of the epoch that is done in the middle of `step`."""
        left = (self.waiting(step) - self.size(step) / 2) / max(1, len(self.window))
        return (self.mined - left * min(self.mined, REFRESH_QUERIES)) / self.queries_per_epoch

    def names(self, step: int) -> list[str]:
        """The files of a step's tuples."""
        t = self.in_step(step)
        index = self.data.index.paths
        paths = [*self.data.queries.paths, *index]
        found = [paths[i] for i in t.queries] + [
            index[i] for i in (*t.positives, *t.negatives.flat)
        ]
        return [str(path) for path in found]

    def judge(self, model: DescriptorModel) -> tuple[Tensor, dict[str, float]]:
        """Reciprocal ranks (n,) of the first positives of the held-out queries, and their mean.

        After them those of the index images near a held-out query, each ranking the index images of
        other positions: they are several times as many, so that chance decides less which epoch is best.
        """
        data = self.data
        index = self.describe_index(model)
        near = np.flatnonzero(self.near_held_out)
        queries = self.inputs.describe(model, self.held_out, "held-out queries")
        similarity = self.products(np.concatenate([queries, index[near]]), index)
        for row, image in zip(similarity[len(self.held_out) :], near):
            apart = np.hypot(*(data.utm_index - data.utm_index[image]).T)
            row[apart <= SAME_POSITION_M] = -np.inf
        places = np.concatenate([data.utm_query[self.held_out], data.utm_index[near]])
        positives = positives_within(places, data.utm_index, data.threshold)
        found = (reciprocal_rank(*pair) for pair in zip(similarity, positives))
        ranks = [rank for rank in found if rank is not None]
        scores = from_first(torch.tensor(ranks), self.inputs.device)
        return scores, {"held_out_mrr": float(scores.mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """What mining has found so far, for `load_state_dict`."""
        place = np.array([self.window_step, self.mined])
        state = {"remembered": self.remembered, "place": place, **vars(self.window)}
        return {key: torch.from_numpy(value.copy()) for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        arrays = {key: value.numpy() for key, value in state.items()}
        self.remembered = arrays.pop("remembered")
        self.window_step, self.mined = arrays.pop("place").tolist()
        self.window = Tuples(**arrays)

    # ------------------------------------------------ tuples

    def in_step(self, step: int) -> Tuples:
        """The tuples that `step` trains on."""
        begin = (step - self.window_step) * self.batch_size
        return self.window[begin : begin + self.batch_size]

    def fetch(self, tuples: Tuples, flipped: bool = False) -> list[Tensor]:
        """Inputs of tuples, from left to right or `flipped`: q (B, …), p (B, …), n (B, N, …)."""
        if not len(tuples):
            return []
        positives, negatives = (self.first_index + t for t in (tuples.positives, tuples.negatives))
        rows = np.concatenate([tuples.queries, positives, negatives.ravel()])
        inputs = self.inputs.take(rows)
        inputs = inputs.flip(-1) if flipped else inputs
        q, p, n = inputs.split([len(tuples), len(positives), negatives.size])
        return [q, p, n.unflatten(0, negatives.shape)]

    def forget_descriptors(self) -> None:
        """To be called where the model has changed, or is about to."""
        self.index_descriptors = None

    def describe_index(self, model: DescriptorModel) -> np.ndarray:
        """Descriptors of all index images, kept until `forget_descriptors`."""
        if self.index_descriptors is None:
            rows = np.arange(self.first_index, len(self.utm))
            self.index_descriptors = self.inputs.describe(model, rows, "index images")
        return self.index_descriptors

    def draw(
        self, model: DescriptorModel, queries: np.ndarray, key: list[int], all_of_them: bool = False
    ) -> Tuples:
        """Tuples of these queries, by default only those whose loss is positive.

        key: what the draws depend on beside the seed; its last number grows from query to query.
        """
        count = NEGATIVES[self.mining]
        found, used = Tuples.zeros(len(queries), count), np.ones(len(queries), bool)
        found.queries[:] = queries
        similarity = self.similarities(model, queries) if self.mining == "hard" else None
        for i, query in enumerate(queries):
            rng = np.random.default_rng([self.seed, *key[:-1], key[-1] + i])
            if similarity is None:
                at = self.utm[query], self.data.utm_index, self.data.threshold
                found.positives[i], found.negatives[i] = draw_random(*at, count, rng)
            else:
                used[i] = self.mine(found, i, similarity[i], rng, all_of_them)
        if rank_and_world()[1] > 1:  # another kind of processor may round otherwise
            for array in (found.positives, found.negatives, used, self.remembered):
                array[:] = from_first(torch.from_numpy(array), self.inputs.device).numpy()
        return found[used]

    def similarities(self, model: DescriptorModel, queries: np.ndarray) -> np.ndarray:
        """Of queries (n,) to all index images: (n, nd)."""
        index = self.describe_index(model)
        of_index = queries >= self.first_index
        similarity = np.empty((len(queries), len(index)), np.float32)
        similarity[of_index] = self.products(index[queries[of_index] - self.first_index], index)
        if not of_index.all():
            described = self.inputs.describe(model, queries[~of_index], "queries")
            similarity[~of_index] = self.products(described, index)
        return similarity

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a b^T of descriptors (n, D), (m, D), computed where the model is."""
        on_device = [torch.from_numpy(array).to(self.inputs.device) for array in (a, b)]
        return (on_device[0] @ on_device[1].T).cpu().numpy()

    def mine(
        self,
        found: Tuples,
        i: int,
        similarity: np.ndarray,
        rng: np.random.Generator,
        all_of_them: bool,
    ) -> bool:
        """Fill in the i-th tuple: nearest potential positive, some of the hardest negatives; -> if to use it."""
        query, data = found.queries[i], self.data
        far = np.flatnonzero(np.hypot(*(data.utm_index - self.utm[query]).T) > data.threshold)
        near = self.positives[query]
        before = self.remembered[query]
        hardest = hardest_negatives(similarity, far, before[before >= 0], POOL, rng)[:HARDEST]
        self.remembered[query, : len(hardest)] = hardest
        if not len(hardest) or not len(near):
            return False
        found.positives[i] = near[similarity[near].argmax()]
        count = found.negatives.shape[1]
        drawn = rng.choice(hardest, min(count, len(hardest)), replace=False)
        found.negatives[i] = np.resize(drawn, count)
        positive, negatives = similarity[found.positives[i]], similarity[found.negatives[i]]
        return all_of_them or bool(violates(positive, negatives, self.margin).any())


def reciprocal_rank(similarity: np.ndarray, positives: np.ndarray) -> float | None:
    """1 / rank of the first of `positives` by similarity (nd,) to a query, others first among equals.

    So a descriptor that makes all images alike, or is no number, ranks last. None where every positive
    is left out (-inf).
    """
    best = similarity[positives].max()
    if best == -np.inf:
        return None
    ahead = ~(similarity < best)
    ahead[positives] = False
    return 1 / (1 + int(ahead.sum()))


def hardest_negatives(
    similarity: np.ndarray,
    far: np.ndarray,
    remembered: np.ndarray,
    pool: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rows of a random pool out of `far` and of `remembered`, the most similar first.

    similarity: (nd,) of the query to all index images. far: rows allowed as negatives.
    """
    drawn = rng.choice(far, min(pool, len(far)), replace=False)
    rows = np.union1d(drawn, remembered).astype(np.int64)
    return rows[np.argsort(-similarity[rows], kind="stable")]


def violates(to_positive: float, to_negatives: np.ndarray, margin: float) -> np.ndarray:
    """Whether the ranking loss is positive, or no number, from similarities of unit descriptors."""
    positive, negatives = max(0.0, 2 - 2 * to_positive), np.maximum(0, 2 - 2 * to_negatives)
    return ~(np.sqrt(negatives) >= math.sqrt(positive) + margin)


def _own_share(tuples: Tuples) -> Tuples:
    """Those of a step's tuples that this process trains on."""
    rank, world = rank_and_world()
    return Tuples(*(array[rank::world] for array in vars(tuples).values()))


class HeldOutTuples:
    """Batches of tuples of held-out queries, chosen as a loader's with the model as it is, none skipped."""

    def __init__(self, loader: TupleLoader, model: DescriptorModel, rows: np.ndarray) -> None:
        self.loader, self.model, self.rows = loader, model, rows

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.loader.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        loader = self.loader
        tuples = loader.draw(self.model, self.rows, [0, 0], all_of_them=True)
        for begin in range(0, len(tuples), loader.batch_size):
            yield loader.fetch(tuples[begin : begin + loader.batch_size])
