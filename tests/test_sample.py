"""The built-in sample: layout, exact truth, determinism, thresholds."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import sample
from dataset.sample import FULL, SPLITS, TINY, Camera, Quad


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample") / "tiny"
    sample.render_sample(root, workers=1, quiet=True, size=TINY)
    return root


def quaternion_to_rotation(q):
    x, y, z, w = q
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                     [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                     [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])


def read_lines(path):
    return path.read_text().splitlines()


def test_layout_is_the_assignments(tiny):
    for split in SPLITS:
        counts = []
        for kind in ("query", "index"):
            lines = read_lines(tiny / f"{kind}_{split}.txt")
            counts.append(len(lines))
            for line in lines:
                assert line.startswith(f"dataset/{kind}/{split}_")
                with Image.open(tiny / line.removeprefix("dataset/")) as image:
                    assert image.size == TINY.town_px and image.mode == "RGB"
        assert tuple(counts) == getattr(TINY, split)
        truth = np.load(tiny / "gt" / f"pitts30k_{split}.npz")
        assert truth["utmQ"].shape == (counts[0], 2) and truth["utmDb"].shape == (counts[1], 2)
        assert truth["utmQ"].dtype == truth["utmDb"].dtype == np.float64
        assert truth["posDistThr"].shape == () and truth["posDistThr"] == 25.0
    assert sorted(p.name for p in (tiny / "camera").iterdir()) == ["P001", "P002"]
    for scene in ("P001", "P002"):
        folder = tiny / "camera" / scene
        assert sorted(p.name for p in folder.iterdir()) == ["images", "pose.txt"]
        names = sorted(p.name for p in (folder / "images").iterdir())
        assert names == [f"{i:06d}.png" for i in range(TINY.frames)]
        assert len(read_lines(folder / "pose.txt")) == TINY.frames
        with Image.open(folder / "images" / names[0]) as image:
            assert image.size == TINY.room_px and image.mode == "RGB"


def test_positions_in_the_files_are_the_planned_ones(tiny):
    for split in SPLITS:
        queries, index, utm_q, utm_db = sample.plan_town(split, TINY, 0)
        truth = np.load(tiny / "gt" / f"pitts30k_{split}.npz")
        np.testing.assert_array_equal(truth["utmQ"], utm_q)
        np.testing.assert_array_equal(truth["utmDb"], utm_db)
        assert [s.name for s in queries] == read_lines(tiny / f"query_{split}.txt")
        assert [s.name for s in index] == read_lines(tiny / f"index_{split}.txt")


def test_pictures_show_something(tiny):
    for path in [*tiny.glob("index/*.jpg"), *tiny.glob("camera/*/images/*.png")]:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"), float)
        assert 40 < grey.mean() < 220 and grey.std() > 15, path
        assert (grey > 254).mean() < 0.25, path


@pytest.mark.parametrize("seed", [0, 1])
def test_thresholds_of_the_full_town(seed):
    everything = []
    for split in SPLITS:
        queries, index, utm_q, utm_db = sample.plan_town(split, FULL, seed)
        assert (len(queries), len(index)) == getattr(FULL, split)
        distance = np.linalg.norm(utm_q[:, None] - utm_db[None], axis=2)
        near = (distance <= 25).sum(1)
        assert near.min() >= 1 and near.max() <= 8
        assert (distance > 250).any(1).all()
        assert near.mean() / len(index) < 0.05  # chance
        street_q, street_db = (np.array([s.street for s in shots]) for shots in (queries, index))
        assert distance[street_q[:, None] != street_db[None]].min() > 50
        everything.append(np.concatenate([utm_q, utm_db]))
    for i in range(3):
        for j in range(i):
            gap = np.linalg.norm(everything[i][:, None] - everything[j][None], axis=2).min()
            assert gap > 500


def test_training_places_can_be_cut_apart():
    _, _, utm_q, utm_db = sample.plan_town("train", FULL, 0)
    rows = np.unique(utm_db[:, 1].round(-1) // 90)
    north = np.sort(utm_q[:, 1])
    gaps = np.diff(north)
    assert len(rows) == 10 and (gaps > 50).sum() == 9  # cuts that drop nobody


def test_queries_differ_from_the_index():
    queries, index, _, _ = sample.plan_town("val", FULL, 0)
    rng = np.random.default_rng(0)
    light = {flag: [sample.draw_weather(rng, flag) for _ in range(60)] for flag in (True, False)}
    spread = {flag: np.std([math.log(w.ambient.mean() * w.exposure) for w in light[flag]]) for flag in light}
    assert spread[True] > 3 * spread[False]
    assert {s.position for s in queries}.isdisjoint(s.position for s in index)


@pytest.mark.parametrize("scene", range(4))
@pytest.mark.parametrize("seed", [0, 3])
def test_flight_is_a_drones(scene, seed):
    room = sample.build_room(scene, seed)
    poses = sample.fly(room, FULL.frames, np.random.default_rng([seed, 11, scene]))
    assert len(poses) == FULL.frames
    centers = np.array([c for _, c in poses])
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
    assert 0.25 <= steps.min() and steps.max() <= 0.6
    rolls = []
    for R, _ in poses:
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(R) > 0
        forward, right = R[:, 0], R[:, 1]
        level = np.cross([0, 0, 1], forward)
        rolls.append(math.degrees(math.asin(np.clip(right[2] / np.linalg.norm(level), -1, 1))))
    assert 12 < np.abs(rolls).max() < 35 and min(rolls) < -5 and max(rolls) > 5
    turns = [math.degrees(math.acos((np.trace(a[0].T @ b[0]) - 1) / 2)) for a, b in pairwise(poses)]
    assert np.median(turns) > 3


@pytest.mark.parametrize("scene", range(4))
def test_camera_keeps_clear_of_everything(scene):
    """No wall or box within 30 cm: nearest point of every quad to every camera center."""
    room = sample.build_room(scene, 0)
    for _, center in sample.fly(room, FULL.frames, np.random.default_rng([0, 11, scene])):
        for quad in room.quads:
            axes = np.stack([quad.right, quad.down], 1)
            share = np.clip(np.linalg.lstsq(axes, center - quad.origin, rcond=None)[0], 0, 1)
            assert np.linalg.norm(quad.origin + axes @ share - center) > 0.3


def test_pose_file_holds_the_flight(tiny):
    room = sample.build_room(1, 0)
    rows = np.loadtxt(tiny / "camera" / "P002" / "pose.txt")
    assert rows.shape == (TINY.frames, 7)
    np.testing.assert_allclose(np.linalg.norm(rows[:, 3:], axis=1), 1, atol=1e-8)
    for row, (R, center) in zip(rows, sample.fly(room, TINY.frames, np.random.default_rng([0, 11, 1]))):
        np.testing.assert_allclose(row[:3], center, atol=1e-8)
        np.testing.assert_allclose(quaternion_to_rotation(row[3:]), R, atol=1e-7)


def test_quaternion_round_trip_includes_half_turns():
    rng = np.random.default_rng(5)
    for yaw, pitch, roll in [(180, 0, 0), (0, 0, 180), (180, 0, 180), *rng.uniform(-180, 180, (50, 3))]:
        R = sample.rotation(yaw, pitch, roll)
        np.testing.assert_allclose(quaternion_to_rotation(sample.quaternion(R)), R, atol=1e-12)


@pytest.mark.parametrize("case", range(6))
def test_a_mark_appears_where_the_pose_says(case):
    """A black disc on a white wall, seen obliquely by a rolled camera: its centroid in the picture is
    the mean projection of its points (weighed by the area each covers) to within 0.02 px."""
    rng = np.random.default_rng(case)
    R = sample.rotation(rng.uniform(-40, 40), rng.uniform(-20, 20), rng.uniform(-30, 30))
    center = rng.uniform(-1, 1, 3)
    width, height, focal = 640, 480, 320.0
    camera = Camera(width, height, focal, (320.0, 240.0), R, center)
    middle = center + R @ [4.0, rng.uniform(-2, 2), rng.uniform(-1.5, 1.5)]
    frame = sample.rotation(rng.uniform(-30, 30), rng.uniform(-30, 30), rng.uniform(-90, 90))
    right, down = frame[:, 1] * 1.2, frame[:, 2] * 1.2
    px = 256
    grid = (np.arange(px) + 0.5) / px - 0.5
    disc = np.hypot(grid[:, None], grid[None]) < 0.3
    paint = np.zeros((px, px, 4), np.float32)
    paint[..., :3] = np.where(disc, 0.0, 1.0)[..., None]
    quads = [Quad(middle - right / 2 - down / 2, right, down, 0)]
    atlas = sample.pack_textures([paint], quads)
    white = torch.ones(1, 3)
    image = sample.render(quads, atlas, camera, lambda q, a, b: white,
                          lambda ray: white.expand(len(ray), 3)).numpy()[..., 0]
    dark = 1.0 - image
    v, u = np.mgrid[:height, :width]
    seen = np.array([(dark * u).sum(), (dark * v).sum()]) / dark.sum()

    fine = (np.arange(1000) + 0.5) / 1000 - 0.5
    b, a = np.meshgrid(fine, fine, indexing="ij")
    inside = np.hypot(a, b) < 0.3
    points = middle + a[inside][:, None] * right + b[inside][:, None] * down
    local = (points - center) @ R  # forward, right, down
    expected = np.stack([focal * local[:, 1] / local[:, 0] + 320, focal * local[:, 2] / local[:, 0] + 240], 1)
    area = local[:, 0] ** -3  # of the picture that a bit of one plane covers, up to a constant
    np.testing.assert_allclose(seen, (expected * area[:, None]).sum(0) / area.sum(), atol=0.02)


def test_nearest_quad_hides_the_rest_and_cutouts_blend():
    camera = Camera(40, 30, 20.0, (20.0, 15.0), np.eye(3), np.zeros(3))

    def square(depth, half, texture, cutout=False):
        return Quad(np.array([depth, -half, -half]), np.array([0, 2 * half, 0.0]),
                    np.array([0, 0, 2 * half]), texture, cutout=cutout)

    colors = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0.25)]
    paints = [np.tile(np.array(c, np.float32), (4, 4, 1)) for c in colors]
    quads = [square(2, 0.5, 1), square(4, 2, 0), square(1, 0.05, 2, cutout=True), square(8, 9, 2, cutout=True)]
    image = sample.render(quads, sample.pack_textures(paints, quads), camera,
                          lambda q, a, b: torch.ones(3), torch.zeros_like).numpy()
    np.testing.assert_allclose(image[15, 20], (0, 0.75, 0.25), atol=1e-6)  # cutout over green
    np.testing.assert_allclose(image[15, 23], (0, 1, 0), atol=1e-6)  # green before red
    np.testing.assert_allclose(image[15, 27], (1, 0, 0), atol=1e-6)
    np.testing.assert_allclose(image[15, 37], (0, 0, 0.25), atol=1e-6)  # cutout before nothing


def test_distant_texture_is_its_mean():
    """A fine checkerboard far away neither shimmers nor shifts: every pixel is the mean grey."""
    camera = Camera(64, 48, 32.0, (32.0, 24.0), np.eye(3), np.zeros(3))
    paint = np.zeros((64, 64, 4), np.float32)
    paint[..., :3] = (np.indices((64, 64)).sum(0) % 2)[..., None]
    quads = [Quad(np.array([20.0, -30, -30]), np.array([0, 60.0, 0]), np.array([0, 0, 60.0]), 0, (60.0, 60.0))]
    image = sample.render(quads, sample.pack_textures([paint], quads), camera,
                          lambda q, a, b: torch.ones(3), torch.zeros_like).numpy()
    np.testing.assert_allclose(image[10:-10, 10:-10], 0.5, atol=0.02)


def test_the_same_for_any_number_of_workers(tiny, tmp_path):
    few = sample.Size(train=(3, 5), val=(2, 4), test=(2, 4), town_px=(64, 48), scenes=1, frames=3, room_px=(96, 72))
    for workers in (1, 3):
        sample.render_sample(tmp_path / str(workers), workers=workers, quiet=True, size=few)
    sample.render_sample(tmp_path / "other", seed=1, workers=2, quiet=True, size=few)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) == 6 + 3 + 20 + 3 + 1 + 1
    for name in files:
        one, three, other = ((tmp_path / folder / name).read_bytes() for folder in ("1", "3", "other"))
        assert name.suffix == ".npz" or one == three, name
        if name.suffix in (".jpg", ".png"):
            assert one != other, name


def test_threads_are_left_as_they_were(tmp_path):
    few = sample.Size(train=(1, 1), val=(1, 1), test=(1, 1), town_px=(32, 24), scenes=0, frames=0)
    before = torch.get_num_threads()
    sample.render_sample(tmp_path / "s", workers=1, quiet=True, size=few)
    assert torch.get_num_threads() == before


def test_is_rendered_knows_seed_size_and_code(tiny, tmp_path):
    assert sample.is_rendered(tiny, size=TINY)
    assert not sample.is_rendered(tiny)
    assert not sample.is_rendered(tiny, seed=1, size=TINY)
    assert not sample.is_rendered(tmp_path / "nowhere")
    (tmp_path / "sample.json").write_text("{")
    assert not sample.is_rendered(tmp_path)
    stored = json.loads((tiny / "sample.json").read_text())
    (tmp_path / "sample.json").write_text(json.dumps({**stored, "code": "older"}))
    assert not sample.is_rendered(tmp_path, size=TINY)


def test_a_rendering_cut_short_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "photograph", fail)
    with pytest.raises(ValueError, match="too full"):
        sample.render_sample(tmp_path / "sample", workers=2, quiet=True, size=TINY)
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a rendered sample"):
        sample.render_sample(tmp_path, size=TINY, quiet=True)
    assert (tmp_path / "holiday.txt").read_text() == "mine"
    assert sample.main(["--output", str(tmp_path)]) == 2
    assert "not a rendered sample" in capsys.readouterr().err
