"""Posed views of a synthetic room, without pixels, for the tests of what is drawn and exported."""

import torch

from localization.cameras import Camera, project
from localization.features import Features
from localization.matching import View

CAMERA = Camera(320.0, 320.0, 320.0, 240.0, 640, 480)
SWAPPED = 20  # keypoints of the first image that carry another point's descriptor


def make_views(centers: list[list[float]], seed: int = 0) -> list[View]:
    """Posed views, all looking along z, of 200 points; keypoint k of the first is point k.

    The descriptors of its first SWAPPED keypoints are permuted: wrong matches. The keypoints of the
    others come in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    points = torch.rand(200, 3, **draw) * torch.tensor([4.0, 3, 3]) + torch.tensor([-2.0, -1.5, 5])
    descriptors = torch.nn.functional.normalize(torch.randn(200, 128, **draw), dim=1).float()
    views = []
    for number, center in enumerate(torch.tensor(centers, dtype=torch.float64)):
        own, order = descriptors.clone(), torch.arange(200)
        if number == 0:
            own[:SWAPPED] = own[:SWAPPED].roll(7, 0)
        else:
            order = torch.randperm(200, generator=generator)
        xy_px = project(CAMERA, points - center).float()
        ones = torch.ones(200)
        features = Features(xy_px[order], ones, 0 * ones, ones, own[order])
        views.append(View(features, CAMERA, torch.eye(3, dtype=torch.float64), center))
    return views
