"""What every file promises to the machines it may meet: Python's versions, no processes, no float64."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANDED_IN = ("model.py", "train.py", "eval.py")
ROOMS = ("", "dataset", "dataset/sample", "localization", "recognition", "reporting", "training")
CODE = [file.relative_to(ROOT).as_posix() for room in ROOMS for file in (ROOT / room).glob("*.py")]


def lowest_python(names: list[str], target: str) -> subprocess.CompletedProcess:
    program = "import sys; from vermin.main import main; sys.argv[0] = 'vermin'; main()"
    options = ["--no-tips", f"-t={target}", "--violations"]
    command = [sys.executable, "-c", program, *options, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_handed_in_files_run_on_python_3_8():
    found = lowest_python(list(HANDED_IN), "3.8-")
    assert found.returncode == 0, found.stdout
    for name in HANDED_IN:  # annotations such as `Path | None` are evaluated without this
        first = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8)).body[1]
        assert isinstance(first, ast.ImportFrom) and first.module == "__future__", name


def test_everything_else_runs_on_python_3_10():
    found = lowest_python(CODE, "3.10-")
    assert found.returncode == 0, found.stdout


def test_the_check_of_versions_fails_for_what_came_later(tmp_path):
    late = tmp_path / "late.py"
    late.write_text("import hashlib\nhashlib.file_digest(open('x', 'rb'), 'sha256')\n")
    assert lowest_python([str(late)], "3.10-").returncode != 0


@pytest.mark.parametrize("name", CODE)
def test_no_file_starts_worker_processes_of_a_data_loader(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "DataLoader(" not in text and "num_workers" not in text


def test_task_4_starts_without_torchvision_which_takes_a_second():
    program = (
        "import sys, torch, test\n"
        "from model import NetVLADModel\n"
        "with torch.inference_mode():\n"
        "    NetVLADModel(pretrained=False)(torch.rand(1, 3, 32, 32))\n"
        "sys.exit(str([name for name in ('torchvision', 'sympy', 'torch._dynamo') if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "[]"
