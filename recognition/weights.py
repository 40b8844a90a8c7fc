"""Files of weights: read without running anything in them, and the names that published systems use."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from model import DAMAGED, DescriptorModel, InputError, refuse_what_holds_nothing, tensors_in

HEADS = ("fc.", "classifier.")  # of a classification network: not needed


# ---------------------------------------------------------------- files


class _LeftOut:
    """Stands for whatever in a file is neither a tensor nor a plain value: numpy's, Lightning's."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __call__(self, *_args: object, **_kwargs: object) -> "_LeftOut":
        return self

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _item: object) -> None:
        """Items of list-like objects."""

    def extend(self, _items: object) -> None:
        """Items of list-like objects."""


KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors and ordered dictionaries only; storages are PyTorch's own affair."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in KNOWN:
            return super().find_class(module, name)
        return _LeftOut


# What torch.load asks of a `pickle_module`.
TENSORS_ONLY = SimpleNamespace(
    __name__="tensors_only",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def read_file(path: Path) -> dict:
    """The dictionary in a file of torch.save. Objects of other kinds than tensors are left out.

    InputError if the file is not there, damaged or holds something else.
    """
    refuse_what_holds_nothing(path)
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # recalls in numpy's numbers, Lightning's settings
            found = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=TENSORS_ONLY
            )
    except (*DAMAGED, AttributeError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} cannot be read as PyTorch weights (damaged, cut short or another kind of file; "
            f"{type(error).__name__}): name another file."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no weights: name a file of torch.save(model.state_dict()).")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as model.tensors_in finds them. InputError if there are none."""
    return tensors_in(read_file(path), path)


def load_fitting(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load a state dict into a module, which may be on the meta device.

    Keys of classification heads may lack or be in excess. InputError naming the first key that does
    not fit.
    """
    wanted = {k: v for k, v in module.state_dict().items() if not k.startswith(HEADS)}
    given = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked"):  # files of old versions lack it
            given.setdefault(key, torch.zeros((), dtype=torch.long))
        if key not in given:
            raise InputError(
                f"{source} does not fit: it has no {key}; name weights of this network."
            )
        if given[key].shape != value.shape:
            shapes = f"{tuple(given[key].shape)}, not {tuple(value.shape)}"
            raise InputError(f"{source} does not fit: its {key} is {shapes}.")
    if excess := sorted(given.keys() - wanted.keys()):
        raise InputError(f"{source} does not fit: there is no place for its {excess[0]}.")
    module.load_state_dict(given, strict=False, assign=True)


# ---------------------------------------------------------------- names of published systems


@dataclass(frozen=True)
class System:
    """A published system: its recipe and aggregation, a key that only its files have, its names as ours.

    names: patterns and what they become, tried in this order on every key; None drops the key.
    """

    recipe: str
    aggregations: tuple[str, ...]
    mark: str
    names: tuple[tuple[str, str | None], ...]


# Of torchvision's ResNets, by name -> by number in our trunk.
RESNET = tuple(
    (rf"^backbone\.model\.{name}\.", f"trunk.{number}.")
    for name, number in (("conv1", 0), ("bn1", 1), ("layer1", 4), ("layer2", 5), ("layer3", 6))
) + ((r"^backbone\.model\.layer4\.", "trunk.7."),)
SYSTEMS = {
    "SuperVLAD": System(
        "supervlad",
        ("supervlad",),
        r"^backbone\.blocks\.",
        (
            (r"^backbone\.mask_token$", None),
            (r"^backbone\.", "trunk."),
            (r"^aggregation\.conv\.weight$", "aggregation.assignment.weight"),
            (r"^encoder\.", "aggregation.encoder."),
        ),
    ),
    "CosPlace or EigenPlaces": System(
        "cosplace",
        ("gem",),
        r"^aggregation\.[23]\.weight$",
        (
            (r"^backbone\.0\.(\d+\.)", r"trunk.\1"),  # of EfficientNets, one level deeper
            (r"^backbone\.", "trunk."),
            (r"^aggregation\.1\.p$", "aggregation.pool.p"),
            (r"^aggregation\.[23]\.(weight|bias)$", r"aggregation.fc.\1"),
        ),
    ),
    "MixVPR": System(
        "mixvpr",
        ("mixvpr",),
        r"^aggregator\.mix\.",
        (
            *RESNET,
            (r"^aggregator\.", "aggregation."),
        ),
    ),
    "ConvAP": System(
        "convap",
        ("convap",),
        r"^aggregator\.channel_pool\.",
        (
            *RESNET,
            (r"^aggregator\.", "aggregation."),
        ),
    ),
    "SALAD": System(
        "salad",
        ("salad",),
        r"^aggregator\.dust_bin$",
        (
            (r"^backbone\.model\.mask_token$", None),
            (r"^backbone\.model\.", "trunk."),
            (r"^aggregator\.", "aggregation."),
        ),
    ),
    "the NetVLAD benchmark": System(
        "netvlad",
        ("netvlad", "gem"),
        r"^backbone\.\d+\.",
        (
            (r"^backbone\.", "trunk."),
            (r"^aggregation\.(?:0\.)?conv\.weight$", "aggregation.assignment.weight"),
            (r"^aggregation\.(?:0\.)?centroids$", "aggregation.centers"),
            (r"^aggregation\.(?:0\.)?[01]\.p$", "aggregation.p"),
            (r"^aggregation\.1\.(weight|bias)$", r"aggregation.fc.\1"),
        ),
    ),
}


def system_of(state: Mapping[str, Tensor]) -> str | None:
    """Whose names a state dict has, of SYSTEMS; None for those of nobody."""
    for name, system in SYSTEMS.items():
        if any(re.search(system.mark, key) for key in state):
            return name
    return None


def ours(state: Mapping[str, Tensor], model: DescriptorModel) -> dict[str, Tensor]:
    """A published system's state dict under the names of the model; others as they are."""
    name = system_of(state)
    wanted = model.state_dict()
    # The stages of a transformer's trunk have numbers before the official names.
    staged = {re.sub(r"^trunk\.\d\.", "trunk.", key): key for key in wanted}
    renamed = {}
    for key, value in state.items():
        for pattern, new in SYSTEMS[name].names if name else ():
            if new is None and re.search(pattern, key):
                break
            key = re.sub(pattern, new or "", key)
        else:
            renamed[staged.get(key, key) if key not in wanted else key] = value
    if "aggregation.fc.weight" in wanted:  # there the pooling lies one level deeper
        pools = {k: k.replace("aggregation.", "aggregation.pool.") for k in renamed}
        renamed = {pools[k] if pools[k] in wanted else k: value for k, value in renamed.items()}
    for key in wanted:  # the benchmark's NetVLAD assigns without bias
        if key.endswith("assignment.bias") and key.replace("bias", "weight") in renamed:
            renamed.setdefault(key, torch.zeros_like(wanted[key]))
    return renamed
