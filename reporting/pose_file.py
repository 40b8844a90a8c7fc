"""result_pose_eval.txt, as the assignment has it: written, read back, and summed up.

Beside it estimated_poses.tsv, which holds the poses themselves.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from model import InputError

LIMITS = {"5cm/5deg": (0.05, 5.0), "25cm/2deg": (0.25, 2.0), "50cm/5deg": (0.5, 5.0)}  # m, degrees
# The grammar: what a line should look like, and the expression that it matches.
HEAD = (
    ("Top-1 retrieval pose evaluation", "Top-1 retrieval pose evaluation"),
    ("(queries=N, index=M)", r"\(queries=(\d+), index=(\d+)\)"),
    ("", ""),
)
ENTRY = (
    ("Query: <path>", "Query: (.+)"),
    ("Best Match: <path>", "Best Match: (.+)"),
    ("Embed Dist: <4 decimals>", r"Embed Dist: (\d+\.\d{4})"),
    (
        "Translation Error: <4 decimals> m, Rotation Error: <2 decimals> deg",
        r"Translation Error: (\d+\.\d{4}|nan) m, Rotation Error: (\d+\.\d{2}|nan) deg",
    ),
    ("", ""),
)
KEYS = ("path", "best_match", "embed_dist", "error_m", "error_deg")  # of an entry
TSV_HEADER = "path\ttx\tty\ttz\tq1\tq2\tq3\tq4\tmethod\tinliers\tsigma_m\tsigma_deg\tconfidence"


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


def pose_text(rows: Sequence[dict], index_count: int) -> str:
    """result_pose_eval.txt of all queries, `rows` as "per_query" in metrics.json; None is nan."""
    blocks = [f"Top-1 retrieval pose evaluation\n(queries={len(rows)}, index={index_count})\n\n"]
    for row in rows:
        error_m, error_deg = (
            float("nan") if row[key] is None else row[key] for key in ("error_m", "error_deg")
        )
        blocks.append(
            f"Query: {one_line(row['path'])}\nBest Match: {one_line(row['best_match'])}\n"
            f"Embed Dist: {row['embed_dist']:.4f}\n"
            f"Translation Error: {error_m:.4f} m, Rotation Error: {error_deg:.2f} deg\n\n"
        )
    return "".join(blocks)


def read_pose_text(text: str) -> list[dict]:
    """The rows of a result_pose_eval.txt, with the keys and units that pose_text takes.

    InputError naming the first line that is not, to the letter, as the assignment has it.
    """
    lines = text.split("\n")
    if lines.pop():
        raise InputError("its last line does not end")
    fields = []
    for number, line in enumerate(lines):
        after = number - len(HEAD)
        shape, pattern = HEAD[number] if after < 0 else ENTRY[after % len(ENTRY)]
        match = re.fullmatch(pattern, line)
        if not match:
            raise InputError(f"line {number + 1} is {line[:60]!r}, not {shape!r}")
        fields.append(match.groups())
    entries = fields[len(HEAD) :]
    if len(fields) < len(HEAD) or len(entries) % len(ENTRY):
        raise InputError(f"it ends after {len(lines)} lines in the middle of an entry")
    rows = []
    for start in range(0, len(entries), len(ENTRY)):
        query, match, *numbers = itertools.chain(*entries[start : start + len(ENTRY)])
        rows.append(dict(zip(KEYS, (query, match, *map(float, numbers)))))
    if int(fields[1][0]) != len(rows):
        raise InputError(f"it announces {fields[1][0]} queries and holds {len(rows)}")
    return rows


def poses_tsv(rows: Sequence[dict], with_found: bool = False) -> str:
    """estimated_poses.tsv: path, 7 numbers in the scene's own convention, how they were found.

    with_found: and a column that says `found` or, of a query too unsure for --min-confidence,
    `not found`.
    """
    lines = [TSV_HEADER + "\tfound" * with_found]
    for row in rows:
        cells = [one_line(row["path"]), *(f"{value:.9f}" for value in row["pose"])]
        cells += [row["method"], str(row["inliers"]), f"{row['sigma_m']:.5f}"]
        cells += [f"{row['sigma_deg']:.5f}", f"{row['confidence']:.4f}"]
        cells += ["found" if row["found"] else "not found"] * with_found
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def one_line(path: str) -> str:
    r"""A path as it is written: control characters and what no Unicode is as escapes (\n, \udcff)."""
    return "".join(
        sign.encode("unicode_escape").decode()
        if unicodedata.category(sign) in ("Cc", "Cs")
        else sign
        for sign in str(path)
    )


def summarize(errors: np.ndarray) -> dict:
    """Means, medians and the shares below LIMITS, of errors (n, 2) in meters and degrees.

    Rows with a NaN are left out; {} if none is left.
    """
    errors = np.asarray(errors, dtype=float).reshape(-1, 2)
    known = errors[~np.isnan(errors).any(axis=1)]
    if not len(known):
        return {}
    summary = {}
    for kind, (error_m, error_deg) in (
        ("mean", known.mean(axis=0)),
        ("median", np.median(known, axis=0)),
    ):
        summary |= {f"{kind}_m": float(error_m), f"{kind}_deg": float(error_deg)}
    within = {name: float((known < limit).all(axis=1).mean()) for name, limit in LIMITS.items()}
    return {**summary, "within": within}


def summarize_rows(rows: Sequence[dict]) -> dict:
    """`summarize` of queries, of retrieval alone, and medians by method; rows as "per_query"."""
    ours = np.array([[row["error_m"], row["error_deg"]] for row in rows])
    retrieval = np.array([[row["retrieval_m"], row["retrieval_deg"]] for row in rows])
    methods = {}
    for method in sorted({row["method"] for row in rows}):
        part = summarize(ours[[row["method"] == method for row in rows]])
        medians = {name: value for name, value in part.items() if name.startswith("median")}
        methods[method] = {"count": sum(row["method"] == method for row in rows), **medians}
    return {**summarize(ours), "retrieval": summarize(retrieval), "methods": methods}
