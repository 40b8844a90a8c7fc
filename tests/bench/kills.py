"""Ten kills at random times: does `base.py --resume` still end with the weights of an unbroken run?

    python tests/bench/kills.py --dataset DIR --weights none --limit 40 --epochs 3

The arguments are those of base.py. A run that ends before its next kill is compared, then begun anew.
Run by hand: it takes some ten times as long as the run itself.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from reporting.handin import CHECKPOINT
from training.resume import LAST

KILLS = 10


def start(*words: object) -> subprocess.Popen:
    """base.py with these arguments."""
    return subprocess.Popen(
        [sys.executable, "base.py", "--quiet", *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def resumed(output: Path, given: list[str]) -> list[object]:
    """The arguments that go on in a folder, or begin there if nothing has been saved."""
    words = ["--resume"] if (output / LAST).is_file() else given
    return [*words, "--output", output]


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    a, b = (torch.load(path / CHECKPOINT, weights_only=True) for path in (first, second))
    return all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        began = time.monotonic()
        if start(*given, "--output", whole).wait():
            sys.exit("the unbroken run failed")
        seconds = time.monotonic() - began
        print(f"unbroken: {seconds:.0f} s", flush=True)
        draw = random.Random(0)
        kills = 0
        while kills < KILLS or (broken / LAST).is_file():
            process = start(*resumed(broken, given))
            lived = draw.uniform(0, seconds) if kills < KILLS else None
            try:
                if process.wait(lived):
                    sys.exit("a run failed")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                state = torch.load(broken / LAST, weights_only=True) if (broken / LAST).is_file() else {}
                at = state.get("training") or {"epoch": 0, "step": 0}
                where = f"epoch {at['epoch']}, step {at['step']} saved"
                print(f"kill {kills} after {lived:.0f} s: {where}", flush=True)
                continue
            same = same_weights(whole, broken)
            print(f"ended: {'the same weights' if same else 'OTHER WEIGHTS'}", flush=True)
            shutil.rmtree(broken)


if __name__ == "__main__":
    main()
