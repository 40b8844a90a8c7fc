"""Published systems as rows of one table, and their models: built, saved, loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model import DAMAGED, DescriptorModel, InputError, load_checkpoint
from recognition.aggregation import build_aggregation
from recognition.backbones import BACKBONES, build_trunk, load_fitting, read_weights


@dataclass(frozen=True)
class Recipe:
    """A system: backbone + aggregation + objective + batches, and the settings that differ from the
    defaults of the command line.
    """

    backbone: str
    aggregation: str
    objective: str
    batches: str
    settings: dict = field(default_factory=dict)

    @property
    def defaults(self) -> dict:
        """All of it, by the names of the command line."""
        parts = {"backbone": self.backbone, "aggregation": self.aggregation}
        return {**parts, "criterion": self.objective, "mining": self.batches, **self.settings}


RECIPES = {
    # Berton et al., "Deep Visual Geo-localization Benchmark", CVPR 2022; Arandjelovic et al. 2016
    "netvlad": Recipe("resnet18conv4", "netvlad", "triplet", "partial"),
}
# On the built-in sample: ends in minutes on two cores.
SAMPLE_SETTINGS = {
    "resize": [168, 224],
    "netvlad_clusters": 16,
    "epochs_num": 4,
    "queries_per_epoch": 240,
    "cache_refresh_rate": 120,
    "negs_num_per_query": 4,
    "lr": 1e-4,
}
ARCHITECTURE = ("backbone", "aggregation", "netvlad_clusters", "fc_output_dim", "l2")

# Names of the benchmark's own files -> ours, tried in this order.
BENCHMARK_KEYS = (
    (r"^backbone\.", "trunk."),
    (r"^aggregation\.(?:0\.)?conv\.weight$", "aggregation.assignment.weight"),
    (r"^aggregation\.(?:0\.)?centroids$", "aggregation.centers"),
    (r"^aggregation\.(?:0\.)?[01]\.p$", "aggregation.p"),
    (r"^aggregation\.1\.(weight|bias)$", r"aggregation.fc.\1"),
)


def build_model(settings: Mapping, weights: str | None = "random") -> DescriptorModel:
    """The model of ARCHITECTURE's settings. weights: as for build_trunk."""
    backbone = BACKBONES[settings["backbone"]]
    trunk, origin = build_trunk(settings["backbone"], weights)
    names = ("netvlad_clusters", "fc_output_dim", "l2")
    aggregation, dim = build_aggregation(
        settings["aggregation"], backbone.channels, *(settings[name] for name in names)
    )
    model = DescriptorModel(trunk, aggregation, dim)
    model.weights_origin = origin
    model.freeze_below(backbone.first_trained)
    return model


def let_batchnorm_drift(model: DescriptorModel) -> None:
    """Let the statistics of frozen batch normalizations follow the training images, as published.

    What is frozen stays so, but its outputs change and can no longer be computed once.
    """
    model.first_trained = 0
    model.train(model.training)


def load_model(path: Path, settings: Mapping) -> tuple[DescriptorModel, dict]:
    """The model in a file, in evaluation mode, and the settings it was made with.

    A checkpoint of train.py knows its settings; base.py's netvlad_final.pth is known by its keys; of
    any other file `settings` say the architecture, and its keys may be the benchmark's. InputError
    naming the first key that does not fit.
    """
    state = read_weights(path)
    if "netvlad.centers" in state:
        model = load_checkpoint(path)
        return model, {"recipe": "base.py", "resize": [model.image_size] * 2}
    own = read_settings(path)
    settings = {**settings, **own}
    model = build_model(settings)
    load_fitting(model, state if own else from_benchmark(state, model), path)
    model.trunk.initialized = True
    model.weights_origin = f"checkpoint {path.name}"
    return model.eval(), settings


def read_settings(path: Path) -> dict:
    """The settings in a checkpoint of train.py; {} for other files."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise InputError(f"{path} cannot be read ({error}): name another file.") from error
    return found.get("settings", {}) if isinstance(found, dict) else {}


def from_benchmark(state: Mapping[str, Tensor], model: DescriptorModel) -> dict[str, Tensor]:
    """A state dict with the benchmark's names under ours; its assignment has no bias."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in BENCHMARK_KEYS:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    wanted = model.state_dict()
    if "aggregation.fc.weight" in wanted:  # there the pooling lies one level deeper
        pools = {k: k.replace("aggregation.", "aggregation.pool.") for k in renamed}
        renamed = {pools[k] if pools[k] in wanted else k: value for k, value in renamed.items()}
    for key in wanted:
        if key.endswith("assignment.bias") and key.replace("bias", "weight") in renamed:
            renamed.setdefault(key, torch.zeros_like(wanted[key]))
    return renamed


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
