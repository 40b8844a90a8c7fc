"""The hand-in check: all ticks on a complete folder, every planted fault named, what is packed."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from localization.frames import ASSIGNED_SCENES
from model import NetVLADModel
from reporting import check, handin, pose_file, report

ROOT = Path(__file__).parents[2]
NOT_PACKED = (
    "reporting/__pycache__/check.pyc",
    "checkpoints/last.pth",
    ".cache/a.pt",
    "dataset/sample/a.png",
)
QUERIES = [
    ("dataset/camera/P001/images/000003.png", "dataset/camera/P001/images/000004.png", 0.0123, 0.1),
    ("dataset/camera/P002/images/방 é.png", "dataset/camera/P002/images/000001.png", None, None),
]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A hand-in that lacks nothing but the course's data."""
    output = tmp_path_factory.mktemp("handed") / "out"
    checkpoint = output / handin.CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(NetVLADModel(16, pretrained=False).state_dict(), checkpoint)
    sha256 = handin.file_sha256(checkpoint)
    (output / handin.DESCRIPTION).write_text(f'{{"sha256": "{sha256}"}}')
    (output / "estimated_poses.tsv").write_text("path\n")
    (output / "report").mkdir()
    for name in ("task3_result.png", "report/errors.png"):
        Image.new("RGB", (640, 480), "teal").save(output / name)
    data = {"name": "sample", "root": "dataset/sample", "is_sample": True}
    handin.update_metrics(output, "base", {"data": data}, sha256)
    answers = [
        {"path": q, "best_match": m, "embed_dist": 0.51264, "error_m": e, "error_deg": d}
        for q, m, e, d in QUERIES
    ]
    handin.write_text(output / "result_pose_eval.txt", pose_file.pose_text(answers, 7))
    section = {
        "data": data,
        "scenes": ASSIGNED_SCENES,
        "index": 7,
        "per_query": answers,
        "pictures": [{"file": "errors.png", "caption": "Errors."}],
        "views": [{"file": "scene_P001.html", "caption": "P001"}],
    }
    (output / "report/scene_P001.html").write_text("<script>1</script>")
    handin.update_metrics(output, "test", section, sha256)
    report.write_report(output)
    handin.copy_code(ROOT, output)
    for name in NOT_PACKED:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    return output


def lines_of(text: str, word: str) -> dict[str, str]:
    """The lines of the printed table that begin with a word, by their subject."""
    rows = [line for line in text.splitlines() if line.startswith(word.ljust(6))]
    return {row[6:].split("  ")[0]: row for row in rows}


def test_complete_hand_in_gets_all_ticks_but_for_the_sample_and_is_packed(
    complete, tmp_path, capsys
):
    archive = tmp_path / "pa1.zip"
    assert check.main([str(complete), "--allow-sample", "--zip", str(archive)]) == 0
    said = capsys.readouterr().out
    assert len(lines_of(said, "ok")) == 10 and not lines_of(said, "FAILS")
    assert set(lines_of(said, "note")) == {"data"}
    assert check.missing(complete) == [
        "data: base.py and test.py used the built-in sample, not the course's data"
    ]
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert packed.read("pa1/base.py") == (ROOT / "base.py").read_bytes()
    there = {p.relative_to(complete).as_posix() for p in complete.rglob("*") if p.is_file()}
    assert sorted(names) == sorted(f"pa1/{name}" for name in there - set(NOT_PACKED))


def test_five_planted_faults_and_the_sample_are_named_and_nothing_is_packed(
    complete, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(handin, "SCRIPTS", ("train.py",))  # the others start in the test before
    output, archive = tmp_path / "out", tmp_path / "pa1.zip"
    shutil.copytree(complete, output)
    text = (output / "result_pose_eval.txt").read_text(encoding="utf-8")
    (output / "result_pose_eval.txt").write_text(text.replace("0.5126", "0.51"), encoding="utf-8")
    picture = (output / "task3_result.png").read_bytes()
    (output / "task3_result.png").write_bytes(picture[: len(picture) // 2])
    with (output / "train.py").open("a") as script:
        script.write("def (\n")
    metrics = (output / "metrics.json").read_text(encoding="utf-8")
    sha256 = handin.file_sha256(output / handin.CHECKPOINT)
    before, after = metrics.rsplit(sha256, 1)
    (output / "metrics.json").write_text(before + "0" * 64 + after, encoding="utf-8")
    (output / "report/errors.png").unlink()
    assert check.main([str(output), "--zip", str(archive)]) == 1
    said = capsys.readouterr().out
    crosses = lines_of(said, "FAILS")
    assert set(crosses) == {
        "result_pose_eval.txt", "pictures", "copies of the code", "scripts", "results of test.py",
        "report", "data",
    }  # fmt: skip
    assert "line 6 is 'Embed Dist: 0.51'" in crosses["result_pose_eval.txt"]
    assert "task3_result.png, report/errors.png" in crosses["pictures"]
    assert (
        "train.py" in crosses["copies of the code"]
        and "train.py: SyntaxError" in crosses["scripts"]
    )
    assert "another checkpoint" in crosses["results of test.py"]
    assert "errors.png, which is missing" in crosses["report"]
    assert "base.py and test.py used the built-in sample" in crosses["data"]
    assert "checks that fail: 7" in said and not archive.exists()


def test_a_folder_with_nothing_in_it_fails_and_none_at_all_is_bad_input(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 1
    crosses = lines_of(capsys.readouterr().out, "FAILS")
    assert len(crosses) == 10 and "netvlad_final.pth (base.py)" in crosses["result files"]
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_state_dict_of_other_clusters_does_not_load(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(checkpoint, tmp_path / handin.CHECKPOINT)
    finding = check._checkpoint(tmp_path)
    assert finding.holds is False and "netvlad" in finding.detail


def test_a_checkpoint_that_lies_on_a_gpu_is_named(complete, tmp_path, monkeypatch):
    """Saved as on a computer with a GPU: the file says where its tensors lay."""
    output = tmp_path / "out"
    shutil.copytree(complete, output)
    state = torch.load(output / handin.CHECKPOINT, weights_only=True)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(state, output / handin.CHECKPOINT)
    monkeypatch.undo()
    finding = check._checkpoint(output)
    assert finding.holds is False and "cuda:0" in finding.detail


def test_a_checkpoint_with_a_nan_is_named(complete, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(complete, output)
    state = torch.load(output / handin.CHECKPOINT, weights_only=True)
    state["netvlad.centers"][0, 0] = float("nan")
    torch.save(state, output / handin.CHECKPOINT)
    finding = check._checkpoint(output)
    assert finding.holds is False and "norm nan" in finding.detail


def test_what_is_missing_names_every_file_and_its_script_and_stale_results(complete, tmp_path):
    lacks = "\n".join(check.missing(tmp_path))
    for name in ("netvlad_final.pth (base.py)", "result_pose_eval.txt (test.py)"):
        assert name in lacks
    output = tmp_path / "out"
    shutil.copytree(complete, output)
    (output / handin.CHECKPOINT).write_bytes(b"another")
    lacks = check.missing(output)
    assert "results of test.py: of another checkpoint: run test.py again" in lacks
    (output / handin.CHECKPOINT).unlink()  # test.py alone, with a checkpoint elsewhere
    assert not any("another checkpoint" in line for line in check.missing(output))
    (output / "metrics.json").write_text("{")
    assert any("metrics.json cannot be read" in line for line in check.missing(output))


def test_a_pose_file_of_other_results_and_a_page_without_its_pictures(complete, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(complete, output)
    file = output / "result_pose_eval.txt"
    file.write_bytes(file.read_bytes().replace(b"0.0123", b"0.0124"))
    assert (
        "not of the results in metrics.json"
        in check._pose_file(output, handin.read_metrics(output)["test"]).detail
    )
    page = output / "report/report.html"
    page.write_text(page.read_text(encoding="utf-8").replace("<figure>", "", 1), encoding="utf-8")
    sha256 = handin.file_sha256(output / handin.CHECKPOINT)
    assert "does not hold the pictures" in check._report(output, sha256).detail


def test_a_scene_to_turn_that_is_lost_large_or_asks_for_more_is_named(tmp_path):
    output = tmp_path / "out"
    (output / "report").mkdir(parents=True)
    file = output / "report/scene_P001.html"
    metrics = {"test": {"views": [{"file": file.name}]}}
    assert "is missing: run test.py" in check._views(output, metrics).detail
    file.write_text('<script src="three.js"></script>')
    assert "asks for other files" in check._views(output, metrics).detail
    file.write_bytes(b" " * 2_000_001)
    assert "2000001 bytes" in check._views(output, metrics).detail
    file.write_bytes(b" ")
    assert check._views(output, metrics).holds and check._views(output, {}).holds
