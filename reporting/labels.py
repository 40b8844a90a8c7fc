"""What the labels of a data set of named images say: positions, headings, classes, positives.

    python -m reporting.labels sf_xs                   # logs/labels/*_labels.png, *_images.png
    python -m reporting.labels sf_xs/val --output DIR

FOLDER holds train/, val/, test/ (or images/ with them), or is one of these: database/ and queries/, or
images alone, whose classes are then CosPlace's.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dataset.classes import Classes, Grid, find_classes, histogram
from dataset.folders import INDEX_FOLDERS, SPLITS, FolderImages, FolderSplit, read_split
from model import InputError, refuse, warn
from reporting import canvas
from reporting.canvas import GAP, INNER, MUTED, SMALL, Block

POSITIVE_M = 25.0
SECTOR_DEG = 30
MOST_BARS = 24
SHOWN_ROWS, SHOWN_EACH = 6, 6
HALF = INNER // 2 - GAP
GRAY, RED = "#8a94a3", canvas.WRONG


# ---------------------------------------------------------------- blocks


def bars(title: str, counts: Mapping[str, int], x_label: str) -> Block:
    """A bar for each count, with its number above; half a picture wide."""
    height, top, bottom = 760, 90, 630
    block = canvas.blank(HALF, height)
    canvas.write(block, 0, 0, title, width=HALF)
    most, room = max([*counts.values(), 1]), HALF / max(1, len(counts))
    for number, (name, count) in enumerate(counts.items()):
        left, high = number * room, (bottom - top - 60) * count / most
        middle = left + room / 2
        canvas.line(
            block, [(middle, bottom), (middle, bottom - max(2, high))], canvas.ACCENT, room * 0.7
        )
        canvas.write(block, middle, bottom - high - 58, str(count), SMALL, MUTED, "m", room)
        canvas.write(block, middle, bottom + 8, name, SMALL, MUTED, "m", room)
    canvas.line(block, [(0, bottom), (HALF, bottom)], MUTED)
    canvas.write(block, HALF / 2, bottom + 66, x_label, SMALL, MUTED, "m", HALF)
    return block


def binned(values: Sequence[int]) -> dict[str, int]:
    """How often each whole number occurs, in at most MOST_BARS ranges."""
    counts = histogram(values)
    if len(counts) <= MOST_BARS:
        return {str(value): count for value, count in counts.items()}
    edges = np.unique(np.linspace(min(counts), max(counts) + 1, MOST_BARS // 2 + 1).astype(int))
    found, _ = np.histogram(list(values), edges)
    return {f"{a}–{b - 1}": int(n) for a, b, n in zip(edges, edges[1:], found)}


def scatter(title: str, sets: Sequence[tuple[str, np.ndarray, str]]) -> Block:
    """Positions (n, 2) in meters seen from above, north up; half a picture wide."""
    block = canvas.blank(HALF, 1000)
    canvas.write(block, 0, 0, title, width=HALF)
    legend = canvas.key(
        [("circle", color, f"{name} ({len(utm)})", 0) for name, utm, color in sets], HALF
    )
    block.paste(legend, (0, 70))
    everything = np.concatenate([utm for _, utm, _ in sets])
    low, high = everything.min(0), everything.max(0)
    top, room = 80 + legend.height, 1000 - 160 - legend.height
    scale = min(HALF / max(high[0] - low[0], 1.0), room / max(high[1] - low[1], 1.0)) * 0.97
    middle, at = (low + high) / 2, np.array([HALF, 2 * top + room]) / 2
    for _, utm, color in sets:
        for x, y in at + (utm - middle) * (scale, -scale):
            canvas.mark(block, "circle", x, y, 5, color)
    extent = f"{(high[0] - low[0]) / 1000:.2f} km east-west, {(high[1] - low[1]) / 1000:.2f} km north-south"
    canvas.write(block, HALF / 2, 940, extent, SMALL, MUTED, "m", HALF)
    return block


def sheet(rows: Sequence[tuple[str, Sequence[Path]]]) -> Block:
    """Rows of images under a line each."""
    width = (INNER - (SHOWN_EACH - 1) * 20) // SHOWN_EACH
    blocks = []
    for words, paths in rows:
        blocks.append(canvas.paragraph(words, SMALL, MUTED))
        tiles = [canvas.resized(canvas.opened(path), width) for path in paths[:SHOWN_EACH]]
        blocks.append(canvas.beside(tiles, 20))
    return canvas.below(blocks, 20)


def rows_of(blocks: Sequence[Block]) -> Block:
    """Blocks half a picture wide, two beside one another."""
    return canvas.below([canvas.beside(blocks[i : i + 2]) for i in range(0, len(blocks), 2)])


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of range(count), evenly spaced."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count))})


# ---------------------------------------------------------------- what is drawn


def headings(images: Sequence[FolderImages]) -> tuple[dict[str, int], int]:
    """Images in each sector of SECTOR_DEG, and how many have no heading."""
    known = [h for part in images for h in part.headings_deg if h is not None]
    counts = np.bincount(np.array(known, int) // SECTOR_DEG, minlength=360 // SECTOR_DEG)
    named = {str(SECTOR_DEG * i): int(n) for i, n in enumerate(counts)}
    return named, sum(len(part) for part in images) - len(known)


def heading_block(images: Sequence[FolderImages]) -> Block:
    """The histogram of headings, or a line that there are none."""
    counts, without = headings(images)
    label = f"heading from … degrees; {without} images have none"
    return bars("Headings", counts, label)


def draw_set(name: str, images: FolderImages, grid: Grid) -> tuple[list[str], Block, Block]:
    """Of a set of images alone: lines to print, labels, and images of a few classes."""
    lines = [f"{name}: {len(images)} images."]
    blocks = [scatter("Positions", [("images", images.utm, GRAY)]), heading_block([images])]
    paths = images.paths
    rows = [("images", [paths[i] for i in evenly(len(paths), SHOWN_EACH)])]
    try:
        classes = find_classes(images.utm, images.headings_deg, paths, grid)
    except InputError as error:
        warn(f"{name}: no classes: {error}")
        return lines, rows_of(blocks), sheet(rows)
    enough = int((classes.sizes >= grid.at_least).sum())
    of_groups = {str(i): len(group) for i, group in enumerate(classes.groups, start=1)}
    lines.append(
        f"{name}: {len(classes.sizes)} classes of {grid.M} m and {grid.alpha} degrees, {enough} with "
        f"{grid.at_least} images or more, in {len(classes.groups)} groups."
    )
    of_images = {str(i): sum(map(len, group)) for i, group in enumerate(classes.groups, start=1)}
    blocks += [
        bars("Images a class", binned(classes.sizes), "images; the bar: so many classes"),
        bars("Classes a group", _first(of_groups), "group; only classes with enough images"),
        bars("Images a group", _first(of_images), "group"),
    ]
    return lines, rows_of(blocks), sheet(_class_rows(images, classes, grid))


def _first(counts: dict[str, int]) -> dict[str, int]:
    return dict(list(counts.items())[:MOST_BARS])


def _class_rows(images: FolderImages, classes: Classes, grid: Grid) -> list[tuple[str, list[Path]]]:
    found = [(number, rows) for number, group in enumerate(classes.groups, 1) for rows in group]
    shown = []
    for i in evenly(len(found), SHOWN_ROWS):
        number, rows = found[i]
        east, north, sector = grid.cells(images.utm[rows[:1]], [images.headings_deg[rows[0]]])[0]
        words = (
            f"class ({east * grid.M}, {north * grid.M}, {sector * grid.alpha}°), group {number}, "
            f"{len(rows)} images"
        )
        shown.append((words, [images.paths[rows[j]] for j in evenly(len(rows), SHOWN_EACH)]))
    return shown


def draw_split(name: str, split: FolderSplit) -> tuple[list[str], Block, Block]:
    """Of queries and database: lines to print, labels, and queries with their positives."""
    counts = [len(rows) for rows in split.positives]
    without = split.without_positives
    lines = [f"{name}: {len(split)} queries, {len(split.index)} database images."]
    lines.append(
        f"{name}: {np.mean(counts):.1f} positives within {split.threshold:g} m a query in the mean; "
        f"{without} queries ({100 * without / len(split):.1f} %) have none."
    )
    blocks = [
        scatter(
            "Positions",
            [("database", split.utm_index, GRAY), ("queries", split.utm_query, RED)],
        ),
        heading_block([split.queries, split.index]),
        bars(
            "Positives a query",
            binned(counts),
            f"images within {split.threshold:g} m; the bar: queries",
        ),
    ]
    rows = []
    for i in evenly(len(split), SHOWN_ROWS):
        near = split.positives[i]
        found = [split.index.paths[near[j]] for j in evenly(len(near), SHOWN_EACH - 1)]
        words = f"a query, and {len(found)} of its {len(near)} positives"
        rows.append((words, [split.queries.paths[i], *found]))
    return lines, rows_of(blocks), sheet(rows)


# ---------------------------------------------------------------- command


def parts_of(folder: Path) -> dict[str, Path]:
    """The sets in a folder by name. InputError if it is not there."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the one of a data set.")
    root = folder / "images" if (folder / "images").is_dir() else folder
    parts = [root / part for part in SPLITS if (root / part).is_dir()] or [root]
    name = folder.absolute().name
    return {name if part == folder else f"{name} {part.name}": part for part in parts}


def draw(name: str, folder: Path, grid: Grid) -> tuple[list[str], Block, Block]:
    """Lines, labels and images of one set."""
    if any((folder / index).is_dir() for index in INDEX_FOLDERS):
        return draw_split(name, read_split(folder, POSITIVE_M))
    images = FolderImages([folder])
    if not len(images):
        raise InputError(f"{folder} holds no image: name the folder of a data set.")
    return draw_set(name, images, grid)


def write_labels(folder: Path, output: Path, grid: Grid) -> list[Path]:
    """Write and print what the labels say; the pictures."""
    written = []
    for name, part in parts_of(folder).items():
        lines, labels, images = draw(name, part, grid)
        print("\n".join(lines))
        for kind, block in (("labels", labels), ("images", images)):
            title = canvas.paragraph(f"{name}: {kind}", canvas.TITLE)
            notes = [canvas.paragraph(line, SMALL, MUTED) for line in lines]
            path = output / f"{name.replace(' ', '_')}_{kind}.png"
            canvas.save(path, canvas.below([title, *notes, block], margin=canvas.MARGIN))
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Draw labels; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="reporting.labels", description=__doc__.partition("\n")[0]
    )
    option = parser.add_argument
    option("folder", type=Path, help="of a data set, or one of its sets")
    option("--output", type=Path, default=Path("logs/labels"), help="default: %(default)s")
    for name, default in (("M", 10), ("alpha", 30), ("N", 5), ("L", 2)):
        option(f"--{name}", type=int, default=default, help=f"of CosPlace's classes ({default})")
    option("--min_images_per_class", type=int, default=10, help="default: 10")
    args = parser.parse_args(argv)
    try:
        grid = Grid(args.M, args.alpha, args.N, args.L, args.min_images_per_class)
        written = write_labels(args.folder, args.output, grid)
    except InputError as error:
        return refuse("reporting.labels", error)
    print(f"Written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
