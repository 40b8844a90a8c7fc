"""intrinsics.txt in its usual forms, and the size of image it belongs to."""

import re
from collections import Counter

import pytest
from PIL import Image

from localization.cameras import Camera
from localization.lens_files import given_camera, image_sizes, read_intrinsics
from model import WARNINGS, InputError

SIZES = Counter({(640, 480): 5})
CAMERA = Camera(535.4, 539.2, 320.1, 247.6, 640, 480)


def read(folder, text, sizes=SIZES):
    file = folder / "intrinsics.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_intrinsics(file, sizes)


FORMS = {
    "four numbers": "535.4 539.2 320.1 247.6\n",
    "on two lines": "535.4 539.2\n\n 320.1 247.6",
    "commas": "535.4, 539.2, 320.1, 247.6",
    "brackets": "[[535.4, 539.2, 320.1, 247.6]]",
    "a comment": "# fx fy cx cy\n535.4 539.2 320.1 247.6  # px",
    "UTF-16": "535.4 539.2 320.1 247.6".encode("utf-16"),
    "3x3": "535.4 0 320.1\n0 539.2 247.6\n0 0 1\n",
    "3x3 by columns": "535.4 0 0\n0 539.2 0\n320.1 247.6 1\n",
    "4x4": "535.4 0 320.1 0\n0 539.2 247.6 0\n0 0 1 0\n0 0 0 1\n",
    "no distortion": "535.4 539.2 320.1 247.6 0 0 0 0",
    "COLMAP": "# CAMERA_ID, MODEL, …\n1 PINHOLE 640 480 535.4 539.2 320.6 248.1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_camera(form, tmp_path):
    found = read(tmp_path, FORMS[form])
    assert vars(found) == pytest.approx(vars(CAMERA), abs=1e-9) and not WARNINGS


def test_distortion(tmp_path):
    found = read(tmp_path, "535.4 539.2 320.1 247.6 -0.02 0.01 0 0")
    assert (found.k1, found.k2) == (-0.02, 0.01) and not WARNINGS
    assert read(tmp_path, "535.4 539.2 320.1 247.6 -0.02 0.01").k2 == 0.01
    assert read(tmp_path, "1 OPENCV 640 480 500 500 320 240 0.1 0.2 0 0").k2 == 0.2
    assert read(tmp_path, "1 SIMPLE_RADIAL 640 480 500 320 240 0.1").k1 == 0.1
    found = read(tmp_path, "535.4 539.2 320.1 247.6 -0.02 0.01 0.003 -0.004")
    assert (found.k1, found.p1, found.p2) == (-0.02, 0.003, -0.004)
    assert not WARNINGS
    assert read(tmp_path, "535.4 539.2 320.1 247.6 -0.02 0.01 0.003 0 0.1").k1 == -0.02
    assert len(WARNINGS) == 1 and re.search("intrinsics.txt.* k3 is left out", WARNINGS[0])


@pytest.mark.parametrize(
    ("size", "ratio"),
    [
        ((320, 240), 2),
        ((213, 160), 3),
        ((1280, 960), 1 / 2),
        ((1920, 1440), 1 / 3),
        ((427, 320), 1.5),
    ],
)
def test_numbers_of_another_size_are_scaled_and_said(size, ratio, tmp_path):
    found = read(tmp_path, FORMS["four numbers"], Counter({size: 3}))
    assert (found.width, found.height) == size
    assert found.fx == pytest.approx(535.4 / ratio) and found.fy == pytest.approx(539.2 / ratio)
    assert found.cx == pytest.approx((320.1 + 0.5) / ratio - 0.5)
    assert len(WARNINGS) == 1 and re.search(r"320.1 247.6.* divided by", WARNINGS[0])


def test_the_size_is_the_one_the_center_is_the_middle_of(tmp_path):
    sizes = Counter({(480, 640): 9, (640, 480): 2, (320, 240): 9})
    assert read(tmp_path, FORMS["four numbers"], sizes) == CAMERA
    assert read(tmp_path, "535 535 240 320", sizes).height == 640
    assert not WARNINGS
    # An off-center lens of all images stays what it is.
    assert read(tmp_path, "535 535 330 170") == Camera(535, 535, 330, 170, 640, 480)
    assert not WARNINGS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("535.4 320.1 247.6", "holds 3 values: it must hold fx fy cx cy"),
        ("fx 535.4", "'fx'.* no number"),
        ("0 500 320 240", "positive, .*found fx=0"),
        ("nan 500 320 240", "not finite"),
        ("1 2 3 4 5 6 7", "7 values"),
        ("535.4 539.2 20 247.6", "20 247.6 is outside the middle half of the 640x480 images"),
        ("535.4 320.1 539.2 247.6", "320.1|539.2.*outside"),
        ("1 OPENCV_FISHEYE 640 480 5 5 320 240 0 0 0 0", "line 1: .*undistort"),
        ("1 PINHOLE 640 480 535.4 320 240", "line 1: 1|CAMERA_ID PINHOLE WIDTH HEIGHT fx fy cx cy"),
        ("1 PINHOLE 0 480 535.4 535.4 320 240", "size must be positive, .*0x480"),
        ("1 RADIAL 640 480 500 320 240 1e9 0", "the distortion 1e.09 is that of no lens"),
        ("", "holds 0 values"),
        (b"\xff\xff\xff", "UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        read(tmp_path, text)
    assert "intrinsics.txt" in str(error.value) and "\n" not in str(error.value)


def test_sizes_are_those_of_upright_images(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [tmp_path / name for name in ("turned.jpg", "plain.png", "broken.png")]
    assert image_sizes(paths) == {(10, 20): 1, (20, 10): 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("287 288 158 104,5", "commas stand for decimal points"),
        ("287,5 288 158,2 104", "commas stand for decimal points"),
        ("535.4 539.2 320.1 247.6 5", "distortion 5 is that of no lens"),
        ("535.4 539.2 320.1 247.6 -3 0.1", "distortion -3 is that of no lens"),
    ],
)
def test_numbers_out_of_place_are_one_sentence(text, says, tmp_path):
    with pytest.raises(InputError, match=f"intrinsics.txt.*{says}"):
        read(tmp_path, text)


def test_a_lens_that_is_given_must_be_of_the_image_or_is_scaled():
    assert given_camera("--it", [535.4, 539.2, 320.1, 247.6], (640, 480)) == CAMERA
    half = given_camera("--it", [535.4, 539.2, 320.1, 247.6], (320, 240))
    assert half.fx == pytest.approx(267.7) and "divided by 2" in WARNINGS[-1]
    for values in ([35, 35, 320, 240], [1, 1, 320, 240], [1e300, 1e300, 320, 240]):
        with pytest.raises(InputError, match="--it: focal lengths of .* belong to no image of 640x480"):
            given_camera("--it", values, (640, 480))
    with pytest.raises(InputError, match="--it: the center 5000 5000 is outside"):
        given_camera("--it", [500, 500, 5000, 5000], (640, 480))
