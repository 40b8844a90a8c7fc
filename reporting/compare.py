"""One table over runs of train.py and eval.py on folders: what differs between them, and their recall.

    python -m reporting.compare logs/default/*               # logs/compare.{md,csv,png}
    python -m reporting.compare RUN RUN --output DIR

A row for each run and each line of its table; evaluations of the same checkpoint in the same way on
other data sets join their row. The gain in R@1 is that over the first row, with its 95 % interval
(paired bootstrap over queries), for data sets of which both have the same number of queries.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model import InputError, refuse, warn
from reporting import canvas
from reporting.handin import write_text
from reporting.recall import recall_gain

SHOWN_K = (1, 5)
# Settings that change no result, or that the row's name tells.
LEFT_OUT = {
    "save_dir", "device", "resume", "datasets_folder", "dataset_name", "infer_batch_size",
    "recall_values", "num_preds_to_save", "save_only_wrong_preds", "save_descriptors",
    "night_queries", "rerank", "dataset_folder", "train_set_folder", "val_set_folder",
    "test_set_folder", "resume_model", "augmentation_device",
}  # fmt: skip
Row = dict[str, object]  # name, settings, recall (data set -> {K: share}), hits, seconds, …


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of all runs, in the order of the folders. InputError if there is no run at all."""
    rows: dict[tuple, Row] = {}
    for folder in folders:
        file = folder / "metrics.json"
        try:
            found = _rows_of(folder, json.loads(file.read_text(encoding="utf-8")))
            make_table([row for _, row in found])  # which a damaged one does not allow
        except FileNotFoundError:
            warn(f"{folder} holds no metrics.json, its run has not ended: left out.")
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{file} is no run's, or damaged ({error!r}): left out.")
            continue
        if not found:
            warn(f"{file} holds no recall, its run has not ended: left out.")
        for key, row in found:
            known = rows.setdefault(key, row)
            for part in ("recall", "hits"):
                known[part].update(row[part])
            known["transductive"] = sorted({*known["transductive"], *row["transductive"]})
    if not rows:
        raise InputError(
            "none of these folders holds the recall of a run: name runs, as logs/default/*."
        )
    return list(rows.values())


def _rows_of(folder: Path, run: dict) -> list[tuple[tuple, Row]]:
    settings = {k: v for k, v in run["settings"].items() if k not in LEFT_OUT}
    found: dict[str, Row] = {}
    for data_set, table in run["recall"].items():
        for line, entry in table.items():
            row = found.setdefault(
                line,
                {
                    "run": folder.name,
                    "test": line,
                    "settings": settings,
                    "recall": {},
                    "hits": {},
                    "seconds": float(run["seconds"]),
                    "dimension": settings.get("pca_dim") or run["descriptor_dim"],
                    "classes": run.get("classes"),
                    "transductive": list(run.get("transductive", [])),
                },
            )
            if not all(0 <= share <= 1 for share in entry["recall"]):  # NaN is not
                raise ValueError(f"recall of {data_set} is not between 0 and 1")
            row["recall"][data_set] = dict(zip(run["recall_values"], entry["recall"], strict=True))
            row["hits"][data_set] = np.array(entry["hits"], dtype=int)
    same = json.dumps(settings, sort_keys=True)
    return [((str(run["checkpoint"]), same, line), row) for line, row in found.items()]


def differing(rows: Sequence[Row]) -> list[str]:
    """Names of the settings that are not the same in all rows that have them."""
    values: dict[str, set] = {}
    for row in rows:
        for name, value in row["settings"].items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def make_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: run, test, settings that differ, recall and gain of each data set, costs."""
    names = differing(rows)
    data_sets = list(dict.fromkeys(name for row in rows for name in row["recall"]))
    header = ["run", "test", *names]
    for name in data_sets:
        header += [f"{name} R@{k}" for k in SHOWN_K]
        header += ["gain R@1 [95 %]"] if len(rows) > 1 else []
    header += ["seconds", "dimension"]
    cells = []
    for row in rows:
        line = [row["run"], row["test"], *(_text(row["settings"].get(name, "–")) for name in names)]
        for name in data_sets:
            recall = row["recall"].get(name, {})
            line += [f"{100 * recall[k]:.1f}" if k in recall else "–" for k in SHOWN_K]
            line += [_gain_text(row, rows[0], name)] if len(rows) > 1 else []
        cells.append([*line, f"{row['seconds']:.0f}", str(row["dimension"])])
    return header, cells


def short_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: run, what sets it apart in few words, R@1 / R@5 in % on each data set."""
    names = [name for name in differing(rows) if name not in ("recipe", "seed")]
    data_sets = list(dict.fromkeys(name for row in rows for name in row["recall"]))
    cells = []
    for row in rows:
        first = rows[0]["settings"]
        own = {name: row["settings"][name] for name in names if name in row["settings"]}
        words = ", ".join(f"{n} {_text(v)}" for n, v in own.items() if v != first.get(n)) or "–"
        line = [row["run"], row["test"], words]
        for name in data_sets:
            recall = row["recall"].get(name, {})
            both = [f"{100 * recall[k]:.1f}" if k in recall else "–" for k in SHOWN_K]
            line.append(" / ".join(both))
        cells.append(line)
    return ["run", "test", "differs from the first in", *data_sets], cells


def _gain_text(row: Row, first: Row, name: str) -> str:
    hits, before = row["hits"].get(name), first["hits"].get(name)
    if row is first or hits is None or before is None or len(hits) != len(before):
        return "–"
    mean, low, high = (100 * value for value in recall_gain(hits, before))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(c.replace("|", "/") for c in line) + " |\n" for line in lines)


def write_tables(rows: Sequence[Row], output: Path) -> str:
    """compare.md, .csv and .png in `output`; the Markdown: R@1 / R@5 at a glance, then everything."""
    header, cells = make_table(rows)
    text = f"{markdown(*short_table(rows))}\n{markdown(header, cells)}"
    content = io.StringIO()
    csv.writer(content).writerows([header, *cells])
    for suffix, written in ((".md", text), (".csv", content.getvalue())):
        write_text(output / f"compare{suffix}", written)
    title = canvas.paragraph("Runs compared", canvas.TITLE)
    table = canvas.table([header, *cells], canvas.SMALL, whole=True)
    canvas.save(output / "compare.png", canvas.below([title, table], margin=canvas.MARGIN))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("logs"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.runs)
        print(write_tables(rows, args.output))
    except InputError as error:
        return refuse("compare.py", error)
    print(f"Written: {args.output / 'compare'}.md, .csv, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
