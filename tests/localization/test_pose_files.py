"""Pose files as people have them: each row goes to its picture, or one sentence says why not."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from localization.cameras import OPENGL
from localization.pose_files import COLMAP, read_scene
from model import WARNINGS, InputError

COUNT = 6
NAMES = [f"{i:06d}_left.png" for i in range(COUNT)]
STAMPS = [f"{1341847980 + 1.1 * i:.6f}" for i in range(COUNT)]


def poses_of(count: int) -> np.ndarray:
    """Rows that tell themselves apart: tx counts them."""
    rng = np.random.default_rng(3)
    rows = np.concatenate(
        [rng.normal(size=(count, 3)), Rotation.random(count, rng=rng).as_quat()], 1
    )
    rows[:, 0] = np.arange(count)
    return rows.round(9)


POSES = poses_of(COUNT)
LINES = [" ".join(f"{v:.9f}" for v in row) for row in POSES]
MATRICES = np.zeros((COUNT, 4, 4))
MATRICES[:, :3, :3] = Rotation.from_quat(POSES[:, 3:]).as_matrix()
MATRICES[:, :3, 3], MATRICES[:, 3, 3] = POSES[:, :3], 1


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return make_scene(tmp_path / "P001", NAMES)


def make_scene(folder: Path, names: list[str], lines: list[str] = LINES) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in names:
        (folder / "images" / name).touch()
    write(folder, lines)
    return folder


def write(folder: Path, lines: list[str], encoding: str = "utf-8") -> None:
    (folder / "pose.txt").write_bytes(("\n".join(lines) + "\n").encode(encoding))


def rename(folder: Path, names: list[str]) -> None:
    for old, new in zip(sorted((folder / "images").iterdir()), names):
        old.rename(folder / "images" / new)


def same_poses(found: np.ndarray, expected: np.ndarray) -> bool:
    sign = np.sign(np.sum(found[:, 3:] * expected[:, 3:], axis=1, keepdims=True))
    found = np.concatenate([found[:, :3], found[:, 3:] * sign], axis=1)
    return np.allclose(found, expected, atol=1e-8)


def words(row: np.ndarray) -> str:
    return " ".join(f"{v:.12g}" for v in row)


# What is written instead of pose.txt's plain lines, all of which say the same.
FORMS: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: None,
    "comment lines and ends of lines": lambda folder: write(
        folder, ["# tx ty tz qx qy qz qw", *(f"{line} # seen" for line in LINES)]
    ),
    "quotes": lambda folder: write(
        folder, ['"' + line.replace(" ", '","') + '"' for line in LINES]
    ),
    "commas": lambda folder: write(folder, [line.replace(" ", ", ") for line in LINES]),
    "semicolons, tabs, brackets": lambda folder: write(
        folder, [f"[{line}]".replace(" ", ";\t") for line in LINES]
    ),
    "UTF-8 with a mark, CRLF": lambda folder: write(folder, [f"{v}\r" for v in LINES], "utf-8-sig"),
    "UTF-16": lambda folder: write(folder, LINES, "utf-16"),
    "UTF-16 without a mark": lambda folder: write(folder, LINES, "utf-16-le"),
    "UTF-16 of the other end": lambda folder: write(folder, LINES, "utf-16-be"),
    "exponents": lambda folder: write(
        folder, [" ".join(f"{v:+.12E}" for v in row) for row in POSES]
    ),
    "a header": lambda folder: write(folder, ["tx,ty,tz,qx,qy,qz,qw", *LINES]),
    "spacing lines": lambda folder: write(folder, [v for line in LINES for v in (line, "", "")]),
    "names in front, another order": lambda folder: write(
        folder,
        ["Visual Landmark Dataset", "ImageFile, Camera Position [X Y Z W P Q R]", ""]
        + [f"images/{name} {line}" for name, line in sorted(zip(NAMES, LINES), reverse=True)],
    ),
    "names behind": lambda folder: write(folder, [f"{v} {n}" for v, n in zip(LINES, NAMES)]),
    "names without ending": lambda folder: write(
        folder, [f"{n[:-4]} {v}" for v, n in zip(LINES, NAMES)]
    ),
    "numbers of the frames": lambda folder: write(
        folder, [f"{i} {line}" for i, line in reversed(list(enumerate(LINES)))]
    ),
    "names with spaces": lambda folder: (
        rename(folder, [f"img ({i}).png" for i in range(COUNT)]),
        write(folder, [f"img ({i}).png {LINES[i]}" for i in (3, 1, 2, 0, 5, 4)]),
    ),
    "time stamps, more than pictures": lambda folder: (
        rename(folder, [f"{stamp}.png" for stamp in STAMPS]),
        write(
            folder,
            [
                f"{1341847980 + 0.01 * i:.4f} "
                + (LINES[round(i / 110)] if i % 110 == 0 else words([-9.0, 0, 0, 0, 0, 0, 1]))
                for i in range(660)
            ],
        ),
    ),
    "time stamp and number": lambda folder: (
        rename(folder, [f"{stamp}.png" for stamp in STAMPS]),
        write(
            folder,
            ["timestamp, frame, x, y, z, qx, qy, qz, qw"]
            + [
                f"{s}, {i:06d}, {v}".replace(" ", ", ")
                for i, (s, v) in enumerate(zip(STAMPS, LINES))
            ],
        ),
    ),
    "rows of 12": lambda folder: write(folder, [words(m[:3].ravel()) for m in MATRICES]),
    "rows of 16": lambda folder: write(folder, [words(m.ravel()) for m in MATRICES]),
    "frame number and 16": lambda folder: write(
        folder, [f"{i} {words(m.ravel())}" for i, m in enumerate(MATRICES)]
    ),
    "4x4 blocks": lambda folder: write(folder, [words(row) for m in MATRICES for row in m]),
    "3x4 blocks, spaced": lambda folder: write(
        folder, [v for m in MATRICES for v in (*(words(row) for row in m[:3]), "")]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_picture_its_pose(form, scene):
    FORMS[form](scene)
    found = read_scene(scene)
    assert len(found.paths) == COUNT and found.poses.dtype == np.float64
    assert same_poses(found.poses, POSES)
    assert found.camera is None and found.convention is None and not WARNINGS


def colmap_line(i: int, name: str) -> str:
    R, t = MATRICES[i, :3, :3].T, -MATRICES[i, :3, :3].T @ POSES[i, :3]
    x, y, z, w = Rotation.from_matrix(R).as_quat()
    return f"{i + 1} {words([w, x, y, z, *t])} 7 {name}"


def colmap_lines(points: bool = True) -> list[str]:
    lines = [
        "# Image list with two lines of data per image:",
        "# …",
        "# …",
        "# Number of images: 6",
    ]
    for i in (2, 0, 1, 5, 4, 3):
        lines += [colmap_line(i, NAMES[i]), "1.5 2.5 -1 3.5 4.5 12" if i % 2 else ""][: 1 + points]
    return lines


@pytest.mark.parametrize("place", ["pose.txt", "images.txt", "sparse/0/images.txt"])
def test_colmap_is_read_as_what_it_is(place, scene):
    (scene / "pose.txt").unlink()
    file = scene / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(colmap_lines()))
    cameras = file.with_name("cameras.txt")
    cameras.write_text("# …\n6 PINHOLE 9 9 1 1 4 4\n7 RADIAL 640 480 500 320.5 240.5 0.1 -0.02\n")
    found = read_scene(scene)
    assert found.convention == COLMAP
    R = Rotation.from_quat(found.poses[:, 3:]).as_matrix()
    centers = -np.einsum("nji,nj->ni", R, found.poses[:, :3])
    np.testing.assert_allclose(centers, POSES[:, :3], atol=1e-9)
    np.testing.assert_allclose(R, MATRICES[:, :3, :3].transpose(0, 2, 1), atol=1e-9)
    camera = found.camera
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (500, 500, 320, 240)  # half a pixel less
    assert (camera.width, camera.height, camera.k1, camera.k2) == (640, 480, 0.1, -0.02)


def test_nerf_is_read_as_what_it_is(scene):
    (scene / "pose.txt").unlink()
    frames = [
        {"file_path": f"./images/{NAMES[i][:-4]}", "transform_matrix": MATRICES[i].tolist()}
        for i in reversed(range(COUNT))
    ]
    lens = {
        "fl_x": 500,
        "fl_y": 510,
        "cx": 320.5,
        "cy": 240.5,
        "w": 640,
        "h": 480,
        "k1": 0.1,
        "k2": 0,
    }
    (scene / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))
    found = read_scene(scene)
    assert found.convention == OPENGL and same_poses(found.poses, POSES)
    assert found.camera.fy == 510 and found.camera.cx == 320 and found.camera.k1 == 0.1
    for name in NAMES:
        Image.new("L", (200, 100)).save(scene / "images" / name)
    field = {"camera_angle_x": np.pi / 2, "frames": frames}
    (scene / "transforms.json").write_text(json.dumps(field))
    camera = read_scene(scene).camera
    assert camera.fx == camera.fy == pytest.approx(100) and (camera.cx, camera.cy) == (99.5, 49.5)


# ---------------------------------------------------------------- counts, gaps and order


def test_an_empty_line_is_an_unknown_pose_where_that_makes_the_counts_equal(scene):
    write(scene, [*LINES[:2], "", *LINES[3:], "", ""])
    found = read_scene(scene).poses
    assert np.isnan(found[2]).all()
    assert same_poses(np.delete(found, 2, 0), np.delete(POSES, 2, 0)) and not WARNINGS
    write(scene, ["", *LINES[1:]])
    assert np.isnan(read_scene(scene).poses[:, 0]).tolist() == [True] + [False] * 5


@pytest.mark.parametrize(
    "unknown", ["nan", "NaN " * 7, "-inf " * 7, "-inf -inf -inf nan nan nan nan"]
)
def test_words_for_an_unknown_pose(unknown, scene):
    write(scene, [*LINES[:2], unknown, *LINES[3:]])
    found = read_scene(scene).poses
    assert np.isnan(found).all(axis=1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("lines", "kept", "says"),
    [
        (LINES[:4], 4, "6 images and 4 poses.* last 2 of the images"),
        ([*LINES, LINES[0]], 6, "6 images and 7 poses.* last 1 of the poses"),
        (
            [LINES[0], "", *LINES[1:4]],
            4,
            "6 images and 4 poses.* 1 empty lines .*last 2 of the images",
        ),
    ],
)
def test_counts_that_differ_are_said_and_the_shorter_rules(lines, kept, says, scene):
    write(scene, lines)
    found = read_scene(scene)
    assert len(found.paths) == kept and same_poses(found.poses, POSES[:kept])
    assert len(WARNINGS) == 1 and re.search(says, WARNINGS[0]) and "P001" in WARNINGS[0]


def test_pictures_without_a_row_of_their_name_are_said(scene):
    write(scene, [f"{NAMES[i]} {LINES[i]}" for i in (4, 2, 1)] + [f"lost.png {LINES[0]}"])
    found = read_scene(scene)
    assert [path.name for path in found.paths] == [NAMES[i] for i in (1, 2, 4)]
    assert same_poses(found.poses, POSES[[1, 2, 4]])
    assert len(WARNINGS) == 1 and re.search(r"6 images, 3 of which .* 4 poses", WARNINGS[0])


def test_numbers_in_names_are_compared_as_numbers(tmp_path):
    scene = make_scene(tmp_path / "P001", [f"frame_{i}.png" for i in range(12)], LINES * 2)
    assert [path.name for path in read_scene(scene).paths] == [f"frame_{i}.png" for i in range(12)]
    assert len(WARNINGS) == 1 and "frame_2.png before frame_10.png" in WARNINGS[0]


def test_decimals_in_names_stay_decimals(tmp_path):
    names = ["1305031102.175304.png", "1305031102.21.png", "1305031102.3.png"]
    scene = make_scene(tmp_path / "P001", names, LINES[:3])
    assert [path.name for path in read_scene(scene).paths] == names and not WARNINGS


def test_all_endings_are_taken_hidden_files_are_not_and_other_pictures_are_said(scene):
    rename(scene, ["0.png", "1.JPG", "2.bmp", "3.Tiff", "4.webp", "5.jpeg"])
    for name in ("._0.png", ".hidden.png", "6.gif", "7.HEIC", "notes.txt"):
        (scene / "images" / name).touch()
    assert same_poses(read_scene(scene).poses, POSES)
    assert len(WARNINGS) == 1 and re.search(
        "2 files of a kind that is not read .*convert", WARNINGS[0]
    )


# ---------------------------------------------------------------- any file at all


def outcome(scene: Path) -> list[float]:
    """tx of each picture, by its number, or nothing if the file was refused."""
    try:
        found = read_scene(scene)
    except InputError as error:
        assert "\n" not in str(error) and str(scene) in str(error)
        return [np.nan] * COUNT
    where = {path.name: tx for path, tx in zip(found.paths, found.poses[:, 0])}
    return [where.get(name, np.nan) for name in NAMES]


ANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@ANY
@given(
    order=st.permutations(range(COUNT)),
    labeled=st.sampled_from(["name", "stem", "number", "none"]),
    separator=st.sampled_from([" ", "\t", ",", " , ", ";", "  "]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
    gaps=st.lists(st.integers(0, COUNT), max_size=3),
    comments=st.lists(st.integers(0, COUNT), max_size=3),
    dropped=st.sets(st.integers(0, COUNT - 1), max_size=3),
)
def test_no_shuffle_of_lines_shifts_a_pose_in_silence(
    scene, order, labeled, separator, end, encoding, gaps, comments, dropped
):
    WARNINGS.clear()
    labels = {
        "name": NAMES,
        "stem": [n[:-4] for n in NAMES],
        "number": range(COUNT),
        "none": [""] * COUNT,
    }
    order = range(COUNT) if labeled == "none" else order
    lines = [
        f"{labels[labeled][i]} {LINES[i]}".strip().replace(" ", separator)
        for i in order
        if i not in dropped
    ]
    for at in gaps:
        lines.insert(at, "")
    for at in comments:
        lines.insert(at, "# a comment")
    (scene / "pose.txt").write_bytes((end.join(lines) + end).encode(encoding))
    found = outcome(scene)
    shifted = [i for i, tx in enumerate(found) if not np.isnan(tx) and abs(tx - i) > 1e-6]
    assert not shifted or WARNINGS
    assert not shifted or labeled == "none"
    if not dropped and not (gaps and labeled == "none") and encoding != "utf-32":
        assert not np.isnan(found).any()


@ANY
@given(data=st.data())
def test_no_bytes_raise_anything_but_an_input_error(scene, data):
    content = bytearray(
        ("\n".join(LINES) + "\n").encode(data.draw(st.sampled_from(["utf-8", "utf-16"])))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (scene / "pose.txt").write_bytes(bytes(content))
    outcome(scene)


@ANY
@given(
    content=st.binary(max_size=200) | st.text(alphabet="0123456789.-e# ,\n\tnaif_", max_size=200)
)
def test_nor_does_anything_else(scene, content):
    raw = content if isinstance(content, bytes) else content.encode()
    for name in ("pose.txt", "intrinsics.txt"):
        (scene / name).write_bytes(raw)
    outcome(scene)


def test_a_number_behind_a_named_pose_is_no_part_of_it(scene):
    write(scene, [f"{name} {line} 0.9" for name, line in zip(NAMES, LINES)])
    assert same_poses(read_scene(scene).poses, POSES)
    for labels in ("{name} {i}.5", "{i}.5 {name}", "{i},{name}"):
        table = [labels.format(i=i, name=name) for i, name in enumerate(NAMES)]
        write(scene, [f"{words} {line}" for words, line in list(zip(table, LINES))[::-1]])
        assert same_poses(read_scene(scene).poses, POSES)


def test_each_frame_of_nerf_may_have_its_own_lens(scene):
    (scene / "pose.txt").unlink()
    frames = [
        {
            "file_path": NAMES[i],
            "transform_matrix": MATRICES[i].tolist(),
            "fl_x": 500 + 100 * (i == 2), "w": 640, "h": 480,
        }
        for i in range(COUNT)
    ]
    (scene / "transforms.json").write_text(json.dumps({"frames": frames[::-1]}))
    found = read_scene(scene)
    assert found.camera.fx == 500
    assert [found.lenses[path].fx for path in found.paths] == [500 + 100 * (i == 2) for i in range(COUNT)]


def test_a_link_whose_image_is_gone_keeps_its_place(scene):
    lost = scene / "images" / NAMES[1]
    lost.unlink()
    lost.symlink_to("nowhere.png")
    found = read_scene(scene)
    assert [path.name for path in found.paths] == NAMES and same_poses(found.poses, POSES)


@pytest.mark.parametrize("name", ["Intrinsics.json", "calib.txt", "K.txt", "camera.yaml"])
def test_a_lens_that_is_not_read_is_named(name, scene):
    (scene / name).write_text("500 500 320 240")
    read_scene(scene)
    assert [w for w in WARNINGS if f"{scene / name} is not read" in w]
