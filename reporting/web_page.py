"""The report as one HTML file, made of its Markdown: pictures inside, readable on a phone, and printed to
A4 by its button."""

import base64
import io
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from reporting.canvas import opened

PAGE_SHAPE = 1.3  # height over width of what fits on a printed page
JPEG_QUALITY = 85
PAPER = 250  # gray level from which on a pixel is paper
PAGE = Path(__file__).parent / "page.html"


def as_html(markdown: str, folder: Path) -> str:
    """The page of a report that `report.contents` made; its pictures are looked for from `folder`."""
    first, *parts = markdown.strip().split("\n\n")
    body = "\n".join(_element(part, folder) for part in (first, *parts))
    page = PAGE.read_text(encoding="utf-8").replace("{title}", _text(first.lstrip("# ")))
    return page.replace("{body}", body)


def _element(part: str, folder: Path) -> str:
    """One block of Markdown, what lies between two empty lines, as HTML."""
    lines = part.split("\n")
    if heading := re.fullmatch("(#+) (.*)", part):
        level = len(heading[1])
        return f"<h{level}>{_text(heading[2])}</h{level}>"
    if picture := re.fullmatch(r"!\[(.*)\]\(<(.*)>\)", part):
        images = "".join(map(_image, _page_high(opened(folder / picture[2]))))
        caption = _text(picture[1])
        tags = images.replace('alt=""', f'alt="{caption}"', 1)
        return f'<figure><div class="wide">{tags}</div><figcaption>{caption}</figcaption></figure>'
    if link := re.fullmatch(r"\[(.*)\]\(<(.*)>\)", part):
        return f'<p><a href="{quote(link[2], errors="surrogateescape")}">{_text(link[1])}</a></p>'
    if part.startswith("```"):
        return f"<pre>{escape(chr(10).join(lines[1:-1]))}</pre>"
    if part.startswith("> "):
        return f"<blockquote>{_text(part[2:])}</blockquote>"
    if part.startswith("- "):
        return f"<ul>{''.join(f'<li>{_text(line[2:])}</li>' for line in lines)}</ul>"
    if part.startswith("| "):
        return _table(lines)
    return f"<p>{_text(part)}</p>"


def _table(lines: list[str]) -> str:
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    looks = [' class="number"' if rule.endswith(":") else "" for rule in table.pop(1)]
    rows = []
    for tag, row in zip(["th"] + ["td"] * len(lines), table):
        texts = [re.sub("([/_])", r"\1<wbr>", _text(cell)) for cell in row]  # where paths may break
        cells = "".join(f"<{tag}{look}>{text}</{tag}>" for look, text in zip(looks, texts))
        rows.append(f"<tr>{cells}</tr>")
    body = "\n".join(rows[1:])
    return f'<div class="wide"><table><thead>{rows[0]}</thead>\n<tbody>{body}</tbody></table></div>'


def _text(marked: str) -> str:
    """Markdown's text as HTML: its bold words, and no escapes any more."""
    bold = re.sub(r"(?<!\\)\*\*(.+?)\*\*", r"<b>\1</b>", escape(marked))
    return re.sub(r"\\(&\w+;|.)", r"\1", bold)


def _page_high(image: Image.Image) -> Iterator[Image.Image]:
    """A picture cut, in rows that are paper throughout, into parts no higher than a page is."""
    empty = np.asarray(image.convert("L")).min(axis=1) >= PAPER
    most, top = round(PAGE_SHAPE * image.width), 0
    while image.height - top > most:
        rows = np.flatnonzero(empty[top : top + most])
        rows = rows[rows > most // 3]
        bottom = top + (int(rows[-1]) if len(rows) else most)
        yield image.crop((0, top, image.width, bottom))
        top = bottom
    yield image.crop((0, top, image.width, image.height))


def _image(image: Image.Image) -> str:
    """An <img> that holds the image, as JPEG."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="" src="data:image/jpeg;base64,{data}">'
