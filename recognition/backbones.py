"""Trunks by name: torchvision's networks cut before their last stages, and where their weights are from."""

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from model import (
    CALIBRATION_CHUNK,
    DAMAGED,
    DOWNLOAD_STALL_S,
    DescriptorModel,
    InputError,
    calibrate_trunk,
    progress,
    warn,
)


@dataclass(frozen=True)
class Backbone:
    """A torchvision network, how many of its stages are kept, and which are trained.

    stages: kept of the network's modules in order. channels: of the resulting map.
    first_trained: number of the first stage that is trained.
    """

    network: str
    stages: int
    channels: int
    first_trained: int


# Stages of a ResNet: conv1, bn1, relu, maxpool, layer1 … layer4; of VGG16: the modules of `features`.
BACKBONES = {
    "vgg16": Backbone("vgg16", 29, 512, 24),
    "resnet18conv4": Backbone("resnet18", 7, 256, 6),
    "resnet18conv5": Backbone("resnet18", 8, 512, 6),
    "resnet50conv4": Backbone("resnet50", 7, 1024, 6),
    "resnet50conv5": Backbone("resnet50", 8, 2048, 6),
    "resnet101conv4": Backbone("resnet101", 7, 1024, 6),
    "resnet101conv5": Backbone("resnet101", 8, 2048, 6),
}
HEADS = ("fc.", "classifier.")  # of a network: not needed


def build_trunk(name: str, weights: str | None = None) -> tuple[nn.Sequential, str]:
    """The trunk of a backbone, and where its weights are from in words.

    weights: "imagenet" (torchvision's first), "none" (random, to be calibrated, with a warning),
    "random" (to be loaded into), a file, or None: ImageNet, and random with a warning where it cannot
    be had. A trunk that was given weights is `initialized`. InputError if weights that were asked for cannot be had or do not fit.
    """
    backbone = BACKBONES[name]
    with torch.device("meta"):  # the classifiers never take memory
        network = torchvision.models.get_model(backbone.network, weights=None)
    state, origin = None, "random"
    if weights in (None, "imagenet"):
        try:
            state, origin = (
                imagenet_weights(backbone.network),
                "ImageNet (torchvision IMAGENET1K_V1)",
            )
        except InputError as error:
            if weights:
                raise
            warn(f"going on with RANDOM weights, results are far below what they could be: {error}")
    elif weights == "none":
        warn("the backbone's weights are RANDOM, as --weights none says.")
    elif weights != "random":
        state, origin = read_weights(Path(weights)), f"file {Path(weights).name}"
    if state is not None:
        load_fitting(network, state, origin)
    kept = (
        network.features
        if backbone.network.startswith("vgg")
        else nn.Sequential(*network.children())
    )
    trunk = kept[: backbone.stages]
    if state is None:
        _draw_weights(trunk)
    trunk.initialized = state is not None
    return trunk, origin


@torch.no_grad()
def _draw_weights(trunk: nn.Module) -> None:
    """torchvision's default random weights, but filters of mean 0.

    So they answer to differences in an image, not to how bright it is: of the sample's night queries
    the untrained ResNet-18 + NetVLAD answers 29 % at R@1 instead of 19 % (six seeds).
    """
    trunk.to_empty(device="cpu")
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            module.weight -= module.weight.mean(dim=(1, 2, 3), keepdim=True)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def imagenet_weights(network: str) -> dict[str, Tensor]:
    """torchvision's first ImageNet weights of a network. InputError if they cannot be had."""
    entry = torchvision.models.get_model_weights(network).IMAGENET1K_V1
    stall_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except DAMAGED as error:
        file = entry.url.rsplit("/", 1)[1]
        raise InputError(
            f"the ImageNet weights of {network} could not be had ({error}): give a downloaded {file} "
            "with --weights FILE."
        ) from error
    finally:
        socket.setdefaulttimeout(stall_before)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: a plain state dict, or one under `model_state_dict` or `state_dict`.

    A `module.` that nn.DataParallel put before the keys is dropped. InputError if there are none.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name another file.") from None
    except DAMAGED as error:
        raise InputError(
            f"{path} cannot be read as PyTorch weights (damaged, cut short or another kind of file; "
            f"{type(error).__name__}): name another file."
        ) from error
    for key in ("model_state_dict", "state_dict"):
        found = found[key] if isinstance(found, dict) and key in found else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"{path} holds no weights: name a file of torch.save(model.state_dict()).")
    return {key.removeprefix("module."): value for key, value in found.items()}


def load_fitting(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Load a state dict into a module, which may be on the meta device; keys of classification heads may lack or be in excess.

    InputError naming the first key that does not fit.
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


@torch.no_grad()
def calibrate(model: DescriptorModel, images: Tensor) -> None:
    """Make the random trunk of a model a usable one by the statistics of images (N, 3, H, W).

    Where it has batch normalizations, their running mean and variance become those of the images;
    else its convolutions are rescaled (model.calibrate_trunk).
    """
    norms = [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        calibrate_trunk(model, images)
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all chunks
        norm.train()
    for chunk in progress(images.split(CALIBRATION_CHUNK), desc="calibrating random weights"):
        model.trunk(chunk.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.train(model.training)
    model.trunk.initialized = True
    model.weights_origin = f"random, calibrated on {len(images)} training images"
