"""Task 2: training with a ranking loss, max(0, d(q, p) + margin - d(q, n)), by Adam.

    train(model, train_loader, val_loader, device, epochs=5, lr=1e-4)

The loaders yield batches (q, p, n) of images. base.py passes a `TupleLoader`, which mines hard
negatives (NetVLAD paper, section 4 and appendix A) and can be taken up in the middle of an epoch.
What is frozen need not be computed twice: with `start=model.first_trained` batches are outputs of
trunk[:start] instead of images (training/frozen.py makes them).

Works when copied out alone together with model.py and eval.py.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from eval import all_batches, own_batches, positives_within, rank_and_world
from model import (
    CALIBRATION_IMAGES,
    DESCRIPTORS_PER_IMAGE,
    KMEANS_DESCRIPTORS,
    InputError,
    NetVLADModel,
    calibrate_trunk,
    initialize_netvlad,
    warn,
)

MARGIN = 0.1
WARM_UP = 0.1  # share of the steps in which the rate climbs to its peak
SAVE_SECONDS = 60
EMBED_BATCH = 32
STUCK = 0.995  # share of violating triplets
COLLAPSED = 0.05  # distance of the loss from the margin, as a share of it

NEGATIVES = {"hard": 2, "random": 1}  # a tuple
INDEX_QUERIES = {"hard": 1, "random": 0}  # index images that are queries too, for each query
MIRRORS = {"hard": True, "random": False}  # whether every second epoch takes mirror images
POSITIVE_RADIUS = 0.4  # potential positives lie within this share of posDistThr
POOL = 1000  # random index images among which hard negatives are looked for
REMEMBERED = 10  # hardest negatives of a query that join its next pool
REFRESH_QUERIES = 1000  # after so many, and at the start of each epoch, descriptors are made anew


# ---------------------------------------------------------------- loss


def ranking_loss(
    q: Tensor, p: Tensor, n: Tensor, margin: float = MARGIN, squared: bool = False
) -> Tensor:
    """max(0, d(q, p) + margin - d(q, n)) of every triplet.

    q, p: (B, D); n: (B, D), or (B, N, D) for several negatives a query. `squared`: squared Euclidean
    distances (the NetVLAD paper's, eq. 7) instead of plain ones (the assignment's). -> (B, N).
    """
    n = n if n.dim() == 3 else n[:, None]
    to_positive = (q - p).square().sum(dim=-1)[:, None]
    to_negatives = (q[:, None] - n).square().sum(dim=-1)
    if not squared:
        # The root's slope is infinite at 0, where a query is its own positive.
        to_positive, to_negatives = (d.clamp(min=1e-12).sqrt() for d in (to_positive, to_negatives))
    return (to_positive + margin - to_negatives).clamp(min=0)


def triplet_losses(
    model: NetVLADModel, batch: Iterable[Tensor], device: torch.device, margin: float = MARGIN,
    squared: bool = False, start: int = 0,
) -> Tensor:  # fmt: skip
    """Losses (B, N) of one batch (q, p, n), all its images in one pass. n: (B, …) or (B, N, …)."""
    q, p, n = (part.to(device, non_blocking=True) for part in batch)
    negatives = n if n.dim() == 5 else n[:, None]
    images = torch.cat([q, p, negatives.flatten(0, 1)])
    with model.autocast(device):
        descriptors = model(images.contiguous(memory_format=torch.channels_last), start)
    q_d, p_d, n_d = descriptors.split([len(q), len(p), negatives.shape[0] * negatives.shape[1]])
    return ranking_loss(q_d, p_d, n_d.unflatten(0, negatives.shape[:2]), margin, squared)


# ---------------------------------------------------------------- tuples


@dataclass
class Tuples:
    """Training tuples as rows of the two lists, one a query: (n,), (n,), (n, N).

    Queries beyond the list of queries are index images that serve as queries too.
    `used` (n,): whether the query is trained on; the others had no negative, or none that violates.
    """

    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    used: np.ndarray


def draw_random(
    query: np.ndarray, utm_index: np.ndarray, threshold: float, count: int, rng: np.random.Generator
) -> tuple[int, np.ndarray]:
    """A random positive closer than `threshold` (or the nearest) and `count` random negatives.

    query (2,), utm_index (nd, 2) in meters. Negatives lie farther than 10 · threshold; where none
    does, the farthest is taken; with fewer than `count` they repeat.
    """
    distance = np.hypot(*(utm_index - query).T)
    near, far = np.flatnonzero(distance < threshold), np.flatnonzero(distance > 10 * threshold)
    near = near if len(near) else distance.argmin(keepdims=True)
    far = far if len(far) else distance.argmax(keepdims=True)
    return int(rng.choice(near)), rng.choice(far, count, replace=len(far) < count)


def hardest_negatives(
    similarity: np.ndarray, far: np.ndarray, remembered: np.ndarray, pool: int,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Rows of a random pool out of `far` and of `remembered`, the most similar first.

    similarity: (nd,) of the query to all index images. far: rows allowed as negatives.
    """
    drawn = rng.choice(far, min(pool, len(far)), replace=False)
    rows = np.union1d(drawn, remembered).astype(np.int64)
    return rows[np.argsort(-similarity[rows], kind="stable")]


def violates(
    to_positive: float, to_negatives: np.ndarray, margin: float, squared: bool
) -> np.ndarray:
    """Whether the ranking loss is positive, from similarities of unit descriptors."""
    positive, negatives = max(0.0, 2 - 2 * to_positive), np.maximum(0, 2 - 2 * to_negatives)
    if not squared:
        positive, negatives = math.sqrt(positive), np.sqrt(negatives)
    return positive + margin > negatives


def _own_share(tuples: Tuples) -> Tuples:
    """Those of a step's tuples that this process trains on."""
    rank, world = rank_and_world()
    return Tuples(*(array[rank::world] for array in vars(tuples).values()))


class TupleLoader:
    """The batches (q, p, n) of an epoch, each n (B, N, …), for `train`.

    data: like base.LoadDataset: `queries` and `index` (data sets of (image, …) with `paths`),
    `utm_query`, `utm_index`, `threshold`, and `cached`, None or the outputs of trunk[:start] for all
    queries and index images. rows: the queries to train on; held_out: those to rank by.
    mining: "random" negatives, or "hard" ones, looked for with descriptors of the model as it is.

    With few queries the same tuples over and over are learned by heart. So with hard negatives as many
    index images, other ones in each epoch, are queries too, against the other index images; and every
    second epoch takes the mirror images of all. mirrored: gives what `cached` is for those, when the
    first such epoch begins; without it cached outputs are never mirrored.
    Every draw is keyed by (seed, epoch, step), so an epoch can be taken up at any step.
    """

    def __init__(
        self, data: Dataset, rows: np.ndarray, held_out: np.ndarray, device: torch.device, *,
        batch_size: int = 8, seed: int = 0, start: int = 0, mining: str = "hard",
        negatives: int | None = None, margin: float = MARGIN, squared: bool = False,
        mirrored: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        if mining not in NEGATIVES:
            raise ValueError(f"mining must be 'random' or 'hard', not {mining!r}")
        self.data, self.rows, self.held_out, self.device = data, rows, held_out, device
        self.batch_size, self.seed, self.start, self.mining = batch_size, seed, start, mining
        self.count = NEGATIVES[mining] if negatives is None else negatives
        self.margin, self.squared = margin, squared
        self.utm = np.concatenate([data.utm_query, data.utm_index])
        near = positives_within(self.utm, data.utm_index, POSITIVE_RADIUS * data.threshold)
        self.positives = [p[p != i - len(data.utm_query)] for i, p in enumerate(near)]
        held_out_places = positives_within(data.utm_query[held_out], data.utm_index, data.threshold)
        self.near_held_out = np.zeros(len(data.utm_index), dtype=bool)
        self.near_held_out[np.concatenate([np.zeros(0, int), *held_out_places])] = True
        self.can_join = self.index_queries()
        self.joining = min(INDEX_QUERIES[mining] * len(rows), len(self.can_join))
        self.remembered = np.full((len(self.utm), REMEMBERED), -1)
        self.window: Tuples | None = None
        self.window_steps = max(1, REFRESH_QUERIES // batch_size)
        self.index_descriptors: np.ndarray | None = None
        self.mirrors = MIRRORS[mining] and (data.cached is None or mirrored is not None)
        self.make_mirrored = mirrored
        self.mirrored: tuple[Tensor, Tensor] | None = None
        self.in_mirror = False  # whether inputs are of mirror images at the moment

    def __len__(self) -> int:
        """Steps of an epoch, those included in which all tuples are skipped."""
        return math.ceil((len(self.rows) + self.joining) / self.batch_size)

    def index_queries(self) -> np.ndarray:
        """Index images that can be queries: another is near them, no held-out query is."""
        free = np.flatnonzero(~self.near_held_out) + len(self.data.utm_query)
        return free[[len(self.positives[i]) > 0 for i in free]]

    def epoch(self, model: NetVLADModel, number: int, done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of epoch `number` after the first `done` ones; an empty list for one skipped."""
        rng = np.random.default_rng([self.seed, number])
        joining = rng.choice(self.can_join, self.joining, replace=False)
        order = rng.permutation(np.concatenate([self.rows, joining]))
        self.look_at(mirrored=self.mirrors and number % 2 == 0)
        for step in range(done, len(self)):
            first = step - step % self.window_steps
            if step == first:
                queries = order[step * self.batch_size :][: self.window_steps * self.batch_size]
                self.window = self.draw(model, queries, number, step)
            yield self.fetch(_own_share(self.in_step(step)))

    def look_at(self, *, mirrored: bool) -> None:
        """Give inputs of the images, or of their mirror images, from now on."""
        if mirrored != self.in_mirror:
            self.index_descriptors = None
        if mirrored and self.mirrored is None and self.data.cached is not None:
            self.mirrored = self.make_mirrored()
        self.in_mirror = mirrored

    def in_step(self, step: int) -> Tuples:
        """The tuples that `step` trains on."""
        w, begin = self.window, step % self.window_steps * self.batch_size
        used = begin + np.flatnonzero(w.used[begin : begin + self.batch_size])
        return Tuples(w.queries[used], w.positives[used], w.negatives[used], w.used[used])

    def size(self, step: int) -> int:
        """Tuples that all processes together train on in `step`."""
        return len(self.in_step(step).queries)

    def fetch(self, tuples: Tuples) -> list[Tensor]:
        """Images or cached outputs of tuples."""
        if not len(tuples.queries):
            return []
        q, p = self.get("queries", tuples.queries), self.get("index", tuples.positives)
        n = self.get("index", tuples.negatives.ravel()).unflatten(0, tuples.negatives.shape)
        return [q, p, n]

    def get(self, kind: str, rows: np.ndarray) -> Tensor:
        """The inputs of rows of the list `kind`: "index", or "queries", which goes on with "index"."""
        rows = rows if kind == "queries" else rows + len(self.data.utm_query)
        return torch.stack([self.input(int(row)) for row in rows])

    def input(self, row: int) -> Tensor:
        """The image, or its cached output, of a row of the queries and, after them, the index."""
        of_index = row >= len(self.data.utm_query)
        row -= of_index * len(self.data.utm_query)
        if self.data.cached is not None:
            return (self.mirrored if self.in_mirror else self.data.cached)[of_index][row]
        image = (self.data.index if of_index else self.data.queries)[row][0]
        return image.flip(-1) if self.in_mirror else image

    def names(self, step: int) -> list[str]:
        """The files of a step's tuples."""
        t = self.in_step(step)
        index = [*t.positives, *t.negatives.ravel()]
        queries = [*self.data.queries.paths, *self.data.index.paths]
        paths = [queries[i] for i in t.queries] + [self.data.index.paths[i] for i in index]
        return [str(path) for path in paths]

    def draw(self, model: NetVLADModel, queries: np.ndarray, epoch: int, step: int) -> Tuples:
        """Tuples of these queries, of which the first belongs to `step`."""
        data, n = self.data, len(queries)
        found = Tuples(queries, np.zeros(n, int), np.zeros((n, self.count), int), np.zeros(n, bool))
        similarity = None
        if self.mining == "hard":
            index = self.embed_index(model)
            self.index_descriptors = None  # training is about to change the model
            of_index = queries >= len(data.utm_query)
            similarity = np.empty((n, len(index)), np.float32)
            similarity[of_index] = index[queries[of_index] - len(data.utm_query)] @ index.T
            if not of_index.all():
                similarity[~of_index] = self.embed(model, "queries", queries[~of_index]) @ index.T
        for begin in range(0, n, self.batch_size):
            rng = np.random.default_rng([self.seed, epoch, step + begin // self.batch_size])
            for i in range(begin, min(begin + self.batch_size, n)):
                query = queries[i]
                if similarity is None:
                    drawn = draw_random(
                        self.utm[query], data.utm_index, data.threshold, self.count, rng
                    )
                    found.positives[i], found.negatives[i] = drawn
                    found.used[i] = True
                else:
                    self.mine(found, i, similarity[i], rng)
        if rank_and_world()[1] > 1:  # another kind of processor may round otherwise
            for array in (found.positives, found.negatives, found.used, self.remembered):
                array[:] = from_first(torch.from_numpy(array), self.device).numpy()
        return found

    def mine(
        self, found: Tuples, i: int, similarity: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Fill in the i-th tuple: the nearest potential positive, the hardest negatives."""
        query, data = found.queries[i], self.data
        far = np.flatnonzero(np.hypot(*(data.utm_index - self.utm[query]).T) > data.threshold)
        near = self.positives[query]
        found.positives[i] = near[similarity[near].argmax()]
        before = self.remembered[query]
        hardest = hardest_negatives(similarity, far, before[before >= 0], POOL, rng)
        self.remembered[query, : len(hardest)] = hardest[:REMEMBERED]
        if len(hardest):
            found.negatives[i] = np.resize(hardest[: self.count], self.count)
            found.used[i] = violates(
                similarity[found.positives[i]], similarity[found.negatives[i]], self.margin,
                self.squared,
            ).any()  # fmt: skip

    @torch.inference_mode()
    def embed(self, model: NetVLADModel, kind: str, rows: np.ndarray) -> np.ndarray:
        """Descriptors (n, D) of rows of a list, in batches whose bounds depend on n alone."""
        model.eval()

        def descriptors() -> Iterator[Tensor]:
            batches = own_batches(len(rows), EMBED_BATCH)
            for batch in tqdm(batches, desc=f"descriptors, {kind}", unit="batch", leave=False):
                x = self.get(kind, rows[batch]).to(self.device)
                with model.autocast(self.device):
                    yield model(x.contiguous(memory_format=torch.channels_last), self.start).float()

        parts = [part.cpu() for part in all_batches(descriptors(), len(rows), EMBED_BATCH)]
        model.train()
        return torch.cat(parts).numpy()

    def embed_index(self, model: NetVLADModel) -> np.ndarray:
        """Descriptors of all index images; kept until `draw` has used them."""
        if self.index_descriptors is None:
            rows = np.arange(len(self.data.utm_index))
            self.index_descriptors = self.embed(model, "index", rows)
        return self.index_descriptors

    def score(self, model: NetVLADModel) -> Tensor:
        """Reciprocal ranks (n,) of the first positives of the held-out queries among the index images.

        After them those of the index images near a held-out query, each ranking the other index images:
        they are several times as many, so that it is less by chance which epoch is best.
        """
        self.look_at(mirrored=False)
        data = self.data
        index = self.embed_index(model)
        near = np.flatnonzero(self.near_held_out)
        similarity = np.concatenate([self.embed(model, "queries", self.held_out), index[near]]) @ index.T
        similarity[len(self.held_out) + np.arange(len(near)), near] = -np.inf
        places = np.concatenate([data.utm_query[self.held_out], data.utm_index[near]])
        ranks = []
        for row, positives in zip(similarity, positives_within(places, data.utm_index, data.threshold)):
            best = row[positives].max()
            if np.isfinite(best):  # not where an index image is its own only positive
                ranks.append(1 + (row > best).sum())
        return 1 / torch.tensor(ranks)

    def state_dict(self) -> dict[str, Tensor]:
        """What mining has found so far, for `load_state_dict`."""
        state = {"remembered": self.remembered}
        if self.window is not None:
            state |= vars(self.window)
        return {key: torch.from_numpy(value.copy()) for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        arrays = {key: value.numpy() for key, value in state.items()}
        self.remembered = arrays.pop("remembered")
        self.window = Tuples(**arrays) if arrays else None


# ---------------------------------------------------------------- loop

TOTALS = ("loss", "violating", "triplets", "tuples", "seconds")  # of an epoch so far


def train(
    model: NetVLADModel,
    train_loader: Iterable,
    val_loader: Iterable,
    device: torch.device | str,
    epochs: int = 5,
    lr: float = 1e-4,
    *,
    margin: float = MARGIN,
    squared: bool = False,
    start: int = 0,
    state: dict | None = None,
    save: Callable[[dict], None] | None = None,
) -> list[dict[str, float]]:
    """Train what `model.train_only_from` left unfrozen; print both losses after each epoch.

    train_loader, val_loader: batches (q, p, n), each (B, 3, H, W), n also (B, N, 3, H, W); with
    `start` > 0 outputs of trunk[:start] in place of images. A model whose weights were neither
    initialized nor loaded is initialized from the training loader's first batches.
    With a TupleLoader the weights kept are those of the epoch that ranks its held-out queries, and the
    index images near them, best (ties: lower val loss), and `save` is given a state every SAVE_SECONDS
    and after each epoch, from which a later call with `state` goes on, to the same result.
    Returns a dict an epoch: epoch, train_loss, val_loss, violations (share of triplets), seconds and,
    with a TupleLoader, skipped (tuples) and held_out_mrr (mean reciprocal rank).
    Raises InputError when the loss is no longer a number.
    """
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last)
    if not model.netvlad.initialized:
        initialize_from_loader(model, train_loader, device, start)
    mined = train_loader if isinstance(train_loader, TupleLoader) else None
    if rank_and_world()[1] > 1:
        model.load_state_dict({k: from_first(v, device) for k, v in model.state_dict().items()})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=lr)
    run = {"epoch": 1, "step": 0, "totals": dict.fromkeys(TOTALS, 0.0), "history": [], "best": {}}
    if state:
        run = {key: state[key] for key in run}
        set_weights(trained, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        mined.load_state_dict(state["loader"])
    clock = time.perf_counter()

    def checkpoint() -> None:
        nonlocal clock
        now = time.perf_counter()
        run["totals"]["seconds"] += now - clock
        clock = now
        if save and mined and rank_and_world()[0] == 0:
            parts = {"optimizer": optimizer.state_dict(), "loader": mined.state_dict()}
            save({**run, **parts, "weights": weights_of(trained)})

    steps = len(train_loader) if hasattr(train_loader, "__len__") else None
    while run["epoch"] <= epochs:
        epoch, totals = run["epoch"], run["totals"]
        model.train()
        batches = mined.epoch(model, epoch, run["step"]) if mined else train_loader
        bar = {"desc": f"epoch {epoch}/{epochs}", "total": steps, "initial": run["step"]}
        for batch in tqdm(batches, **bar, unit="batch", leave=False):
            # Every process enters a step that any has tuples for, with none of its own if need be.
            tuples = mined.size(run["step"]) if mined else len(batch[0])
            if tuples:
                share = (epoch - 1 + (run["step"] + 0.5) / steps) / epochs if steps else WARM_UP
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate_factor(share)
                optimizer.zero_grad()
                loss = torch.zeros(0, 1, device=device)
                if batch:
                    loss = triplet_losses(model, batch, device, margin, squared, start)
                    if not loss.isfinite().all():
                        raise InputError(_no_number(epoch, run["step"], mined))
                    (loss.sum() / (tuples * loss.shape[1])).backward()
                _count(totals, sum_over_processes(list(trained.values()), loss.detach()))
                centralize_gradients(trained.values())
                optimizer.step()
            run["step"] += 1
            if time.perf_counter() - clock > SAVE_SECONDS:
                checkpoint()
        losses = {"margin": margin, "squared": squared, "start": start}
        record = {
            "epoch": epoch,
            "train_loss": totals["loss"] / max(1, totals["triplets"]),
            "val_loss": validate(model, val_loader, device, **losses),
            "violations": totals["violating"] / max(1, totals["triplets"]),
        }
        if mined:
            record["skipped"] = len(mined.rows) + mined.joining - int(totals["tuples"])
            reciprocal_ranks = mined.score(model)
            record["held_out_mrr"] = float(reciprocal_ranks.mean())
            _keep_best(run["best"], record, reciprocal_ranks, trained)
        record["seconds"] = totals["seconds"] + time.perf_counter() - clock
        run["history"].append(record)
        _report(record, epochs, margin)
        run |= {"epoch": epoch + 1, "step": 0, "totals": dict.fromkeys(TOTALS, 0.0)}
        clock = time.perf_counter()
        checkpoint()
    if run["best"]:
        set_weights(trained, run["best"]["weights"])
        tqdm.write(f"Kept: epoch {run['best']['epoch']}, the best by the held-out queries.")
    return run["history"]


def _count(totals: dict[str, float], counts: Tensor) -> None:
    """Add a step's counts to the epoch's, in the order of TOTALS."""
    for name, count in zip(TOTALS, counts.tolist()):
        totals[name] += count


def sum_over_processes(parameters: list[Tensor], loss: Tensor) -> Tensor:
    """Sum gradients over the processes, in place, in one message with what is counted.

    loss: this process's (B, N). -> sum of losses, violating triplets, triplets, tuples of all.
    """
    counts = torch.tensor([0, 0, loss.numel(), len(loss)], dtype=torch.float32, device=loss.device)
    counts[0], counts[1] = loss.sum(), (loss > 0).sum()
    if rank_and_world()[1] == 1:
        return counts
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    message = torch.cat([*(g.flatten() for g in gradients), counts])
    dist.all_reduce(message)
    *sums, counts = message.split([*(g.numel() for g in gradients), len(counts)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view_as(gradient))
    return counts


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` as the first process has it, on the CPU."""
    there = tensor.to(device).contiguous()
    dist.broadcast(there, 0)
    return there.cpu()


def _no_number(epoch: int, step: int, loader: TupleLoader | None) -> str:
    files = f" ({', '.join(loader.names(step))})" if loader else ""
    return (
        f"the loss is not a number in epoch {epoch}, batch {step + 1}{files}: lower --lr, or look at "
        "these images."
    )


def rate_factor(share: float) -> float:
    """What the peak rate is multiplied with once `share` of the training is done.

    A linear warm-up, times half a cosine that ends at 0 (Loshchilov & Hutter 2017).
    """
    return min(1.0, share / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def weights_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of parameters on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def set_weights(parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Give parameters the values of `weights_of`."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _keep_best(best: dict, record: dict, reciprocal_ranks: Tensor, parameters: dict[str, Tensor]) -> None:
    """Make `best` this epoch if it ranks the held-out queries better, or as well at a lower loss.

    As well: the mean difference of the reciprocal ranks (n,) is within its standard error. With few
    queries a larger mean alone is mostly chance, and favors early epochs.
    """
    if best:
        gain = reciprocal_ranks - best["reciprocal_ranks"]
        error = float(gain.std(correction=0)) / math.sqrt(len(gain))
        worse = float(gain.mean()) < -error
        tied = abs(float(gain.mean())) <= error
        if worse or (tied and record["val_loss"] >= best["val_loss"]):
            return
    kept = {"epoch": record["epoch"], "val_loss": record["val_loss"]}
    best.update(kept, reciprocal_ranks=reciprocal_ranks, weights=weights_of(parameters))


def _report(record: dict, epochs: int, margin: float) -> None:
    """Print an epoch's line; warn in words when nothing is being learned."""
    line = (
        f"Epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f}, "
        f"val loss {record['val_loss']:.4f}, violating triplets {100 * record['violations']:.1f} %"
    )
    if "skipped" in record:
        line += f", {record['skipped']} tuples skipped, held-out MRR {record['held_out_mrr']:.3f}"
    tqdm.write(f"{line}, {record['seconds']:.0f} s")
    if trouble := diagnose(record["train_loss"], record["violations"], margin):
        warn(f"epoch {record['epoch']}: {trouble}")


def diagnose(loss: float, violations: float, margin: float) -> str | None:
    """What a mean loss and the share of violating triplets say of a training that goes wrong."""
    if violations > STUCK and abs(loss - margin) < COLLAPSED * margin:
        return (
            "the descriptor has collapsed: the loss sits at the margin because all images get "
            "nearly the same descriptor. Lower --lr."
        )
    if violations > STUCK:
        return "every triplet violates the margin: nothing is being learned. Lower --margin or --lr."
    if violations == 0:
        return "no triplet violates the margin: nothing is left to learn. Raise --margin."
    return None


def centralize_gradients(parameters: Iterable[Tensor]) -> None:
    """Subtract its mean from the gradient of each convolution filter (Yong et al., ECCV 2020).

    A convolution's inputs come from a ReLU, so their mean is positive, and Adam's steps have the same
    sign all over a filter: without this, four steps move the mean of every channel so far from the
    cluster centers that all descriptors look alike (measured: mean distance 1.36 -> 0.5), and the
    training never recovers.
    """
    for parameter in parameters:
        if parameter.dim() == 4 and parameter.grad is not None:
            parameter.grad -= parameter.grad.mean(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def validate(
    model: NetVLADModel,
    loader: Iterable,
    device: torch.device | str,
    *,
    margin: float = MARGIN,
    squared: bool = False,
    start: int = 0,
) -> float:
    """Mean ranking loss over a loader of (q, p, n) batches; NaN for an empty one."""
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last).eval()
    batches = tqdm(loader, desc="validation", unit="batch", leave=False)
    rank, world = rank_and_world()
    total = torch.zeros(2, dtype=torch.float64)
    for number, batch in enumerate(batches):
        if number % world == rank:
            loss = triplet_losses(model, batch, device, margin, squared, start).mean(dim=1)
            total += torch.tensor([float(loss.double().sum()), len(loss)])
    if world > 1:
        shared = total.to(device)
        dist.all_reduce(shared)
        total = shared.cpu()
    return float(total[0] / total[1]) if total[1] else math.nan


def initialize_from_loader(
    model: NetVLADModel, loader: Iterable, device: torch.device, start: int = 0
) -> None:
    """Calibrate a trunk of random weights and cluster local descriptors, from the first batches."""
    if not model.trunk_initialized and start == 0:
        needed, images = CALIBRATION_IMAGES, []
        for batch in _images(loader):
            images.append(batch)
            if sum(map(len, images)) >= needed:
                break
        calibrate_trunk(model, torch.cat(images)[:needed].to(device))
    initialize_netvlad(model, _images(loader), device, start=start)


def _images(loader: Iterable) -> Iterator[Tensor]:
    """The images of a loader of (q, p, n) batches, (B, 3, H, W) each, up to what k-means asks for."""
    enough = KMEANS_DESCRIPTORS // DESCRIPTORS_PER_IMAGE
    gathered = 0
    for batch in loader:
        for part in batch:
            part = part.flatten(0, 1) if part.dim() == 5 else part
            gathered += len(part)
            yield part
            if gathered >= enough:
                return
