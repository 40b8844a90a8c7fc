"""What is known of each query of task 4: as metrics.json keeps it ("per_query"), and in print."""

import math
from collections.abc import Mapping, Sequence

from localization.cameras import Convention, as_camera_to_world, poses_from_file, poses_to_file
from localization.frames import IndoorDataset
from localization.localize import Estimate
from model import warn
from reporting.pose_file import pose_error


def answer(
    frames: IndoorDataset,
    query: int,
    match: int,
    similarity: float,
    estimate: Estimate | None,
    conventions: Mapping[str, Convention],
) -> dict:
    """All that is known of the query in row `query`: its estimate as its scene's file has poses, its
    errors, and those of retrieval alone.

    match: row of the index image most similar to it, whose pose it gets without an estimate.
    """
    (path, scene, _), (matched, elsewhere, _) = frames.frames[query], frames.frames[match]
    convention, retrieved = conventions[scene], frames.poses[match]
    if estimate is None:
        warn(
            f"{scene} has no index image left: {path.name} is answered by retrieval from elsewhere."
        )
        R, c = poses_from_file(retrieved[None], conventions[elsewhere])
        estimate = Estimate(R[0], c[0], "retrieval", 0, math.nan, math.nan, 0.0)
    (pose,) = poses_to_file(
        estimate.R_world_from_cam[None], estimate.c_world[None], convention
    ).numpy()
    truth = as_camera_to_world(frames.poses[query], convention)
    error = pose_error(as_camera_to_world(pose, convention), truth)
    alone = pose_error(as_camera_to_world(retrieved, conventions[elsewhere]), truth)
    return {
        "path": str(path),
        "scene": scene,
        "best_match": str(matched),
        "embed_dist": math.sqrt(max(0.0, 2 - 2 * similarity)),
        "error_m": error[0],
        "error_deg": error[1],
        "retrieval_m": alone[0],
        "retrieval_deg": alone[1],
        "method": estimate.method,
        "inliers": estimate.inliers,
        "sigma_m": estimate.sigma_m,
        "sigma_deg": estimate.sigma_deg,
        "confidence": estimate.confidence,
        "pose": pose.tolist(),
        "lens": estimate.camera and estimate.camera.describe(),
    }


def print_answers(rows: Sequence[dict], conventions: Mapping[str, Convention]) -> None:
    """Print the poses of new images; rows: their answers, and whether each counts as "found"."""
    for row in rows:
        print(
            f"{row['path']}: in scene {row['scene']}, most like {row['best_match']}\n"
            f"  {' '.join(f'{v:.6f}' for v in row['pose'])}  ({conventions[row['scene']].describe()})\n"
            f"  method {row['method']}, {row['inliers']} inliers, standard deviations "
            f"{row['sigma_m']:.4f} m {row['sigma_deg']:.3f} deg, confidence {row['confidence']:.2f}"
            + ("" if row["found"] else ": not found, less than --min-confidence")
            + (f"\n  taken with a lens of its own: {row['lens']}" if row["lens"] else "")
        )
