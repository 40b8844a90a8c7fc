"""`python eval.py --dataset_name=… --resume=…`: recall of any checkpoint on folders of named images.

python eval.py --dataset_name=tokyo_xs --resume=logs/default/DATE/best_model.pth
python eval.py --resume=… --test_method=maj_voting --scales 0.7 1 1.4 --rerank geometric
python eval.py --resume=… --query photo.jpg --index folder
python eval.py --resume=… --export model.onnx
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import eval
from dataset import lists, split_files
from dataset import locate as locate_lists
from dataset.folders import FolderImages, FolderSplit, read_split
from eval import first_hits
from model import (
    WARNINGS,
    DescriptorModel,
    InputError,
    choose_device,
    refuse,
    warn,
)
from recognition import families, records
from recognition.cosplace import seen_in_training
from recognition.export import export_onnx
from recognition.flags import (
    add_model_flags,
    add_run_flags,
    add_test_flags,
    positive,
    warn_of_idle,
    with_recipe,
)
from recognition.inference import (
    OF_CROPS,
    RESIZE,
    Combined,
    Pca,
    Pipeline,
    describe_images,
    for_inference,
    framing,
    rank,
    refuse_sizes,
    unit,
)
from recognition.job import recall_at, report_split
from recognition.recipes import (
    ARCHITECTURE,
    OWN_SIZE_PX,
    RECIPES,
    count_work,
    load_any,
    load_model,
    read_settings,
    ready_to_search,
    refuse_others,
)
from recognition.reranking import (
    RERANKED,
    rerank_clusters,
    rerank_expansion,
    rerank_geometric,
)
from reporting import figures
from reporting.handin import file_sha256, refuse_unwritable, write_or_warn
from reporting.predictions import save_predictions
from reporting.recall import recall_gain, recall_interval
from reporting.screen import on_screen
from training.inputs import Store

PCA_IMAGES = 2**14
TEST_SETTINGS = (
    "resize", "test_method", "majority_weight", "scales", "pca_dim", "pca_dataset_folder",
    "pca_whiten", "rerank", "val_positive_dist_threshold",
)  # fmt: skip
Row = dict[str, list]  # of a table: recall in 0..1 at each K, and each query's first hit


# ---------------------------------------------------------------- command line


def build_parser(family: ModuleType) -> argparse.ArgumentParser:
    """The command line of the evaluation on a family's data."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option(
        "--resume", "--resume_model", "--checkpoint", type=Path, required=True, metavar="FILE",
        help="checkpoint or other weights",
    )  # fmt: skip
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="search these in --index instead")
    option("--index", type=Path, metavar="FOLDER", help="images to search in, also below")
    option("--top-k", type=positive, default=5, help="images to name for a query (default: 5)")
    option(
        "--picture", type=Path, metavar="FILE", help="draw the queries and what was found (.png)"
    )
    option("--export", type=Path, metavar="FILE.onnx", help="write the model as ONNX, no more")
    for add in (family.add_data_flags, add_run_flags, add_model_flags, add_test_flags):
        add(parser)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ModuleType]:
    """The command line, and the family of its data: by its flags, or else of the checkpoint."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=families.RECIPES)
    first.add_argument("--resume", "--resume_model", "--checkpoint", type=Path)
    asked, _ = first.parse_known_args(argv)
    own = read_settings(asked.resume) if asked.resume else {}
    family, recipe = families.choose(argv, asked.recipe, own.get("recipe"))
    family = families.with_data(argv, family)
    built = {name: own[name] for name in ARCHITECTURE if name in own}
    size = {"resize": own.get("resize"), "image_size": own.get("image_size", OWN_SIZE_PX)}
    args = with_recipe(build_parser(family), argv, recipe, {**size, **built})
    refuse_others(args.resume, built, vars(args))
    if not args.query and (args.index or args.picture):
        raise InputError("--index and --picture need --query, the images to look for.")
    family.settle(args)
    warn_of_idle(args, argv)
    return args, family


# ---------------------------------------------------------------- evaluation


def read_tests(tests: Mapping[str, Path], args: argparse.Namespace) -> dict[str, FolderSplit]:
    """The splits in the folders `tests`. InputError, before anything is computed, for what is wrong there."""
    how = (args.val_positive_dist_threshold, None, max(args.resize, default=None))
    splits = {name: read_split(folder, *how) for name, folder in tests.items()}
    night = args.night_queries
    if night and not any(is_night(split, night).any() for split in splits.values()):
        raise InputError(f"--night_queries {night} names none of the queries' files.")
    if args.pca_dim:
        Pca.refuse(args.pca_dim, len(pca_images(args, next(iter(tests.values())))))
    if args.save_descriptors and args.save_descriptors.is_dir():
        raise InputError(f"--save_descriptors {args.save_descriptors} is a folder: name a file.")
    if args.save_descriptors:
        refuse_unwritable(args.save_descriptors.parent)
    return splits


def evaluate(
    model: DescriptorModel,
    split: FolderSplit,
    name: str,
    args: argparse.Namespace,
    run: Path,
    one_of_several: bool = False,
) -> dict[str, Row]:
    """Recall on a split: prints a table, writes what args ask for; its rows by name.

    one_of_several: whether files that args ask for have `name` in theirs, for other splits' lie beside.
    """
    device, file_name = choose_device(args.device), re.sub(r"[\s/\\:]+", "_", name).strip("_")
    report_split(name, split, max(args.recall_values))
    split.index.transform = framing(args.resize)
    split.queries.transform = framing(args.resize, args.test_method)
    pipeline, store = Pipeline(for_inference(model, device), args.scales), Store(run)
    pcas = fit_pcas(pipeline, args, split.folder, device, store) if args.pca_dim else []
    index = describe_images(pipeline, split.index, device, store, args.infer_batch_size)[:, :, 0]
    batch = 1 if args.test_method == "single_query" else args.infer_batch_size
    crops = 5 if args.test_method in OF_CROPS else 1
    queries = describe_images(pipeline, split.queries, device, store, batch, crops)
    if pcas:
        queries, index = (
            np.stack([pca(part) for pca, part in zip(pcas, parts)]) for parts in (queries, index)
        )
    if args.save_descriptors:
        of_crops = queries[-1] if crops > 1 else queries[-1][:, 0]
        arrays = {"queries": of_crops, "database": index[-1]}
        paths = {"queries_paths": split.queries.paths, "database_paths": split.index.paths}
        names = {key: [str(path) for path in value] for key, value in paths.items()}
        file = args.save_descriptors
        if one_of_several:
            file = file.with_name(f"{file.stem}_{file_name}{file.suffix}")
        write_or_warn(file, lambda part: save_arrays(part, {**arrays, **names}))
    k = min(len(split.index), max(*args.recall_values, RERANKED, args.num_preds_to_save))
    usual = {0: "own size", 1: "shorter side resized", 2: args.test_method}[len(args.resize)]
    rankings, by_distance = {}, not (pipeline.unit_norm or args.pca_dim)
    for variant, q, d in zip(pipeline.variants, queries, index):
        how = (k, args.test_method, device, args.majority_weight, by_distance)
        similarity, rankings[variant or usual] = rank(q, d, *how)
    ranking = list(rankings.values())[-1]
    described = queries[-1].mean(axis=1)
    described = described if by_distance else unit(described)
    if args.rerank:
        ranking = rerank(args, split, described, index[-1], similarity, ranking)
        rankings[f"re-ranked, {args.rerank}"] = ranking
    table = {}
    for variant, found in rankings.items():
        hits = first_hits(found, split.positives)
        for part, chosen in parts_of(split, args.night_queries).items():
            table[f"{variant}{part}"] = {
                "recall": recall_at(hits[chosen], k, args.recall_values),
                "hits": hits[chosen].tolist(),
            }
    print_table(name, table, args.recall_values, k)
    draw_found(run / f"{file_name}.png", name, split, described, index[-1], ranking)
    if args.num_preds_to_save:
        what = (split.queries.paths, split.index.paths, ranking, split.positives)
        how = (args.num_preds_to_save, args.save_only_wrong_preds)
        folder = run / "preds" / file_name if one_of_several else run / "preds"
        count = save_predictions(folder, *what, *how)
        print(f"Written: {count} predictions in {folder}.")
    return table


def save_arrays(path: Path, arrays: dict) -> None:
    """numpy.savez, to a path with any ending."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def draw_found(
    picture: Path,
    name: str,
    split: FolderSplit,
    queries: np.ndarray,
    index: np.ndarray,
    ranking: np.ndarray,
) -> None:
    """A few queries with the first images found: right ones, late ones, wrong ones."""
    hits = first_hits(ranking, split.positives)
    ranks = [int(hit) + 1 if hit < ranking.shape[1] else None for hit in hits]
    rows = []
    for query in figures.choose_gallery(ranks):
        matches = [
            (
                str(split.index.paths[row]),
                float(queries[query] @ index[row]),
                float(np.hypot(*(split.utm_index[row] - split.utm_query[query]))),
                row in split.positives[query],
            )
            for row in ranking[query, : figures.MATCHES_SHOWN]
        ]
        path = str(split.queries.paths[query])
        rows.append(figures.GalleryRow(path, matches, ranks[query]))
    figures.retrieval_picture(picture, rows, f"What was found: {name}")


def fit_pcas(
    pipeline: Pipeline, args: argparse.Namespace, tested: Path, device: torch.device, store: Store
) -> list[Pca]:
    """The PCA of --pca_dataset_folder's descriptors, one a variant of the pipeline."""
    images = pca_images(args, tested)
    rng = np.random.default_rng(args.seed)
    chosen = rng.choice(len(images), min(PCA_IMAGES, len(images)), replace=False)
    subset = torch.utils.data.Subset(images, chosen.tolist())
    fitted = describe_images(pipeline, subset, device, store, args.infer_batch_size)[:, :, 0]
    return [Pca.fit(part, args.pca_dim, args.pca_whiten) for part in fitted]


def pca_images(args: argparse.Namespace, tested: Path) -> FolderImages:
    """Those of --pca_dataset_folder. InputError if it is nowhere, not given or without image."""
    if args.pca_dataset_folder is None:
        raise InputError("--pca_dim needs --pca_dataset_folder, the images to fit the PCA on.")
    places = [
        getattr(args, "datasets_folder", None) or Path(),
        Path(),
        tested.absolute().parents[2],
    ]
    for folder in (place / args.pca_dataset_folder for place in places):
        if folder.is_dir():
            images = FolderImages([folder], framing(args.resize), max(args.resize, default=None))
            if not len(images):
                raise InputError(f"{folder} holds no image to fit the PCA on: name another folder.")
            return images
    raise InputError(f"--pca_dataset_folder {args.pca_dataset_folder} is no folder: name one.")


def rerank(
    args: argparse.Namespace,
    split: FolderSplit,
    queries: np.ndarray,
    index: np.ndarray,
    similarity: np.ndarray,
    ranking: np.ndarray,
) -> np.ndarray:
    """The ranking (nq, k) by --rerank."""
    if args.rerank == "clusters":
        return rerank_clusters(similarity, ranking, split.utm_index, split.threshold)
    if args.rerank == "expansion":
        return rerank_expansion(queries, index, ranking, choose_device(args.device))
    return rerank_geometric(ranking, split.queries.paths, split.index.paths, args.seed)


def parts_of(split: FolderSplit, night_list: Path | None) -> dict[str, np.ndarray]:
    """Which queries each line of the table is about: all and, where both occur, day and night."""
    everything, night = np.arange(len(split)), is_night(split, night_list)
    if night.all() or not night.any():
        return {"": everything}
    return {"": everything, ", day": np.flatnonzero(~night), ", night": np.flatnonzero(night)}


def is_night(split: FolderSplit, night_list: Path | None) -> np.ndarray:
    """Which queries are of the night: those the list names; without one whose note begins with "night"."""
    if night_list is None:
        return np.array([note.lower().startswith("night") for note in split.queries.notes])
    try:
        lines = night_list.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--night_queries {night_list} cannot be read ({error}).") from None
    names = {Path(line.strip()).name for line in lines}
    return np.array([path.name in names for path in split.queries.paths])


def print_table(name: str, table: dict[str, Row], values: Sequence[int], k: int) -> None:
    """Recall in %, a line a row; the 95 % interval of its first K, and of its gain over the plain row.

    That is scale 1 where there are several, else the first row.
    """
    plain = "scale 1" if "scale 1" in table else next(iter(table))
    width = max(24, *(len(row) for row in table))
    print(f"\n{name:{width}s}" + "".join(f"{f'R@{v}':>7s}" for v in values) + "   (%)  queries")
    for row, found in table.items():
        hits = np.array(found["hits"])
        numbers = "".join(f"{100 * recall:7.1f}" for recall in found["recall"])
        low, high = recall_interval(hits, [min(values[0], k)])
        interval = f"R@{values[0]} {100 * low[0]:.1f} to {100 * high[0]:.1f}"
        before = np.array(table[plain]["hits"])
        if row != plain and len(hits) == len(before):
            gain, low, high = (100 * x for x in recall_gain(hits, before, min(values[0], k)))
            interval += f", over {plain} {gain:+.1f} ({low:+.1f} to {high:+.1f})"
        print(f"{row:{width}s}{numbers} {len(hits):13d}  {interval}")
    print(flush=True)


def command(argv: Sequence[str] | None = None) -> int:
    """What eval.py runs: the assignment's lists or a folder, or with this room's flags `main`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = [word for word in argv if word not in ("-h", "--help")]
    _, others = eval.build_parser().parse_known_args(words)
    return main(argv) if others else eval.main(argv, recall_of_lists, load_any)


def recall_of_lists(args: argparse.Namespace) -> None:
    """Recall@1/5/10 of a checkpoint on the assignment's lists of one split."""
    root, _ = locate_lists(args.dataset, split_files(args.split))
    split = lists.read_split(root, args.split)
    if split is None:
        raise InputError(f"there is no {args.split} list: choose --split val.")
    for line in lists.data_warnings({args.split: split}):
        warn(line)
    model, device = load_any(args.checkpoint), choose_device(args.device)
    for part in (split.queries, split.index):
        part.transform = eval.transform_of(model)
        part.at_least = model.image_size
    where = (split.utm_query, split.utm_index, split.threshold)
    eval.evaluate_recall(model, split.queries, split.index, *where, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0, 2 for bad input, 130 when interrupted."""
    run = Path()
    try:
        args, family = parse(argv)
        with on_screen():
            model, settings = load_model(
                args.resume, {name: getattr(args, name) for name in ARCHITECTURE}
            )
            if args.resize is None:
                usual = RECIPES[args.recipe].defaults.get("resize", RESIZE)
                args.resize = settings.get("resize", usual)
            model.precision = args.precision
            if hasattr(model.aggregation, "encoder_mode"):
                model.aggregation.encoder_mode = args.encoder_mode
            side = settings.get("image_size", getattr(args, "image_size", OWN_SIZE_PX))
            size = tuple(args.resize) if len(args.resize) == 2 else (side, side)
            refuse_sizes(model, [size], args.scales)
            if args.pca_dim:
                Pca.refuse(args.pca_dim, model.descriptor_dim)
            if args.export:
                export_onnx(model, size, args.export)
                print(f"Written: {args.export}.")
                return 0
            if args.query:
                model = for_inference(model, choose_device(args.device))
                searched = ready_to_search(Combined(model, args.scales), args.resize)
                eval.search_folder(args, lambda: searched)
                return 0
            run = records.new_run_folder(args.save_dir)
            with records.logged(run, argv):
                records.print_arguments(records.plain(args), choose_device(args.device))
                where = family.locate(args, training=False)
                tests = read_tests(where.tests, args)
                began = time.perf_counter()
                work = count_work(model, size)
                records.print_model(model, work, size)
                metrics = {
                    "kind": "eval",
                    "settings": {**settings, **records.plain(args, TEST_SETTINGS)},
                    "recall_values": args.recall_values,
                    "recall": {},
                    **work,
                    "transductive": seen_in_training(settings.get("target_folder"), where.tests),
                    "weights": model.weights_origin,
                    "checkpoint": file_sha256(args.resume),
                    "warnings": WARNINGS,
                }
                for name, split in tests.items():
                    several = len(tests) > 1
                    metrics["recall"][name] = evaluate(model, split, name, args, run, several)
                    metrics["seconds"] = time.perf_counter() - began
                    records.write(run, metrics)
    except InputError as error:
        return refuse("eval.py", error)
    except KeyboardInterrupt:
        there = (run / "metrics.json").is_file()
        what = (
            f"what was measured is in {run / 'metrics.json'}" if there else "nothing was measured"
        )
        print(f"\nInterrupted: {what}.", file=sys.stderr)
        return 130
    return 0
