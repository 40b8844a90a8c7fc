"""Processor seconds of a step of CosPlace's training: this project's loop, and a plain one.

    python tests/bench/class_batches.py FOLDER [--image_size 224] [--steps 4]

The plain loop is the published one on a processor: float32, images augmented by Pillow one by one. FOLDER
holds named training images. Processor time is compared, so that other programs do not matter; both loops
take turns. Reading alone is measured too.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.classes import Grid, find_classes
from dataset.folders import FolderImages
from eval import load_image
from model import IMAGENET_MEAN, IMAGENET_STD, progress
from recognition.augmentation import Augmentation
from recognition.class_batches import ClassBatches, square
from recognition.classification import Classifier, ClassObjective
from recognition.optimization import make_optimizer
from recognition.recipes import build_model
from train import train

SETTINGS = {"backbone": "ResNet18", "aggregation": "gem", "fc_output_dim": 512}
DEVICE = torch.device("cpu")


def ours(images: FolderImages, groups: list, size: int, steps: int) -> float:
    """Seconds a step of train()."""
    images.transform = square(size)
    model = build_model(SETTINGS)
    model.trunk.initialized = True  # timing asks nothing of the weights
    objective = ClassObjective(model, [len(groups[0])], "cosface", 0.01)
    augmentation = Augmentation(brightness=0.7, contrast=0.7, saturation=0.7, hue=0.5, crop=0.5)
    batches = ClassBatches(
        images, groups[:1], objective, augmentation,
        batch_size=32, iterations=steps, epochs=1, seed=0, device=DEVICE,
    )  # fmt: skip
    begun = time.process_time()
    train(
        model, batches, (), DEVICE, 1, 1e-5, objective=objective, optimizer=make_optimizer("adam")
    )
    return (time.process_time() - begun) / steps


def plain(images: FolderImages, groups: list, size: int, steps: int) -> float:
    """Seconds a step of the loop that one writes first."""
    augment = transforms.Compose([
        transforms.ColorJitter(0.7, 0.7, 0.7, 0.5),
        transforms.RandomResizedCrop(size, (0.5, 1), antialias=True),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    model = build_model(SETTINGS).train()
    classifier = Classifier(512, len(groups[0]), "cosface", 0.01)
    optimizers = [torch.optim.Adam(model.parameters(), 1e-5)]
    optimizers.append(torch.optim.Adam(classifier.parameters(), 0.01))
    rng, begun = np.random.default_rng(0), time.process_time()
    for _ in range(steps):
        labels = rng.choice(len(groups[0]), 32, replace=len(groups[0]) < 32)
        paths = [images.paths[rng.choice(groups[0][label])] for label in labels]
        batch = torch.stack([augment(load_image(path)) for path in paths])
        labels = torch.from_numpy(labels)
        loss = F.cross_entropy(classifier(model(batch), labels), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return (time.process_time() - begun) / steps


def reading(images: FolderImages, size: int, count: int = 64) -> float:
    """Seconds to read a batch of 32."""
    images.transform = square(size)
    begun = time.process_time()
    for row in range(count):
        images[row % len(images)]
    return (time.process_time() - begun) * 32 / count


def main() -> None:
    """Print seconds a step of both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    progress.hidden = True
    torch.set_num_threads(1)
    images = FolderImages([args.folder], None, args.image_size)
    groups = find_classes(images.utm, images.headings_deg, images.paths, Grid()).groups
    print(f"reading a batch of 32: {reading(images, args.image_size):.2f} s")
    for turn in range(3):
        a = ours(images, groups, args.image_size, args.steps)
        b = plain(images, groups, args.image_size, args.steps)
        print(
            f"turn {turn + 1}: ours {a:.2f} s a step, plain {b:.2f} s, ratio {b / a:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
