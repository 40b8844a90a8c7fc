"""Writing whole files, stale sections, copies of the code, what is missing."""

import json
from pathlib import Path

import pytest

from reporting import handin

ROOT = Path(__file__).parents[2]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    handin.write_whole(file, lambda path: path.write_text("old"))

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(ValueError, match=r"a\.txt"):
        handin.write_whole(file, fails)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_sections_of_another_checkpoint_are_stale_until_it_is_theirs_again(tmp_path):
    handin.update_metrics(tmp_path, "base", {"x": float("nan")}, "one")
    metrics = handin.update_metrics(tmp_path, "test", {}, "two")
    assert metrics["base"]["stale"] is True and "stale" not in metrics["test"]
    assert json.loads((tmp_path / "metrics.json").read_text())["base"]["x"] is None
    metrics = handin.update_metrics(tmp_path, "test", {}, "one")
    assert "stale" not in metrics["base"] and "stale" not in metrics["test"]


def test_broken_metrics_are_begun_anew_with_a_word(tmp_path):
    (tmp_path / "metrics.json").write_text("[1, 2")
    metrics = handin.update_metrics(tmp_path, "base", {}, "one")
    assert "begun anew" in metrics["warnings"][0] and "base" in metrics


def test_copies_are_those_of_the_project_and_old_ones_go(tmp_path):
    stale = tmp_path / "localization" / "removed.py"
    stale.parent.mkdir()
    stale.touch()
    handin.copy_code(ROOT, tmp_path)
    for name in ("base.py", "test.py", "localization/cameras.py", "dataset/sample.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not stale.exists()
    handin.copy_code(tmp_path, tmp_path)  # run from inside: nothing is copied onto itself
    assert (tmp_path / "base.py").read_bytes() == (ROOT / "base.py").read_bytes()


def test_missing_names_every_file_and_the_script_that_writes_it(tmp_path):
    lacks = "\n".join(handin.missing(tmp_path))
    for name in ("netvlad_final.pth: base.py", "result_pose_eval.txt: test.py", "model.py"):
        assert name in lacks
