"""`python eval.py --dataset_name=… --resume=…`: recall of any checkpoint on folders of named images.

python eval.py --dataset_name=tokyo_xs --resume=logs/default/DATE/best_model.pth
python eval.py --resume=… --test_method=maj_voting --scales 0.7 1 1.4 --rerank geometric
python eval.py --resume=… --query photo.jpg --index folder
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import eval
from dataset import lists, split_files
from dataset import locate as locate_lists
from dataset.folders import FolderImages, FolderSplit, find_data_set, read_split
from dataset.sample import folders as sample_folders
from eval import find_images, first_hits, load_image, recall_interval
from model import (
    PRECISIONS,
    WARNINGS,
    DescriptorModel,
    InputError,
    choose_device,
    load_checkpoint,
    refuse,
    warn,
)
from recognition import records
from recognition.aggregation import AGGREGATIONS, L2_PLACES
from recognition.backbones import BACKBONES
from recognition.inference import (
    METHODS,
    OF_CROPS,
    Pca,
    Pipeline,
    describe_images,
    rank,
    transform_for,
    unit,
)
from recognition.recipes import ARCHITECTURE, RECIPES, count_work, load_model
from recognition.reranking import (
    RERANKED,
    rerank_clusters,
    rerank_expansion,
    rerank_geometric,
)
from reporting import figures
from reporting.handin import file_sha256, write_whole
from reporting.predictions import save_predictions
from reporting.screen import on_screen
from training.inputs import Store

RESIZE = [480, 640]  # height, width; eval.py takes those of the checkpoint
PCA_IMAGES = 2**14
RERANKINGS = ("clusters", "geometric", "expansion")
TEST_SETTINGS = (
    "resize", "test_method", "majority_weight", "scales", "pca_dim", "pca_dataset_folder",
    "pca_whiten", "rerank", "val_positive_dist_threshold",
)  # fmt: skip
Row = dict[str, list]  # of a table: recall in 0..1 at each K, and each query's first hit


# ---------------------------------------------------------------- command line


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def above_zero(text: str) -> float:
    """A number above 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data is, where the run goes, on what it runs."""
    option = parser.add_argument_group("data and run").add_argument
    option(
        "--datasets_folder",
        type=Path,
        help="default: $DATASETS_FOLDER, ../datasets_vg/datasets, dataset/",
    )
    option("--dataset_name", help="folder below it (default: pitts30k, or the built-in sample)")
    option("--save_dir", default="default", help="the run goes to logs/SAVE_DIR/DATE")
    option(
        "--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)"
    )
    option("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 where it is fast")
    option("--seed", type=int, default=0, help="of everything random (default: 0)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The architecture."""
    option = parser.add_argument_group("model").add_argument
    option("--recipe", choices=RECIPES, default="netvlad", help="default: %(default)s")
    option("--backbone", choices=BACKBONES, help="default: the recipe's")
    option("--aggregation", choices=AGGREGATIONS, help="default: the recipe's")
    option("--netvlad_clusters", type=positive, default=64, help="default: 64")
    option("--fc_output_dim", type=positive, help="a linear layer to so many numbers at the end")
    option("--l2", choices=L2_PLACES, default=L2_PLACES[0], help="of GeM (default: before_pool)")


def add_test_flags(parser: argparse.ArgumentParser) -> None:
    """How queries and index images are described and ranked."""
    option = parser.add_argument_group("test").add_argument
    option("--resize", type=positive, nargs=2, default=RESIZE, metavar=("H", "W"))
    option("--infer_batch_size", type=positive, default=16, help="default: 16")
    option("--test_method", choices=METHODS, default="hard_resize", help="of queries")
    option("--majority_weight", type=float, default=0.01, help="of maj_voting (default: 0.01)")
    option(
        "--scales", type=above_zero, nargs="+", default=[1.0], help="of queries and index images"
    )
    option("--pca_dim", type=positive, help="reduce descriptors to so many numbers")
    option("--pca_dataset_folder", type=Path, help="images to fit it on, below --datasets_folder")
    option("--pca_whiten", action="store_true", help="divide by the standard deviations")
    option("--rerank", choices=RERANKINGS, help=f"the first {RERANKED} once more")
    option("--val_positive_dist_threshold", type=above_zero, default=25.0, metavar="M")
    option("--recall_values", type=positive, nargs="+", default=[1, 5, 10, 20], metavar="K")
    option("--night_queries", type=Path, metavar="FILE", help="names of night queries, one a line")
    option(
        "--num_preds_to_save",
        type=int,
        default=0,
        metavar="N",
        help="pictures of the first N found",
    )
    option("--save_only_wrong_preds", action="store_true", help="of wrongly answered queries only")
    option("--save_descriptors", type=Path, metavar="FILE.npz")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the evaluation."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--resume", type=Path, required=True, metavar="FILE", help="checkpoint or other weights")
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="search these in --index instead")
    option("--index", type=Path, metavar="FOLDER", help="images to search in, also below")
    option("--top-k", type=positive, default=5, help="images to name for a query (default: 5)")
    for add in (add_data_flags, add_model_flags, add_test_flags):
        add(parser)
    return parser


def with_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, more: Mapping = {}
) -> argparse.Namespace:
    """Parsed arguments whose defaults are those of the recipe, and `more`."""
    recipe = RECIPES[parser.parse_known_args(argv)[0].recipe]
    known = {action.dest for action in parser._actions}
    defaults = {**recipe.defaults, **more}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    return parser.parse_args(argv)


def locate(args: argparse.Namespace) -> tuple[Path, str]:
    """The images/ folder of the data set, and its name; the built-in sample if there is none."""
    wanted = args.dataset_name or "pitts30k"
    of_sample = wanted in sample_folders.DATA_SETS and args.datasets_folder is None
    found = None if of_sample else find_data_set(args.datasets_folder, wanted)
    if found:
        return found, wanted
    if args.dataset_name and not of_sample:
        raise InputError(
            f"the data set {wanted} is in none of the usual places: name the folder that holds "
            f"{wanted}/images/ with --datasets_folder."
        )
    name = args.dataset_name or "sample"
    print(f"No data set is named or found: using the built-in one, {name!r}, a rendered town.")
    return sample_folders.locate_sample() / name / "images", name


# ---------------------------------------------------------------- evaluation


def recall_at(hits: np.ndarray, ranked: int, values: Sequence[int]) -> list[float]:
    """Recall in 0..1 at each K of ranks of first hits; K beyond the `ranked` images count as all."""
    return [float((hits < min(k, ranked)).mean()) for k in values]


def evaluate(
    model: DescriptorModel, folder: Path, name: str, args: argparse.Namespace, run: Path
) -> dict[str, Row]:
    """Recall on the split in `folder`: prints a table, writes what args ask for; its rows by name."""
    size, device = tuple(args.resize), choose_device(args.device)
    split = read_split(folder, args.val_positive_dist_threshold, None, max(size))
    report_split(name, split, max(args.recall_values))
    split.index.transform = transform_for("hard_resize", size)
    split.queries.transform = transform_for(args.test_method, size)
    pipeline, store = Pipeline(model, args.scales), Store(run)
    index = describe_images(pipeline, split.index, device, store, args.infer_batch_size)[:, :, 0]
    batch = 1 if args.test_method == "single_query" else args.infer_batch_size
    crops = 5 if args.test_method in OF_CROPS else 1
    queries = describe_images(pipeline, split.queries, device, store, batch, crops)
    if args.pca_dim:
        queries, index = reduce(pipeline, queries, index, args, device, store)
    if args.save_descriptors:
        of_crops = queries[-1] if crops > 1 else queries[-1][:, 0]
        arrays = {"queries": of_crops, "database": index[-1]}
        paths = {"queries_paths": split.queries.paths, "database_paths": split.index.paths}
        names = {key: [str(path) for path in value] for key, value in paths.items()}
        write_whole(args.save_descriptors, lambda part: np.savez(part, **arrays, **names))
    k = min(len(split.index), max(*args.recall_values, RERANKED, args.num_preds_to_save))
    rankings = {}
    for variant, q, d in zip(pipeline.variants, queries, index):
        how = (k, args.test_method, device, args.majority_weight)
        similarity, rankings[variant or args.test_method] = rank(q, d, *how)
    ranking = list(rankings.values())[-1]
    described = unit(queries[-1].mean(axis=1))
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
    picture = run / f"{name.replace(' ', '_')}.png"
    draw_found(picture, name, split, described, index[-1], ranking)
    if args.num_preds_to_save:
        what = (split.queries.paths, split.index.paths, ranking, split.positives)
        how = (args.num_preds_to_save, args.save_only_wrong_preds)
        count = save_predictions(run / "preds", *what, *how)
        print(f"Written: {count} predictions in {run / 'preds'}.")
    return table


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


def report_split(name: str, split: FolderSplit, most: int) -> None:
    """Print how large a split is, and what cannot be answered in it."""
    print(f"{name}: {len(split)} queries, {len(split.index)} database images.")
    if split.without_positives:
        print(
            f"{name}: {split.without_positives} queries have no database image within "
            f"{split.threshold:g} m; each counts as a miss."
        )
    if most > len(split.index):
        print(f"{name}: recall beyond {len(split.index)} is that of all database images.")


def reduce(
    pipeline: Pipeline,
    queries: np.ndarray,
    index: np.ndarray,
    args: argparse.Namespace,
    device: torch.device,
    store: Store,
) -> tuple[np.ndarray, np.ndarray]:
    """Queries (V, nq, C, D) and index (V, nd, D) after a PCA fitted on --pca_dataset_folder."""
    if args.pca_dataset_folder is None:
        raise InputError("--pca_dim needs --pca_dataset_folder, the images to fit the PCA on.")
    places = [args.datasets_folder or Path(), Path(), locate(args)[0].parent.parent]
    folders = [place / args.pca_dataset_folder for place in places]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise InputError(f"--pca_dataset_folder {args.pca_dataset_folder} is no folder: name one.")
    images = FolderImages(
        [folder], transform_for("hard_resize", tuple(args.resize)), max(args.resize)
    )
    rng = np.random.default_rng(args.seed)
    chosen = rng.choice(len(images), min(PCA_IMAGES, len(images)), replace=False)
    subset = torch.utils.data.Subset(images, chosen.tolist())
    fitted = describe_images(pipeline, subset, device, store, args.infer_batch_size)[:, :, 0]
    pcas = [Pca.fit(part, args.pca_dim, args.pca_whiten) for part in fitted]
    return (
        np.stack([pca(part) for pca, part in zip(pcas, queries)]),
        np.stack([pca(part) for pca, part in zip(pcas, index)]),
    )


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
        return rerank_expansion(queries, index, similarity, ranking, choose_device(args.device))
    return rerank_geometric(ranking, split.queries.paths, split.index.paths, args.seed)


def parts_of(split: FolderSplit, night_list: Path | None) -> dict[str, np.ndarray]:
    """Which queries each line of the table is about: all and, where both occur, day and night.

    Night queries are those that the list names, or whose note begins with "night".
    """
    everything = np.arange(len(split))
    if night_list is None:
        night = np.array([note.lower().startswith("night") for note in split.queries.notes])
    else:
        try:
            names = {Path(line.strip()).name for line in night_list.read_text().splitlines()}
        except OSError as error:
            raise InputError(f"--night_queries {night_list} cannot be read ({error}).") from None
        night = np.array([Path(path).name in names for path in split.queries.paths])
        if not night.any():
            raise InputError(f"--night_queries {night_list} names none of the queries' files.")
    if night.all() or not night.any():
        return {"": everything}
    return {"": everything, ", day": np.flatnonzero(~night), ", night": np.flatnonzero(night)}


def print_table(name: str, table: dict[str, Row], values: Sequence[int], k: int) -> None:
    """Recall in %, a line a row; the 95 % interval of its first K."""
    width = max(24, *(len(row) for row in table))
    print(f"\n{name:{width}s}" + "".join(f"{f'R@{v}':>7s}" for v in values) + "   (%)  queries")
    for row, found in table.items():
        hits = np.array(found["hits"])
        numbers = "".join(f"{100 * recall:7.1f}" for recall in found["recall"])
        low, high = recall_interval(hits, [min(values[0], k)])
        interval = f"R@{values[0]} {100 * low[0]:.1f} to {100 * high[0]:.1f}"
        print(f"{row:{width}s}{numbers} {len(hits):13d}  {interval}")
    print(flush=True)


def search_folder(model: DescriptorModel, args: argparse.Namespace) -> None:
    """Print each --query's most similar images in --index."""
    if args.index is None:
        raise InputError("--query needs --index FOLDER, the images to search in.")
    paths, size = find_images(args.index, args.query), tuple(args.resize)
    how, device = transform_for("hard_resize", size), choose_device(args.device)
    found = []
    for files in (args.query, paths):
        images = [(path, i) for i, path in enumerate(files)]
        dataset = Described(images, how, max(size))
        parts = describe_images(
            Pipeline(model, args.scales), dataset, device, Store(Path(".")), args.infer_batch_size
        )
        found.append(parts[-1])
    similarity, ranking = rank(found[0], found[1][:, 0], args.top_k, "hard_resize", device)
    for query, values, rows in zip(args.query, similarity, ranking):
        print(query)
        for number, (value, row) in enumerate(zip(values, rows), start=1):
            print(f"{number:4d}  {value:.4f}  {paths[row]}")


class Described(torch.utils.data.Dataset):
    """Image files whose names say nothing: item (image, index, path)."""

    def __init__(
        self, images: Sequence[tuple[Path, int]], transform: object, at_least: int
    ) -> None:
        self.images, self.transform, self.at_least = images, transform, at_least

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        path, number = self.images[i]
        return self.transform(load_image(path, self.at_least)), number, str(path)


def command(argv: Sequence[str] | None = None) -> int:
    """What eval.py runs: the assignment's lists or a folder, or with this room's flags `main`."""
    _, others = eval.build_parser().parse_known_args(argv)
    return main(argv) if others else eval.main(argv, recall_of_lists)


def recall_of_lists(args: argparse.Namespace) -> None:
    """Recall@1/5/10 of a checkpoint on the assignment's lists of one split."""
    root, _ = locate_lists(args.dataset, split_files(args.split))
    model, device = load_checkpoint(args.checkpoint), choose_device(args.device)
    split = lists.read_split(root, args.split, size=model.image_size)
    if split is None:
        raise InputError(f"there is no {args.split} list: choose --split val.")
    for line in lists.data_warnings({args.split: split}):
        warn(line)
    where = (split.utm_query, split.utm_index, split.threshold)
    eval.evaluate_recall(model, split.queries, split.index, *where, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0, 2 for bad input, 130 when interrupted."""
    args = with_recipe(build_parser(), argv, {"resize": None})
    try:
        with on_screen():
            model, settings = load_model(
                args.resume, {name: getattr(args, name) for name in ARCHITECTURE}
            )
            args.resize = args.resize or settings.get("resize") or RESIZE
            model.precision = args.precision
            if args.query:
                search_folder(model, args)
                return 0
            folder, name = locate(args)
            run = records.new_run_folder(args.save_dir)
            with records.logged(run, argv):
                began = time.perf_counter()
                work = count_work(model, tuple(args.resize))
                records.print_model(model, work, args.resize)
                table = evaluate(model, folder / "test", f"{name} test", args, run)
                records.write(run, {
                    "kind": "eval",
                    "settings": {**settings, **records.plain(args, TEST_SETTINGS)},
                    "recall_values": args.recall_values,
                    "recall": {f"{name} test": table},
                    "seconds": time.perf_counter() - began,
                    **work,
                    "weights": model.weights_origin,
                    "checkpoint": file_sha256(args.resume),
                    "warnings": WARNINGS,
                })  # fmt: skip
    except InputError as error:
        return refuse("eval.py", error)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was measured.", file=sys.stderr)
        return 130
    return 0
