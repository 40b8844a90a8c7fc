"""The pictures of task 4: matches of two images, cameras of a scene, curves of the errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting import canvas as c
from reporting.figures import meters
from reporting.pose_file import LIMITS

LINES_DRAWN = 60  # matches of a kind
VIEW_HEIGHT, VIEW_PAD, EDGE, LABEL, WORST_NAMED = 1640, 112, 24, 54, 5  # px; queries
POSES_NOTE = (
    'The vertical of the world is not known: "above" looks across the plane in which the cameras and '
    "their viewing directions spread most; it may be from below. Short lines are viewing directions; a "
    "dot on the edge of a view lies beyond it."
)


@dataclass(frozen=True)
class ShownMatches:
    """m matches of a query with an index image: px in both (m, 2), the center of the top left pixel at
    (0, 0), which the pose allows (m,), and the matched points as the pose projects them into the
    query, px (m, 2), NaN for none."""

    query_px: np.ndarray
    index_px: np.ndarray
    inlier: np.ndarray
    projected_px: np.ndarray


def draw_matches(
    images: tuple[str | Path, str | Path], shown: ShownMatches, caption: str
) -> c.Block:
    """Query and index image with their matches, right ones (inliers) and others."""
    gap = c.GAP // 2
    files = [c.opened(image) for image in images]
    photos = [c.resized(file, (c.INNER - gap) // 2) for file in files]
    pair, second = c.beside(photos, gap), photos[0].width + gap
    scales = [photo.width / file.width for photo, file in zip(photos, files)]
    query_at, seen_at = ((xy + 0.5) * scales[0] for xy in (shown.query_px, shown.projected_px))
    index_at = (shown.index_px + 0.5) * scales[1] + [second, 0]
    right, wrong = (np.flatnonzero(kind) for kind in (shown.inlier, ~shown.inlier))
    for numbers, mark, radius, color, width in (
        (wrong, "cross", 10, c.WRONG, 2),
        (right, "circle", 8, c.MINT, 3),
    ):
        for ends in zip(query_at[_spread(numbers)], index_at[_spread(numbers)]):
            c.line(pair, ends, color, width)
            for end in ends:
                c.mark(pair, mark, *end, radius, color)
    for x, y in seen_at[_spread(right)]:
        if 0 < x < photos[0].width and 0 < y < photos[0].height:  # NaN is not
            c.mark(pair, "ring", x, y, 14, c.GOLD)
    names = c.blank(pair.width, c.SMALL * c.LINE_HEIGHT)
    for word, image, photo, x in zip(("query", "index"), images, photos, (0, second)):
        c.write(names, x, 0, f"{word}: {Path(image).name}", c.SMALL, c.MUTED, width=photo.width)
    signs = [
        ("circle", c.MINT, f"inliers: {len(right)}", 3),
        ("ring", c.GOLD, "their 3D points, projected by the estimated pose", 0),
        ("cross", c.WRONG, f"outliers: {len(wrong)}", 2),
    ]
    blocks = [c.paragraph(caption, c.HEAD), names, pair, c.key(signs)]
    if max(len(right), len(wrong)) > LINES_DRAWN:
        note = f"At most {LINES_DRAWN} matches of each kind are drawn, evenly chosen."
        blocks.append(c.paragraph(note, c.SMALL, c.MUTED))
    return c.below(blocks, 24, c.MARGIN)


def _spread(numbers: np.ndarray) -> np.ndarray:
    """At most LINES_DRAWN of `numbers`, evenly spread."""
    count = min(len(numbers), LINES_DRAWN)
    return numbers[np.linspace(0, len(numbers) - 1, count).round().astype(int)]


Cameras = tuple[np.ndarray, np.ndarray]  # centers (n, 3) in m, viewing directions (n, 3), world


def draw_poses(
    scene: str, index: Cameras, true: Cameras, estimated: Cameras, names: Sequence[str]
) -> c.Block:
    """Index cameras, true (NaN: unknown) and estimated query cameras, in two views of one scale.

    names: of the queries. The vertical of the world is unknown: "above" is across the plane in which
    centers and viewing directions spread most.
    """
    known = np.isfinite(true[0]).all(1)
    error_m = np.linalg.norm(true[0] - estimated[0], axis=1)
    worst = [query for query in np.argsort(-error_m) if error_m[query] > 0][:WORST_NAMED]
    errors = [f"{n}: {Path(names[q]).name} {meters(error_m[q])}" for n, q in enumerate(worst, 1)]
    placed = [np.concatenate([index[i], true[i][known]]) for i in (0, 1)]
    if not len(placed[0]):
        placed = estimated
    axes = _view_axes(*placed)
    low, high = (placed[0] @ axes.T).min(0), (placed[0] @ axes.T).max(0)
    room = np.array([c.INNER, VIEW_HEIGHT]) - 2 * VIEW_PAD
    scale = float((room / np.maximum(high - low, 0.1)[:2]).min())
    signs = [
        ("square", c.MUTED, f"index cameras: {len(index[0])}", 0),
        ("ring", c.RIGHT, f"true query cameras: {known.sum()}", 0),
        ("circle", c.ACCENT, f"estimated: {len(estimated[0])}", 0),
        (None, c.WRONG, "position error", 6),
    ]
    blocks = [c.paragraph(f"Scene {scene}: camera poses", c.TITLE), c.key(signs)]
    for title, down in (("From above", 1), ("From the side", 2)):
        plane = scale * axes[[0, down]]  # px on the picture from m in the world
        middle = scale * ((low + high) / 2)[[0, down]]
        height = max((high - low)[down] * scale + 2 * VIEW_PAD, 600)
        flat = [
            (centers @ plane.T - middle, forward @ plane.T / scale)
            for centers, forward in (index, true, estimated)
        ]
        blocks += [c.paragraph(title), _view(flat, round(height), scale, worst)]
    if worst:
        blocks.append(
            c.paragraph(f"Largest position errors: {' · '.join(errors)}", c.SMALL, c.WRONG)
        )
    return c.below([*blocks, c.paragraph(POSES_NOTE, c.SMALL, c.MUTED)], 36, c.MARGIN)


def _view_axes(centers: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Right-handed axes (3, 3), rows by how far centers and viewing directions spread along them."""
    if not len(centers):
        return np.eye(3)
    spread = centers.std(0).max() or 1.0
    ends = np.concatenate([centers + side * spread * forward for side in (-0.3, 0.3)])
    _, _, axes = np.linalg.svd(ends - ends.mean(0))
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    return axes * [[1], [1], [np.linalg.det(axes)]]


def _view(flat: Sequence[Cameras], height: int, scale: float, named: Sequence[int]) -> c.Block:
    """One view. flat: centers (n, 2) in px around the middle and directions (n, 2), of index, true
    and estimated cameras; scale: px a meter; named: the queries to number."""
    block = c.blank(c.INNER, height)
    x, y = c.INNER - 2, height - 2
    c.line(block, [(1, 1), (x, 1), (x, y), (1, y), (1, 1)], c.GRID)
    half = np.array([c.INNER, height]) / 2
    placed = [np.clip(xy, EDGE - half, half - EDGE) + half for xy, _ in flat]
    for ends in zip(placed[1], placed[2]):
        if np.isfinite(ends).all():
            c.line(block, ends, c.WRONG, 6)
    looks = (("square", c.MUTED, 9, 40), ("ring", c.RIGHT, 18, 68), ("circle", c.ACCENT, 10, 52))
    for centers, (_, forward), (mark, color, radius, length) in zip(placed, flat, looks):
        for center, end in zip(centers, centers + length * forward):
            if np.isfinite([center, end]).all():
                c.line(block, [center, end], color)
                c.mark(block, mark, *center, radius, color)
    _scale_bar(block, scale)
    taken: list[np.ndarray] = []
    for number, query in enumerate(named, 1):
        at = np.clip(placed[2][query] + [22, -60], 70, [c.INNER - 40, height - LABEL])
        step = LABEL if at[1] < height / 2 else -LABEL
        while any((abs(at - other) < LABEL).all() for other in taken):
            at[1] += step
        taken.append(at)
        c.write(block, *at, str(number), c.SMALL, c.WRONG)
    return block


def _scale_bar(block: c.Block, scale: float) -> None:
    """Draw a bar of a round number of meters in the upper right corner, `scale` px a meter."""
    power = 10.0 ** math.floor(math.log10(c.INNER / 5 / scale))
    length_m = max(step * power for step in (1, 2, 5) if step * power * scale <= c.INNER / 5)
    right = c.INNER - 40 - c.write(block, c.INNER - 20, 10, meters(length_m), c.SMALL, anchor="r")
    left = right - length_m * scale
    corners = [(left, 24), (left, 52), (left, 38), (right, 38), (right, 24), (right, 52)]
    c.line(block, corners, c.INK, 6)


def draw_errors(ours: np.ndarray, retrieval: np.ndarray) -> c.Block:
    """Cumulative curves of position and rotation errors (n, 2), m and degrees, NaN if unknown."""
    charts = [
        _error_chart(title, column, [ours[:, column], retrieval[:, column]], least, say)
        for column, (title, least, say) in enumerate(
            (
                ("Position error", 1e-4, meters),
                ("Rotation error", 1e-3, lambda value: f"{value:g}°"),
            )
        )
    ]
    title = c.paragraph(f"Pose errors of {np.isfinite(ours).all(1).sum()} queries", c.TITLE)
    return c.below([title, c.beside(charts)], margin=c.MARGIN)


def _error_chart(
    title: str, column: int, sets: list[np.ndarray], least: float, say: Callable[[float], str]
) -> c.Block:
    """Share of queries below an error, over a logarithmic axis of whole decades from `least` on."""
    known = [np.sort(np.log10(errors[np.isfinite(errors)].clip(least))) for errors in sets]
    limits = sorted({limit[column] for limit in LIMITS.values()})
    rules = [(math.log10(limit), say(limit)) for limit in limits]
    values = np.concatenate([*known, [rules[0][0], rules[-1][0] + 0.3]])
    decades = range(math.floor(values.min()), math.ceil(values.max()) + 1)
    x_axis = c.Axis(decades[0], decades[-1], [(power, say(10.0**power)) for power in decades])
    series = []
    looks = (("estimated pose", c.ACCENT, 6), ("pose of the best index image", c.BROWN, 3))
    for (name, color, width), errors in zip(looks, known):
        # A step at each error: the share before it, then the share with it.
        x = [decades[0], *errors.repeat(2), decades[-1]] if len(errors) else []
        y = np.linspace(0, 100, len(errors) + 1).repeat(2).tolist() if len(errors) else []
        series.append(c.Series(name, x, y, color, width=width))
    return c.chart(f"{title}: share of queries below", series, x_axis, c.PERCENT, "error", rules)
