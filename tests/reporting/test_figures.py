"""Invariants of everything drawn: texts whole, apart and readable, blocks inside their picture.

The drawings are those of odd runs: one query, a thousand, portrait images, names that are long,
Korean, accented or right to left, files that do not open, a scene of three cameras, no truth.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reporting import canvas as c
from reporting import figures, pose_figures

NAMES = (
    "plain.png",
    "a_very_long_name_" + "of_a_frame_" * 14 + "000123.png",
    "한국어_이미지_이름_0001.png",
    "Müñchen – façade № 7, Ørsted, ďaľší.png",
    "تصویر.png",
    "emoji 🚀 and 漢字.png",
)
SHAPES = {"landscape": (640, 480), "portrait": (120, 200), "strip": (320, 40)}


@pytest.fixture(autouse=True)
def layout(monkeypatch):
    """Watches Pillow: on each image, no text is clipped, has boxes for letters, or lies on another
    text or on a block that was pasted there; and no block is pasted beyond an image's edge."""
    texts: dict[int, list] = {}
    blocks: dict[int, list] = {}
    images = {}  # kept, so that no two have the same id
    draw_text, paste = ImageDraw.ImageDraw.text, Image.Image.paste

    def watched_text(self, xy, text, **look):
        box = self.textbbox(xy, text, font=look["font"], anchor=look["anchor"])
        images[id(self._image)] = self._image
        texts.setdefault(id(self._image), []).append((box, text))
        return draw_text(self, xy, text, **look)

    def watched_paste(self, other, box=None, mask=None):
        if isinstance(other, Image.Image):
            images[id(self)] = self
            at = (*box[:2], box[0] + other.width, box[1] + other.height)
            blocks.setdefault(id(self), []).append(at)
        return paste(self, other, box, mask)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched_text)
    monkeypatch.setattr(Image.Image, "paste", watched_paste)
    yield texts
    for number, image in images.items():
        page = (
            -2,
            0,
            image.width + 2,
            image.height,
        )  # a letter may overhang by a px of the picture
        written, pasted = texts.get(number, []), blocks.get(number, [])
        assert all(inside(box, page) for box in pasted)
        for box, text in written:
            assert inside(box, page), f"{text!r} is clipped"
            assert all(c.has_glyph(sign) for sign in text), text
            assert not any(overlap(box, other) for other in pasted), text
        for (a, first), (b, second) in itertools.combinations(written, 2):
            assert not overlap(a, b), f"{first!r} lies on {second!r}"


def inside(box, page) -> bool:
    return page[0] <= box[0] and page[1] <= box[1] and box[2] <= page[2] and box[3] <= page[3]


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def make_images(folder: Path, size: tuple[int, int]) -> list[str]:
    """Files of the odd names, and one that is no image."""
    paths = [folder / name for name in NAMES]
    for path in paths:
        Image.new("RGB", size, "teal").save(path)
    (folder / "broken.png").write_bytes(b"no image")
    return [*map(str, paths), str(folder / "broken.png")]


def make_gallery(paths: list[str], queries: int, matches: int = 5) -> list[figures.GalleryRow]:
    """Rows of queries right at once, later and never; distances from 0 m to 1000 km."""
    distances = [0.0, 3.25, 24.99, 1234.5, 1e6]
    rows = []
    for i, rank in enumerate([1, 7, None, 3, 1, 20][:queries]):
        found = [paths[(i + j) % len(paths)] for j in range(matches)]
        shown = [(f, 1 - 0.3 * j, distances[j], j + 1 == rank) for j, f in enumerate(found)]
        rows.append(figures.GalleryRow(paths[i % len(paths)], shown, rank))
    return rows


def make_base(queries: int, epochs: int, name: str) -> dict:
    k = list(range(1, 21))
    rise = [1 - math.exp(-x / 6) for x in k]
    recall = {
        "queries": queries,
        "index": 10_000,
        "k": k,
        "trained": rise,
        "untrained": [0.7 * x for x in rise],
        "chance": [x / 1000 for x in k],
        "low": [0.9 * x for x in rise],
        "high": [min(1, 1.05 * x) for x in rise],
    }
    epoch = {"train_loss": 0.1, "violations": 0.5, "held_out_mrr": 0.4, "seconds": 3.0}
    return {
        "data": {"name": name, "is_sample": True, "posDistThr": 25},
        "weights": {"origin": "random, calibrated on 48 training images", "pretrained": False},
        "clusters": 16,
        "seed": 42,
        "device": "cuda:0",
        "checkpoint": "ab" * 32,
        "recall": {"val": recall, "test": recall},
        "epochs": [
            {**epoch, "epoch": e + 1, "val_loss": None if e else 0.2} for e in range(epochs)
        ],
    }


@pytest.mark.parametrize(
    ("shape", "queries", "epochs", "matches"),
    [("landscape", 1, 0, 0), ("portrait", 6, 1, 3), ("strip", 6, 30, 5)],
)
def test_recall_picture(tmp_path, shape, queries, epochs, matches):
    paths = make_images(tmp_path, SHAPES[shape])
    gallery = make_gallery(paths, queries, matches)
    picture = figures.draw_recall(make_base(7416, epochs, NAMES[1]), gallery)
    assert picture.width == 1600 * c.SCALE


def test_pictures_of_an_empty_section_and_without_truth(tmp_path):
    figures.draw_recall({}, [])
    path = make_images(tmp_path, SHAPES["landscape"])[2]
    row = figures.GalleryRow(path, [(path, 0.9, None, None)], None)
    figures.retrieval_picture(tmp_path / "found.png", [row], "The most similar images")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width == 1600


def test_gallery_of_a_thousand_shows_each_kind_and_of_one_shows_it():
    ranks = [1 if i % 3 else None if i % 2 else 4 for i in range(1000)]
    assert [ranks[i] for i in figures.choose_gallery(ranks)] == [1, 1, 4, 4, None, None]
    assert figures.choose_gallery([None]) == [0]
    assert figures.choose_gallery([]) == []
    assert figures.choose_gallery([1] * 9) == [0, 2, 3, 5, 6, 8]


def test_a_curve_passes_through_its_values():
    axis = c.Axis(0, 4, [(x, str(x)) for x in range(5)])
    series = c.Series("s", [0, 2, 4], [0, 100, None], c.WRONG, width=6)
    picture = np.asarray(c.chart("t", [series], axis, c.PERCENT, "x")).astype(int)
    is_red = (abs(picture - [0xCF, 0x43, 0x07]).sum(2) < 60) & (np.arange(len(picture)) > 150)[
        :, None
    ]
    rows, columns = np.nonzero(is_red)
    # From the lower left corner of the plot to the middle of its top: half as wide as it is broad.
    grid = abs(picture - [0xDD, 0xE2, 0xE8]).sum(2) < 6
    lines = np.flatnonzero(grid.sum(1) > 500)
    left, right = np.flatnonzero(grid[lines[0]])[[0, -1]]
    assert columns.min() == pytest.approx(left, abs=8)
    assert columns.max() == pytest.approx((left + right) / 2, abs=8)
    assert rows.min() == pytest.approx(lines[0], abs=8) and rows.max() > lines[-1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_matches_picture(tmp_path, shape, count):
    first, *_, last = make_images(tmp_path, SHAPES[shape])
    rng = np.random.default_rng(count)
    query_px, index_px, projected_px = rng.uniform(-0.5, 400, (3, count, 2))
    projected_px[::3] = np.nan
    shown = pose_figures.ShownMatches(query_px, index_px, rng.random(count) < 0.7, projected_px)
    pose_figures.draw_matches((first, first), shown, f"Worst query: {NAMES[3]}")
    pose_figures.draw_matches((first, last), shown, "Broken")


def test_a_match_is_drawn_from_its_keypoint_to_its_keypoint(tmp_path):
    Image.new("RGB", (100, 80), "black").save(tmp_path / "a.png")
    at = np.array([[49.5, 39.5]])
    shown = pose_figures.ShownMatches(at, at, np.array([True]), at * np.nan)
    images = (tmp_path / "a.png", tmp_path / "a.png")
    picture = np.asarray(pose_figures.draw_matches(images, shown, "C")).astype(np.int16)
    photo_rows = np.flatnonzero((picture[:, 300] < 30).all(1))
    mint = abs(picture - [0x17, 0xC0, 0x8A]).sum(2) < 30
    mint[: photo_rows[0]] = mint[photo_rows[-1] :] = False
    rows, columns = np.nonzero(mint)
    assert rows.mean() == pytest.approx(photo_rows.mean(), abs=1)
    wide = (c.INNER - c.GAP // 2) / 2
    middles = c.MARGIN + wide / 2, c.MARGIN + c.INNER - wide / 2
    assert (columns.min() + 8, columns.max() - 8) == pytest.approx(middles, abs=2)


def make_cameras(index: int, queries: int, extent_m: tuple) -> list[tuple]:
    """Centers and unit directions of index, true and estimated cameras."""
    rng = np.random.default_rng(0)

    def directions(n: int) -> np.ndarray:
        d = rng.normal(size=(n, 3))
        return d / np.linalg.norm(d, axis=1, keepdims=True)

    true = rng.normal(size=(queries, 3)) * extent_m
    estimated = true + rng.normal(size=(queries, 3)) * 0.01
    estimated[:1] += 1000  # far beyond the picture
    centers = (rng.normal(size=(index, 3)) * extent_m, true, estimated)
    return [(each, directions(len(each))) for each in centers]


@pytest.mark.parametrize(
    ("index", "queries", "extent_m"),
    [
        (2, 1, (1, 1, 1)),  # a scene of three cameras
        (1, 1, (0, 0, 0)),  # all at one place
        (20, 5, (10, 0, 0)),  # a straight corridor
        (20, 5, (0.001, 0.002, 0.001)),
        (90, 0, (3, 2, 1)),
        (0, 3, (3, 2, 1)),
        (800, 200, (500, 300, 20)),
    ],
)
def test_poses_picture(index, queries, extent_m):
    names = [NAMES[i % len(NAMES)] for i in range(queries)]
    pose_figures.draw_poses(NAMES[1], *make_cameras(index, queries, extent_m), names)


def test_poses_picture_without_truth(layout):
    index, true, estimated = make_cameras(12, 4, (3, 2, 1))
    unknown = tuple(np.full_like(array, np.nan) for array in true)
    pose_figures.draw_poses("P001", index, unknown, estimated, list(NAMES[:4]))
    written = {text for each in layout.values() for _, text in each}
    assert {"index cameras: 12", "true query cameras: 0", "estimated: 4"} <= written


def test_the_worst_queries_are_named_with_their_errors(layout):
    index, true, _ = make_cameras(12, 6, (3, 2, 1))
    off = true[0] + np.array([[0.1], [2.5], [0.01], [0.5], [0.02], [0.03]]) * [0, 0, 1]
    names = [f"scene/images/{i}.png" for i in range(6)]
    pose_figures.draw_poses("P001", index, true, (off, true[1]), names)
    written = [text for each in layout.values() for _, text in each]
    named = "1: 1.png 2.5 m · 2: 3.png 50 cm · 3: 0.png 10 cm · 4: 5.png 3 cm · 5: 4.png 2 cm"
    assert f"Largest position errors: {named}" in written
    assert all(written.count(str(number)) == 2 for number in range(1, 6))  # one in each view


@pytest.mark.parametrize("count", [1, 19, 1000])
def test_errors_picture(count):
    rng = np.random.default_rng(count)
    ours = 10 ** rng.uniform([-9, -9], [2, 2], (count, 2))
    retrieval = 10 ** rng.uniform([-1, 0], [3, 2.2], (count, 2))
    ours[0] = 0
    ours[1::7] = np.nan
    pose_figures.draw_errors(ours, retrieval)


@pytest.mark.parametrize(
    ("length_m", "said"),
    [
        (0, "0 mm"),
        (0.0001, "0.1 mm"),
        (0.00123, "1.23 mm"),
        (0.00996, "9.96 mm"),
        (0.05, "5 cm"),
        (0.9994, "99.9 cm"),
        (0.9996, "1 m"),
        (2.5, "2.5 m"),
        (340, "340 m"),
        (1234.5, "1.23 km"),
        (1e6, "1000 km"),
        (math.nan, "? m"),
        (None, "? m"),
    ],
)
def test_lengths_are_said_in_their_unit(length_m, said):
    assert figures.meters(length_m) == said


def test_characters_that_the_font_lacks_are_escaped_not_boxed():
    assert c.printable("P001/방.png") == r"P001/\ubc29.png"
    assert c.printable("× ≤ α Σ é →") == "× ≤ α Σ é →"
    assert c.printable("e\u0301") == "é"
    assert c.printable("🚀") == r"\U0001f680"


def test_shortened_text_fits_and_keeps_both_ends():
    text = "dataset/camera/P001/images/" + "x" * 200 + "/000123.png"
    short = c.shortened(text, c.SMALL, 600)
    assert c.font(c.SMALL).getlength(short) <= 600
    assert short.startswith("dataset/") and short.endswith("123.png") and "…" in short
