"""SuperVLAD (Lu et al., NeurIPS 2024): VLAD without cluster centers, and its cross-image encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import InputError, NetVLAD, half_precision, warn

ENCODER_LAYERS, ENCODER_HEADS, ENCODER_WIDTH, ENCODER_DROPOUT = 2, 16, 2048, 0.1
ENCODER_MODES = ("alone", "batch")


class SuperVLAD(nn.Module):
    """Sums of local descriptors by soft assignment to clusters, of which `ghosts` are thrown away.

    a_k(x) = softmax over all K + G of w_k . x, V_k = sum_i a_k(x_i) x_i for the first K.

    clusters: K >= 1. ghosts: G >= 0. dim: channels of the map. encoder: whether the images of a batch
    attend to each other at the end. encoder_mode: at test a descriptor is encoded "alone", or with
    its "batch", as the authors do, on which it then depends.
    """

    def __init__(
        self,
        clusters: int,
        ghosts: int,
        dim: int,
        encoder: bool = False,
        encoder_mode: str = "alone",
    ) -> None:
        super().__init__()
        self.clusters, self.encoder_mode = clusters, encoder_mode
        self.assignment = nn.Conv2d(dim, clusters + ghosts, kernel_size=1, bias=False)
        self.encoder = _encoder(dim) if encoder else None
        self.initialized = False
        self.register_load_state_dict_post_hook(_mark_initialized)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, dim, h, w) -> (N, K * dim), cluster-major.

        While training `across` is left to the objective, which knows the images of the whole batch.
        """
        with half_precision(x.device, "float32"):  # as NetVLAD's, the logits reach hundreds
            x = F.normalize(x.float(), dim=1)
            assignment = self.assignment(x).flatten(2).softmax(dim=1)[:, : self.clusters]
            sums = assignment @ x.flatten(2).transpose(1, 2)  # (N, K, dim)
            found = F.normalize(F.normalize(sums, dim=2).flatten(1), dim=1)
        return found if self.training else self.across(found)

    def across(self, x: Tensor) -> Tensor:
        """Descriptors (N, K * dim) after the encoder, of norm 1: each cluster attends over images."""
        if self.encoder is None:
            return x
        sequence = x.unflatten(1, (self.clusters, -1))  # (N, K, dim), images along the sequence
        if not self.training and self.encoder_mode == "alone":
            sequence = sequence.flatten(0, 1)[None]  # N * K sequences of one image
        elif not self.training:
            warn(
                "--encoder_mode batch: a descriptor depends on the other images of its batch, so on "
                "--infer_batch_size and on the order of the files."
            )
        return F.normalize(self.encoder(sequence).reshape(x.shape[0], -1), dim=1)

    @torch.no_grad()
    def initialize(self, descriptors: Tensor, seed: int = 0) -> None:
        """Make the assignment that of NetVLAD to k-means centers of (n, dim), n >= K + G."""
        count, dim = self.assignment.weight.shape[:2]
        netvlad = NetVLAD(count, dim).to(descriptors.device)
        netvlad.initialize(descriptors, seed)
        self.assignment.weight.copy_(netvlad.assignment.weight)
        self.initialized = True


def _mark_initialized(module: nn.Module, _incompatible_keys: object) -> None:
    module.initialized = True


def _encoder(dim: int) -> nn.TransformerEncoder:
    if dim % ENCODER_HEADS:
        raise InputError(
            f"--crossimage_encoder needs a backbone whose channels are a multiple of {ENCODER_HEADS}, "
            f"not {dim}."
        )
    layer = nn.TransformerEncoderLayer(
        dim, ENCODER_HEADS, ENCODER_WIDTH, ENCODER_DROPOUT, activation="gelu", batch_first=False
    )
    return nn.TransformerEncoder(layer, ENCODER_LAYERS, enable_nested_tensor=False)
