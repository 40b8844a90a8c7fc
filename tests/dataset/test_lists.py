"""Lists as people write them, the truth in its forms, limits, what is odd about the data."""

import io
import pickle
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from dataset.lists import ImageListDataset, data_warnings, read_list, read_split
from dataset.truth import read_truth
from model import WARNINGS, InputError
from recognition.eval_command import command
from tests.dataset.places import make_lists


def test_a_line_is_looked_for_in_three_places_and_inside_first_on_demand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("dataset/query/a.jpg", "root/dataset/query/a.jpg", "root/query/a.jpg"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
    Path("list.txt").write_text("./dataset/query/a.jpg\n\n")
    expected = ["dataset/query/a.jpg", "root/dataset/query/a.jpg", "root/query/a.jpg"]
    assert read_list("list.txt", "root", inside_first=True) == ([Path(expected[2])], [])
    for place in expected:
        assert read_list("list.txt", "root") == ([Path(place)], [])
        Path(place).unlink()
    assert read_list("list.txt", "root") == ([Path(expected[2])], [0])  # named where it should be


def test_limit_keeps_the_index_images_of_the_queries_it_keeps(tmp_path):
    make_lists(tmp_path, 10, 20)
    data = read_split(tmp_path, "train", limit=3)
    assert [path.name for path in data.queries.paths] == ["train0.jpg", "train4.jpg", "train9.jpg"]
    names = {path.name for path in data.index.paths}
    assert {f"train{i}.jpg" for i in (0, 1, 8, 9, 18, 19)} < names
    assert len(names) == len(data.utm_index) == 12
    for i in range(3):
        assert np.linalg.norm(data.utm_index - data.utm_query[i], axis=1).min() == 5


def test_oddities_are_told(tmp_path):
    make_lists(tmp_path, split="train")
    make_lists(tmp_path, split="val")
    lines = (tmp_path / "index_val.txt").read_text().splitlines()
    lines[1], lines[2] = lines[0], "dataset/index/train0.jpg"
    (tmp_path / "index_val.txt").write_text("\n".join(lines))
    val = np.load(tmp_path / "gt/pitts30k_val.npz")
    np.savez(
        tmp_path / "gt/pitts30k_val.npz",
        utmQ=val["utmQ"] + [[0, 0], [0, 0], [0, 500]],
        utmDb=val["utmDb"],
        posDistThr=25,
    )
    splits = {name: read_split(tmp_path, name) for name in ("train", "val")}
    told = "\n".join(data_warnings(splits))
    assert "val: 1 images are listed more than once" in told
    assert "val: 1 queries have no index image within 25 m" in told
    assert "1 images are both in train and in val" in told
    assert "train:" not in told


def test_only_who_asks_gets_a_reduced_image(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    sizes = []
    seen = ImageListDataset(tmp_path / "list.txt", tmp_path, lambda image: sizes.append(image.size))
    seen[0]
    assert seen.paths and sizes == [(640, 480)]
    assert ImageListDataset(tmp_path / "list.txt", tmp_path)[0][0].size == (640, 480)
    asked = ImageListDataset(tmp_path / "list.txt", tmp_path, at_least=224)
    assert pickle.loads(pickle.dumps(asked))[0][0].size == (320, 240)  # in a spawned worker too


def test_absent_test_lists_are_no_error_but_half_of_them_are(tmp_path):
    make_lists(tmp_path)
    assert read_split(tmp_path, "test") is None
    (tmp_path / "query_test.txt").write_text("dataset/query/train0.jpg\n")
    with pytest.raises(InputError, match="index_test.txt"):
        read_split(tmp_path, "test")


# ---------------------------------------------------------------- forms


COUNTS = {"query": 3, "index": 6}


def edit(root: Path, change: Callable[[list[str]], list[str]], encoding: str = "utf-8") -> None:
    """Write both lists anew."""
    for kind in COUNTS:
        file = root / f"{kind}_val.txt"
        lines = change(file.read_text(encoding="utf-8").splitlines())
        file.write_bytes(("\n".join(lines) + "\n").encode(encoding))


def each(change: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    return lambda lines: [change(line) for line in lines]


def rename_images(root: Path, change: Callable[[str], str]) -> None:
    for kind in COUNTS:
        for path in list((root / kind).iterdir()):
            new = root / kind / change(path.name)
            new.parent.mkdir(exist_ok=True)
            path.rename(new)


def in_folder(root: Path, listed: str, on_disk: str) -> None:
    rename_images(root, lambda name: f"{on_disk}/{name}")
    edit(root, each(lambda line: line.replace("val", f"{listed}/val")))


def truth(root: Path, **changes: object) -> None:
    """Save the .npz with these arrays changed, or left out where None."""
    file = root / "gt/pitts30k_val.npz"
    arrays = dict(np.load(file)) | changes
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})


def place(root: Path, key: str) -> np.ndarray:
    return np.load(root / "gt/pitts30k_val.npz")[key]


def as_mat(root: Path, compressed: bool) -> None:
    file = root / "gt/pitts30k_val.npz"
    arrays = np.load(file)
    fields = {
        "whichSet": "val",
        "dbImageFns": np.array([["a.jpg"], ["b.jpg"]], dtype=object),
        "utmDb": arrays["utmDb"].T,
        "utmQ": arrays["utmQ"].T,
        "posDistThr": 25,
        "posDistSqThr": 625,
    }
    with open(file, "wb") as opened:
        savemat(opened, {"dbStruct": fields}, do_compression=compressed)


def set_truth(key: str, value: object) -> Callable[[Path], None]:
    return lambda root: truth(root, **{key: value})


# Ways to say the same.
FORMS: dict[str, Callable[[Path], None]] = {
    "comments and empty lines": lambda root: edit(
        root, lambda v: ["# made by me", *v[:1], "", *v[1:]]
    ),
    "CSV with a header": lambda root: edit(
        root, lambda v: ["image_path,east", *(f"{x},1.5" for x in v)]
    ),
    "a label after the path": lambda root: edit(root, each(lambda line: f"{line} 0")),
    "a number before the path": lambda root: edit(root, each(lambda line: f"0 {line}")),
    "CSV with a number before the path": lambda root: edit(root, each(lambda line: f"12,{line}")),
    "quotes": lambda root: edit(root, each(lambda line: f'"{line}",7')),
    "backslashes and a mark": lambda root: edit(
        root, each(lambda line: line.replace("/", "\\") + "\r"), "utf-8-sig"
    ),
    "absolute on another machine": lambda root: edit(
        root, each(lambda line: "D:\\my course\\" + line.replace("/", "\\"))
    ),
    "endings in capitals on the disk": lambda root: rename_images(
        root, lambda n: n.replace("jpg", "JPG")
    ),
    "endings in capitals in the list": lambda root: edit(
        root, each(lambda v: v.replace("jpg", "JPG"))
    ),
    "spaces and Korean": lambda root: in_folder(root, "복도 1층", "복도 1층"),
    "unpacked on a Mac": lambda root: in_folder(
        root, unicodedata.normalize("NFC", "복도"), unicodedata.normalize("NFD", "복도")
    ),
    "listed on a Mac": lambda root: in_folder(
        root, unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é")
    ),
    "a threshold in a list": set_truth("posDistThr", [25.0]),
    "a threshold of 1 x 1": set_truth("posDistThr", [[25]]),
    "whole numbers": lambda root: truth(root, utmQ=place(root, "utmQ").astype(int)),
    "single precision": lambda root: truth(root, utmDb=place(root, "utmDb").astype("f4")),
    "transposed": lambda root: truth(
        root, utmQ=place(root, "utmQ").T, utmDb=place(root, "utmDb").T
    ),
    "MATLAB's": lambda root: as_mat(root, compressed=False),
    "MATLAB's, compressed": lambda root: as_mat(root, compressed=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    make_lists(root, split="val")
    plain = read_split(root, "val")
    FORMS[form](root)
    found = read_split(root, "val")
    for kind, ours, theirs in (
        ("query", found.queries, plain.queries),
        ("index", found.index, plain.index),
    ):
        assert [path.stem for path in ours.paths] == [f"val{i}" for i in range(COUNTS[kind])]
        assert all(path.is_file() for path in ours.paths) and len(ours) == len(theirs)
    np.testing.assert_array_equal(found.utm_query, plain.utm_query)
    np.testing.assert_array_equal(found.utm_index, plain.utm_index)
    assert found.threshold == 25 and not data_warnings({"val": found})
    transposed = form == "transposed" or form.startswith("MATLAB")
    assert len(WARNINGS) == 2 * transposed and all("transpose" in line for line in WARNINGS)


def test_what_is_spelled_exactly_is_preferred(tmp_path):
    make_lists(tmp_path, split="val")
    for name in ("VAL0.jpg", "Val1.jpg", "vAl1.jpg"):
        (tmp_path / "index" / name).write_bytes(b"")
    assert read_split(tmp_path, "val").index.paths[0].name == "val0.jpg"
    (tmp_path / "index/val1.jpg").unlink()
    with pytest.raises(InputError, match="1 of 6 images .*index/val1.jpg"):
        read_split(tmp_path, "val")  # two look like it, so neither is taken


# ---------------------------------------------------------------- refused and warned of


def write_truth(content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / "gt/pitts30k_val.npz").write_bytes(content)


def an_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def spoil_place(key: str, row: int, value: float) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        places = place(root, key)
        places[row, 1] = value
        truth(root, **{key: places})

    return spoil


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list in UTF-16": (lambda r: edit(r, list, "utf-16"), "query_val.txt.* save it as UTF-8"),
    "a list in cp949": (
        lambda r: edit(r, each(lambda line: f"복도/{line}"), "cp949"),
        "query_val.txt.* save it as UTF-8",
    ),
    "a line too many": (
        lambda r: edit(r, lambda v: [*v, v[0]]),
        "query_val.txt has 4 images but utmQ in .*val.npz has 3 rows",
    ),
    "no paths": (
        lambda r: edit(r, each(lambda _: "seven")),
        "'.*seven': write the path of one image a line",
    ),
    "a query of no place": (
        spoil_place("utmQ", 1, np.nan),
        r"1 of 3 rows of utmQ .*row 1, .*image 2",
    ),
    "an index image of no place": (
        spoil_place("utmDb", 4, np.inf),
        r"1 of 6 rows of utmDb .*row 4, .*image 5",
    ),
    "threshold 0": (set_truth("posDistThr", 0), "posDistThr is 0: .*positive"),
    "threshold -25": (set_truth("posDistThr", -25), "posDistThr is -25: .*positive"),
    "threshold nan": (set_truth("posDistThr", np.nan), "posDistThr is nan: .*positive"),
    "two thresholds": (set_truth("posDistThr", [10, 25]), r"posDistThr is of shape \(2,\): .*one"),
    "objects": (set_truth("utmQ", np.array([[1, 2]], dtype=object)), "utmQ holds Python objects"),
    "text": (set_truth("utmQ", np.array([["1", "2"]])), "utmQ is of type <U1, not numbers"),
    "no truth of that name": (
        lambda r: truth(r, utm_q=place(r, "utmQ"), utmQ=None),
        r"has no utmQ \(there is posDistThr, utmDb, utm_q\): it must hold utmQ",
    ),
    "altitudes": (
        lambda r: truth(r, utmQ=np.zeros((3, 3))),
        r"utmQ is of shape \(3, 3\): .*meters",
    ),
    "one array": (write_truth(an_array()), r"is one array \(.npy\)"),
    "a pickle": (write_truth(pickle.dumps({"utmQ": 1})), "is no .npz file"),
    "MATLAB 7.3": (write_truth(b"MATLAB 7.3 MAT-file, Platform"), "MATLAB 7.3: save it with -v7"),
    "MATLAB's, cut short": (write_truth(b"MATLAB 5.0 MAT-file" + bytes(150)), "damaged|no utmQ"),
    "cut short": (
        lambda r: write_truth((r / "gt/pitts30k_val.npz").read_bytes()[:300])(r),
        "damaged",
    ),
    "only a .mat": (
        lambda r: (r / "gt/pitts30k_val.npz").rename(r / "gt/pitts30k_val.mat"),
        "lacks gt/pitts30k_val.npz though there is a .mat file .*ending .npz",
    ),
}


def run_eval(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on stderr of an evaluation that ends at the missing checkpoint, if not before."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    words = ["--dataset", str(root), "--split", "val", "--checkpoint", str(root / "no.pth")]
    assert command(words) == 2
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    spoil, says = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    make_lists(tmp_path / "data", split="val")
    spoil(tmp_path / "data")
    (sentence,) = run_eval(tmp_path / "data", capsys)
    assert sentence.startswith("eval.py: ") and re.search(says, sentence), sentence
    assert "allow_pickle" not in sentence


@pytest.mark.parametrize(
    ("utm_query", "says"),
    [
        (lambda utm: utm + 500, "val: 3 queries have no index image within 25 m"),
        (lambda utm: utm / 1e5, "all 6 index images lie within 25 m of every query.*degrees"),
    ],
)
def test_what_is_odd_is_said_by_eval_too(utm_query, says, tmp_path, capsys):
    make_lists(tmp_path, split="val")
    index = place(tmp_path, "utmDb")
    changed = index / 1e5 if "degrees" in says else index
    truth(tmp_path, utmQ=utm_query(place(tmp_path, "utmQ")), utmDb=changed)
    warning, sentence = run_eval(tmp_path, capsys)
    assert warning.startswith("WARNING: ") and re.search(says, warning)
    assert "no.pth does not exist" in sentence


def test_eval_needs_the_lists_of_its_split_only(tmp_path, checkpoint, capsys):
    make_lists(tmp_path, split="val")
    words = ["--dataset", str(tmp_path), "--checkpoint", str(checkpoint), "--device", "cpu"]
    assert command([*words, "--split", "val"]) == 0
    said = capsys.readouterr()
    assert re.search(r"Recall@1: \d/3", said.out) and not said.err.strip()
    assert command([*words, "--split", "train"]) == 2
    assert "lacks query_train.txt, index_train.txt" in capsys.readouterr().err


# ---------------------------------------------------------------- any file at all


ANY = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def images(tmp_path) -> Path:
    """Nine empty images."""
    (tmp_path / "index").mkdir()
    for i in range(9):
        (tmp_path / "index" / f"val {i}.jpg").touch()
    return tmp_path


def read_numbers(root: Path, content: bytes) -> list[int] | None:
    """The numbers of the images in a list, None where it was refused or one was not there."""
    (root / "list.txt").write_bytes(content)
    try:
        paths, absent = read_list(root / "list.txt", root)
    except InputError as error:
        assert "\n" not in str(error) and "list.txt" in str(error)
        return None
    return None if absent else [int(path.stem.split()[1]) for path in paths]


@ANY
@given(
    order=st.lists(st.integers(0, 8), min_size=1, max_size=12),
    prefix=st.sampled_from(["dataset/", "./dataset/", "", "C:/x/dataset/", "/home/me/dataset/"]),
    slash=st.sampled_from(["/", "\\"]),
    after=st.sampled_from(["", " 3", ",4.5,6", "\t0", " # seen"]),
    capitals=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    before=st.sampled_from(["", "# a comment", "path,east,north", "path"]),
)
def test_no_form_of_a_list_shifts_its_images(
    images, order, prefix, slash, after, capitals, end, encoding, before
):
    line = f"{prefix}index/val {{}}.{'JPG' if capitals else 'jpg'}{after}".replace("/", slash)
    text = end.join([before, *(line.format(i) for i in order)]) + end
    found = read_numbers(images, text.encode(encoding))
    assert found == (None if encoding == "utf-16" else order)


@ANY
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_no_list_raises_anything_but_an_input_error(images, content):
    read_numbers(images, content)


@ANY
@given(data=st.data(), mat=st.booleans())
def test_no_damage_to_a_truth_file_changes_it_in_silence(tmp_path, data, mat):
    if not (tmp_path / "gt").exists():
        make_lists(tmp_path, split="val")
        (tmp_path / "npz").write_bytes((tmp_path / "gt/pitts30k_val.npz").read_bytes())
        as_mat(tmp_path, compressed=True)
        (tmp_path / "mat").write_bytes((tmp_path / "gt/pitts30k_val.npz").read_bytes())
    content = bytearray((tmp_path / ("mat" if mat else "npz")).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    (tmp_path / "damaged.npz").write_bytes(bytes(content))
    try:
        query, index, threshold = read_truth(tmp_path / "damaged.npz")
    except InputError as error:
        assert "\n" not in str(error) and "allow_pickle" not in str(error)
        return
    assert threshold == 25 and query.tolist() == [[0, 0], [1000, 0], [2000, 0]]
    assert index[:, 1].tolist() == [5, 15] * 3
