"""Checkpoints as others save them, and files that are none."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model import WARNINGS, InputError, NetVLADModel, load_checkpoint

NANNE = {
    "trunk.": "encoder.",
    "netvlad.assignment.": "pool.conv.",
    "netvlad.centers": "pool.centroids",
}


@pytest.fixture(scope="module")
def model() -> NetVLADModel:
    torch.manual_seed(0)
    model = NetVLADModel(3, pretrained=False).eval()
    torch.nn.init.zeros_(model.netvlad.assignment.bias)
    return model


@pytest.fixture(scope="module")
def state(model) -> dict[str, torch.Tensor]:
    return model.state_dict()


def renamed(state: dict, names: dict[str, str]) -> dict:
    out = {}
    for name, values in state.items():
        for ours, theirs in names.items():
            name = re.sub("^" + re.escape(ours), theirs, name)
        out[name] = values
    return out


def nanne(state: dict) -> dict:
    """As pytorch-NetVlad saves it: no bias (vladv2 is off), each part in its own DataParallel."""
    plain = renamed(state, NANNE)
    del plain["pool.conv.bias"]
    return renamed(plain, {"encoder.": "encoder.module.", "pool.": "pool.module."})


FORMS = {
    "plain": lambda state: state,
    "DataParallel": lambda state: renamed(state, {"": "module."}),
    "torch.compile of DataParallel": lambda state: renamed(state, {"": "_orig_mod.module."}),
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "model": lambda state: {"model": renamed(state, {"": "module."})},
    "half precision": lambda state: {name: values.half() for name, values in state.items()},
    "pytorch-NetVlad": lambda state: {"state_dict": nanne(state), "recalls": {1: 0.8}},
    "Patch-NetVLAD": lambda state: {
        "state_dict": renamed(state, NANNE)
        | {"WPCA.0.weight": torch.zeros(2, 1536, 1, 1), "WPCA.0.bias": torch.zeros(2)}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_descriptors(form, model, state, tmp_path):
    file = tmp_path / "a.pth"
    torch.save(FORMS[form](state), file)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = load_checkpoint(file)(images), model(images)
    assert (found - expected).abs().max() < (1e-3 if form == "half precision" else 1e-7)
    assert [("WPCA" in line) for line in WARNINGS] == [True] * (form == "Patch-NetVLAD")
    file.unlink()


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5 reads no number of numpy"
)
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_scores_that_any_numpy_wrote_are_read(module, state, tmp_path):
    file = tmp_path / "a.pth"
    scores = {"recalls": {1: np.float64(0.8), 5: np.float32(0.9)}, "best_score": np.float64(0.8)}
    torch.save({"state_dict": nanne(state), **scores}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    written = re.search(rb"numpy\._?core\.multiarray", content)[0]
    file.write_bytes(content.replace(written, module))
    assert torch.equal(load_checkpoint(file).netvlad.centers, state["netvlad.centers"])
    file.unlink()


def test_a_netvlad_checkpoint_is_taken_for_the_trunk_s_weights(state, tmp_path):
    for name, content in (("ours", state), ("theirs", {"state_dict": nanne(state)})):
        torch.save(content, tmp_path / f"{name}.pth")
        other = NetVLADModel(2, pretrained=False, weights=tmp_path / f"{name}.pth")
        assert torch.equal(other.trunk[0].weight, state["trunk.0.weight"])
        (tmp_path / f"{name}.pth").unlink()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def changed(model, change) -> dict:
    state = model.state_dict()
    return {**state, "trunk.2.weight": change(state["trunk.2.weight"])}


def spoiled(state: dict, value: float) -> dict:
    weight = state["trunk.2.weight"].clone()
    weight[0, 0, 1, 1] = value
    return {**state, "trunk.2.weight": weight}


REFUSED = {
    "a whole model": (
        lambda model, _: model,
        r"holds pickled objects \(model.NetVLADModel\).*state_dict\(\)",
    ),
    "code": (lambda model, path: {"a": Runs(path / "ran")}, "holds pickled objects"),
    "nan": (lambda model, _: spoiled(model.state_dict(), np.nan), r"not finite \(trunk.2.weight\)"),
    "inf": (lambda model, _: spoiled(model.state_dict(), np.inf), r"not finite \(trunk.2.weight\)"),
    "8 bits": (
        lambda model, _: changed(model, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        r"no plain numbers \(trunk.2.weight is torch.qint8\)",
    ),
    "sparse": (lambda model, _: changed(model, torch.Tensor.to_sparse), "no plain numbers"),
    "without values": (lambda model, _: changed(model, lambda w: w.to("meta")), "is meta"),
    "no clusters": (
        lambda model, _: {**model.state_dict(), "netvlad.centers": torch.zeros(0, 512)},
        "has no netvlad.centers",
    ),
    "another network": (lambda *_: torch.nn.Linear(2, 2).state_dict(), "has no netvlad.centers"),
    "a nested dict": (lambda *_: {"state_dict": {"a": {}}}, "holds no plain state dict"),
    "a tensor": (lambda *_: torch.zeros(2), "holds no plain state dict"),
    "numbers for names": (lambda *_: {0: torch.zeros(2)}, "has no netvlad.centers"),
}
FILES = {
    "no bytes": (b"", "is empty: copy or download it again"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
        "Git LFS pointer.* git lfs pull",
    ),
    "a web page": (b"<!DOCTYPE html>" * 9, "cannot be read as a PyTorch state dict"),
}


@pytest.mark.parametrize("name", [*REFUSED, *FILES])
def test_what_is_no_weights_is_one_sentence_and_never_run(name, model, tmp_path):
    file = tmp_path / "a.pth"
    if name in FILES:
        content, says = FILES[name]
        file.write_bytes(content)
    else:
        make, says = REFUSED[name]
        torch.save(make(model, tmp_path), file)
    with pytest.raises(InputError, match=says) as error:
        load_checkpoint(file)
    assert "a.pth" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    file.unlink()


def test_missing_files_and_folders_are_named(tmp_path):
    for file, says in ((tmp_path / "no.pth", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(InputError, match=says):
            load_checkpoint(file)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's own
def test_no_damage_raises_anything_but_an_input_error(tmp_path):
    """Of a small file: damage to 59 MB would seldom meet what is not weights."""
    file = tmp_path / "a.pth"
    for zipped in (True, False):
        torch.save({"netvlad.centers": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
        content, rng = file.read_bytes(), np.random.default_rng(0)
        for _ in range(150):
            damaged = bytearray(content)
            for at in rng.integers(0, len(content), 4):
                damaged[at] = rng.integers(256)
            file.write_bytes(damaged[: rng.integers(1, len(content) + 1)])
            with pytest.raises(InputError):
                load_checkpoint(file)
