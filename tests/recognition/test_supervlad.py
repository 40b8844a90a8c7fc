"""SuperVLAD: the formula in a loop, closed forms, the encoder alone and over a batch."""

import pytest
import torch
import torch.nn.functional as F

from model import WARNINGS, InputError
from recognition.supervlad import SuperVLAD


def layer(clusters: int, ghosts: int, dim: int, **more) -> SuperVLAD:
    torch.manual_seed(0)
    made = SuperVLAD(clusters, ghosts, dim, **more)
    torch.nn.init.normal_(made.assignment.weight, std=3)
    return made.eval()


@pytest.mark.parametrize("clusters, ghosts", [(4, 1), (1, 2), (3, 0), (1, 0)])
def test_descriptors_are_sums_by_assignment_without_the_ghosts(clusters, ghosts):
    made, x = layer(clusters, ghosts, 5), torch.randn(2, 5, 3, 4)
    found = made(x)
    assert found.shape == (2, clusters * 5)
    weight = made.assignment.weight[:, :, 0, 0]
    for image, descriptor in zip(x, found):
        sums = torch.zeros(clusters, 5)
        for position in image.flatten(1).T:
            unit = position / position.norm()
            share = torch.softmax(weight @ unit, 0)
            sums += share[:clusters, None] * unit
        sums = sums / sums.norm(dim=1, keepdim=True)
        torch.testing.assert_close(descriptor, sums.flatten() / sums.norm())


def test_without_preference_a_cluster_is_the_mean_direction():
    made, x = layer(1, 1, 6), torch.randn(1, 6, 4, 4)
    torch.nn.init.zeros_(made.assignment.weight)
    total = F.normalize(x, dim=1).sum((2, 3))
    torch.testing.assert_close(made(x), total / total.norm())


def test_the_published_sizes():
    made = SuperVLAD(4, 1, 768, encoder=True)
    assert made.assignment.weight.numel() == 3_840
    assert sum(p.numel() for p in made.encoder.parameters()) == 11_027_968


def test_clusters_begin_at_the_centers_and_nearly_hard():
    centers = torch.eye(6)[:3]
    points = F.normalize(centers.repeat(40, 1) + 0.05 * torch.randn(120, 6), dim=1)
    made = SuperVLAD(2, 1, 6)
    assert not made.initialized
    made.initialize(points)
    assert made.initialized
    weight = made.assignment.weight[:, :, 0, 0]
    assert sorted(F.normalize(weight, dim=1).argmax(1).tolist()) == [0, 1, 2]
    ratio = (points @ weight.T).topk(2, dim=1).values
    assert (ratio[:, 0] - ratio[:, 1]).mean().item() == pytest.approx(4.60517, rel=1e-3)
    with pytest.raises(InputError, match="2 local descriptors cannot be clustered into 3"):
        made.initialize(points[:2])
    again = SuperVLAD(2, 1, 6)
    again.load_state_dict(made.state_dict())
    assert again.initialized


def attention_over_images(made: SuperVLAD, x: torch.Tensor) -> torch.Tensor:
    """The encoder of (N, K, D) written out: each cluster by itself, image attends to image."""
    for part in made.encoder.layers:
        n, _, d = x.shape
        heads, each = part.self_attn.num_heads, d // part.self_attn.num_heads
        out = torch.empty_like(x)
        for k in range(x.shape[1]):
            qkv = x[:, k] @ part.self_attn.in_proj_weight.T + part.self_attn.in_proj_bias
            q, key, v = (t.view(n, heads, each) for t in qkv.split(d, 1))
            mixed = torch.empty(n, heads, each)
            for i in range(n):
                for h in range(heads):
                    share = torch.softmax(key[:, h] @ q[i, h] / each**0.5, 0)
                    mixed[i, h] = share @ v[:, h]
            out[:, k] = part.self_attn.out_proj(mixed.flatten(1))
        x = part.norm1(x + out)
        x = part.norm2(x + part.linear2(F.gelu(part.linear1(x))))
    return x


def test_the_encoder_attends_over_images_or_leaves_each_alone():
    made = layer(2, 1, 32, encoder=True, encoder_mode="batch")
    x = torch.randn(5, 32, 3, 3)
    with torch.inference_mode():
        together = made(x)
        pooled = made.train()(x)  # what the objective encodes
        made.eval()
        expected = attention_over_images(made, pooled.unflatten(1, (2, 32))).flatten(1)
        torch.testing.assert_close(together, F.normalize(expected, dim=1), atol=1e-5, rtol=0)
        assert "depends on the other images of its batch" in WARNINGS[0]
        made.encoder_mode = "alone"
        alone = made(x)
        assert not torch.allclose(alone, together, atol=1e-2)
        torch.testing.assert_close(alone, torch.cat([made(one[None]) for one in x]))
        made.encoder_mode = "batch"
        torch.testing.assert_close(alone[:1], made(x[:1]))
    with pytest.raises(InputError, match="multiple of 16, not 40"):
        SuperVLAD(1, 0, 40, encoder=True)
