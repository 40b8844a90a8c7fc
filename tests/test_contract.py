"""The contract with the assignment (CONTRACT.md), tested from its text alone.

Two drivers in tests/course_driver/ play the course's graders: model.py, train.py and eval.py are
copied beside them into an empty folder, with nothing else of the project, and run there without a
network. The rest calls base.py and test.py as the contract names them.
"""

import ast
import inspect
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from tests.course_driver.tiny_data import (
    POS_DIST_THR_M,
    pose_lines,
    texture,
    write_part,
    write_places,
    write_scene,
)

ROOT = Path(__file__).resolve().parent.parent
DRIVERS = ROOT / "tests" / "course_driver"
HANDED_IN = ("model.py", "train.py", "eval.py")
PACKAGES = {"numpy", "PIL", "tqdm", "torch", "torchvision"}
NO_NETWORK = "http://127.0.0.1:9"
N_DB, N_QUERIES = 12, 7
HITS_AT_1 = 4


def load_script(name: str) -> ModuleType:
    """A script of the root as a module; by path, since `test` is also a stdlib package."""
    spec = spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def environment_without_network(home: Path) -> dict[str, str]:
    """The environment of a child whose downloads fail at once and whose torch cache is empty."""
    dropped = {"PYTHONPATH", "no_proxy", "NO_PROXY"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    proxies = {f"{p}_proxy": NO_NETWORK for p in ("http", "https", "all")}
    proxies |= {key.upper(): value for key, value in proxies.items()}
    return kept | proxies | {"TORCH_HOME": str(home), "PYTHONIOENCODING": "utf-8"}


def run_command(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment_without_network(folder / "torch_home"),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


# ------------------------------------------------------------------ signatures and imports


SIGNATURES = [
    ("model", "NetVLADModel.__init__", "self, num_clusters=16, dim=512"),
    ("train", "train", "model, train_loader, val_loader, device, epochs=5, lr=1e-4"),
    ("train", "validate", "model, loader, device"),
    ("eval", "compute_embeddings", "model, dataset, device, batch_size=32"),
    (
        "eval",
        "evaluate_recall",
        "model, query_ds, db_ds, utmQ, utmDb, posDistThr, device, recall_values=[1, 5, 10]",
    ),
    (
        "base",
        "LoadDataset.__init__",
        "self, query_file, db_file, root_dir, gt_npz, transform=None",
    ),
    ("base", "ImageListDataset.__init__", "self, list_file, root_dir, transform=None"),
    ("base", "main", ""),
    ("test", "IndoorDataset.__init__", "self, base_dir, transform=None, scenes=None"),
    ("test", "pose_error", "pose_a, pose_b"),
]


@pytest.mark.parametrize(("script", "name", "text"), SIGNATURES)
def test_signature(script: str, name: str, text: str) -> None:
    """The contract's parameters come first, by these names and defaults; the rest is optional."""
    target = load_script(script)
    for part in name.split("."):
        target = getattr(target, part)
    found = list(inspect.signature(target).parameters.values())
    expected = list(inspect.signature(eval(f"lambda {text}: None")).parameters.values())
    assert [p.name for p in found[: len(expected)]] == [p.name for p in expected]
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, ours
        default = list(ours.default) if isinstance(theirs.default, list) else ours.default
        assert default == theirs.default, ours
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for extra in found[len(expected) :]:
        assert extra.default is not inspect.Parameter.empty or extra.kind in variadic, extra


def test_kinds() -> None:
    assert issubclass(load_script("model").NetVLADModel, torch.nn.Module)
    base = load_script("base")
    assert issubclass(base.LoadDataset, torch.utils.data.Dataset)
    assert issubclass(base.ImageListDataset, torch.utils.data.Dataset)
    assert issubclass(load_script("test").IndoorDataset, torch.utils.data.Dataset)


def imports_at_import_time(node: ast.AST) -> Iterator[str]:
    """Top names of all modules imported when the file itself is imported; "." if relative."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "__main__" in ast.dump(child.test):
            continue  # started as a program
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield "." if child.level else child.module.split(".")[0]
        else:
            yield from imports_at_import_time(child)


@pytest.mark.parametrize("name", HANDED_IN)
def test_handed_in_file_imports_only_its_siblings_and_the_packages(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    siblings = {Path(other).stem for other in HANDED_IN}
    standard = set(sys.stdlib_module_names) - {"test"}  # here `test` would be the script
    assert set(imports_at_import_time(tree)) <= siblings | PACKAGES | standard


# ------------------------------------------------------------------ the graders' base.py


def write_recall_part(data_dir: Path) -> None:
    """A val part whose recall@1 is known by hand.

    Every query is a pixel copy of one database image, so that one is its first answer:
    copy of  query lies at                          first answer is a positive
    db 0     5 m from db 0                          yes
    db 1     14 m from db 1                         yes
    db 2     300 m from db 2, nothing is nearer     yes: the nearest stands in
    db 3     5 m from db 7                          no
    db 4     400 m from db 8, nothing is nearer     no
    db 5     on db 5                                yes
    db 9     4 m from db 0; db 9 has the same easting as db 0, but lies 5 km north: no
    """
    utm_db_m = np.stack([1000.0 * np.arange(N_DB), np.zeros(N_DB)], axis=1)
    utm_db_m[9] = 0.0, 5000.0
    utm_query_m = np.array(
        [[3, 4], [1010, 10], [2300, 0], [7000, 5], [8400, 0], [5000, 0], [0, 4]], dtype=float
    )
    database = [texture(500 + i) for i in range(N_DB)]
    queries = [database[i] for i in (0, 1, 2, 3, 4, 5, 9)]
    offset_m = np.array([585_001.0, 4_476_999.0])  # where Pittsburgh lies in UTM zone 17
    write_part(data_dir, "val", queries, database, utm_query_m + offset_m, utm_db_m + offset_m)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the graders' base.py has run over our three files; nothing else of ours."""
    folder = tmp_path_factory.mktemp("graded")
    for name in HANDED_IN:
        shutil.copy(ROOT / name, folder)
    for name in ("base.py", "test.py"):
        shutil.copy(DRIVERS / name, folder)
    write_places(folder / "dataset", n_train=10)
    write_recall_part(folder / "dataset")
    run = run_command([sys.executable, "base.py"], folder)
    (folder / "stdout.txt").write_text(run.stdout, encoding="utf-8")
    (folder / "stderr.txt").write_text(run.stderr, encoding="utf-8")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def facts(graded: Path) -> dict:
    return json.loads((graded / "driver_facts.json").read_text())


@pytest.fixture(scope="module")
def arrays(graded: Path) -> dict[str, np.ndarray]:
    with np.load(graded / "driver_arrays.npz") as npz:
        return dict(npz)


def printed_between(graded: Path, start: str, end: str) -> str:
    stdout = (graded / "stdout.txt").read_text(encoding="utf-8")
    return stdout.split(f"== {start} ==")[1].split(f"== {end} ==")[0]


def test_missing_network_is_warned_of_once(graded: Path) -> None:
    output = (graded / "stdout.txt").read_text() + (graded / "stderr.txt").read_text()
    lines = [line.strip() for line in re.split(r"[\r\n]+", output)]
    warned = [line for line in lines if "warning" in line.lower() and "weights" in line.lower()]
    assert warned, "random weights took the place of ImageNet's without a warning"
    assert len(warned) == len(set(warned)), "the same warning was printed twice"


def test_train_prints_both_losses_after_each_epoch(graded: Path, facts: dict) -> None:
    printed = printed_between(graded, "train", "trained")
    train_losses = re.findall(r"(?i)\btrain\w*\b[^\d\n]*?(\d+\.\d+)", printed)
    val_losses = re.findall(r"(?i)\bval\w*\b[^\d\n]*?(\d+\.\d+)", printed)
    assert len(train_losses) == len(val_losses) == facts["epochs"], printed
    assert min(abs(float(loss) - facts["val_loss"]) for loss in val_losses) < 2e-3


def test_validate_gives_a_loss_and_changes_nothing(facts: dict) -> None:
    assert facts["loss_types"] == ["float", "float"]
    for loss in (facts["val_loss"], facts["test_loss"]):
        # Rows of unit length are at most 2 apart, so the hinge is at most margin + 2.
        assert 0.0 <= loss <= 2.1
    assert facts["validate_changed"] == 0.0


def test_train_initializes_a_fresh_model(facts: dict) -> None:
    """Adam moves a weight by about lr a step; k-means centers lie far from where they began."""
    assert facts["layer_change"], "no tensor of the layer has 16 x 512 elements"
    assert max(facts["layer_change"]) > 20 * facts["steps"] * 1e-4


def test_train_initializes_no_model_twice(facts: dict) -> None:
    assert facts["loaded_then_trained_change"] < 1e-6
    assert facts["trained_again_change"] < 1e-6


def test_forward_gives_unit_rows_of_the_contract_s_size(facts: dict, arrays: dict) -> None:
    assert facts["forward_shapes"] == [[2, 16 * 512], [2, 16 * 512]]
    assert arrays["forward_db"].shape == (N_DB, 16 * 512)
    np.testing.assert_allclose(np.linalg.norm(arrays["forward_db"], axis=1), 1.0, atol=1e-5)


def test_state_dict_loads_into_a_bare_model(arrays: dict) -> None:
    np.testing.assert_allclose(arrays["bare_db"], arrays["forward_db"], atol=1e-6)


def test_embeddings_are_the_model_s_rows_in_the_order_of_the_list(
    facts: dict, arrays: dict
) -> None:
    assert facts["embedding_types"] == ["ndarray", "float32"]
    assert arrays["query_emb"].shape == (N_QUERIES, 16 * 512)
    assert facts["query_indices"] == list(range(N_QUERIES))
    assert facts["db_indices"] == list(range(N_DB))
    assert facts["query_paths"] == [f"dataset/query/val_{i:03d}.png" for i in range(N_QUERIES)]
    assert facts["db_paths"] == [f"dataset/index/val_{i:03d}.png" for i in range(N_DB)]
    for name in ("query_emb", "db_emb", "db_emb_32"):
        np.testing.assert_allclose(np.linalg.norm(arrays[name], axis=1), 1.0, atol=1e-4)
    # bf16 may be used for the embeddings, so the rows agree with forward's to its precision,
    # and each is much nearer to its own than to any other.
    cosine = arrays["db_emb"] @ arrays["forward_db"].T
    assert cosine.diagonal().min() > 0.99
    assert (cosine.argmax(axis=1) == np.arange(N_DB)).all()
    batches = (arrays["db_emb"] * arrays["db_emb_32"]).sum(axis=1)
    assert batches.min() > 0.999, "an embedding depends on the batch it is computed in"


def hits_by_hand(arrays: dict[str, np.ndarray], data_dir: Path, k: int) -> int:
    """Queries with a positive among their k best, by loops over the embeddings."""
    with np.load(data_dir / "gt" / "pitts30k_val.npz") as gt:
        utm_query_m, utm_db_m = gt["utmQ"], gt["utmDb"]
    hits = 0
    for embedding, place_m in zip(arrays["query_emb"], utm_query_m, strict=True):
        distance_m = [math.dist(place_m, other_m) for other_m in utm_db_m]
        positives = {j for j, d in enumerate(distance_m) if d < POS_DIST_THR_M}
        positives = positives or {int(np.argmin(distance_m))}
        order = sorted(range(N_DB), key=lambda j: -float(embedding @ arrays["db_emb_32"][j]))
        hits += bool(positives & set(order[:k]))
    return hits


def test_recall_counts_the_queries_answered(graded: Path, facts: dict, arrays: dict) -> None:
    assert list(facts["recall"]) == ["1", "5", "10"]
    assert list(facts["recall_of_all"]) == ["2", str(N_DB)]
    assert facts["recall"]["1"] == HITS_AT_1
    assert facts["recall_of_all"][str(N_DB)] == N_QUERIES
    for k, hits in (facts["recall"] | facts["recall_of_all"]).items():
        assert hits == hits_by_hand(arrays, graded / "dataset", int(k)), f"recall@{k}"


@pytest.mark.parametrize(
    ("start", "end", "result"),
    [("recall", "recall of all", "recall"), ("recall of all", "recalled", "recall_of_all")],
)
def test_recall_lines_are_printed_to_the_letter(
    graded: Path, facts: dict, start: str, end: str, result: str
) -> None:
    lines = printed_between(graded, start, end).splitlines()
    expected = [
        f"Recall@{k}: {hits}/{N_QUERIES} = {100 * hits / N_QUERIES:.2f}%"
        for k, hits in facts[result].items()
    ]
    assert [line for line in lines if line.startswith("Recall@")] == expected


def test_graders_test_py_runs_with_the_trained_checkpoint(graded: Path) -> None:
    """In a process of its own, with model.py alone, as whoever holds the .pth will do it."""
    for seed, scene in enumerate(("P001", "P002")):
        write_scene(graded / "dataset" / "camera", scene, 5, seed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    frames = [
        graded / "dataset" / "camera" / f"P00{1 + i // 5}" / "images" / f"{i % 5:06d}_left.png"
        for i in range(10)
    ]
    shutil.copy(frames[order[6]], frames[order[0]])
    for name in ("train.py", "eval.py", "base.py"):
        (graded / name).unlink()
    run = run_command([sys.executable, "test.py"], graded)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    answers = [line for line in lines if line.startswith(("Query:", "Best", "Embed"))]
    assert len(answers) == 2 * 3
    copied = frames[order[6]].relative_to(graded).as_posix()
    assert answers[1] == f"Best Match: {copied}"
    assert float(answers[2].split()[-1]) < 0.01 < float(answers[5].split()[-1])


def test_model_without_pretrained_weights_touches_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    model = load_script("model").NetVLADModel(num_clusters=4, pretrained=False).eval()
    with torch.no_grad():
        rows = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert rows.shape == (1, 4 * 512)
    assert rows.norm(dim=1).item() == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------------------ base.py's data sets


def first_value(image: Image.Image) -> int:
    """A transform that reads the plain-colored test images: which of them is this?"""
    tensor = TF.to_tensor(image)
    assert tensor.shape[0] == 3, "images are RGB whatever the file holds"
    return round(tensor[0, 0, 0].item() * 255)


def plain(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


# Distances of database images to the query in metres: exact in float64 near Pittsburgh, not in
# float32. (15, 20) is 25 m and (150, 200) 250 m sharp: neither closer nor farther.
POSITIVES_M = [(0.0, 0.0), (6.0, 8.0), (0.0, -24.75)]
BETWEEN_M = [(15.0, 20.0), (25.25, 0.0), (20.0, 20.0), (0.0, 100.0), (150.0, 200.0), (0.0, 249.75)]
NEGATIVES_M = [(250.25, 0.0), (200.0, 200.0), (0.0, -3000.0)]
DRAWS = 150


def triplet_set(folder: Path, offsets_m: list[tuple[float, float]]) -> torch.utils.data.Dataset:
    """A LoadDataset of one query (its image has value 200) and database images 0, 1, …"""
    place_m = np.array([[585_001.0, 4_476_999.0]])
    data_dir = folder / "dataset"
    data_dir.mkdir()
    database = [plain(i) for i in range(len(offsets_m))]
    write_part(data_dir, "train", [plain(200)], database, place_m, place_m + offsets_m)
    return load_script("base").LoadDataset(
        str(data_dir / "query_train.txt"),
        str(data_dir / "index_train.txt"),
        str(folder),
        str(data_dir / "gt" / "pitts30k_train.npz"),
        transform=first_value,
    )


@pytest.mark.parametrize(
    ("offsets_m", "positives", "negatives"),
    [
        (NEGATIVES_M + BETWEEN_M + POSITIVES_M, {9, 10, 11}, {0, 1, 2}),
        (NEGATIVES_M + BETWEEN_M, {3}, {0, 1, 2}),
        (BETWEEN_M + POSITIVES_M, {6, 7, 8}, {4}),
        ([(0.0, 40.0), (30.0, 0.0), (60.0, 60.0)], {1}, {2}),
    ],
    ids=["both", "no positive: nearest", "no negative: farthest", "neither"],
)
def test_triplets_are_drawn_from_all_positives_and_all_negatives(
    tmp_path: Path, offsets_m: list, positives: set[int], negatives: set[int]
) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    dataset = triplet_set(tmp_path, offsets_m)
    assert len(dataset) == 1
    drawn = [tuple(dataset[0]) for _ in range(DRAWS)]
    assert {q for q, _, _ in drawn} == {200}
    assert {p for _, p, _ in drawn} == positives
    assert {n for _, _, n in drawn} == negatives


def test_every_query_draws_around_its_own_place(tmp_path: Path) -> None:
    places_m = np.array([[0.0, 0.0], [0.0, 900.0], [900.0, 0.0]])
    data_dir = tmp_path / "dataset"
    data_dir.mkdir()
    database = [plain(i) for i in range(3)]
    queries = [plain(100 + i) for i in range(3)]
    write_part(data_dir, "train", queries, database, places_m, places_m[[2, 0, 1]])
    dataset = load_script("base").LoadDataset(
        data_dir / "query_train.txt",
        data_dir / "index_train.txt",
        tmp_path,
        data_dir / "gt" / "pitts30k_train.npz",
        first_value,
    )
    items = [tuple(dataset[i]) for i in range(3)]
    assert [q for q, _, _ in items] == [100, 101, 102]
    assert [p for _, p, _ in items] == [1, 2, 0]
    assert all(n != p for _, p, n in items)


def put_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain(value).save(path)


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("dataset/query/a.png", ["here/dataset/query/a.png"], 10),
        ("dataset/query/a.png", ["there/dataset/query/a.png"], 10),
        ("dataset/query/a.png", ["there/query/a.png"], 10),
        ("./dataset/query/a.png", ["there/query/a.png"], 10),
        (
            "dataset/query/a.png",
            ["here/dataset/query/a.png", "there/dataset/query/a.png", "there/query/a.png"],
            10,
        ),
        ("dataset/query/a.png", ["there/dataset/query/a.png", "there/query/a.png"], 10),
        ("query/a.png", ["there/query/a.png"], 10),
    ],
    ids=[
        "as it stands",
        "under root_dir",
        "without dataset/",
        "without ./dataset/",
        "as it stands first",
        "whole line before shortened",
        "no dataset/ at all",
    ],
)
def test_list_line_is_tried_in_the_contract_s_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    files: list[str],
    expected: int,
) -> None:
    """Of `files`, whose images have values 10, 11, …, the first is the one to be read."""
    (tmp_path / "here").mkdir()
    for i, name in enumerate(files):
        put_image(tmp_path / name, 10 + i)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "list.txt").write_text(f"{line}\n{line}\n", encoding="utf-8")
    np.savez(
        tmp_path / "gt.npz",
        utmQ=np.zeros((2, 2)),
        utmDb=np.array([[0.0, 0.0], [0.0, 900.0]]),
        posDistThr=POS_DIST_THR_M,
    )
    base = load_script("base")
    images = base.ImageListDataset(tmp_path / "list.txt", tmp_path / "there", first_value)
    assert len(images) == 2
    for i in range(2):
        value, index, path = images[i]
        assert (value, int(index)) == (expected, i)
        assert Path(path).name == "a.png"
    triplets = base.LoadDataset(
        tmp_path / "list.txt",
        tmp_path / "list.txt",
        tmp_path / "there",
        tmp_path / "gt.npz",
        first_value,
    )
    assert tuple(triplets[1]) == (expected,) * 3


# ------------------------------------------------------------------ test.py


def test_indoor_dataset_items(tmp_path: Path) -> None:
    """The shorter of images and lines rules; the scenes come in the order given."""
    lines = {
        "P001": write_scene(tmp_path, "P001", 5, seed=1)[:4],
        "P002": write_scene(tmp_path, "P002", 3, seed=2),
    }
    (tmp_path / "P001" / "pose.txt").write_text("\n".join(lines["P001"]) + "\n")
    extra = pose_lines(2, seed=9)
    (tmp_path / "P002" / "pose.txt").write_text("\n".join(lines["P002"] + extra) + "\n")
    dataset = load_script("test").IndoorDataset(
        str(tmp_path), transform=TF.to_tensor, scenes=["P002", "P001"]
    )
    items = [dataset[i] for i in range(len(dataset))]
    assert [item[3] for item in items] == ["P002"] * 3 + ["P001"] * 4
    assert [int(item[4]) for item in items] == [0, 1, 2, 0, 1, 2, 3]
    for image, pose, path, scene, frame in items:
        assert str(pose.dtype).endswith("float32") and tuple(pose.shape) == (7,)
        expected = [float(token) for token in lines[scene][frame].split()]
        np.testing.assert_allclose(np.asarray(pose), expected, atol=1e-6)
        assert Path(path) == tmp_path / scene / "images" / f"{frame:06d}_left.png"
        assert tuple(image.shape) == (3, 72, 96)
        seed = 1000 * int(scene[-1]) + frame
        assert torch.equal(image, TF.to_tensor(texture(seed, 96, 72)))


def test_indoor_dataset_takes_the_four_scenes_by_default(tmp_path: Path) -> None:
    for i, scene in enumerate(("P004", "P002", "P003", "P001", "P000")):
        write_scene(tmp_path, scene, 1, seed=i)
    dataset = load_script("test").IndoorDataset(str(tmp_path))
    assert [dataset[i][3] for i in range(len(dataset))] == ["P001", "P002", "P003", "P004"]


def test_indoor_dataset_reads_removed_poses_as_nan(tmp_path: Path) -> None:
    lines = write_scene(tmp_path, "P001", 3, seed=1)
    lines[0], lines[2] = "nan", " ".join(["nan"] * 7)
    (tmp_path / "P001" / "pose.txt").write_text("\n".join(lines) + "\n")
    dataset = load_script("test").IndoorDataset(str(tmp_path), scenes=["P001"])
    known = [bool(np.isfinite(np.asarray(dataset[i][1])).all()) for i in range(3)]
    lost = [bool(np.isnan(np.asarray(dataset[i][1])).all()) for i in range(3)]
    assert known == [False, True, False] and lost == [True, False, True]


SQRT_HALF = math.sqrt(0.5)
IDENTITY = [0.0, 0.0, 0.0, 1.0]
TURNED = [0.5, -0.1, 0.7, 0.5]  # norm 1


def times(a: list[float], b: list[float]) -> list[float]:
    """Product of two quaternions x y z w, written out."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return [
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    ]


def turn(angle_deg: float, axis: tuple[float, float, float]) -> list[float]:
    half = math.radians(angle_deg) / 2
    return [math.sin(half) * a for a in axis] + [math.cos(half)]


@pytest.mark.parametrize(
    ("pose_a", "pose_b", "metres", "degrees"),
    [
        ([1, 2, 3, *IDENTITY], [1, 2, 3, *IDENTITY], 0.0, 0.0),
        ([1, 2, 3, *IDENTITY], [4, -2, 15, *IDENTITY], 13.0, 0.0),
        ([0, 0, 0, *IDENTITY], [0, 0, 0, SQRT_HALF, 0, 0, SQRT_HALF], 0.0, 90.0),
        ([0, 0, 0, *IDENTITY], [0, 0, 0, 0, 0, -SQRT_HALF, SQRT_HALF], 0.0, 90.0),
        ([0, 0, 0, *IDENTITY], [0, 0, 0, 0, 1, 0, 0], 0.0, 180.0),
        ([0, 0, 0, *IDENTITY], [0, 0, 0, 0, 0, 0, -1], 0.0, 0.0),
        ([0, 0, 0, *TURNED], [0, 0, 0, *(-v for v in TURNED)], 0.0, 0.0),
        ([0, 0, 0, *turn(10, (1, 0, 0))], [0, 0, 0, *turn(-100, (1, 0, 0))], 0.0, 110.0),
        ([0, 0, 0, *turn(170, (0, 1, 0))], [0, 0, 0, *turn(-170, (0, 1, 0))], 0.0, 20.0),
        ([0, 0, 0, *(3 * v for v in IDENTITY)], [0, 0, 0, 0, 0.2, 0, 0.2], 0.0, 90.0),
        ([0, 0, 0, *TURNED], [0, 0, 0, *(-7 * v for v in TURNED)], 0.0, 0.0),
        ([5e6, 0, 0, *IDENTITY], [5e6, 1e-3, 0, *IDENTITY], 1e-3, 0.0),
    ],
)
def test_pose_error_by_hand(
    pose_a: list[float], pose_b: list[float], metres: float, degrees: float
) -> None:
    pose_error = load_script("test").pose_error
    for first, second in ((pose_a, pose_b), (pose_b, pose_a)):
        error = pose_error(np.array(first, dtype=float), np.array(second, dtype=float))
        assert error == pytest.approx((metres, degrees), abs=1e-7)


@pytest.mark.parametrize("angle_deg", [1e-5, 1e-3, 0.02, 179.99, 179.99999])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_pose_error_is_precise_at_tiny_and_at_straight_angles(
    angle_deg: float, scale: float
) -> None:
    turned = times(TURNED, turn(angle_deg, (0.6, 0.0, 0.8)))
    first = np.array([0, 0, 0, *TURNED])
    second = np.array([0, 0, 0, *(scale * v for v in turned)])
    _, degrees = load_script("test").pose_error(first, second)
    assert degrees == pytest.approx(angle_deg, abs=1e-9)


def test_pose_error_of_float32_poses_is_computed_in_float64() -> None:
    """arccos in float32 is wrong by up to 0.06°; what remains here is the rounding of the input."""
    pose_error = load_script("test").pose_error
    pose = torch.tensor([1.0, 2.0, 3.0, *TURNED], dtype=torch.float32)
    turned = torch.tensor(
        [1.0, 2.0, 3.0, *times(TURNED, turn(0.05, (0, 0, 1)))], dtype=torch.float32
    )
    assert pose_error(pose, pose)[1] == pytest.approx(0.0, abs=1e-6)
    assert pose_error(pose.numpy(), turned.numpy())[1] == pytest.approx(0.05, abs=2e-5)


def test_pose_error_of_an_unknown_pose_is_nan() -> None:
    pose_error = load_script("test").pose_error
    known, unknown = np.array([1.0, 2.0, 3.0, *IDENTITY]), np.full(7, np.nan)
    for error in (pose_error(known, unknown), pose_error(unknown, known)):
        assert all(math.isnan(value) for value in error)


SCENES = ["P003", "P001"]
FRAMES_PER_SCENE = 6
SPLIT_SEED = 7


@dataclass
class PoseRun:
    """One run of test.py, what it was given and what it left."""

    frames: list[Path]  # all images, in the order of scenes and frames
    poses: list[np.ndarray]  # (7,) each, or (1,) nan for the lost one
    drawn: list[int]  # the queries by the contract's permutation
    lost: int  # the frame whose pose was removed
    index: list[int]
    copied: int  # the index frame whose picture is also the first query's
    output: Path
    stdout: list[str]
    result: list[str]


def draw_queries(n_frames: int) -> tuple[list[int], list[int]]:
    """The contract's split: queries, others."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(n_frames, generator=generator).tolist()
    n_query = max(1, int(0.2 * n_frames))
    return order[:n_query], order[n_query:]


@pytest.fixture(scope="module")
def pose_run(tmp_path_factory: pytest.TempPathFactory, graded: Path) -> PoseRun:
    """test.py as a command on two tiny scenes of unrelated pictures.

    The first query's picture is that of an index frame of its scene, so its best match and the
    distance to it are known. One frame outside the drawn ones has lost its pose.
    """
    folder = tmp_path_factory.mktemp("pose_run")
    camera = folder / "camera"
    lines, frames = [], []
    for i, scene in enumerate(SCENES):
        lines += write_scene(camera, scene, FRAMES_PER_SCENE, seed=10 + i, size_px=(160, 120))
        frames += sorted((camera / scene / "images").iterdir())
    drawn, others = draw_queries(len(frames))
    same_scene = [i for i in others if frames[i].parent == frames[drawn[0]].parent]
    copied, lost = same_scene[:2]
    shutil.copy(frames[copied], frames[drawn[0]])
    lines[lost] = "nan"
    for i, scene in enumerate(SCENES):
        part = lines[i * FRAMES_PER_SCENE : (i + 1) * FRAMES_PER_SCENE]
        (camera / scene / "pose.txt").write_text("\n".join(part) + "\n", encoding="utf-8")

    command = [sys.executable, str(ROOT / "test.py"), "--camera", str(camera)]
    command += ["--scenes", *SCENES, "--seed", str(SPLIT_SEED), "--device", "cpu", "--no-cache"]
    command += ["--checkpoint", str(graded / "netvlad_final.pth")]
    command += ["--output", str(folder / "output"), "--top-k", "5"]
    run = run_command(command, folder)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result = (folder / "output" / "result_pose_eval.txt").read_text(encoding="utf-8")
    return PoseRun(
        frames=frames,
        poses=[np.array([float(v) for v in line.split()]) for line in lines],
        drawn=drawn,
        lost=lost,
        index=[i for i in others if i != lost],
        copied=copied,
        output=folder / "output",
        stdout=run.stdout.splitlines(),
        result=result.split("\n"),
    )


def frame_of(run: PoseRun, path: str) -> int:
    """The number, in the order of scenes and frames, of the image that a printed path names."""
    matches = [
        i for i, frame in enumerate(run.frames) if frame.as_posix().endswith(Path(path).as_posix())
    ]
    assert len(matches) == 1, path
    return matches[0]


def blocks_of(run: PoseRun) -> dict[int, tuple[int, float, float, float]]:
    """query frame → best match, distance, translation error, rotation error; checks the form."""
    form = [
        r"Query: (.+)",
        r"Best Match: (.+)",
        r"Embed Dist: (\d+\.\d{4})",
        r"Translation Error: (\d+\.\d{4}|nan) m, Rotation Error: (\d+\.\d{2}|nan) deg",
        r"",
    ]
    *lines, last = run.result[3:]
    assert last == "" and len(lines) % 5 == 0
    blocks = {}
    for start in range(0, len(lines), 5):
        block = lines[start : start + 5]
        found = [re.fullmatch(f, line) for f, line in zip(form, block, strict=True)]
        assert all(found), block
        query, best = (frame_of(run, found[i].group(1)) for i in range(2))
        errors = [float(v) for v in (found[2].group(1), *found[3].groups())]
        assert query not in blocks
        blocks[query] = (best, *errors)
    return blocks


def test_result_file_to_the_letter(pose_run: PoseRun) -> None:
    queries = {*pose_run.drawn, pose_run.lost}
    assert pose_run.result[0] == "Top-1 retrieval pose evaluation"
    assert pose_run.result[1] == f"(queries={len(queries)}, index={len(pose_run.index)})"
    assert pose_run.result[2] == ""
    blocks = blocks_of(pose_run)
    assert set(blocks) == queries
    assert all(best in pose_run.index for best, *_ in blocks.values())
    assert blocks[pose_run.drawn[0]][:2] == (pose_run.copied, pytest.approx(0.0, abs=0.01))
    for query, (_, distance, translation_m, rotation_deg) in blocks.items():
        assert 0.0 <= distance <= 2.0
        unknown = query == pose_run.lost
        assert math.isnan(translation_m) == math.isnan(rotation_deg) == unknown


def test_means_are_printed_to_the_letter(pose_run: PoseRun) -> None:
    errors = np.array([block[2:] for block in blocks_of(pose_run).values()])
    mean_m, mean_deg = np.nanmean(errors, axis=0)
    printed_m = [line for line in pose_run.stdout if line.startswith("Mean Pose Error:")]
    printed_deg = [line for line in pose_run.stdout if line.startswith("Mean Rotation Error:")]
    assert re.fullmatch(r"Mean Pose Error: \d+\.\d{4}", printed_m[0]) and len(printed_m) == 1
    assert re.fullmatch(r"Mean Rotation Error: \d+\.\d{2} deg", printed_deg[0])
    assert len(printed_deg) == 1
    assert float(printed_m[0].split()[3]) == pytest.approx(mean_m, abs=1.01e-4)
    assert float(printed_deg[0].split()[3]) == pytest.approx(mean_deg, abs=1.01e-2)


def test_errors_are_those_of_the_written_estimates(pose_run: PoseRun) -> None:
    blocks = blocks_of(pose_run)
    estimates = {}
    for line in (pose_run.output / "estimated_poses.tsv").read_text(encoding="utf-8").splitlines():
        if ".png" in line:
            fields = line.split()
            estimates[frame_of(pose_run, fields[0])] = np.array([float(v) for v in fields[1:8]])
            assert int(float(fields[-1])) >= 0 and len(fields) >= 10
    assert set(estimates) == set(blocks)
    for query, (_, _, translation_m, rotation_deg) in blocks.items():
        estimate = estimates[query]
        assert np.isfinite(estimate).all(), "every query gets a pose"
        assert np.linalg.norm(estimate[3:]) == pytest.approx(1.0, abs=1e-4)
        if query == pose_run.lost:
            continue
        truth = pose_run.poses[query]
        dot = abs(estimate[3:] @ truth[3:]) / np.linalg.norm(estimate[3:])
        assert translation_m == pytest.approx(math.dist(estimate[:3], truth[:3]), abs=1e-3)
        assert rotation_deg == pytest.approx(math.degrees(2 * math.acos(min(1.0, dot))), abs=0.05)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "base",
            ["dataset", "output", "epochs", "lr", "batch-size", "margin", "clusters", "train-from"]
            + ["weights", "seed", "device", "limit"],
        ),
        (
            "test",
            ["camera", "scenes", "seed", "checkpoint", "output", "top-k", "device", "no-cache"],
        ),
    ],
)
def test_help_names_every_flag(
    script: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load_script(script).main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in flags:
        assert re.search(rf"(?<![\w-])--{flag}(?![\w-])", shown), flag
