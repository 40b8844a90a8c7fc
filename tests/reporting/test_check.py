"""The hand-in check: all ticks on a complete folder, every planted fault named, what is packed."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import NetVLADModel
from reporting import check, handin, report

ROOT = Path(__file__).parents[2]
NOT_PACKED = ("reporting/__pycache__/check.pyc", "checkpoints/last.pth", ".cache/a.pt", "dataset/sample/a.png")
QUERIES = [
    ("dataset/camera/P001/images/000003.png", "dataset/camera/P001/images/000004.png", 0.0123, 0.1),
    ("dataset/camera/P002/images/방 é.png", "dataset/camera/P002/images/000001.png", None, None),
]
POSE_TEXT = """Top-1 retrieval pose evaluation
(queries=2, index=7)

Query: dataset/camera/P001/images/000003.png
Best Match: dataset/camera/P001/images/000004.png
Embed Dist: 0.5126
Translation Error: 0.0123 m, Rotation Error: 0.10 deg

Query: dataset/camera/P002/images/방 é.png
Best Match: dataset/camera/P002/images/000001.png
Embed Dist: 1.0000
Translation Error: nan m, Rotation Error: nan deg

"""


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
    (output / "result_pose_eval.txt").write_text(POSE_TEXT, encoding="utf-8", newline="\n")
    (output / "estimated_poses.tsv").write_text("path\n")
    (output / "report").mkdir()
    for name in ("task3_result.png", "report/errors.png"):
        Image.new("RGB", (640, 480), "teal").save(output / name)
    data = {"name": "sample", "root": "dataset/sample", "is_sample": True}
    handin.update_metrics(output, "base", {"data": data}, sha256)
    answers = [{"path": q, "best_match": m, "error_m": e, "error_deg": d} for q, m, e, d in QUERIES]
    section = {
        "data": data, "scenes": check.ASSIGNED_SCENES, "per_query": answers,
        "pictures": [{"file": "errors.png", "caption": "Errors."}],
    }  # fmt: skip
    handin.update_metrics(output, "test", section, sha256)
    report.write_report(output)
    handin.copy_code(ROOT, output)
    for name in NOT_PACKED:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    return output


def lines_of(text: str) -> dict[str, str]:
    """Sign of each line of the printed table, and the line, by its subject."""
    rows = [line for line in text.splitlines() if line[:2] in ("✓ ", "✗ ", "! ")]
    return {row[2:].split("  ")[0]: row for row in rows}


def test_complete_hand_in_gets_all_ticks_but_for_the_sample_and_is_packed(complete, tmp_path, capsys):
    archive = tmp_path / "pa1.zip"
    assert check.main([str(complete), "--allow-sample", "--zip", str(archive)]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert {row[0] for subject, row in lines.items() if subject != "data"} == {"✓"}
    assert len(lines) == 10 and lines["data"].startswith("! ")
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert packed.read("pa1/base.py") == (ROOT / "base.py").read_bytes()
    there = {p.relative_to(complete).as_posix() for p in complete.rglob("*") if p.is_file()}
    assert sorted(names) == sorted(f"pa1/{name}" for name in there - set(NOT_PACKED))


def test_five_planted_faults_and_the_sample_are_named_and_nothing_is_packed(complete, tmp_path, capsys):
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
    crosses = {subject: row for subject, row in lines_of(said).items() if row[0] == "✗"}
    assert set(crosses) == {
        "result_pose_eval.txt", "pictures", "copies of the code", "scripts", "results of test.py",
        "report", "data",
    }  # fmt: skip
    assert "line 6 is 'Embed Dist: 0.51'" in crosses["result_pose_eval.txt"]
    assert "task3_result.png, report/errors.png" in crosses["pictures"]
    assert "train.py" in crosses["copies of the code"] and "train.py: SyntaxError" in crosses["scripts"]
    assert "another checkpoint" in crosses["results of test.py"]
    assert "errors.png, which is missing" in crosses["report"]
    assert "base.py and test.py used the built-in sample" in crosses["data"]
    assert "7 checks fail" in said and not archive.exists()


def test_a_folder_with_nothing_in_it_fails_and_none_at_all_is_bad_input(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 1
    crosses = [row for row in lines_of(capsys.readouterr().out).values() if row[0] == "✗"]
    assert len(crosses) == 10 and "netvlad_final.pth (base.py writes it)" in crosses[0]
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_state_dict_of_other_clusters_does_not_load(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(checkpoint, tmp_path / handin.CHECKPOINT)
    finding = check._checkpoint(tmp_path)
    assert finding.holds is False and "netvlad" in finding.detail


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("Top-1 retrieval", "Top-1  retrieval", "line 1"),
        ("queries=2", "queries=3", "announces 3 queries and holds 2"),
        ("index=7)\n", "index=7)", "line 3"),
        ("Query: ", "Query:", "line 4"),
        ("0.0123 m", "0.012 m", "line 7"),
        ("0.10 deg", "0.1 deg", "line 7"),
        ("nan deg\n\n", "nan deg\n", "in the middle"),
        ("nan deg\n\n", "nan deg\n\n\n", "line 14"),
        ("nan deg\n\n", "nan deg", "last line"),
        ("\n", "\r\n", "line 1"),
    ],
)
def test_what_is_not_to_the_letter_is_named(old, new, named):
    assert check.parse_pose_text(POSE_TEXT) == [
        (QUERIES[0][0], "0.0123", "0.10"), (QUERIES[1][0], "nan", "nan")]  # fmt: skip
    with pytest.raises(ValueError, match=named):
        check.parse_pose_text(POSE_TEXT.replace(old, new))
