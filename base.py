"""Tasks 1-3 in one command: data -> train -> recall -> output/.

python base.py                                   # dataset/, or the built-in sample if it is empty
python base.py --dataset DIR --epochs 5 --seed 1 # other data in the assignment's layout
python base.py --epochs 0                        # evaluate the initialized model, no training
python base.py --resume                          # go on where a stopped run saved last
torchrun --nproc_per_node=2 base.py              # data-parallel, on GPUs or processors
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dataset import LISTS, locate
from dataset.lists import (
    ImageListDataset,  # noqa: F401, offered from here by contract
    LoadDataset,
    data_warnings,
    read_split,
)
from eval import print_recall
from model import (
    IMAGE_SIZE,
    PRECISIONS,
    TRAIN_FROM,
    WARNINGS,
    DescriptorModel,
    InputError,
    NetVLADModel,
    choose_device,
    described_settings,
    load_checkpoint,
    refuse,
    warn,
)
from recognition.aggregation import AGGREGATIONS
from recognition.backbones import BACKBONES, backbone_name, calibrate
from recognition.flags import above_zero, not_negative, positive, whole
from recognition.recipes import build_model
from reporting import check, figures, handin, report
from reporting.recall import Recall, measure_recall
from reporting.screen import always_printed, on_screen, phase, print_recall_table, versions
from train import MARGIN, RankingLoss, train, validate
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
from training.mining import POSITIVE_RADIUS, HeldOutTuples, TupleLoader
from training.mixing import keep_best_share
from training.places import split_by_place
from training.resume import (
    digest,
    how_to_resume,
    refuse_to_overwrite,
    resume_settings,
    saver,
    settings_of,
)
from training.start import calibration_images, choose_start, initialize_clusters

SHOWN = (1, 5, 10)  # the K of recall@K
CLUSTERS = 16
SMALLEST = 32  # pixels a side of an image of which a network leaves something
ASSIGNED = {"backbone": "vgg16", "aggregation": "netvlad"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the assignment's."""
    parser = argparse.ArgumentParser(description="Train NetVLAD and measure its recall.")
    option = parser.add_argument
    option("--dataset", type=Path, help="folder of the lists (default: dataset/, or the sample)")
    option("--output", type=Path, default=Path("output"), help="default: %(default)s")
    option("--epochs", type=not_negative, default=5, help="0: the untrained model (default: 5)")
    option("--lr", type=above_zero, default=1e-4, help="of Adam (default: %(default)s)")
    option("--batch-size", type=positive, default=8, help="tuples a step (default: 8)")
    option("--margin", type=above_zero, default=MARGIN, help="of the loss (default: %(default)s)")
    option(
        "--clusters", type=positive, help=f"of NetVLAD (default: {CLUSTERS}, or those of --init)"
    )
    option("--mining", choices=["hard", "random"], default="hard", help="negatives (default: hard)")
    option(
        "--train-from",
        choices=TRAIN_FROM,
        default="conv5",
        help="first trained part (default: conv5)",
    )
    option(
        "--weights",
        type=_weights,
        help="of VGG16: imagenet (downloaded), none (random, calibrated), or a file (default: "
        "imagenet, and none where it cannot be had)",
    )
    option(
        "--init", type=Path, metavar="CHECKPOINT", help="go on from this trained model, on new data"
    )
    option(
        "--image-size", type=_image_size, metavar="N",
        help=f"pixels a side (default: {IMAGE_SIZE}, or that of --init)",
    )  # fmt: skip
    option(
        "--backbone",
        type=backbone_name,
        choices=BACKBONES,
        default=ASSIGNED["backbone"],
        help="default: the assignment's vgg16",
    )
    option(
        "--aggregation",
        choices=AGGREGATIONS,
        default=ASSIGNED["aggregation"],
        help="default: the assignment's netvlad",
    )
    option("--seed", type=not_negative, default=42, help="of everything random (default: 42)")
    option(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="auto: bf16 where it is fast; fp16: float16 on GPUs without bf16",
    )
    option(
        "--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)"
    )
    option("--quiet", action="store_true", help="print results and warnings only")
    option("--limit", type=positive, help="use this many queries of each list, to try things out")
    option("--resume", action="store_true", help="go on with the run that stopped in --output")
    parser.set_defaults(saved=None)
    args = parser.parse_args(argv)
    if args.resume:
        return resume_settings(parser, args, argv)
    if args.init:
        for flag, value in {"--weights": args.weights, **not_assigned(args)}.items():
            if value:
                raise InputError(
                    f"{flag} {value} and --init {args.init}: the checkpoint has its own."
                )
    if not_assigned(args) and args.train_from != "conv5":
        raise InputError("--train-from names parts of vgg16 with netvlad: leave it out.")
    args.image_size = args.image_size or (described_settings(args.init) if args.init else {}).get(
        "image_size", IMAGE_SIZE
    )
    return args


def not_assigned(args: argparse.Namespace) -> dict[str, str]:
    """The flags, with their values, that make another network than the assignment's."""
    names = {name: getattr(args, name) for name in ASSIGNED}
    return {f"--{name}": value for name, value in names.items() if value != ASSIGNED[name]}


def _weights(text: str) -> str:
    return text.lower() if text.lower() in ("imagenet", "none") else text


def _image_size(text: str) -> int:
    if (size := whole(text)) < SMALLEST:
        raise argparse.ArgumentTypeError(
            f"{text} is less than {SMALLEST}: nothing would be left of it"
        )
    return size


def build(args: argparse.Namespace) -> DescriptorModel:
    """The model a run begins with, or the untrained one of the run that is resumed."""
    saved, weights, clusters = args.saved, args.weights, args.clusters or CLUSTERS
    if saved and "netvlad.centers" in saved["model"]:
        clusters = len(saved["model"]["netvlad.centers"])  # those of --init, maybe
    names = {"backbone": args.backbone, "aggregation": args.aggregation}
    if args.init and not saved:
        model = take_up(args.init, args.clusters)
    elif names == ASSIGNED:
        model = NetVLADModel(
            clusters,
            pretrained=weights is None and not saved,
            weights=None if weights in (None, "imagenet", "none") or saved else weights,
        )
        if weights == "imagenet" and not saved:
            model.load_imagenet()
    else:
        settings = {**names, "netvlad_clusters": clusters}
        size = (args.image_size, args.image_size)
        model = build_model(settings, "random" if saved else weights, size)
    if names == ASSIGNED:
        model.freeze_below(TRAIN_FROM[args.train_from])
    model.precision, model.image_size = args.precision, args.image_size
    if saved:
        model.load_state_dict(saved["model"])
        model.trunk.initialized = True
        model.aggregation.initialized = saved["clustered"]
        model.weights_origin = saved["origin"]
        for warning in saved["warnings"]:
            warn(warning)
    return model


def take_up(checkpoint: Path, clusters: int | None) -> NetVLADModel:
    """The trained model to go on from. InputError if it has another number of clusters than asked for."""
    model = load_checkpoint(checkpoint)
    if clusters not in (None, found := len(model.netvlad.centers)):
        raise InputError(f"{checkpoint} has {found} clusters: leave out --clusters {clusters}.")
    return model


def initialize(
    model: DescriptorModel,
    data: LoadDataset,
    inputs: Inputs,
    seed: int,
    seconds: dict[str, float],
    save: Callable[[], None],
) -> None:
    """Calibrate random weights, or choose the start of others; frozen outputs of all; clusters."""
    index = range(len(inputs) - len(data.index), len(inputs))
    learned = model.trunk.initialized and not model.weights_origin.startswith("random")
    if isinstance(model, NetVLADModel) and learned and not model.initialized:
        with phase("choosing the start", seconds):
            print(choose_start(model, data, inputs.device, seed))
    if not model.trunk.initialized:
        with phase("calibrating random weights", seconds):
            calibrate(model, calibration_images(inputs, index))
        save()
    if model.first_trained:
        with phase("frozen trunk, once per training image", seconds):
            inputs.cache()
    if not model.initialized:
        with phase("k-means", seconds):
            initialize_clusters(model, inputs, index, seed)
        save()


def recall_of(
    models: list[DescriptorModel], split: LoadDataset, inputs: Inputs, seed: int, name: str
) -> Recall:
    """Recall on a split of models that share their frozen part; inputs: of its two lists."""
    rows = np.split(np.arange(len(inputs)), [len(split)])
    kinds = (f"{name} queries", f"{name} index images")
    embedded = [
        tuple(inputs.describe(model, part, kind) for part, kind in zip(rows, kinds))
        for model in models
    ]
    where = (split.utm_query, split.utm_index, split.threshold)
    return measure_recall(embedded, *where, inputs.device, seed)


def run(args: argparse.Namespace) -> None:
    """All of tasks 1-3; raises InputError for bad input."""
    torch.manual_seed(args.seed)
    seconds: dict[str, float] = {}
    device = join_processes(choose_device(args.device))
    first = rank_and_world()[0] == 0
    with first_process_first():
        if first:
            handin.check_output(args.output)
            if not args.saved:
                refuse_to_overwrite(args)
        root, is_sample = locate(args.dataset, LISTS)
    read = {
        name: read_split(root, name, args.limit, args.image_size)
        for name in ("train", "val", "test")
    }
    splits = {name: data for name, data in read.items() if data}
    remarks = data_warnings(splits)
    for line in remarks:
        warn(line)
    data = splits.pop("train")
    parts, dropped = split_by_place(data.utm_query, data.utm_index, data.threshold, args.seed)
    sizes = {**{name: len(rows) for name, rows in parts.items()}, "dropped": dropped}
    print(f"Training queries by place: {', '.join(f'{n} {name}' for name, n in sizes.items())}.")

    with first_process_first():
        model = build(args)
        if first:
            handin.claim_output(args.output)
    store = Store(args.output, device=device)
    inputs = {
        name: Inputs(model, [split.queries, split.index], device, store)
        for name, split in {"train": data, **splits}.items()
    }
    what = digest(data.queries.paths, data.index.paths, data.utm_query, data.utm_index)
    save = saver(args, model, [len(data.queries), len(data.index), what])
    tuples = TupleLoader(
        data,
        inputs["train"],
        parts["train"],
        np.concatenate([parts["val"], parts["test"]]),
        batch_size=args.batch_size,
        seed=args.seed,
        mining=args.mining,
        margin=args.margin,
    )
    announce(args, inputs, tuples, store)
    initialize(model, data, inputs["train"], args.seed, seconds, save if first else _nothing)
    if first and not args.saved:  # nothing may have been left to initialize
        save()
    share_weights(model, device)
    trunk = "VGG16" if args.backbone == ASSIGNED["backbone"] else args.backbone
    print(f"{trunk} weights: {model.weights_origin}.")
    models = [copy.deepcopy(model), model] if args.epochs else [model]

    def judge(model: DescriptorModel) -> tuple[torch.Tensor, dict[str, float]]:
        scores, shown = tuples.judge(model)
        hits = recall_of([model], splits["val"], inputs["val"], args.seed, "val").hits
        recall = {f"val_R@{k}": float((hits < k).mean()) for k in SHOWN}
        return scores, {**shown, **recall}

    val, test = (HeldOutTuples(tuples, model, parts[name]) for name in ("val", "test"))
    objective = RankingLoss(args.margin)
    with phase("training", seconds):
        history = train(
            model,
            tuples,
            val,
            device,
            args.epochs,
            args.lr,
            objective=objective,
            judge=judge,
            state=args.saved and args.saved["training"],
            save=save if first else None,
            sum_over_processes=sum_over_processes,
        )
        if args.epochs:
            print(keep_best_share(model, models[0], tuples))
        test_loss = validate(model, test, device, objective=objective)
    print(f"Test loss {test_loss:.4f}")
    checkpoint = args.output / handin.CHECKPOINT
    if first:
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        handin.write_whole(checkpoint, handin.tensors(state))
    inputs["train"].release()

    recall, rows = {}, []
    with phase("recall", seconds):
        for name, split in splits.items():
            result = recall_of(models, split, inputs[name], args.seed, name)
            inputs[name].release()
            print(f"{name} lists, trained {args.epochs} epochs:")
            print_recall(result.hits, SHOWN)
            recall[name] = result.section
            where = (split.queries.paths, split.index.paths, split.utm_query, split.utm_index)
            rows = rows or figures.gallery_rows(*where, result)

    if not first:
        return
    section = {
        "data": {
            "name": "built-in sample" if is_sample else root.resolve().name,
            "root": str(root),
            "is_sample": is_sample,
            "posDistThr": data.threshold,
            **{
                f"{n}_{kind}": len(getattr(d, kind))
                for n, d in read.items()
                if d
                for kind in ("queries", "index")
            },
            "remarks": remarks,
        },
        "weights": {
            "origin": model.weights_origin,
            "pretrained": not model.weights_origin.startswith("random"),
        },
        "settings": settings_of(args),
        "clusters": len(model.netvlad.centers)
        if isinstance(model, NetVLADModel)
        else args.clusters,
        "seed": args.seed,
        "device": str(device),
        "split": sizes,
        "epochs": history,
        "test_loss": test_loss,
        "recall": recall,
        "phases": seconds,
        "versions": versions(),
        "warnings": WARNINGS,
    }
    with always_printed():
        finish(args.output, checkpoint, section, rows)


def _nothing() -> None:
    """What processes other than the first save."""


def announce(
    args: argparse.Namespace, inputs: dict[str, Inputs], tuples: TupleLoader, store: Store
) -> None:
    """Print what is about to be done and what it takes; InputError if the disk is too small, or no
    query can be trained on.
    """
    for name, images in inputs.items():
        queries, index = (len(dataset) for dataset in images.datasets)
        print(f"{name:6s}{queries:6d} queries {index:6d} index images")
    radius, usual = tuples.radius_m, POSITIVE_RADIUS * tuples.data.threshold
    if args.epochs and not len(tuples):
        raise InputError(
            f"none of the {tuples.dropped} training queries has an index image within {radius:g} m, "
            "which training needs: look at utmQ and utmDb, or evaluate only (--epochs 0)."
        )
    if tuples.mining == "hard" and radius > usual:
        warn(
            f"most training queries have no index image within {usual:g} m: those within {radius:g} m "
            "count as their positives, which may show something else."
        )
    if tuples.dropped:
        print(
            f"{tuples.dropped} training queries without an index image in {radius:g} m are left out."
        )
    print(f"{args.epochs} epochs of {len(tuples)} steps at most on {inputs['train'].device}.")
    if inputs["train"].model.first_trained:
        each = inputs["train"].bytes_each()
        sizes = [each * len(images) for images in inputs.values()]
        print(f"The frozen trunk's outputs are kept in {store.fits(*sizes)}.")


def finish(output: Path, checkpoint: Path, section: dict, rows: list[figures.GalleryRow]) -> None:
    """Write metrics, description of the checkpoint, picture, copies of the code and report."""
    sha256 = handin.describe_checkpoint(checkpoint, section)
    metrics = handin.update_metrics(output, "base", section, sha256)
    print_recall_table(section["recall"])
    picture = output / "task3_result.png"
    handin.draw_or_warn(
        picture.name, lambda: figures.recall_picture(picture, metrics["base"], rows)
    )
    code = Path(__file__).resolve().parent
    handin.draw_or_warn("the copy of the code", lambda: handin.copy_code(code, output))
    handin.draw_or_warn("the report", lambda: report.write_report(output))
    print(f"Weights: {section['weights']['origin']}. Data: {section['data']['name']}.")
    files = (checkpoint, picture, output / "report" / "report.html")
    print(f"Written: {', '.join(str(file) for file in files if file.is_file())}.")
    for line in check.missing(output):
        print(f"Still missing in {output}: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run tasks 1-3; 0, 2 for bad input, 130 when interrupted."""
    args = None
    try:
        args = parse(argv)
        with on_screen(args.quiet), silent_unless_first():
            run(args)
    except InputError as error:
        return refuse("base.py", error)
    except torch.cuda.OutOfMemoryError:
        sentence = f"the GPU's memory is too small: lower --batch-size (now {args.batch_size})."
        return refuse("base.py", InputError(sentence))
    except KeyboardInterrupt:
        print("\n" + how_to_resume(args), file=sys.stderr)
        return 130
    finally:
        leave_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
