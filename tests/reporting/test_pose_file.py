"""The pose file: writer and reader agree to the letter, faults are named, errors are summed up."""

import numpy as np
import pytest

from model import InputError
from reporting import pose_file

ROWS = [
    {
        "path": "dataset/camera/P001/images/000003.png",
        "best_match": "dataset/camera/P001/images/000004.png",
        "embed_dist": 0.51264,
        "error_m": 0.01234,
        "error_deg": 0.1,
    },
    {
        "path": "dataset/camera/P002/images/방 é.png",
        "best_match": "dataset/camera/P002/images/000001.png",
        "embed_dist": 1.0,
        "error_m": float("nan"),
        "error_deg": None,
    },
]
TEXT = """Top-1 retrieval pose evaluation
(queries=2, index=7)

Query: dataset/camera/P001/images/000003.png
Best Match: dataset/camera/P001/images/000004.png
Embed Dist: 0.5126
Translation Error: 0.0123 m, Rotation Error: 0.10 deg

Query: dataset/camera/P002/images/방 é.png
Best Match: dataset/camera/P002/images/000001.png
Embed Dist: 1.0000
Translation Error: nan m, Rotation Error: nan deg

"""


def test_the_text_is_the_assignments():
    assert pose_file.pose_text(ROWS, 7) == TEXT
    assert pose_file.pose_text([], 7).count("\n") == 3


def test_what_was_written_is_read():
    first, second = pose_file.read_pose_text(TEXT)
    rounded = {"embed_dist": 0.5126, "error_m": 0.0123, "error_deg": 0.10}
    assert first == {**ROWS[0], **rounded}
    assert (
        second["path"] == ROWS[1]["path"]
        and np.isnan([second["error_m"], second["error_deg"]]).all()
    )
    assert pose_file.read_pose_text(pose_file.pose_text([], 3)) == []


@pytest.mark.parametrize("path", ["a\nb.png", "a\tb.png", "\udcff.png", "a\r.png", "a\x85.png"])
def test_a_path_that_would_break_the_lines_is_escaped(path):
    row = {**ROWS[0], "path": path, "pose": [0.0] * 7, "method": "pnp", "inliers": 3}
    row |= {"sigma_m": 0.1, "sigma_deg": 0.2, "confidence": 0.5, "found": False}
    text = pose_file.pose_text([row], 7)
    text.encode("utf-8")
    (entry,) = pose_file.read_pose_text(text)
    assert "\\" in entry["path"] and entry["path"].endswith(".png")
    header, line, end = pose_file.poses_tsv([row]).split("\n")
    assert header.count("\t") == line.count("\t") == 12 and end == ""
    header, line, end = pose_file.poses_tsv([row], with_found=True).split("\n")
    assert header.count("\t") == line.count("\t") == 13 and end == ""
    assert header.endswith("\tfound") and line.endswith("\t0.5000\tnot found")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("Top-1 retrieval", "Top-1  retrieval", "line 1"),
        ("queries=2", "queries=3", "announces 3 queries and holds 2"),
        ("index=7)\n", "index=7)", "line 3"),
        ("Query: ", "Query:", "line 4"),
        ("0.0123 m", "0.012 m", "line 7"),
        ("0.10 deg", "0.1 deg", "line 7"),
        ("nan deg\n\n", "nan deg\n", "in the middle"),
        ("nan deg\n\n", "nan deg\n\n\n", "line 14"),
        ("nan deg\n\n", "nan deg", "last line"),
        ("\n", "\r\n", "line 1"),
    ],
)
def test_what_is_not_to_the_letter_is_named(old, new, named):
    with pytest.raises(InputError, match=named):
        pose_file.read_pose_text(TEXT.replace(old, new))


def test_summary_by_hand():
    nan = float("nan")
    errors = [[0.04, 4.0], [0.05, 1.0], [0.2, 1.0], [0.3, 6.0], [nan, nan]]
    assert pose_file.summarize(np.array(errors)) == {
        "mean_m": pytest.approx(0.1475),
        "mean_deg": pytest.approx(3.0),
        "median_m": pytest.approx(0.125),
        "median_deg": pytest.approx(2.5),
        # Strictly below both limits, of the four known ones.
        "within": {"5cm/5deg": 0.25, "25cm/2deg": 0.5, "50cm/5deg": 0.75},
    }
    assert pose_file.summarize(np.array(errors[4:])) == {}
    assert pose_file.summarize(np.zeros((0, 2))) == {}
