"""Invariants of everything drawn: texts whole, apart and readable, tiles inside the page.

The drawings are those of odd runs: one query, a thousand, portrait images, names that are long,
Korean, accented or right to left, files that do not open, a scene of three cameras, no truth.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reporting import canvas as c
from reporting import figures, report

NAMES = (
    "plain.png",
    "a_very_long_name_" + "of_a_frame_" * 14 + "000123.png",
    "한국어_이미지_이름_0001.png",
    "Müñchen – façade № 7, Ørsted, ďaľší.png",
    "تصویر.png",
    "emoji 🚀 and 漢字.png",
)


def assert_laid_out(canvas: c.Canvas, on_tiles: tuple[str, ...] = ()) -> None:
    """No text clipped, overlapping, or with a missing glyph; tiles inside and apart.

    Texts may lie on a tile only if they are one of `on_tiles`.
    """
    page = (0, 0, canvas.width, canvas.height)
    for box, text in canvas.texts:
        assert inside(box, page), f"{text!r} is clipped"
        assert all(c.has_glyph(sign) and c.has_glyph(sign, bold=True) for sign in text), text
    for (a, first), (b, second) in itertools.combinations(canvas.texts, 2):
        assert not overlap(a, b), f"{first!r} lies on {second!r}"
    assert all(inside(tile, page) for tile in canvas.tiles)
    for a, b in itertools.combinations(canvas.tiles, 2):
        assert not overlap(a, b)
    for box, text in canvas.texts:
        assert text in on_tiles or not any(overlap(box, tile) for tile in canvas.tiles), text


def inside(box: c.Box, page: c.Box) -> bool:
    return page[0] <= box[0] and page[1] <= box[1] and box[2] <= page[2] and box[3] <= page[3]


def overlap(a: c.Box, b: c.Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---------------------------------------------------------------- odd runs


def make_images(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    """Files of the odd names, in these sizes by turns, and one that is no image."""
    rng = np.random.default_rng(0)
    paths = []
    for name, size in zip(NAMES, itertools.cycle(sizes)):
        path = folder / name
        Image.fromarray(rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)).resize(
            size).save(path)  # fmt: skip
        paths.append(str(path))
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    return [*paths, str(broken)]


def make_gallery(paths: list[str], queries: int, matches: int = 5) -> list[figures.GalleryRow]:
    """`queries` rows chosen from a thousand ranks as base.py does, distances from 0 m to 1000 km."""
    ranks = [1, 7, None, 3, 1, 20, None, 2][:queries]
    distances = [0.0, 3.25, 24.99, 1234.5, 1e6]
    return [
        figures.GalleryRow(
            paths[i % len(paths)],
            [(paths[(i + j) % len(paths)], 1 - 0.3 * j, distances[j], j + 1 == rank)
             for j in range(matches)],
            rank,
        )
        for i, rank in enumerate(ranks)
    ]  # fmt: skip


def make_base(queries: int, epochs: int, name: str = "built-in sample") -> dict:
    k = list(range(1, 21))
    rise = [1 - math.exp(-x / 6) for x in k]
    recall = {
        "queries": queries, "index": 10_000, "k": k, "trained": rise, "untrained": [0.7 * x for x in rise],
        "chance": [x / 1000 for x in k], "low": [0.9 * x for x in rise], "high": [min(1, 1.05 * x) for x in rise],
    }  # fmt: skip
    return {
        "data": {"name": name, "root": f"/data/{name}", "is_sample": True, "posDistThr": 25,
                 "train_queries": queries, "train_index": 10_000, "remarks": [f"{name} is odd. " * 6]},
        "weights": {"origin": "random, calibrated on 48 training images", "pretrained": False},
        "settings": {"dataset": f"/data/{name}", "epochs": epochs, "limit": None},
        "clusters": 16, "seed": 42, "device": "cuda:0", "checkpoint": "ab" * 32, "date": "2026-11-21",
        "split": {"train": queries, "val": 0, "test": 0, "dropped": 0}, "phases": {"training": 12.3},
        "recall": {"val": recall, "test": recall}, "versions": {"torch": "2.9.0"}, "warnings": [name],
        "epochs": [{"epoch": e + 1, "train_loss": 0.1 / (e + 1), "val_loss": None if e else 0.2,
                    "violations": 0.5, "held_out_mrr": 0.4, "seconds": 3.0} for e in range(epochs)],
    }  # fmt: skip


SIZES = {"landscape": [(640, 480)], "portrait": [(240, 720)], "mixed": [(640, 160), (200, 600), (64, 64)]}


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("queries", "epochs"), [(1, 0), (1000, 1), (7416, 30)])
def test_recall_picture(tmp_path, shape, queries, epochs):
    paths = make_images(tmp_path, SIZES[shape])
    base = make_base(queries, epochs, NAMES[1])
    canvas = figures.draw_recall(base, make_gallery(paths, min(6, queries)))
    assert canvas.width == 1600
    assert_laid_out(canvas, on_tiles=("cannot be opened",))


def test_gallery_of_a_thousand_shows_each_kind_and_of_one_shows_it():
    ranks = [1 if i % 3 else None if i % 2 else 4 for i in range(1000)]
    chosen = figures.choose_gallery(ranks)
    assert [ranks[i] for i in chosen] == [1, 1, 4, 4, None, None]
    assert figures.choose_gallery([None]) == [0]
    assert figures.choose_gallery([]) == []


def test_a_query_with_fewer_than_five_index_images(tmp_path):
    paths = make_images(tmp_path, SIZES["mixed"])
    for matches in (0, 1, 3):
        assert_laid_out(figures.draw_recall(make_base(3, 5), make_gallery(paths, 3, matches)),
                        on_tiles=("cannot be opened",))  # fmt: skip


def test_pictures_of_an_empty_section():
    assert_laid_out(figures.draw_recall({}, []))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_matches_picture(tmp_path, shape, count):
    paths = make_images(tmp_path, SIZES[shape])
    rng = np.random.default_rng(1)
    for query, index in itertools.pairwise(paths):
        xy = rng.uniform(-20, 700, (3, count, 2))
        xy[2, ::3] = np.nan
        canvas = figures.draw_matches(
            query, index, xy[0], xy[1], rng.random(count) < 0.5, xy[2], f"Worst query: {NAMES[1]}"
        )
        assert canvas.width == 1600
        assert_laid_out(canvas, on_tiles=("cannot be opened",))


def make_cameras(index: int, queries: int, extent_m: tuple, seed: int = 0) -> list[np.ndarray]:
    """Arguments of draw_poses: centers and unit directions of index, true and estimated cameras."""
    rng = np.random.default_rng(seed)

    def directions(n: int) -> np.ndarray:
        d = rng.normal(size=(n, 3))
        return d / np.linalg.norm(d, axis=1, keepdims=True)

    true = rng.normal(size=(queries, 3)) * extent_m
    estimated = true + rng.normal(size=(queries, 3)) * 0.01
    if queries:
        estimated[0] += 1000  # far beyond the picture
    return [rng.normal(size=(index, 3)) * extent_m, directions(index), true, directions(queries),
            estimated, directions(queries)]  # fmt: skip


@pytest.mark.parametrize(
    ("index", "queries", "extent_m"),
    [
        (2, 1, (1, 1, 1)),  # a scene of three cameras
        (1, 1, (0, 0, 0)),  # all at one place
        (20, 5, (10, 0, 0)),  # a straight corridor
        (20, 5, (0.001, 0.002, 0.001)),
        (90, 0, (3, 2, 1)),
        (800, 200, (500, 300, 20)),
    ],
)
def test_poses_picture(index, queries, extent_m):
    cameras = make_cameras(index, queries, extent_m)
    names = [NAMES[i % len(NAMES)] for i in range(queries)]
    canvas = figures.draw_poses(NAMES[1], *cameras, names)
    assert_laid_out(canvas, on_tiles=tuple(map(str, range(1, 6))))


def test_poses_picture_without_truth():
    cameras = make_cameras(12, 4, (3, 2, 1))
    cameras[2][:] = np.nan
    cameras[3][:] = np.nan
    assert_laid_out(figures.draw_poses("P001", *cameras, list(NAMES[:4])))


@pytest.mark.parametrize("count", [1, 19, 1000])
def test_errors_picture(count):
    rng = np.random.default_rng(count)
    ours = 10 ** rng.uniform([-9, -9], [2, 2], (count, 2))
    retrieval = 10 ** rng.uniform([-1, 0], [3, 2.2], (count, 2))
    ours[0] = 0
    ours[1::7] = np.nan
    assert_laid_out(figures.draw_errors(ours, retrieval))


def test_shares_within_limits_by_hand():
    errors = np.array([[0.05, 5.0], [0.2, 1.0], [0.3, 1.0], [np.nan, np.nan]])
    assert figures.within(errors, 0.05, 5) == pytest.approx(1 / 3)
    assert figures.within(errors, 0.25, 2) == pytest.approx(1 / 3)
    assert figures.within(errors, 0.5, 5) == 1
    assert figures.within(errors[3:], 0.5, 5) is None


def test_report_pages(tmp_path):
    paths = make_images(tmp_path, SIZES["mixed"])
    base = make_base(1000, 30, NAMES[1])
    figures.recall_picture(tmp_path / "task3_result.png", base, make_gallery(paths, 6))
    answers = [
        {"path": path, "scene": "P001", "error_m": 1.0 + i, "error_deg": 2.0, "method": "pnp",
         "inliers": 100, "confidence": 0.5} for i, path in enumerate(paths)
    ]  # fmt: skip
    test = {
        "data": {"name": "x", "is_sample": True}, "scenes": list(NAMES), "queries": 7, "index": 80,
        "mean_m": 1.0, "mean_deg": 2.0, "median_m": 0.5, "median_deg": 1.0, "within": {"5cm/5deg": 0.5},
        "retrieval": {}, "methods": {"pnp": {"count": 7}}, "per_query": answers,
        "cameras": {name: {"fx": 320.0, "fy": 320.0, "cx": 1.0, "cy": 2.0, "focal_from": "prior",
                           "convention": "xyzw camera_to_world forward-right-down"} for name in NAMES},
    }  # fmt: skip
    blocks = report.contents({"base": base, "test": test}, tmp_path)
    pages = report.draw_pages(blocks)
    assert len(pages) > 3
    for page in pages:
        assert (page.width, page.height) == report.PAGE
        assert_laid_out(page)
        # All texts but the page number keep the margins.
        for box, text in page.texts:
            within = inside(box, (report.PAGE_MARGIN - 1, report.PAGE_MARGIN - 8,
                                  page.width - report.PAGE_MARGIN + 1, page.height - report.PAGE_MARGIN + 8))
            assert within or text.endswith(f"/ {len(pages)}"), text


def test_headings_stay_with_what_follows_and_cut_tables_repeat_their_header():
    rows = [[f"row {i}", str(i)] for i in range(60)]
    for lines in range(70, 86):  # the heading falls near the end of a page for some of these
        filler = report.Text("word " * 12 * lines)
        pages = report.draw_pages([filler, report.Heading("Below"), report.Table(["name", "number"], rows)])
        drawn = [[text for _, text in page.texts] for page in pages]
        for texts in drawn:
            if "Below" in texts:
                assert "row 0" in texts
        assert all("name" in texts for texts in drawn if any(t.startswith("row ") for t in texts))


def test_characters_that_the_font_lacks_are_escaped_not_boxed():
    assert c.printable("P001/방.png") == r"P001/\ubc29.png"
    assert c.printable("× ≤ α Σ é →") == "× ≤ α Σ é →"
    assert c.printable("e\u0301") == "é"
    assert c.printable("🚀") == r"\U0001f680"


def test_shortened_text_fits_and_keeps_both_ends():
    text = "dataset/camera/P001/images/" + "x" * 200 + "/000123.png"
    short = c.shortened(text, c.SMALL, 300)
    assert c.font(c.SMALL).getlength(short) <= 300
    assert short.startswith("dataset/") and short.endswith("123.png") and "…" in short
