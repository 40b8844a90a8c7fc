"""The pictures of a run, drawn with Pillow from its numbers and files.

Each picture has a function that draws it (`draw_…`, which returns a Canvas) and one that writes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting import canvas as c
from reporting.handin import write_whole

WIDTH, MARGIN, GAP = 1600, 48, 28
INNER = WIDTH - 2 * MARGIN
SHOWN_K = (1, 5, 10, 20)
MODELS = (  # key in a recall section, name, color, mark, dashes
    ("trained", "trained", c.ACCENT, "circle", None),
    ("untrained", "untrained", c.BROWN, "square", (10, 6)),
    ("chance", "chance", c.MUTED, None, (3, 6)),
)
MATCHES_SHOWN = 5


@dataclass(frozen=True)
class GalleryRow:
    """A query and its best index images: (path, similarity, distance in m, right or not), best first.

    `first_hit_rank` is the rank (from 1) of its first right index image, None if none was found.
    """

    query_path: str
    matches: Sequence[tuple[str, float, float, bool]]
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
    return [
        kind[int((place + 0.5) * len(kind) / count)]
        for kind, count in zip(kinds, room, strict=True) for place in range(count)
    ]


def gallery_rows(
    query_paths: Sequence, index_paths: Sequence, utm_query: np.ndarray, utm_index: np.ndarray, result
) -> list[GalleryRow]:
    """A few queries with their top 5. result: eval.Recall; utm_query, utm_index: (n, 2) in meters."""
    listed = result.ranking.shape[1]
    ranks = [int(hit) + 1 if hit < listed else None for hit in result.hits]
    rows = []
    for query in choose_gallery(ranks):
        top = result.ranking[query][:5]
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


def meters(distance_m: float | None) -> str:
    """A distance in the unit one would say it in."""
    if distance_m is None or not math.isfinite(distance_m):
        return "? m"
    if distance_m == 0:
        return "0 m"
    if distance_m < 0.01:
        return f"{1000 * distance_m:.1f} mm"
    if distance_m < 0.1:
        return f"{100 * distance_m:.1f} cm"
    if distance_m < 1:
        return f"{100 * distance_m:.0f} cm"
    if distance_m < 1000:
        return f"{distance_m:.1f} m" if distance_m < 100 else f"{distance_m:.0f} m"
    return f"{distance_m / 1000:.1f} km" if distance_m < 1e5 else f"{distance_m / 1000:.0f} km"


def round_length(length_m: float) -> str:
    """A round length with no more digits than it has: 1 mm, 25 cm, 2.5 m."""
    for unit, name in ((1, "m"), (0.01, "cm"), (0.001, "mm")):
        if length_m >= unit * 0.999:
            break
    return f"{length_m / unit:.6g} {name}"


def save_picture(path: Path, canvas: c.Canvas) -> None:
    """Write a canvas as an image file, whole or not at all."""
    write_whole(Path(path), lambda part: canvas.image.save(part))


# ---------------------------------------------------------------- task 3: recall

def recall_picture(path: Path, base_section: dict, gallery: Sequence[GalleryRow]) -> None:
    """task3_result.png: recall as table and curves, the training, chosen queries, the footer."""
    save_picture(path, draw_recall(base_section, gallery))


def draw_recall(base_section: dict, gallery: Sequence[GalleryRow]) -> c.Canvas:
    """The picture of task 3 from the section "base" of metrics.json (1600 px wide)."""
    recall = base_section.get("recall") or {}
    blocks = [c.paragraph("NetVLAD place recognition: recall@K", INNER, c.TITLE, bold=True)]
    blocks += [c.paragraph(headline(recall), INNER, c.HEAD, color=c.MUTED)] if recall else []
    blocks += [warning_banner(text, INNER) for text in plain_warnings(base_section)]
    if recall:
        blocks.append(recall_table(recall, INNER))
    if charts := [*_recall_charts(recall), *_training_charts(base_section.get("epochs") or [])]:
        blocks.append(_grid(charts))
    if gallery:
        blocks.append(_gallery(gallery, base_section))
    blocks.append(c.paragraph(footer(base_section), INNER, c.SMALL, color=c.MUTED))
    return c.below(blocks, GAP, MARGIN)


def headline(recall: dict) -> str:
    """The result in a sentence a lists part."""
    sentences = []
    for part, result in recall.items():
        one = result.get("queries") == 1
        whose = f"the {part} query finds its" if one else f"{result.get('queries', '?')} {part} queries find their"
        beside = [
            f"{name} {percent(result[key][0])}"
            for key, name in (("untrained", "untrained"), ("chance", "chance")) if result.get(key)
        ]
        aside = f" ({', '.join(beside)})" if beside else ""
        sentences.append(f"{percent(result['trained'][0])} of {whose} place at the first try{aside}.")
    return " ".join(sentences)


def plain_warnings(base_section: dict) -> list[str]:
    """What a reader must know before believing the figures, in plain words."""
    data, weights = base_section.get("data") or {}, base_section.get("weights") or {}
    texts = []
    if data.get("is_sample"):
        texts.append("Built-in sample: these are images rendered by this project, not the "
                     "course's data. The figures say nothing about Pittsburgh 30k.")
    if weights.get("pretrained") is False:
        texts.append(f"Without ImageNet weights: the trunk started from weights that are "
                     f"{weights.get('origin') or 'random'}. With ImageNet weights recall is higher.")
    if base_section.get("stale"):
        texts.append("These results belong to another checkpoint than the one that lies here now.")
    return texts


def warning_banner(text: str, width: float) -> c.Canvas:
    """A sentence nobody should miss: a triangle with ! on yellow."""
    words = c.paragraph(text, width - 80, c.BODY, fill=c.WARNING_FILL, padding=14)
    banner = c.blank(width, words.height, c.WARNING_FILL)
    middle = words.height / 2
    with c.pen(banner, (0, 0, 70, words.height)) as lines:
        lines.mark("triangle", 40, middle, 18, c.GOLD)
        lines.line([(40, middle - 9), (40, middle + 5)], c.INK, 4)
        lines.mark("circle", 40, middle + 11, 2.4, c.INK)
    c.place(banner, words, 70, 0)
    return banner


def recall_rows(recall: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the recall table: lists × models, with the interval of the trained one."""
    shown = [k for k in SHOWN_K if any(k in result.get("k", ()) for result in recall.values())]
    header = ["lists", "queries / index", "model", *(f"R@{k}" for k in shown)]
    rows = []
    for part, result in recall.items():
        for key, name, *_ in MODELS:
            values = result.get(key)
            if not values:
                continue
            cells = []
            for k in shown:
                at = result["k"].index(k) if k in result["k"] else None
                cell = percent(None if at is None else values[at])
                if key == "trained" and at is not None and result.get("low"):
                    cell += f" ({100 * result['low'][at]:.0f}–{100 * result['high'][at]:.0f})"
                cells.append(cell)
            counts = f"{result.get('queries', '?')} / {result.get('index', '?')}"
            rows.append([part, counts, name, *cells])
    return header, rows


def recall_table(recall: dict, width: float) -> c.Canvas:
    """The recall table and what its brackets mean."""
    header, rows = recall_rows(recall)
    trained = [number for number, row in enumerate(rows) if row[2] == "trained"]
    note = ("R@K: share of queries with a right image among the K best, exact search by cosine "
            "similarity. In brackets: 95 % bootstrap interval over the queries.")
    return c.below([
        c.table(header, rows, width, bold_rows=trained),
        c.paragraph(note, width, c.SMALL, color=c.MUTED),
    ], 8)


def _recall_charts(recall: dict) -> list[tuple]:
    charts = []
    for part, result in recall.items():
        ks = result["k"]
        series = [
            c.Series(
                name, ks, [None if value is None else 100 * value for value in result[key]], color,
                mark if len(ks) <= 25 else None, dash,
                [100 * value for value in result.get("low") or ()] if key == "trained" else (),
                [100 * value for value in result.get("high") or ()] if key == "trained" else (),
            )
            for key, name, color, mark, dash in MODELS if result.get(key)
        ]
        ticks = [(k, str(k)) for k in ks if k in (1, 5, 10, 15, 20)]
        x_axis = c.Axis(ks[0], max(ks[-1], ks[0] + 1), ticks)
        y_axis = c.Axis(0, 100, [(share, f"{share} %") for share in range(0, 101, 20)])
        charts.append((f"Recall@K, {part} lists", series, x_axis, y_axis, "K, best index images"))
    return charts


def _training_charts(epochs: Sequence[dict]) -> list[tuple]:
    """Losses, violated margins and the ranking of held-out queries over the epochs, as far as known."""
    if not epochs:
        return []
    numbers = [entry["epoch"] for entry in epochs]
    step = math.ceil(len(numbers) / 10)
    beside = 1 if len(numbers) == 1 else 0  # a single epoch stands in the middle
    x_axis = c.Axis(numbers[0] - beside, numbers[-1] + beside, [
        (number, str(number)) for number in numbers[::step]])

    def chart(title: str, lines: Sequence[tuple]) -> list[tuple]:
        series = [
            c.Series(name, numbers, [entry.get(key) for entry in epochs], color, mark, dash)
            for key, name, color, mark, dash in lines
            if any(entry.get(key) is not None for entry in epochs)
        ]
        values = [value for one in series for value in one.y if value is not None]
        if not values:
            return []
        return [(title, series, x_axis, c.round_axis(values), "epoch")]

    return chart("Ranking loss", (
        ("train_loss", "training", c.ACCENT, "circle", None),
        ("val_loss", "validation", c.BROWN, "square", (10, 6)),
    )) + chart("Violated margins and held-out ranking" if "held_out_mrr" in epochs[0] else "Violated margins", (
        ("violations", "violating triplets, share", c.WRONG, "diamond", None),
        ("held_out_mrr", "held-out mean reciprocal rank", c.RIGHT, "triangle", (10, 6)),
    ))


def _grid(charts: Sequence[tuple]) -> c.Canvas:
    """The charts in rows of two, or of three when that fills the rows better."""
    columns = 3 if len(charts) == 3 else min(2, len(charts))
    width, height = (INNER - 2 * 40) // 3 if columns == 3 else (INNER - 56) // 2, 430
    gap = 40 if columns == 3 else 56
    rows = [charts[start:start + columns] for start in range(0, len(charts), columns)]
    return c.below([
        c.beside([c.plot(*chart, width, height) for chart in row], gap) for row in rows
    ], GAP)


def _gallery(gallery: Sequence[GalleryRow], base_section: dict) -> c.Canvas:
    threshold = (base_section.get("data") or {}).get("posDistThr")
    within = f"within {round_length(threshold)}" if threshold else "within the lists' threshold"
    key = c.blank(INNER, c.BODY * c.LINE_HEIGHT)
    x = 0.0
    for right, words in ((True, f"right: taken {within} of the query"), (False, "wrong")):
        with c.pen(key, (x, 0, x + 50, key.height)) as lines:
            _badge(lines, right, x + 18, key.height / 2, 14)
        x += 44
        x += c.draw_text(key, x, 0, words, c.BODY) + 40
    c.draw_text(key, INNER, 2, "under each: distance to the query, cosine similarity", c.SMALL,
                color=c.MUTED, align="right", width=INNER - x - 20)
    ranks = [len(result.get("k") or []) for result in (base_section.get("recall") or {}).values()]
    return c.below([
        c.paragraph(f"Chosen queries and their {MATCHES_SHOWN} best index images", INNER, c.HEAD,
                    bold=True),
        key, *_gallery_rows(gallery, max(ranks, default=0)),
    ], 22)


def retrieval_picture(path: Path, gallery: Sequence[GalleryRow], title: str) -> None:
    """Queries and their best index images without any truth: distances and verdicts are None."""
    save_picture(path, c.below([
        c.paragraph(title, INNER, c.TITLE, bold=True), *_gallery_rows(gallery, 0)], GAP, MARGIN))


def _gallery_rows(gallery: Sequence[GalleryRow], ranks_searched: int) -> list[c.Canvas]:
    """A row of tiles for each query; the tiles are as high as most of the images need."""
    sizes = [c.image_size(path) for row in gallery
             for path in (row.query_path, *(match[0] for match in row.matches[:MATCHES_SHOWN]))]
    aspect = float(np.clip(np.median([width / height for width, height in sizes]), 3 / 4, 16 / 9))
    return [_gallery_row(row, ranks_searched, aspect) for row in gallery]


def _gallery_row(row: GalleryRow, ranks_searched: int, aspect: float) -> c.Canvas:
    gap = 16
    tile = (INNER - (MATCHES_SHOWN + 1) * gap) // (MATCHES_SHOWN + 1)
    title = c.blank(INNER, c.BODY * c.LINE_HEIGHT)
    rank = row.first_hit_rank
    if any(right is None for *_, right in row.matches):
        verdict = "query"
    elif rank is None:
        verdict = f"none right among the best {ranks_searched}" if ranks_searched > 1 else "none right"
    else:
        verdict = "right at rank 1" if rank == 1 else f"first right at rank {rank}"
    used = c.draw_text(title, 0, 0, verdict, c.BODY, bold=True)
    c.draw_text(title, used + 24, 2, str(row.query_path), c.SMALL, color=c.MUTED,
                width=INNER - used - 24)
    tiles = [
        _tile(path, tile, aspect, right, meters(distance_m) if distance_m is not None else
              f"rank {number}", f"{similarity:.3f}")
        for number, (path, similarity, distance_m, right)
        in enumerate(row.matches[:MATCHES_SHOWN], start=1)
    ]
    query = _tile(row.query_path, tile, aspect, None, "query", "")
    return c.below([title, c.beside([query, c.beside(tiles, gap)] if tiles else [query], 2 * gap)], 6)


def _tile(
    path: str, width: int, aspect: float, right: bool | None, left_text: str, right_text: str,
) -> c.Canvas:
    """A framed photo with two words and its file name beneath; right None: no verdict."""
    border = 7
    height = round((width - 2 * border) / aspect) + 2 * border
    line = c.SMALL * c.LINE_HEIGHT
    tile = c.blank(width, height + 2 * line + 8)
    c.place(tile, c.photo(path, width - 2 * border, height - 2 * border), border, border)
    with c.pen(tile, (0, 0, width, height)) as lines:
        color = c.INK if right is None else c.RIGHT if right else c.WRONG
        lines.rectangle((0, 0, width, height), color, border, None if right is not False else (16, 9))
        if right is not None:
            _badge(lines, right, border + 22, border + 22, 18)
    used = c.draw_text(tile, 0, height + 4, left_text, c.SMALL, bold=True)
    c.draw_text(tile, width, height + 4, right_text, c.SMALL, align="right", width=width - used - 8)
    c.draw_text(tile, 0, height + 4 + line, Path(path).name, c.SMALL, color=c.MUTED, width=width)
    return tile


def _badge(lines: c.Pen, right: bool, x: float, y: float, radius: float) -> None:
    """A tick in a circle, or a cross in a square: told apart by shape as well as color."""
    lines.mark("circle" if right else "square", x, y, radius if right else 0.9 * radius,
               c.RIGHT if right else c.WRONG)
    lines.mark("tick" if right else "cross", x, y, 0.5 * radius, c.PAPER)


def footer(section: dict) -> str:
    """Where the figures come from, on one line or two."""
    data, weights = section.get("data") or {}, section.get("weights") or {}
    checkpoint = str(section.get("checkpoint") or "")[:12]
    facts = [
        ("Data", data.get("name")), ("Weights", weights.get("origin")),
        ("Clusters", section.get("clusters")), ("Seed", section.get("seed")),
        ("Device", section.get("device")), ("Checkpoint", checkpoint or None),
        ("Date", section.get("date")),
    ]
    return " · ".join(f"{name}: {value}" for name, value in facts if value is not None)


# ---------------------------------------------------------------- task 4: camera poses

def matches_name(query_path: str) -> str:
    """The file name of a query's matches picture: scene and name of the image."""
    path = Path(query_path)
    return f"matches_{path.parent.parent.name}_{path.stem}.png"


def choose_queries(error_m: Sequence[float]) -> dict[str, int]:
    """The queries with the smallest, the median and the largest error; {} if no error is known."""
    order = [int(query) for query in np.argsort(error_m) if np.isfinite(error_m[query])]
    if not order:
        return {}
    return {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}


def matches_picture(
    path: Path, query_image: str | Path, index_image: str | Path, query_xy: np.ndarray,
    index_xy: np.ndarray, inlier_mask: np.ndarray, reprojected_xy: np.ndarray, caption: str,
) -> None:
    """Query and index image side by side with their matches; see draw_matches."""
    save_picture(path, draw_matches(
        query_image, index_image, query_xy, index_xy, inlier_mask, reprojected_xy, caption))


def draw_matches(
    query_image: str | Path, index_image: str | Path, query_xy: np.ndarray, index_xy: np.ndarray,
    inlier_mask: np.ndarray, reprojected_xy: np.ndarray, caption: str,
) -> c.Canvas:
    """Matches between two images, right ones (inliers) and others, and points seen by the pose.

    query_xy, index_xy (n, 2): matched keypoints, px, the center of the top left pixel at (0, 0);
    inlier_mask (n,) bool; reprojected_xy (n, 2): the matched 3D points as the query's pose projects
    them into it, NaN where there is none.
    """
    gap = 16
    sizes = [c.image_size(image) for image in (query_image, index_image)]
    aspects = [width / height for width, height in sizes]
    height = min((INNER - gap) / sum(aspects), 1100)
    photos = [
        c.photo(image, round(height * aspect), round(height))
        for image, aspect in zip((query_image, index_image), aspects, strict=True)
    ]
    pair = c.beside(photos, gap)
    scales = [photo.width / width for photo, (width, _) in zip(photos, sizes, strict=True)]
    query_at, index_at, seen_at = (
        (np.asarray(xy, float).reshape(-1, 2) + 0.5) * scale
        for xy, scale in ((query_xy, scales[0]), (index_xy, scales[1]), (reprojected_xy, scales[0]))
    )
    seen_at[~((seen_at > 0) & (seen_at < [photos[0].width, photos[0].height])).all(1)] = np.nan
    inlier = np.asarray(inlier_mask, bool).reshape(-1)
    _match_lines(pair, query_at, index_at + [photos[0].width + gap, 0], seen_at, inlier)
    counts = [
        ("circle", c.MINT, f"inliers: {inlier.sum()}", None),
        ("ring", c.GOLD, "their 3D points, projected by the estimated pose", ()),
        ("cross", c.WRONG, f"outliers: {(~inlier).sum()}", (5, 5)),
    ]
    more = max(inlier.sum(), (~inlier).sum()) > LINES_DRAWN
    shown = c.blank(INNER, pair.height + c.SMALL * c.LINE_HEIGHT + 12)
    left_edge = (INNER - pair.width) / 2
    c.place(shown, pair, left_edge, shown.height - pair.height)
    for word, image, photo, x in zip(
        ("query", "index"), (query_image, index_image), photos,
        (left_edge, left_edge + photos[0].width + gap), strict=True,
    ):
        c.draw_text(shown, x, 0, f"{word}: {Path(image).name}", c.SMALL, color=c.MUTED, width=photo.width)
    blocks = [c.paragraph(caption, INNER, c.HEAD, bold=True), shown, c.key(counts, INNER)]
    if more:
        blocks.append(c.paragraph(f"At most {LINES_DRAWN} matches of each kind are drawn, evenly chosen.",
                                  INNER, c.SMALL, color=c.MUTED))
    return c.below(blocks, 12, MARGIN)


LINES_DRAWN = 60


def _match_lines(
    pair: c.Canvas, query_at: np.ndarray, index_at: np.ndarray, seen_at: np.ndarray, inlier: np.ndarray,
) -> None:
    """Draw matches (n, 2) → (n, 2) in px of `pair`, and rings at seen_at of the inliers, where not NaN."""
    with c.pen(pair, (0, 0, pair.width, pair.height)) as lines:
        for kind, mark, size, color, width, dash in (
            (~inlier, "cross", 5, c.WRONG, 1, (5, 5)), (inlier, "circle", 4, c.MINT, 1.3, None)):
            for number in _spread(np.flatnonzero(kind), LINES_DRAWN):
                ends = tuple(query_at[number]), tuple(index_at[number])
                lines.line(ends, color, width, dash)
                for end in ends:
                    lines.mark(mark, *end, size, color)
        for number in _spread(np.flatnonzero(inlier), LINES_DRAWN):
            if np.isfinite(seen_at[number]).all():
                lines.mark("ring", *seen_at[number], 7, c.GOLD)


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `numbers`, evenly spread."""
    if len(numbers) <= count:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, count).round().astype(int)]


def poses_picture(
    path: Path, scene: str, index_c: np.ndarray, index_forward: np.ndarray, true_c: np.ndarray,
    true_forward: np.ndarray, estimated_c: np.ndarray, estimated_forward: np.ndarray,
    names: Sequence[str],
) -> None:
    """A scene's cameras from above and from the side; see draw_poses."""
    save_picture(path, draw_poses(
        scene, index_c, index_forward, true_c, true_forward, estimated_c, estimated_forward, names))


def draw_poses(
    scene: str, index_c: np.ndarray, index_forward: np.ndarray, true_c: np.ndarray,
    true_forward: np.ndarray, estimated_c: np.ndarray, estimated_forward: np.ndarray,
    names: Sequence[str],
) -> c.Canvas:
    """Index cameras, true and estimated query cameras, in two views of one scale.

    Centers (n, 3) in m and viewing directions (n, 3) in the world; NaN where a true pose is
    unknown. The vertical of the world is unknown: "above" is across the plane in which centers and
    viewing directions spread most.
    """
    index_c, index_forward, true_c, true_forward, estimated_c, estimated_forward = (
        np.asarray(array, float).reshape(-1, 3) for array in
        (index_c, index_forward, true_c, true_forward, estimated_c, estimated_forward))
    known = np.isfinite(true_c).all(1)
    error_m = np.where(known, np.linalg.norm(true_c - estimated_c, axis=1), np.nan)
    axes = _view_axes(np.concatenate([index_c, true_c[known]]),
                      np.concatenate([index_forward, true_forward[known]]))
    shown = np.concatenate([index_c, true_c[known]]) @ axes.T
    if not len(shown):
        shown = estimated_c @ axes.T
    low, high = shown.min(0), shown.max(0)
    pad = 56
    width, height = np.maximum(high - low, 0.1)[:2]
    scale = min((INNER - 2 * pad) / width, (VIEW_HEIGHT - 2 * pad) / height)
    worst = [int(query) for query in np.argsort(-error_m) if error_m[query] > 0][:WORST_LISTED]
    groups = (
        (index_c, index_forward, "square", c.MUTED, 4.5, 20),
        (true_c, true_forward, "ring", c.RIGHT, 9, 34),
        (estimated_c, estimated_forward, "circle", c.ACCENT, 5, 26),
    )
    views = [
        _view(title, [(centers @ axes.T, forward @ axes.T, *look) for centers, forward, *look in groups],
              down, low, high, scale, pad, worst)
        for title, down in (("From above", 1), ("From the side", 2))
    ]
    signs = c.key([
        ("square", c.MUTED, f"index cameras: {len(index_c)}", ()),
        ("ring", c.RIGHT, f"true query cameras: {known.sum()}", ()),
        ("circle", c.ACCENT, f"estimated: {len(estimated_c)}", ()),
        (None, c.WRONG, "position error", None),
    ], INNER)
    blocks = [c.paragraph(f"Scene {scene}: camera poses", INNER, c.TITLE, bold=True), signs, *views]
    if worst:
        blocks.append(c.table(
            ["no.", "queries with the largest position errors", "position", "viewing direction"],
            [[str(number + 1), str(names[query]), meters(error_m[query]),
              f"{_angle_deg(true_forward[query], estimated_forward[query]):.2f}°"]
             for number, query in enumerate(worst)], INNER, c.SMALL))
    blocks.append(c.paragraph(
        "The vertical of the world is not known: \"above\" looks across the plane in which the "
        "cameras and their viewing directions spread most; it may be from below. Short lines are "
        "viewing directions; a dot on the edge of a view lies beyond it.", INNER, c.SMALL,
        color=c.MUTED))
    return c.below(blocks, 20, MARGIN)


VIEW_HEIGHT, WORST_LISTED = 820, 5


def _angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.atan2(np.linalg.norm(np.cross(a, b)), a @ b))


def _view_axes(centers: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Right-handed axes (3, 3), rows by how far centers and viewing directions spread along them."""
    if not len(centers):
        return np.eye(3)
    spread = centers.std(0).max() or 1.0
    ends = np.concatenate([centers + side * spread * forward for side in (-0.3, 0.3)])
    _, _, axes = np.linalg.svd(ends - ends.mean(0))
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    return axes * [[1], [1], [np.linalg.det(axes)]]


def _view(
    title: str, groups: Sequence[tuple], down: int, low: np.ndarray, high: np.ndarray, scale: float,
    pad: float, worst: Sequence[int],
) -> c.Canvas:
    """One view: first axis to the right, axis `down` downward, `scale` px a meter."""
    height = max((high - low)[down] * scale + 2 * pad, 200)
    canvas = c.blank(INNER, c.BODY * c.LINE_HEIGHT + height)
    top = c.BODY * c.LINE_HEIGHT
    middle = (low + high) / 2
    frame = (0, top, INNER, top + height)
    c.draw_text(canvas, 0, 0, title, c.BODY, bold=True)
    canvas.tiles.append(frame)

    def at(points: np.ndarray) -> np.ndarray:
        xy = (points[:, [0, down]] - middle[[0, down]]) * scale
        return xy + [INNER / 2, top + height / 2]

    def inside(xy: np.ndarray) -> np.ndarray:
        return np.clip(xy, [12, top + 12], [INNER - 12, top + height - 12])

    (true, _, *_), (estimated, _, *_) = groups[1], groups[2]
    marks = []
    with c.pen(canvas, frame) as lines:
        lines.rectangle(frame, c.GRID, 2)
        for (x0, y0), (x1, y1) in zip(at(true), at(estimated), strict=True):
            if np.isfinite([x0, y0, x1, y1]).all():
                lines.line([(x0, y0), tuple(inside(np.array([x1, y1])))], c.WRONG, 3)
        for centers, forward, mark, color, radius, length in groups:
            ends = at(centers + forward * length / scale)
            for (x, y), (x1, y1) in zip(at(centers), ends, strict=True):
                if not np.isfinite([x, y, x1, y1]).all():
                    continue
                x_in, y_in = inside(np.array([x, y]))
                if (x_in, y_in) == (x, y):
                    lines.line([(x, y), (x1, y1)], color, 2)
                lines.mark(mark, x_in, y_in, radius, color)
                marks += [(x_in, y_in), (x1, y1)]
    _scale_bar(canvas, scale)
    taken: list[c.Box] = []
    for number, query in enumerate(worst):
        xy = inside(at(estimated[query:query + 1])[0])
        _label(canvas, str(number + 1), xy, frame, taken, np.array(marks))
    return canvas


def _scale_bar(canvas: c.Canvas, scale: float) -> None:
    """Draw a bar of a round number of meters in the upper right corner, `scale` px a meter."""
    power = 10.0 ** math.floor(math.log10(INNER / 5 / scale))
    length_m = max(step * power for step in (1, 2, 5) if step * power * scale <= INNER / 5)
    text = round_length(length_m)
    y, length = 16, length_m * scale
    c.draw_text(canvas, INNER, y - 14, text, c.SMALL, align="right")
    right = INNER - c.font(c.SMALL).getlength(text) - 12
    with c.pen(canvas, (right - length - 4, 0, right + 4, 2 * y)) as lines:
        lines.line([(right - length, y), (right, y)], c.INK, 3)
        for end in (right - length, right):
            lines.line([(end, y - 7), (end, y + 7)], c.INK, 3)


def _label(
    canvas: c.Canvas, text: str, xy: np.ndarray, frame: c.Box, taken: list[c.Box], marks: np.ndarray,
) -> None:
    """Write a number near xy where it covers no other label and as few marks as possible."""
    width, height = c.font(c.SMALL, True).getlength(text) + 8, c.SMALL * c.LINE_HEIGHT
    best, best_cost = None, math.inf
    for radius in (24, 40, 60, 90):
        for angle in np.arange(0, 2 * math.pi, math.pi / 6):
            x = xy[0] + radius * math.cos(angle) - width / 2
            y = xy[1] + radius * math.sin(angle) - height / 2
            box = (x, y, x + width, y + height)
            if not (frame[0] < x and box[2] < frame[2] and frame[1] < y and box[3] < frame[3]):
                continue
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                continue
            covered = ((marks > [x - 6, y - 6]) & (marks < [box[2] + 6, box[3] + 6])).all(1).sum()
            if (cost := covered * 30 + radius) < best_cost:
                best, best_cost = box, cost
    if best is None:
        return
    taken.append(best)
    if best_cost >= 40:
        with c.pen(canvas, frame) as lines:
            lines.line([tuple(xy), ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)], c.GRID, 1.5)
    c.draw_text(canvas, best[0] + 4, best[1], text, c.SMALL, bold=True, color=c.WRONG)


def error_curve_picture(path: Path, ours: np.ndarray, retrieval: np.ndarray) -> None:
    """How many queries stay below an error, ours beside the best index image; see draw_errors."""
    save_picture(path, draw_errors(ours, retrieval))


POSE_LIMITS = ((0.05, 5), (0.25, 2), (0.5, 5))  # m, degrees


def within(errors: np.ndarray, limit_m: float, limit_deg: float) -> float | None:
    """Share of the queries with known errors (n, 2), m and degrees, that keep both limits."""
    errors = errors[np.isfinite(errors).all(1)]
    if not len(errors):
        return None
    return float(((errors[:, 0] <= limit_m) & (errors[:, 1] <= limit_deg)).mean())


def draw_errors(ours: np.ndarray, retrieval: np.ndarray) -> c.Canvas:
    """Cumulative curves of position and rotation errors (n, 2), m and degrees, and a table."""
    sets = [
        (name, np.asarray(errors, float).reshape(-1, 2), color, dash)
        for name, errors, color, dash in (
            ("estimated pose", ours, c.ACCENT, None),
            ("pose of the best index image", retrieval, c.BROWN, (10, 6)))
    ]
    charts = [
        _error_chart("Position error", [(name, errors[:, 0], *look) for name, errors, *look in sets],
                     0.0001, round_length, [(m, round_length(m)) for m in sorted({m for m, _ in POSE_LIMITS})]),
        _error_chart("Rotation error", [(name, errors[:, 1], *look) for name, errors, *look in sets],
                     0.001, lambda value: f"{value:g}°",
                     [(d, f"{d}°") for d in sorted({d for _, d in POSE_LIMITS})]),
    ]
    count = int(np.isfinite(sets[0][1]).all(1).sum())
    header = ["within", *(f"{round_length(m)} and {d}°" for m, d in POSE_LIMITS), "median", "mean"]
    rows = []
    for name, errors, *_ in sets:
        errors = errors[np.isfinite(errors).all(1)]
        middle, mean = (
            f"{meters(at[0])}, {at[1]:.2f}°" for at in
            ((np.median(errors, axis=0), errors.mean(0)) if len(errors) else [(np.nan, np.nan)] * 2))
        rows.append([name, *(percent(within(errors, *limit)) for limit in POSE_LIMITS), middle, mean])
    return c.below([
        c.paragraph(f"Pose errors of {count} queries", INNER, c.TITLE, bold=True),
        c.beside(charts, 56), c.table(header, rows, INNER, bold_rows=[0]),
    ], GAP, MARGIN)


def _error_chart(title, sets, least, say, rules) -> c.Canvas:
    """Share of queries below an error, over a logarithmic axis of whole decades."""
    values = np.concatenate([errors[np.isfinite(errors)] for _, errors, *_ in sets])
    values = np.clip(values, least, None)
    low = 10.0 ** math.floor(math.log10(min([rules[0][0], *values])))
    high = 10.0 ** math.ceil(math.log10(max([rules[-1][0] * 2, *values])))
    decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
    axis = c.Axis(low, high, [(10.0 ** power, say(10.0 ** power)) for power in decades], True)
    series = []
    for name, errors, color, dash in sets:
        known = np.sort(errors[np.isfinite(errors)])
        shares = 100 * np.arange(1, len(known) + 1) / max(len(known), 1)
        # A step at each error: the share before it, then the share with it.
        x = [low, *np.repeat(known, 2), high] if len(known) else []
        y = [0, *np.stack([shares - 100 / max(len(known), 1), shares], 1).ravel(), 100] if len(known) else []
        series.append(c.Series(name, x, y, color, dash=dash))
    y_axis = c.Axis(0, 100, [(share, f"{share} %") for share in range(0, 101, 20)])
    return c.plot(title + ": share of queries below", series, axis, y_axis, "error", (INNER - 56) // 2, 480,
                  rules)
