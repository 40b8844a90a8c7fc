"""What the pictures and the pages of the report are drawn with, on Pillow alone.

A `Canvas` is a block of finished drawing; blocks are put beside and below one another. Every piece
of text goes through `draw_text`, which knows its bounds and how to shorten it, and writes the
characters the font lacks as escapes instead of boxes. Lines are drawn by a `Pen` at three times the
size and reduced, because Pillow does not smooth them.
"""

import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

FONT_FILES = {False: "DejaVuSans.ttf", True: "DejaVuSans-Bold.ttf"}
INK, MUTED, GRID, PAPER = "#1c2430", "#566070", "#dde2e8", "#ffffff"
RIGHT, WRONG, ACCENT, GOLD = "#00785a", "#cf4307", "#1d5fa8", "#e0a100"
BROWN, MINT = "#a3570f", "#17c08a"
WARNING_FILL = "#fff2d0"
SMALL, BODY, HEAD, TITLE = 20, 23, 28, 40  # text sizes in px; SMALL is 10 px at half size
SMOOTHING = 3  # a Pen draws this many times larger
LINE_HEIGHT = 1.35  # of the text size

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Canvas:
    """A drawing, and where its texts and tiles (photos, plots) lie: what the layout's tests read."""

    image: Image.Image
    texts: list[tuple[Box, str]] = field(default_factory=list)
    tiles: list[Box] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height


def blank(width: float, height: float, fill: str = PAPER) -> Canvas:
    """An empty canvas."""
    return Canvas(Image.new("RGB", (math.ceil(width), math.ceil(height)), fill))


def place(canvas: Canvas, block: Canvas, x: float, y: float) -> None:
    """Put `block` on `canvas` with its top left corner at (x, y)."""
    x, y = round(x), round(y)
    canvas.image.paste(block.image, (x, y))
    canvas.texts += [(_moved(box, x, y), text) for box, text in block.texts]
    canvas.tiles += [_moved(box, x, y) for box in block.tiles]


def _moved(box: Box, x: float, y: float) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def below(blocks: Sequence[Canvas], gap: float, margin: float = 0) -> Canvas:
    """The blocks one below the other."""
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    canvas = blank(width + 2 * margin, height + 2 * margin)
    y = margin
    for block in blocks:
        place(canvas, block, margin, y)
        y += block.height + gap
    return canvas


def beside(blocks: Sequence[Canvas], gap: float) -> Canvas:
    """The blocks one beside the other, tops aligned."""
    width = sum(block.width for block in blocks) + gap * (len(blocks) - 1)
    canvas = blank(width, max(block.height for block in blocks))
    x = 0.0
    for block in blocks:
        place(canvas, block, x, 0)
        x += block.width + gap
    return canvas


# ---------------------------------------------------------------- text

@lru_cache(maxsize=64)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The bundled font, DejaVu Sans."""
    path = Path(__file__).parent / "fonts" / FONT_FILES[bold]
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def has_glyph(character: str, bold: bool = False) -> bool:
    """Whether the bundled font can draw this character, left to right."""
    if not character.isprintable() or unicodedata.bidirectional(character) in ("R", "AL"):
        return False
    face = font(32, bold)
    unknown = face.getmask("\U0010ffff")  # not a character: the font draws its box for "unknown"
    mask = face.getmask(character)
    return (mask.size, bytes(mask)) != (unknown.size, bytes(unknown))


def printable(text: str) -> str:
    r"""`text` with each character that the font lacks written as \uXXXX (or \UXXXXXXXX)."""
    return "".join(
        character if has_glyph(character) and has_glyph(character, bold=True)
        else f"\\u{ord(character):04x}" if ord(character) < 0x10000
        else f"\\U{ord(character):08x}"
        for character in unicodedata.normalize("NFC", text)
    )


def shortened(text: str, size: int, width: float, bold: bool = False) -> str:
    """`text`, its middle replaced by … until it is at most `width` px wide."""
    measure = font(size, bold).getlength
    if measure(text) <= width:
        return text
    low, high = 0, len(text)  # how many characters may stay
    while low < high:
        middle = (low + high + 1) // 2
        if measure(_without_middle(text, middle)) <= width:
            low = middle
        else:
            high = middle - 1
    return _without_middle(text, low)


def _without_middle(text: str, keep: int) -> str:
    tail = keep // 2
    return text[: keep - tail] + "…" + (text[-tail:] if tail else "")


def wrapped(text: str, size: int, width: float, bold: bool = False) -> list[str]:
    """`text` in lines of at most `width` px; a word that is too long is broken."""
    measure = font(size, bold).getlength
    lines = [""]
    for word in printable(text).split():
        joined = f"{lines[-1]} {word}".strip()
        if measure(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and measure(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def draw_text(
    canvas: Canvas, x: float, y: float, text: str, size: int = BODY, *, color: str = INK,
    bold: bool = False, align: str = "left", width: float | None = None,
) -> float:
    """Write one line with its top at y (`size` · LINE_HEIGHT high) and return its width in px.

    x is its left end, middle or right end, as `align` says; longer than `width`: shortened.
    """
    text = printable(text)
    if width is not None:
        text = shortened(text, size, width, bold)
    length = font(size, bold).getlength(text)
    left = round(x - {"left": 0.0, "center": length / 2, "right": length}[align])
    baseline = round(y + size * 1.05)
    draw = ImageDraw.Draw(canvas.image)
    draw.text((left, baseline), text, fill=color, font=font(size, bold), anchor="ls")
    if text.strip():
        box = draw.textbbox((left, baseline), text, font=font(size, bold), anchor="ls")
        canvas.texts.append((box, text))
    return length


def paragraph(
    text: str, width: float, size: int = BODY, *, color: str = INK, bold: bool = False,
    fill: str = PAPER, padding: float = 0,
) -> Canvas:
    """`text` wrapped into `width` px."""
    lines = wrapped(text, size, width - 2 * padding, bold)
    canvas = blank(width, len(lines) * size * LINE_HEIGHT + 2 * padding, fill)
    for number, line in enumerate(lines):
        y = padding + number * size * LINE_HEIGHT
        draw_text(canvas, padding, y, line, size, color=color, bold=bold)
    return canvas


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: float, size: int = BODY,
    bold_rows: Sequence[int] = (),
) -> Canvas:
    """A table `width` px wide; columns of numbers stand to the right, long cells are wrapped."""
    return below(table_rows(header, rows, width, size, bold_rows), 0)


def table_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: float, size: int = BODY,
    bold_rows: Sequence[int] = (),
) -> list[Canvas]:
    """The header and the rows of a `table`, one by one."""
    padding = 0.6 * size
    wanted = [
        max(font(size, True).getlength(printable(row[column])) for row in (header, *rows))
        + 2 * padding
        for column in range(len(header))
    ]
    widths = _column_widths(wanted, width)
    aligns = column_aligns(rows, len(header))
    blocks = []
    for number, cells in enumerate((header, *rows)):
        bold = number == 0 or number - 1 in bold_rows
        lines = [
            wrapped(cell, size, room - 2 * padding + 1, bold)
            for cell, room in zip(cells, widths, strict=True)
        ]
        row = blank(width, max(map(len, lines)) * size * LINE_HEIGHT + padding)
        left = 0.0
        for column, (cell, room) in enumerate(zip(lines, widths, strict=True)):
            align = aligns[column]
            x = left + padding if align == "left" else left + room - padding
            for line_number, line in enumerate(cell):
                y = padding / 2 + line_number * size * LINE_HEIGHT
                draw_text(row, x, y, line, size, bold=bold, align=align)
            left += room
        rule = INK if number == 0 else GRID
        ImageDraw.Draw(row.image).line(
            (0, row.height - 1, row.width, row.height - 1), fill=rule, width=1)
        blocks.append(row)
    return blocks


def column_aligns(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """"right" for columns in which every cell begins like a number, "left" for the others."""
    return [
        "right" if rows and all(row[column][:1] in "0123456789–-?" for row in rows) else "left"
        for column in range(columns)
    ]


def _column_widths(wanted: Sequence[float], width: float) -> list[float]:
    """Room for each column: in proportion to what it wants, or, if that is too much, the widest cut."""
    if sum(wanted) <= width:
        return [room * width / sum(wanted) for room in wanted]
    low, high = 0.0, max(wanted)
    for _ in range(40):  # bisection for the cap at which the columns just fit
        cap = (low + high) / 2
        low, high = (low, cap) if sum(min(room, cap) for room in wanted) > width else (cap, high)
    return [min(room, low) for room in wanted]


# ---------------------------------------------------------------- lines and marks

@dataclass
class Pen:
    """Draws smooth lines into a region of a canvas; coordinates are the canvas's own, in px."""

    draw: ImageDraw.ImageDraw
    left: float
    top: float

    def _points(self, xy: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x - self.left) * SMOOTHING, (y - self.top) * SMOOTHING) for x, y in xy]

    def line(
        self, xy: Sequence[tuple[float, float]], color: str, width: float = 2,
        dash: tuple[float, float] | None = None,
    ) -> None:
        """A polyline; `dash` = (drawn, left out) in px."""
        for piece in [xy] if dash is None else _dashes(xy, *dash):
            self.draw.line(
                self._points(piece), fill=color, width=round(width * SMOOTHING), joint="curve")

    def polygon(self, xy: Sequence[tuple[float, float]], fill: str | tuple) -> None:
        self.draw.polygon(self._points(xy), fill=fill)

    def rectangle(
        self, box: Box, color: str, width: float, dash: tuple[float, float] | None = None,
    ) -> None:
        """A frame whose line runs along the inside of `box`."""
        left, top, right, bottom = box
        half = width / 2
        corners = [(left + half, top + half), (right - half, top + half),
                   (right - half, bottom - half), (left + half, bottom - half)]
        for start, end in zip(corners, corners[1:] + corners[:1]):
            self.line([start, end], color, width, dash)
        for x, y in corners:
            self.mark("square", x, y, half, color)

    def mark(self, shape: str, x: float, y: float, radius: float, color: str) -> None:
        """A filled sign: circle, square, triangle or diamond; or a ring, a tick, a cross."""
        r = radius
        if shape in ("circle", "ring"):
            (left, top), (right, bottom) = self._points([(x - r, y - r), (x + r, y + r)])
            fill, line = (color, None) if shape == "circle" else (None, color)
            self.draw.ellipse(
                (left, top, right, bottom), fill=fill, outline=line, width=round(r * 0.5 * SMOOTHING))
        elif shape == "tick":
            self.line([(x - r, y), (x - 0.3 * r, y + 0.7 * r), (x + r, y - 0.7 * r)], color, 0.4 * r)
        elif shape == "cross":
            self.line([(x - r, y - r), (x + r, y + r)], color, 0.4 * r)
            self.line([(x - r, y + r), (x + r, y - r)], color, 0.4 * r)
        else:
            self.polygon([(x + dx * r, y + dy * r) for dx, dy in MARKS[shape]], color)


MARKS = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
}


@contextmanager
def pen(canvas: Canvas, box: Box) -> Iterator[Pen]:
    """A Pen for the region `box` of `canvas`; what it drew is there when the block ends."""
    left, top = math.floor(box[0]), math.floor(box[1])
    size = math.ceil(box[2]) - left, math.ceil(box[3]) - top
    layer = Image.new("RGBA", (size[0] * SMOOTHING, size[1] * SMOOTHING), (255, 255, 255, 0))
    yield Pen(ImageDraw.Draw(layer), left, top)
    layer = layer.resize(size, Image.Resampling.BOX)
    canvas.image.paste(layer, (left, top), layer)


def _dashes(
    xy: Sequence[tuple[float, float]], drawn: float, skipped: float,
) -> Iterator[list[tuple[float, float]]]:
    """The drawn pieces of a dashed polyline; the pattern runs on around its corners."""
    travelled = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(xy):
        length = math.hypot(x1 - x0, y1 - y0)
        first = math.floor(travelled / (drawn + skipped))
        last = math.ceil((travelled + length) / (drawn + skipped))
        for number in range(first, last if length else first):
            start = max(number * (drawn + skipped) - travelled, 0)
            end = min(number * (drawn + skipped) + drawn - travelled, length)
            if end > start:
                yield [(x0 + (x1 - x0) * at / length, y0 + (y1 - y0) * at / length)
                       for at in (start, end)]
        travelled += length


def photo(path: str | Path, width: int, height: int) -> Canvas:
    """An image file inside width × height px, whole and upright; a grey tile if it does not open."""
    canvas = blank(width, height, "#eceff3")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        draw_text(canvas, width / 2, height / 2 - SMALL, "cannot be opened", SMALL,
                  color=MUTED, align="center", width=width)
    else:
        image = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
        canvas.image.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    canvas.tiles.append((0, 0, width, height))
    return canvas


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image as `photo` shows it; 4:3 if it does not open."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).size
    except (OSError, ValueError, SyntaxError):
        return 640, 480


# ---------------------------------------------------------------- plots

@dataclass(frozen=True)
class Series:
    """A line of a plot: values (None breaks it), an interval around each, and how it is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    mark: str | None = None
    dash: tuple[float, float] | None = None
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """A plot's axis: its range, and the ticks with what is written at them; maybe logarithmic."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends of the axis: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def round_axis(values: Sequence[float], count: int = 4) -> Axis:
    """An axis from 0 (or below) over all `values`, with about `count` ticks at round numbers."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if high == low:
        high = low + 1
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(number * step, f"{number * step:.6g}") for number in range(first, last + 1)]
    return Axis(first * step, last * step, ticks)


def plot(
    title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, x_label: str,
    width: int, height: int, rules: Sequence[tuple[float, str]] = (),
) -> Canvas:
    """A chart: title, legend, axes, lines; `rules` are vertical lines at x with a word on top."""
    canvas = blank(width, height)
    draw_text(canvas, 0, 0, title, BODY, bold=True, width=width)
    legend = _legend(series, width)
    place(canvas, legend, 0, BODY * LINE_HEIGHT + 4)
    left = 14 + max(font(SMALL).getlength(text) for _, text in y_axis.ticks)
    last_tick = font(SMALL).getlength(x_axis.ticks[-1][1])
    top = BODY * LINE_HEIGHT + legend.height + 22 + (2 * SMALL * LINE_HEIGHT if rules else 0)
    right, bottom = width - max(14, last_tick / 2 + 2), height - 2 * SMALL * LINE_HEIGHT - 10

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + x_axis.share(x) * (right - left), bottom - y_axis.share(y) * (bottom - top))

    for value, text in y_axis.ticks:
        y = at(x_axis.low, value)[1]
        draw_text(canvas, left - 10, y - 0.65 * SMALL, text, SMALL, color=MUTED, align="right")
    for value, text in x_axis.ticks:
        x = at(value, y_axis.low)[0]
        draw_text(canvas, x, bottom + 8, text, SMALL, color=MUTED, align="center")
    draw_text(canvas, (left + right) / 2, height - SMALL * LINE_HEIGHT - 2, x_label, SMALL,
              color=MUTED, align="center", width=right - left)
    with pen(canvas, (0, top - 40, width, bottom + 10)) as lines:
        for value, _ in y_axis.ticks:
            lines.line([at(x_axis.low, value), at(x_axis.high, value)], GRID, 1)
        for number, (value, text) in enumerate(rules):
            x, y = at(value, y_axis.high)
            y -= SMALL * LINE_HEIGHT * (number % 2)  # neighbors may stand close
            lines.line([(x, y - 4), (x, bottom)], MUTED, 1, (4, 4))
            draw_text(canvas, x, y - SMALL * LINE_HEIGHT - 4, text, SMALL, color=MUTED, align="center")
        lines.line([(left, top), (left, bottom), (right, bottom)], MUTED, 2)
        for one in series:
            _draw_series(lines, one, at)
    canvas.tiles.append((left, top, right, bottom))
    return canvas


def _draw_series(lines: Pen, one: Series, at) -> None:
    if one.low and one.high:
        edge = [at(x, y) for x, y in zip(one.x, one.low, strict=True)]
        edge += [at(x, y) for x, y in reversed(list(zip(one.x, one.high, strict=True)))]
        if len(edge) > 2:
            red, green, blue = (int(one.color[i:i + 2], 16) for i in (1, 3, 5))
            lines.polygon(edge, (red, green, blue, 45))
    piece: list[tuple[float, float]] = []
    for x, y in [*zip(one.x, one.y, strict=True), (0, None)]:
        if y is not None:
            piece.append(at(x, y))
            continue
        if len(piece) > 1:
            lines.line(piece, one.color, 3, one.dash)
        for point in piece if one.mark else ():
            lines.mark(one.mark, *point, 6, one.color)
        piece = []


def _legend(series: Sequence[Series], width: float) -> Canvas:
    return key([(one.mark, one.color, one.name, one.dash) for one in series], width)


def key(entries: Sequence[tuple], width: float) -> Canvas:
    """Signs and what they mean, in as many rows as it takes.

    An entry: mark (or None), color, words, dashes of its line (None: a solid one, (): no line).
    """
    canvas = blank(width, len(entries) * SMALL * LINE_HEIGHT)
    x, y = 0.0, 0.0
    for mark, color, words, dash in entries:
        length = 50 + font(SMALL).getlength(printable(words))
        if x and x + length > width:
            x, y = 0.0, y + SMALL * LINE_HEIGHT
        middle = y + 0.65 * SMALL
        with pen(canvas, (x, y, x + 44, y + SMALL * LINE_HEIGHT)) as lines:
            if dash != ():
                lines.line([(x + 2, middle), (x + 42, middle)], color, 3, dash)
            if mark:
                lines.mark(mark, x + 22, middle, 7, color)
        draw_text(canvas, x + 50, y, words, SMALL, width=width - 50)
        x += length + 26
    canvas.image = canvas.image.crop((0, 0, canvas.width, math.ceil(y + SMALL * LINE_HEIGHT)))
    return canvas
