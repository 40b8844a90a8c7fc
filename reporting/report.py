"""Writes output/report/ from metrics.json and the pictures of a run: every number comes from there.

`contents` lists what stands in the report, block by block, in Markdown; web_page.py makes HTML of it.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from model import IMAGE_SIZE
from reporting import figures
from reporting.handin import SECTIONS, read_metrics, write_text
from reporting.web_page import as_html

METHOD = Path(__file__).parent / "method.md"
MINING_ONLY = "{mining} "  # begins what method.md says of runs that mine negatives
EPOCH_COLUMNS = (  # key of an epoch, name, decimals
    ("epoch", "epoch", 0),
    ("train_loss", "training loss", 4),
    ("val_loss", "validation loss", 4),
    ("violations", "violations", 3),
    ("skipped", "skipped tuples", 0),
    ("held_out_mrr", "held-out MRR", 3),
    ("val_R@1", "R@1, val lists", 3),
    ("seconds", "seconds", 1),
)
NO_SETTINGS = {"query", "quiet", "export", "map"}  # options that change no result


def write_report(output: Path) -> None:
    """Write report/report.md and report/report.html into `output` from what lies there.

    InputError when metrics.json is broken or a file cannot be written.
    """
    output = Path(output)
    folder = output / "report"
    markdown = "\n\n".join(contents(read_metrics(output), output)) + "\n"
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", as_html(markdown, folder))


def contents(metrics: dict, output: Path) -> list[str]:
    """The report as blocks of Markdown, from metrics.json and the pictures found in `output`."""
    sections = {script: metrics.get(name) or {} for name, script in SECTIONS.items()}
    base, test = sections.values()
    return [
        "# NetVLAD place recognition and camera poses",
        *(f"> **Note.** {_marked(text)}" for text in _warnings(metrics, base, test)),
        *_at_a_glance(base, test),
        *_data(base, test),
        *_method(base),
        *_settings(sections),
        *_recall_results(base, output),
        *_pose_results(test, output),
        *_times(sections),
        *_limits(sections),
        *_reproduce(sections),
    ]


def _marked(text: str) -> str:
    """Text whose characters Markdown would read as markup stand as they are."""
    return "".join(
        f"\\{sign}" if sign in "\\`*_<>[]|#" else sign for sign in " ".join(text.split())
    )


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {_marked(item)}" for item in items)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first; columns in which every cell begins like a number stand right."""
    number = [all(cell[:1] in "0123456789–-?" for cell in column[1:]) for column in zip(*rows)]
    rule = ["---:" if right else "---" for right in number]
    header, *lines = [[_marked(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _pictures(output: Path, pictures: Sequence[dict]) -> list[str]:
    """The pictures that are there, of names relative to `output`/report."""
    return [
        f"![{_marked(picture['caption'])}](<{picture['file']}>)"
        for picture in pictures
        if (output / "report" / picture["file"]).is_file()
    ]


def _warnings(metrics: dict, base: dict, test: dict) -> list[str]:
    texts = [*metrics.get("warnings", []), *figures.plain_warnings(base)]
    if (test.get("data") or {}).get("is_sample") and not (base.get("data") or {}).get("is_sample"):
        texts.append("The camera poses are of the built-in sample's rendered rooms.")
    for section, what, script in ((base, "recall", "base.py"), (test, "camera poses", "test.py")):
        if not section:
            texts.append(f"No results of {script} yet: run it, and this report fills up.")
        elif section.get("stale"):
            texts.append(
                f"The results on {what} belong to another checkpoint "
                f"({section['checkpoint'][:12]}…): run {script} again."
            )
    return texts


def _at_a_glance(base: dict, test: dict) -> list[str]:
    lines = [figures.headline(base["recall"])] if base.get("recall") else []
    if test:
        retrieval = test.get("retrieval") or {}
        lines.append(
            f"{test.get('queries', '?')} query images in {len(test.get('scenes') or [])} scenes: "
            f"mean pose error {_error(test, 'mean')}, median {_error(test, 'median')}; the best index "
            f"image alone would give {_error(retrieval, 'mean')} and {_error(retrieval, 'median')}."
        )
    return ["## Results at a glance", _bullets(lines)] if lines else []


def _error(section: dict, kind: str) -> str:
    """ "0.031 m / 0.10°" of the mean or the median."""
    return f"{_number(section.get(f'{kind}_m'), 3)} m / {_number(section.get(f'{kind}_deg'), 2)}°"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _data(base: dict, test: dict) -> list[str]:
    blocks = []
    if data := base.get("data"):
        where = f"Place recognition: {data.get('name', '?')}, in {data.get('root', '?')}."
        rows = [
            [part, str(data[f"{part}_queries"]), str(data.get(f"{part}_index", "–"))]
            for part in ("train", "val", "test")
            if data.get(f"{part}_queries") is not None
        ]
        table = [_table([["lists", "queries", "index images"], *rows])] if rows else []
        blocks += [_marked(where), *table]
    if split := base.get("split"):
        blocks.append(
            f"The training queries were split by place into {split.get('train')} for training, "
            f"{split.get('val')} for the validation loss and {split.get('test')} for the test loss, so "
            f"that no index image lies near queries of two parts; {split.get('dropped')} queries in "
            "between were dropped."
        )
    if test:
        blocks.append(
            f"Camera poses: scenes {_marked(_said(test.get('scenes') or []))}; of all frames "
            f"{test.get('queries', '?')} were drawn as queries (seed {test.get('seed', '?')}) and "
            f"{test.get('index', '?')} are the index, whose poses are known."
        )
    if remarks := (base.get("data") or {}).get("remarks"):
        blocks.append(_bullets(remarks))
    if cameras := test.get("cameras"):
        rows = [["scene", "fx, fy px", "cx, cy px", "from", "pose file read as", "from"]]
        for name, camera in cameras.items():
            pairs = ((camera.get(a), camera.get(b)) for a, b in (("fx", "fy"), ("cx", "cy")))
            lens = [f"{_number(first, 1)}, {_number(second, 1)}" for first, second in pairs]
            keys = ("focal_from", "convention", "convention_from")
            rows.append([name, *lens, *(_said(camera.get(key)) for key in keys)])
        found = "found from matches of the posed index images (evidence), assumed (prior) or given"
        blocks += [f"Cameras: {found}.", _table(rows)]
    return ["## Data", *blocks] if blocks else []


def _method(base: dict) -> list[str]:
    """The method; how negatives are found depends on the run."""
    parts = METHOD.read_text(encoding="utf-8").strip().split("\n\n")
    mined = (base.get("settings") or {}).get("mining") == "hard"
    return [part.removeprefix(MINING_ONLY) for part in parts if mined or MINING_ONLY not in part]


def _rows(sections: dict[str, dict], facts: Callable[[dict], dict]) -> list[list[str]]:
    """A row of script, name and value for each of the facts of a script's section."""
    return [
        [script, name, str(value)]
        for script, section in sections.items()
        for name, value in facts(section).items()
        if value is not None
    ]


def _settings(sections: dict[str, dict]) -> list[str]:
    def settings(section: dict) -> dict:
        named = {name.replace("_", "-"): _said(value) for name, value in _options(section).items()}
        return {**named, "weights in use": (section.get("weights") or {}).get("origin")}

    rows = _rows(sections, settings)
    return ["## Settings", _table([["script", "setting", "value"], *rows])] if rows else []


def _options(section: dict) -> dict:
    """The options of a script that change its results."""
    settings = section.get("settings") or {}
    return {name: value for name, value in settings.items() if name not in NO_SETTINGS}


def _said(value) -> str:
    """A setting's value as one would say it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _recall_results(base: dict, output: Path) -> list[str]:
    if not base.get("recall"):
        return []
    blocks = ["## Results: recall", _table(figures.recall_rows(base["recall"]))]
    blocks.append("In brackets: 95 % bootstrap interval over the queries.")
    if epochs := base.get("epochs"):
        columns = [
            column
            for column in EPOCH_COLUMNS
            if any(each.get(column[0]) is not None for each in epochs)
        ]
        rows = [[name for _, name, _ in columns]]
        for entry in epochs:
            rows.append([_number(entry.get(key), digits) for key, _, digits in columns])
        blocks.append(_table(rows))
    if base.get("test_loss") is not None:
        part = "Loss on the held-out test part of the training queries"
        blocks.append(f"{part}: {base['test_loss']:.4f}.")
    caption = "Recall, training, and chosen queries with their best matches."
    return [*blocks, *_pictures(output, [{"file": "../task3_result.png", "caption": caption}])]


def _pose_results(test: dict, output: Path) -> list[str]:
    if not test:
        return []
    limits = list(test.get("within") or {})
    rows = [["pose from", "mean m", "mean °", "median m", "median °", *limits]]
    rows[0] = [cell.replace("deg", "°") for cell in rows[0]]
    for name, section in (("ours", test), ("best index image", test.get("retrieval") or {})):
        within = section.get("within") or {}
        numbers = [
            _number(section.get(f"{kind}_{unit}"), digits)
            for kind in ("mean", "median")
            for unit, digits in (("m", 3), ("deg", 2))
        ]
        rows.append([name, *numbers, *(figures.percent(within.get(limit)) for limit in limits)])
    blocks = ["## Results: camera poses", _table(rows)]
    if methods := test.get("methods"):
        rows = [["method", "queries", "median m", "median °"]]
        for name, entry in methods.items():
            medians = _number(entry.get("median_m"), 3), _number(entry.get("median_deg"), 2)
            rows.append([name, str(entry.get("count")), *medians])
        blocks.append(_table(rows))
    if unsure := test.get("not_found"):
        least = (test.get("settings") or {}).get("min_confidence")
        blocks.append(
            f"Of {test.get('queries')} queries {unsure} count as not found: their confidence is below "
            f"{_said(least)}. The figures are of all."
        )
    measured = [row for row in test.get("per_query") or [] if row.get("error_m") is not None]
    if worst := sorted(measured, key=lambda row: -row["error_m"])[:5]:
        rows = [["query", "method", "inliers", "error m", "error °", "confidence"]]
        for row in worst:
            numbers = (("error_m", 3), ("error_deg", 2), ("confidence", 2))
            cells = [_number(row.get(key), digits) for key, digits in numbers]
            rows.append([row["path"], str(row.get("method")), str(row.get("inliers", "–")), *cells])
        blocks += ["The largest position errors:", _table(rows)]
    views = [
        f"[{_marked(view['caption'])}](<{view['file']}>)"
        for view in test.get("views") or []
        if (output / "report" / view["file"]).is_file()
    ]
    return [*blocks, *_pictures(output, test.get("pictures") or []), *views]


def _times(sections: dict[str, dict]) -> list[str]:
    def times(section: dict) -> dict:
        return {name: _number(value, 1) for name, value in (section.get("phases") or {}).items()}

    rows = _rows(sections, times)
    return ["## Time by phase", _table([["script", "phase", "seconds"], *rows])] if rows else []


def _limits(sections: dict[str, dict]) -> list[str]:
    settings = (sections.get("base") or {}).get("settings") or {}
    size = settings.get("image_size", IMAGE_SIZE)
    items = [
        "Repeated structure (tiles, doors, panels) can put a pose a whole repetition off, with many inliers.",
        f"Images are reduced to {size} × {size} for the descriptor: small signs do not count.",
        "A pose is metric only as far as the index poses are.",
    ]
    for script, section in sections.items():
        items += [f"{script}: {text}" for text in section.get("warnings") or []]
    return ["## Limits", _bullets(items)]


def _reproduce(sections: dict[str, dict]) -> list[str]:
    def facts(section: dict) -> dict:
        found = {key: section.get(key) for key in ("checkpoint", "date", "seed", "device")}
        return {**found, **(section.get("versions") or {})}

    commands = ["pip install -r requirements.txt"]
    for script, section in sections.items():
        commands += [" ".join(["python", script, *_flags(_options(section))])] if section else []
    rows = _rows(sections, facts)
    table = [_table([["script", "what", "value"], *rows])] if rows else []
    return ["## How to reproduce", _code(commands), *table]


def _flags(settings: dict) -> list[str]:
    """{"batch_size": 8} → ["--batch-size", "8"]; what is off or not set is left out."""
    words = []
    for name, value in settings.items():
        if value is not None and value is not False and value != []:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *(shlex.quote(str(one)) for one in values)]
    return words
