"""Task 1: the network. VGG16 convolutional trunk -> NetVLAD -> one L2-normalized descriptor an image.

    model = NetVLADModel(num_clusters=16)          # ImageNet weights, downloaded once by torchvision
    descriptors = model(images)                    # (N, 3, H, W) -> (N, 16 * 512)

Works when copied out alone. Sources: Arandjelovic et al., "NetVLAD: CNN architecture for weakly
supervised place recognition", CVPR 2016 (the layer, section 3.1; its initialization, appendix A);
Simonyan & Zisserman 2015 (VGG16, torchvision's implementation).
"""

import math
import pickle
import socket
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRUNK_CHANNELS = 512
PRECISIONS = ("auto", "bf16", "float32")
# Index in `trunk` of the first trained module, by the name used on the command line.
TRAIN_FROM = {"conv1": 0, "conv2": 5, "conv3": 10, "conv4": 17, "conv5": 24, "netvlad": 29}
DOWNLOAD_STALL_S = 20
# What torch.load raises for a file that is damaged or of another kind.
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
CALIBRATION_IMAGES = 48
CALIBRATION_CHUNK = 8
KMEANS_DESCRIPTORS = 50_000
KMEANS_ITERATIONS = 100
DESCRIPTORS_PER_IMAGE = 100
DOMINANCE = 100.0  # a descriptor's best cluster weighs this many times its second best, in log mean


class InputError(ValueError):
    """Input a user can mend. Its message is one sentence: what is wrong, where, what to do."""


@contextmanager
def blame_input():
    """Turn a ValueError or OSError of the rooms below into an InputError with the same sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def refuse(script: str, error: InputError) -> int:
    """Print the sentence of an InputError on stderr; the exit code for bad input, 2."""
    # A DataLoader worker wraps the message in its traceback, whose last line is ours.
    sentence = str(error).strip().splitlines()[-1].removeprefix("model.InputError: ")
    print(f"{script}: {sentence}", file=sys.stderr)
    return 2


WARNINGS: list[str] = []  # what warn() has said in this process, for metrics.json


def warn(message: str) -> None:
    """Say `message` on stderr, once in a process, and keep it in WARNINGS."""
    if message not in WARNINGS:
        WARNINGS.append(message)
        tqdm.write(f"WARNING: {message}", file=sys.stderr)


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
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=1)
            assignment = self.assignment(x).flatten(2).softmax(dim=1)  # (N, K, L)
            weighted_sum = assignment @ x.flatten(2).transpose(1, 2)  # (N, K, D)
            residuals = weighted_sum - assignment.sum(dim=2, keepdim=True) * self.centers
            return F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)

    @torch.no_grad()
    def initialize(self, descriptors: Tensor, seed: int = 0, form: str = "v1") -> None:
        """Set centers by k-means and the assignment so that it is nearly hard.

        descriptors: (n, D), L2-normalized rows, n >= K.
        form: "v1" (the authors' experiments), w_k = alpha c_k / |c_k|, no bias, or "v2" (the paper's
        text), w_k = 2 alpha c_k, b_k = -alpha |c_k|^2. alpha makes the mean log-ratio of each
        descriptor's two largest assignments ln 100.
        Raises InputError for fewer descriptors than clusters, ValueError for another form.
        """
        num_clusters = len(self.centers)
        if len(descriptors) < num_clusters:
            raise InputError(
                f"{len(descriptors)} local descriptors cannot be clustered into {num_clusters}: "
                "give more images or fewer --clusters."
            )
        centers = kmeans(descriptors, num_clusters, seed)
        if form == "v1":
            weights, biases = F.normalize(centers, dim=1), torch.zeros_like(centers[:, 0])
        elif form == "v2":
            weights, biases = 2 * centers, -centers.square().sum(dim=1)
        else:
            raise ValueError(f"form must be 'v1' or 'v2', not {form!r}")
        alpha = 1.0
        if num_clusters > 1:
            top = (descriptors @ weights.T + biases).topk(2, dim=1).values
            alpha = math.log(DOMINANCE) / max(float((top[:, 0] - top[:, 1]).mean()), 1e-6)
        self.centers.copy_(centers)
        self.assignment.weight.copy_((alpha * weights)[:, :, None, None])
        self.assignment.bias.copy_(alpha * biases)
        self.initialized = True


def _mark_initialized(module: nn.Module, _incompatible_keys: object) -> None:
    module.initialized = True


class NetVLADModel(nn.Module):
    """VGG16 up to conv5_3 (without its ReLU and the last pool), then NetVLAD.

    num_clusters: K; dim: channels of the trunk's output, 512 for VGG16 (nothing else is accepted).
    pretrained: ImageNet weights by torchvision; if they cannot be had, a warning and random weights.
    weights: a torchvision VGG16 state dict (with or without classifier) to read instead.
    train_from: what is trained, "conv1" ... "conv5" or "netvlad"; everything below is frozen.
    Raises InputError if `weights` is not such a file, ValueError for other arguments.

    `weights_origin` says in words where the trunk's weights are from; `precision` (PRECISIONS) is what
    `autocast` computes in.
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
        super().__init__()
        if dim != TRUNK_CHANNELS:
            raise ValueError(f"dim must be {TRUNK_CHANNELS}, the channels of VGG16, not {dim}")
        self.trunk = _random_trunk()
        self.trunk_initialized = False
        self.trunk.register_load_state_dict_post_hook(
            lambda *_: setattr(self, "trunk_initialized", True)
        )
        self.weights_origin = "random"
        if weights is not None:
            self.trunk.load_state_dict(_trunk_weights(_read_state_dict(Path(weights)), weights))
            self.weights_origin = f"file {Path(weights).name}"
        elif pretrained:
            self._load_imagenet()
        self.netvlad = NetVLAD(num_clusters, dim)
        self.precision = "auto"
        self.train_only_from(train_from)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (N, 3, H, W), or with `start` the outputs of trunk[:start] -> (N, K * 512), rows of norm 1."""
        return self.netvlad(self.trunk[start:](x.float()))

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """The context in which this model computes, on `device`, in its `precision`."""
        return half_precision(device, self.precision)

    def train_only_from(self, name: str) -> None:
        """Freeze everything below `name`; `first_trained` becomes its index in the trunk."""
        if name not in TRAIN_FROM:
            raise ValueError(f"train_from must be one of {', '.join(TRAIN_FROM)}, not {name!r}")
        self.first_trained = TRAIN_FROM[name]
        for position, module in enumerate(self.trunk):
            module.requires_grad_(position >= self.first_trained)

    def trunk_share(self, start: int) -> float:
        """Share of the trunk's multiplications that trunk[start:] does, for square images."""
        cost, pixels = [], 1.0
        for module in self.trunk:
            pixels /= 4 if isinstance(module, nn.MaxPool2d) else 1
            weights = module.weight.numel() if isinstance(module, nn.Conv2d) else 0
            cost.append(pixels * weights)
        return sum(cost[start:]) / sum(cost)

    def _load_imagenet(self) -> None:
        stall_before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_STALL_S)
        try:
            state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            warn(
                f"the ImageNet weights of VGG16 could not be downloaded ({error}): going on with "
                "RANDOM weights, results are far below what they could be. Give a downloaded "
                "vgg16-397923af.pth with --weights FILE."
            )
            return
        finally:
            socket.setdefaulttimeout(stall_before)
        self.trunk.load_state_dict(_trunk_weights(state, "the downloaded VGG16"))
        self.weights_origin = "ImageNet (torchvision IMAGENET1K_V1)"


def _random_trunk() -> nn.Sequential:
    """torchvision's VGG16 trunk with its default random weights; the classifier never takes memory."""
    with torch.device("meta"):
        trunk = vgg16(weights=None).features[:-2]
    trunk = trunk.to_empty(device="cpu")
    for module in trunk:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return trunk


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state-dict file. InputError if there is none or it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run base.py first or name another file.") from None
    except DAMAGED as error:
        raise InputError(
            f"{path} cannot be read as a PyTorch state dict (damaged, cut short or another kind of "
            f"file; {type(error).__name__}): make it anew with base.py or name another file."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no plain state dict: name a file of torch.save(state_dict).")
    return state


def _trunk_weights(state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """The trunk's part of a torchvision VGG16 state dict, keys as in `trunk`."""
    features = {k.removeprefix("features."): v for k, v in state.items()}
    expected = _meta_shapes()
    if any(k not in features or features[k].shape != shape for k, shape in expected.items()):
        raise InputError(
            f"{source} is no VGG16 state dict of torchvision (features.0.weight …): name the file "
            "that torchvision downloads, vgg16-397923af.pth, or use --weights none."
        )
    return {k: features[k] for k in expected}


def _meta_shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in vgg16(weights=None).features[:-2].state_dict().items()}


def load_checkpoint(path: Path | str) -> NetVLADModel:
    """The model of a `netvlad_final.pth`, number of clusters read from the state dict, in eval mode.

    Raises InputError if the file is missing, damaged or not of a NetVLADModel.
    """
    state = _read_state_dict(Path(path))
    centers = state.get("netvlad.centers")
    if centers is None or centers.dim() != 2:
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
    return model.eval()


@torch.no_grad()
def calibrate_trunk(model: NetVLADModel, images: Tensor) -> None:
    """Rescale every convolution so that each channel has zero mean and unit variance on `images`.

    images: (N, 3, H, W), about 50. Layer by layer, as LSUV (Mishkin & Matas 2016) does: without
    ImageNet weights this makes a random trunk a usable one (METHODS section 2).
    """
    images = images.contiguous(memory_format=torch.channels_last)
    chunks = list(images.split(CALIBRATION_CHUNK))
    for module in tqdm(model.trunk, desc="calibrating random weights", unit="layer", leave=False):
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
    model.trunk_initialized = True
    model.weights_origin = f"random, calibrated on {len(images)} training images"


@torch.no_grad()
def initialize_netvlad(
    model: NetVLADModel, batches: Iterable[Tensor], device: torch.device, *, start: int = 0,
    seed: int = 0, form: str = "v1",
) -> None:  # fmt: skip
    """Give the NetVLAD layer its centers by k-means on local descriptors drawn from `batches`.

    batches: tensors (B, 3, H, W), or outputs of trunk[:start]; DESCRIPTORS_PER_IMAGE random
    locations an image are used until KMEANS_DESCRIPTORS are gathered.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn, total = [], 0
    for batch in batches:
        with model.autocast(device):
            local = model.trunk[start:](batch.to(device).float())
        local = F.normalize(local.float(), dim=1).flatten(2)
        order = torch.rand(local.shape[0], local.shape[2], generator=generator).argsort(dim=1)
        chosen = order[:, None, :DESCRIPTORS_PER_IMAGE].to(device).expand(-1, local.shape[1], -1)
        drawn.append(local.gather(2, chosen).transpose(1, 2).flatten(0, 1))
        total += len(drawn[-1])
        if total >= KMEANS_DESCRIPTORS:
            break
    if not drawn:
        raise InputError("there is no image to initialize the clusters from: the loader is empty.")
    model.netvlad.initialize(torch.cat(drawn), seed, form)


def kmeans(x: Tensor, k: int, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from a greedy k-means++ start. x (n, D) -> centers (k, D)."""
    generator = torch.Generator().manual_seed(seed)
    centers = _kmeans_seeds(x, k, generator)
    squares = x.square().sum(dim=1)
    labels = None
    for _ in tqdm(range(KMEANS_ITERATIONS), desc="k-means", unit="round", leave=False):
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
        cumulative = distance.double().cumsum(0).cpu()
        spots = torch.rand(draws, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, spots).clamp(max=len(x) - 1).to(x.device)
        to_candidates = torch.cdist(x[candidates], x).square()  # (draws, n)
        remaining = torch.minimum(to_candidates, distance)
        best = int(remaining.sum(dim=1).argmin())
        chosen.append(int(candidates[best]))
        distance = remaining[best]
    return x[chosen].clone()


def choose_device(name: str) -> torch.device:
    """The device for --device auto|cpu|cuda|mps; InputError if the one asked for is not there."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if here[kind])
    if not here.get(name):
        raise InputError(f"--device {name} is not available here: use --device auto.")
    return torch.device(name)


def half_precision(device: torch.device | str, precision: str = "auto") -> torch.autocast:
    """Autocast to bfloat16, for precision "bf16", and for "auto" where the hardware computes in it.

    That is on GPUs and on processors with AVX-512 bf16 or AMX.
    """
    kind = torch.device(device).type
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    fast = kind != "cpu" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    enabled = precision == "bf16" or (precision == "auto" and bool(fast))
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)
