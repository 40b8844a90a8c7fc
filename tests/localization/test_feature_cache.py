"""The cache of local features: same answers, no collisions, bounded."""

import os

import pytest
import torch

from localization import feature_cache
from localization.feature_cache import features_of_files
from localization.features import extract_features
from model import WARNINGS


def image(seed: int) -> torch.Tensor:
    return torch.rand(48, 64, generator=torch.Generator().manual_seed(seed))


def read(name: str) -> torch.Tensor:
    return image(int(name[0]))


def test_features_from_the_cache_are_those_of_the_image(tmp_path, monkeypatch):
    """Sixteen equal frames at once do not disturb each other; a second run computes nothing."""
    names = [f"{i % 2}{i}" for i in range(16)]
    first = features_of_files(names, read, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(feature_cache, "extract_features", None)
    second = features_of_files(names, read, tmp_path)
    for name, (a, size), (b, _) in zip(names, first, second, strict=True):
        expected = extract_features(read(name))
        assert size == (64, 48) and len(expected) > 0
        for value, other, right in zip(*(vars(f).values() for f in (a, b, expected)), strict=True):
            assert torch.equal(value, right) and torch.equal(other, right)


def test_an_entry_cut_short_is_made_anew(tmp_path):
    features_of_files(["3"], read, tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    ((found, _),) = features_of_files(["3"], read, tmp_path)
    assert torch.equal(found.xy_px, extract_features(image(3)).xy_px)
    assert len(entry.read_bytes()) == len(whole)


def test_the_longest_unused_entries_leave_a_full_cache(tmp_path, monkeypatch, capsys):
    for day, name in enumerate("1234"):
        before = set(tmp_path.iterdir())
        features_of_files([name], read, tmp_path)
        (new,) = set(tmp_path.iterdir()) - before
        os.utime(new, (day, day))
    kept = sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime)
    sizes = [f.stat().st_size for f in kept]
    features_of_files(["1"], read, tmp_path)  # used today, so no longer the oldest
    monkeypatch.setattr(feature_cache, "LIMIT_BYTES", sizes[0] + sizes[3])
    features_of_files(["1"], read, tmp_path)
    assert set(tmp_path.iterdir()) == {kept[0], kept[3]}
    assert str(tmp_path) in capsys.readouterr().out


def test_without_a_folder_nothing_is_kept_and_one_that_cannot_be_written_is_said(tmp_path):
    ((found, _),) = features_of_files(["5"], read, None)
    assert torch.equal(found.xy_px, extract_features(image(5)).xy_px)
    (tmp_path / "file").touch()
    ((same, _),) = features_of_files(["5"], read, tmp_path / "file")
    assert torch.equal(found.xy_px, same.xy_px)
    assert any(str(tmp_path / "file") in text and "--no-cache" in text for text in WARNINGS)


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    large = torch.rand(240, 320, generator=torch.Generator().manual_seed(5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        ((found, _),) = features_of_files(["5"], lambda _name: large, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(found) > 100
    assert not list(tmp_path.iterdir()) and "--no-cache" in WARNINGS[0]


def test_a_cache_that_can_only_be_read_serves(tmp_path, monkeypatch):
    features_of_files(["6", "7"], read, tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    monkeypatch.setattr(feature_cache, "extract_features", None)
    monkeypatch.setattr(feature_cache, "LIMIT_BYTES", 0)
    ((found, _),) = features_of_files(["6"], read, tmp_path)
    assert torch.equal(found.xy_px, extract_features(image(6)).xy_px) and not WARNINGS


@pytest.fixture(autouse=True)
def fresh_warnings():
    kept = list(WARNINGS)
    WARNINGS.clear()
    yield
    WARNINGS[:] = kept


def test_a_damaged_entry_is_made_anew_and_all_may_read_it(tmp_path):
    """PyTorch reads damaged numbers as they are."""
    features_of_files(["3"], read, tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(whole[:middle] + bytes(255 - b for b in whole[middle : middle + 64]) + whole[middle + 64 :])
    ((found, _),) = features_of_files(["3"], read, tmp_path)
    for value, right in zip(vars(found).values(), vars(extract_features(image(3))).values(), strict=True):
        assert torch.equal(value, right)
    other = tmp_path / "by any program"
    other.touch()
    assert entry.stat().st_mode == other.stat().st_mode
