"""The textures: (height, width, 4) float32 display values, the fourth channel what glows."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rng = np.random.Generator
TOWN_PX_PER_M = 32


def canvas(width: int, height: int, color) -> np.ndarray:
    """An image of one color, fourth channel 0."""
    image = np.zeros((height, width, 4), np.float32)
    image[..., :3] = color
    return image


def noise(rng: Rng, width: int, height: int, fall: float = 1.0) -> np.ndarray:
    """Tileable noise (height, width) with amplitude 1/frequency**fall, mean 0, deviation 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)).astype(np.float32))
    fy, fx = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * height
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum / frequency**fall, (height, width))
    return (field / field.std()).astype(np.float32)


def weather(rng: Rng, image: np.ndarray, amount: float, fall: float) -> np.ndarray:
    """`image` with blotches or speckles: its brightness times 1 + amount * noise, tiled."""
    height, width = image.shape[:2]
    field = noise(rng, min(width, 256), min(height, 256), fall)
    field = field.take(np.arange(height), 0, mode="wrap").take(np.arange(width), 1, mode="wrap")
    image[..., :3] *= 1 + amount * field[..., None]
    return image


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Display color of hue, saturation, value, all 0..1 (hue wraps)."""
    k = (np.array([5, 3, 1]) + hue % 1 * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def any_color(rng: Rng, saturation=(0.2, 0.8), value=(0.2, 0.7)) -> np.ndarray:
    """A color people paint things in: reds, ochres, greens, blues."""
    hue = rng.choice([0.0, 0.03, 0.07, 0.1, 0.14, 0.28, 0.38, 0.5, 0.57, 0.62])
    return hsv(hue + rng.normal(0, 0.02), rng.uniform(*saturation), rng.uniform(*value))


def box(image: np.ndarray, x, y, w, h, color, glow: float = 0.0) -> None:
    """Fill a rectangle given in pixels; it may stick out."""
    rows = slice(max(0, round(y)), max(0, round(y + h)))
    part = image[rows, max(0, round(x)) : max(0, round(x + w))]
    part[..., :3] = color
    part[..., 3] = glow


def write(image: np.ndarray, text: str, x, y, w, h, color) -> None:
    """Write `text` as large as fits, centered in a rectangle given in pixels."""
    left, top, right, bottom = ImageFont.load_default(40).getbbox(text)
    size = 40 * min(w / (right - left), h / (bottom - top))
    mask = Image.new("L", (image.shape[1], image.shape[0]))
    font = ImageFont.load_default(max(5, size))
    ImageDraw.Draw(mask).text((x + w / 2, y + h / 2), text, 255, font, anchor="mm")
    share = np.asarray(mask, np.float32)[..., None] / 255
    image[..., :3] += (np.asarray(color, np.float32) - image[..., :3]) * share


def blocks(rng: Rng, width, height, bw: int, bh: int, color, joint, spread: float) -> np.ndarray:
    """A wall of bricks or stones bw x bh pixels in running bond, each of its own shade."""
    y, x = np.ogrid[:height, :width]
    row = y // bh
    x = x + row % 2 * (bw // 2)
    image = canvas(width, height, color)
    shades = 1 + spread * rng.standard_normal((height // bh + 1, width // bw + 2, 1))
    image[..., :3] *= shades[row, x // bw]
    image[(y % bh == 0) | (x % bw == 0), :3] = joint
    return image


def facade(rng: Rng, width_m: float) -> np.ndarray:
    """The front of a house, TOWN_PX_PER_M pixels a meter: its wall, windows, and shop or home."""
    m = TOWN_PX_PER_M
    floors, storey, ground = int(rng.integers(1, 4)), rng.uniform(2.6, 3.2), rng.uniform(3.1, 3.8)
    width, height = round(width_m * m), round((ground + floors * storey + 0.6) * m)
    base, color = height - ground * m, any_color(rng, (0.1, 0.5), (0.4, 0.85))
    kind = rng.choice(["brick", "stone", "stucco"])
    if kind == "stucco":
        image = canvas(width, height, color)
    else:
        size, spread = (
            ((10, 4), 0.13) if kind == "brick" else ((int(rng.integers(16, 30)), 12), 0.09)
        )
        image = blocks(rng, width, height, *size, color, color * rng.uniform(0.6, 1.2), spread)
    weather(rng, image, 0.06, 1.2)
    trim = any_color(rng, (0, 0.25), (0.3, 0.9))
    count = max(1, round(width_m / rng.uniform(1.7, 3.2)))
    pitch = width / count
    w, h = round(pitch * rng.uniform(0.35, 0.6)), round(rng.uniform(1.2, 2.0) * m)
    pane = window(rng, w, h)
    shutter = any_color(rng) if rng.random() < 0.4 else None
    for y in (base - (np.arange(floors) + 0.75) * storey * m).round().astype(int):
        for x in ((np.arange(count) + 0.5) * pitch - w / 2).round().astype(int):
            image[y : y + h, x : x + w] = pane
            box(image, x - 4, y + h, w + 8, 4, trim)
            if shutter is not None:
                box(image, x - 0.4 * w, y, 0.36 * w, h, shutter)
                box(image, x + 1.04 * w, y, 0.36 * w, h, shutter)
    box(image, 0, base, width, 5, trim)
    box(image, 0, 0, width, rng.uniform(6, 16), trim * 0.9)
    (_shop if rng.random() < 0.5 else _home)(rng, image, base)
    x, color = rng.uniform(0.1, 0.9) * (width - 1.2 * m), any_color(rng, (0.3, 0.8), (0.2, 0.55))
    box(image, x - 4, height - 2.45 * m, m + 8, 2.45 * m, trim)
    box(image, x, height - 2.35 * m, m, 2.35 * m, color)
    box(image, x + 4, height - 1.7 * m, m - 8, 1.3 * m, color * 0.7)
    return image


def window(rng: Rng, w: int, h: int) -> np.ndarray:
    """Frame, panes, and glass that mirrors the sky."""
    image = canvas(w, h, any_color(rng, (0, 0.5), (0.2, 0.95)))
    columns, lines = rng.integers(1, 4, 2)
    pw, ph = (w - 2) / columns, (h - 2) / lines
    for i, j in np.ndindex(columns, lines):
        box(image, 2 + i * pw, 2 + j * ph, pw - 2, ph - 2, (0.13, 0.15, 0.18), 0.6)
    return image


def _shop(rng: Rng, image: np.ndarray, base: float) -> None:
    """Shop windows with goods on show and a name, below pixel row `base` of a facade."""
    m, (height, width) = TOWN_PX_PER_M, image.shape[:2]
    board = any_color(rng, (0.2, 0.9), (0.15, 0.9))
    box(image, 5, base + 8, width - 10, height - base - 8, board * 0.7)
    pane = (width - 20) / int(rng.integers(1, 4))
    for x in np.arange(10, width - 11, pane):
        box(image, x, base + 0.8 * m, pane - 5, 1.75 * m, (0.2, 0.2, 0.22), 0.5)
        for _ in range(5):
            w, h = rng.uniform(5, 14), rng.uniform(0.15, 0.8) * m
            box(image, x + rng.uniform(3, pane - 22), base + 2.5 * m - h, w, h, any_color(rng), 0.2)
    box(image, 5, base + 8, width - 10, 0.62 * m, board)
    name = "".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUW"), rng.integers(3, 7)))
    ink = 0.95 if board.mean() < 0.5 else 0.1
    write(image, name, 0.1 * width, base + 10, 0.8 * width, 0.5 * m, ink)


def _home(rng: Rng, image: np.ndarray, base: float) -> None:
    """A row of windows below pixel row `base` of a facade."""
    m, width = TOWN_PX_PER_M, image.shape[1]
    w, h, y = round(rng.uniform(0.7, 1.3) * m), round(rng.uniform(1.1, 1.6) * m), round(base + 24)
    pane = window(rng, w, h)
    for x in range(12, width - w - 6, w + round(rng.uniform(0.5, 1.2) * m)):
        image[y : y + h, x : x + w] = pane


def street(rng: Rng, length_m: float, width_m: float) -> np.ndarray:
    """Road and pavements seen from above, 16 pixels a meter."""
    m, w, h = 16, round(length_m * 16), round(width_m * 16)
    image = weather(rng, canvas(w, h, rng.uniform(0.3, 0.42)), 0.07, 0.6)
    slabs = blocks(rng, w, h, 10, 8, hsv(0.1, 0.08, rng.uniform(0.5, 0.65)), np.full(3, 0.4), 0.05)
    walk = round(rng.uniform(2.4, 3.2) * m)
    for part in (np.s_[:walk], np.s_[h - walk :]):
        image[part] = slabs[part]
    for y in (walk, h - walk - 3):
        box(image, 0, y, w, 3, 0.62)
    for x in range(0, w, 5 * m):
        box(image, x, h / 2 - 1, 2.5 * m, 2, 0.75)
    for _ in range(8):  # patches
        x, y = rng.uniform(0, w), rng.uniform(walk, h - walk - 30)
        box(image, x, y, rng.uniform(8, 60), rng.uniform(8, 30), rng.uniform(0.22, 0.4))
    return image


def van(rng: Rng) -> np.ndarray:
    """The side of a parked van, 128 x 64 pixels."""
    image = canvas(128, 64, any_color(rng, (0, 0.8), (0.2, 0.95)))
    box(image, 8, 8, 34, 20, (0.12, 0.14, 0.17), 0.4)
    box(image, 0, 52, 128, 12, 0.1)
    y, x = np.mgrid[:64, :128]
    for wheel in (24, 104):
        far = np.hypot(x - wheel, y - 52)
        image[far < 12, :3], image[far < 6, :3] = 0.04, 0.5
    return image


def tiles(rng: Rng, px: int, color: np.ndarray, joint: float, speckle: float) -> np.ndarray:
    """2 x 2 floor tiles, speckled; repeating it repeats them exactly."""
    image = canvas(px, px, color)
    shade = 1 + 0.05 * rng.standard_normal((2, 2, 1))
    image[..., :3] *= np.kron(shade, np.ones((px // 2, px // 2, 1)))
    weather(rng, image, speckle, 0.5)
    y, x = np.mgrid[:px, :px] % (px // 2)
    image[(x < 3) | (y < 3), :3] = color * joint
    return image


def plaster(rng: Rng, color: np.ndarray, rail: np.ndarray) -> np.ndarray:
    """A plain wall with faint blotches, a skirting board and a guard rail, 512 x 448 pixels."""
    image = weather(rng, weather(rng, canvas(512, 448, color), 0.02, 1.3), 0.012, 0.6)
    box(image, 0, 432, 512, 16, color * 0.45)
    box(image, 0, 296, 512, 24, rail)
    box(image, 0, 0, 2, 448, color * 0.8)
    return image


def door(rng: Rng, glazed: bool) -> np.ndarray:
    """A door in its frame, 176 x 352 pixels."""
    color = any_color(rng, (0.3, 0.5), (0.5, 0.6))
    image = canvas(176, 352, color * 0.6)
    box(image, 12, 12, 152, 340, color)
    weather(rng, image, 0.035, 0.9)
    for x, y, w, h in ((30, 190, 50, 130), (96, 190, 50, 130), (30, 36, 116, 124)):
        box(image, x, y, w, h, color * 0.82)
        panel = (0.25, 0.3, 0.33) if glazed and w > 50 else color * 1.05
        box(image, x + 4, y + 4, w - 4, h - 4, panel)
    box(image, 140, 170, 16, 16, 0.6)
    return image


def picture(rng: Rng) -> np.ndarray:
    """A framed picture that exists once, 192 x 144 pixels."""
    image = canvas(178, 130, any_color(rng, (0.2, 0.6), (0.8, 0.9)))
    y, x = np.mgrid[:130, :178]
    for _ in range(24):
        spot = np.hypot(x - rng.uniform(0, 178), (y - rng.uniform(0, 130)) * rng.uniform(0.7, 2))
        image[spot < rng.uniform(3, 25), :3] = any_color(rng)
    framed = canvas(192, 144, any_color(rng, (0, 0.6), (0.1, 0.6)))
    framed[7:-7, 7:-7] = weather(rng, image, 0.06, 0.7)
    return framed


def sign(text: str, color: np.ndarray) -> np.ndarray:
    """A sign with large letters, 128 x 72 pixels."""
    image = canvas(128, 72, color)
    write(image, text, 12, 12, 104, 48, 0.95)
    return image


def wood(rng: Rng, color: np.ndarray) -> np.ndarray:
    """Two boards with their grain along x, 256 x 64 pixels."""
    image = weather(rng, canvas(256, 64, color), 0.04, 0.4)
    image[..., :3] *= 1 + 0.1 * np.repeat(noise(rng, 32, 64, 0.8), 8, axis=1)[..., None]
    box(image, 0, 31, 256, 3, color * 0.35)
    return image
