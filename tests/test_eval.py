"""Search, recall and chance by hand counts and brute force."""

import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

import eval as evaluation
from eval import (
    compute_embeddings,
    evaluate_recall,
    first_hits,
    positives_within,
    read_batches,
    search,
)
from model import InputError, NetVLADModel


class Images(Dataset):
    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        return self.images[i], i, f"image{i}.jpg"


def test_search_equals_a_stable_sort_also_with_ties(monkeypatch):
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (40, 3)).astype(np.float32)
    database = rng.integers(-2, 3, (60, 3)).astype(np.float32)  # many equal products
    expected = np.argsort(-(queries @ database.T), axis=1, kind="stable")
    for cells, numbers in ((2**25, 2**26), (100, 2**26), (2**25, 40), (10, 1)):  # in chunks of both
        monkeypatch.setattr(evaluation, "SEARCH_CELLS", cells)
        monkeypatch.setattr(evaluation, "SEARCH_BLOCK", numbers)
        for k in (1, 7, 60, 80):
            similarity, index = search(queries, database, k)
            np.testing.assert_array_equal(index, expected[:, :k])
            np.testing.assert_array_equal(
                similarity, np.take_along_axis(queries @ database.T, index, 1)
            )


@pytest.mark.parametrize("by_distance", [False, True])
def test_search_is_that_of_faiss(monkeypatch, by_distance):
    rng = np.random.default_rng(0)
    queries, database = (rng.standard_normal((n, 32)).astype(np.float32) for n in (50, 700))
    if by_distance:
        database *= rng.uniform(0.5, 2, (700, 1)).astype(np.float32)
    else:
        queries, database = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, database)
        )
    index = (faiss.IndexFlatL2 if by_distance else faiss.IndexFlatIP)(32)
    index.add(database)
    theirs, rows = index.search(queries, 20)
    monkeypatch.setattr(evaluation, "SEARCH_BLOCK", 32 * 150)
    similarity, ours = search(queries, database, 20, by_distance=by_distance)
    np.testing.assert_array_equal(ours, rows)
    expected = 1 - theirs / 2 if by_distance else theirs
    np.testing.assert_allclose(similarity, expected, rtol=1e-4, atol=1e-4)


class Counted:
    """A database that notes how many numbers of it are read at a time."""

    def __init__(self, file: np.ndarray) -> None:
        self.file, self.shape, self.read = file, file.shape, []

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.read.append(self.file[rows].size)
        return self.file[rows]


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_database_in_a_file_is_read_once_and_a_part_at_a_time(tmp_path, monkeypatch, mode):
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    np.save(tmp_path / "database.npy", vectors)
    database = Counted(np.load(tmp_path / "database.npy", mmap_mode=mode))
    monkeypatch.setattr(evaluation, "SEARCH_BLOCK", 16 * 90)
    monkeypatch.setattr(evaluation, "SEARCH_CELLS", 90 * 7)
    held = []
    top = evaluation._stable_topk
    monkeypatch.setattr(
        evaluation, "_stable_topk", lambda s, k: (held.append(s.numel()), top(s, k))[1]
    )
    _, found = search(vectors[:40], database, 5)
    np.testing.assert_array_equal(found, np.argsort(-(vectors[:40] @ vectors.T))[:, :5])
    assert max(database.read) <= 16 * 90 and sum(database.read) == vectors.size
    assert max(held) <= 90 * 7 and sum(held) == 40 * 1000


def test_positives_and_the_nearest_where_there_is_none():
    utm_query = np.array([[0.0, 0.0], [100.0, 0.0]])
    utm_index = np.array([[0.0, 25.0], [0.0, 25.01], [60.0, 0.0], [3.0, 4.0]])
    near, alone = positives_within(utm_query, utm_index, 25)
    assert near.tolist() == [0, 3]  # exactly 25 m counts
    assert alone.tolist() == [2]


def test_first_hits_by_hand():
    ranking = np.array([[3, 1, 2], [0, 1, 2], [2, 0, 1]])
    positives = [np.array([2, 1]), np.array([5]), np.array([2])]
    assert first_hits(ranking, positives).tolist() == [1, 3, 0]


def test_descriptors_are_the_model_s_in_order_whatever_the_items_hold_beside():
    torch.manual_seed(0)
    model, images = NetVLADModel(4, pretrained=False), Images(5)
    model.precision = "float32"
    five = [(x, i + 7, Path("folder") / name, "scene", 3) for x, i, name in images]
    for given in (model, nn.DataParallel(model)):
        found, indices, paths = compute_embeddings(given, five, "cpu", batch_size=2)
        assert indices == list(range(7, 12)) and paths[4] == str(Path("folder/image4.jpg"))
        with torch.no_grad():
            np.testing.assert_allclose(found, model(images.images).numpy(), atol=1e-6)
    assert compute_embeddings(model, [], "cpu")[1:] == ([], [])
    arrays = [(x.numpy(), i, name) for x, i, name in images]  # a DataLoader takes them too
    np.testing.assert_array_equal(compute_embeddings(model, arrays, "cpu", 2)[0], found)


def test_any_module_is_evaluated(capsys):
    class Colors(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x.mean((2, 3)), dim=1)

    places = np.arange(6)[:, None] * [100.0, 0]
    found = evaluate_recall(Colors(), Images(6), Images(6), places, places, 25, "cpu", [1])
    assert found == {1: 6} and capsys.readouterr().out == "Recall@1: 6/6 = 100.00%\n"


def test_batches_are_read_in_order_by_threads_no_more_than_three_ahead():
    asked, threads = [], set()

    def read(row):
        asked.append(row)
        threads.add(threading.get_ident())
        return row, row * row

    batches = [range(i, i + 4) for i in range(0, 40, 4)]
    for number, items in enumerate(read_batches(read, batches)):
        assert items == [(row, row * row) for row in batches[number]]
        assert max(asked) < 4 * (number + 4)
    assert sorted(asked) == list(range(40)) and threading.get_ident() not in threads


def test_recall_by_hand_count_with_a_query_that_has_no_positive(capsys):
    torch.manual_seed(0)
    model = NetVLADModel(4, pretrained=False)
    images = Images(4)  # queries and database are the same images: each finds itself first
    utm_index = np.array([[0.0, 0.0], [100.0, 0.0], [200.0, 0.0], [1000.0, 0.0]])
    utm_query = np.array([[0.0, 0.0], [200.0, 0.0], [140.0, 0.0], [1500.0, 0.0]])
    # 0: itself, right. 1: image 2 is the positive, not itself. 2: none within 25 m, nearest is image 1
    # (40 m), not itself. 3: none within 25 m, nearest is image 3: itself, right.
    found = evaluate_recall(model, images, images, utm_query, utm_index, 25, "cpu", [1, 4])
    assert found == {1: 2, 4: 4}
    assert capsys.readouterr().out == "Recall@1: 2/4 = 50.00%\nRecall@4: 4/4 = 100.00%\n"
    for threshold in (np.array([[25]]), [25.0]):  # as a file of the course may hold it
        assert found == evaluate_recall(
            model, images, images, utm_query, utm_index, threshold, "cpu", [1, 4]
        )
    for name, places in (("utmQ", (utm_query[:3], utm_index)), ("utmDb", (utm_query, utm_index[:3]))):
        with pytest.raises(InputError, match=f"{name} has 3 rows for 4 images"):
            evaluate_recall(model, images, images, *places, 25, "cpu")
    with pytest.raises(InputError, match="utmQ has values that are not finite"):
        evaluate_recall(model, images, images, utm_query * np.nan, utm_index, 25, "cpu")
    with pytest.raises(InputError, match="utmDb has no row"):
        evaluate_recall(model, images, Images(0), utm_query, utm_index[:0], 25, "cpu")


ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(sample, tmp_path) -> Path:
    """photos/ with six images, two of them in a folder below; a smaller copy of b.png beside it."""
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    images = sorted((sample / "index").iterdir())[::7]
    for name, image in zip(
        ("a.png", "b.png", "c.JPG", "d.png", "below/e.png", "below/f.png"), images
    ):
        Image.open(image).save(photos / name)
    (photos / "notes.txt").touch()
    with Image.open(photos / "b.png") as image:
        image.resize((100, 75)).save(tmp_path / "again.jpg", quality=70)
    return photos


def found_images(text: str) -> dict[str, list[str]]:
    """Names of the images printed under each query."""
    found: dict[str, list[str]] = {}
    query = ""
    for line in text.splitlines()[1:]:
        if line.startswith(" "):
            found[query].append(Path(line.split()[-1]).name)
        elif not line.startswith("Written"):
            query = Path(line).name
            found[query] = []
    return found


def test_images_are_searched_in_a_folder_without_lists_or_truth(
    folder, checkpoint, tmp_path, capsys
):
    queries = [str(tmp_path / "again.jpg"), str(folder / "below/e.png")]
    options = ["--checkpoint", str(checkpoint), "--index", str(folder), "--device", "cpu"]
    picture = tmp_path / "found.png"
    assert (
        evaluation.main([*options, "--query", *queries, "--top-k", "3", "--picture", str(picture)])
        == 0
    )
    found = found_images(capsys.readouterr().out)
    assert list(found) == ["again.jpg", "e.png"]
    assert found["again.jpg"][0] == "b.png"
    assert [len(names) for names in found.values()] == [3, 3]
    with Image.open(picture) as image:
        assert image.width == 1600
    assert evaluation.main([*options, "--query", *queries, "--top-k", "50"]) == 0
    everything = {
        "a.png",
        "b.png",
        "c.JPG",
        "d.png",
        "f.png",
    }  # the query e.png does not find itself
    assert all(set(names) == everything for names in found_images(capsys.readouterr().out).values())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--query", "again.jpg"], "--index"),
        (["--query", "again.jpg", "--index", "nowhere"], "nowhere holds no image"),
        (["--query", "nothing.jpg", "--index", "photos"], "nothing.jpg"),
        (["--query", "photos/notes.txt", "--index", "photos"], "notes.txt"),
        (["--query", "again.jpg", "--index", "photos", "--top-k", "0"], "--top-k 0"),
        (
            ["--query", "again.jpg", "--index", "photos", "--picture", "again.jpg/found.png"],
            "found.png",
        ),
        (["--query", "again.jpg", "--index", "photos", "--picture", "found.xyz"], "xyz"),
        (["--query", "again.jpg", "--index", "photos", "--picture", "found.psd"], "psd"),
        (["--query", "photos", "--index", "photos"], "name the images in it"),
        (["--index", "photos"], "need --query"),
    ],
)
def test_bad_input_of_a_search_is_a_sentence(
    folder, checkpoint, tmp_path, monkeypatch, capsys, argv, named
):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main([*argv, "--checkpoint", str(checkpoint), "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("eval.py: ") and named in said


def test_recall_of_a_plain_module_is_by_cosine_whatever_the_lengths_of_its_rows():
    queries = 0.5 + torch.eye(4, 12).view(4, 3, 2, 2)
    database = queries * torch.tensor([1.0, 2, 4, 8])[:, None, None, None]
    items = [[(image, i, str(i)) for i, image in enumerate(part)] for part in (queries, database)]
    utm = 1000.0 * np.arange(8).reshape(4, 2)
    for model in (nn.Flatten(), nn.DataParallel(nn.Flatten())):
        assert evaluation.evaluate_recall(model, *items, utm, utm, 25.0, "cpu", [1]) == {1: 4}


def test_a_search_needs_no_other_file_than_model_py(folder, checkpoint, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("eval.py", "model.py"):
        shutil.copy(ROOT / name, alone)
    words = [
        "eval.py",
        "--checkpoint",
        checkpoint,
        "--query",
        tmp_path / "again.jpg",
        "--index",
        folder,
    ]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert found_images(done.stdout)["again.jpg"][0] == "b.png"
    words += ["--picture", tmp_path / "found.png"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--picture needs the program's reporting/" in done.stderr
    assert "Traceback" not in done.stderr


def test_photos_are_read_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "held.jpg", exif=exif)
    assert evaluation.load_image(tmp_path / "held.jpg").size == (10, 20)


def test_images_become_inputs_as_torchvision_makes_them_and_the_maker_pickles():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    steps = [transforms.Resize((32, 32)), transforms.ToTensor()]
    theirs = transforms.Compose([*steps, transforms.Normalize(evaluation.IMAGENET_MEAN, evaluation.IMAGENET_STD)])
    ours = pickle.loads(pickle.dumps(evaluation.transform_to(32)))
    assert torch.equal(ours(image), theirs(image))


def test_large_jpegs_are_decoded_at_half_their_size_and_look_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    reduced = evaluation.load_image(tmp_path / "a.jpg", evaluation.IMAGE_SIZE)
    assert reduced.size == (320, 240)
    full = evaluation.load_image(tmp_path / "a.jpg")
    assert full.size == (640, 480)
    ours, theirs = evaluation.TRANSFORM(reduced), evaluation.TRANSFORM(full)
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    assert evaluation.load_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)
