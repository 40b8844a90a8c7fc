"""Task 4: the camera pose of each query image, from retrieval and local features.

    python test.py                                    # dataset/camera, or the built-in sample
    python test.py --camera DIR --scenes A B --seed 7 # other scenes in the assignment's layout
    python test.py --camera DIR --scenes A --query photo.jpg  # the pose of new images in a scene

scenes -> split -> retrieval -> localize every query (localization/) -> result_pose_eval.txt.
"""

import argparse
import hashlib
import itertools
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset import CAMERA, locate
from eval import TRANSFORM, embed, load_image, search
from localization import features as local_features
from localization.calibration import Calibration, calibrate
from localization.cameras import (
    Camera,
    Convention,
    default_camera,
    parse_convention,
    poses_from_file,
    poses_to_file,
    read_intrinsics,
    read_poses,
)
from localization.localize import Estimate, View, localize, share_world
from model import (
    WARNINGS,
    InputError,
    blame_input,
    choose_device,
    load_checkpoint,
    refuse,
    warn,
)
from reporting import handin, report
from reporting.poses import PosedFrames, write_pose_pictures
from reporting.screen import aloud, on_screen, phase, versions

ASSIGNED_SCENES = ("P001", "P002", "P003", "P004")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
QUERY_SHARE = 0.2
CACHE = Path(__file__).resolve().parent / ".cache"
THRESHOLDS = {"5cm/5deg": (0.05, 5), "25cm/2deg": (0.25, 2), "50cm/5deg": (0.5, 5)}


class IndoorDataset(Dataset):
    """Posed frames of scenes: item (image, pose float32 (7,), path, scene, frame index).

    base_dir: holds `<scene>/images/*.png` and `<scene>/pose.txt`, a line an image in sorted order;
    the shorter of the two rules. scenes: their names; None takes the assignment's four, or all that
    are there if one of them is missing. transform: applied to the RGB image; None leaves it a PIL
    image. `poses` holds the 7 numbers in float64, NaN where they were removed.
    Raises InputError for a scene that is not there, has no image or no readable pose.txt.
    """

    def __init__(
        self, base_dir: Path | str, transform: Callable | None = None,
        scenes: list[str] | None = None,
    ) -> None:  # fmt: skip
        base_dir = Path(base_dir)
        self.scenes = list(scenes) if scenes else find_scenes(base_dir)
        self.transform = transform
        self.frames: list[tuple[Path, str, int]] = []
        poses = []
        for scene in self.scenes:
            folder = base_dir / scene / "images"
            if not folder.is_dir():
                there = ", ".join(_scenes_in(base_dir)) or "none"
                raise InputError(f"{folder} is not there: the scenes under {base_dir} are: {there}.")
            paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not paths:
                raise InputError(f"{folder} holds no image (.png, .jpg): unpack the frames there.")
            with blame_input():
                rows = read_poses(base_dir / scene / "pose.txt", len(paths))
            if not len(rows):
                raise InputError(f"{base_dir / scene / 'pose.txt'} is empty: a line an image is needed.")
            self.frames += [(path, scene, i) for i, path in enumerate(paths[: len(rows)])]
            poses.append(rows)
        self.poses = np.concatenate(poses)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple:
        path, scene, frame = self.frames[i]
        image = load_image(path)
        image = self.transform(image) if self.transform else image
        return image, torch.tensor(self.poses[i], dtype=torch.float32), str(path), scene, frame


    def add_queries(self, paths: list[Path]) -> list[int]:
        """Append new images, whose scene and pose are unknown; -> their rows."""
        first = len(self.frames)
        self.frames += [(path, "", i) for i, path in enumerate(paths)]
        self.poses = np.concatenate([self.poses, np.full((len(paths), 7), np.nan)])
        return list(range(first, len(self.frames)))

    def place_queries(self, queries: list[int], index: list[int], descriptors: np.ndarray) -> None:
        """Give new images the scene of their most similar index image."""
        _, best = search(descriptors[queries], descriptors[index], 1)
        for row, (match,) in zip(queries, best):
            path, _, number = self.frames[row]
            self.frames[row] = (path, self.frames[index[match]][1], number)


def _scenes_in(base_dir: Path) -> list[str]:
    return sorted(p.name for p in base_dir.iterdir() if (p / "images").is_dir()) if base_dir.is_dir() else []


def find_scenes(base_dir: Path) -> list[str]:
    """The assignment's four scenes if all are there, else all found, saying so. InputError if none."""
    found = _scenes_in(base_dir)
    if set(ASSIGNED_SCENES) <= set(found):
        return list(ASSIGNED_SCENES)
    if not found:
        deeper = next(base_dir.glob("*/*/images"), None)
        hint = f", but there is {deeper.parent}: name {deeper.parents[1]}" if deeper else ""
        raise InputError(f"{base_dir} holds no scene (<scene>/images/, <scene>/pose.txt){hint}.")
    print(f"Scenes: not all of {' '.join(ASSIGNED_SCENES)} are in {base_dir}; taking {' '.join(found)}.")
    return found


def pose_error(pose_a: np.ndarray, pose_b: np.ndarray) -> tuple[float, float]:
    """Distance in meters and angle in degrees of two camera-to-world poses `tx ty tz` + quaternion.

    Both (7,), as they stand in a file; the quaternions may be in any order (the same for both), of
    any length and sign. The angle is 2 atan2(|v|, |w|) of q_a^-1 q_b, in float64: |w| is |q_a . q_b|
    and |v| the length of what of q_b is orthogonal to q_a. NaN in, NaN out.
    """
    a, b = (np.asarray(pose, dtype=np.float64) for pose in (pose_a, pose_b))
    q_a, q_b = (pose[3:] / np.linalg.norm(pose[3:]) for pose in (a, b))
    w = q_a @ q_b
    angle = 2 * np.arctan2(np.linalg.norm(q_b - w * q_a), abs(w))
    return float(np.linalg.norm(a[:3] - b[:3])), float(np.degrees(angle))


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


class _Paths(Dataset):
    """(image, index, path) of an IndoorDataset, as `embed` wants it."""

    def __init__(self, frames: IndoorDataset) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple:
        image, _, path, _, _ = self.frames[i]
        return image, i, path


def read_gray(path: Path) -> torch.Tensor:
    """(H, W) float32 in 0..1 of an image file."""
    return torch.from_numpy(np.asarray(load_image(path).convert("L"), dtype=np.float32) / 255)


def extract(path: Path, device: torch.device, use_cache: bool) -> tuple[local_features.Features, tuple[int, int]]:
    """Local features of an image and its (width, height), from `.cache/` where they are known.

    The key is made of the pixels and of the source of features.py, which holds all settings.
    """
    gray = read_gray(path)
    size = (gray.shape[1], gray.shape[0])
    if not use_cache:
        return local_features.extract_features(gray.to(device)), size
    key = hashlib.sha256(Path(local_features.__file__).read_bytes())
    key.update(repr((size, device.type)).encode() + gray.numpy().tobytes())
    file = CACHE / f"{key.hexdigest()[:32]}.pt"
    if file.exists():
        try:
            return local_features.Features(**torch.load(file, map_location=device, weights_only=True)), size
        except (RuntimeError, EOFError, TypeError, pickle.UnpicklingError):  # cut short: as good as none
            file.unlink()
    found = local_features.extract_features(gray.to(device))
    with blame_input():
        handin.write_whole(file, lambda part: torch.save(vars(found), part))
    return found, size


def scene_camera(camera_dir: Path, scene: str, size: tuple[int, int], given: list[float] | None) -> tuple[Camera, bool]:
    """The camera of a scene and whether it is known: --intrinsics, its intrinsics.txt, or a first guess."""
    file = camera_dir / scene / "intrinsics.txt"
    if given is None and file.exists():
        with blame_input():
            given = read_intrinsics(file)
    if given is None:
        return default_camera(*size), False
    return Camera(*given, *size), True


def resized(camera: Camera, width: int, height: int) -> Camera:
    """A camera's lens on an image of another size: the focal lengths go with the longer side."""
    if (width, height) == (camera.width, camera.height):
        return camera
    scale = max(width, height) / max(camera.width, camera.height)
    center = (camera.cx + 0.5) * width / camera.width - 0.5, (camera.cy + 0.5) * height / camera.height - 0.5
    return Camera(camera.fx * scale, camera.fy * scale, *center, width, height)


def build_views(
    frames: IndoorDataset, device: torch.device, camera_dir: Path, args: argparse.Namespace
) -> tuple[list[View], dict[str, bool]]:
    """A view without pose for each frame, its camera known or guessed; scene -> camera known."""
    views, known = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = [path for path, _, _ in frames.frames]
        found = pool.map(lambda path: extract(path, device, not args.no_cache), paths)
        bar = tqdm(found, "local features", len(paths), unit="image", leave=False)
        for (features, size), (_, scene, _) in zip(bar, frames.frames):
            camera, known[scene] = scene_camera(camera_dir, scene, size, args.intrinsics)
            views.append(View(features, camera, None, None))
    return views, known


def calibrate_scenes(
    frames: IndoorDataset, views: list[View], index: list[int], known: dict[str, bool],
    convention: Convention | None,
) -> dict[str, Calibration]:  # fmt: skip
    """Convention and camera of each scene, found from its index images; printed, a line each."""

    def find_out(scene: str) -> Calibration:
        rows = [row for row in index if frames.frames[row][1] == scene]
        camera = next(v.camera for v, f in zip(views, frames.frames) if f[1] == scene)
        return calibrate([views[row] for row in rows], frames.poses[rows], camera, known[scene], convention)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(frames.scenes, pool.map(find_out, frames.scenes)))
    for scene, calibration in found.items():
        print(f"Camera of {scene}: {calibration.describe()}")
    return found


def worlds_of(
    frames: IndoorDataset, views: list[View], index: list[int], similarity: np.ndarray
) -> list[list[str]]:
    """Scenes grouped by the world they share, as far as their index images prove it."""
    scene_of = np.array([frames.frames[row][1] for row in index])

    def share(scenes: tuple[str, str]) -> bool:
        rows, columns = (np.flatnonzero(scene_of == scene) for scene in scenes)
        if not (len(rows) and len(columns)):
            return False
        ranked = np.argsort(-similarity[np.ix_(rows, columns)], axis=None, kind="stable")
        return share_world((views[index[rows[i // len(columns)]]], views[index[columns[i % len(columns)]]]) for i in ranked)

    couples = list(itertools.combinations(frames.scenes, 2))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = list(pool.map(share, couples))
    worlds = [[scene] for scene in frames.scenes]
    for first, second in itertools.compress(couples, shared):
        joined = [world for world in worlds if first in world or second in world]
        rest = [world for world in worlds if world not in joined]
        worlds = [*rest, [scene for world in joined for scene in world]]
        print(f"Scenes {first} and {second} share one world: their index images match.")
    return worlds


def localize_all(
    frames: IndoorDataset, views: list[View], queries: list[int], index: list[int],
    descriptors: np.ndarray, args: argparse.Namespace,
) -> dict[int, Estimate]:  # fmt: skip
    """An estimate for each query row that has an index image in its world."""
    gram = descriptors[index] @ descriptors[index].T
    found: dict[int, Estimate] = {}
    for world in worlds_of(frames, views, index, gram):
        index_rows = [row for row in index if frames.frames[row][1] in world]
        query_rows = [row for row in queries if frames.frames[row][1] in world]
        if not index_rows or not query_rows:
            continue
        similarity, ranking = search(descriptors[query_rows], descriptors[index_rows], args.top_k)
        with tqdm(unit="image", leave=False) as bar:

            def progress(name: str, done: int, of: int, bar: tqdm = bar, world: list[str] = world) -> None:
                bar.set_description(f"{' '.join(world)}: {name}", refresh=False)
                bar.n, bar.total = done, of
                bar.refresh()

            estimates = localize(
                [views[row] for row in index_rows], [views[row] for row in query_rows],
                list(ranking), list(similarity), seed=args.seed, progress=progress,
            )  # fmt: skip
        found.update(zip(query_rows, estimates))
    return found


def as_camera_to_world(pose7: np.ndarray, convention: Convention) -> np.ndarray:
    """(7,) in the same convention but for the direction, which becomes camera to world."""
    turned = replace(convention, direction="camera_to_world")
    return poses_to_file(*poses_from_file(pose7[None], convention), turned)[0].numpy()


def summarize(errors: np.ndarray) -> dict:
    """Means, medians and shares within THRESHOLDS of errors (n, 2) in meters and degrees; NaN-safe."""
    known = errors[~np.isnan(errors).any(axis=1)]
    if not len(known):
        return {}
    mean, median = known.mean(axis=0), np.median(known, axis=0)
    within = {k: float((known < limit).all(axis=1).mean()) for k, limit in THRESHOLDS.items()}
    return {
        "mean_m": float(mean[0]), "mean_deg": float(mean[1]),
        "median_m": float(median[0]), "median_deg": float(median[1]), "within": within,
    }  # fmt: skip


def pose_text(rows: list[dict], index_count: int) -> str:
    """The assignment's result_pose_eval.txt."""
    blocks = [f"Top-1 retrieval pose evaluation\n(queries={len(rows)}, index={index_count})\n\n"]
    for row in rows:
        blocks.append(
            f"Query: {row['path']}\nBest Match: {row['best_match']}\n"
            f"Embed Dist: {row['embed_dist']:.4f}\n"
            f"Translation Error: {row['error_m']:.4f} m, Rotation Error: {row['error_deg']:.2f} deg\n\n"
        )
    return "".join(blocks)


def poses_tsv(rows: list[dict]) -> str:
    """estimated_poses.tsv: path, 7 numbers in the scene's own convention, how they were found."""
    lines = ["path\ttx\tty\ttz\tq1\tq2\tq3\tq4\tmethod\tinliers\tsigma_m\tsigma_deg\tconfidence"]
    for row in rows:
        numbers = "\t".join(f"{v:.9f}" for v in row["pose"])
        lines.append(
            f"{row['path']}\t{numbers}\t{row['method']}\t{row['inliers']}\t{row['sigma_m']:.5f}\t"
            f"{row['sigma_deg']:.5f}\t{row['confidence']:.4f}"
        )
    return "\n".join(lines) + "\n"


def answer(
    frames: IndoorDataset, query: int, match: int, similarity: float, estimate: Estimate | None,
    conventions: dict[str, Convention],
) -> dict:  # fmt: skip
    """All that is known of one query: its estimate in the scene's own convention, and the errors."""
    path, scene, _ = frames.frames[query]
    convention = conventions[scene]
    retrieved = frames.poses[match]
    if estimate is None:
        warn(f"{scene} has no index image left: {path.name} is answered by retrieval from elsewhere.")
        R, c = poses_from_file(retrieved[None], conventions[frames.frames[match][1]])
        estimate = Estimate(R[0], c[0], "retrieval", 0, float("nan"), float("nan"), 0.0)
    pose = poses_to_file(estimate.R_world_from_cam[None].cpu(), estimate.c_world[None].cpu(), convention)
    truth = as_camera_to_world(frames.poses[query], convention)
    error = pose_error(as_camera_to_world(pose[0].numpy(), convention), truth)
    alone = pose_error(as_camera_to_world(retrieved, conventions[frames.frames[match][1]]), truth)
    return {
        "path": str(path), "scene": scene, "best_match": str(frames.frames[match][0]),
        "embed_dist": float(np.sqrt(max(0.0, 2 - 2 * similarity))),
        "error_m": error[0], "error_deg": error[1], "retrieval_m": alone[0], "retrieval_deg": alone[1],
        "method": estimate.method, "inliers": estimate.inliers, "sigma_m": estimate.sigma_m,
        "sigma_deg": estimate.sigma_deg, "confidence": estimate.confidence, "pose": pose[0].tolist(),
    }  # fmt: skip


def tell_poses(rows: list[dict], conventions: dict[str, Convention], file: Path) -> None:
    """Print the poses of new images and write them to `file`."""
    for row in rows:
        print(
            f"{row['path']}: in scene {row['scene']}, most like {row['best_match']}\n"
            f"  {' '.join(f'{v:.6f}' for v in row['pose'])}  ({conventions[row['scene']].describe()})\n"
            f"  method {row['method']}, {row['inliers']} inliers, standard deviations {row['sigma_m']:.4f} m "
            f"{row['sigma_deg']:.3f} deg, confidence {row['confidence']:.2f}"
        )
    text = poses_tsv(rows)
    handin.write_whole(file, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    print(f"Written: {file}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Estimate the camera poses of query images.")
    option = parser.add_argument
    option("--camera", type=Path, help="folder of the scenes (default: dataset/camera, or the sample)")
    option("--scenes", nargs="+", help="default: P001 P002 P003 P004, or all that are there")
    option("--seed", type=int, default=42, help="of the split into queries and index (default: 42)")
    option(
        "--checkpoint", type=Path, default=Path("output/checkpoints/netvlad_final.pth"),
        help="state dict that base.py wrote (default: %(default)s)",
    )  # fmt: skip
    option("--output", type=Path, default=Path("output"), help="default: %(default)s")
    option("--top-k", type=int, default=30, help="index images matched with a query (default: 30)")
    option("--convention", help='of pose.txt, e.g. "xyzw camera_to_world forward-right-down", tartanair, opencv, opengl (default: found out)')
    option("--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="in pixels, of all scenes (default: intrinsics.txt, or found out)")
    option("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
    option("--query", type=Path, nargs="+", metavar="IMAGE", help="find the poses of these images instead, from all frames of the scenes")
    option("--quiet", action="store_true", help="print results and warnings only")
    option("--no-cache", action="store_true", help="neither read nor write .cache/")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """All of task 4; raises InputError for bad input."""
    seconds: dict[str, float] = {}
    device = choose_device(args.device)
    with blame_input():
        handin.write_whole(args.output / ".writable", lambda path: path.touch())
        (args.output / ".writable").unlink()
        convention = parse_convention(args.convention) if args.convention else None
        root, is_sample = (None, False) if args.camera else locate(None, CAMERA)
    camera_dir = args.camera or root / "camera"
    frames = IndoorDataset(camera_dir, TRANSFORM, args.scenes)
    model = load_checkpoint(args.checkpoint)
    if args.query:
        index = np.flatnonzero(~np.isnan(frames.poses).any(axis=1)).tolist()
        if not index:
            raise InputError(f"no frame of {' '.join(frames.scenes)} has a pose: name scenes with known poses.")
        queries = frames.add_queries(args.query)
    else:
        queries, index = split_frames(frames.poses, args.seed)
    print(f"{len(frames)} frames of {' '.join(frames.scenes)}: {len(queries)} queries, {len(index)} index images.")

    with phase("descriptors", seconds):
        (descriptors,), _, _ = embed([model], _Paths(frames), device)
    if args.query:
        frames.place_queries(queries, index, descriptors)
    # Many small tensors from here on: one thread an operation is faster than two that wait.
    torch.set_num_threads(1)
    with phase("local features", seconds):
        views, known = build_views(frames, device, camera_dir, args)
    with phase("cameras", seconds):
        calibrations = calibrate_scenes(frames, views, index, known, convention)
        conventions = {scene: c.convention for scene, c in calibrations.items()}
        for row, (_, scene, _) in enumerate(frames.frames):
            own = views[row].camera
            views[row].camera = resized(calibrations[scene].camera, own.width, own.height)
        for row in index:
            R, c = poses_from_file(frames.poses[row : row + 1], conventions[frames.frames[row][1]])
            views[row].R_world_from_cam, views[row].c_world = R[0].to(device), c[0].to(device)
    with phase("poses", seconds):
        estimates = localize_all(frames, views, queries, index, descriptors, args)

    similarity, best = search(descriptors[queries], descriptors[index], 1)
    rows = [
        answer(frames, query, index[b], float(s), estimates.get(query), conventions)
        for query, b, s in zip(queries, best[:, 0], similarity[:, 0])
    ]
    if args.query:
        with blame_input(), aloud():
            tell_poses(rows, conventions, args.output / "query_poses.tsv")
        return
    with phase("pictures", seconds), blame_input():
        paths, scenes, _ = zip(*frames.frames)
        posed = PosedFrames(paths, scenes, frames.poses, views, queries, index, conventions)
        pictures = write_pose_pictures(args.output, posed, rows)
    ours = np.array([[row["error_m"], row["error_deg"]] for row in rows])
    retrieval = np.array([[row["retrieval_m"], row["retrieval_deg"]] for row in rows])
    methods = {}
    for method in sorted({row["method"] for row in rows}):
        part = ours[[row["method"] == method for row in rows]]
        methods[method] = {"count": len(part), **{k: v for k, v in summarize(part).items() if k.startswith("median")}}
    section = {
        "data": {"name": "built-in sample" if is_sample else str(camera_dir), "root": str(camera_dir), "is_sample": is_sample},
        "seed": args.seed, "scenes": frames.scenes, "queries": len(queries), "index": len(index),
        **summarize(ours), "retrieval": summarize(retrieval), "methods": methods,
        "cameras": {scene: c.as_dict() for scene, c in calibrations.items()},
        "per_query": rows, "pictures": pictures, "phases": seconds, "device": str(device), "versions": versions(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "warnings": WARNINGS,
    }  # fmt: skip
    mean_m, mean_deg = (float(np.nanmean(column)) if np.isfinite(column).any() else float("nan") for column in ours.T)
    with blame_input(), aloud():
        finish(args, section)
        print(f"Mean Pose Error: {mean_m:.4f}\nMean Rotation Error: {mean_deg:.2f} deg")


def finish(args: argparse.Namespace, section: dict) -> None:
    """Write the result files, metrics, report and code copies; print the table of methods."""
    rows = section["per_query"]
    texts = {
        "result_pose_eval.txt": pose_text(rows, section["index"]),
        "estimated_poses.tsv": poses_tsv(rows),
    }
    for name, text in texts.items():
        handin.write_whole(args.output / name, lambda path, text=text: path.write_text(text, encoding="utf-8", newline="\n"))
    handin.update_metrics(args.output, "test", section, handin.file_sha256(args.checkpoint))
    report.write_report(args.output)
    handin.copy_code(Path(__file__).resolve().parent, args.output)
    print(f"\n{'method':32s}{'queries':>8s}{'median m':>10s}{'median deg':>12s}")
    table = {**section["methods"], "all": {"count": len(rows), **section}, "top-1 retrieval alone": {"count": len(rows), **section["retrieval"]}}
    for name, line in table.items():
        print(f"{name:32s}{line['count']:8d}{line.get('median_m', np.nan):10.4f}{line.get('median_deg', np.nan):12.3f}")
    for line in handin.missing(args.output):
        print(f"Still missing in {args.output}: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run task 4; 0, or 2 for bad input."""
    args = parse(argv)
    try:
        with on_screen(args.quiet):
            run(args)
    except InputError as error:
        return refuse("test.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
