"""Local features of image files, kept in a folder so that a picture is looked at once."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from localization import features as local_features
from localization.features import Features, extract_features
from localization.map import load, save
from localization.threads import in_threads
from model import InputError, warn

LIMIT_BYTES = 1 << 30  # what the folder holds at most; the entries longest unused go first


def features_of_files(
    paths: Sequence[Path],
    read_gray: Callable[[Path], Tensor],
    folder: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Features, tuple[int, int]]]:
    """Local features and (width, height) of each file, those in the cache `folder` (None: no cache)
    from there.

    read_gray: (H, W) float in 0..1 of a file. Says how much the cache holds.
    """
    found = in_threads(lambda path: _features(read_gray(path), folder), paths, progress)
    if folder is not None and folder.is_dir():
        size = bound(folder)
        print(
            f"{folder} holds {size / 1e6:.0f} MB of features and maps (at most {LIMIT_BYTES >> 20} MiB)."
        )
    return found


def _features(gray: Tensor, folder: Path | None) -> tuple[Features, tuple[int, int]]:
    """The key is made of the pixels and of the source of features.py, which holds all settings."""
    size = (gray.shape[1], gray.shape[0])
    if folder is None:
        return extract_features(gray), size
    key = hashlib.sha256(Path(local_features.__file__).read_bytes())
    key.update(repr(size).encode() + gray.numpy().tobytes())
    file = folder / f"{key.hexdigest()[:32]}.pt"
    try:
        known = load(file, Features)
        touch(file)
        return known, size
    except InputError:
        pass  # not there or cut short
    found = extract_features(gray)
    try:
        save(found, file)
    except OSError as error:
        warn(
            f"local features cannot be kept in {folder} ({error.strerror or error}): use --no-cache."
        )
    return found, size


def bound(folder: Path) -> int:
    """Remove what was not used for longest until LIMIT_BYTES hold; the bytes that stay."""
    entries = sorted(
        (*folder.glob("*.pt"), *folder.glob("*.part")), key=lambda file: -_stat(file)[0]
    )
    size = 0
    for file in entries:
        bytes_ = _stat(file)[1]
        if size + bytes_ > LIMIT_BYTES:
            with contextlib.suppress(OSError):  # a cache that can only be read
                file.unlink(missing_ok=True)
        else:
            size += bytes_
    return size


def touch(file: Path) -> None:
    """Mark an entry as used now, where the cache can be written."""
    with contextlib.suppress(OSError):
        os.utime(file)


def _stat(file: Path) -> tuple[float, int]:
    """Time of last use and bytes of a file, zeros if another run removed it."""
    try:
        found = file.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size
