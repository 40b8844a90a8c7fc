"""The command train.py of every recipe: its command line, run folder, checkpoints, final tests.

    python train.py --dataset_name=pitts30k                       # the recipe that has this flag
    python train.py --recipe=netvlad                              # or is named
    python train.py --resume=logs/default/DATE/last_model.pth     # goes on exactly
    torchrun --nproc_per_node=2 train.py …                        # data-parallel

What a recipe has of its own (flags, data, batches, objective, judge) is its family's: families.py says
what such a module offers. The run is in logs/<save_dir>/DATE: info.log, debug.log, the last and the
best checkpoint, metrics.json, pictures.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from eval import describe
from model import (
    DAMAGED,
    WARNINGS,
    DescriptorModel,
    InputError,
    choose_device,
    refuse,
    warn,
)
from recognition import families, gsv_cities, records
from recognition.aggregation import fit_to
from recognition.backbones import calibrate
from recognition.eval_command import TEST_SETTINGS, evaluate, read_tests
from recognition.flags import (
    add_model_flags,
    add_run_flags,
    add_test_flags,
    add_training_flags,
    warn_of_idle,
    with_recipe,
)
from recognition.inference import Pca, refuse_sizes
from recognition.job import Job, Where
from recognition.optimization import make_optimizer, make_rate, make_stop
from recognition.recipes import (
    ARCHITECTURE,
    build_model,
    count_work,
    let_batchnorm_drift,
    load_model,
    refuse_others,
)
from reporting.handin import file_sha256, forget_parts, tensors, write_whole
from reporting.screen import on_screen
from train import train
from training.distributed import (
    first_process_first,
    join_processes,
    leave_processes,
    rank_and_world,
    share_weights,
    silent_unless_first,
    sum_over_processes,
)
from training.inputs import Inputs, Store
from training.resume import refuse_other_data
from training.start import calibration_images, choose_start, initialize_clusters

BEST, AVERAGED = "best_model.pth", "averaged_model.pth"
SAVED = {"settings", "images", "model_state_dict", "origin", "training"}
TRAINING = {"epoch", "step", "totals", "history", "best", "weights", "optimizer", "loader"}
NOT_SAVED = {"device", "resume"}
# Settings that may differ when resuming: where the data lies now (a digest tells whether the training
# images are the same), and what only the test at the end asks.
MAY_DIFFER = {
    "save_dir", "datasets_folder", "dataset_folder", "train_set_folder", "val_set_folder",
    "test_set_folder", "gsv_cities_folder", "infer_batch_size", "test_method", "majority_weight",
    "scales", "pca_dim", "pca_dataset_folder", "pca_whiten", "rerank",
    "recall_values", "night_queries", "num_preds_to_save", "save_only_wrong_preds", "save_descriptors",
}  # fmt: skip


# ---------------------------------------------------------------- command line


def build_parser(family: ModuleType) -> argparse.ArgumentParser:
    """The command line of the training of a family's recipes."""
    parser = argparse.ArgumentParser(prog="train.py", description=family.__doc__.partition("\n")[0])
    add_training_flags(parser, family.LAST)
    for add in (
        family.add_training_flags,
        family.add_data_flags,
        add_run_flags,
        add_model_flags,
        add_test_flags,
    ):
        add(parser)
    return parser


def parse(
    argv: Sequence[str] | None, more: dict | None = None
) -> tuple[argparse.Namespace, ModuleType]:
    """The command line and the family of its recipe.

    With --resume the settings are those of that run, and what it saved is args.saved, else None.
    more: other defaults than the recipe's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=families.RECIPES)
    first.add_argument("--resume", "--resume_train", type=Path)
    asked, _ = first.parse_known_args(argv)
    saved = read_saved(asked.resume) if asked.resume else None
    known = {k: v for k, v in saved["settings"].items() if k not in NOT_SAVED} if saved else {}
    family, recipe = families.choose(argv, asked.recipe or known.get("recipe"))
    args = with_recipe(build_parser(family), argv, recipe, known or more or {})
    for name, value in records.plain(args).items():
        if name in known.keys() - MAY_DIFFER and value != known[name]:
            raise InputError(
                f"--{name} is {value} but was {known[name]} in the run to resume: leave it out, or "
                "begin anew without --resume."
            )
    if args.pca_dim and args.pca_dataset_folder is None:
        raise InputError("--pca_dim needs --pca_dataset_folder, the images to fit the PCA on.")
    if args.crossimage_encoder and family is not gsv_cities:
        raise InputError(
            "--crossimage_encoder is trained on GSV-Cities only: leave it out, or give "
            "--recipe=supervlad."
        )
    if args.scheduler == "multistep" and not args.scheduler_milestones:
        raise InputError(
            "--scheduler multistep needs --scheduler_milestones, the epochs to step at."
        )
    family.settle(args)
    warn_of_idle(args, argv)
    args.saved = saved
    return args, family


def read_saved(file: Path) -> dict:
    """What a run saved. InputError if the file is nothing of the kind."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{file} does not exist: name the last checkpoint of a run, as "
            "logs/default/DATE/last_model.pth."
        ) from None
    except DAMAGED:
        saved = None
    if not (
        isinstance(saved, dict)
        and saved.keys() >= SAVED
        and isinstance(saved["settings"], dict)
        and saved["settings"].get("recipe") in families.RECIPES
        and isinstance(saved["training"], dict)
        and saved["training"].keys() >= TRAINING
    ):
        raise InputError(
            f"{file} is no last checkpoint of train.py, or damaged: name one, or give other weights "
            "with --weights."
        )
    return saved


# ---------------------------------------------------------------- a run


def build(args: argparse.Namespace) -> DescriptorModel:
    """The model a run begins with."""
    settings = {name: getattr(args, name) for name in ARCHITECTURE}
    if args.resume_model and not args.saved:
        model, own = load_model(args.resume_model, settings)
        refuse_others(args.resume_model, own, settings)
    else:
        model = build_model(settings, "random" if args.saved else args.weights)
    if args.saved:
        fit_to(model.aggregation, args.saved["model_state_dict"])
        try:
            model.load_state_dict(args.saved["model_state_dict"])
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InputError(
                f"the weights in {args.resume} do not fit the network of its settings: it is damaged, "
                "begin anew."
            ) from error
        model.trunk.initialized = True
        model.weights_origin = args.saved["origin"]
    model.precision = args.precision
    if args.drift_batchnorm:
        let_batchnorm_drift(model)
    return model


def sizes_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Height and width of the images to train and, last, to test on, where all have the same."""
    side = getattr(args, "image_size", None)
    given = [getattr(args, "train_resize", None), [side, side] if side else None, args.resize]
    return [tuple(size) for size in given if size and len(size) == 2]


def initialize(model: DescriptorModel, job: Job, device: torch.device, seed: int) -> None:
    """Calibrate random weights, and cluster local descriptors, of evenly spaced training images.

    Pretrained weights whose last layer is a convolution begin as ranks training queries best. Layers
    whose shape depends on the size of the images are made for these.
    """
    inputs = job.start
    clustered = getattr(model.aggregation, "initialized", True)
    if not model.trunk.initialized:
        calibrate(model, calibration_images(inputs, range(len(inputs))))
    elif job.split and not clustered and isinstance(model.trunk[-1], nn.Conv2d):
        print(choose_start(model, job.split, device, seed))
    describe(model.eval(), inputs.take([0]), device)  # what is frozen is computed from now on
    if not clustered:
        print("- k-means of local descriptors ...", flush=True)
        initialize_clusters(model, inputs, range(len(inputs)), seed)


def choose_kept(inputs: Sequence[Inputs], store: Store) -> None:
    """Decide, and say, which sets' frozen outputs are computed once: those there is room for."""
    sizes: list[int] = []
    for part in inputs:
        size = part.bytes_each() * len(part) if part.model.first_trained else 0
        try:
            store.fits(*sizes, size)
            sizes.append(size)
        except InputError:
            part.keep = False
            warn(
                f"the frozen trunk's outputs of {len(part)} images ({size / 1e9:.1f} GB) do not fit "
                "on the disk: they are computed each time."
            )
    if any(sizes):
        print(f"The frozen trunk's outputs are kept in {store.fits(*sizes)}.")


def save_tensors(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    write_whole(path, tensors(content))


def run_training(
    args: argparse.Namespace,
    family: ModuleType,
    where: Where,
    run: Path,
    device: torch.device,
) -> None:
    """All of a training; raises InputError for bad input."""
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    first = rank_and_world()[0] == 0
    settings = {k: v for k, v in records.plain(args).items() if k != "saved"}
    records.print_arguments(settings, device)
    data, tests = family.read(args, where), read_tests(where.tests, args)
    with first_process_first():
        model = build(args).to(device, memory_format=torch.channels_last)
    sizes = sizes_of(args)
    refuse_sizes(model, sizes[:-1])
    refuse_sizes(model, sizes[-1:], sorted({1.0, *args.scales}))
    if args.pca_dim:
        Pca.refuse(args.pca_dim, model.descriptor_dim)
    store = Store(run, device=device)
    job = family.prepare(args, data, model, device, store)
    if args.saved:
        refuse_other_data(args.saved["images"], job.images)
    choose_kept(job.kept, store)
    initialize(model, job, device, args.seed)
    for part in (model, job.objective.to(device)):
        share_weights(part, device)
    work = count_work(model, job.size)
    records.print_model(model, work, job.size)
    described = {"settings": settings, "origin": model.weights_origin, "images": job.images}
    untrained = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}

    def save_best(best: dict) -> None:
        weights = {**untrained, **own_weights(best["weights"])}
        epoch = {"epoch_num": best["epoch"], "model_state_dict": weights}
        save_tensors(run / BEST, {**described, **epoch})

    def save(training: dict) -> None:
        whole = {**untrained, **own_weights(training["weights"])}
        if training["averaged"]:
            mean = {**untrained, **own_weights(training["averaged"])}
            save_tensors(run / AVERAGED, {**described, "model_state_dict": mean})
        if training["best"] and training["step"] == 0:
            save_best(training["best"])
        # Last: what is resumed from here needs the others.
        last = {**described, "training": training, "model_state_dict": whole}
        save_tensors(run / family.LAST, last)

    job.judge.queries = "val queries"
    history = train(
        model,
        job.loader,
        job.val_loader,
        device,
        args.epochs_num,
        args.lr,
        objective=job.objective,
        judge=job.judge,
        state=args.saved and args.saved["training"],
        save=save if first else None,
        optimizer=make_optimizer(args.optim, args.weight_decay, len(job.loader)),
        rate=make_rate(
            args.scheduler,
            args.epochs_num,
            warmup=args.warmup_epochs,
            step=args.scheduler_epochs,
            factor=args.scheduler_factor,
            milestones=args.scheduler_milestones,
        ),
        stop=args.patience
        and make_stop(args.patience, lambda record: better_score(record, family.SCORED)),
        sum_over_processes=sum_over_processes,
    )
    for part in job.kept:
        part.release()
    if not first:
        return
    if not history:
        save_best({"weights": {}, "epoch": 0})
    elif not (run / BEST).is_file():
        save_best(args.saved["training"]["best"])
    checkpoint, before = file_sha256(run / BEST), records.read(run) if args.saved else {}
    measured = before.get("recall", {}) if before.get("checkpoint") == checkpoint else {}
    seconds = max(time.perf_counter() - began, sum(epoch["seconds"] for epoch in history))
    metrics = {
        "kind": "train",
        "settings": {**settings, **records.plain(args, TEST_SETTINGS)},
        "epochs": [{k: v for k, v in e.items() if not math.isnan(v)} for e in history],
        **job.record,
        "recall_values": args.recall_values,
        "recall": measured,
        "seconds": seconds,
        **work,
        "weights": model.weights_origin,
        "checkpoint": checkpoint,
        "warnings": WARNINGS,
    }
    records.write(run, metrics)
    for name, split in tests.items():
        metrics["recall"][name] = evaluate(model.eval(), split, name, args, run, len(tests) > 1)
        records.write(run, metrics)
    print(f"Written: {run / BEST}, {run / family.LAST}, {run / 'metrics.json'}.")


def better_score(record: dict, scored: str) -> float:
    """An epoch's score: that of its weights or, if better, of those averaged until then."""
    names = scored, f"averaged {scored}"
    return max(record[name] for name in names if name in record)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a GPU, or the processor, has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)


def own_weights(weights: dict) -> dict:
    """Those of the model among all that train() changed."""
    return {k: v for k, v in weights.items() if not k.startswith("objective.")}


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 0, 2 for bad input, 130 when interrupted."""
    run, last = None, ""
    try:
        args, family = parse(argv)
        device, last = join_processes(choose_device(args.device)), family.LAST
        first = rank_and_world()[0] == 0
        with on_screen(), silent_unless_first():
            if args.saved:
                run = args.resume.parent
                forget_parts(run)
            else:
                run = records.new_run_folder(args.save_dir) if first else Path("logs")
            with records.logged(run, argv) if first else contextlib.nullcontext():
                with first_process_first():
                    where = family.locate(args, training=True)
                if where.is_sample and not args.saved:
                    args, family = parse(argv, family.SAMPLE_SETTINGS)
                run_training(args, family, where, run, device)
    except InputError as error:
        return refuse("train.py", error)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        sentence = (
            "there is too little memory for this: lower --train_batch_size, --batch_size, --resize or "
            "the size of the network."
        )
        return refuse("train.py", InputError(sentence))
    except KeyboardInterrupt:
        there = run is not None and (run / last).is_file()
        how = f"To go on: python train.py --resume={run / last}" if there else "Nothing was saved."
        print(f"\nInterrupted. {how}", file=sys.stderr)
        return 130
    finally:
        leave_processes()
    return 0
