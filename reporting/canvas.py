"""What the pictures are drawn with, on Pillow alone: blocks, text, lines, photos, charts.

A block is a finished image; blocks are put beside and below one another. Pillow does not smooth
lines: all is drawn SCALE times as large, in these px, and `save` reduces it.
"""

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from reporting.handin import write_whole

SCALE = 2
FAST = 4  # of PNG compression: half the time of 6 for 3 % more bytes
INNER, MARGIN, GAP = 3008, 96, 56  # px: a picture's width without its margins; between blocks
SMALL, BODY, HEAD, TITLE = 40, 46, 56, 80  # text sizes in px
LINE_HEIGHT = 1.35  # of the text size
INK, MUTED, GRID, PAPER, YELLOW = "#1c2430", "#566070", "#dde2e8", "#ffffff", "#fff2d0"
RIGHT, WRONG, ACCENT, GOLD = "#00785a", "#cf4307", "#1d5fa8", "#e0a100"
BROWN, MINT = "#a3570f", "#17c08a"
FONT_FILE = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
Block = Image.Image
Point = tuple[float, float]


def save(path: Path, block: Block) -> None:
    """Write a block as an image file, whole or not at all."""
    write_whole(path, partial(block.reduce(SCALE).save, compress_level=FAST))


def blank(width: float, height: float, fill: str = PAPER) -> Block:
    """An empty block."""
    return Image.new("RGB", (math.ceil(width), math.ceil(height)), fill)


def below(blocks: Sequence[Block], gap: int = GAP, margin: int = 0) -> Block:
    """The blocks one below the other."""
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    whole = blank(max(block.width for block in blocks) + 2 * margin, height + 2 * margin)
    y = margin
    for block in blocks:
        whole.paste(block, (margin, y))
        y += block.height + gap
    return whole


def beside(blocks: Sequence[Block], gap: int = 2 * GAP) -> Block:
    """The blocks one beside the other, tops aligned."""
    width = sum(block.width for block in blocks) + gap * (len(blocks) - 1)
    whole = blank(width, max(block.height for block in blocks))
    x = 0
    for block in blocks:
        whole.paste(block, (x, 0))
        x += block.width + gap
    return whole


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The bundled font, DejaVu Sans."""
    return ImageFont.truetype(str(FONT_FILE), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def has_glyph(sign: str) -> bool:
    """Whether the bundled font can draw this character, left to right."""
    if not sign.isprintable() or unicodedata.bidirectional(sign) in ("R", "AL"):
        return False
    drawn, unknown = (font(32).getmask(each) for each in (sign, "\U0010ffff"))
    return (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))


def printable(text: str) -> str:
    r"""`text` with each character that the font lacks written as an escape such as \ubc29."""
    text = unicodedata.normalize("NFC", text)
    return "".join(sign if has_glyph(sign) else ascii(sign)[1:-1] for sign in text)


def text_width(text: str, size: int) -> float:
    """Width in px of one line of text."""
    return font(size).getlength(printable(text))


def shortened(text: str, size: int, width: float) -> str:
    """`text`, its middle replaced by … until it is at most `width` px wide."""
    short, keep = text, len(text)
    while keep and font(size).getlength(short) > width:
        keep -= 1
        short = text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]
    return short


def write(
    block: Block,
    x: float,
    y: float,
    text: str,
    size: int = BODY,
    color=INK,
    anchor="l",
    width=math.inf,
) -> float:
    """Write one line with its top at y (`size` · LINE_HEIGHT high) and return its width in px.

    x is its left end, middle or right end, as `anchor` says (l, m, r); longer than `width`: shortened.
    """
    text = shortened(printable(text), size, width)
    at = round(x), round(y + size * 1.05)
    ImageDraw.Draw(block).text(at, text, fill=color, font=font(size), anchor=f"{anchor}s")
    return font(size).getlength(text)


def paragraph(text: str, size: int = BODY, color: str = INK, fill: str = PAPER) -> Block:
    """`text` wrapped into the width of a picture; a word too long for a line is shortened."""
    padding = 0 if fill == PAPER else 28
    room, lines = INNER - 2 * padding, [""]
    for word in text.split():
        if lines[-1] and text_width(f"{lines[-1]} {word}", size) > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    block = blank(INNER, len(lines) * size * LINE_HEIGHT + 2 * padding, fill)
    for number, line in enumerate(lines):
        write(block, padding, padding + number * size * LINE_HEIGHT, line, size, color, width=room)
    return block


def table(rows: Sequence[Sequence[str]], size: int = BODY, whole: bool = False) -> Block:
    """A table as wide as a picture, its first row the header; cells that are too long are shortened.

    whole: as wide as its longest cells, if that is more.
    """
    wanted = [max(text_width(cell, size) for cell in column) + size for column in zip(*rows)]
    width = max(INNER, sum(wanted)) if whole else INNER
    rooms = [room * width / sum(wanted) for room in wanted]
    lines = []
    for number, row in enumerate(rows):
        block = blank(width, size * LINE_HEIGHT + 24)
        for left, room, cell in zip(itertools.accumulate(rooms, initial=0), rooms, row):
            write(block, left, 12, cell, size, INK if number else MUTED, width=room - size / 2)
        line(block, [(0, block.height - 1), (width, block.height - 1)], GRID, 2)
        lines.append(block)
    return below(lines, 0)


def line(block: Block, xy: Sequence[Point], color: str, width: float = 4) -> None:
    """A polyline through points (x, y) in px."""
    ImageDraw.Draw(block).line([*map(tuple, xy)], color, round(width), joint="curve")


def mark(block: Block, shape: str, x: float, y: float, radius: float, color: str) -> None:
    """A sign: a filled circle or square, or a ring, a tick, a cross."""
    draw, r = ImageDraw.Draw(block), radius
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=round(r / 2))
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "tick":
        line(block, [(x - r, y), (x - 0.3 * r, y + 0.7 * r), (x + r, y - 0.7 * r)], color, 0.4 * r)
    else:
        line(block, [(x - r, y - r), (x + r, y + r)], color, 0.4 * r)
        line(block, [(x - r, y + r), (x + r, y - r)], color, 0.4 * r)


def opened(path: str | Path) -> Block:
    """The image of a file, upright; a grey tile of 4:3 that says so if it does not open."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        tile = blank(640, 480, "#eceff3")
        write(tile, 320, 210, "cannot be opened", SMALL, MUTED, "m")
        return tile


def resized(image: Block, width: int) -> Block:
    """An image scaled to `width` px."""
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Series:
    """A line of a chart: values (None breaks it), how it is drawn, and an interval around each."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    mark: str | None = None
    width: int = 6
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """An axis: its range, and the ticks with what is written at them."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, value: float) -> float:
        """Where `value` lies between the ends of the axis: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


PERCENT = Axis(0, 100, [(share, f"{share} %") for share in range(0, 101, 20)])


def axis_from_zero(values: Sequence[float]) -> Axis:
    """An axis from 0 over all `values` (not negative), which ends at a number of one digit."""
    power = 10.0 ** math.floor(math.log10(max([*values, 1e-9])))
    high = math.ceil(max([*values, 1e-9]) / power - 1e-9) * power
    return Axis(0, high, [(high * part / 4, f"{high * part / 4:.4g}") for part in range(5)])


def chart(
    title: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    rules: Sequence = (),
) -> Block:
    """A chart half a picture wide; `rules`: (x, word) of vertical lines with a word on top."""
    width, height, row = INNER // 2 - GAP, 960 if rules else 860, SMALL * LINE_HEIGHT
    block = blank(width, height)
    write(block, 0, 0, title, width=width)
    legend = key([(one.mark, one.color, one.name, one.width) for one in series], width)
    block.paste(legend, (0, 70))
    left = 28 + max(text_width(text, SMALL) for _, text in y_axis.ticks)
    right = width - max(28, text_width(x_axis.ticks[-1][1], SMALL) / 2 + 4)
    top, bottom = 106 + legend.height + (2 * row if rules else 0), height - 2 * row - 20

    def at(x: float, y: float) -> Point:
        across, up = x_axis.share(x), y_axis.share(y)
        return left + across * (right - left), bottom - up * (bottom - top)

    for value, text in y_axis.ticks:
        y = at(x_axis.low, value)[1]
        write(block, left - 20, y - 0.65 * SMALL, text, SMALL, MUTED, "r")
        line(block, [(left, y), (right, y)], GRID, 2)
    for value, text in x_axis.ticks:
        write(block, at(value, y_axis.low)[0], bottom + 16, text, SMALL, MUTED, "m")
    write(block, (left + right) / 2, height - row - 4, x_label, SMALL, MUTED, "m")
    for number, (value, text) in enumerate(rules):
        x, y = at(value, y_axis.high)[0], top - row * (number % 2)  # neighbors may stand close
        line(block, [(x, y - 8), (x, bottom)], MUTED, 2)
        write(block, x, y - row - 8, text, SMALL, MUTED, "m")
    line(block, [(left, top), (left, bottom), (right, bottom)], MUTED)
    for one in series:
        if len(one.low) > 1:
            edge = [*zip(one.x, one.low), *reversed([*zip(one.x, one.high)])]
            ImageDraw.Draw(block, "RGBA").polygon(
                [at(x, y) for x, y in edge], fill=one.color + "2d"
            )
        points = [None if y is None else at(x, y) for x, y in zip(one.x, one.y)]
        for both in itertools.pairwise(points):
            if None not in both:
                line(block, both, one.color, one.width)
        for point in points if one.mark else ():
            if point is not None:
                mark(block, one.mark, *point, 12, one.color)
    return block


def key(entries: Sequence[tuple[str | None, str, str, int]], width: int = INNER) -> Block:
    """Signs and what they mean, in as many rows as it takes.

    An entry: mark (or None), color, words, width of its line (0: no line).
    """
    row = round(SMALL * LINE_HEIGHT)
    block = blank(width, max(len(entries), 1) * row)
    x, y = 0.0, 0
    for sign, color, words, thickness in entries:
        length = 100 + text_width(words, SMALL)
        if x and x + length > width:
            x, y = 0.0, y + row
        if thickness:
            line(block, [(x + 4, y + 26), (x + 84, y + 26)], color, thickness)
        if sign:
            mark(block, sign, x + 44, y + 26, 14, color)
        write(block, x + 100, y, words, SMALL, width=width - 100)
        x += length + 52
    return block.crop((0, 0, width, y + row))
