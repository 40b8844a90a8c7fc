"""What is printed when: quiet, not to a terminal, to a console that knows only ASCII."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import base
import test as task4
from model import progress, warn
from reporting.screen import always_printed, on_screen, phase

ROOT = Path(__file__).parents[2]


def work() -> dict[str, float]:
    """What a script does, in small."""
    seconds: dict[str, float] = {}
    with phase("counting", seconds):
        for _ in progress(range(3), desc="bar"):
            print("a remark")
    warn("a warning of this test")
    with always_printed():
        print("the result")
    print("a last word")
    return seconds


def test_quiet_leaves_results_and_warnings(capsys):
    with on_screen(quiet=True):
        assert work()["counting"] >= 0
    print("afterwards")
    said = capsys.readouterr()
    assert said.out == "the result\nafterwards\n"
    assert said.err.strip() == "WARNING: a warning of this test"


def test_no_bars_where_stderr_is_no_terminal_and_bars_again_afterwards(capsys):
    with on_screen():
        work()
    said = capsys.readouterr()
    assert said.out.split("\n") == [
        "- counting ...",
        *3 * ["a remark"],
        "the result",
        "a last word",
        "",
    ]
    assert "bar" not in said.err


def test_bars_go_to_a_terminal_unless_quiet(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for quiet in (False, True):
        with on_screen(quiet):
            list(progress(range(3), desc="bar"))
        assert ("bar" in capsys.readouterr().err) != quiet


def test_letters_that_the_console_lacks_stop_nothing():
    code = (
        "from reporting.screen import on_screen\nwith on_screen(): print('\\ubc29/\\xe9 \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == rb"\ubc29/\xe9 \udcff"


def test_the_scripts_take_quiet(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script in (base, task4):
        assert script.main(["--quiet", "--output", "LICENSE"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"{Path(script.__file__).name}: cannot write")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_goes_on_where_nobody_reads_what_it_prints(quiet, tmp_path):
    code = (
        "from pathlib import Path\nfrom reporting.screen import always_printed, on_screen, phase\n"
        f"with on_screen({quiet}):\n"
        "    for i in range(3):\n"
        "        with phase('x', {}): print('y' * 9999)\n"
        "    with always_printed(): print('z' * 9999)\n"
        f"    Path({str(tmp_path / 'done')!r}).touch()"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "done").exists()


def test_nothing_is_needed_to_print_to(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with on_screen():
        assert work()["counting"] >= 0


def test_quiet_takes_names_that_are_no_text():
    with on_screen(quiet=True):
        print(os.fsdecode(b"caf\xe9"))
