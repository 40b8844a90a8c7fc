"""Task 4: the camera pose of each query image, from retrieval and local features.

    python test.py                                    # dataset/camera, or the built-in sample
    python test.py --camera DIR --scenes A B --seed 7 # other scenes in the assignment's layout
    python test.py --camera DIR --scenes A --query photo.jpg  # the pose of new images in a scene
    python test.py --map kitchen.map --query photo.jpg        # the same in a map made before

scenes -> split -> retrieval -> map of the index -> localize every query (localization/) ->
result_pose_eval.txt.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset import CAMERA, locate
from eval import ImageFiles, compute_embeddings, load_image, search
from localization.atlas import Atlas, kept, key_of
from localization.cameras import Camera, default_camera, parse_convention
from localization.feature_cache import features_of_files
from localization.frames import IndoorDataset
from localization.lens_files import given_camera, image_sizes
from localization.matching import View
from localization.scenes import reorder_rows
from localization.structure import structure_of
from model import WARNINGS, InputError, choose_device, progress, refuse, warn
from recognition.recipes import load_any
from reporting import check, handin, report
from reporting.answers import answer, print_answers
from reporting.export import check_exports, write_exports
from reporting.pose_file import (
    pose_error,  # noqa: F401, offered from here by contract
    pose_text,
    poses_tsv,
    summarize_rows,
)
from reporting.poses import PosedFrames, write_pose_pictures
from reporting.scene_view import write_scene_views
from reporting.screen import always_printed, on_screen, phase, print_method_table, versions

QUERY_SHARE = 0.2
HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"


def split_frames(poses: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """The assignment's draw: rows of the queries and of the index. Frames without pose are queries too."""
    count = len(poses)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = max(1, int(QUERY_SHARE * count))
    unknown = [row for row in order[drawn:] if np.isnan(poses[row]).any()]
    queries = order[:drawn] + sorted(unknown)
    index = [row for row in order[drawn:] if row not in set(unknown)]
    if not index:
        raise InputError(f"of {count} frames none with a pose is left as index image: give more frames.")
    return queries, index


def read_gray(path: Path) -> torch.Tensor:
    """(H, W) float32 in 0..1 of an image file."""
    return torch.from_numpy(np.asarray(load_image(path).convert("L"), dtype=np.float32) / 255)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Estimate the camera poses of query images.")
    option = parser.add_argument
    option("--camera", type=Path, help="folder of the scenes (default: dataset/camera, or the sample)")
    option("--scenes", nargs="+", help="default: P001 P002 P003 P004, or all that are there")
    option("--seed", type=int, default=42, help="of the split into queries and index (default: 42)")
    option(
        "--checkpoint", type=Path, default=Path("output/checkpoints/netvlad_final.pth"),
        help="of base.py, or of train.py (default: %(default)s)",
    )  # fmt: skip
    option("--output", type=Path, default=Path("output"), help="default: %(default)s")
    option("--map", type=Path, metavar="FILE", help="keep the map of the index images in FILE; with --query, find the images in the map that is there")
    option("--top-k", type=int, default=30, help="index images that an unsure query is matched with, others with the first 12 of them (default: 30)")
    option("--convention", help='of pose.txt, e.g. "xyzw camera_to_world forward-right-down", tartanair, opencv, opengl (default: found out)')
    option("--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="in pixels, of all scenes (default: intrinsics.txt, or found out)")
    option("--query-intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="of the queries alone (default: the scene's, or found out)")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="find the poses of these images instead, from all frames of the scenes")
    option(
        "--export", nargs=2, action="append", default=[], metavar=("FORMAT", "PATH"),
        help="also write the map and the poses as a COLMAP model into the new folder PATH (colmap), or the poses into the new file PATH (tum, hloc); may be repeated",
    )  # fmt: skip
    option("--min-confidence", type=float, default=0.0, metavar="C", help="queries less sure than this, 0 to 1, count as not found (default: 0)")
    option("--quiet", action="store_true", help="print results and warnings only")
    option("--no-cache", action="store_true", help="neither read nor write .cache/")
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """InputError for a value that no run can use."""
    if args.top_k < 1:
        raise InputError(f"--top-k {args.top_k}: at least one index image must be matched with a query.")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: give a number from 0 to {2**63 - 1}.")
    for option, lens in (("--intrinsics", args.intrinsics), ("--query-intrinsics", args.query_intrinsics)):
        if lens and not (np.isfinite(lens).all() and min(lens[:2]) > 0):
            said = " ".join(f"{value:g}" for value in lens)
            raise InputError(f"{option} {said}: give finite numbers, the focal lengths positive.")
    if not 0 <= args.min_confidence <= 1:
        raise InputError(f"--min-confidence {args.min_confidence:g}: give a number from 0 to 1.")
    if args.convention:
        parse_convention(args.convention)
    handin.check_output(args.output)


def shipped_map(args: argparse.Namespace, checkpoint: str) -> Atlas | None:
    """The map in --map FILE that --query is to be found in without the scenes' images, if any.

    InputError if it was made with another network, or if an option asks for what it has of its own.
    """
    if not (args.query and args.map) or args.camera:
        return None
    if not args.map.exists():
        raise InputError(f"{args.map} does not exist: name a map, or with --camera the scenes to make it of.")
    for option, value in (("--scenes", args.scenes), ("--convention", args.convention), ("--intrinsics", args.intrinsics)):
        if value:
            raise InputError(f"{args.map} has what {option} says of its own: leave it out, or name the images with --camera.")
    atlas = Atlas.load(args.map)
    if atlas.checkpoint != checkpoint:
        raise InputError(f"{args.map} was made with another network: give its checkpoint (--checkpoint).")
    return atlas


def look_at(
    paths: list[Path], needed: list[int], model: torch.nn.Module, device: torch.device, folder: Path | None,
    seconds: dict, show: Callable,
) -> tuple[list[View], np.ndarray, list[int]]:  # fmt: skip
    """Views and descriptors of the images that can be read, and which these are; InputError if one
    of the `needed` cannot be.
    """
    files = ImageFiles(paths, model, spare_unreadable=True)
    with phase("descriptors", seconds):
        descriptors, _, _ = compute_embeddings(model, files, device)
    for k in sorted(files.unreadable.keys() & set(needed)):
        raise files.unreadable[k]
    readable = files.readable()
    # Many small tensors from here on: one thread an operation is faster than two that wait.
    torch.set_num_threads(1)
    with phase("local features", seconds):
        features = features_of_files([paths[k] for k in readable], read_gray, folder, partial(show, "local features"))
    return [View(found, default_camera(*size)) for found, size in features], descriptors[readable], readable


@dataclass
class Task:
    """The frames, the rows of them that are queries and index images, and the map if there is one yet.

    root: the scenes' folder, as of a map that was made before. file, key: where the map is kept, and
    what it depends on.
    """

    frames: IndoorDataset
    queries: list[int]
    index: list[int]
    atlas: Atlas | None
    root: Path
    is_sample: bool
    file: Path | None
    key: str = ""


def read_task(args: argparse.Namespace, checkpoint: str) -> Task:
    """The frames of the scenes or of a map, which of them are queries, and the map if it was made before."""
    for path in args.query or ():
        load_image(path, 1)
    atlas, is_sample = shipped_map(args, checkpoint), False
    if atlas:
        root, frames = atlas.root or args.map, IndoorDataset.of_map(atlas)
    else:
        place, is_sample = (None, False) if args.camera else locate(None, CAMERA)
        root = args.camera or place / "camera"
        frames = IndoorDataset(root, scenes=args.scenes)
    frames.camera = Camera(*args.intrinsics, 0, 0) if args.intrinsics else None
    frames.convention = parse_convention(args.convention) if args.convention else None
    queries: list[int] = []
    if args.query:
        index = np.flatnonzero(~np.isnan(frames.poses).any(axis=1)).tolist()
        if not index:
            raise InputError(f"no frame of {' '.join(frames.scenes)} has a pose: name scenes with known poses.")
    else:
        queries, index = split_frames(frames.poses, args.seed)
    task = Task(frames, queries, index, atlas, root, is_sample, args.map)
    if atlas is None:
        take_up_map(task, args, checkpoint)
    if args.query:
        task.queries = frames.add_queries(args.query)
    if args.query_intrinsics:
        for size in image_sizes([frames.frames[row][0] for row in task.queries]):
            given_camera("--query-intrinsics", args.query_intrinsics, size)
    return task


def take_up_map(task: Task, args: argparse.Namespace, checkpoint: str) -> None:
    """Give the task the map that was kept of these very index images, if there is one."""
    frames = task.frames
    said = (args.convention, args.intrinsics, args.seed, checkpoint, frames.files, frames.poses.tolist())
    task.key = key_of(said, [frames.frames[row] for row in task.index], [HERE / "model.py", HERE / "eval.py"])
    task.file = task.file or (CACHE / f"{task.key}.pt" if task.key and not args.no_cache else None)
    task.atlas = kept(task.file, task.key, bool(args.map))
    if task.atlas:
        reorder_rows(frames.poses, [scene for _, scene, _ in frames.frames], task.atlas.calibrations)
        task.index = [row for row in task.index if np.isfinite(frames.poses[row]).all()]


def localize(
    task: Task, args: argparse.Namespace, model: torch.nn.Module, device: torch.device, checkpoint: str,
    seconds: dict[str, float],
) -> tuple[list[dict], list[View]]:  # fmt: skip
    """What is known of each query (`answer`), and its view; makes the map unless there is one."""
    frames = task.frames
    with progress() as bar:

        part = ""

        def show(name: str, done: int, of: int) -> None:
            nonlocal part
            if name != part:  # the time left is of this part alone
                part = name
                bar.reset(total=of)
                bar.set_description(name, refresh=False)
            bar.n = done
            bar.refresh()

        looked = task.queries if task.atlas else list(range(len(frames)))
        paths, folder = [frames.frames[row][0] for row in looked], None if args.no_cache else CACHE
        needed = [k for k, row in enumerate(looked) if row in set(task.queries)]
        views, descriptors, readable = look_at(paths, needed, model, device, folder, seconds, show)
        if task.atlas is None:
            task.queries, task.index = frames.keep(readable, task.queries, task.index)
            if not task.index:
                raise InputError(f"no index image of {' '.join(frames.scenes)} can be read: replace them.")
            with phase("map", seconds):
                task.atlas = frames.atlas(task.index, views, descriptors, seed=args.seed, progress=show)
            task.atlas.key, task.atlas.checkpoint = task.key, checkpoint
            if task.file and task.key and len(readable) == len(looked):
                task.atlas.keep(task.file)
            elif args.map:
                warn(f"the map is not kept in {args.map}: not every image can be read.")
            views, descriptors = [views[row] for row in task.queries], descriptors[task.queries]
        similarity, best = search(descriptors, task.atlas.descriptors, 1)
        if args.query:
            frames.place_queries(task.queries, task.index, best)
        task.atlas.tell()
        with phase("poses", seconds):
            estimates = frames.localize(
                task.queries, task.atlas, views, descriptors, args.query_intrinsics,
                top_k=args.top_k, seed=args.seed, progress=show,
            )  # fmt: skip
    answers = [
        answer(frames, query, task.index[b], float(s), estimate, task.atlas.conventions)
        for query, b, s, estimate in zip(task.queries, best[:, 0], similarity[:, 0], estimates)
    ]
    return [{**row, "found": round(row["confidence"], 4) >= args.min_confidence} for row in answers], views


def run(args: argparse.Namespace) -> None:
    """All of task 4; raises InputError for bad input."""
    seconds: dict[str, float] = {}
    check_options(args)
    device = choose_device(args.device)
    checkpoint = handin.file_sha256(args.checkpoint) if args.checkpoint.is_file() else ""
    model = load_any(args.checkpoint)
    task = read_task(args, checkpoint)
    frames, counts = task.frames, f"{len(task.queries)} queries, {len(task.index)} index images"
    print(f"{len(frames)} frames of {' '.join(frames.scenes)}: {counts}.")
    images = [frame[:2] for frame in frames.frames]
    check_exports(args.export, frames.scenes, images, task.root, args.output, args.map)
    handin.claim_output(args.output)

    rows, views = localize(task, args, model, device, checkpoint, seconds)
    queries, index, atlas = task.queries, task.index, task.atlas
    paths, scenes, _ = zip(*frames.frames)
    views = dict(zip([*index, *queries], [*atlas.views, *views]))
    maps = [([index[k] for k in world.rows], world.map.views, world.map.points) for world in atlas.worlds]
    points = {row: of_view for numbers, _, of_views in maps for row, of_view in zip(numbers, of_views)}
    posed = PosedFrames(paths, scenes, frames.poses, views, queries, index, atlas.conventions)
    if args.query:
        with always_printed():
            print_answers(rows, posed.conventions)
            handin.write_text(args.output / "query_poses.tsv", poses_tsv(rows, args.min_confidence > 0))
            print(f"Written: {args.output / 'query_poses.tsv'}")
            export(args, posed, rows, maps, task.root)
        return
    handin.write_text(args.output / "result_pose_eval.txt", pose_text(rows, len(index)))
    handin.write_text(args.output / "estimated_poses.tsv", poses_tsv(rows, args.min_confidence > 0))
    with phase("pictures", seconds):
        pictures = write_pose_pictures(args.output, posed, rows, points)
        scene_views = handin.draw_or_warn(
            "report/scene_*.html", lambda: write_scene_views(args.output, posed, rows, structure_of(maps))
        )
    section = {
        "data": {"name": "built-in sample" if task.is_sample else str(task.root), "root": str(task.root), "is_sample": task.is_sample},
        "seed": args.seed, "scenes": frames.scenes, "queries": len(queries), "index": len(index),
        "not_found": sum(not row["found"] for row in rows),
        **summarize_rows(rows),
        "cameras": {scene: c.as_dict() for scene, c in atlas.calibrations.items()},
        "self_test": {" ".join(world.scenes): vars(world.map.test) for world in atlas.worlds},
        "per_query": rows, "pictures": pictures, "views": scene_views or [], "phases": seconds, "device": str(device), "versions": versions(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "warnings": WARNINGS,
    }  # fmt: skip
    with always_printed():
        finish(args, section)
        export(args, posed, rows, maps, task.root)
        mean_m, mean_deg = (section.get(mean, float("nan")) for mean in ("mean_m", "mean_deg"))
        print(f"Mean Pose Error: {mean_m:.4f}\nMean Rotation Error: {mean_deg:.2f} deg")


def export(args: argparse.Namespace, posed: PosedFrames, rows: list[dict], maps: list, root: Path) -> None:
    """Write what --export asks for, and say so."""
    for path in write_exports(args.export, posed, rows, structure_of(maps), root) if args.export else ():
        print(f"Exported: {path}")


def finish(args: argparse.Namespace, section: dict) -> None:
    """Write metrics, report and code copies; print the table of methods."""
    handin.update_metrics(args.output, "test", section, handin.file_sha256(args.checkpoint))
    handin.draw_or_warn("the copy of the code", lambda: handin.copy_code(HERE, args.output))
    handin.draw_or_warn("the report", lambda: report.write_report(args.output))
    print_method_table(section)
    if section["not_found"]:
        print(f"Not found, with a confidence below {args.min_confidence:g}: {section['not_found']} of {section['queries']} queries.")
    for line in check.missing(args.output):
        print(f"Still missing in {args.output}: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run task 4; 0, 2 for bad input, 130 when interrupted."""
    args = parse(argv)
    try:
        with on_screen(args.quiet):
            run(args)
    except InputError as error:
        return refuse("test.py", error)
    except KeyboardInterrupt:
        print("\nInterrupted: start again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
