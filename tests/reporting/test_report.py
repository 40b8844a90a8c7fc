"""The report: one list of contents as Markdown and as HTML that needs no other file."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from reporting import handin, report, web_page

ODD = "a_b *c* | `d` <e> [f](g) # & \\ \"h\" 'i' 방 é **j**"
VIEW = "scene_a b#1 100%.html"


class Page(HTMLParser):
    """The texts by the tag around them, the rows of all tables, and the sources of the images."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.images: list[Image.Image] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            content = attributes["src"].partition(";base64,")[2]
            self.images.append(Image.open(io.BytesIO(base64.b64decode(content))))
        if tag == "tr":
            self.rows.append([])
        if tag not in ("img", "meta", "wbr"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def output(tmp_path):
    """A folder with results of both scripts, words full of markup, and two pictures."""
    rise = [0.1 * k for k in range(1, 11)]
    recall = {"queries": 9, "index": 80, "k": [*range(1, 11)], "trained": rise, "chance": rise}
    base = {
        "data": {"name": ODD, "root": ODD, "is_sample": True, "train_queries": 9, "remarks": [ODD]},
        "weights": {"origin": "random", "pretrained": False},
        "settings": {"mining": "hard", "seed": 42, "limit": None, "quiet": True, "dataset": "a b"},
        "recall": {"val": recall},
        "epochs": [{"epoch": 1, "train_loss": 0.12345, "seconds": 3.0}],
        "phases": {"training": 12.34},
        "warnings": [ODD],
    }
    row = {"path": ODD, "error_m": 1.0, "error_deg": 2.0, "method": "pnp", "confidence": 0.5}
    camera = {"fx": 320.0, "fy": 320.0, "convention": "xyzw camera_to_world"}
    test = {
        "scenes": ["P001"],
        "queries": 1,
        "mean_m": 1.0,
        "mean_deg": 2.0,
        "within": {"5cm/5deg": 0.5},
        "methods": {"pnp": {"count": 1}},
        "per_query": [row],
        "cameras": {"P001": camera},
        "pictures": [{"file": "errors.png", "caption": ODD}, {"file": "gone.png", "caption": "x"}],
        "views": [{"file": VIEW, "caption": ODD}, {"file": "gone.html", "caption": "x"}],
        "not_found": 1,
        "settings": {"min_confidence": 0.7},
    }
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / VIEW).touch()
    Image.new("RGB", (1600, 900), "teal").save(tmp_path / "report" / "errors.png")
    Image.new("RGB", (1600, 400), "white").save(tmp_path / "task3_result.png")
    handin.update_metrics(tmp_path, "base", base, "ab" * 32)
    handin.update_metrics(tmp_path, "test", test, "ab" * 32)
    report.write_report(tmp_path)
    return tmp_path


def test_the_html_needs_no_other_file_and_holds_the_pictures(output):
    page = Page((output / "report/report.html").read_text(encoding="utf-8"))
    assert [image.size for image in page.images] == [(1600, 400), (1600, 900)]
    assert page.links.pop() == "scene_a%20b%231%20100%25.html" and page.texts["a"] == [ODD]
    assert all(link.startswith("data:image/") for link in page.links)
    teal = np.asarray(page.images[1]).astype(int)
    assert abs(teal - [0, 128, 128]).max() <= 3
    assert page.texts["figcaption"] == [page.texts["figcaption"][0], ODD]


def test_both_forms_say_the_same_and_no_markup_gets_lost(output):
    markdown = (output / "report/report.md").read_text(encoding="utf-8")
    page = Page((output / "report/report.html").read_text(encoding="utf-8"))
    for sentence in (ODD, f"base.py: {ODD}"):
        assert sentence in page.texts["li"]
    unsure = (
        "Of 1 queries 1 count as not found: their confidence is below 0.7. The figures are of all."
    )
    assert unsure in page.texts["p"]
    assert f"Place recognition: {ODD}, in {ODD}." in page.texts["p"]
    for row in (
        ["val", "9 / 80", "trained", "10.0 %", "50.0 %", "100.0 %"],
        ["1", "0.1235", "3.0"],
        ["base.py", "training", "12.3"],
        ["base.py", "limit", "default"],
        [ODD, "pnp", "–", "1.000", "2.00", "0.50"],
        ["P001", "320.0, 320.0", "–, –", "default", "xyzw camera_to_world", "default"],
    ):
        assert row in page.rows
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    found = [text for level in ("h1", "h2", "h3") for text in page.texts[level]]
    assert sorted(headings) == sorted(found)
    assert sum(line.startswith("| ") for line in markdown.split("\n")) == len(page.rows) + len(
        page.texts["table"]
    )
    assert "gone.png" not in markdown and "![" in markdown
    assert "python base.py --mining hard --seed 42 --dataset 'a b'" in page.texts["pre"][-1]
    assert "Negatives are mined" in markdown and "{mining}" not in markdown


def test_method_of_a_run_without_mining_does_not_speak_of_it(output):
    handin.update_metrics(output, "base", {"settings": {"mining": "random"}}, "ab" * 32)
    report.write_report(output)
    assert "Negatives are mined" not in (output / "report/report.md").read_text(encoding="utf-8")


def test_a_report_of_nothing_and_with_a_damaged_picture(tmp_path):
    report.write_report(tmp_path)
    assert "No results of test.py yet" in (tmp_path / "report/report.html").read_text()
    (tmp_path / "task3_result.png").write_bytes(b"half")
    handin.update_metrics(tmp_path, "base", {"recall": {"val": {"k": [1], "trained": [1.0]}}}, "c")
    report.write_report(tmp_path)
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 1


def test_a_picture_higher_than_a_page_is_cut_where_it_is_paper(tmp_path):
    pixels = np.full((700, 100, 3), 255, np.uint8)
    for top in range(0, 700, 50):
        pixels[top : top + 40] = 90  # bands of 40 rows, 10 rows of paper between
    parts = [np.asarray(part) for part in web_page._page_high(Image.fromarray(pixels))]
    assert len(parts) > 1 and (np.concatenate(parts) == pixels).all()
    assert all(len(part) <= web_page.PAGE_SHAPE * 100 for part in parts)
    assert all((part[-1] == 255).all() or (part[0] == 255).all() for part in parts[:-1])
    solid = Image.new("RGB", (100, 700))  # no paper anywhere: still no part is higher than a page
    heights = [part.height for part in web_page._page_high(solid)]
    assert sum(heights) == 700 and max(heights) <= web_page.PAGE_SHAPE * 100
