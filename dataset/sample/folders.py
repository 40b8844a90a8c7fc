"""The built-in sample's town in the layout of dataset/folders.py: data sets `sample` and `night`.

    <rendered sample>/folders/{sample/images/{train,val,test},night/images/test}/{database,queries}

`night` has the index images of sample's test, and its queries taken by night.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset import SAMPLE, split_files
from dataset.sample import is_rendered, render_sample
from dataset.sample.town import SPLITS, build_street, photograph, plan_town

DATA_SETS = ("sample", "night")
FOLDER = "folders"  # in the rendered sample
NIGHT_SPLIT = "test"


def locate_sample() -> Path:
    """The folder of DATA_SETS, rendered and written on first use, said in a line."""
    folder = SAMPLE / FOLDER
    if not is_rendered(SAMPLE):
        print(f"The built-in SAMPLE is rendered to {SAMPLE} now, about a minute.")
        render_sample(SAMPLE)
    if not folder.is_dir():
        write_folders(SAMPLE, folder)
    return folder


def write_folders(rendered: Path, folder: Path) -> None:
    """Copy a rendered sample (the assignment's lists) to named images in `folder`, whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=".folders.", dir=folder.parent))
    try:
        for split in SPLITS:
            query_list, index_list, truth = split_files(split)
            with np.load(rendered / truth) as file:
                lists = (
                    ("queries", query_list, file["utmQ"]),
                    ("database", index_list, file["utmDb"]),
                )
            for kind, list_file, utm in lists:
                of_sample = partial / "sample" / "images" / split / kind
                lines = (rendered / list_file).read_text().split()
                for line, position in zip(lines, utm):
                    source = rendered / line.removeprefix("dataset/")
                    shutil.copyfile(source, _named(of_sample, source.stem, position))
        of_test = partial / "sample" / "images" / NIGHT_SPLIT
        of_night = partial / "night" / "images" / "test"
        shutil.copytree(of_test / "database", of_night / "database")
        _render_night(rendered, of_night / "queries")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _named(folder: Path, pano: str, position: Sequence[float], note: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    east, north = position
    return folder / f"@{east:010.2f}@{north:010.2f}@17@T@@@{pano}@@@@@@@{note}@.jpg"


def _render_night(rendered: Path, folder: Path) -> None:
    """The queries of NIGHT_SPLIT once more, taken by night."""
    made = json.loads((rendered / "sample.json").read_text())
    seed, size = made["seed"], made["size"]
    number = SPLITS.index(NIGHT_SPLIT)
    streets = size["streets"][number]
    panoramas = plan_town(NIGHT_SPLIT, streets, *size["panoramas"], size["yaws"], seed)
    for street in range(streets):
        built = build_street(np.random.default_rng([seed, number, street, 2]))
        here = [p for p in panoramas if p.is_query and p.street == street]
        for i, panorama in enumerate(here):
            rng = np.random.default_rng([seed, number, street, 4, i])
            views = photograph(built, panorama, size["town_px"], rng, by_night=True)
            for picture, file in zip(views, panorama.files()):
                named = _named(folder, Path(file).stem, panorama.utm_m, "night")
                picture.save(named, quality=88)
