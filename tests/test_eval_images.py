"""Pictures as cameras and programs write them, and what an unreadable one costs."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import eval as evaluation
from eval import list_images, load_image
from model import InputError
from tests.course_driver.tiny_data import texture

COLOR = texture(3, 64, 48)
GRAY = np.asarray(COLOR.convert("L"), dtype=np.float64)
DARK = GRAY / 2  # a picture at dusk: the upper values are not used


def saved(values: np.ndarray, name: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        Image.fromarray(values).save(folder / name)
        return folder / name

    return save


def bits(gray: np.ndarray, count: int) -> np.ndarray:
    return np.round(gray / 255 * (2**count - 1)).astype(np.uint16)


def turned(folder: Path) -> Path:
    """Stored on its side, with a note how to hold it."""
    image = COLOR.transpose(Image.Transpose.ROTATE_90)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "a.png", exif=exif)
    return folder / "a.png"


def converted(mode: str, name: str = "a.png") -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        COLOR.convert(mode).save(folder / name)
        return folder / name

    return save


def paletted(folder: Path) -> Path:
    COLOR.quantize(256).save(folder / "a.png")
    return folder / "a.png"


# How the picture is written, what is expected, and how far (of 255, in the mean) it may be off.
FORMS = {
    "10 bits in 16": (saved(bits(GRAY, 10), "a.png"), GRAY, 1),
    "12 bits in 16": (saved(bits(GRAY, 12), "a.png"), GRAY, 1),
    "14 bits in 16": (saved(bits(GRAY, 14), "a.tif"), GRAY, 1),
    "16 bits": (saved(bits(GRAY, 16), "a.png"), GRAY, 1),
    "16 bits at dusk": (saved(bits(DARK, 16), "a.png"), DARK, 1),
    "8 bits in 16": (saved(GRAY.astype(np.uint16), "a.png"), GRAY, 0),
    "floats to 1": (saved((GRAY / 255).astype(np.float32), "a.tif"), GRAY, 1),
    "floats to 255": (saved(GRAY.astype(np.float32), "a.tif"), GRAY, 0),
    "floats with holes": (
        saved(np.where(np.eye(48, 64) > 0, np.nan, GRAY / 255).astype(np.float32), "a.tif"),
        np.where(np.eye(48, 64) > 0, 0, GRAY),
        1,
    ),
    "32 bits": (saved((GRAY * 1e6).astype(np.int32), "a.tif"), GRAY, 35),
    "palette": (paletted, None, 10),
    "gray with alpha": (converted("LA"), GRAY, 0),
    "color with alpha": (converted("RGBA"), None, 0),
    "for printing": (converted("CMYK", "a.tif"), None, 1),
    "held on its side": (turned, None, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form, tmp_path):
    save, expected, off = FORMS[form]
    found = load_image(save(tmp_path))
    assert found.mode == "RGB" and found.size == COLOR.size
    values = np.asarray(COLOR, float) if expected is None else expected[..., None].repeat(3, 2)
    assert np.abs(np.asarray(found, dtype=float) - values).mean() <= off


@pytest.mark.parametrize(
    "values",
    [
        29000 + 10 * GRAY,
        7000 + 4 * GRAY,
        np.where(GRAY < np.sort(GRAY, axis=None)[3], 65535, 29000 + 10 * GRAY),
    ],
    ids=["hundredths of a kelvin", "14 bits", "with hot pixels"],
)
def test_temperatures_are_stretched(values, tmp_path):
    Image.fromarray(values.round().astype(np.uint16)).save(tmp_path / "a.png")
    found = np.asarray(load_image(tmp_path / "a.png"), dtype=float)[..., 0]
    cool = values < 65535
    assert np.corrcoef(found[cool], GRAY[cool])[0, 1] > 0.99 and np.ptp(found[cool]) > 240


@pytest.mark.parametrize("value", [0, 7, 32768, 65535, -3.0, np.nan, 1e9])
def test_plain_pictures_are_no_trouble(value, tmp_path):
    kind = np.float32 if isinstance(value, float) else np.uint16
    Image.fromarray(np.full((4, 4), value, dtype=kind)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").size == (4, 4)


def test_the_same_place_is_found_first_in_any_form(tmp_path, checkpoint, capsys):
    index = tmp_path / "index"
    index.mkdir()
    Image.fromarray(GRAY.astype(np.uint8)).save(index / "right.png")
    for seed in range(10, 18):
        texture(seed, 64, 48).convert("L").save(index / f"other_{seed}.png")
    (index / "cut_short.png").write_bytes((index / "right.png").read_bytes()[:200])
    (index / "page.jpg").write_text("<html>not found</html>")
    (index / "._right.png").write_bytes(b"side file of a Mac")
    (index / "moving.gif").write_bytes(b"GIF89a")
    queries = []
    for name in (
        "10 bits in 16",
        "12 bits in 16",
        "14 bits in 16",
        "floats to 1",
        "gray with alpha",
    ):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        queries.append(str(FORMS[name][0](folder)))
    thermal = tmp_path / "thermal.png"
    Image.fromarray((29000 + 10 * GRAY).astype(np.uint16)).save(thermal)
    argv = [
        "--checkpoint",
        str(checkpoint),
        "--index",
        str(index),
        "--device",
        "cpu",
        "--top-k",
        "1",
    ]
    assert evaluation.main([*argv, "--query", *queries, str(thermal)]) == 0
    said = capsys.readouterr()
    found = re.findall(r"^ +1  \S+  (.*)$", said.out, re.MULTILINE)
    assert found == [str(index / "right.png")] * 6
    assert "6 queries, 9 images" in said.out
    warnings = said.err.strip().splitlines()
    assert len(warnings) == 2 and all(line.startswith("WARNING: ") for line in warnings)
    assert re.search(r"1 files of a kind that is not read \(moving.gif", warnings[0])
    assert re.search(
        r"2 of 11 images are left out: the image .*cut_short.png cannot be read", warnings[1]
    )


def test_a_query_or_a_whole_index_that_cannot_be_read_is_refused(tmp_path, checkpoint, capsys):
    index = tmp_path / "index"
    index.mkdir()
    (index / "a.png").write_bytes(b"no image")
    COLOR.save(tmp_path / "query.png")
    argv = ["--checkpoint", str(checkpoint), "--index", str(index), "--device", "cpu", "--query"]
    assert evaluation.main([*argv, str(tmp_path / "query.png")]) == 2
    assert "no image of" in capsys.readouterr().err
    COLOR.save(index / "a.png")
    assert evaluation.main([*argv, str(tmp_path / "nothing.png")]) == 2
    assert "nothing.png does not exist: correct the name" in capsys.readouterr().err


def test_too_many_pixels_are_told_to_be_made_fewer(tmp_path, monkeypatch):
    COLOR.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="a.png has more than .* pixels: make it smaller"):
        load_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of what it passes over
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_damaged_files_are_named_whatever_pillow_raises(suffix, tmp_path):
    file = tmp_path / f"a.{suffix}"
    exif = COLOR.getexif()
    exif[0x0112] = 6
    ImageOps.mirror(COLOR).save(file, exif=exif)
    content, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, min(len(content), 400), 3):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            assert load_image(file).mode == "RGB"
        except InputError as error:
            assert str(file) in str(error)


def test_images_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    names = ["frame_1.png", "frame_2.png", "frame_10.png", "img (9).png", "img (10).png"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == names
    padded = tmp_path / "below"
    padded.mkdir()
    for name in ("a-1.png", "a1.png", "a_01.png", "B.png", "a.png", "0009.png", "0010.png"):
        (padded / name).touch()
    assert list_images(padded) == sorted(padded.iterdir())  # where plain order is right, it stays
