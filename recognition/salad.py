"""SALAD (Izquierdo & Civera, CVPR 2024): local descriptors assigned to clusters by optimal transport."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import InputError, half_precision
from recognition.vit import unpack

HIDDEN, DROPOUT, SINKHORN_ROUNDS = 512, 0.3, 3


class SALAD(nn.Module):
    """Each cluster's weighted sum of reduced patch tokens, beside the reduced class token.

    A dustbin takes what belongs to no cluster. channels: of the tokens. The descriptor has
    token_dim + clusters * cluster_dim numbers.
    """

    def __init__(self, channels: int, clusters: int, cluster_dim: int, token_dim: int) -> None:
        super().__init__()

        def reduced(to: int) -> nn.Sequential:
            first, last = nn.Conv2d(channels, HIDDEN, 1), nn.Conv2d(HIDDEN, to, 1)
            return nn.Sequential(first, nn.Dropout(DROPOUT), nn.ReLU(), last)

        self.token_features = nn.Sequential(
            nn.Linear(channels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, token_dim)
        )
        self.cluster_features, self.score = reduced(cluster_dim), reduced(clusters)
        self.dust_bin = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens packed (vit.pack), (N, channels, h + 1, w) -> (N, D), of norm 1."""
        tokens, grid = unpack(x)
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        features, score = self.cluster_features(patches).flatten(2), self.score(patches).flatten(2)
        with half_precision(x.device, "float32"):
            share = transport(score.float(), self.dust_bin)  # (N, clusters, h * w)
            sums = features.float() @ share.transpose(1, 2)  # (N, cluster_dim, clusters)
            of_class = F.normalize(self.token_features(tokens[:, 0].float()), dim=1)
            local = F.normalize(sums, dim=1).flatten(1)
            return F.normalize(torch.cat([of_class, local], 1), dim=1)


def transport(score: Tensor, dustbin: Tensor) -> Tensor:
    """Sinkhorn's assignment (N, K, L) of L positions to K clusters, without the dustbin's share.

    Each position gives 1, each cluster takes 1, the dustbin the L - K that are left.
    score: (N, K, L). dustbin: its score. InputError unless L > K.
    """
    n, clusters, positions = score.shape
    if positions <= clusters:
        raise InputError(
            f"SALAD needs more than {clusters} patches an image, not {positions}: raise --resize."
        )
    score = torch.cat([score, dustbin.float().expand(n, 1, positions)], 1)
    takes = score.new_zeros(clusters + 1)
    takes[-1] = math.log(positions - clusters)
    v = score.new_zeros(n, 1, positions)
    for _ in range(SINKHORN_ROUNDS):
        u = takes[:, None] - (score + v).logsumexp(2, keepdim=True)
        v = -(score + u).logsumexp(1, keepdim=True)
    return (score + u + v).exp()[:, :-1]
