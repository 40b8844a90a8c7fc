"""Published systems as rows of one table, and their models: built, saved, loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model import DescriptorModel, InputError, described_settings, load_checkpoint
from recognition import vit
from recognition.aggregation import (
    AGGREGATION_SETTINGS,
    AGGREGATIONS,
    build_aggregation,
    fit_to,
)
from recognition.backbones import BACKBONES, build_trunk
from recognition.inference import RESIZE, framing
from recognition.weights import (
    SYSTEMS,
    load_fitting,
    ours,
    read_file,
    read_weights,
    system_of,
)

OWN_SIZE_PX = 512  # a side in a search, of models whose images keep their sizes


@dataclass(frozen=True)
class Recipe:
    """A system: family (families.py) + backbone + aggregation + other settings than the command line's."""

    family: str
    backbone: str
    aggregation: str
    settings: dict = field(default_factory=dict)

    @property
    def defaults(self) -> dict:
        """All of it, by the names of the command line."""
        return {"backbone": self.backbone, "aggregation": self.aggregation, **self.settings}


RECIPES = {
    # Berton et al., "Deep Visual Geo-localization Benchmark", CVPR 2022; Arandjelovic et al. 2016
    "netvlad": Recipe(
        "benchmark",
        "resnet18conv4",
        "netvlad",
        {
            "criterion": "triplet",
            "mining": "partial",
            "epochs_num": 1000,
            "patience": 3,
            "lr": 1e-5,
        },
    ),
    # Lu et al., "SuperVLAD", NeurIPS 2024
    "supervlad": Recipe(
        "gsv_cities",
        "dino",
        "supervlad",
        {
            "supervlad_clusters": 4,
            "ghost_clusters": 1,
            "resize": [322, 322],
            "train_resize": [224, 224],
            "train_batch_size": 120,
            "epochs_num": 20,
            "patience": 3,
            "lr": 5e-5,
            "scheduler": "step",
            "scheduler_epochs": 3,
            "scheduler_factor": 0.5,
            "recall_values": [1, 5, 10, 100],
        },
    ),
    # Ali-bey et al., "MixVPR", WACV 2023
    "mixvpr": Recipe(
        "gsv_cities",
        "resnet50conv4",
        "mixvpr",
        {
            "resize": [320, 320],
            "train_resize": [320, 320],
            "train_batch_size": 120,
            "epochs_num": 80,
            "patience": 10,
            "optim": "sgd",
            "lr": 0.05,
            "warmup_epochs": 1.25,  # 650 steps
            "scheduler": "multistep",
            "scheduler_milestones": [5, 10, 15, 25, 45],
        },
    ),
    # Izquierdo & Civera, "Optimal Transport Aggregation for Visual Place Recognition", CVPR 2024
    "salad": Recipe(
        "gsv_cities",
        "dino",
        "salad",
        {
            "resize": [322, 322],
            "train_resize": [224, 224],
            "train_batch_size": 60,
            "epochs_num": 4,
            "patience": 4,
            "optim": "adamw",
            "weight_decay": 9.5e-9,
            "lr": 6e-5,
        },
    ),
    # Ali-bey et al., "GSV-Cities", Neurocomputing 2022
    "convap": Recipe(
        "gsv_cities",
        "resnet50conv5",
        "convap",
        {
            "resize": [320, 320],
            "train_resize": [320, 320],
            "train_batch_size": 100,
            "epochs_num": 30,
            "patience": 10,
            "optim": "adamw",
            "weight_decay": 0.0,
            "lr": 2e-4,
            "warmup_epochs": 1.0,  # 600 steps
            "scheduler": "multistep",
            "scheduler_milestones": [5, 10, 15, 25],
        },
    ),
    # Berton et al., "Rethinking Visual Geo-localization for Large-Scale Applications", CVPR 2022
    "cosplace": Recipe(
        "cosplace",
        "ResNet18",
        "gem",
        {"fc_output_dim": 512, "epochs_num": 50, "lr": 1e-5, "resize": []},  # native size
    ),
}
ARCHITECTURE = ("backbone", "freeze_te", "aggregation", *AGGREGATION_SETTINGS)


def build_model(
    settings: Mapping, weights: str | None = "random", size: tuple[int, int] | None = None
) -> DescriptorModel:
    """The model of ARCHITECTURE's settings. weights: as for build_trunk.

    size: height and width of images, where layers whose shape depends on it are to be made at once.
    """
    for name, known in (("backbone", BACKBONES), ("aggregation", AGGREGATIONS)):
        if settings[name] not in known:
            raise InputError(
                f"the {name} {settings[name]} is none of this program's ({', '.join(known)})."
            )
    backbone, aggregation = BACKBONES[settings["backbone"]], settings["aggregation"]
    is_vit, freeze_te = backbone.network in vit.SIZES, settings.get("freeze_te")
    with_class = aggregation == "salad"
    if with_class and not is_vit:
        raise InputError(
            f"--aggregation salad needs a class token, which {settings['backbone']} lacks: give "
            "--backbone dino."
        )
    if is_vit:
        trunk, origin = vit.build_vit(backbone.network, weights, freeze_te, with_class)
    else:
        trunk, origin = build_trunk(settings["backbone"], weights)
    given = {name: settings[name] for name in AGGREGATION_SETTINGS if name in settings}
    layer, dim = build_aggregation(aggregation, backbone.channels, given)
    model = DescriptorModel(trunk, layer, dim)
    model.weights_origin = origin
    if is_vit:
        vit.freeze(model, freeze_te)
    else:
        model.freeze_below(backbone.first_trained)
    if size:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, *size))
    return model


def let_batchnorm_drift(model: DescriptorModel) -> None:
    """Let the statistics of frozen batch normalizations follow the training images, as published.

    What is frozen stays so, but its outputs change and can no longer be computed once.
    """
    model.first_trained = 0
    model.train(model.training)


def load_model(path: Path, settings: Mapping) -> tuple[DescriptorModel, dict]:
    """The model in a file, in evaluation mode, and the settings it was made with.

    A checkpoint of train.py, or of base.py with another network, knows its settings; base.py's other
    netvlad_final.pth is known by its keys; of any other file `settings` say the architecture, and its
    keys may be a published system's (weights.SYSTEMS). InputError naming what does not fit.
    """
    state = read_weights(path)
    if "netvlad.centers" in state:
        model = load_checkpoint(path)
        return model, {"recipe": "base.py", "resize": [model.image_size] * 2}
    own = read_settings(path)
    settings = {**settings, **own}
    model = build_model(settings)
    fit_to(model.aggregation, state)
    load_fitting(model, state if own else published(state, model, settings, path), path)
    model.trunk.initialized = True
    model.weights_origin = f"checkpoint {path.name}"
    return model.eval(), settings


def load_any(checkpoint: Path) -> nn.Module:
    """The model in a checkpoint of any recipe, with what it wants done to images."""
    settings = read_settings(checkpoint)
    if "backbone" not in settings:
        system = system_of(read_weights(checkpoint))
        if system is None:
            return load_checkpoint(checkpoint)
        settings = RECIPES[SYSTEMS[system].recipe].defaults
    model, settings = load_model(checkpoint, settings)
    return ready_to_search(model, settings.get("resize", RESIZE))


def ready_to_search(model: nn.Module, resize: Sequence[int]) -> nn.Module:
    """The model, told of the size (height, width) of its images: squares where they may have their own."""
    size = resize if len(resize) == 2 else [*(resize or [OWN_SIZE_PX])] * 2
    model.image_size, model.transform = max(size), framing(size)
    return model


def refuse_others(path: Path, own: Mapping, asked: Mapping) -> None:
    """InputError if a file's own settings are not those that are asked for."""
    for name in own.keys() & asked.keys():
        if own[name] != asked[name]:
            value = own[name]
            mend = f"give --{name} {value}" if value not in (None, False) else f"leave --{name} out"
            raise InputError(f"{path} was made with another --{name} than {asked[name]}: {mend}.")


def read_settings(path: Path) -> dict:
    """The settings in a checkpoint of train.py, or beside one of base.py with another network.

    {} for other files. InputError for one that cannot be read.
    """
    found, described = read_file(path), described_settings(path)
    own = found.get("settings", {})
    if own or "backbone" not in described or "netvlad.centers" in found:
        return own if isinstance(own, dict) else {}
    size = described["image_size"]
    return {
        **{name: described[name] for name in ("backbone", "aggregation")},
        "netvlad_clusters": len(found.get("aggregation.centers", ())),
        "resize": [size, size],
    }


def published(
    state: Mapping[str, Tensor], model: DescriptorModel, settings: Mapping, path: Path
) -> dict[str, Tensor]:
    """A published state dict under the model's names. InputError if it is of another system or size."""
    name = system_of(state)
    if name and settings["aggregation"] not in SYSTEMS[name].aggregations:
        raise InputError(
            f"{path} holds weights of {name}, not for --aggregation {settings['aggregation']}: give "
            f"--recipe={SYSTEMS[name].recipe}."
        )
    named, wanted = ours(state, model), model.state_dict()
    clusters = [part.get("aggregation.assignment.weight", ()) for part in (named, wanted)]
    given, asked = map(len, clusters)
    if settings["aggregation"] == "supervlad" and given != asked:
        k, g = settings["supervlad_clusters"], settings["ghost_clusters"]
        raise InputError(
            f"{path} has {given} clusters, ghosts included, but --supervlad_clusters {k} and "
            f"--ghost_clusters {g} make {asked}: give those it was trained with, or name another file "
            "(SuperVLAD.pth has 4 + 1, its 1-cluster model 1 + 2 in a file of its own)."
        )
    has, wants = (any("encoder." in key for key in part) for part in (named, wanted))
    if has != wants:
        verb = "give" if has else "leave out"
        raise InputError(
            f"{path} has {'a' if has else 'no'} cross-image encoder: {verb} --crossimage_encoder."
        )
    return named


def count_work(model: DescriptorModel, size: tuple[int, int]) -> dict[str, float]:
    """Parameters (all, trained), MB of 4 bytes each, GFLOPs of an image of `size`, descriptor_dim.

    GFLOPs: two for each multiplication and addition of convolutions and linear layers.
    """
    products = 0

    def count(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        nonlocal products
        each = module.weight[0].numel()  # products of a number in the output
        products += each * output[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    training = model.training
    device = next(model.parameters()).device
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, *size, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    total = sum(p.numel() for p in model.parameters())
    return {
        "parameters": total,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mb": 4 * total / 1e6,
        "gflops": 2 * products / 1e9,
        "descriptor_dim": model.descriptor_dim,
    }
