"""Losses of classes, views and domains against hand counts and pytorch-metric-learning; batches of classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from torch import nn

from model import DescriptorModel
from recognition.augmentation import Augmentation
from recognition.class_batches import ClassBatches, square
from recognition.classification import (
    Adversary,
    Classifier,
    ClassObjective,
    reverse_gradient,
    vicreg_loss,
)
from recognition.optimization import make_optimizer
from train import train, trained_parts

# ------------------------------------------------ classes


def test_cosface_is_a_hand_count():
    layer = Classifier(2, 2, "cosface", 0.01)
    layer.weight.data = torch.tensor([[0.6, 0.8], [0.2, math.sqrt(0.96)]])
    logits = layer(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    assert torch.allclose(logits, torch.tensor([[6.0, 6.0]]), atol=1e-5)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("cosface", lambda s, m: pml.CosFaceLoss(7, 5, margin=m, scale=s)),
        ("arcface", lambda s, m: pml.ArcFaceLoss(7, 5, margin=math.degrees(m), scale=s)),
        ("sphereface", lambda s, m: pml.SphereFaceLoss(7, 5, margin=2, scale=s)),
    ],
)
def test_margins_are_those_of_pytorch_metric_learning(kind, theirs):
    torch.manual_seed(0)
    layer = Classifier(5, 7, kind, 0.01)
    if kind == "sphereface":
        layer.margin = 2  # theirs takes whole numbers
    other = theirs(layer.scale, layer.margin)
    other.W.data = layer.weight.detach().T.clone()
    x, labels = F.normalize(torch.randn(40, 5), dim=1), torch.randint(7, (40,))
    for row, sign in enumerate((1, -1)):  # an angle of 0 and one of pi
        x[row] = sign * F.normalize(layer.weight.detach()[labels[row]], dim=0)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = F.cross_entropy(layer(mine, labels), labels)
    reference = other(yours, labels)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    for value in (loss, reference):
        value.backward()
    if kind != "sphereface":  # theirs does not normalize the descriptor
        assert torch.allclose(mine.grad[2:], yours.grad[2:], atol=1e-3)
        known = other.W.grad.T.isfinite().all(1)  # theirs may be NaN at those two angles
        assert set((~known).nonzero().flatten().tolist()) <= set(labels[:2].tolist())
        assert torch.allclose(layer.weight.grad[known], other.W.grad.T[known], atol=2e-3)
        assert layer.weight.grad.isfinite().all()


# ------------------------------------------------ views and domains


def test_vicreg_is_a_hand_count_and_that_of_pytorch_metric_learning():
    z, other = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[1.0, 1], [-1, -1]])
    assert vicreg_loss(z, other).item() == pytest.approx(22.6875, abs=1e-3)
    torch.manual_seed(0)
    z, other = torch.randn(16, 6), 0.5 * torch.randn(16, 6)
    assert vicreg_loss(z, other).item() == pytest.approx(
        pml.VICRegLoss()(z, ref_emb=other).item(), rel=1e-4
    )


def test_a_reversed_gradient_is_minus_the_weight_of_it():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (reverse_gradient(x, 0.3) ** 2).sum().backward()
    assert torch.allclose(x.grad, -0.3 * 2 * x)


def test_the_adversary_learns_forward_and_teaches_backward():
    torch.manual_seed(0)
    adversary = Adversary(4, weight=0.5)
    source, target = torch.randn(6, 4, 2, 3, requires_grad=True), torch.randn(3, 4, 2, 3) + 1

    def gradient(share: float) -> torch.Tensor:
        return torch.autograd.grad(adversary(source, target, share), source)[0]

    assert gradient(0.0).abs().max() == 0  # nothing is taken from the trunk at the beginning
    schedule = 2 / (1 + math.exp(-5)) - 1
    assert torch.allclose(gradient(0.5) / schedule, gradient(1.0) / (2 / (1 + math.exp(-10)) - 1))
    direction = F.normalize(gradient(1.0).flatten(), dim=0).view_as(source)
    before = adversary(source, target, 1.0)
    after = adversary(source.detach() - 0.5 * direction, target, 1.0)
    assert after > before  # descending the trunk's gradient makes the domains harder to tell
    adversary.shown()
    for layer in adversary.layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    adversary.layers[-1].bias.data[0] = 1  # says source of everything
    loss = adversary(source, target, 1.0)
    p = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    assert loss.item() == pytest.approx(float(-(p[0].log() + p[1].log()) / 2))  # domains alike
    assert adversary.shown() == {"domain accuracy": pytest.approx(6 / 9)}


# ------------------------------------------------ batches


class Images(torch.utils.data.Dataset):
    """uint8 images whose value is their row."""

    def __init__(self, count: int, begin: int = 0) -> None:
        self.paths, self.begin = [f"{i}.jpg" for i in range(count)], begin

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        return torch.full((3, 4, 4), self.begin + i, dtype=torch.uint8), i, self.paths[i]


def small_model() -> DescriptorModel:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    model = DescriptorModel(trunk, head, 6)
    model.precision = "float32"
    model.freeze_below(1)
    return model


GROUPS = [
    [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])],
    [np.array([8, 9]), np.array([10]), np.array([11, 12]), np.array([13, 14]), np.array([15])],
]


def batches_of(objective, **more) -> ClassBatches:
    options = {"batch_size": 2, "iterations": 6, "epochs": 2, "seed": 3} | more
    device = torch.device("cpu")
    return ClassBatches(Images(16), GROUPS, objective, Augmentation(), device=device, **options)


def rows_in(images: torch.Tensor) -> list[int]:
    mean, std = 0.485, 0.229
    return ((images[:, 0, 0, 0] * std + mean) * 255).round().int().tolist()


def test_an_epoch_is_a_group_whose_classes_come_round_alike():
    model = small_model()
    objective = ClassObjective(model, [3, 5], "cosface", 0.01)
    loader, seen = batches_of(objective), []
    for number in (1, 2, 3):
        classes = GROUPS[(number - 1) % 2]
        for images, labels in loader.epoch(model, number):
            assert len(set(labels.tolist())) == 2  # classes of a batch differ
            for row, label in zip(rows_in(images), labels.tolist()):
                assert row in classes[label]
            seen.append((number, tuple(labels.tolist()), tuple(rows_in(images))))
        active = [c.weight.requires_grad for c in objective.classifiers]
        assert active == [number != 2, number == 2]
    assert len(seen) == 18 and len({entry[1:] for entry in seen}) > 9
    again = [tuple(labels.tolist()) for _, labels in loader.epoch(model, 2, done=4)]
    assert again == [labels for number, labels, _ in seen if number == 2][4:]
    counts = np.bincount([x for n, labels, _ in seen if n == 2 for x in labels], minlength=5)
    assert counts.max() - counts.min() <= 3  # of five classes two wait a turn


def test_a_group_smaller_than_a_batch_repeats_its_classes():
    model = small_model()
    loader = batches_of(ClassObjective(model, [3, 5], "cosface", 0.01), batch_size=7, iterations=2)
    for _, labels in loader.epoch(model, 1):
        counts = np.bincount(labels.tolist(), minlength=3)
        assert counts.sum() == 7 and counts.min() == 2


def test_views_and_targets_come_beside():
    model = small_model()
    adversary = Adversary(4, 0.3)
    objective = ClassObjective(model, [3, 5], "cosface", 0.01, 0.1, adversary)
    loader = batches_of(objective, two_views=True, targets=Images(5, begin=100))
    images, labels, view, target = next(iter(loader.epoch(model, 1)))
    assert rows_in(images) == rows_in(view) and all(row >= 100 for row in rows_in(target))
    losses = objective(model, [images, labels, view, target], torch.device("cpu"))
    assert losses.shape == (2,) and losses.isfinite().all()
    alone = ClassObjective(model, [3, 5], "none", 0.01, 0.1)
    assert alone(model, [images, labels, view], torch.device("cpu")).isfinite().all()


def test_the_idle_classifier_rests_also_in_its_optimizer():
    model = small_model()
    objective = ClassObjective(model, [3, 5], "cosface", 0.02)
    before = [c.weight.detach().clone() for c in objective.classifiers]
    loader = batches_of(objective)
    train(model, loader, (), "cpu", 1, 1e-3, objective=objective, optimizer=make_optimizer("sgd"))
    moved = [not torch.equal(a, c.weight) for a, c in zip(before, objective.classifiers)]
    assert moved == [True, False]
    parts, optimizer = trained_parts(
        model, ClassObjective(model, [3], "cosface", 0.02), 1e-3, make_optimizer("sgd")
    )
    kinds = [type(each).__name__ for each in optimizer.optimizers]
    assert kinds == ["SGD", "Adam"] and optimizer.optimizers[1].param_groups[0]["lr"] == 0.02
    assert "objective.classifiers.0.weight" in parts and "trunk.0.weight" not in parts


def test_one_adam_a_classifier_is_what_one_for_all_does():
    """Adam's moments and steps of a classifier stand still while its group rests."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 2) for _ in range(2)]
    gradients = torch.randn(6, 3, 2)
    together = [nn.Parameter(w.clone()) for w in weights]
    alone = [nn.Parameter(w.clone()) for w in weights]
    (one,) = [torch.optim.Adam(together, lr=0.1)]
    each = [torch.optim.Adam([p], lr=0.1) for p in alone]
    for step, gradient in enumerate(gradients):
        group = step // 2 % 2
        one.zero_grad()
        together[group].grad, alone[group].grad = gradient.clone(), gradient.clone()
        one.step()
        each[group].step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone))


def test_any_image_becomes_a_square():
    from PIL import Image

    for size in ((30, 20), (20, 30), (300, 200), (8, 8)):
        assert square(16)(Image.new("RGB", size)).shape == (3, 16, 16)
