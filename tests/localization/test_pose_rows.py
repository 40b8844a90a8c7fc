"""Pose files that cannot be read: one sentence each, that names file and line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from localization.pose_files import read_scene
from model import InputError
from tests.localization.test_pose_files import (
    COUNT,
    LINES,
    MATRICES,
    NAMES,
    make_scene,
    words,
    write,
)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return make_scene(tmp_path / "P001", NAMES)


BAD = {
    "six numbers": ("1 2 3 0 0 0", r"line 2\b.*\b6 columns where 7"),
    "eight numbers": ("1 2 3 0 0 0 1 9", r"line 2\b.*\b8 columns where 7"),
    "a word": ("1 2 x 0 0 0 1", r"line 2\b.*not a number.*'x'"),
    "digits with underscores": ("1 2 1_0 0 0 0 1", r"line 2\b.*not a number"),
    "no quaternion": ("1 2 3 0 0 0 0", r"line 2\b.*quaternion is zero"),
    "one infinite value": ("1 2 inf 0 0 0 1", r"line 2\b.*not finite"),
    "one unknown value": ("1 2 nan 0 0 0 1", r"line 2\b.*not finite"),
}
BAD["a position nowhere"] = ("1e200 2 3 0 0 0 1", r"line 2\b.*no position is 1e\+200")
BAD_FILES = {
    "all of six": (
        [line.rsplit(" ", 1)[0] for line in LINES],
        r"line 1\b.*6 columns where 7 are needed",
    ),
    "decimal commas": (
        [line.replace(".", ",") for line in LINES],
        r"line 1\b.*decimal points; write points",
    ),
    "numbers of other frames": (
        [f"{i + 1} {v}" for i, v in enumerate(LINES)],
        r"line 1\b.*'1' stands.*remove",
    ),
    "names of other pictures": (
        [f"x{i}.png {v}" for i, v in enumerate(LINES)],
        r"'x0.png' stands.*remove",
    ),
    "a name twice": ([f"{NAMES[0]} {v}" for v in LINES], r"has \d poses of '000000"),
    "mirrored matrices": (
        [words((m[:3] * [[-1], [1], [1]]).ravel()) for m in MATRICES],
        "line 1.*mirrors",
    ),
    "matrices by columns": ([words(m.T.ravel()) for m in MATRICES], "line 1.*by rows"),
    "blocks cut short": ([words(r) for m in MATRICES for r in m][:-1], "23 rows of four"),
    "nothing": ([], "has no line of numbers"),
    "comments": (["# tx ty tz"], "has no line of numbers"),
    "numbers with names": (["tx=1 ty=2 tz=3 qx=0 qy=0 qz=0 qw=1"] * COUNT, "has no line of numbers"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_FILES])
def test_what_cannot_be_read_is_one_sentence(name, scene):
    lines, says = BAD_FILES.get(name) or ([LINES[0], BAD[name][0], *LINES[2:]], BAD[name][1])
    write(scene, lines)
    with pytest.raises(InputError) as error:
        read_scene(scene)
    sentence = str(error.value)
    assert re.search(says, sentence) and "pose.txt" in sentence and "\n" not in sentence


@pytest.mark.parametrize("step", [1, 10])
def test_a_count_from_one_is_not_paired_with_names_that_count_from_zero(step, tmp_path):
    names = [f"{step * i}.png" for i in range(COUNT)]
    lines = [f"{step * i + 1} {line}" for i, line in enumerate(LINES)]
    with pytest.raises(InputError, match=r"line 1: '1' stands .*remove"):
        read_scene(make_scene(tmp_path / "P001", names, lines))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("복도 1 2 3".encode("cp949"), "not UTF-8 text.*save it as UTF-8"),
        (b"\xff\xfe\x80", "not UTF-8 text.*save it as UTF-8"),
        (b"0 0 0 0 0 0 1\0\n", "zero bytes"),
    ],
)
def test_what_is_no_text_is_named_so(content, says, scene):
    (scene / "pose.txt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_scene(scene)


def test_a_missing_pose_file_names_what_is_there(scene):
    (scene / "pose.txt").rename(scene / "poses.txt")
    with pytest.raises(InputError, match=r"P001.pose.txt is missing \(there is poses.txt\)"):
        read_scene(scene)
    for path in (scene / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"images holds no image .*unpack"):
        read_scene(scene)


NERF_FAULTS = {
    "cut short": lambda text: text[: len(text) // 2],
    "no frames": lambda text: "{}",
    "a list": lambda text: "[1, 2]",
    "a short matrix": lambda text: text.replace("1.0]]", "1.0], [2]]", 1),
    "scaled": lambda text: text.replace("0.9", "1.9"),
    "a fisheye": lambda text: text.replace("{", '{"camera_model": "OPENCV_FISHEYE", ', 1),
}


@pytest.mark.parametrize("fault", NERF_FAULTS)
def test_a_broken_transforms_json_is_named(fault, scene):
    (scene / "pose.txt").unlink()
    turn = Rotation.from_euler("z", 0.4).as_matrix()  # cosine 0.92
    matrix = np.block([[turn, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]).tolist()
    frames = [{"file_path": name, "transform_matrix": matrix} for name in NAMES]
    text = json.dumps({"frames": frames})
    (scene / "transforms.json").write_text(text)
    assert len(read_scene(scene).paths) == COUNT
    (scene / "transforms.json").write_text(NERF_FAULTS[fault](text))
    with pytest.raises(InputError, match="transforms.json"):
        read_scene(scene)
