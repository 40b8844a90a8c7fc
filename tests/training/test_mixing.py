"""How far the trained weights are gone back towards the untrained ones."""

import pytest
import torch

from training.mixing import SHARES, keep_best_share


class Ranking:
    """Stands in for the tuples: ranks by how near a model's weights are to some."""

    def __init__(self, best: list[torch.Tensor]) -> None:
        self.best, self.fresh = best, False

    def forget_descriptors(self) -> None:
        self.fresh = True

    def judge(self, model):
        assert self.fresh  # descriptors of other weights would be ranked
        self.fresh = False
        self.described = [p.detach().clone() for p in model.parameters()]
        away = [(p - b).abs().max() for p, b in zip(model.parameters(), self.best, strict=True)]
        return -torch.stack(away), {}


def networks():
    return [
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)) for _ in range(2)
    ]


@pytest.mark.parametrize("share", SHARES)
def test_the_share_that_ranks_held_out_queries_best_is_taken(share):
    torch.manual_seed(0)
    model, untrained = networks()
    model(torch.randn(2, 3, 4, 4))  # moves the running mean
    pairs = list(zip(untrained.parameters(), model.parameters(), strict=True))
    wanted = [(a + share * (b - a)).detach() for a, b in pairs]
    mean, trained = model[1].running_mean.clone(), [b.detach().clone() for _, b in pairs]
    ranking = Ranking(wanted)
    line = keep_best_share(model, untrained, ranking)
    assert f"weights {share:.0%} is gone" in line and "85% -" in line
    for found, other in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, other)
    torch.testing.assert_close(model[1].running_mean, share * mean)
    assert model[1].num_batches_tracked == 1
    kept = zip(model.parameters(), ranking.described, strict=True)
    assert ranking.fresh or all(torch.equal(*pair) for pair in kept)  # no descriptors of other weights
    assert ranking.fresh == (share < 1)  # those of all of the way serve on
    if share == 1:
        assert all(torch.equal(p, t) for p, t in zip(model.parameters(), trained, strict=True))


def test_what_was_not_learned_stays_the_same_bits():
    model, untrained = networks()
    model[0].load_state_dict(untrained[0].state_dict())
    before = model[0].weight.clone()
    keep_best_share(model, untrained, Ranking([p * 0 for p in model.parameters()]))
    assert torch.equal(model[0].weight, before)


def test_without_a_sure_gain_all_that_was_learned_stays():
    """Of four held-out queries one ranks much better part of the way, the others a little worse."""
    model, untrained = networks()
    with torch.no_grad():
        for parameter in [*model.parameters(), *untrained.parameters()]:
            parameter.zero_()
        for parameter in model.parameters():
            parameter += 1
    shares = [torch.full_like(p, s) for p, s in zip(model.parameters(), (0.5, 0.94, 0.94, 0.94))]
    assert "weights 100% is gone" in keep_best_share(model, untrained, Ranking(shares))
    assert all(bool((p == 1).all()) for p in model.parameters())
