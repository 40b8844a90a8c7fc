"""Task 2: training with a ranking loss, max(0, d(q, p) + margin - d(q, n)), by Adam.

    train(model, train_loader, val_loader, device, epochs=5, lr=1e-4)

The loaders yield batches (q, p, n) of images. base.py passes one that mines hard negatives and can be
taken up in the middle of an epoch (training/mining.py), and batches of what the frozen part of the
network made of the images once (training/inputs.py): the model knows them by their channels.

Works when copied out alone together with model.py and eval.py. Started as a program it trains the
systems of recognition/ on folders of named images: python train.py --dataset_name=pitts30k
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    CALIBRATION_IMAGES,
    DESCRIPTORS_PER_IMAGE,
    KMEANS_DESCRIPTORS,
    DescriptorModel,
    InputError,
    calibrate_trunk,
    half_type,
    initialize_netvlad,
    progress,
    refuse,
    warn,
)

MARGIN = 0.1
WARM_UP = 0.1  # share of the steps in which the rate climbs to its peak
SAVE_SECONDS = 60
SETTLE_STEPS = 50  # on a GPU the losses are looked at after so many steps: each look waits for it
STUCK = 0.995  # share of violating triplets
NO_BATCH = "the training loader gives no batch: give it images, or a smaller batch size."
COLLAPSED = 0.05  # distance of the loss from the margin, as a share of it


# ---------------------------------------------------------------- objective


def ranking_loss(q: Tensor, p: Tensor, n: Tensor, margin: float = MARGIN) -> Tensor:
    """max(0, d(q, p) + margin - d(q, n)) of every triplet, d the Euclidean distance.

    q, p: (B, D); n: (B, D), or (B, N, D) for several negatives a query. -> (B, N).
    """
    n = n if n.dim() == 3 else n[:, None]
    to_positive = (q - p).square().sum(dim=-1)[:, None]
    to_negatives = (q[:, None] - n).square().sum(dim=-1)
    # The root's slope is infinite at 0, where a query is its own positive.
    to_positive, to_negatives = (d.clamp(min=1e-12).sqrt() for d in (to_positive, to_negatives))
    return (to_positive + margin - to_negatives).clamp(min=0)


class RankingLoss(nn.Module):
    """The assignment's objective on batches (q, p, n).

    An objective maps (model, batch, device) to losses (B, …), whose mean is minimized. It may have
    parameters and buffers of its own, a `diagnose`, and a `shown` that gives numbers of the epoch to
    show, and forgets them.
    """

    def __init__(self, margin: float = MARGIN) -> None:
        super().__init__()
        self.margin = margin

    def forward(
        self, model: DescriptorModel, batch: Iterable[Tensor], device: torch.device
    ) -> Tensor:
        """Losses (B, N), all images in one pass. n: (B, …), or (B, N, …) for several negatives."""
        q, p, n = (part.to(device, non_blocking=True) for part in batch)
        negatives = n if n.dim() > q.dim() else n[:, None]
        inputs = torch.cat([q, p, negatives.flatten(0, 1)])
        with model.autocast(device):
            descriptors = model(inputs.contiguous(memory_format=torch.channels_last))
        sizes = [len(q), len(p), negatives.shape[0] * negatives.shape[1]]
        q_d, p_d, n_d = descriptors.float().split(sizes)
        return self.losses(q_d, p_d, n_d.unflatten(0, negatives.shape[:2]))

    def losses(self, q: Tensor, p: Tensor, n: Tensor) -> Tensor:
        """Losses (B, N) of descriptors (B, D), (B, D), (B, N, D)."""
        return ranking_loss(q, p, n, self.margin)

    def diagnose(self, loss: float, violations: float) -> str | None:
        """What a mean loss and the share of violating triplets say of a training that goes wrong."""
        if violations > STUCK and abs(loss - self.margin) < COLLAPSED * self.margin:
            return (
                "the descriptor has collapsed: the loss sits at the margin because all images get "
                "nearly the same descriptor. Lower --lr."
            )
        if violations > STUCK:
            return (
                "every triplet violates the margin: nothing is being learned. "
                "Lower --margin or --lr."
            )
        if violations == 0:
            return "no triplet violates the margin: nothing is left to learn. Raise --margin."
        return None


# ---------------------------------------------------------------- loop

TOTALS = ("loss", "violating", "losses", "items", "seconds")  # of an epoch so far


def rate_factor(share: float, history: Sequence[dict] = ()) -> float:
    """What the peak rate is multiplied with once `share` of the training is done, after some epochs.

    A linear warm-up, times half a cosine that ends at 0 (Loshchilov & Hutter 2017).
    """
    return min(1.0, share / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def train(
    model: DescriptorModel,
    train_loader: Iterable,
    val_loader: Iterable,
    device: torch.device | str,
    epochs: int = 5,
    lr: float = 1e-4,
    *,
    objective: nn.Module | None = None,
    judge: Callable[[DescriptorModel], tuple[Tensor, dict[str, float]]] | None = None,
    state: dict | None = None,
    save: Callable[[dict], None] | None = None,
    optimizer: Callable[[list[dict]], torch.optim.Optimizer] = torch.optim.Adam,
    rate: Callable[[float, list[dict]], float] = rate_factor,
    stop: Callable[[list[dict]], bool] | None = None,
    sum_over_processes: Callable[[list[Tensor], Tensor], Tensor] = lambda parameters, counts: (
        counts
    ),
) -> list[dict]:
    """Train what is not frozen; print both losses after each epoch.

    train_loader, val_loader: batches of the objective, by default (q, p, n) for the RankingLoss, each
    (B, 3, H, W), n also (B, N, 3, H, W). A model whose weights were neither initialized nor loaded is
    initialized from the training loader's first batches.
    A training loader may offer `epoch(model, number, done)`, the batches of an epoch after the first
    `done` (an empty one is no step of this process), and with it `size(step)`, the items that all
    processes together train on, `share(step)`, how much of the epoch is done, `names(step)`, its
    files, `queries_per_epoch`, `state_dict` and `load_state_dict`.
    judge: scores (n,) of held-out queries, higher is better, and numbers to show, before the training
    and after each epoch; `judge.queries`, if there, says in words which. The epoch of best scores is
    kept (_is_kept), 0 being the untrained model; without a judge the one of lowest val loss. Weights
    that the optimizer averaged are judged too.
    save: is given a state every SAVE_SECONDS and after each epoch, from which a later call with
    `state` goes on, to the same result. optimizer: makes one of groups of parameters.
    A module of the model or of the objective that carries `lr` is trained at that peak rate; with
    `apart` = True at that very rate, by an Adam of its own if the optimizer is recognition/'s.
    rate: what `lr` is multiplied with, of the share of the training that is done and the epochs so
    far. stop: whether to end early, of the epochs so far. sum_over_processes: sums gradients, in
    place, and counts.
    Returns a dict an epoch: epoch, train_loss, val_loss, violations (share of losses above 0), seconds,
    what the judge shows and, where the loader says how many queries there are, those skipped.
    Raises InputError when the loss is no longer a number.
    """
    device = torch.device(device)
    model = getattr(model, "module", model)  # of nn.DataParallel
    model.to(device, memory_format=torch.channels_last)
    objective = (RankingLoss() if objective is None else objective).to(device)
    if not model.initialized:
        initialize_from_loader(model, train_loader, device)
    trained, optimizer = trained_parts(model, objective, lr, optimizer)
    theirs = {f"objective.{k}": b for k, b in objective.named_buffers()}
    changed = {**trained, **_changed_buffers(model), **theirs}
    scaler = loss_scaler(device, half_type(device, model.precision))
    takes_up = hasattr(train_loader, "epoch")
    run = {"epoch": 1, "step": 0, "totals": dict.fromkeys(TOTALS, 0.0), "history": [], "best": {}}
    if state:
        run = {key: state[key] for key in run}
        set_weights(changed, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # not where the run began on a device that needed none
            scaler.load_state_dict(state["scaler"])
        train_loader.load_state_dict(state["loader"])
    unsettled: list[tuple[int, Tensor]] = []  # steps whose counts are still on the device
    clock = time.perf_counter()

    def settle() -> None:
        if unsettled:
            steps, counts = zip(*unsettled)
            counts = torch.stack(counts).cpu().double()
            bad = (~counts[:, 0].isfinite()).nonzero().flatten().tolist()
            if bad:
                raise InputError(_no_number(run["epoch"], steps[bad[0]], train_loader))
            for name, total in zip(TOTALS, counts.sum(dim=0).tolist()):
                run["totals"][name] += total
            unsettled.clear()

    def checkpoint() -> None:
        nonlocal clock
        settle()
        now = time.perf_counter()
        run["totals"]["seconds"] += now - clock
        clock = now
        if save:
            stateful = {"optimizer": optimizer, "loader": train_loader, "scaler": scaler}
            parts = {name: part.state_dict() for name, part in stateful.items()}
            averaged = averages(optimizer)
            mean = {name: averaged.get(p, p) for name, p in changed.items()} if averaged else {}
            save({**run, **parts, "weights": weights_of(changed), "averaged": weights_of(mean)})

    def keep_if_best(record: dict, scores: Tensor | None) -> None:
        if _is_kept(record, scores, run["best"]):
            top = _best_scores(scores, run["best"])
            run["best"] = {**record, "scores": top, "weights": weights_of(changed)}

    if judge and epochs and not state:
        scores, shown = judge(model)
        val_loss = validate(model, val_loader, device, objective=objective)
        weights = weights_of(changed)
        run["best"] = {"epoch": 0, "val_loss": val_loss, "scores": scores, "weights": weights}
        first = {} if math.isnan(val_loss) else {"val loss": val_loss}
        tqdm.write(f"Untrained: {_in_words({**first, **shown})[2:]}")
    steps = len(train_loader) if hasattr(train_loader, "__len__") else None
    while run["epoch"] <= epochs and not (stop and stop(run["history"])):
        epoch = run["epoch"]
        model.train()
        batches = train_loader.epoch(model, epoch, run["step"]) if takes_up else train_loader
        bar = {"desc": f"epoch {epoch}/{epochs}", "total": steps, "initial": run["step"]}
        for batch in progress(batches, unit="batch", **bar):
            # Every process enters a step that any has items for, with none of its own if need be.
            items = train_loader.size(run["step"]) if takes_up else len(batch[0])
            if items:
                done = _epoch_share(train_loader, run["step"])
                share = WARM_UP if done is None else (epoch - 1 + done) / epochs
                for group in optimizer.param_groups:
                    factor = 1.0 if group["apart"] else rate(share, run["history"])
                    group["lr"] = group["peak"] * factor
                optimizer.zero_grad()
                losses = torch.zeros(0, 1, device=device)
                if len(batch):
                    losses = objective(model, batch, device)
                    mean = losses.sum() * len(losses) / (items * losses.numel())
                    scaler.scale(mean).backward()
                active = [p for p in trained.values() if p.requires_grad]
                counts = sum_over_processes(active, _counts(losses.detach()))
                unsettled.append((run["step"], counts))
                centralize_gradients(model.trunk.parameters())
                scaler.step(optimizer)
                scaler.update()
            run["step"] += 1
            if device.type == "cpu" or len(unsettled) >= SETTLE_STEPS:
                settle()
            if time.perf_counter() - clock > SAVE_SECONDS:
                checkpoint()
        settle()
        totals = run["totals"]
        if not (run["step"] or takes_up):
            if epoch == 1:
                raise InputError(NO_BATCH)
            warn(f"the loader gave no batch in epoch {epoch}, it can be used once only: training ends.")
            break
        record = {
            "epoch": epoch,
            "train_loss": totals["loss"] / max(1, totals["losses"]),
            "val_loss": validate(model, val_loader, device, objective=objective),
            "violations": totals["violating"] / max(1, totals["losses"]),
        }
        if hasattr(train_loader, "queries_per_epoch"):
            record["skipped"] = train_loader.queries_per_epoch - int(totals["items"])
        scores, shown = judge(model) if judge else (None, {})
        shown = {**getattr(objective, "shown", dict)(), **shown}
        record.update(shown)
        keep_if_best(record, scores)
        averaged = averages(optimizer) if judge else {}
        with exchanged(averaged):
            if averaged:
                scores, of_average = judge(model)
                shown = {**shown, **{f"averaged {name}": value for name, value in of_average.items()}}
                record.update(shown)
                keep_if_best({**record, "averaged": True}, scores)
        record["seconds"] = totals["seconds"] + time.perf_counter() - clock
        run["history"].append(record)
        _report(record, shown, epochs, objective)
        run.update(epoch=epoch + 1, step=0, totals=dict.fromkeys(TOTALS, 0.0))
        clock = time.perf_counter()
        checkpoint()
    if run["best"]:
        set_weights(changed, run["best"]["weights"])
        if judge or not math.isnan(run["best"]["val_loss"]):
            by = getattr(judge, "queries", "held-out queries") if judge else "validation loss"
            kept = f"epoch {run['best']['epoch']}" if run["best"]["epoch"] else "the untrained model"
            kept += ", its averaged weights" if run["best"].get("averaged") else ""
            tqdm.write(f"Kept: {kept}, chosen by the {by}.")
    return run["history"]


def trained_parts(
    model: DescriptorModel,
    objective: nn.Module,
    lr: float,
    optimizer: Callable[[list[dict]], torch.optim.Optimizer] = torch.optim.Adam,
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """The trained parameters, by name, and the optimizer over them, each group with its peak rate."""
    trained, groups = {}, {}
    for prefix, root in (("", model), ("objective.", objective)):
        own = {f"{k}." if k else "": m for k, m in root.named_modules() if hasattr(m, "lr")}
        for name, parameter in root.named_parameters():
            if not parameter.requires_grad:
                continue
            trained[prefix + name] = parameter
            innermost = max((k for k in own if name.startswith(k)), key=len, default=None)
            peak = lr if innermost is None else own[innermost].lr
            apart = getattr(own.get(innermost), "apart", False)
            group = {"params": [], "lr": peak, "peak": peak, "apart": apart}
            groups.setdefault((peak, apart), group)["params"].append(parameter)
    return trained, optimizer(list(groups.values()))


def loss_scaler(device: torch.device, half: torch.dtype | None) -> torch.cuda.amp.GradScaler:
    """Multiplies the loss where float16 is computed in, in which small gradients would become 0."""
    enabled = half is torch.float16
    if hasattr(torch.amp, "GradScaler"):  # torch 2.3 and later
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def _changed_buffers(model: DescriptorModel) -> dict[str, Tensor]:
    """What training changes beside parameters: the statistics of batch normalizations."""
    frozen = tuple(f"trunk.{i}." for i in range(model.first_trained))
    return {k: b for k, b in model.named_buffers() if not k.startswith(frozen)}


def _epoch_share(loader: Iterable, step: int) -> float | None:
    """Share of the epoch that is done in the middle of a step; None if the loader does not tell."""
    if hasattr(loader, "share"):
        return loader.share(step)
    return (step + 0.5) / len(loader) if hasattr(loader, "__len__") else None


def _counts(losses: Tensor) -> Tensor:
    """Of losses (B, …), in the order of TOTALS: their sum, how many are above 0, all, items."""
    sizes = torch.tensor([losses.numel(), len(losses)], dtype=torch.float32, device=losses.device)
    return torch.cat([torch.stack([losses.sum(), (losses > 0).sum().float()]), sizes])


def _no_number(epoch: int, step: int, loader: Iterable) -> str:
    files = f" ({', '.join(loader.names(step))})" if hasattr(loader, "names") else ""
    return (
        f"the loss is not a number in epoch {epoch}, batch {step + 1}{files}: lower --lr, or look at "
        "these images."
    )


def weights_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of parameters on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def set_weights(parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Give parameters the values of `weights_of`."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def averages(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """The mean of each parameter's values in the steps so far; {} unless it is ASGD that averages."""
    states = optimizer.state.items()
    return {p: state["ax"] for p, state in states if "ax" in state and state["mu"] < 1}


@contextlib.contextmanager
def exchanged(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Parameters have these values inside."""
    own = {parameter: parameter.detach().clone() for parameter in values}
    try:
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in own.items():
                parameter.copy_(value)


def _is_kept(record: dict, scores: Tensor | None, best: dict) -> bool:
    """Whether this epoch replaces the one kept so far, `best`.

    With scores (n,): if better than the untrained model, epoch 0, and later unless worse than the
    best ones yet by more than the standard error of the mean difference. With few queries a larger
    mean alone is mostly chance, and favors early epochs. Without scores: if its validation loss is
    lower, or there is none.
    """
    if not best:
        return True
    if scores is None:
        return math.isnan(best["val_loss"]) or record["val_loss"] < best["val_loss"]
    gain = scores - best["scores"]
    if best["epoch"] == 0:
        return bool(gain.mean() > 0)
    return float(gain.mean()) >= -float(gain.std(correction=0)) / math.sqrt(len(gain))


def _best_scores(scores: Tensor | None, best: dict) -> Tensor | None:
    """The scores of larger mean: this epoch's, or the best ones yet."""
    if scores is None or not best:
        return scores
    return scores if scores.mean() >= best["scores"].mean() else best["scores"]


def _report(record: dict, shown: dict[str, float], epochs: int, objective: nn.Module) -> None:
    """Print an epoch's line; warn in words when nothing is being learned."""
    line = f"Epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f}"
    diagnose = getattr(objective, "diagnose", None)
    if diagnose or not math.isnan(record["val_loss"]):
        line += f", val loss {record['val_loss']:.4f}"
    if diagnose:
        line += f", violating triplets {100 * record['violations']:.1f} %"
    if "skipped" in record:
        line += f", {record['skipped']} tuples skipped"
    tqdm.write(f"{line}{_in_words(shown)}, {record['seconds']:.0f} s")
    trouble = diagnose and diagnose(record["train_loss"], record["violations"])
    if trouble:
        warn(f"epoch {record['epoch']}: {trouble}")


def _in_words(shown: dict[str, float]) -> str:
    return "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())


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
    model: DescriptorModel,
    loader: Iterable,
    device: torch.device | str,
    *,
    objective: nn.Module | None = None,
) -> float:
    """Mean loss over a loader of the objective's batches (default: RankingLoss); NaN if it is empty."""
    device = torch.device(device)
    model = getattr(model, "module", model)
    model.to(device, memory_format=torch.channels_last).eval()
    objective = (RankingLoss() if objective is None else objective).to(device)
    total, items = 0.0, 0
    for batch in progress(loader, desc="validation", unit="batch"):
        losses = objective(model, batch, device).cpu().double()
        total += float(losses.sum()) * len(losses) / max(1, losses.numel())
        items += len(losses)
    return total / items if items else math.nan


def initialize_from_loader(model: DescriptorModel, loader: Iterable, device: torch.device) -> None:
    """Calibrate a trunk of random weights and cluster local descriptors, from the first batches."""
    if not getattr(model.trunk, "initialized", True):
        images, enough = [], 0
        for batch in _images(loader):
            images.append(batch)
            enough += len(batch)
            if enough >= CALIBRATION_IMAGES:
                break
        calibrate_trunk(model, torch.cat(images)[:CALIBRATION_IMAGES].to(device))
    if not model.aggregation.initialized:
        initialize_netvlad(model, _images(loader), device)


def _images(loader: Iterable) -> Iterator[Tensor]:
    """The images of a loader of (q, p, n) batches, up to what k-means asks for. InputError if none."""
    enough = KMEANS_DESCRIPTORS // DESCRIPTORS_PER_IMAGE
    gathered = 0
    for batch in loader:
        for part in batch:
            part = part.flatten(0, 1) if part.dim() == 5 else part
            gathered += len(part)
            yield part
            if gathered >= enough:
                return
    if not gathered:
        raise InputError(NO_BATCH)


if __name__ == "__main__":
    if importlib.util.find_spec("recognition") is None:
        alone = InputError("to train other systems it needs the program's recognition/ beside it.")
        raise SystemExit(refuse("train.py", alone))
    from recognition.train_command import main  # only here: this file works without recognition/

    raise SystemExit(main())
