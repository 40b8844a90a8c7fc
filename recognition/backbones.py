"""Trunks by name: torchvision's networks cut before their last stages, and where their weights are from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model import (
    CALIBRATION_CHUNK,
    DescriptorModel,
    InputError,
    Trunk,
    calibrate_trunk,
    download,
    progress,
    warn,
)
from recognition import vit
from recognition.weights import load_fitting, read_weights


@dataclass(frozen=True)
class Backbone:
    """A torchvision network, how many of its stages are kept, and which are trained.

    stages: kept of the network's modules in order. channels: of the resulting map.
    first_trained: number of the first stage that is trained. weights: torchvision's name of them.
    """

    network: str
    stages: int
    channels: int
    first_trained: int
    weights: str = "IMAGENET1K_V1"


EFFICIENTNET_CHANNELS = (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560)  # of B0 … B7
# Stages of a ResNet: conv1, bn1, relu, maxpool, layer1 … layer4; of the others the modules of `features`.
# Names as in the benchmark, then as in CosPlace, which takes torchvision's latest weights.
BACKBONES = {
    "vgg16": Backbone("vgg16", 29, 512, 24),
    "resnet18conv4": Backbone("resnet18", 7, 256, 6),
    "resnet18conv5": Backbone("resnet18", 8, 512, 6),
    "resnet50conv4": Backbone("resnet50", 7, 1024, 6),
    "resnet50conv5": Backbone("resnet50", 8, 2048, 6),
    "resnet101conv4": Backbone("resnet101", 7, 1024, 6),
    "resnet101conv5": Backbone("resnet101", 8, 2048, 6),
    "VGG16": Backbone("vgg16", 29, 512, 24),
    "ResNet18": Backbone("resnet18", 8, 512, 6),
    "ResNet50": Backbone("resnet50", 8, 2048, 6, "IMAGENET1K_V2"),
    "ResNet101": Backbone("resnet101", 8, 2048, 6, "IMAGENET1K_V2"),
    "ResNet152": Backbone("resnet152", 8, 2048, 6, "IMAGENET1K_V2"),
    "ConvNeXt_Tiny": Backbone("convnext_tiny", 8, 768, 4),
    **{
        f"EfficientNet_B{i}": Backbone(
            f"efficientnet_b{i}", 9, channels, 5, "IMAGENET1K_V2" if i == 1 else "IMAGENET1K_V1"
        )
        for i, channels in enumerate(EFFICIENTNET_CHANNELS)
    },
    **{name: Backbone(name, 2, size.dim, 1) for name, size in vit.SIZES.items()},
}
BACKBONES["dino"] = BACKBONES["dinov2_vitb14"]  # SuperVLAD's name for it
LAYER_SCALE = 0.1  # torchvision's 1e-6 would make random blocks the identity


def backbone_name(text: str) -> str:
    """The name of a backbone, written in small or large letters; `text` itself if there is none."""
    alike = [name for name in BACKBONES if name.lower() == text.lower()]
    return text if text in BACKBONES or not alike else alike[0]


def build_trunk(name: str, weights: str | None = None) -> tuple[nn.Sequential, str]:
    """The trunk of a backbone, and where its weights are from in words.

    weights: "imagenet" (torchvision's), "none" (random, to be calibrated, with a warning),
    "random" (to be loaded into), a file, or None: ImageNet, and random with a warning where it cannot
    be had. A trunk that was given weights is `initialized`. InputError if weights that were asked for
    cannot be had or do not fit.
    """
    from torchvision import models  # takes a second: not for those who have VGG16

    backbone = BACKBONES[name]
    with torch.device("meta"):  # the classifiers never take memory
        network = models.get_model(backbone.network, weights=None)
    state, origin = None, "random"
    if weights in (None, "imagenet"):
        try:
            entry = models.get_model_weights(backbone.network)[backbone.weights]
            state = download(entry, backbone.network)
            origin = f"ImageNet (torchvision {backbone.weights})"
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
    kept = getattr(network, "features", None) or nn.Sequential(*network.children())
    trunk = Trunk(*kept[: backbone.stages])
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
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                module.weight -= module.weight.mean(dim=(1, 2, 3), keepdim=True)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.reset_parameters()
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    for name, parameter in trunk.named_parameters():
        if name.endswith("layer_scale"):  # of ConvNeXt's blocks
            nn.init.constant_(parameter, LAYER_SCALE)


@torch.no_grad()
def calibrate(model: DescriptorModel, images: Tensor) -> None:
    """Make the random trunk of a model a usable one by the statistics of images (N, 3, H, W).

    Where it has batch normalizations, their running mean and variance become those of the images;
    VGG16's convolutions are rescaled (model.calibrate_trunk); layer normalizations need nothing.
    """
    norms = [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    if any(isinstance(m, nn.LayerNorm) for m in model.trunk.modules()):
        model.trunk.initialized = True
        return
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
