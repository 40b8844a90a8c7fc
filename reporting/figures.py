"""The picture of task 3, task3_result.png, and numbers as one says them, here and in the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting import canvas as c

SHOWN_K = (1, 5, 10, 20)
MODELS = (  # key in a recall section, color, mark, width of the line
    ("trained", c.ACCENT, "circle", 6),
    ("untrained", c.BROWN, "square", 4),
    ("chance", c.MUTED, None, 3),
)
TRAINING = {  # chart: key of an epoch, name, color, mark
    "Ranking loss": (
        ("train_loss", "training", c.ACCENT, "circle"),
        ("val_loss", "validation", c.BROWN, "square"),
    ),
    "Violated margins, ranking": (
        ("violations", "violating triplets, share", c.WRONG, "circle"),
        ("held_out_mrr", "held-out MRR", c.RIGHT, "square"),
        ("val_R@1", "R@1, val lists", c.ACCENT, "circle"),
    ),
}
MATCHES_SHOWN = 5


@dataclass(frozen=True)
class GalleryRow:
    """A query and its best index images: (path, similarity, distance in m, right or not), best first.

    Distances and verdicts are None where the truth is unknown. `first_hit_rank` is the rank (from 1)
    of its first right index image, None if none was found.
    """

    query_path: str
    matches: Sequence[tuple[str, float, float | None, bool | None]]
    first_hit_rank: int | None


def choose_gallery(first_hit_rank: Sequence[int | None], per_kind: int = 2) -> list[int]:
    """Which queries to show: some right at rank 1, some by rank 10, some wrong, evenly spread.

    A kind with too few leaves its places to the others, in the order right, late, wrong.
    """
    kinds: list[list[int]] = [[], [], []]
    for query, rank in enumerate(first_hit_rank):
        kinds[0 if rank == 1 else 1 if rank is not None and rank <= 10 else 2].append(query)
    room = [min(per_kind, len(kind)) for kind in kinds]
    for number, kind in enumerate(kinds):
        room[number] += min(3 * per_kind - sum(room), len(kind) - room[number])
    places = [(np.arange(count) + 0.5) / max(count, 1) for count in room]
    return [kind[int(place * len(kind))] for kind, some in zip(kinds, places) for place in some]


def gallery_rows(
    query_paths: Sequence,
    index_paths: Sequence,
    utm_query: np.ndarray,
    utm_index: np.ndarray,
    result,
) -> list[GalleryRow]:
    """A few queries with their top 5. result: eval.Recall; utm_query, utm_index: (n, 2) in meters."""
    listed = result.ranking.shape[1]
    ranks = [int(hit) + 1 if hit < listed else None for hit in result.hits]
    rows = []
    for query in choose_gallery(ranks):
        top = result.ranking[query][:MATCHES_SHOWN]
        distance = np.linalg.norm(utm_index[top] - utm_query[query], axis=1)
        matches = [
            (index_paths[i], float(s), float(d), bool(i in result.positives[query]))
            for i, s, d in zip(top, result.similarity[query], distance)
        ]
        rows.append(GalleryRow(query_paths[query], matches, ranks[query]))
    return rows


def percent(share: float | None) -> str:
    """0.6512 → "65.1 %"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def meters(length_m: float | None) -> str:
    """A length in the unit one would say it in, to three digits: 1.5 mm, 25 cm, 340 m."""
    if length_m is None or not math.isfinite(length_m):
        return "? m"
    units = ((1000, "km"), (1, "m"), (0.01, "cm"), (0.001, "mm"))
    unit, name = next((u for u in units if length_m >= u[0] * 0.9995), units[-1])
    digits = ".0f" if length_m >= 99.95 * unit else ".3g"
    return f"{length_m / unit:{digits}} {name}"


def headline(recall: dict) -> str:
    """The result in a sentence a lists part."""
    sentences = []
    for part, result in recall.items():
        beside = [f"{key} {percent(result[key][0])}" for key, *_ in MODELS[1:] if result.get(key)]
        aside = f" ({', '.join(beside)})" if beside else ""
        share, count = percent(result["trained"][0]), result.get("queries", "?")
        sentences.append(f"Right at rank 1, {part} lists: {share} of {count} queries{aside}.")
    return " ".join(sentences)


def plain_warnings(base_section: dict) -> list[str]:
    """What a reader must know before believing the figures, in plain words."""
    data, weights = base_section.get("data") or {}, base_section.get("weights") or {}
    texts = []
    if data.get("is_sample"):
        texts.append(
            "Built-in sample: these are images rendered by this project, not the course's data. "
            "The figures say nothing about Pittsburgh 30k."
        )
    if weights.get("pretrained") is False:
        texts.append(
            f"Without ImageNet weights: the trunk started from weights that are "
            f"{weights.get('origin') or 'random'}. With ImageNet weights recall is higher."
        )
    return texts


def recall_rows(recall: dict) -> list[list[str]]:
    """The recall table, header first: lists × models, with the interval of the trained one."""
    shown = [k for k in SHOWN_K if any(k in result.get("k", ()) for result in recall.values())]
    rows = [["lists", "queries / index", "model", *(f"R@{k}" for k in shown)]]
    for part, result in recall.items():
        place = {k: at for at, k in enumerate(result["k"])}
        counts = f"{result.get('queries', '?')} / {result.get('index', '?')}"
        for model in (model for model, *_ in MODELS if result.get(model)):
            cells = [percent(result[model][place[k]] if k in place else None) for k in shown]
            if model == "trained" and result.get("low"):
                for number, at in enumerate(place.get(k) for k in shown):
                    low, high = (
                        (None, None) if at is None else (result["low"][at], result["high"][at])
                    )
                    cells[number] += "" if low is None else f" ({100 * low:.0f}–{100 * high:.0f})"
            rows.append([part, counts, model, *cells])
    return rows


def footer(section: dict) -> str:
    """Where the figures come from, on one line or two."""
    data, weights = section.get("data") or {}, section.get("weights") or {}
    facts = {"Data": data.get("name"), "Weights": weights.get("origin")}
    facts |= {key.capitalize(): section.get(key) for key in ("clusters", "seed", "device")}
    facts |= {
        "Checkpoint": (section.get("checkpoint") or "")[:12] or None,
        "Date": section.get("date"),
    }
    return " · ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)


def recall_picture(path: Path, base_section: dict, gallery: Sequence[GalleryRow]) -> None:
    """task3_result.png: recall as table and curves, the training, chosen queries, the footer."""
    c.save(path, draw_recall(base_section, gallery))


def draw_recall(base_section: dict, gallery: Sequence[GalleryRow]) -> c.Block:
    """The picture of task 3 from the section "base" of metrics.json."""
    recall = base_section.get("recall") or {}
    blocks = [c.paragraph("NetVLAD place recognition: recall@K", c.TITLE)]
    blocks += [c.paragraph(text, fill=c.YELLOW) for text in plain_warnings(base_section)]
    if recall:
        note = (
            "R@K: share of queries with a right image among the K best, exact search by cosine "
            "similarity. In brackets: 95 % bootstrap interval over the queries."
        )
        blocks += [c.paragraph(headline(recall), c.HEAD), c.table(recall_rows(recall))]
        blocks.append(c.paragraph(note, c.SMALL, c.MUTED))
    charts = [*_recall_charts(recall), *_training_charts(base_section.get("epochs") or [])]
    blocks += [c.beside(charts[start : start + 2]) for start in range(0, len(charts), 2)]
    if gallery:
        threshold = (base_section.get("data") or {}).get("posDistThr")
        within = f"within {meters(threshold)}" if threshold else "within the lists' threshold"
        note = (
            f"Green and ticked: right, taken {within} of the query. Red and crossed: wrong. Below each: "
            "distance to the query, cosine similarity."
        )
        blocks.append(
            c.paragraph(f"Chosen queries and their {MATCHES_SHOWN} best index images", c.HEAD)
        )
        blocks.append(c.paragraph(note, c.SMALL, c.MUTED))
        blocks += _gallery(
            gallery, max((len(result["k"]) for result in recall.values()), default=0)
        )
    blocks.append(c.paragraph(footer(base_section), c.SMALL, c.MUTED))
    return c.below(blocks, margin=c.MARGIN)


def _recall_charts(recall: dict) -> list[c.Block]:
    charts = []
    for part, result in recall.items():
        ks = result["k"]
        percents = {
            key: [None if value is None else 100 * value for value in result.get(key) or ()]
            for key in ("trained", "untrained", "chance", "low", "high")
        }
        series = []
        for key, color, mark, width in MODELS:
            band = (percents["low"], percents["high"]) if key == "trained" else ()
            look = (color, mark if len(ks) <= 25 else None, width)
            series += [c.Series(key, ks, percents[key], *look, *band)] if percents[key] else []
        ticks = [(k, str(k)) for k in ks if k in (1, 5, 10, 15, 20)]
        x_axis = c.Axis(ks[0], max(ks[-1], ks[0] + 1), ticks)
        title = f"Recall@K, {part} lists"
        charts.append(c.chart(title, series, x_axis, c.PERCENT, "K, best index images"))
    return charts


def _training_charts(epochs: Sequence[dict]) -> list[c.Block]:
    """Losses, violated margins and the ranking of held-out queries over the epochs, as far as known."""
    numbers, charts = [entry["epoch"] for entry in epochs], []
    for title, lines in TRAINING.items():
        series = [
            c.Series(name, numbers, [e.get(key) for e in epochs], *look)
            for key, name, *look in lines
        ]
        series = [one for one in series if any(value is not None for value in one.y)]
        if not series:
            continue
        aside = 1 if len(numbers) == 1 else 0  # a single epoch stands in the middle
        ticks = [(number, str(number)) for number in numbers[:: math.ceil(len(numbers) / 10)]]
        x_axis = c.Axis(numbers[0] - aside, numbers[-1] + aside, ticks)
        y_axis = c.axis_from_zero([y for one in series for y in one.y if y is not None])
        charts.append(c.chart(title, series, x_axis, y_axis, "epoch"))
    return charts


def retrieval_picture(path: Path, gallery: Sequence[GalleryRow], title: str) -> None:
    """Queries and their best index images without any truth: distances and verdicts are None."""
    blocks = [c.paragraph(title, c.TITLE), *_gallery(gallery, 0)]
    c.save(path, c.below(blocks, margin=c.MARGIN))


def _gallery(gallery: Sequence[GalleryRow], ranks_searched: int) -> list[c.Block]:
    """A row of tiles for each query."""
    blocks = []
    for row in gallery:
        rank = row.first_hit_rank
        if any(right is None for *_, right in row.matches):
            verdict = "query"
        elif rank is None:
            verdict = f"none right among the best {ranks_searched}"
        else:
            verdict = "right at rank 1" if rank == 1 else f"first right at rank {rank}"
        title = c.blank(c.INNER, c.BODY * c.LINE_HEIGHT)
        used = c.write(title, 0, 0, verdict) + 48
        c.write(title, used, 4, str(row.query_path), c.SMALL, c.MUTED, width=c.INNER - used)
        tiles = [_tile(row.query_path, None, "query", "")]
        for number, (path, similarity, distance_m, right) in enumerate(
            row.matches[:MATCHES_SHOWN], 1
        ):
            where = f"rank {number}" if distance_m is None else meters(distance_m)
            tiles.append(_tile(path, right, where, f"{similarity:.3f}"))
        blocks.append(c.below([title, c.beside(tiles, c.GAP // 2)], 12))
    return blocks


def _tile(path: str, right: bool | None, left_text: str, right_text: str) -> c.Block:
    """A framed photo with two words and its file name beneath; right None: no verdict."""
    border, row = 14, c.SMALL * c.LINE_HEIGHT
    width = (c.INNER + c.GAP // 2) // (MATCHES_SHOWN + 1) - c.GAP // 2
    photo = c.opened(path)
    photo = photo.crop((0, 0, photo.width, min(photo.height, 2 * photo.width)))
    photo = c.resized(photo, width - 2 * border)
    color = c.INK if right is None else c.RIGHT if right else c.WRONG
    height = photo.height + 2 * border
    tile = c.blank(width, height + 2 * row + 16)
    tile.paste(color, (0, 0, width, height))
    tile.paste(photo, (border, border))
    if right is not None:  # told apart by shape as well as color
        c.mark(tile, "circle" if right else "square", 58, 58, 34, color)
        c.mark(tile, "tick" if right else "cross", 58, 58, 18, c.PAPER)
    used = c.write(tile, 0, height + 8, left_text, c.SMALL)
    c.write(tile, width, height + 8, right_text, c.SMALL, anchor="r", width=width - used - 16)
    c.write(tile, 0, height + 8 + row, Path(path).name, c.SMALL, c.MUTED, width=width)
    return tile
