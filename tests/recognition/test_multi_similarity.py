"""Multi-similarity loss and miner: by hand, pytorch-metric-learning, micro-batches, two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner

from model import WARNINGS
from recognition.multi_similarity import BETA, MultiSimilarity, multi_similarity
from tests.recognition.pairs import CPU, gradients, images_of, network


def losses(similarity: torch.Tensor, labels: torch.Tensor, *how: float) -> torch.Tensor:
    same = labels[:, None] == labels
    return multi_similarity(similarity, same, torch.eye(len(labels), dtype=torch.bool), *how)


def test_three_images_by_hand():
    similarity = torch.tensor([[1, 0.25, 0.1], [0.25, 1, 0.3], [0.1, 0.3, 1]])
    found = losses(similarity, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([0, 0.875939, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed, beta, base", [(0, 50, 0), (1, 50, 0), (2, 20, 0.5), (3, 10, -0.2)])
def test_loss_and_gradient_are_those_of_pytorch_metric_learning(seed, beta, base):
    torch.manual_seed(seed)
    labels = torch.arange(6).repeat_interleave(4)
    centers = F.normalize(torch.randn(6, 8), dim=1)
    x = (centers[labels] + 0.5 * torch.randn(24, 8)).requires_grad_()
    unit = F.normalize(x, dim=1)
    mined = MultiSimilarityMiner(epsilon=0.1)(unit, labels)
    theirs = MultiSimilarityLoss(alpha=1.0, beta=beta, base=base)(unit, labels, mined)
    ours = losses(unit @ unit.T, labels, beta, base)
    assert 0 < (ours > 0).sum() and theirs > 0
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = torch.autograd.grad(theirs, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), x)[0], expected)


def test_an_image_without_other_places_or_company_costs_nothing():
    assert torch.equal(losses(torch.ones(3, 3), torch.zeros(3)), torch.zeros(3))
    assert torch.equal(losses(torch.eye(2), torch.tensor([0, 1])), torch.zeros(2))


@pytest.mark.parametrize("frozen", [0, 1])
def test_micro_batches_have_the_same_gradient(frozen):
    def found(micro: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model, seen = network(frozen=frozen), []
        model.trunk[3].p = 0.0  # drawn otherwise in parts
        model.trunk[0].register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
        loss = MultiSimilarity(micro)(model, [*images_of(range(4)), torch.tensor(7)], CPU)
        assert max(seen) == (micro or 12)
        loss.mean().backward()
        return loss.detach(), gradients(model)

    whole = found(None)
    for micro in (5, 1):
        torch.testing.assert_close(found(micro), whole, atol=1e-6, rtol=1e-4)


def test_the_second_pass_leaves_batch_normalizations_alone():
    model, images = network(frozen=0), images_of(range(2))[0]
    model.trunk[1] = torch.nn.BatchNorm2d(8)
    objective = MultiSimilarity(3)
    loss = objective(model, [*images_of(range(2)), torch.tensor(0)], CPU)
    after_one = model.trunk[1].running_mean.clone()
    loss.mean().backward()
    assert torch.equal(model.trunk[1].running_mean, after_one) and model.trunk[1].momentum == 0.1
    expected = torch.zeros(8)
    for part in images.split(3):
        expected = 0.9 * expected + 0.1 * model.trunk[0](part).mean((0, 2, 3))
    torch.testing.assert_close(after_one, expected.detach())
    assert "batch normalizations see the images of a micro-batch" in WARNINGS[0]


def test_dropout_is_drawn_by_the_key_and_disturbs_no_other_draw():
    model, batch = network(), images_of(range(3))
    first = MultiSimilarity()(model, [*batch, torch.tensor(3)], CPU)
    torch.manual_seed(5)
    again = MultiSimilarity()(model, [*batch, torch.tensor(3)], CPU)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, MultiSimilarity()(model, [*batch, torch.tensor(4)], CPU))


@pytest.mark.parametrize("once", [False, True])
def test_the_encoder_has_gradients_in_each_step_or_only_in_the_first(once):
    model, objective = network(), MultiSimilarity(encoder_once=once)
    for step in range(3):
        model.zero_grad()
        objective(model, [*images_of(range(3)), torch.tensor(step)], CPU).mean().backward()
        trained = {k for k in gradients(model) if k.startswith("aggregation.encoder.")}
        assert bool(trained) == (step == 0 or not once)
    assert objective.steps == 3  # saved, so that a run that goes on has no other first step


def test_the_base_is_the_mean_of_different_places_in_the_first_batch():
    model, objective = network(encoder=False), MultiSimilarity(base=None)
    model.trunk[3].p = 0.0
    for places in (range(3), range(1, 5)):
        images, labels = images_of(places)
        found = objective(model, [images, labels, torch.tensor(7)], CPU)
        x = model(images)
        if places[0] == 0:
            pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if labels[i] != labels[j]]
            mean = sum((x[i] @ x[j]).item() for i, j in pairs) / len(pairs)
        torch.testing.assert_close(found, losses(x @ x.T, labels, BETA, mean))
    assert objective.shown() == {"loss's base": pytest.approx(mean, abs=1e-5)}
    assert MultiSimilarity().shown() == {}


PROCESS = """
import sys, torch
import torch.distributed as dist
from tests.recognition.pairs import CPU, gradients, images_of, network
from recognition.multi_similarity import MultiSimilarity
from training.distributed import sum_over_processes
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = network()
model.trunk[3].p = 0.0
images, labels = images_of((range(3), range(3, 5))[rank])
objective = MultiSimilarity(4, base=None)
losses = objective(model, [images, labels, torch.tensor(7)], CPU)
(losses.sum() / 15).backward()
own = [p for p in model.parameters() if p.requires_grad]
total = sum_over_processes(own, losses.detach().sum()[None])
torch.save([torch.stack([total[0], objective.base]), gradients(model)], f"{folder}/{rank}.pth")
"""


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path, monkeypatch):
    command = [sys.executable, "-c", PROCESS]
    where = {"cwd": Path(__file__).parents[2]}
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], **where) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    torch.testing.assert_close(results[0], results[1])
    model = network()
    model.trunk[3].p = 0.0
    one, other = images_of(range(3)), images_of(range(3, 5))
    batch = [torch.cat(parts) for parts in zip(one, other)]
    objective = MultiSimilarity(base=None)
    loss = objective(model, [*batch, torch.tensor(7)], CPU)
    loss.mean().backward()
    numbers, theirs = results[0]
    torch.testing.assert_close(numbers, torch.stack([loss.sum().detach(), objective.base]))
    assert theirs.keys() == gradients(model).keys() and len(theirs) > 20
    torch.testing.assert_close(theirs, gradients(model), atol=1e-6, rtol=1e-4)
