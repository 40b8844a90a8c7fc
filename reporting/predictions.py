"""What was found for each query: a picture and a text file, as VPR-methods-evaluation writes them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from eval import load_image
from reporting import canvas
from reporting.handin import write_whole

CELL, GAP, STRIP, FRAME = 512, 50, 60, 10
RIGHT, WRONG = (0, 170, 0), (220, 0, 0)


def save_predictions(
    folder: Path,
    query_paths: Sequence[Path],
    index_paths: Sequence[Path],
    ranking: np.ndarray,
    positives: Sequence[np.ndarray],
    count: int,
    only_wrong: bool = False,
) -> int:
    """Write NNN.jpg and NNN.txt of each query's first `count` images; -> how many queries.

    only_wrong: of the queries whose first image is wrong. ranking (nq, k), positives: rows of the
    index images.
    """
    written = 0
    for number, (query, rows) in enumerate(zip(query_paths, ranking[:, :count])):
        right = np.isin(rows, positives[number])
        if only_wrong and right[0]:
            continue
        found = [index_paths[row] for row in rows]
        true = [index_paths[row] for row in positives[number]]
        picture = draw_prediction(query, found, right.tolist())
        write_whole(folder / f"{number:03d}.jpg", partial(picture.save, quality=85))
        text = "\n".join(
            [
                f"Query path:\n{query}\n",
                "Predictions paths:\n" + "\n".join(map(str, found)) + "\n",
                "Positives paths:\n" + "\n".join(map(str, true)) + "\n",
            ]
        )
        content = text.encode("utf-8", "backslashreplace")
        write_whole(
            folder / f"{number:03d}.txt", lambda part, content=content: part.write_bytes(content)
        )
        written += 1
    return written


def draw_prediction(query: Path, found: Sequence[Path], right: Sequence[bool]) -> Image.Image:
    """The query and what was found side by side, framed green or red."""
    width = (1 + len(found)) * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, STRIP + CELL), "white")
    pen, font = ImageDraw.Draw(sheet), canvas.font(30)
    labels = ["Query", *(f"Pr{i} - {verdict}" for i, verdict in enumerate(right))]
    colors = [None, *(RIGHT if verdict else WRONG for verdict in right)]
    for place, (path, label, color) in enumerate(zip([query, *found], labels, colors)):
        x = place * (CELL + GAP)
        pen.text((x, 10), label, "black", font)
        cell = ImageOps.pad(load_image(path, CELL), (CELL, CELL), color="white")
        sheet.paste(cell, (x, STRIP))
        if color:
            pen.rectangle((x, STRIP, x + CELL - 1, STRIP + CELL - 1), outline=color, width=FRAME)
    return sheet
