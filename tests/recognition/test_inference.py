"""Descriptors and rankings at test: closed forms, hand counts, scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn
from torchvision.transforms import functional as tvf

from eval import first_hits, search
from model import IMAGENET_MEAN, IMAGENET_STD, DescriptorModel, InputError
from recognition import inference
from recognition.eval_command import recall_at
from recognition.inference import (
    METHODS,
    Pca,
    Pipeline,
    describe_images,
    for_inference,
    framing,
    merge_crops,
    rank,
    transform_for,
    unit,
    vote,
)
from recognition.recipes import build_model
from recognition.reranking import (
    components,
    count_inliers,
    expand_queries,
    rerank_clusters,
    rerank_expansion,
    rerank_geometric,
)
from training.inputs import Store


def vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


# ------------------------------------------------ methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("native", [(80, 40), (40, 80), (33, 47), (200, 150)])
def test_every_method_gives_its_size(method, native):
    size = (24, 32)
    tensor = transform_for(method, size)(Image.new("RGB", native, (255, 128, 0)))
    shortest = min(native)
    expected = {
        "hard_resize": (3, 24, 32),
        "single_query": (3, 24 * native[1] // shortest, 24 * native[0] // shortest),
        "central_crop": (3, 24, 32),
    }.get(method, (15, 24, 24))
    assert tensor.shape == expected
    color = torch.tensor([1, 128 / 255, 0])
    want = (color - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(tensor.unflatten(0, (-1, 3)).mean((0, 2, 3)), want, atol=1e-2)


@pytest.mark.parametrize("native", [(61, 37), (37, 61), (64, 36), (25, 90)])
def test_images_are_brought_to_size_as_torchvision_does(native):
    pixels = np.random.default_rng(1).integers(0, 256, (*native[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def ready(image: Image.Image) -> torch.Tensor:
        return tvf.normalize(tvf.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)

    scale = max(24 / image.height, 33 / image.width)
    grown = tvf.resize(image, [round(image.height * scale), round(image.width * scale)])
    shorter = tvf.resize(image, [24])
    for method, want in {
        "hard_resize": ready(tvf.resize(image, [24, 33])),
        "central_crop": ready(tvf.center_crop(grown, [24, 33])),
        "single_query": ready(shorter),
        "five_crops": torch.cat(tvf.five_crop(ready(shorter), [24])),
    }.items():
        assert torch.equal(transform_for(method, (24, 33))(image), want), method
    assert torch.equal(framing([24])(image), ready(shorter))
    assert torch.equal(framing([])(image), ready(image))


def test_central_crop_keeps_the_middle():
    image = Image.new("RGB", (100, 20), "black")
    image.paste("white", (40, 0, 60, 20))
    tensor = transform_for("central_crop", (20, 20))(image)
    assert torch.allclose(tensor.std((1, 2)), torch.zeros(3), atol=1e-5) and tensor.min() > 1


def test_votes_and_merging_are_those_counted_by_hand():
    found = np.array([[7, 3], [7, 5]])
    distance = vote(np.array([[0.50, 0.60], [0.52, 0.70]]), found, 0.01)
    assert distance == pytest.approx(np.array([[0.474, 0.60], [0.494, 0.70]]))
    merged, images = merge_crops(distance, found, 3)
    late = vote(np.full((3, 2), 0.5), np.array([[7, 3], [7, 5], [9, 7]]), 0.01)
    assert late == pytest.approx(np.array([[0.471, 0.5], [0.471, 0.5], [0.5, 0.491]]))
    assert images.tolist() == [7, 3, 5] and merged == pytest.approx([0.474, 0.60, 0.70])


def voted(lists: list[list[tuple[float, int]]], weight: float) -> list[list[tuple[float, int]]]:
    """The benchmark's majority voting, literally: (distance, image) of each crop, best first."""
    lowered = [[distance for distance, _ in crop] for crop in lists]
    for n in (1, 5, 10):
        named = [image for crop in lists for _, image in crop[:n]]
        for image in set(named):
            count = named.count(image)
            if count > 1:
                for c, crop in enumerate(lists):
                    for place, (_, other) in enumerate(crop[:n]):
                        if other == image:
                            lowered[c][place] -= weight * count / n
    return [
        list(zip(distances, [image for _, image in crop]))
        for distances, crop in zip(lowered, lists)
    ]


def literal_query(image: Image.Image, method: str, height: int, width: int) -> list[Image.Image]:
    """What of a query image the network sees, by Pillow alone."""
    w, h = image.size
    side = min(height, width)
    if method == "hard_resize":
        return [image.resize((width, height), Image.Resampling.BILINEAR)]
    if method == "central_crop":
        scale = max(height / h, width / w)
        w, h = max(round(w * scale), width), max(round(h * scale), height)
        left, top = round((w - width) / 2), round((h - height) / 2)
        grown = image.resize((w, h), Image.Resampling.BILINEAR)
        return [grown.crop((left, top, left + width, top + height))]
    w, h = (side, int(side * h / w)) if w < h else (int(side * w / h), side)
    shrunk = image.resize((w, h), Image.Resampling.BILINEAR)
    if method == "single_query":
        return [shrunk]
    x, y = round((w - side) / 2), round((h - side) / 2)
    corners = [(0, 0), (w - side, 0), (0, h - side), (w - side, h - side), (x, y)]
    return [shrunk.crop((x, y, x + side, y + side)) for x, y in corners]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("native", [(90, 41), (37, 80)])
def test_queries_are_cut_as_pillow_does_it(method, native):
    pixels = np.random.default_rng(0).integers(0, 256, (*native[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    found = transform_for(method, (24, 32))(image).unflatten(0, (-1, 3))
    cuts = literal_query(image, method, 24, 32)
    assert len(found) == len(cuts)
    for ours, cut in zip(found, cuts):
        theirs = (np.asarray(cut, float) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        assert np.allclose(ours.numpy(), theirs.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ranking_by_every_method_against_plain_loops(method):
    index = vectors(9, 6)
    queries = vectors(20, 6, 1).reshape(4, 5, 6)
    queries = queries if method in inference.OF_CROPS else queries[:, :1]
    similarity, found = rank(queries, index, 4, method)
    for q, ranked in zip(queries, found):
        if method in ("nearest_crop", "maj_voting"):
            lists = [
                sorted((float(2 - 2 * row @ crop), i) for i, row in enumerate(index))[:4]
                for crop in q
            ]
            if method == "maj_voting":
                lists = voted(lists, 0.01)
            merged = []
            for _, place in sorted(entry for each in lists for entry in each):
                if place not in merged:
                    merged.append(place)
            assert ranked.tolist() == merged[:4]
            continue
        assert ranked.tolist() == (-index @ q.mean(0)).argsort()[:4].tolist()
    assert (np.diff(similarity, axis=1) <= 0).all() and found.shape == (4, 4)
    index *= np.linspace(0.5, 2, 9, dtype=np.float32)[:, None]  # of other norms: by distance
    nearest = rank(queries, index, 4, method, by_distance=True)[1]
    if method not in ("nearest_crop", "maj_voting"):
        away = np.linalg.norm(queries.mean(1)[:, None] - index, axis=2)
        assert np.array_equal(nearest, away.argsort(axis=1)[:, :4])
    assert rank(queries, index, 50, method)[1].shape == (4, 9)


def test_recall_is_a_hand_count_also_beyond_the_database():
    ranking = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 1, 2]])
    positives = [np.array([0]), np.array([0]), np.array([0, 2]), np.array([], int)]
    hits = first_hits(ranking, positives)
    assert recall_at(hits, 3, [1, 2, 3, 20]) == [0.25, 0.5, 0.75, 0.75]


# ------------------------------------------------ scales and PCA


def test_scales_are_resized_images_and_their_normalized_mean():
    torch.manual_seed(0)
    model = DescriptorModel(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), 4)
    model.aggregation = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pipeline, x = Pipeline(model, (0.5, 1, 2)), torch.rand(2, 3, 16, 20)
    assert pipeline.variants == ["scale 0.5", "scale 1", "scale 2", "all scales"]
    found = pipeline(x).unflatten(1, (4, 4))
    each = [
        model(F.interpolate(x, (int(16 * s), int(20 * s)), mode="bilinear", antialias=True))
        for s in (0.5, 1, 2)
    ]
    for i, one in enumerate(each):
        assert torch.allclose(found[:, i], one, atol=1e-6)
    assert torch.allclose(found[:, 3], F.normalize(sum(each), dim=1), atol=1e-6)
    crops = torch.rand(2, 15, 16, 16)
    plain = Pipeline(model)
    assert torch.allclose(plain(crops).view(2, 5, 4)[1, 2], model(crops[1, 6:9][None])[0])
    assert plain.variants == [""] and torch.equal(plain(x), F.normalize(model(x), dim=1))


def test_the_copy_for_inference_describes_as_the_model_does():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 70, 70)
    for backbone in ("resnet18conv4", "resnet50conv5", "EfficientNet_B0", "vgg16", "dinov2_vits14"):
        model = build_model({"backbone": backbone, "aggregation": "gem"}, "random").eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for precision, close in (("float32", 1e-5), ("bf16", 0)):
            model.precision = precision
            ready = for_inference(model, "cpu")
            with torch.inference_mode(), model.autocast("cpu"):
                mine, theirs = ready(images), model(images)
            if precision == "bf16" and len(before) != len(ready.state_dict()):  # folded, rounded anew
                assert float((mine * theirs).sum(1).min()) > 0.99
            else:
                torch.testing.assert_close(mine, theirs, atol=close, rtol=0)
            assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_that_of_scikit_learn(whiten):
    x = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32) * np.arange(1, 13)
    x = x.astype(np.float32)
    theirs = unit(PCA(5, whiten=whiten, svd_solver="full").fit(x).transform(x))
    ours = Pca.fit(x, 5, whiten)(x)
    assert np.allclose(
        np.abs((ours * theirs).sum(0)) ** 2, (theirs**2).sum(0) * (ours**2).sum(0), rtol=1e-3
    )
    assert np.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)
    with pytest.raises(InputError, match="--pca_dim 13 is more than the images .* use 12 or less"):
        Pca.fit(x, 13, whiten)


def test_descriptors_are_computed_a_part_at_a_time(tmp_path, monkeypatch):
    """In parts of at most BLOCK_CELLS numbers, stored in a file: the same numbers as in one go."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = DescriptorModel(nn.Sequential(nn.Conv2d(3, 4, 3)), head, 4)
    images = [(torch.rand(15, 9, 9), i, f"{i}.jpg") for i in range(23)]
    how = Pipeline(model, (0.5, 1)), images, torch.device("cpu")
    whole = describe_images(*how, Store(tmp_path), 4, crops=5)
    sizes = []
    compute = inference.compute_embeddings

    def counted(*args):
        found = compute(*args)
        sizes.append(found[0].size)
        return found

    monkeypatch.setattr(inference, "compute_embeddings", counted)
    monkeypatch.setattr(inference, "BLOCK_CELLS", 5 * 3 * 4 * 7)
    parts = describe_images(*how, Store(tmp_path, budget=0), 4, crops=5)
    assert parts.shape == whole.shape == (3, 23, 5, 4) and np.allclose(parts, whole, atol=1e-6)
    assert max(sizes) == 5 * 3 * 4 * 7 and sum(sizes) == parts.size
    pca = Pca.fit(whole[2].reshape(-1, 4), 3, True)
    in_parts = pca(parts)
    monkeypatch.undo()
    assert np.allclose(in_parts, pca(whole), atol=1e-5) and in_parts.shape == (3, 23, 5, 3)


# ------------------------------------------------ re-ranking


def test_components_are_chains_of_near_positions():
    utm = np.array([[0, 0], [100, 0], [20, 0], [40, 0], [100, 25], [100, 51]], float)
    assert components(utm, 25).tolist() == [0, 1, 0, 0, 1, 2]


def test_the_cluster_of_most_evidence_comes_first():
    utm = np.array([[0, 0], [500, 0], [510, 0], [520, 0]], float)
    similarity = np.array([[0.80, 0.79, 0.78, 0.77]])
    ranking = np.array([[0, 1, 2, 3]])
    assert rerank_clusters(similarity, ranking, utm, 25).tolist() == [[1, 2, 3, 0]]
    alone = rerank_clusters(similarity, ranking, utm * 10, 25)
    assert alone.tolist() == ranking.tolist()
    wide = np.arange(30)[None]
    far = np.arange(60.0).reshape(30, 2) * 1000
    many = rerank_clusters(np.linspace(1, 0, 30)[None], wide, far, 25)
    assert many.tolist() == wide.tolist()


def test_expansion_adds_the_neighbors_by_their_similarity():
    index, queries = vectors(12, 6), vectors(3, 6, 2)
    similarity, ranking = search(queries, index, 8)
    found = expand_queries(queries, index, ranking)
    for q in range(3):
        total = queries[q].copy()
        for value, row in zip(similarity[q, :5], ranking[q, :5]):
            total += max(value, 0) ** 3 * index[row]
        assert np.allclose(found[q], total / np.linalg.norm(total), atol=1e-6)
    again = rerank_expansion(queries, index, ranking, torch.device("cpu"))
    assert np.array_equal(again, search(found, index, 8)[1])
    long = np.arange(1, 13, dtype=np.float32)[:, None] * index  # norms tell nothing of the places
    assert np.array_equal(rerank_expansion(7 * queries, long, ranking, torch.device("cpu")), again)


def texture(seed: int) -> Image.Image:
    """Random rectangles: corners to match."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (240, 180), "gray")
    for _ in range(120):
        x, y, w, h = (int(v) for v in rng.uniform([0, 0, 5, 5], [230, 170, 40, 40]))
        image.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (x, y, x + w, y + h))
    return image


def test_the_image_with_the_same_structure_comes_first(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    texture(0).save(paths[0])
    texture(1).save(paths[1])
    texture(2).save(paths[2])
    texture(0).transform((240, 180), Image.Transform.AFFINE, (1, 0.05, 6, -0.04, 1, 4)).save(
        paths[3]
    )
    ranking = np.array([[0, 1, 2], [1, 2, 0]])
    found = rerank_geometric(ranking, [paths[3], paths[3]], paths[:3])
    assert found[:, 0].tolist() == [0, 0] and all(set(row) == {0, 1, 2} for row in found.tolist())
    Image.new("RGB", (240, 180)).save(paths[0])
    kept = rerank_geometric(ranking[1:], [paths[3]], paths[:3])
    assert kept.tolist() == [[1, 2, 0]]  # no candidate proves anything
    from recognition.reranking import _keypoints

    assert count_inliers(_keypoints(paths[0]), _keypoints(paths[1])) == 0
