"""Renders the sample: python -m dataset.sample [--output DIR] [--seed N] [--layout folders]."""

import argparse
import sys
from pathlib import Path

from dataset import SAMPLE
from dataset.sample import render_sample
from dataset.sample.folders import FOLDER, write_folders
from model import InputError, refuse


def main(argv: list[str] | None = None) -> int:
    """The command: 0 when it is rendered, 2 for a folder that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m dataset.sample", description=__doc__)
    parser.add_argument("--output", type=Path, default=SAMPLE, help=f"default: {SAMPLE}")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, another town (default 0)"
    )
    parser.add_argument(
        "--layout",
        choices=["lists", "folders"],
        default="lists",
        help=f"folders: also as data sets of named images, in {FOLDER}/ below",
    )
    args = parser.parse_args(argv)
    try:
        render_sample(args.output, args.seed)
        if args.layout == "folders":
            write_folders(args.output, args.output / FOLDER)
    except InputError as error:
        return refuse("dataset.sample", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
