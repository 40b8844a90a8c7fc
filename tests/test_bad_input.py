"""Every bad input of the list: exit code 2, no traceback, one sentence that names the culprit.

Each case spoils one thing in a good tiny data set. Most run `main(argv)` in this process, one of
each script runs as a command.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.course_driver.tiny_data import write_places, write_scene

ROOT = Path(__file__).resolve().parent.parent
N_TRAIN, N_VAL = 4, 3
FRAMES_PER_SCENE = 4
BASE_OPTIONS = ["--epochs", "0", "--weights", "none", "--clusters", "4"]
NO_IMAGE = b"this is no image"

TRAIN_NPZ = "dataset/gt/pitts30k_train.npz"
VAL_NPZ = "dataset/gt/pitts30k_val.npz"
CAMERA = "dataset/camera"
CHECKPOINT = "netvlad.pth"


@dataclass
class Case:
    """One bad input: what is spoiled in the good workplace, and how the script is run there."""

    script: str
    spoil: Callable[[Path], object]  # gets the workplace, see the fixture
    named: list[str]  # patterns, each of which the sentence matches
    argv: list[str] = field(default_factory=list)  # after the good arguments, so these win
    default_data: bool = False  # run without --dataset or --camera
    as_command: bool = False


# ------------------------------------------------------------------ ways to spoil things


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_training_queries_short(work: Path) -> None:
    for image in (work / "dataset" / "query").glob("train_*.png"):
        cut_short(image)


def drop_key(path: Path, key: str) -> None:
    with np.load(path) as npz:
        arrays = dict(npz)
    del arrays[key]
    np.savez(path, **arrays)


def drop_last_row(path: Path, key: str) -> None:
    with np.load(path) as npz:
        arrays = dict(npz)
    np.savez(path, **(arrays | {key: arrays[key][:-1]}))


def add_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def change_line(path: Path, number: int, change: Callable[[list[str]], list[str]]) -> None:
    """Change the columns of line `number`, counted from 1."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = " ".join(change(lines[number - 1].split()))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def one_too_deep(folder: Path) -> None:
    """Move what `folder` holds into a folder of the same name inside it."""
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.mkdir()
    moved.rename(folder / folder.name)


def leave_only_camera(work: Path) -> None:
    for entry in (work / "dataset").iterdir():
        if entry.name != "camera":
            remove(entry)


def leave_one_frame(work: Path) -> None:
    remove(work / CAMERA)
    write_scene(work / CAMERA, "P001", 1, seed=5)


def lose_all_poses(work: Path) -> None:
    for pose_file in (work / CAMERA).glob("*/pose.txt"):
        pose_file.write_text("nan\n" * FRAMES_PER_SCENE, encoding="utf-8")


def query_frame(work: Path) -> Path:
    """The frame that the default seed makes the query."""
    frames = sorted((work / CAMERA).glob("*/images/*"))
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(42))[0]]


def cut_index_frames_short(work: Path) -> None:
    for frame in set((work / CAMERA).glob("*/images/*")) - {query_frame(work)}:
        cut_short(frame)


def keep_half_of_the_entries(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(dict(list(state.items())[: len(state) // 2]), path)


# ------------------------------------------------------------------ the cases


def in_base(spoil: Callable[[Path], object], *named: str, **more: object) -> Case:
    return Case("base", spoil, list(named), **more)


def in_test(spoil: Callable[[Path], object], *named: str, **more: object) -> Case:
    return Case("test", spoil, list(named), **more)


LISTS_AND_IMAGES = {
    "missing query list": in_base(
        lambda w: remove(w / "dataset/query_train.txt"), r"query_train\.txt"
    ),
    "missing index list": in_base(lambda w: remove(w / "dataset/index_val.txt"), r"index_val\.txt"),
    "missing dataset folder": in_base(
        lambda w: remove(w / "dataset"), "nowhere", argv=["--dataset", "nowhere"]
    ),
    "empty query list": in_base(
        lambda w: (w / "dataset/query_train.txt").write_text(""),
        r"query_train\.txt",
        "(?i)empty|no image|no line",
    ),
    "index list of blank lines": in_base(
        lambda w: (w / "dataset/index_val.txt").write_text("\n \n\n"),
        r"index_val\.txt",
        "(?i)empty|no image|no line",
    ),
    "missing query image": in_base(
        lambda w: remove(w / "dataset/query/train_003.png"), r"query/train_003\.png"
    ),
    "missing index image": in_base(
        lambda w: remove(w / "dataset/index/val_002.png"), r"index/val_002\.png"
    ),
    "query image that does not decode": in_base(
        lambda w: (w / "dataset/query/val_001.png").write_bytes(NO_IMAGE), r"query/val_001\.png"
    ),
    "index image cut short": in_base(
        lambda w: cut_short(w / "dataset/index/train_002.png"), r"index/train_002\.png"
    ),
    "index image of no bytes": in_base(
        lambda w: (w / "dataset/index/train_003.png").write_bytes(b""), r"index/train_003\.png"
    ),
    "training queries cut short": in_base(
        cut_training_queries_short, r"query/train_00\d\.png", argv=["--epochs", "1"]
    ),
}

NPZ = {
    "missing train npz": in_base(lambda w: remove(w / TRAIN_NPZ), r"pitts30k_train\.npz"),
    "missing val npz": in_base(lambda w: remove(w / VAL_NPZ), r"pitts30k_val\.npz"),
    "npz that is none": in_base(
        lambda w: (w / TRAIN_NPZ).write_bytes(b"no npz"), r"pitts30k_train\.npz"
    ),
    "npz cut short": in_base(lambda w: cut_short(w / VAL_NPZ), r"pitts30k_val\.npz"),
    "npz without utmQ": in_base(
        lambda w: drop_key(w / TRAIN_NPZ, "utmQ"), r"pitts30k_train\.npz", "utmQ"
    ),
    "npz without utmDb": in_base(
        lambda w: drop_key(w / VAL_NPZ, "utmDb"), r"pitts30k_val\.npz", "utmDb"
    ),
    "npz without posDistThr": in_base(
        lambda w: drop_key(w / TRAIN_NPZ, "posDistThr"), r"pitts30k_train\.npz", "posDistThr"
    ),
    "fewer query positions than lines": in_base(
        lambda w: drop_last_row(w / TRAIN_NPZ, "utmQ"),
        r"pitts30k_train\.npz",
        r"query_train\.txt",
        rf"\b{N_TRAIN - 1}\b",
        rf"\b{N_TRAIN}\b",
    ),
    "fewer index positions than lines": in_base(
        lambda w: drop_last_row(w / VAL_NPZ, "utmDb"),
        r"pitts30k_val\.npz",
        r"index_val\.txt",
        rf"\b{N_VAL - 1}\b",
        rf"\b{N_VAL}\b",
    ),
    "more lines than index positions": in_base(
        lambda w: add_line(w / "dataset/index_train.txt", "dataset/index/train_000.png"),
        r"pitts30k_train\.npz",
        r"index_train\.txt",
        rf"\b{N_TRAIN + 1}\b",
        rf"\b{N_TRAIN}\b",
    ),
}

WEIGHTS = {
    "missing weights": in_base(
        lambda w: None, r"vgg16_here\.pth", argv=["--weights", "vgg16_here.pth"]
    ),
    "weights that are none": in_base(
        lambda w: (w / "vgg16_here.pth").write_bytes(b"no weights"),
        r"vgg16_here\.pth",
        argv=["--weights", "vgg16_here.pth"],
    ),
}

# A plain file stands where the folder should be: nobody, root included, can write there.
OUTPUT = {
    f"{script} output {where}": Case(
        script,
        lambda w: (w / "occupied").write_text("not a folder"),
        ["occupied"],
        argv=["--output", output],
    )
    for script in ("base", "test")
    for where, output in (("is a file", "occupied"), ("is below a file", "occupied/output"))
}

SCENES = {
    "missing pose.txt": in_test(lambda w: remove(w / CAMERA / "P002/pose.txt"), r"P002/pose\.txt"),
    "pose line of six columns": in_test(
        lambda w: change_line(w / CAMERA / "P002/pose.txt", 3, lambda v: v[:6]),
        r"P002/pose\.txt",
        r"(?i)line 3\b|pose\.txt:3\b",
        r"\b6\b",
    ),
    "pose line of eight columns": in_test(
        lambda w: change_line(w / CAMERA / "P001/pose.txt", 2, lambda v: [*v, "0.5"]),
        r"P001/pose\.txt",
        r"(?i)line 2\b|pose\.txt:2\b",
        r"\b8\b",
    ),
    "zero quaternion": in_test(
        lambda w: change_line(w / CAMERA / "P001/pose.txt", 4, lambda v: [*v[:3], *"0000"]),
        r"P001/pose\.txt",
        r"(?i)line 4\b|pose\.txt:4\b",
        "(?i)quaternion",
    ),
    "pose line with a word": in_test(
        lambda w: change_line(w / CAMERA / "P001/pose.txt", 1, lambda v: ["tx", *v[1:]]),
        r"P001/pose\.txt",
        r"(?i)line 1\b|pose\.txt:1\b",
    ),
    "missing images folder": in_test(
        lambda w: remove(w / CAMERA / "P001/images"), "P001", argv=["--scenes", "P001", "P002"]
    ),
    "query that does not decode": in_test(
        lambda w: query_frame(w).write_bytes(NO_IMAGE), r"P00\d/images/00000\d_left\.png"
    ),
    "query cut short": in_test(
        lambda w: cut_short(query_frame(w)), r"P00\d/images/00000\d_left\.png"
    ),
    "no index frame that decodes": in_test(cut_index_frames_short, "no index image of P001 P002"),
    "intrinsics of other images": in_test(
        lambda w: (w / CAMERA / "P001/intrinsics.txt").write_text("99 99 90 3"),
        r"P001/intrinsics\.txt.*\b90 3\b.*96x72",
    ),
    "missing camera folder": in_test(lambda w: remove(w / CAMERA), CAMERA),
    "no scene in camera": in_test(
        lambda w: [remove(w / CAMERA / scene) for scene in ("P001", "P002")], CAMERA
    ),
    "scene that is not there": in_test(
        lambda w: None, "P009", "P001", "P002", argv=["--scenes", "P001", "P009"]
    ),
    "names too long": in_test(lambda w: None, "a{300}", argv=["--camera", "a" * 300]),
    "a scene's name too long": in_test(lambda w: None, "b{300}", argv=["--scenes", "b" * 300]),
    "a scene without name": in_test(lambda w: None, "empty scene", argv=["--scenes", ""]),
    "an export's name too long": in_test(
        lambda w: None, "c{300}", argv=["--export", "tum", "c" * 300]
    ),
    "an export without name": in_test(lambda w: None, "path is empty", argv=["--export", "tum", ""]),
    "a checkpoint's name too long": in_test(
        lambda w: None, "d{300}", argv=["--checkpoint", "d" * 300]
    ),
    "lists' name too long": in_base(lambda w: None, "f{300}", argv=["--dataset", "f" * 300]),
    "one frame in all": in_test(leave_one_frame, "(?i)index image"),
    "no pose left": in_test(lose_all_poses, "(?i)index image"),
}

CHECKPOINTS = {
    f"checkpoint: {how}": in_test(lambda w, spoil=spoil: spoil(w / CHECKPOINT), r"netvlad\.pth")
    for how, spoil in {
        "cut short": cut_short,
        "no bytes": lambda path: path.write_bytes(b""),
        "a text": lambda path: path.write_text("no checkpoint\n"),
        "another zip": lambda path: zipfile.ZipFile(path, "w").close(),
        "one tensor": lambda path: torch.save(torch.zeros(3), path),
        "a list": lambda path: torch.save([1, 2, 3], path),
        "a pickled object": lambda path: torch.save({"path": path}, path),
        "another network": lambda path: torch.save(torch.nn.Linear(3, 2).state_dict(), path),
        "half of the entries": keep_half_of_the_entries,
    }.items()
} | {"checkpoint: missing": in_test(lambda w: remove(w / CHECKPOINT), r"netvlad\.pth")}

# Only part of the assignment is where it should be: what is missing is named, and where it was
# found; no sample takes its place. Wholly too deep runs as a command, which has a time limit:
# were it not seen, the whole sample would be rendered.
PARTS = {
    "base: all too deep": in_base(
        lambda w: one_too_deep(w / "dataset"),
        r"dataset/query_train\.txt",
        "dataset/dataset",
        as_command=True,
    ),
    "base: gt too deep": in_base(
        lambda w: one_too_deep(w / "dataset/gt"), r"pitts30k_train\.npz|dataset/gt\b", "gt/gt"
    ),
    "base: queries too deep": in_base(
        lambda w: one_too_deep(w / "dataset/query"), r"query/train_000\.png", "query/query"
    ),
    "base: no gt": in_base(lambda w: remove(w / "dataset/gt"), r"pitts30k_train\.npz|dataset/gt\b"),
    "base: camera alone": in_base(leave_only_camera, r"query_train\.txt"),
    "test: all too deep": in_test(
        lambda w: one_too_deep(w / "dataset"), CAMERA, "dataset/dataset/camera", as_command=True
    ),
    "test: scenes too deep": in_test(
        lambda w: one_too_deep(w / CAMERA), CAMERA, f"{CAMERA}/camera"
    ),
    "test: no camera": in_test(lambda w: remove(w / CAMERA), r"dataset\b.*\bcamera\b"),
}
for part in PARTS.values():
    part.default_data = True

CASES = LISTS_AND_IMAGES | NPZ | WEIGHTS | OUTPUT | SCENES | CHECKPOINTS | PARTS


# ------------------------------------------------------------------ running one


def load_script(name: str) -> ModuleType:
    """A script of the root as a module; by path, since `test` is also a stdlib package."""
    spec = spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lacks nothing: dataset/ with camera/ in it, and a checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    write_places(folder / "dataset", N_TRAIN)
    for seed, scene in enumerate(("P001", "P002")):
        write_scene(folder / CAMERA, scene, FRAMES_PER_SCENE, seed)
    model = load_script("model").NetVLADModel(num_clusters=2, pretrained=False)
    torch.save(model.state_dict(), folder / CHECKPOINT)
    return folder


@pytest.fixture
def workplace(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good folder, made the current one."""
    work = tmp_path / "work"
    shutil.copytree(good, work)
    monkeypatch.chdir(work)
    return work


def arguments(case: Case) -> list[str]:
    """The command line, in the workplace."""
    if case.script == "base":
        data, options = ["--dataset", "dataset"], BASE_OPTIONS
    else:
        data, options = ["--camera", CAMERA], ["--checkpoint", CHECKPOINT, "--no-cache"]
    common = ["--output", "output", "--device", "cpu"]
    return [*([] if case.default_data else data), *options, *common, *case.argv]


def run_as_command(case: Case) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, str(ROOT / f"{case.script}.py"), *arguments(case)],
        check=False,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=90,
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    case.spoil(workplace)
    if case.as_command:
        code, stderr = run_as_command(case)
    else:
        code = load_script(case.script).main(arguments(case))
        stderr = capsys.readouterr().err
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    sentence = lines[-1]
    for pattern in case.named:
        assert re.search(pattern, sentence), f"{pattern} is not in: {sentence}"
    assert lines.count(sentence) == 1
    if case.script == "test":
        written = [path.name for path in (workplace / "output").rglob("*") if path.is_file()]
        assert set(written) <= {"README.md"}  # the claim on the folder
    if case.default_data:
        assert not (workplace / "dataset" / "sample").exists()
