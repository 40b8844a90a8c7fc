"""The built-in sample: layout, exact truth, determinism, whole or not at all."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.sample import FULL, TINY, Size, is_rendered, render_sample, rooms, town
from dataset.sample.__main__ import main
from dataset.sample.render import Camera, Light, Quad, Scene, render, rotation
from training.places import split_by_place

FEW = Size((1, 0, 0), (1, 1), 2, (64, 48), scenes=1, frames=2, room_px=(96, 72))


def quaternion_to_rotation(q):
    x, y, z, w = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def positions(split, seed):
    """utmQ, utmDb of a split of the full town."""
    streets = FULL.streets[town.SPLITS.index(split)]
    panoramas = town.plan_town(split, streets, *FULL.panoramas, FULL.yaws, seed)
    kinds = ([p for p in panoramas if p.is_query == kind] for kind in (True, False))
    return tuple(np.array([p.utm_m for p in some for _ in p.views_deg]) for some in kinds)


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def even_light(quads):
    ones = np.ones((len(quads), 4))
    return Light(ones, ones[:, :3], 0 * ones[:, :3])


def see(scene, camera):
    """The picture under even light of brightness 1, white where there is no quad."""
    return render(scene.quads, scene.atlas(), camera, even_light(scene.quads), torch.ones_like)


def test_layout_is_the_assignments(sample):
    for split in town.SPLITS:
        truth = np.load(sample / "gt" / f"pitts30k_{split}.npz")
        assert truth["posDistThr"].shape == () and truth["posDistThr"] == 25.0
        for kind, key in (("query", "utmQ"), ("index", "utmDb")):
            lines = (sample / f"{kind}_{split}.txt").read_text().splitlines()
            assert truth[key].shape == (len(lines), 2) and truth[key].dtype == np.float64
            for line in lines:
                assert line.startswith(f"dataset/{kind}/{split}_")
                with Image.open(sample / line.removeprefix("dataset/")) as image:
                    assert image.size == TINY.town_px and image.mode == "RGB"
    assert sorted(p.name for p in (sample / "camera").iterdir()) == ["P001", "P002"]
    for scene in (sample / "camera").iterdir():
        assert sorted(p.name for p in scene.iterdir()) == ["images", "pose.txt"]
        names = sorted(p.name for p in (scene / "images").iterdir())
        assert names == [f"{i:06d}.png" for i in range(TINY.frames)]
        assert len((scene / "pose.txt").read_text().splitlines()) == TINY.frames
        with Image.open(scene / "images" / names[0]) as image:
            assert image.size == TINY.room_px and image.mode == "RGB"


def test_the_town_has_the_shape_of_pittsburgh():
    """Panoramas cut into views at one position: 10 m apart in the index, others between them."""
    for seed in (0, 1):
        for split, streets in zip(town.SPLITS, FULL.streets, strict=True):
            utm_query, utm_index = positions(split, seed)
            queries, places = (
                np.unique(utm, axis=0, return_counts=True) for utm in (utm_query, utm_index)
            )
            assert set(queries[1]) == {FULL.yaws} and set(places[1]) == {2 * FULL.yaws}
            assert len(places[0]) == streets * FULL.panoramas[1]
            between = distances(places[0], places[0])
            np.fill_diagonal(between, np.inf)
            assert 8 <= between.min(1).min() and between.min(1).max() < 13
            nearest = distances(utm_query, utm_index).min(1)
            assert nearest.max() < town.POS_DIST_THR_M
            assert (nearest > 10).sum() == (FULL.yaws if split == "train" else 0)
            assert nearest.min() > 0


def test_streets_are_places_of_their_own():
    """Of other streets all is a negative; no two splits share a place; the
    training queries are cut by place as they are 80/10/10, whatever the seed."""
    for seed in (0, 1):
        utm = {split: positions(split, seed) for split in town.SPLITS}
        for split, (queries, index) in utm.items():
            away = distances(queries, index)
            assert ((away < 2 * town.POS_DIST_THR_M) | (away > 10 * town.POS_DIST_THR_M)).all()
            for other in set(town.SPLITS) - {split}:
                assert distances(index, np.concatenate(utm[other])).min() > 500
        for split_seed in range(5):
            parts, dropped = split_by_place(*utm["train"], town.POS_DIST_THR_M, split_seed)
            assert [len(rows) for rows in parts.values()] == [160, 20, 20] and dropped == 0


def test_queries_are_of_darker_days_than_the_index():
    rng = np.random.default_rng(0)
    suns = [[town.draw_day(rng, kind).sun.mean() for _ in range(40)] for kind in (True, False)]
    assert max(suns[0]) < min(suns[1])


def test_pictures_show_something(sample):
    for path in [*sample.glob("*/*.jpg"), *sample.glob("camera/*/images/*.png")]:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"), float)
        assert 40 < grey.mean() < 220 and grey.std() > 15, path
        assert (grey > 254).mean() < 0.25, path


@pytest.mark.parametrize("scene", range(4))
@pytest.mark.parametrize("seed", [0, 3])
def test_flight_is_a_drones_and_keeps_clear_of_everything(scene, seed):
    """No wall or box within 30 cm: nearest point of every quad to every camera center."""
    room = rooms.build_room(scene, seed)
    rows = rooms.fly(rooms.PLANS[scene], FULL.frames, np.random.default_rng([seed, 11, scene]))
    steps = np.linalg.norm(np.diff(rows[:, :3], axis=0), axis=1)
    assert len(rows) == FULL.frames and 0.25 <= steps.min() and steps.max() <= 0.6
    assert 12 < np.abs(rows[:, 5]).max() < 35 and rows[:, 5].min() < -5 and rows[:, 5].max() > 5
    poses = [rotation(*row[3:]) for row in rows]
    turns = [math.degrees(math.acos((np.trace(a.T @ b) - 1) / 2)) for a, b in pairwise(poses)]
    assert np.median(turns) > 3
    for quad in room.quads:
        axes = np.stack([quad.right, quad.down], 1)
        share = np.clip(np.linalg.pinv(axes) @ (rows[:, :3] - quad.origin).T, 0, 1)
        nearest = quad.origin + (axes @ share).T
        assert np.linalg.norm(nearest - rows[:, :3], axis=1).min() > 0.3


def test_pose_file_holds_the_flight(sample):
    rows = np.loadtxt(sample / "camera" / "P002" / "pose.txt")
    flown = rooms.fly(rooms.PLANS[1], TINY.frames, np.random.default_rng([0, 11, 1]))
    np.testing.assert_allclose(rows[:, :3], flown[:, :3], atol=1e-8)
    for row, pose in zip(rows, flown, strict=True):
        np.testing.assert_allclose(quaternion_to_rotation(row[3:]), rotation(*pose[3:]), atol=1e-7)


def test_quaternion_of_any_angles_is_that_of_their_rotation():
    rng = np.random.default_rng(5)
    for angles in [(180, 0, 0), (0, 0, 180), (180, 0, 180), *rng.uniform(-180, 180, (50, 3))]:
        turned = quaternion_to_rotation(rooms.quaternion(*angles))
        np.testing.assert_allclose(turned, rotation(*angles), atol=1e-12)


@pytest.mark.parametrize("case", range(6))
def test_a_mark_appears_where_the_pose_says(case):
    """A black disc on a white wall, seen obliquely by a rolled camera: its centroid in the picture
    is the mean projection of its points (weighed by the area each covers) to within 0.02 px."""
    rng = np.random.default_rng(case)
    R = rotation(rng.uniform(-40, 40), rng.uniform(-20, 20), rng.uniform(-30, 30))
    center = rng.uniform(-1, 1, 3)
    camera = Camera(640, 480, 320.0, (320.0, 240.0), R, center)
    middle = center + R @ [4.0, rng.uniform(-2, 2), rng.uniform(-1.5, 1.5)]
    plane = rotation(rng.uniform(-30, 30), rng.uniform(-30, 30), rng.uniform(-90, 90))
    right, down = plane[:, 1] * 1.2, plane[:, 2] * 1.2
    scene = Scene()
    grid = (np.arange(256) + 0.5) / 256 - 0.5
    image = np.zeros((256, 256, 4), np.float32)
    image[np.hypot(grid[:, None], grid) >= 0.3, :3] = 1
    scene.quads.append(Quad(middle - right / 2 - down / 2, right, down, scene.paint(image)))
    dark = 1.0 - see(scene, camera)[..., 0]
    v, u = np.mgrid[:480, :640]
    seen = np.array([(dark * u).sum(), (dark * v).sum()]) / dark.sum()

    fine = (np.arange(1000) + 0.5) / 1000 - 0.5
    b, a = np.meshgrid(fine, fine, indexing="ij")
    inside = np.hypot(a, b) < 0.3
    points = middle + a[inside][:, None] * right + b[inside][:, None] * down
    forward, across, below = ((points - center) @ R).T
    expected = np.stack([320 * across / forward + 320, 320 * below / forward + 240])
    area = forward**-3  # of the picture that a bit of one plane covers, up to a constant
    np.testing.assert_allclose(seen, (expected * area).sum(1) / area.sum(), atol=0.02)


def square(scene, depth_m, half_m, color, repeat=(1.0, 1.0)):
    """A square across the x axis, seen from the origin."""
    texture = scene.paint(np.tile(np.array(color, np.float32), (4, 4, 1)))
    origin, edge = np.array([depth_m, -half_m, -half_m]), 2 * half_m * np.eye(3)
    scene.quads.append(Quad(origin, edge[1], edge[2], texture, repeat))


def test_the_nearest_quad_is_seen_and_none_from_behind():
    camera, scene = Camera(40, 30, 20.0, (20.0, 15.0), np.eye(3), np.zeros(3)), Scene()
    square(scene, 2, 0.5, (0, 1, 0, 0))
    square(scene, 4, 2, (1, 0, 0, 0))
    square(scene, -3, 9, (0, 0, 1, 0))  # behind the camera
    square(scene, 1, 0.5, (0, 0, 1, 0))
    nearest = scene.quads[-1]
    back = Quad(nearest.origin + nearest.right, -nearest.right, nearest.down, nearest.texture)
    scene.quads[-1] = back
    image = see(scene, camera)
    np.testing.assert_allclose(image[15, 23], (0, 1, 0), atol=1e-6)  # green before red
    np.testing.assert_allclose(image[15, 27], (1, 0, 0), atol=1e-6)
    np.testing.assert_allclose(image[15, 37], (1, 1, 1), atol=1e-6)  # nothing


def test_distant_texture_is_its_mean():
    """A fine checkerboard far away neither shimmers nor shifts: every pixel is the mean grey."""
    camera, scene = Camera(64, 48, 32.0, (32.0, 24.0), np.eye(3), np.zeros(3)), Scene()
    square(scene, 20, 30, (0, 0, 0, 0), (60.0, 60.0))
    scene.textures[0] = np.zeros((64, 64, 4), np.float32)
    scene.textures[0][..., :3] = (np.indices((64, 64)).sum(0) % 2)[..., None]
    np.testing.assert_allclose(see(scene, camera)[10:-10, 10:-10], 0.5, atol=0.02)


def test_light_runs_evenly_from_corner_to_corner():
    camera, scene = Camera(40, 40, 20.0, (20.0, 20.0), np.eye(3), np.zeros(3)), Scene()
    square(scene, 1, 1, (1, 1, 1, 0))
    light = Light(np.array([[0.0, 1.0, 2.0, 5.0]]), np.ones((1, 3)), np.zeros((1, 3)))
    image = render(scene.quads, scene.atlas(), camera, light, torch.zeros_like)
    np.testing.assert_allclose(image[20, 20], 2.0, atol=1e-5)  # the middle: the corners' mean
    np.testing.assert_allclose(
        image[10, 30], 0.75 * 0.75 * 1 + 0.25 * (0.25 * 2 + 0.75 * 5), atol=1e-5
    )


def test_the_same_for_any_number_of_workers(tmp_path):
    threads = torch.get_num_threads()
    for workers in (1, 3):
        render_sample(tmp_path / str(workers), workers=workers, size=FEW)
    render_sample(tmp_path / "other", seed=1, workers=2, size=FEW)
    assert torch.get_num_threads() == threads
    paths = [p for p in (tmp_path / "1").rglob("*") if p.suffix in (".jpg", ".png", ".txt")]
    assert len(paths) == 4 + 2 + 2 + 6 + 1
    for path in paths:
        name = path.relative_to(tmp_path / "1")
        one, three, other = ((tmp_path / run / name).read_bytes() for run in ("1", "3", "other"))
        assert one == three, name
        assert path.suffix == ".txt" or one != other, name


def test_a_rendering_of_another_seed_size_or_version_is_not_taken(sample, tmp_path):
    assert is_rendered(sample, size=TINY)
    assert not is_rendered(sample)
    assert not is_rendered(sample, seed=1, size=TINY)
    assert not is_rendered(tmp_path / "nowhere")
    (tmp_path / "sample.json").write_text("{")
    assert not is_rendered(tmp_path)
    stored = json.loads((sample / "sample.json").read_text())
    (tmp_path / "sample.json").write_text(json.dumps({**stored, "code": "older"}))
    assert not is_rendered(tmp_path, size=TINY)
    (tmp_path / "old.jpg").touch()
    render_sample(tmp_path, size=FEW)  # an older one is replaced
    assert is_rendered(tmp_path, size=FEW) and not (tmp_path / "old.jpg").exists()


def test_a_rendering_cut_short_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(town, "photograph", fail)
    with pytest.raises(ValueError, match="No space left"):
        render_sample(tmp_path / "sample", workers=2, size=FEW)
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.txt").write_text("mine")
    assert main(["--output", str(tmp_path)]) == 2
    assert "not a rendered sample" in capsys.readouterr().err
    assert (tmp_path / "holiday.txt").read_text() == "mine"
