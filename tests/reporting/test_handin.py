"""Whose folder it is, writing whole files, stale sections, copies of the code."""

import errno
import hashlib
import io
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from model import WARNINGS, InputError
from reporting import handin

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_warnings_before():
    WARNINGS.clear()
    yield
    WARNINGS.clear()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {"train.py": "mine"},
        {"training/my_loop.py": "mine"},
        {"README.md": "# My thesis"},
        {"metrics.json": '{"accuracy": 0.9, "base": 3}'},
        {"metrics.json": "[1, 2"},
        {"a.txt": "", ".git/config": ""},
    ],
)
def test_a_folder_with_foreign_files_is_refused_untouched(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = everything_in(tmp_path)
    with pytest.raises(InputError, match="did not write .*--output"):
        handin.check_output(tmp_path)
    assert everything_in(tmp_path) == before


def test_a_folder_in_the_checkpoint_s_place_is_refused_before_the_run(tmp_path):
    handin.claim_output(tmp_path)
    (tmp_path / handin.CHECKPOINT).mkdir(parents=True)
    with pytest.raises(InputError, match=r"netvlad_final\.pth is a folder"):
        handin.check_output(tmp_path)


@pytest.mark.parametrize("hidden", [(), (".DS_Store",), ("Thumbs.db", "desktop.ini")])
def test_a_new_or_empty_folder_is_claimed_and_stays_ours(tmp_path, hidden):
    for name in hidden:
        (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        handin.check_output(folder)
        assert not [file for file in folder.iterdir() if file.name not in hidden and file.is_file()]
        handin.claim_output(folder)
        (folder / "left_by_a_stopped_run.npy").touch()
        handin.check_output(folder)


def test_a_folder_with_our_metrics_or_an_unfinished_run_is_ours_its_readme_stays(tmp_path):
    handin.update_metrics(tmp_path / "a", "test", {}, "one")
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    (tmp_path / "b/checkpoints/last.pth").touch()
    for name in ("a", "b"):
        (tmp_path / name / "README.md").write_text("# Mine")
        handin.check_output(tmp_path / name)
        handin.claim_output(tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == "# Mine"


def test_the_folder_of_the_project_is_ours_and_its_readme_the_one_written(tmp_path):
    assert (ROOT / "output/README.md").read_text(encoding="utf-8") == handin.README
    (tmp_path / "README.md").write_text(handin.README)
    handin.check_output(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot write .*file"):
            handin.check_output(folder)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    handin.write_whole(file, lambda path: path.write_text("old"))

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(InputError, match=r"a\.txt: disk full"):
        handin.write_whole(file, fails)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_threads_that_write_one_file_do_not_meet(tmp_path):
    file, both_write = tmp_path / "a.txt", threading.Barrier(2, timeout=10)
    failed = []

    def write(text: str) -> None:
        def fill(path: Path) -> None:
            path.write_text(text)
            both_write.wait()  # each has its temporary file open now
            assert path.read_text() == text

        try:
            handin.write_whole(file, fill)
        except (InputError, AssertionError, threading.BrokenBarrierError) as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and file.read_text() in ("one", "two")
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def open_elsewhere(monkeypatch) -> list[int]:
    """As on Windows while another program has the file open: the first tries to replace it fail.
    The list holds how many; no waiting between them."""
    failures, replace = [0], os.replace

    def refuses(source, target):
        if failures[0] > 0:
            failures[0] -= 1
            raise PermissionError(13, "Permission denied")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    monkeypatch.setattr(handin.time, "sleep", lambda seconds: None)
    return failures


def test_a_file_that_is_open_elsewhere_is_tried_again(tmp_path, open_elsewhere):
    open_elsewhere[0] = 3
    handin.write_whole(tmp_path / "a.txt", lambda path: path.write_text("new"))
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_log_or_checkpoint_that_stays_open_elsewhere_is_a_warning(
    tmp_path, open_elsewhere, capsys
):
    log = tmp_path / "train_log.csv"
    log.write_text("old")
    open_elsewhere[0] = 99
    with pytest.raises(InputError, match="close what has it open"):
        handin.write_whole(log, lambda path: path.write_text("new"))
    handin.write_log(tmp_path, [{"epoch": 1, "train_loss": 0.5}])
    handin.write_or_warn(tmp_path / "last.pth", handin.tensors({"a": torch.ones(2)}))
    assert log.read_text() == "old" and list(tmp_path.iterdir()) == [log]
    said = capsys.readouterr().err
    assert said.count("WARNING") == 2 and "train_log.csv" in said and "last.pth" in said
    open_elsewhere[0] = 0
    handin.write_log(tmp_path, [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}])
    assert log.read_text() == "epoch,train_loss\n1,0.5\n2,0.25\n"


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_an_input_error_for_tensors_too(room, tmp_path, monkeypatch):
    class Full(io.RawIOBase):
        """What a file does on a disk with so much room; PyTorch's writer meets it as any file's."""

        left = room

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left >= 0:
                return len(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, _file: save(state, Full()))
    with pytest.raises(InputError, match=r"last\.pth: No space left"):
        handin.write_whole(tmp_path / "last.pth", handin.tensors({"a": torch.rand(100_000)}))
    assert not list(tmp_path.iterdir())


def test_a_failing_picture_costs_that_picture_and_shows_its_traceback(capsys):
    assert handin.draw_or_warn("report/a.png", lambda: 3) == 3
    assert handin.draw_or_warn("report/b.png", lambda: 1 / 0) is None
    said = capsys.readouterr().err
    assert "Traceback" in said and "WARNING: report/b.png" in said and "division by zero" in said
    assert "report/b.png" in WARNINGS[0]

    def full() -> None:
        raise InputError("cannot write c.png: No space left")

    assert handin.draw_or_warn("report/c.png", full) is None
    assert "Traceback" not in capsys.readouterr().err


def test_hash_of_a_file_longer_than_a_chunk(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert handin.file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_sections_of_another_checkpoint_are_stale_until_it_is_theirs_again(tmp_path):
    handin.update_metrics(tmp_path, "base", {"x": float("nan")}, "one")
    metrics = handin.update_metrics(tmp_path, "test", {}, "two")
    assert metrics["base"]["stale"] is True and "stale" not in metrics["test"]
    assert json.loads((tmp_path / "metrics.json").read_text())["base"]["x"] is None
    metrics = handin.update_metrics(tmp_path, "test", {}, "one")
    assert "stale" not in metrics["base"] and "stale" not in metrics["test"]


@pytest.mark.parametrize("broken", ["[1, 2", '{"test": "x"}', '{"base": [1]}'])
def test_broken_metrics_are_begun_anew_with_a_word(broken, tmp_path):
    (tmp_path / "metrics.json").write_text(broken)
    metrics = handin.update_metrics(tmp_path, "base", {}, "one")
    assert "begun anew" in metrics["warnings"][0] and "base" in metrics


@pytest.fixture
def project(tmp_path) -> Path:
    """A small project: two scripts, a room, a font, and files that are no code of ours."""
    for name in ("base.py", "train.py", "training/loop.py", "training/old.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(f"{name} as of now")
    for name in ("dataset/query/mine.py", "dataset/notes.txt", "thesis.py", "training/.hidden.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).touch()
    return tmp_path / "project"


def test_the_code_is_copied_and_follows_the_project(project, tmp_path):
    output = tmp_path / "out"
    handin.copy_code(project, output)
    names = {"base.py", "train.py", "training/loop.py", "training/old.py"}
    assert everything_in(output).keys() == names | {"metrics.json"}
    (project / "base.py").write_text("newer")
    (project / "training/old.py").unlink()
    handin.copy_code(project, output)
    assert (output / "base.py").read_text() == "newer"
    assert not (output / "training/old.py").exists() and not WARNINGS
    handin.copy_code(output, output)  # run from inside: nothing is copied onto itself
    assert (output / "base.py").read_text() == "newer"


def test_what_the_program_did_not_write_is_neither_replaced_nor_removed(project, tmp_path):
    output = tmp_path / "out"
    handin.copy_code(project, output)
    (output / "train.py").write_text("edited by its user")
    (output / "training/old.py").write_text("edited too")
    (output / "training/mine.py").write_text("his own")
    (project / "train.py").write_text("newer")
    (project / "training/old.py").unlink()
    (project / "eval.py").write_text("new in the project")
    (output / "eval.py").write_text("of the same name")
    before = everything_in(output)
    handin.copy_code(project, output)
    after = everything_in(output)
    kept = ("train.py", "training/old.py", "training/mine.py", "eval.py")
    assert all(after[name] == before[name] for name in kept)
    assert "eval.py, train.py in" in WARNINGS[0] or "train.py, eval.py in" in WARNINGS[0]
    WARNINGS.clear()
    handin.copy_code(project, output)  # also in the run after
    assert all(everything_in(output)[name] == before[name] for name in kept) and WARNINGS


def test_the_copy_of_this_project_holds_what_its_pictures_and_report_need(tmp_path):
    names = handin.code_files(ROOT)
    assert {"test.py", "localization/cameras.py", "reporting/fonts/DejaVuSans.ttf"} <= set(names)
    assert {"reporting/method.md", "reporting/page.html", "reporting/fonts/LICENSE"} <= set(names)
