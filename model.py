"""Task 1: the network. VGG16 convolutional trunk -> NetVLAD -> one L2-normalized descriptor an image.

    model = NetVLADModel(num_clusters=16)          # ImageNet weights, downloaded once by torchvision
    descriptors = model(images)                    # (N, 3, H, W) -> (N, 16 * 512)

Works when copied out alone. Sources: Arandjelovic et al., "NetVLAD: CNN architecture for weakly
supervised place recognition", CVPR 2016 (the layer, section 3.1; its initialization, appendix A);
Simonyan & Zisserman 2015 (VGG16, layer for layer as in torchvision, which is imported only where its
weights are downloaded: it takes a second of every start).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import math
import os
import pickle
import re
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # pixels a side of the network's square input, unless a run chose another
IMAGE_CHANNELS = 3
TRUNK_CHANNELS = 512
# VGG16 from conv1_1 to conv5_3: channels of each convolution; 0 is a pool.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
PRECISIONS = ("auto", "bf16", "fp16", "float32")
# Index in `trunk` of the first trained module, by the name used on the command line.
TRAIN_FROM = {"conv1": 0, "conv2": 5, "conv3": 10, "conv4": 17, "conv5": 24, "netvlad": 29}
DOWNLOAD_STALL_S = 20
CACHED_PIXELS = 4 * 224 * 224  # of images that pass a trunk at once on a processor
# What torch.load raises for a file that is damaged or of another kind.
DAMAGED = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    MemoryError, struct.error, pickle.UnpicklingError,
)  # fmt: skip
# What the weights and counts of a checkpoint may be.
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
CALIBRATION_IMAGES = 48
CALIBRATION_CHUNK = 8
KMEANS_DESCRIPTORS = 50_000
KMEANS_ITERATIONS = 100
DESCRIPTORS_PER_IMAGE = 100
DOMINANCE = 100.0  # a descriptor's best cluster weighs this many times its second best, in log mean


# ---------------------------------------------------------------- the network


class NetVLAD(nn.Module):
    """Aggregate a map of local descriptors into one vector of residuals to cluster centers.

    Soft assignment a_k(x) = softmax_k(w_k . x + b_k) and V_k = sum_i a_k(x_i) (x_i - c_k)
    (NetVLAD paper, eq. 4). w, b and c are independent parameters once initialized.

    num_clusters: K. dim: D, channels of the map.
    """

    def __init__(self, num_clusters: int, dim: int) -> None:
        super().__init__()
        self.assignment = nn.Conv2d(dim, num_clusters, kernel_size=1)
        self.centers = nn.Parameter(torch.rand(num_clusters, dim))
        self.initialized = False
        self.register_load_state_dict_post_hook(_mark_initialized)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D, H, W) -> (N, K * D), cluster-major, L2-normalized within clusters and over all."""
        # The assignment's logits reach hundreds: in half precision they would be off by whole units.
        with half_precision(x.device, "float32"):
            x = x.float()
            # Local descriptors of norm 1, without a copy: what is made of them is divided, not they.
            norm = x.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (N, 1, H, W)
            logits = F.conv2d(x, self.assignment.weight) / norm + self.assignment.bias[:, None, None]
            assignment = logits.flatten(2).softmax(dim=1)  # (N, K, L)
            shares = assignment / norm.flatten(2)
            weighted_sum = shares @ x.flatten(2).transpose(1, 2)  # (N, K, D)
            residuals = weighted_sum - assignment.sum(dim=2, keepdim=True) * self.centers
            return F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)

    @torch.no_grad()
    def initialize(self, descriptors: Tensor, seed: int = 0) -> None:
        """Set centers by k-means and the assignment so that it is nearly hard.

        descriptors: (n, D), L2-normalized rows, n >= K. As in the authors' experiments
        w_k = alpha c_k / |c_k| without bias, and alpha makes the mean log-ratio of each descriptor's
        two largest assignments ln 100. Raises InputError for fewer descriptors than clusters.
        """
        num_clusters = len(self.centers)
        if len(descriptors) < num_clusters:
            raise InputError(
                f"{len(descriptors)} local descriptors cannot be clustered into {num_clusters}: "
                "give more images or fewer clusters."
            )
        descriptors = descriptors.cpu()  # where sums have one order, so that a seed has one outcome
        centers = kmeans(descriptors, num_clusters, seed)
        weights, alpha = F.normalize(centers, dim=1), 1.0
        if num_clusters > 1:
            top = (descriptors @ weights.T).topk(2, dim=1).values
            alpha = math.log(DOMINANCE) / max(float((top[:, 0] - top[:, 1]).mean()), 1e-6)
        self.centers.copy_(centers)
        self.assignment.weight.copy_((alpha * weights)[:, :, None, None])
        self.assignment.bias.zero_()
        self.initialized = True


def _mark_initialized(module: nn.Module, _incompatible_keys: object) -> None:
    module.initialized = True


class Trunk(nn.Sequential):
    """Stages that run one after the other.

    In inference mode at less cost: a ReLU after the max-pooling that follows it, which gives the same
    values, and on a processor few images at a time, whose maps its cache holds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images or maps (N, C, H, W) -> what the stages make of them, (N, …)."""
        if not torch.is_inference_mode_enabled():
            return super().forward(x)
        stages = list(self)
        for k in range(len(stages) - 1):
            if isinstance(stages[k], nn.ReLU) and isinstance(stages[k + 1], nn.MaxPool2d):
                stages[k], stages[k + 1] = stages[k + 1], stages[k]
        quick = nn.Sequential(*stages)
        if x.device.type != "cpu":
            return quick(x)
        at_once = max(1, CACHED_PIXELS // math.prod(x.shape[2:]))
        return torch.cat([quick(part) for part in x.split(at_once)])


class DescriptorModel(nn.Module):
    """Every network of this project: trunk -> aggregation -> one vector of length 1 an image.

    trunk: stages that run one after the other; those before `first_trained` are frozen, and stay in
    evaluation mode while the rest is trained. aggregation: map (N, C, H, W) -> (N, descriptor_dim).
    Either may carry `initialized`, False as long as its values are those of its construction.
    precision: one of PRECISIONS, what `autocast` computes in. image_size: pixels a side of the square
    images it is trained on. weights_origin: where the trunk's weights are from, in words.
    """

    def __init__(self, trunk: nn.Sequential, aggregation: nn.Module, descriptor_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.aggregation = aggregation
        self.descriptor_dim = descriptor_dim
        self.first_trained = 0
        self.precision = "auto"
        self.image_size = IMAGE_SIZE
        self.weights_origin = "random"

    @property
    def initialized(self) -> bool:
        """Whether trunk and aggregation were initialized or loaded."""
        return all(getattr(part, "initialized", True) for part in (self.trunk, self.aggregation))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), or what the frozen part made of them -> (N, descriptor_dim)."""
        descriptors = self.aggregation(self.local_descriptors(x))
        # In bfloat16 norms would be off by 0.2 %, more than similarities of alike descriptors differ.
        return F.normalize(descriptors.float(), dim=1) if self.unit_norm else descriptors

    @property
    def unit_norm(self) -> bool:
        """Whether descriptors have norm 1: unless the aggregation says that they are not to."""
        return getattr(self.aggregation, "unit_norm", True)

    def local_descriptors(self, x: Tensor) -> Tensor:
        """The trunk's map (N, C, h, w) of images, or of what its frozen part made of them."""
        if x.shape[1] == IMAGE_CHANNELS:
            return self.trunk(x.float())
        return self.trunk[self.first_trained :](x.float())

    def frozen_part(self, x: Tensor) -> Tensor:
        """What the frozen stages make of images, in place of which `forward` takes it."""
        return self.trunk[: self.first_trained](x)

    def autocast(self, device: torch.device | str) -> contextlib.AbstractContextManager:
        """The context in which this model computes, on `device`, in its `precision`."""
        return half_precision(device, self.precision)

    def freeze_below(self, first_trained: int) -> None:
        """Train trunk[first_trained:] and the aggregation only."""
        self.first_trained = first_trained
        for position, stage in enumerate(self.trunk):
            stage.requires_grad_(position >= first_trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> DescriptorModel:
        """Training mode for what is trained."""
        super().train(mode)
        for stage in list(self.trunk)[: self.first_trained]:
            stage.eval()
        return self


class NetVLADModel(DescriptorModel):
    """VGG16 up to conv5_3 (without its ReLU and the last pool), then NetVLAD.

    num_clusters: K; dim: channels of the trunk's output, 512 for VGG16 (nothing else is accepted).
    pretrained: ImageNet weights by torchvision; if they cannot be had, a warning and random weights.
    weights: a torchvision VGG16 state dict (with or without classifier) to read instead.
    train_from: what is trained, "conv1" ... "conv5" or "netvlad"; everything below is frozen.
    Raises InputError if `weights` is not such a file, ValueError for other arguments.
    """

    def __init__(
        self,
        num_clusters: int = 16,
        dim: int = TRUNK_CHANNELS,
        *,
        pretrained: bool = True,
        weights: Path | str | None = None,
        train_from: str = "conv5",
    ) -> None:
        if dim != TRUNK_CHANNELS:
            raise ValueError(f"dim must be {TRUNK_CHANNELS}, the channels of VGG16, not {dim}")
        if train_from not in TRAIN_FROM:
            raise ValueError(f"train_from must be one of {', '.join(TRAIN_FROM)}, not {train_from!r}")
        super().__init__(_random_trunk(), NetVLAD(num_clusters, dim), num_clusters * dim)
        self.netvlad = self._modules.pop("aggregation")  # its name in the assignment's state dict
        if weights is not None:
            self.trunk.load_state_dict(_trunk_weights(_read_state_dict(Path(weights)), weights))
            self.weights_origin = f"file {Path(weights).name}"
        elif pretrained:
            try:
                self.load_imagenet()
            except InputError as error:
                warn(f"going on with RANDOM weights, results are far below what they could be: {error}")
        self.freeze_below(TRAIN_FROM[train_from])

    @property
    def aggregation(self) -> NetVLAD:
        """The NetVLAD layer."""
        return self.netvlad

    def load_imagenet(self) -> None:
        """Give the trunk torchvision's ImageNet weights; InputError if they cannot be had."""
        from torchvision.models import VGG16_Weights

        state = download(VGG16_Weights.IMAGENET1K_V1, "VGG16")
        self.trunk.load_state_dict(_trunk_weights(state, "the downloaded VGG16"))
        self.weights_origin = "ImageNet (torchvision IMAGENET1K_V1)"


def _empty_trunk() -> Trunk:
    """VGG16 up to conv5_3, its weights without memory."""
    layers, channels = [], IMAGE_CHANNELS
    for width in VGG16:
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return Trunk(*layers[:-1])


def _random_trunk() -> Trunk:
    """The trunk with torchvision's default random weights."""
    trunk = _empty_trunk()
    for module in trunk:
        if isinstance(module, nn.Conv2d):
            weight = torch.empty(module.weight.shape)
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            module.weight = nn.Parameter(weight)
            module.bias = nn.Parameter(torch.zeros(len(module.bias)))
    trunk.initialized = False
    trunk.register_load_state_dict_post_hook(_mark_initialized)
    return trunk


# ---------------------------------------------------------------- weights from files


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state-dict file, alone or among what a training saved. Nothing in it is run.

    InputError if there are none, the file is damaged, or a value is not finite.
    """
    refuse_what_holds_nothing(path)
    try:
        with _numbers_of_numpy():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises all kinds
        pickled = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error))
        if pickled:
            raise InputError(
                f"{path} holds pickled objects ({pickled[1]}), which are not loaded, as that could run "
                "any code: save the weights alone, torch.save(model.state_dict(), file)."
            ) from error
        raise InputError(
            f"{path} cannot be read as a PyTorch state dict (damaged, cut short or another kind of "
            f"file; {type(error).__name__}): make it anew with base.py or name another file."
        ) from error
    return tensors_in(state, path)


def refuse_what_holds_nothing(path: Path) -> None:
    """InputError for a file of weights that is not there, empty, or a pointer of Git LFS."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: train it first, by base.py or train.py, or name another file."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file.") from None
    if not head:
        raise InputError(f"{path} is empty: copy or download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, no weights: fetch them with git lfs pull.")


def tensors_in(state: object, path: Path) -> dict[str, Tensor]:
    """The tensors of what a file holds: a state dict, or one among what a training saved.

    `module.` of nn.DataParallel and `_orig_mod.` of torch.compile are dropped from their names.
    InputError if there are none, or a value is not finite or no plain number.
    """
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not (isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())):
        raise InputError(f"{path} holds no plain state dict: name a file of torch.save(state_dict).")
    wrapped = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
    state = {wrapped.sub(r"\1", str(name)): v for name, v in state.items()}
    for name, values in state.items():
        if values.is_meta or values.layout != torch.strided or values.dtype not in KINDS:
            kind = "meta" if values.is_meta else values.dtype
            raise InputError(
                f"{path} holds no plain numbers ({name} is {kind}): save it in float32 or bfloat16."
            )
        if not torch.isfinite(values).all():
            raise InputError(
                f"{path} holds values that are not finite ({name}): name an earlier checkpoint."
            )
    return state


def download(entry: object, network: str) -> dict[str, Tensor]:
    """The ImageNet weights of a network that an entry of torchvision's tables names.

    InputError if they cannot be had, or what lies in torch's cache is damaged.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1]
    stall_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        return tensors_in(entry.get_state_dict(progress=True, check_hash=True), cached)
    except DAMAGED as error:
        damaged = f"{cached} is damaged, remove it" if cached.is_file() else error
        raise InputError(
            f"the ImageNet weights of {network} could not be had ({damaged}): give a downloaded "
            f"{cached.name} with --weights FILE."
        ) from error
    finally:
        socket.setdefaulttimeout(stall_before)


def _numbers_of_numpy() -> contextlib.AbstractContextManager:
    """Lets torch.load read the scores that others save beside their weights, in numpy's numbers."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch 2.5 and later
    if safe_globals is None:
        return contextlib.nullcontext()
    allowed: list = [np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and from numpy 2

        def scalar(dtype: np.dtype, data: bytes) -> np.generic:
            return np.frombuffer(data, dtype)[0]

        scalar.__module__, scalar.__qualname__ = module, "scalar"
        allowed.append(scalar)
    return safe_globals(allowed)


def _trunk_weights(state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """The trunk's part of a state dict of torchvision's VGG16 or of a NetVLAD model, keys as in `trunk`."""
    features = {re.sub("^(features|trunk|encoder)\\.", "", k): v for k, v in state.items()}
    expected = {k: v.shape for k, v in _empty_trunk().state_dict().items()}
    if any(k not in features or features[k].shape != shape for k, shape in expected.items()):
        raise InputError(
            f"{source} is no VGG16 state dict of torchvision (features.0.weight …): name the file "
            "that torchvision downloads, vgg16-397923af.pth, or use --weights none."
        )
    return {k: features[k] for k in expected}


def load_checkpoint(path: Path | str) -> NetVLADModel:
    """The model of a `netvlad_final.pth`, in eval mode: number of clusters read from the state dict,
    image size from the description beside it, if there is one.

    Raises InputError if the file is missing, damaged or not of a NetVLADModel.
    """
    state = _our_names(_read_state_dict(Path(path)), path)
    centers = state.get("netvlad.centers")
    if centers is None or centers.dim() != 2 or not len(centers):
        raise InputError(
            f"{path} is no NetVLAD checkpoint (it has no netvlad.centers): name the "
            "netvlad_final.pth that base.py wrote."
        )
    model = NetVLADModel(num_clusters=len(centers), pretrained=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit NetVLADModel(num_clusters={len(centers)}): name the "
            "netvlad_final.pth that base.py wrote."
        ) from error
    model.weights_origin = f"checkpoint {Path(path).name}"
    model.image_size = described_settings(Path(path)).get("image_size") or IMAGE_SIZE
    return model.eval()


def described_settings(checkpoint: Path) -> dict:
    """The settings of the run that made a checkpoint, from the .json beside it; {} without one."""
    try:
        found = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        return dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _our_names(state: dict[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """A state dict of pytorch-NetVlad (Nanne) or Patch-NetVLAD in the names of NetVLADModel."""
    if "pool.centroids" not in state:
        return state
    for theirs, ours in (
        (r"^encoder\.", "trunk."),
        (r"^pool\.conv\.", "netvlad.assignment."),
        (r"^pool\.centroids$", "netvlad.centers"),
    ):
        state = {re.sub(theirs, ours, name): values for name, values in state.items()}
    named = {name: values for name, values in state.items() if not name.startswith("WPCA.")}
    if len(named) < len(state):
        warn(f"the PCA-whitening (WPCA) in {path} is left out: descriptors are those of its NetVLAD.")
    named.setdefault("netvlad.assignment.bias", torch.zeros(len(named["netvlad.centers"])))
    return named


@torch.no_grad()
def calibrate_trunk(model: DescriptorModel, images: Tensor) -> None:
    """Rescale every convolution so that each channel has zero mean and unit variance on `images`.

    images: (N, 3, H, W), about 50. Layer by layer, as LSUV (Mishkin & Matas 2016) does: without
    ImageNet weights this makes a random trunk a usable one (METHODS section 2).
    """
    images = images.float().contiguous(memory_format=torch.channels_last)
    chunks = list(images.split(CALIBRATION_CHUNK))
    for module in progress(model.trunk, desc="calibrating", unit="layer"):
        with model.autocast(images.device):
            chunks = [module(chunk) for chunk in chunks]
        if isinstance(module, nn.Conv2d):
            moments = []
            for chunk in chunks:
                values = chunk.to(torch.float32, copy=True)
                moments.append((values.mean((0, 2, 3)), values.square_().mean((0, 2, 3))))
            shares = torch.tensor([len(c) / len(images) for c in chunks], device=images.device)
            mean, square = (shares @ torch.stack(column) for column in zip(*moments))
            scale = (square - mean.square()).clamp(min=1e-12).rsqrt()
            module.weight.mul_(scale[:, None, None, None])
            module.bias.copy_((module.bias - mean) * scale)
            mean, scale = mean[:, None, None], scale[:, None, None]
            chunks = [c.float().sub_(mean).mul_(scale).to(c.dtype) for c in chunks]
    model.trunk.initialized = True
    model.weights_origin = f"random, calibrated on {len(images)} training images"


@torch.no_grad()
def initialize_netvlad(
    model: DescriptorModel, batches: Iterable[Tensor], device: torch.device, *, seed: int = 0
) -> None:
    """Give a NetVLAD layer its centers by k-means on local descriptors drawn from `batches`.

    batches: inputs of `model`, (B, …); DESCRIPTORS_PER_IMAGE random locations an image are used until
    KMEANS_DESCRIPTORS are gathered.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn, total = [], 0
    for batch in batches:
        with torch.inference_mode(), model.autocast(device):
            local = model.local_descriptors(batch.to(device))
        local = F.normalize(local.float(), dim=1).flatten(2)
        order = torch.rand(local.shape[0], local.shape[2], generator=generator).argsort(dim=1)
        chosen = order[:, None, :DESCRIPTORS_PER_IMAGE].to(device).expand(-1, local.shape[1], -1)
        drawn.append(local.gather(2, chosen).transpose(1, 2).flatten(0, 1))
        total += len(drawn[-1])
        if total >= KMEANS_DESCRIPTORS:
            break
    if not drawn:
        raise InputError("there is no image to initialize the clusters from: the loader is empty.")
    model.aggregation.initialize(torch.cat(drawn), seed)


def kmeans(x: Tensor, k: int, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from a greedy k-means++ start. x (n, D), on the processor -> centers (k, D)."""
    generator = torch.Generator().manual_seed(seed)
    centers = _kmeans_seeds(x, k, generator)
    squares = x.square().sum(dim=1)
    labels = None
    for _ in progress(range(KMEANS_ITERATIONS), desc="k-means", unit="round"):
        cost = centers.square().sum(dim=1) - x @ (2 * centers.T)  # squared distance less |x|^2
        nearest, new_labels = cost.min(dim=1)
        if labels is not None and torch.equal(labels, new_labels):
            break
        labels = new_labels
        counts = torch.bincount(labels, minlength=k)
        centers = torch.zeros_like(centers).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        farthest = (nearest + squares).topk(len(empty)).indices
        centers[empty] = x[farthest]
    return centers


def _kmeans_seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): the best of a few draws by squared distance."""
    draws = 2 + int(math.log(k))
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [first]
    distance = (x - x[first]).square().sum(dim=1)
    for _ in range(1, k):
        cumulative = distance.double().cumsum(0)
        spots = torch.rand(draws, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, spots).clamp(max=len(x) - 1)
        to_candidates = torch.cdist(x[candidates], x).square()  # (draws, n)
        remaining = torch.minimum(to_candidates, distance)
        best = int(remaining.sum(dim=1).argmin())
        chosen.append(int(candidates[best]))
        distance = remaining[best]
    return x[chosen].clone()


# ---------------------------------------------------------------- shared by the scripts


class InputError(ValueError):
    """Input a user can mend. Its message is one sentence: what is wrong, where, what to do."""


def refuse(script: str, error: InputError) -> int:
    """Print the sentence of an InputError on stderr; the exit code for bad input, 2."""
    print(f"{script}: {error}", file=sys.stderr)
    return 2


WARNINGS: list[str] = []  # what warn() has said in this process, for metrics.json


def warn(message: str) -> None:
    """Say `message` on stderr, once in a process, and keep it in WARNINGS."""
    if message not in WARNINGS:
        WARNINGS.append(message)
        tqdm.write(f"WARNING: {message}", file=sys.stderr)


def progress(*args: object, **options: object) -> tqdm:
    """A tqdm bar that goes when it is done; none off a terminal or once `progress.hidden` is True."""
    return tqdm(*args, leave=False, disable=progress.hidden or None, **options)


progress.hidden = False
atexit.register(gc.freeze)  # else Python seeks garbage in all that PyTorch imported: half a second


def usable_cores() -> int:
    """Processor cores that this process may use: of its affinity and of its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores


def choose_device(name: str) -> torch.device:
    """The device for --device auto, cpu, cuda, cuda:N or mps; InputError if it is not there.

    auto is cuda where there is one, else cpu: Apple's GPUs are for who asks for them. On a CUDA GPU
    convolutions are computed in one way, so that a run that goes on ends as an unbroken one.
    """
    torch.backends.cudnn.deterministic = True
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not (number if colon else "0").isdecimal() or int(number or 0) >= count.get(kind, 0):
        raise InputError(f"--device {name} is not available here: use --device auto.")
    return torch.device(name)


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether the hardware computes in bfloat16: GPUs from compute capability 8, newer processors."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def half_type(device: torch.device | str, precision: str = "auto") -> torch.dtype | None:
    """What is computed in: bfloat16 where the hardware has it, unless precision is "float32"; else None.

    "fp16" asks for float16 on GPUs without bfloat16, which emulated would be slower than float32. On
    processors "bf16" asks for it in any case. Devices other than cpu and cuda compute in float32.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or precision == "float32":
        return None
    if computes_in_bf16(device) or (precision == "bf16" and kind == "cpu"):
        return torch.bfloat16
    return torch.float16 if precision == "fp16" and kind == "cuda" else None


def half_precision(
    device: torch.device | str, precision: str = "auto"
) -> contextlib.AbstractContextManager:
    """Autocast to `half_type`; not entered for devices for which some versions of PyTorch refuse it."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    half = half_type(device, precision)
    return torch.autocast(kind, half or torch.bfloat16, enabled=half is not None)
