"""A miniature of Pittsburgh 30k: panoramas cut into views at one position, queries of another day."""

from pathlib import Path

import numpy as np
from PIL import Image

PLACES = {"train": 6, "val": 3, "test": 3}  # two index panoramas and one query panorama each
YAWS, PITCHES, TURN_PX, VIEW_PX = 3, 2, 32, (48, 36)  # 3 x 32 pixels: once round; views overlap
PLACE_M, STEP_M, THRESHOLD_M = 300.0, 9.0, 25.0
FAR_M = 15.0  # the query of the first training place: no index image within 10 m


def write_pittsburgh(root: Path, seed: int = 0) -> Path:
    """Write lists, gt/ and 216 images of 48 x 36 pixels in the assignment's layout; -> root.

    Each place is a random panorama; what lies STEP_M further on is seen a little shifted. A
    query's day has another brightness, tint and noise.
    """
    rng = np.random.default_rng(seed)
    for folder in ("query", "index", "gt"):
        (root / folder).mkdir(parents=True)
    for number, (split, places) in enumerate(PLACES.items()):
        lists, utm = {"query": [], "index": []}, {"query": [], "index": []}
        for place in range(places):
            panorama = _panorama(rng)
            away = FAR_M if (split, place) == ("train", 0) else rng.uniform(1, 4)
            for kind, steps_m in (("index", (0.0, STEP_M)), ("query", (-away,))):
                for x in steps_m:
                    shift = round(x / STEP_M * 4)
                    corner = np.array([585000 + PLACE_M * place, 4477000 + 5000 * number])
                    for view, picture in enumerate(_views(rng, panorama, shift, kind == "query")):
                        name = f"{kind}/{split}_{place}_{round(x)}_{view}.png"
                        picture.save(root / name)
                        lists[kind].append(f"dataset/{name}\n")
                        utm[kind].append(corner + [x, 0.0])
        for kind, lines in lists.items():
            (root / f"{kind}_{split}.txt").write_text("".join(lines))
        truth = root / "gt" / f"pitts30k_{split}.npz"
        np.savez(truth, utmQ=utm["query"], utmDb=utm["index"], posDistThr=THRESHOLD_M)
    return root


def _panorama(rng: np.random.Generator) -> np.ndarray:
    """(rows, YAWS * TURN_PX, 3) in 0..1: coarse blocks of color with fine noise."""
    coarse = rng.uniform(0.2, 0.8, (8, YAWS * TURN_PX // 8, 3)).repeat(8, 0).repeat(8, 1)
    return coarse + 0.1 * rng.standard_normal(coarse.shape)


def _views(rng: np.random.Generator, panorama: np.ndarray, shift: int, other_day: bool):
    """The views at one position, YAWS directions x PITCHES, as pictures."""
    width, height = VIEW_PX
    light = rng.uniform(0.4, 1.3, 3) if other_day else np.ones(3)
    noise = 0.2 if other_day else 0.01
    for yaw in range(YAWS):
        for pitch in range(PITCHES):
            columns = (shift + yaw * TURN_PX + np.arange(width)) % panorama.shape[1]
            view = panorama[12 * pitch : 12 * pitch + height, columns] * light
            view = view + noise * rng.standard_normal(view.shape)
            yield Image.fromarray((np.clip(view, 0, 1) * 255).astype(np.uint8))
