"""A small network with a cross-image encoder, and batches of places x images for it."""

import torch
from torch import nn

from model import DescriptorModel
from recognition.supervlad import SuperVLAD

CPU = torch.device("cpu")


def network(encoder: bool = True, frozen: int = 1) -> DescriptorModel:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Dropout(0.2))
    pool = SuperVLAD(2, 1, 16, encoder=encoder)
    nn.init.normal_(pool.assignment.weight)
    model = DescriptorModel(trunk, pool, 32)
    model.precision = "float32"
    model.freeze_below(frozen)
    return model.train()


def images_of(places: range) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([place for place in places for _ in range(3)])
    drawn = [torch.Generator().manual_seed(100 + i) for i in range(len(labels))]
    images = torch.stack([torch.randn(3, 20, 20, generator=g) for g in drawn])
    return images + labels[:, None, None, None], labels


def gradients(model: DescriptorModel) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
