"""What training gains with other tuples: values of training/mining.py's constants side by side.

    python tests/bench/tuples.py DATASET [--weights FILE] --seeds 1 2 3 --try HARDEST=2 "NEGATIVES=5 JOINING=1"

Each try, the values as they are first, runs base.py with each seed. Printed are the MRR of the held-out
training queries after the last epoch, and what val gains in recall@1 and @5 over the untrained model. With
few val queries chance decides much of one gain (106: 3 points): use several seeds, and look at the MRR.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import base
from training import mining


def gains(argv: list[str]) -> tuple[float, float, float]:
    """Of a run of base.py: held-out MRR after the last epoch, gains in recall@1 and @5."""
    with tempfile.TemporaryDirectory() as output:
        if base.main([*argv, "--output", output, "--quiet"]):
            raise SystemExit(2)
        section = json.loads((Path(output) / "metrics.json").read_text())["base"]
    val = section["recall"]["val"]
    recall = [val["trained"][val["k"].index(k)] - val["untrained"][val["k"].index(k)] for k in (1, 5)]
    return section["epochs"][-1]["held_out_mrr"], *recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--try", nargs="+", default=[], dest="tries", metavar="NAME=VALUE …")
    args = parser.parse_args()
    for values in ["", *args.tries]:
        changed = {"HARDEST": mining.HARDEST}  # patch.multiple wants something
        changed |= {name: int(value) for name, value in (pair.split("=") for pair in values.split())}
        if "NEGATIVES" in changed:
            changed["NEGATIVES"] = {**mining.NEGATIVES, "hard": changed["NEGATIVES"]}
        command = ["--dataset", args.dataset, "--weights", args.weights, "--seed"]
        with patch.multiple(mining, **changed):
            rows = np.array([gains([*command, seed]) for seed in args.seeds])
        spread = rows.std(axis=0, ddof=min(1, len(rows) - 1)) / np.sqrt(len(rows))
        said = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(rows.mean(axis=0), spread))
        print(f"{values or 'as it is'}: last held-out MRR, gain of val R@1, R@5: {said}", flush=True)


if __name__ == "__main__":
    main()
