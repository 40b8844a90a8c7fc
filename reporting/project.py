"""The CosPlace project's hand-in: the scripts in a zip, and a report of runs with tables and pictures.

    python -m reporting.handin --project logs/default/* --data sf_xs --output project

-> project/report.md, report.html, pictures, and project.zip with these and the scripts.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dataset.classes import Grid
from model import InputError, refuse, warn
from reporting import compare, labels
from reporting.handin import code_files, write_text, write_whole
from reporting.recall import recall_gain
from reporting.web_page import as_html

PROJECT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("project.md")
SHOWN_PICTURES = ("val.png", "test.png")


# ---------------------------------------------------------------- what the runs say


def best_of(rows: Sequence[compare.Row], name: str) -> compare.Row:
    """The row of highest R@1 on all queries of a data set that some row was tested on."""
    known = [row for row in rows if name in row["recall"]]
    queries = max(len(row["hits"][name]) for row in known)  # fewer: by day or by night only
    known = [row for row in known if len(row["hits"][name]) == queries]
    return max(known, key=lambda row: row["recall"][name].get(1, 0.0))


def data_sets_of(rows: Sequence[compare.Row]) -> list[str]:
    """Names of the data sets that any run was tested on."""
    return list(dict.fromkeys(name for row in rows for name in row["recall"]))


def percent(row: compare.Row, name: str, k: int = 1) -> str:
    """Recall in words."""
    value = row["recall"][name].get(k)
    return "–" if value is None else f"{100 * value:.1f} %"


def system_of(row: compare.Row) -> str:
    """Backbone, aggregation and objective of a run in words."""
    s = row["settings"]
    parts = [
        f"{s.get('backbone')} + {s.get('aggregation')}, {row['dimension']} numbers a descriptor"
    ]
    objective = s.get("loss_function") or s.get("criterion")
    if objective and objective != "none":
        parts.append(f"trained with {objective}")
    if s.get("ssl"):
        parts.append(f"{s['ssl']} on two views (weight {s['ssl_weight']})")
    if s.get("target_folder"):
        parts.append(f"gradient reversal against {s['target_folder']} (weight {s['grl_weight']})")
    return "; ".join(parts)


def best_lines(rows: Sequence[compare.Row]) -> str:
    """The highest recall on each data set."""
    lines = []
    for name in data_sets_of(rows):
        row = best_of(rows, name)
        lines.append(
            f"- {name}: highest R@1 {percent(row, name)}, R@5 {percent(row, name, 5)} "
            f"(run {row['run']}, {row['test']}: {system_of(row)})."
        )
    return "\n".join(lines)


def training_line(row: compare.Row) -> str:
    """How a run was trained."""
    s = row["settings"]
    try:
        return _classes_trained(s)
    except (KeyError, TypeError, ValueError):  # of other recipes, or versions
        return "How it was trained is in its info.log."


def _classes_trained(s: dict) -> str:
    return (
        f"Training: {s['epochs_num']} epochs of {s['iterations_per_epoch']} steps of "
        f"{s['batch_size']} images of {s['image_size']} pixels a side, rate {s['lr']:g} ({s['optim']}, "
        f"schedule {s['scheduler']}) for the network, {s['classifiers_lr']:g} for the classifiers. "
        "Images of a batch are of different classes, each augmented by a draw of its own: "
        f"brightness {s['brightness']:g}, contrast {s['contrast']:g}, saturation {s['saturation']:g}, "
        f"hue {s['hue']:g}, crops down to {1 - s['random_resized_crop']:.0%} of the area. After each "
        "epoch R@1 on val decides which weights are kept."
    )


def class_words(rows: Sequence[compare.Row]) -> dict[str, object]:
    """The numbers of CosPlace's classes."""
    s = next((r["settings"] for r in rows if "groups_num" in r["settings"]), {})
    M, alpha, N, L = (s.get(k, v) for k, v in (("M", 10), ("alpha", 30), ("N", 5), ("L", 2)))
    words = {"M": M, "alpha": alpha, "N": N, "L": L, "groups": N * N * L}
    words |= {"apart_m": M * (N - 1), "apart_deg": alpha * (L - 1)}
    counts = next((r["classes"] for r in rows if isinstance(r["classes"], list)), None)
    used = f"Classes of the groups that were used here: {', '.join(map(str, counts or []))}."
    return {**words, "least": s.get("min_images_per_class", 10), "used": used if counts else ""}


def notes(rows: Sequence[compare.Row]) -> str:
    """Why val and test differ; which figures are transductive."""
    names, parts = data_sets_of(rows), []
    of_val = [name for name in names if name.endswith(" val")]
    of_test = [name for name in names if not name.endswith(" val")]
    pairs = [(best_of(rows, a), a, b) for a in of_val for b in of_test]
    for row, a, b in [pair for pair in pairs if pair[2] in pair[0]["recall"]][:1]:
        parts.append(
            f"Why val and test differ: with the same weights (run {row['run']}) R@1 is "
            f"{percent(row, a)} on {a} and {percent(row, b)} on {b}. The queries of val come from the "
            "same kind of camera as the collection and the training images; those of a test are "
            "photographs of other cameras, heights, framings and hours, which the network has not "
            "seen: a shift of domain, beside another number of places to confuse."
        )
    known = {name for row in rows for name in row["transductive"]}
    if known:
        parts.append(
            f"**Note.** Runs with gradient reversal saw the queries of {', '.join(sorted(known))} "
            "without their labels: their figures there are transductive. They show what adapting to "
            "known queries brings, and are not comparable with methods that never see them."
        )
    return "\n\n".join(parts)


def conclusion(rows: Sequence[compare.Row]) -> str:
    """What the intervals allow to say."""
    first, found = rows[0], {"Better": [], "Worse": [], "same": []}
    for row in rows[1:]:
        for name, hits in row["hits"].items():
            before = first["hits"].get(name)
            if before is None or len(before) != len(hits):
                continue
            mean, low, high = recall_gain(hits, before)
            kind = "Better" if low > 0 else "Worse" if high < 0 else "same"
            found[kind].append(f"{row['run']} ({row['test']}) on {name}: {100 * mean:+.1f} points")
    parts = [
        f"{kind} than {first['run']} beyond chance: {'; '.join(found[kind])}."
        for kind in ("Better", "Worse")
        if found[kind]
    ]
    if found["same"]:
        parts.append(
            f"In {len(found['same'])} comparisons with the first row chance alone would explain the "
            "difference."
        )
    return "\n\n".join(parts) or "A single run: nothing is compared yet."


# ---------------------------------------------------------------- writing


def write_report(runs: Sequence[Path], data: Path | None, output: Path) -> list[str]:
    """report.md, report.html and their pictures in `output`; the names of all files."""
    rows = compare.read_rows(runs)
    pictures = []
    if data:
        made = labels.write_labels(data, output, Grid())
        pictures += [(f"Labels: {path.stem.replace('_', ' ')}", path.name) for path in made]
    compare.write_tables(rows, output)
    pictures.append(("The runs compared", "compare.png"))
    for run in runs:
        for path in sorted(run.glob("*.png")):
            if path.name.endswith(SHOWN_PICTURES):
                name = f"{run.parent.name}_{run.name}_{path.name}"
                write_whole(
                    output / name, lambda part, path=path: part.write_bytes(path.read_bytes())
                )
                pictures.append(
                    (f"{run.name}: what was found, {path.stem.replace('_', ' ')}", name)
                )
    words = {
        "best": best_lines(rows),
        "system": (
            f"The first run, {rows[0]['run']}, is {system_of(rows[0])}. A backbone makes a map of local "
            "descriptors, the aggregation one vector of it; search is exact."
        ),
        "training": training_line(rows[0]),
        **class_words(rows),
        "short": compare.markdown(*compare.short_table(rows)).strip(),
        "whole": compare.markdown(*compare.make_table(rows)).strip(),
        "notes": notes(rows),
        "pictures": "\n\n".join(f"![{caption}](<{file}>)" for caption, file in pictures),
        "conclusion": conclusion(rows),
    }
    text = TEMPLATE.read_text(encoding="utf-8").format(**words)
    write_text(output / "report.md", text)
    write_text(output / "report.html", as_html(text, output))
    tables = ["compare.md", "compare.csv"]
    return ["report.md", "report.html", *tables, *(name for _, name in pictures)]


def pack(output: Path, names: Sequence[str], runs: Sequence[Path], archive: Path) -> int:
    """A zip of the scripts, the report and what the runs said; the number of files."""
    files = {name: PROJECT / name for name in code_files(PROJECT)}
    files |= {f"report/{name}": output / name for name in names}
    for run in runs:
        for name in ("info.log", "metrics.json"):
            if (run / name).is_file():
                files[f"runs/{run.parent.name}/{run.name}/{name}"] = run / name

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, path in files.items():
                packed.write(path, name)

    write_whole(archive, write)
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Write and pack; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="reporting.handin", description=__doc__.partition("\n")[0]
    )
    option = parser.add_argument
    option(
        "--project", type=Path, nargs="+", required=True, metavar="RUN", help="as logs/default/*"
    )
    option("--data", type=Path, metavar="DIR", help="a data set whose labels are drawn")
    option("--output", type=Path, default=Path("project"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        runs = [run for run in args.project if (run / "metrics.json").is_file()]
        if len(runs) < len(args.project):
            warn(f"{len(args.project) - len(runs)} of the folders hold no metrics.json: left out.")
        whole = args.output.absolute()
        if whole.is_dir() and any(whole.iterdir()) and not (whole / "report.md").is_file():
            raise InputError(
                f"{args.output} holds other files: name a new or an empty folder with --output."
            )
        names = write_report(runs, args.data, args.output)
        archive = whole.with_name(whole.name + ".zip")
        count = pack(args.output, names, runs, archive)
    except InputError as error:
        return refuse("reporting.handin", error)
    print(
        f"Written: {args.output / 'report.html'}, report.md and their pictures; {archive}, {count} files."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
