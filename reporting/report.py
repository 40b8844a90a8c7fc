"""Writes output/report/ from metrics.json and the pictures of a run: every number comes from there.

`contents` lists what stands in the report once; `as_markdown` and `as_pages` (for the PDF) are two
thin writers over that list.
"""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from reporting import canvas as c
from reporting import figures
from reporting.handin import SECTIONS, read_metrics, write_whole

PAGE = 1654, 2339  # A4 at 200 dots an inch
PAGE_DPI = 200
PAGE_MARGIN = 140
PAGE_TEXT = 28  # px: 10 points
NO_SETTINGS = {"query", "quiet"}  # options that change no result
MIN_BAND = 14  # px: pictures higher than a page are cut in empty bands at least so high
MIN_PART = 100  # px: a lower part of a cut picture is a heading and stays with the next
INK_SEEN = 8  # gray levels: what differs less from paper is blur


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Notice:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they stand: formulas, commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


Block = Heading | Text | Notice | Bullets | Code | Table | Picture


def write_report(output: Path) -> None:
    """Write report/report.md and report/report.pdf into `output` from what lies there.

    ValueError when metrics.json is broken or a file cannot be written.
    """
    output = Path(output)
    metrics = read_metrics(output)
    blocks = contents(metrics, output)
    checkpoints = sorted({metrics[name]["checkpoint"] for name in SECTIONS if name in metrics})
    folder = output / "report"
    markdown = as_markdown(blocks, folder).encode("utf-8", "backslashreplace")
    write_whole(folder / "report.md", lambda part: _write_bytes(part, markdown))
    first, *others = as_pages(blocks)
    write_whole(folder / "report.pdf", lambda part: first.save(
        part, save_all=True, append_images=others, resolution=PAGE_DPI, quality=88,
        title="NetVLAD: report", subject=f"checkpoint {' and '.join(checkpoints)}"))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# ---------------------------------------------------------------- contents

def contents(metrics: dict, output: Path) -> list[Block]:
    """The report as a list of blocks, from metrics.json and the pictures found in `output`."""
    base, test = metrics.get("base") or {}, metrics.get("test") or {}
    return [
        Heading("NetVLAD place recognition and camera poses", 1),
        *(Notice(text) for text in _warnings(metrics, base, test)),
        *_at_a_glance(base, test),
        *_data(base, test),
        *_method(base),
        *_settings(base, test),
        *_recall_results(base, output),
        *_pose_results(test, output),
        *_times(base, test),
        *_limits(base, test),
        *_reproduce(base, test),
    ]


def _warnings(metrics: dict, base: dict, test: dict) -> list[str]:
    texts = [*metrics.get("warnings", []), *figures.plain_warnings({**base, "stale": False})]
    if (test.get("data") or {}).get("is_sample") and not (base.get("data") or {}).get("is_sample"):
        texts.append("The camera poses are of the built-in sample's rendered rooms.")
    for section, what, script in ((base, "recall", "base.py"), (test, "camera poses", "test.py")):
        if not section:
            texts.append(f"No results of {script} yet: run it, and this report fills up.")
        elif section.get("stale"):
            texts.append(f"The results on {what} belong to another checkpoint "
                         f"({section['checkpoint'][:12]}…): run {script} again.")
    return texts


def _at_a_glance(base: dict, test: dict) -> list[Block]:
    lines = [figures.headline(base["recall"])] if base.get("recall") else []
    if test:
        lines.append(
            f"{test.get('queries', '?')} query images in {len(test.get('scenes') or [])} scenes: "
            f"mean pose error {_error(test, 'mean')}, median {_error(test, 'median')}; "
            f"the best index image alone would give {_error(test.get('retrieval') or {}, 'mean')} "
            f"and {_error(test.get('retrieval') or {}, 'median')}.")
    return [Heading("Results at a glance"), Bullets(lines)] if lines else []


def _error(section: dict, kind: str) -> str:
    """"0.031 m / 0.10°" of the mean or the median."""
    return f"{_number(section.get(f'{kind}_m'), 3)} m / {_number(section.get(f'{kind}_deg'), 2)}°"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _data(base: dict, test: dict) -> list[Block]:
    blocks: list[Block] = [Heading("Data")]
    if data := base.get("data"):
        blocks.append(Text(f"Place recognition: {data.get('name', '?')}, in {data.get('root', '?')}."))
        rows = [
            [part, str(data[f"{part}_queries"]), str(data.get(f"{part}_index", "–"))]
            for part in ("train", "val", "test") if data.get(f"{part}_queries") is not None
        ]
        if rows:
            blocks.append(Table(["lists", "queries", "index images"], rows))
    if split := base.get("split"):
        blocks.append(Text(
            f"The training queries were split by place into {split.get('train')} for training, "
            f"{split.get('val')} for the validation loss and {split.get('test')} for the test loss, "
            f"so that no index image lies near queries of two parts; {split.get('dropped')} queries "
            "in between were dropped."))
    if test:
        blocks.append(Text(
            f"Camera poses: scenes {', '.join(map(str, test.get('scenes') or []))}; of all frames "
            f"{test.get('queries', '?')} were drawn as queries (seed {test.get('seed', '?')}) and "
            f"{test.get('index', '?')} are the index, whose poses are known."))
    if remarks := (base.get("data") or {}).get("remarks"):
        blocks.append(Bullets(remarks))
    if cameras := test.get("cameras"):
        blocks.append(Table(
            ["scene", "fx, fy px", "cx, cy px", "from", "pose file read as", "from"],
            [[name, *(f"{_number(camera.get(a), 1)}, {_number(camera.get(b), 1)}"
                      for a, b in (("fx", "fy"), ("cx", "cy"))), _said(camera.get("focal_from")),
              _said(camera.get("convention")), _said(camera.get("convention_from"))]
             for name, camera in cameras.items()],
            "Cameras: found from matches of the posed index images (evidence), assumed (prior) or given"))
    return blocks if len(blocks) > 1 else []


def _method(base: dict) -> list[Block]:
    """The method; how negatives are found depends on the run."""
    mined = (base.get("settings") or {}).get("mining") == "hard"
    return [*DESCRIPTOR_AND_LOSS, *(MINING if mined else ()), *RECALL_AND_POSES]


DESCRIPTOR_AND_LOSS: tuple[Block, ...] = (
    Heading("Method"),
    Heading("Global descriptor (task 1)", 3),
    Text("The convolutional part of VGG16, up to conv5_3 without its ReLU, gives 512 channels at "
         "14 × 14 places of a 224 × 224 image. Each local descriptor is normalized, softly assigned "
         "to K cluster centers, and the residuals are summed per cluster:"),
    Code((
        "x_i = local descriptor at place i, |x_i| = 1",
        "a_k(x_i) = exp(w_k·x_i + b_k) / Σ_j exp(w_j·x_i + b_j)",
        "V_k = Σ_i a_k(x_i) (x_i − c_k) = Σ_i a_k(x_i) x_i − (Σ_i a_k(x_i)) c_k",
        "descriptor = normalize( [ normalize(V_1), …, normalize(V_K) ] )",
    )),
    Text("The second form of V_k is one matrix product and never holds the residuals themselves. "
         "The centers c_k come from k-means over descriptors of training index images, and the "
         "assignment starts with"),
    Code((
        "w_k = α c_k / |c_k|, b_k = 0",
        "α = ln 100 / mean(cosine to the best center − cosine to the second)",
    )),
    Text("so that on average the best center weighs 100 times the second."),
    Heading("Training (task 2)", 3),
    Text("For a query q, an image p of the same place and one n of another place, the ranking loss "
         "is minimized with Adam:"),
    Code(("L = max(0, d(q, p) + margin − d(q, n)),  d = distance of the descriptors",)),
    Text("Layers that are not trained do the same work in every epoch; their outputs are computed "
         "once per image and kept."),
)

MINING: tuple[Block, ...] = (
    Text("Negatives are mined: among random index images of other places and those that were hardest "
         "for the query before, the most similar to it are taken, and a query none of whose negatives "
         "violates the margin is skipped. The positive is the most similar of the near ones. "
         "Descriptors for this are made anew as the weights change. In each epoch as many index images "
         "as there are queries, drawn anew, serve as queries too, and every second epoch takes the mirror "
         "images of all. The weights kept are those of the epoch that ranks the held-out queries and "
         "the index images near them best (mean reciprocal rank, MRR)."),
)

RECALL_AND_POSES: tuple[Block, ...] = (
    Heading("Recall (task 3)", 3),
    Text("Index images are ranked by cosine similarity, by exact search. A query is answered by "
         "rank K when one of its K best index images lies within the threshold of the lists; a "
         "query with no such image takes its nearest one. Chance is the expected recall of a random "
         "order. The interval is a bootstrap over the queries."),
    Code(("Recall@K = queries with a right image among the K best / all queries",)),
    Heading("Camera poses (task 4)", 3),
    Text("The descriptor ranks the posed index images for each query. Local features (SIFT with "
         "RootSIFT normalization) are matched among the index images along the epipolar lines that "
         "their poses give, and triangulated. A query's matches with these points, of all index "
         "images and of single ones, give many hypotheses by P3P inside RANSAC with local "
         "optimization."),
    Text("Repeated doors and tiles give wrong poses plenty of inliers. So the hypotheses are scored "
         "by each keypoint's best match in every index image, which counts the less, the less alike "
         "it is than the keypoint's best of all: the true place matches a little better than its "
         "copies. The winner is refined with guided matching by robust least squares on the "
         "reprojection error. Where points are too few, relative poses to single index images "
         "serve; last of all, the poses of the best index images are averaged. Every estimate "
         "carries the name of the method that gave it."),
    Code((
        "minimize over R, t:  Σ_i ρ( | π(R X_i + t) − x_i |² ),  π(X, Y, Z) = (f X/Z + c_x, f Y/Z + c_y)",
        "translation error = | c_estimated − c_true |",
        "rotation error = 2 atan2(|v|, |w|) of the quaternion (w, v) of q_true⁻¹ q_estimated",
    )),
    Text("True poses of queries are used for these two errors only."),
)


def _settings(base: dict, test: dict) -> list[Block]:
    rows = [
        [script, str(flag).replace("_", "-"), _said(value)]
        for script, section in (("base.py", base), ("test.py", test))
        for flag, value in (section.get("settings") or {}).items() if flag not in NO_SETTINGS
    ]
    if origin := (base.get("weights") or {}).get("origin"):
        rows.append(["base.py", "weights in use", origin])
    return [Heading("Settings"), Table(["script", "setting", "value"], rows)] if rows else []


def _said(value) -> str:
    """A setting's value as one would say it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _recall_results(base: dict, output: Path) -> list[Block]:
    if not base.get("recall"):
        return []
    blocks: list[Block] = [
        Heading("Results: recall"), Table(*figures.recall_rows(base["recall"])),
        Text("In brackets: 95 % bootstrap interval over the queries."),
    ]
    if epochs := base.get("epochs"):
        columns = [
            (key, name, digits) for key, name, digits in (
                ("train_loss", "training loss", 4), ("val_loss", "validation loss", 4),
                ("violations", "violations", 3), ("skipped", "skipped tuples", 0),
                ("held_out_mrr", "held-out MRR", 3), ("seconds", "seconds", 1))
            if any(entry.get(key) is not None for entry in epochs)
        ]
        blocks.append(Table(["epoch", *(name for _, name, _ in columns)], [
            [str(entry.get("epoch")), *(_number(entry.get(key), digits) for key, _, digits in columns)]
            for entry in epochs
        ]))
    if base.get("test_loss") is not None:
        blocks.append(Text(f"Loss on the held-out test part of the training queries: "
                           f"{base['test_loss']:.4f}."))
    picture = output / "task3_result.png"
    if picture.is_file():
        blocks.append(Picture(picture, "Recall, training, and chosen queries with their best matches."))
    return blocks


def _pose_results(test: dict, output: Path) -> list[Block]:
    if not test:
        return []
    retrieval = test.get("retrieval") or {}
    limits = list(test.get("within") or {})
    rows = [
        [name, _number(section.get("mean_m"), 3), _number(section.get("mean_deg"), 2),
         _number(section.get("median_m"), 3), _number(section.get("median_deg"), 2),
         *(figures.percent((section.get("within") or {}).get(limit)) for limit in limits)]
        for name, section in (("ours", test), ("best index image", retrieval)) if section
    ]
    blocks: list[Block] = [
        Heading("Results: camera poses"),
        Table(["pose from", "mean m", "mean °", "median m", "median °",
               *(limit.replace("deg", "°") for limit in limits)], rows),
    ]
    if methods := test.get("methods"):
        blocks.append(Table(["method", "queries", "median m", "median °"], [
            [name, str(entry.get("count")), _number(entry.get("median_m"), 3),
             _number(entry.get("median_deg"), 2)] for name, entry in methods.items()
        ]))
    measured = [row for row in test.get("per_query") or [] if row.get("error_m") is not None]
    if worst := sorted(measured, key=lambda row: -row["error_m"])[:5]:
        blocks.append(Table(
            ["query", "method", "inliers", "error m", "error °", "confidence"],
            [[str(row["path"]), str(row.get("method")), str(row.get("inliers", "–")),
              _number(row["error_m"], 3), _number(row.get("error_deg"), 2),
              _number(row.get("confidence"), 2)] for row in worst],
            "The largest position errors"))
    folder = output / "report"
    return blocks + [
        Picture(folder / picture["file"], picture["caption"])
        for picture in test.get("pictures") or [] if (folder / picture["file"]).is_file()]


def _times(base: dict, test: dict) -> list[Block]:
    rows = [
        [script, phase, f"{seconds:.1f}"]
        for script, section in (("base.py", base), ("test.py", test))
        for phase, seconds in (section.get("phases") or {}).items() if seconds is not None
    ]
    return [Heading("Time by phase"), Table(["script", "phase", "seconds"], rows)] if rows else []


def _limits(base: dict, test: dict) -> list[Block]:
    items = [
        ("Repeated structure (tiles, doors, panels) can put a pose a whole repetition off, with many "
        "inliers; the mean error then says more about a few such queries than about precision."),
        "Images are reduced to 224 × 224 for the descriptor: small signs do not count.",
        "A pose is metric only as far as the index poses are.",
    ]
    items += [f"{script}: {text}" for script, section in (("base.py", base), ("test.py", test))
              for text in section.get("warnings") or []]
    return [Heading("Limits"), Bullets(items)]


def _reproduce(base: dict, test: dict) -> list[Block]:
    blocks: list[Block] = [Heading("How to reproduce")]
    commands = ["pip install -r requirements.txt"]
    commands += [
        " ".join(["python", script, *_flags(section.get("settings") or {})])
        for script, section in (("base.py", base), ("test.py", test)) if section
    ]
    blocks.append(Code(commands))
    rows = []
    for script, section in (("base.py", base), ("test.py", test)):
        facts = {"checkpoint": section.get("checkpoint"), "date": section.get("date"),
                 "seed": section.get("seed"), "device": section.get("device"),
                 **(section.get("versions") or {})}
        rows += [[script, name, str(value)] for name, value in facts.items() if value is not None]
    return [*blocks, Table(["script", "what", "value"], rows)] if rows else blocks


def _flags(settings: dict) -> list[str]:
    """{"batch_size": 8} → ["--batch-size", "8"]; what is off or not set is left out."""
    words = []
    for name, value in settings.items():
        if name in NO_SETTINGS or value is None or value is False or value == []:
            continue
        words.append("--" + str(name).lstrip("-").replace("_", "-"))
        if value is not True:
            words += [shlex.quote(str(each)) for each in (value if isinstance(value, list) else [value])]
    return words


# ---------------------------------------------------------------- the two writers

def as_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The report as Markdown that lies in `folder`."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text):
                parts.append(_escaped(text))
            case Notice(text):
                parts.append(f"> **Note.** {_escaped(text)}")
            case Bullets(items):
                parts.append("\n".join(f"- {_escaped(item)}" for item in items))
            case Code(lines):
                parts.append("```text\n" + "\n".join(lines) + "\n```")
            case Table(header, rows, title):
                rule = ["---:" if align == "right" else "---"
                        for align in c.column_aligns(rows, len(header))]
                lines = [[_escaped(cell) for cell in header], rule,
                         *([_escaped(cell) for cell in row] for row in rows)]
                parts += [f"{title}:"] if title else []
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Picture(path, caption):
                link = _relative(path, folder)
                parts.append(f"![{_escaped(caption)}](<{link}>)")
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Text whose characters Markdown would read as markup stand as they are."""
    return "".join(f"\\{sign}" if sign in "\\`*_<>[]|#" else sign for sign in " ".join(text.split()))


def _relative(path: Path, folder: Path) -> str:
    return path.name if path.parent == folder else f"../{path.name}"


def as_pages(blocks: Sequence[Block]) -> list[Image.Image]:
    """The report as A4 pages."""
    return [canvas.image for canvas in draw_pages(blocks)]


@dataclass(frozen=True)
class _Piece:
    """Something that stays on one page, the gap below it, whether it may not end a page, and what
    is repeated above it when it begins one."""

    canvas: c.Canvas
    gap: float = 0
    with_next: bool = False
    head: c.Canvas | None = None


def draw_pages(blocks: Sequence[Block]) -> list[c.Canvas]:
    """The blocks set one below the other onto numbered A4 pages; tables are cut between rows."""
    width, height = PAGE[0] - 2 * PAGE_MARGIN, PAGE[1] - 2 * PAGE_MARGIN
    pages = [c.blank(*PAGE)]
    y = 0.0
    pieces = list(_drawn(blocks, width, height))
    for number, piece in enumerate(pieces):
        if y and y + _height_together(pieces[number:]) > height:
            pages.append(c.blank(*PAGE))
            y = 0.0
        if not y and piece.head:
            c.place(pages[-1], piece.head, PAGE_MARGIN, PAGE_MARGIN)
            y = piece.head.height
        c.place(pages[-1], piece.canvas, PAGE_MARGIN, PAGE_MARGIN + y)
        y += piece.canvas.height + piece.gap
    for number, page in enumerate(pages, start=1):
        c.draw_text(page, PAGE[0] / 2, PAGE[1] - PAGE_MARGIN + 40, f"{number} / {len(pages)}",
                    c.SMALL, color=c.MUTED, align="center")
    return pages


def _height_together(pieces: Sequence[_Piece]) -> float:
    """Height of the first piece and of those that have to stand on the same page."""
    height = 0.0
    for piece in pieces:
        height += piece.canvas.height
        if not piece.with_next:
            break
        height += piece.gap
    return height


def _drawn(blocks: Sequence[Block], width: int, height: int) -> Iterator[_Piece]:
    """The blocks in pieces; `height` is that of a page."""
    for block in blocks:
        match block:
            case Heading(text, level):
                size = {1: 56, 2: 40}.get(level, 32)
                yield _Piece(c.blank(width, size * 0.5), with_next=True)
                yield _Piece(c.paragraph(text, width, size, bold=True), 16, with_next=True)
            case Text(text):
                yield from (_Piece(line) for line in _lines(text, width))
                yield _Piece(c.blank(width, 1), 18)
            case Notice(text):
                yield _Piece(figures.warning_banner(text, width), 18)
            case Bullets(items):
                for item in items:
                    for number, line in enumerate(_lines(item, width - 40)):
                        row = c.blank(width, line.height)
                        c.place(row, line, 40, 0)
                        if number == 0:
                            c.draw_text(row, 10, 0, "•", PAGE_TEXT)
                        yield _Piece(row)
                yield _Piece(c.blank(width, 1), 18)
            case Code(lines):
                yield _Piece(_code(lines, width), 24)
            case Table(header, rows, title):
                if title:
                    yield _Piece(c.paragraph(title, width, PAGE_TEXT, bold=True), 6, with_next=True)
                head, *others = c.table_rows(header, rows, width, PAGE_TEXT - 2)
                yield _Piece(head, with_next=True)
                yield from (_Piece(row, head=head if number else None)
                            for number, row in enumerate(others))
                yield _Piece(c.blank(width, 1), 24)
            case Picture(path, caption):
                yield from _picture_pieces(path, caption, width, height)


def _lines(text: str, width: float) -> list[c.Canvas]:
    return [c.paragraph(line, width, PAGE_TEXT) for line in c.wrapped(text, PAGE_TEXT, width)]


def _code(lines: Sequence[str], width: float) -> c.Canvas:
    """Lines that stay together on grey, long ones wrapped and set in."""
    size, padding = PAGE_TEXT - 2, 14
    pieces = []
    for line in lines:
        first, *others = c.wrapped(line, size, width - 2 * padding - 40)
        pieces += [(0, first), *((40, other) for other in others)]
    canvas = c.blank(width, len(pieces) * size * 1.5 + 2 * padding, "#eef1f5")
    for number, (indent, piece) in enumerate(pieces):
        c.draw_text(canvas, padding + indent, padding + number * size * 1.5, piece, size)
    return canvas


def _picture_pieces(path: Path, caption: str, width: int, height: int) -> Iterator[_Piece]:
    """A picture as wide as the page; one higher than a page is cut in its empty bands."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    drawn = ImageChops.difference(image, Image.new("RGB", image.size, c.PAPER)).getbbox()
    image = image.crop(drawn)  # the page has a margin of its own
    image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    label = c.paragraph(caption, width, c.SMALL + 4, color=c.MUTED)
    cuts = _empty_bands(image) if image.height + label.height > height else []
    edges = [0, *cuts, image.height]
    yield _Piece(c.blank(width, 16), with_next=True)
    for top, bottom in itertools.pairwise(edges):
        band = image.crop((0, top, width, bottom))
        is_heading = band.height < MIN_PART
        yield _Piece(c.Canvas(band), 4, with_next=is_heading or bottom == image.height)
    yield _Piece(label, 24)


def _empty_bands(image: Image.Image) -> list[int]:
    """The middles of the bands of at least MIN_BAND rows that are paper throughout."""
    ink = ImageChops.difference(image, Image.new("RGB", image.size, c.PAPER)).convert("L")
    rows = np.asarray(ink).max(axis=1) > INK_SEEN
    edges = np.flatnonzero(np.diff(np.concatenate([[True], rows, [True]]).astype(int)))
    return [int((top + bottom) // 2) for top, bottom in edges.reshape(-1, 2) if bottom - top >= MIN_BAND]
