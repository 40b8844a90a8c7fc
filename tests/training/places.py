"""Training data without images: places, what they look like behind the frozen part, and tuples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import NetVLADModel
from training.inputs import Inputs, Store
from training.mining import TupleLoader


class Named:
    """A data set of images that nobody reads, with their paths."""

    def __init__(self, letter: str, count: int) -> None:
        self.paths = [f"{letter}{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.paths)


def places(count: int = 6, size: int = 2, seed: int = 0) -> SimpleNamespace:
    """Data of `count` places 1 km apart: a query, index images 4, 8 and 20 m from it.

    `outputs` (4 count, 512, size, size): of the frozen part for queries, then index images.
    """
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(count, 512, size, size, generator=generator)
    noise = torch.randn(4, count, 512, size, size, generator=generator)
    at = np.arange(count)[:, None] * [1000.0, 0]
    index = (looks + noise[:3]).transpose(0, 1).flatten(0, 1)
    away = np.tile([[0, 4.0], [0, 8.0], [0, 20.0]], (count, 1))
    return SimpleNamespace(
        utm_query=at,
        utm_index=np.repeat(at, 3, axis=0) + away,
        threshold=25.0,
        outputs=torch.cat([looks + noise[3], index]),
        queries=Named("q", count),
        index=Named("i", 3 * count),
    )


def a_model(seed: int = 0) -> NetVLADModel:
    """A small model with clusters, whose last convolution is trained."""
    torch.manual_seed(seed)
    model = NetVLADModel(4, pretrained=False)
    model.netvlad.initialize(torch.nn.functional.normalize(torch.randn(200, 512), dim=1))
    model.trunk.initialized = True
    model.freeze_below(28)
    return model


def inputs_of(data: SimpleNamespace, model: NetVLADModel) -> Inputs:
    """Inputs of which the frozen outputs are known."""
    inputs = Inputs(model, [data.queries, data.index], torch.device("cpu"), Store(Path(".")))
    inputs.cached = {False: data.outputs.clone()}
    return inputs


def tuples_of(
    data: SimpleNamespace | None = None, model: NetVLADModel | None = None, held_out=1, **options
) -> tuple[TupleLoader, NetVLADModel]:
    """A loader over places whose last `held_out` queries are held out, and the model."""
    data, model = data or places(), model or a_model()
    rows = np.arange(len(data.utm_query))
    parts = rows[:-held_out], rows[-held_out:]
    options = {"batch_size": 2, "margin": 0.5} | options
    return TupleLoader(data, inputs_of(data, model), *parts, **options), model
