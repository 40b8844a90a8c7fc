"""bf16 against float32 on real images: cosine of the descriptors, and the queries whose answer differs.

    python tests/bench/precision.py ../shared/data/tower output/checkpoints/netvlad_final.pth

Run by hand. To reach: mean cosine 0.999, at most one query different at each K.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lists import read_split
from eval import compute_embeddings, first_hits, positives_within, search
from model import load_checkpoint

RECALL_VALUES = (1, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    data = read_split(args.dataset, args.split)
    hits, descriptors = {}, {}
    for precision in ("float32", "bf16"):
        model = load_checkpoint(args.checkpoint).eval()
        model.precision = precision
        q, d = (compute_embeddings(model, part, "cpu")[0] for part in (data.queries, data.index))
        _, ranking = search(q, d, max(RECALL_VALUES))
        hits[precision] = first_hits(ranking, positives_within(data.utm_query, data.utm_index, data.threshold))
        descriptors[precision] = np.concatenate([q, d])
        recall = [100 * float((hits[precision] < k).mean()) for k in RECALL_VALUES]
        print(precision, "recall@", *RECALL_VALUES, ":", *(f"{r:.1f}" for r in recall), flush=True)
    cosine = (descriptors["float32"] * descriptors["bf16"]).sum(1)
    print(f"{len(cosine)} descriptors: mean cosine {cosine.mean():.5f}, lowest {cosine.min():.5f}")
    for k in RECALL_VALUES:
        differ = int(((hits["float32"] < k) != (hits["bf16"] < k)).sum())
        print(f"recall@{k}: {differ} of {len(hits['bf16'])} queries differ")


if __name__ == "__main__":
    main()
