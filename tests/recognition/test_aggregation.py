"""MixVPR, Conv-AP and attention pooling against their definitions; map sizes kept with the weights."""

import pytest
import torch
import torch.nn.functional as F

from model import InputError
from recognition.aggregation import AttentionPooling, ConvAP, MixVPR, build_aggregation, fit_to


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_mixvpr_has_its_published_parameters_and_dimension():
    layer, dim = build_aggregation("mixvpr", 1024, {})
    layer(torch.zeros(1, 1024, 20, 20))
    assert (count(layer), dim) == (2_337_604, 4096)


def test_mixvpr_is_its_formula():
    torch.manual_seed(0)
    layer = MixVPR(6, 4, 3, depth=2, positions=10).double()
    for p in layer.parameters():
        p.data.normal_()
    x = torch.randn(2, 6, 2, 5, dtype=torch.float64)
    maps = x.flatten(2)
    for mixer in layer.mix:
        _, one, _, two = mixer.mix
        normal = (maps - maps.mean(2, True)) / (
            maps.var(2, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        normal = normal * mixer.mix[0].weight + mixer.mix[0].bias
        hidden = (normal @ one.weight.T + one.bias).clamp(min=0)
        maps = maps + hidden @ two.weight.T + two.bias
    channels = torch.einsum("oc,ncl->nol", layer.channel_proj.weight, maps)
    channels = channels + layer.channel_proj.bias[:, None]
    rows = torch.einsum("rl,nol->nor", layer.row_proj.weight, channels) + layer.row_proj.bias
    found = layer(x)
    assert torch.allclose(found, rows.reshape(2, 12))
    assert torch.equal(found[0, 5], found.view(2, 4, 3)[0, 1, 2])  # channel-major


def test_mixvpr_takes_the_size_of_its_first_map_and_keeps_it_with_the_weights():
    layer, _ = build_aggregation("mixvpr", 8, {"mix_out_channels": 4, "fc_output_dim": 5})
    maps = torch.randn(2, 8, 3, 7)
    out = layer(maps)
    with pytest.raises(InputError, match="maps of 21 positions, and these images give 24"):
        layer(torch.randn(2, 8, 4, 6))
    again, _ = build_aggregation("mixvpr", 8, {"mix_out_channels": 4, "fc_output_dim": 5})
    state = {f"aggregation.{k}": v for k, v in layer.state_dict().items()}
    fit_to(again, state)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(maps), out)


def test_conv_ap_averages_the_cells():
    layer = ConvAP(6, 4, cells=2)
    x = torch.randn(2, 6, 4, 6)
    mixed = torch.einsum("oc,nchw->nohw", layer.channel_pool.weight[:, :, 0, 0], x)
    mixed = mixed + layer.channel_pool.bias[:, None, None]
    cells = [mixed[:, :, r : r + 2, c : c + 3].mean((2, 3)) for r in (0, 2) for c in (0, 3)]
    assert torch.allclose(layer(x), torch.stack(cells, 2).flatten(1), atol=1e-6)


def test_attention_begins_as_the_average_and_is_that_of_torch():
    torch.manual_seed(0)
    layer, x = AttentionPooling(16, heads=4), torch.randn(2, 16, 3, 5)
    assert torch.allclose(layer(x), F.normalize(x, dim=1).mean((2, 3)), atol=1e-6)
    torch.nn.init.normal_(layer.query)
    torch.nn.init.normal_(layer.value.weight)
    unit = F.normalize(x, dim=1)
    key, value = (
        f(unit).flatten(2).view(2, 4, 4, 15).transpose(2, 3) for f in (layer.key, layer.value)
    )
    query = layer.query[None, :, None].expand(2, -1, -1, -1)
    wanted = F.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(layer(x), wanted.flatten(1), atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
