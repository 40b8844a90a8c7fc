"""localize.py and what only it uses: hypotheses, scoring, refinement, tracks, fallback."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from localization import threads
from localization.absolute_pose import rotation_from_vector
from localization.cameras import Camera, camera_for, project, quaternion_from_rotation, turned
from localization.fallback import Guess
from localization.features import Features
from localization.hypotheses import Hypotheses
from localization.joint import LENS, Polished, Tracks, finely, refine_with_points
from localization.lens import (
    DOUBTFUL_LENS,
    _as_far_as,
    _confirms_its_lens,
    _is_cut,
    _is_told,
    _searched_with,
    _usual_shape,
    _usual_size,
    with_own_lens,
)
from localization.localize import (
    Estimate,
    Map,
    Search,
    _least_expected_error,
    _Queries,
    _within,
    build_map,
    share_world,
)
from localization.localize import (
    localize as localize_in,
)
from localization.matching import View, mutual_matches
from localization.refinement import Refined
from localization.scoring import gather_evidence
from localization.search import Answer, matched, quick_search

CAMERA = Camera(320.0, 320.0, 320.0, 240.0, 640, 480)


def localize(index: list[View], queries: list[View], ranking, *, seed: int, **more) -> list[Estimate]:
    """In a map of the posed views."""
    return localize_in(build_map(index, seed=seed), queries, ranking, seed=seed, **more)


def queries_of(views: list[View]) -> list[View]:
    """The same images, their poses taken away."""
    return [View(v.features, v.camera) for v in views]


def answers(index: list[View], queries: list[View], seed: int = 0):
    ranking = [list(range(len(index))) for _ in queries]
    return localize(index, queries_of(queries), ranking, seed=seed)


def error(estimate, view: View) -> tuple[float, float]:
    """(meters, degrees)."""
    q = quaternion_from_rotation(estimate.R_world_from_cam.T @ view.R_world_from_cam)
    degrees = math.degrees(2 * math.atan2(float(q[:3].norm()), float(q[3])))
    return float((estimate.c_world - view.c_world).norm()), degrees


def sensible(estimate) -> bool:
    """A rotation and a position, and no NaN anywhere."""
    R = estimate.R_world_from_cam
    numbers = (estimate.sigma_m, estimate.sigma_deg, estimate.confidence)
    return (
        torch.allclose(R @ R.T, torch.eye(3, dtype=R.dtype), atol=1e-9)
        and float(torch.det(R)) > 0
        and bool(torch.isfinite(estimate.c_world).all())
        and not any(math.isnan(v) for v in numbers)
        and 0 <= estimate.confidence <= 1
        and bool(estimate.method)
    )


def test_poses_of_a_plain_scene(random_world, random_poses):
    world = random_world(0)
    views = [world.view(*pose) for pose in random_poses(12, 1)]
    index, queries = views[:8], views[8:]
    for estimate, query in zip(answers(index, queries), queries):
        meters, degrees = error(estimate, query)
        assert sensible(estimate) and estimate.method == "pnp"
        assert meters < 0.03 and degrees < 0.2
        assert estimate.inliers > 50 and estimate.confidence > 0.5
        assert meters < 5 * estimate.sigma_m and degrees < 5 * estimate.sigma_deg


def test_same_seed_same_answer_wherever_a_query_stands(random_world, random_poses, monkeypatch):
    """Neither its place in the list nor the number of threads changes an answer by a bit."""
    world = random_world(2)
    views = [world.view(*pose) for pose in random_poses(10, 3)]
    forwards = answers(views[:6], views[6:], seed=5)
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    backwards = answers(views[:6], views[:5:-1], seed=5)
    for a, b in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(a.c_world, b.c_world) and torch.equal(a.R_world_from_cam, b.R_world_from_cam)
        assert a.confidence == b.confidence


def test_an_index_image_is_found_where_it_is(random_world, random_poses):
    """Even in a map too small for any other answer, and with keypoints a little off, as in a copy."""
    world = random_world(0)
    index = [world.view(*pose) for pose in random_poses(2, 1)]
    features = index[1].features
    noise = 0.1 * torch.randn(features.xy_px.shape, generator=torch.Generator().manual_seed(0))
    copy = replace(index[1], features=replace(features, xy_px=features.xy_px + noise))
    (estimate,) = answers(index, [copy])
    assert error(estimate, index[1]) == (0.0, pytest.approx(0.0, abs=1e-6))
    assert estimate.method == "same image" and sensible(estimate) and estimate.confidence == 1.0


def test_thresholds_mean_the_same_on_a_large_photo(random_world, random_poses):
    """The same scene photographed with six times the pixels, and six times the noise in them: the same answers."""
    small = random_world(2)
    large = random_world(2, camera=Camera(1920.0, 1920.0, 1922.5, 1442.5, 3840, 2880))
    poses = random_poses(7, 3)
    views = [small.view(*pose) for pose in poses]
    photos = [large.view(*pose, noise_px=1.8) for pose in poses]
    for photo in photos:
        photo.features.scale_px.mul_(6)
    (a,), (b,) = answers(views[:6], views[6:]), answers(photos[:6], photos[6:])
    assert error(b, photos[6])[0] < 0.03 and b.inliers > 0.8 * a.inliers and b.confidence > 0.5


def test_only_ranked_index_views_are_matched(random_world, random_poses):
    """Ranking restricts the search: with only views of another place ranked there is nothing to find."""
    here, elsewhere = random_world(4), random_world(5)
    poses = random_poses(9, 5)
    index = [here.view(*p) for p in poses[:4]] + [elsewhere.view(*p) for p in poses[4:8]]
    query = here.view(*poses[8])
    right = localize(index, queries_of([query]), [[0, 1, 2, 3]], seed=0)[0]
    wrong = localize(index, queries_of([query]), [[4, 5, 6, 7]], seed=0)[0]
    assert right.method == "pnp" and error(right, query)[0] < 0.05
    assert wrong.confidence < 0.3 and sensible(wrong)


@pytest.mark.parametrize("seed", range(3))
def test_a_few_marks_tell_equal_tiles_apart(corridor, look_at, seed):
    """A wall of equal tiles, the index cameras nearest to the query left out: its aliases have more support."""
    world = corridor(seed)
    generator = torch.Generator().manual_seed(seed)

    def at(x: float) -> tuple:
        c = torch.tensor([x, 0.0, 0.0]).double() + 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        return look_at(c, c + torch.tensor([0.2, 3.0, 0.0]), 0.3), c

    index = [world.view(*at(0.35 * i), spread=0.25) for i in range(30) if abs(0.35 * i - 5.0) > 0.4]
    query = world.view(*at(5.0), spread=0.25)
    estimate = answers(index, [query], seed)[0]
    assert error(estimate, query)[0] < 0.1 and error(estimate, query)[1] < 1


def test_an_image_of_another_place_gets_little_confidence(random_world, random_poses):
    world, other = random_world(6), random_world(7)
    poses = random_poses(9, 8)
    estimate = answers([world.view(*p) for p in poses[:8]], [other.view(*poses[8])])[0]
    assert sensible(estimate) and estimate.confidence < 0.3


def test_degenerate_inputs_are_answered(random_world, random_poses, look_at):
    world = random_world(8)
    poses = random_poses(5, 9)
    a, b, c, _d, query = (world.view(*pose) for pose in poses)
    nothing = Features(torch.zeros(0, 2), *(torch.zeros(0) for _ in range(3)), torch.zeros(0, 128))
    bare, *others_bare = (View(nothing, CAMERA, *pose) for pose in poses[:4])
    one = a.features.select(slice(1))
    turned = [world.view(rotation_from_vector(torch.tensor([0.0, 0.1 * i, 0.0]).double()) @ poses[0][0], poses[0][1]) for i in range(4)]
    cases = {
        "single index image": ([a], query),
        "two": ([a, b], query),
        "identical index images": ([a, a, a], query),
        "query is an index image": ([a, b, c], a),
        "no keypoints in the query": ([a, b, c], bare),
        "no keypoints anywhere": ([bare, bare], bare),
        "no keypoints in the index": ([bare, *others_bare], query),
        "no keypoints in an index image": ([a, b, c, others_bare[-1]], query),
        "a single keypoint": ([a, b, c], View(one, CAMERA, *poses[0])),
        "pure rotation": (turned[:3], turned[3]),
    }
    for name, (index, asked) in cases.items():
        estimate = answers(index, [asked])[0]
        assert sensible(estimate), name
        if estimate.method not in ("pnp", "same image"):
            assert estimate.confidence < 0.3, name
    assert answers([a, b, c], []) == []


def test_most_tracks_choose_the_pose_within_the_place_that_explains_most(random_world, random_poses):
    world = random_world(25)
    views = [world.view(*pose) for pose in random_poses(7, 26)]
    index, query = Map.build(views[:6]), views[6]
    matches = {i: mutual_matches(query.features, view.features) for i, view in enumerate(index.views)}
    evidence = gather_evidence(query, index.views, index.points, matches)

    def polished(away_m: float, tracks: int) -> Polished:
        away = torch.tensor([away_m, 0.0, 0.0], dtype=torch.float64)
        center = query.c_world + away
        observed = Tracks(torch.zeros(tracks, 2), *3 * (torch.zeros(0),))
        return Polished(query.R_world_from_cam.T, center, torch.eye(6).double(), tracks, CAMERA, None, observed)

    place = 0.9 * index.place_m
    search = Search(query, index, list(range(6)), evidence)
    assert search.best() is None
    search.polished = [polished(0.0, 50), polished(place, 60), polished(5 * place, 500)]
    answer = search.best()
    assert answer.estimate.inliers == 60
    assert float(answer.estimate.c_world[0] - query.c_world[0]) == pytest.approx(place)


def test_what_matches_alone_tell_counts_where_it_explains_clearly_more(random_world, random_poses):
    world = random_world(25)
    views = [world.view(*pose) for pose in random_poses(7, 26)]
    index, query = Map.build(views[:6]), views[6]
    for points in index.points:
        points.valid[torch.arange(len(points.valid)) % 3 > 0] = False
    evidence = matched(query, index, list(range(6)))
    truth = Hypotheses(query.R_world_from_cam.T[None], query.c_world[None])
    near = Hypotheses(truth.R_cam_from_world, truth.c_world + 0.1)
    for known, added in ((near.c_world + 1.0, 1), (truth.c_world, 0)):
        search = Search(query, index, list(range(6)), evidence)
        search.refined = [Refined(truth.R_cam_from_world[0], known[0], 9)]
        search.add_from_matches(near, 3)
        assert len(search.polished) == len(search.refined) - 1 == added
    search.add_from_matches(Hypotheses.joined(), 3)
    search.refined = []
    search.add_from_matches(near, 3)
    (polished,) = search.polished
    assert float((polished.c_world - query.c_world).norm()) < 0.02
    assert len(polished.observed.single) > 50 and polished.tracks > len(polished.observed.xy_px)


def test_one_plane(random_world, random_poses):
    """All points on one wall: still solved."""
    world = random_world(10)
    world.points[:, 1] = 6.0
    views = [world.view(*pose) for pose in random_poses(7, 11)]
    estimate = answers(views[:6], views[6:])[0]
    assert error(estimate, views[6])[0] < 0.05


def test_essential_matrix_serves_where_no_points_are(random_world, random_poses):
    """Three index images that share no point with one another, only with the query: E5+1 finds the query."""
    world = random_world(12, count=900)
    poses = random_poses(4, 13)
    views = [world.view(*pose) for pose in poses]
    query = views[3]
    index = []
    for k in range(3):
        mine = torch.cat([v.seen % 3 == k for v in [views[k]]] + [torch.ones(50, dtype=torch.bool)])
        index.append(View(views[k].features.select(mine), CAMERA, *poses[k]))
    estimate = answers(index, [query])[0]
    assert estimate.method == "essential"
    assert error(estimate, query)[0] < 0.3 and error(estimate, query)[1] < 1.5


def test_rotation_comes_from_a_single_index_image(random_world, random_poses):
    world = random_world(14)
    a, query = (world.view(*pose) for pose in random_poses(2, 15))
    estimate = answers([a], [query])[0]
    assert estimate.method == "rotation" and torch.equal(estimate.c_world, a.c_world)
    assert error(estimate, query)[1] < 1.5 and math.isinf(estimate.sigma_m)


def test_joint_refinement_is_honest(random_world, random_poses):
    """Monte Carlo: with points of very unequal covariance the pose errors match the covariance it reports, and beat
    those of weights that ignore it."""
    world = random_world(18, count=60)
    R, c = random_poses(1, 19)[0]
    view = world.view(R, c, clutter=0, noise_px=0.0)
    X = world.points[view.seen]
    n = len(X)
    generator = torch.Generator().manual_seed(0)
    ray = X - c
    ray = ray / ray.norm(dim=1, keepdim=True)
    # Uncertain sideways by 5 cm in one direction: a short baseline.
    slide = torch.linalg.cross(ray, torch.tensor([0.0, 0.0, 1.0]).double().expand(n, 3))
    sigma = torch.where(torch.arange(n) % 2 == 0, 0.08, 0.002)[:, None].double() * slide / slide.norm(dim=1, keepdim=True)
    covariance = sigma[:, :, None] * sigma[:, None, :] + 1e-8 * torch.eye(3, dtype=torch.float64)
    normalized, weighed, plain = [], [], []
    for _ in range(60):
        draw = {"generator": generator, "dtype": torch.float64}
        points = X + sigma * torch.randn(n, 1, **draw)
        xy = view.features.xy_px.double() + torch.randn(n, 2, **draw)
        start = rotation_from_vector(0.01 * torch.randn(3, **draw)) @ R.T, c + 0.02 * torch.randn(3, **draw)
        noise = torch.ones(n, dtype=torch.float64)
        exact = 1e-8 * torch.eye(3).double().expand(n, 3, 3)
        found, alike = (
            refine_with_points(view.camera, *start, Tracks(xy, points, spread, noise)) for spread in (covariance, exact)
        )
        off = found.c_world - c
        normalized.append(float(off @ torch.linalg.inv(found.covariance[3:, 3:]) @ off))
        weighed.append(float(off.norm()))
        plain.append(float((alike.c_world - c).norm()))
    assert 1.5 < sum(normalized) / len(normalized) < 6  # 3 coordinates; the Cauchy loss costs some efficiency
    assert sum(weighed) < 0.95 * sum(plain)


def test_what_errs_least_decides_the_last_millimeters(random_world, random_poses):
    """Two keypoints of three are located ten times better than the third: the pose errs less for it."""
    world = random_world(18, count=60)
    R, c = random_poses(1, 19)[0]
    view = world.view(R, c, clutter=0, noise_px=0.0)
    X, generator = world.points[view.seen], torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    known, noise = 1e-8 * torch.eye(3).double().expand(len(X), 3, 3), torch.ones(len(X)).double()
    deviation = torch.where(torch.arange(len(X)) % 3 == 0, 1.5, 0.15)[:, None].double()
    before, after = 0.0, 0.0
    for _ in range(40):
        xy = view.features.xy_px.double() + deviation * torch.randn(len(X), 2, **draw)
        found = refine_with_points(view.camera, R.T, c, Tracks(xy, X, known, noise))
        R_fine, c_fine = finely(found)
        before, after = before + float((found.c_world - c).norm()), after + float((c_fine - c).norm())
        assert float((R_fine @ R_fine.T - torch.eye(3)).abs().max()) < 1e-9
    assert after < 0.85 * before


def test_a_sure_answer_is_refined_on_all_of_the_image(random_world, random_poses):
    """Points on the left alone leave a pose loose; matches without points, all over the image, do not."""
    before, after = 0.0, 0.0
    for seed in range(6):
        world, poses = random_world(90 + seed), random_poses(7, 120 + seed)
        views = [world.view(*pose, noise_px=1.0) for pose in poses]
        index, query = Map.build(views[:6]), views[6]
        left = project(CAMERA, (world.points - query.c_world) @ query.R_world_from_cam)[:, 0] < 200
        for points, view in zip(index.points, views):
            points.valid[: len(view.seen)] &= left[view.seen]
        search, answer = quick_search(query, index, list(range(6)), torch.Generator().manual_seed(0))
        assert not answer.settled
        R, c = search.refined_last(answer)
        before += float((answer.polished.c_world - query.c_world).norm())
        after += error(replace(answer.estimate, R_world_from_cam=R, c_world=c), query)[0]
    assert after < 0.7 * before


def test_the_pose_refined_last_is_the_one_told(random_world, random_poses, monkeypatch):
    world = random_world(27)
    views = [world.view(*pose) for pose in random_poses(7, 28)]
    index = build_map(views[:6], seed=0)
    fine = torch.eye(3).double(), torch.full((3,), 7.0).double()
    monkeypatch.setattr(Search, "refined_last", lambda self, answer: fine)
    (told,) = localize_in(index, queries_of(views[6:]), [list(range(6))], seed=0)
    assert told.confidence > 0.5 and told.fine is None
    assert told.R_world_from_cam is fine[0] and told.c_world is fine[1]


def test_share_world(random_world, random_poses):
    world, other = random_world(20), random_world(21)
    views = [world.view(*pose) for pose in random_poses(8, 22)]
    pairs = list(zip(views[:4], views[4:]))
    assert share_world(pairs)
    assert not share_world([(a, View(b.features, b.camera, b.R_world_from_cam, b.c_world + 1.0)) for a, b in pairs])
    assert not share_world([(a, other.view(b.R_world_from_cam, b.c_world)) for a, b in pairs])
    assert not share_world(pairs[:2]) and not share_world([])


def test_the_map_tests_itself(random_world, random_poses):
    """A right scene finds itself; one whose poses belong to other images does not, and is not trusted."""
    world = random_world(33)
    index = [world.view(*pose) for pose in random_poses(8, 34)]
    for shift, right in ((0, True), (1, False)):
        rows = [index[(i + shift) % 8] for i in range(8)]
        posed = [replace_pose(view, row) for view, row in zip(index, rows)]
        built = build_map(posed, seed=0)
        assert (built.test.found == len(built.test.errors) == 3) == built.test.vouched == right
        assert (built.test.trust >= 0.5) == right
        assert f"{built.test.found} of 3" in built.test.describe()


def replace_pose(view: View, other: View) -> View:
    return View(view.features, view.camera, other.R_world_from_cam, other.c_world)


def test_progress_is_reported(random_world, random_poses):
    world = random_world(23)
    views = [world.view(*pose) for pose in random_poses(4, 24)]
    calls = []
    built = build_map(views[:3], seed=0, progress=lambda *v: calls.append(v))
    assert calls[-1] == (3, 3)
    localize_in(built, queries_of(views[3:]), [[0, 1, 2]], seed=0, progress=lambda *v: calls.append(v))
    assert calls[-1] == ("queries", 1, 1)


def test_the_lens_is_refined_with_the_pose_and_its_sigmas_are_honest(random_world, random_poses):
    """A camera of f 400 and another center, taken for one of f 320: found to four sigmas, which are small."""
    world = random_world(27, count=600)
    R, c = random_poses(1, 28)[0]
    true = Camera(400.0, 400.0, 300.0, 250.0, 640, 480)
    view = world.view(R, c, clutter=0, noise_px=0.5, camera=true)
    n = len(view.seen)
    tracks = Tracks(
        view.features.xy_px.double(), world.points[view.seen], 1e-8 * torch.eye(3).double().expand(n, 3, 3),
        torch.full((n,), 0.5, dtype=torch.float64),
    )  # fmt: skip
    start = replace(true, fx=390.0, fy=390.0, cx=310.0)
    found = refine_with_points(start, R.T, c, tracks, lens=LENS)
    lens = found.camera
    off = torch.tensor([lens.fx - 400, lens.fy - lens.fx, lens.cx - 300, lens.cy - 250]).abs() / 400
    assert bool((off < 4 * found.lens_sigma).all()) and float(found.lens_sigma.max()) < 0.01
    assert found.covariance.shape == (6, 6)
    zoomed = refine_with_points(start, R.T, c, tracks, lens=1).camera
    assert zoomed.fx == zoomed.fy and (zoomed.cx, zoomed.cy) == (310.0, 250.0)


@pytest.mark.parametrize(("zoom", "taller"), [(0.7, 1.0), (1.8, 1.0), (1.0, 0.75)])
def test_a_query_with_another_lens_is_found_with_it(random_world, random_poses, zoom, taller):
    """Zoomed, cut out, or stretched to another shape."""
    world = random_world(29, count=900)
    poses = random_poses(9, 30)
    own = Camera(320.0 * zoom, 320.0 * zoom * taller, 320.0, 240.0, 640, 480)
    index = [world.view(*pose) for pose in poses[:8]]
    query = world.view(*poses[8], camera=own)
    taken = View(query.features, CAMERA)
    found = localize(index, [taken], [list(range(8))], seed=0)[0]
    assert error(found, query)[0] < 0.05 and error(found, query)[1] < 0.5
    assert found.camera.fx == pytest.approx(own.fx, rel=0.01)
    assert found.camera.fy == pytest.approx(own.fy, rel=0.01)
    assert found.confidence > 0.5


def test_a_zoom_on_a_wall_is_not_taken_for_a_lens_of_another_center(random_world, random_poses):
    """On one plane seen at a slant many lenses explain as much as the plainest of them."""
    world = random_world(3, count=900)
    world.points[:, 1] = 7.0 + 0.5 * world.points[:, 0] + 0.05 * (world.points[:, 1] - 7.0)
    poses = random_poses(9, 63)
    index = [world.view(*pose, noise_px=0.5) for pose in poses[:8]]
    zoomed = world.view(*poses[8], noise_px=0.5, camera=Camera(480.0, 480.0, 320.0, 240.0, 640, 480))
    found = localize(index, [View(zoomed.features, CAMERA)], [list(range(8))], seed=0)[0]
    assert found.camera.fx == pytest.approx(480, rel=0.01)
    assert math.hypot(found.camera.cx - 320, found.camera.cy - 240) < 0.02 * 480
    assert error(found, zoomed)[0] < 0.05 < 4 * found.sigma_m and error(found, zoomed)[1] < 0.5


def test_a_zoom_on_one_of_many_equal_tiles_is_not_believed(corridor, look_at):
    """The places that look alike are rivals of an answer with a lens of its own as well."""
    world = corridor(7, marks=0, difference=0.0)

    def at(x: float) -> tuple:
        c = torch.tensor([x, 0.1, 0.1]).double()
        return look_at(c, c + torch.tensor([0.2, 3.0, 0.0]), 0.1), c

    index = [world.view(*at(4.0 + 0.7 * i)) for i in range(6)]
    zoomed = replace(CAMERA, fx=480.0, fy=480.0)
    shown = world.view(*at(5.2), camera=zoomed)
    (estimate,) = answers(index, [View(shown.features, CAMERA)])
    assert estimate.confidence < 0.5


def test_an_answer_with_another_lens_is_judged_with_that_lens(random_world, random_poses, monkeypatch):
    """Not with the one that its search began with, two percent off."""
    monkeypatch.setattr("localization.lens.LENS_ROUNDS", 1)
    world = random_world(29, count=900)
    poses = random_poses(9, 30)
    index = build_map([world.view(*pose) for pose in poses[:8]], seed=0)
    query = world.view(*poses[8], camera=Camera(480.0, 480.0, 320.0, 240.0, 640, 480))
    (R, c), near = poses[8], Camera(490.0, 490.0, 320.0, 240.0, 640, 480)
    order = list(range(8))
    search = Search(replace(query, camera=near), index, order, matched(query, index, order).seen_with(near))
    start = Refined(R.T, c, 0)
    judged, best = [], Search.best

    def watched(search: Search):
        judged.append((search.evidence.camera, search.polished[0].camera))
        return best(search)

    monkeypatch.setattr(Search, "best", watched)
    answer = _searched_with(search, SimpleNamespace(**vars(start), camera=near))
    assert answer.polished.camera.fx == pytest.approx(480, rel=0.005)
    assert judged[0] == (near, near) and judged[-1] == (answer.polished.camera,) * 2


def test_a_lens_that_nothing_tells_has_no_numbers_that_are_none():
    """Four points, however often seen, cannot tell a pose and a lens: its deviations are infinite, not NaN."""
    eye = torch.eye(3).double()
    points = torch.tensor([[0.0, 0, 5], [1, 0, 5], [0, 1, 5], [1, 1, 6]]).double()
    xy_px = 320 * points[:, :2] / points[:, 2:] + torch.tensor([320.0, 240.0])
    xy_px, points = xy_px.repeat(4, 1), points.repeat(4, 1)
    tracks = Tracks(xy_px, points, torch.zeros(16, 3, 3).double(), torch.ones(16).double())
    found = refine_with_points(CAMERA, eye, torch.zeros(3).double(), tracks, lens=LENS)
    assert not bool(found.covariance.isnan().any())
    assert bool(found.covariance.diagonal().isinf().all())


def test_a_picture_of_another_shape_is_searched_with_other_lenses(random_world, random_poses):
    """However sure the answer is: it was cut or squeezed."""
    world = random_world(29, count=600)
    index = build_map([world.view(*pose) for pose in random_poses(8, 30)], seed=0)
    order, evidence = list(range(8)), matched(index.views[0], index, list(range(8)))
    shapes = [(640, 480), (480, 640), (320, 240), (640, 360), (800, 480)]
    queries = [replace(index.views[0], camera=camera_for(CAMERA, *shape)) for shape in shapes]
    searches = [Search(query, index, order, evidence) for query in queries]
    assert [_usual_shape(search) for search in searches] == [True, True, True, False, False]
    assert [_usual_size(search) for search in searches] == [True, True, False, False, False]


@pytest.mark.parametrize("share", [(0.4, 0.4), (0.4, 0.0)])
def test_a_part_of_a_picture_of_a_wall_is_not_believed(random_world, random_poses, share):
    """On a wall a pose makes up for a center that is elsewhere: neither place is sure, and it is said."""
    for seed in (1, 2):
        world = random_world(10 + seed, count=300)
        world.points[:, 1] = 6.0
        *index, whole = [world.view(*pose, spread=0.6) for pose in random_poses(9, 50 + seed)]
        corner = torch.tensor([640.0, 480.0]) * torch.tensor(share)
        inside = (whole.features.xy_px >= corner).all(dim=1)
        features = whole.features.select(inside)
        part = replace(features, xy_px=features.xy_px - corner)
        camera = camera_for(CAMERA, 640 - round(float(corner[0])), 480 - round(float(corner[1])))
        (estimate,) = answers(index, [View(part, camera)])
        meters, degrees = error(estimate, whole)
        assert estimate.confidence < 0.5 or (meters < 0.25 and degrees < 2), (seed, meters, degrees)


def test_what_is_burnt_into_all_images_makes_none_of_them_the_same(random_world, random_poses):
    world = random_world(0)
    index = [world.view(*pose) for pose in random_poses(4, 1)]
    draw = torch.Generator().manual_seed(1)
    letters = world.view(*random_poses(1, 7)[0], clutter=0).features
    letters = replace(letters, descriptors=letters.descriptors[torch.randperm(len(letters), generator=draw)])

    def stamped(view: View) -> View:
        own = view.features.select(slice(0, 60))
        both = zip(vars(letters).values(), vars(own).values())
        return replace(view, features=type(own)(*(torch.cat(parts) for parts in both)))

    query = world.view(*random_poses(5, 1)[4])
    (estimate,) = answers([stamped(view) for view in index], [stamped(query)])
    assert estimate.method != "same image" and estimate.confidence < 0.5


def test_standard_deviations_reach_what_another_lens_explains_as_well():
    eye, turned_by = torch.eye(3).double(), torch.tensor([0.0, 0.0, math.radians(3)]).double()
    own = Estimate(eye, torch.zeros(3).double(), "pnp", 100, 0.1, 5.0, 0.9)
    other = replace(own, c_world=torch.tensor([0.0, 0.0, 2.0]).double(), R_world_from_cam=rotation_from_vector(turned_by))
    reach = _as_far_as(own, [SimpleNamespace(answer=SimpleNamespace(estimate=other))])
    assert (reach.sigma_m, reach.sigma_deg) == (2.0, 5.0) and reach.c_world is own.c_world
    assert _as_far_as(own, []) == own


@pytest.mark.parametrize(
    ("tracks", "confidence", "fit", "sigma", "confirmed"),
    [
        (100, 0.8, 0.85, 0.004, True),
        (99, 0.9, 0.9, 0.004, False),
        (300, 0.7, 0.9, 0.004, False),
        (300, 0.9, 0.8, 0.004, False),
        (300, 0.9, 0.9, 0.006, False),
    ],
)
def test_other_lenses_are_looked_for_until_the_given_one_is_confirmed(tracks, confidence, fit, sigma, confirmed):
    answer = Answer(SimpleNamespace(confidence=confidence), SimpleNamespace(tracks=tracks, fit=fit))
    told = _is_told(SimpleNamespace(lens_sigma=torch.tensor([sigma, 0.1])))
    assert _confirms_its_lens(answer, told) == confirmed


def test_versions_of_one_picture_do_not_help_each_other(random_world, random_poses):
    """With a false lens a cut picture agrees with the whole one from any place along its axis."""
    world = random_world(71, count=900)
    poses = random_poses(9, 72)
    index = build_map([world.view(*pose) for pose in poses[:7]], seed=0)
    whole, beside = (world.view(*pose) for pose in poses[7:])
    xy_px = (whole.features.xy_px - torch.tensor([320.0, 240.0])) * 1.6 + torch.tensor([320.0, 240.0])
    inside = ((xy_px > 0) & (xy_px < torch.tensor([640.0, 480.0]))).all(dim=1)
    cut = View(replace(whole.features, xy_px=xy_px).select(inside), CAMERA)
    queries = _Queries([cut, *queries_of([whole, beside])], index, [list(range(7))] * 3, 0)
    placed = {n: Estimate(*poses[6 + n], "pnp", 100, 0.01, 0.1, 1.0) for n in (1, 2)}
    helped = queries.seeing(placed)
    assert len(helped.index.views) == 9
    assert [order[7:] for order in helped.orders] == [[8], [8], [7]]


def test_a_lens_that_is_known_is_kept_to_and_doubted_where_another_explains_clearly_more(
    random_world, random_poses
):
    world = random_world(29, count=900)
    poses = random_poses(9, 30)
    index = build_map([world.view(*pose) for pose in poses[:8]], seed=0)
    zoomed = world.view(*poses[8], camera=Camera(340.0, 340.0, 320.0, 240.0, 640, 480))
    sure = View(zoomed.features, CAMERA, lens_is_sure=True)
    generator = torch.Generator().manual_seed(0)
    search, answer = quick_search(sure, index, list(range(8)), generator)
    found = with_own_lens(search, answer, generator)
    assert found.camera is None and found.c_world is answer.estimate.c_world
    assert found.confidence <= DOUBTFUL_LENS < answer.estimate.confidence
    right = View(zoomed.features, zoomed.camera, lens_is_sure=True)
    search, answer = quick_search(right, index, list(range(8)), generator)
    assert with_own_lens(search, answer, generator) is answer.estimate
    (same,) = localize_in(index, queries_of([world.view(*poses[8])]), [list(range(8))], seed=0)
    assert same.camera is None and same.confidence > 0.5


@pytest.mark.parametrize("turns", [1, 2])
def test_a_turned_image_turns_its_lens(random_world, random_poses, turns):
    """Of a lens whose center is not the image's: the given one is off by twice as much, or unknown."""
    lens = Camera(320.0, 320.0, 335.0, 228.0, 640, 480)
    world = random_world(41, count=600, camera=lens)
    views = [world.view(*pose) for pose in random_poses(8, 42)]
    index, query = views[:7], views[7]
    own = turned(lens, turns)
    x, y = query.features.xy_px.T
    xy_px = torch.stack([479 - y, x] if turns == 1 else [639 - x, 479 - y], dim=1)
    given = camera_for(lens, own.width, own.height)
    taken = View(replace(query.features, xy_px=xy_px), given)
    found = localize(index, [taken], [list(range(7))], seed=0)[0]
    about_axis = torch.tensor([0.0, 0.0, turns * math.pi / 2], dtype=torch.float64)
    true = replace_pose(query, query)
    true.R_world_from_cam = query.R_world_from_cam @ rotation_from_vector(-about_axis)
    assert error(found, true)[0] < 0.01 and error(found, true)[1] < 0.1
    assert found.camera == own and found.confidence > 0.5


def test_the_size_of_an_upright_image_proves_that_its_lens_was_turned(random_world, random_poses):
    """Inexact index poses let a center in the middle explain as much."""
    lens = Camera(320.0, 320.0, 325.0, 236.0, 640, 480)
    world = random_world(45, count=600, camera=lens)
    *index, query = (world.view(*pose) for pose in random_poses(8, 46))
    generator = torch.Generator().manual_seed(4)
    for view in index:
        omega, shift = (torch.randn(3, generator=generator).double() for _ in range(2))
        view.R_world_from_cam = view.R_world_from_cam @ rotation_from_vector(0.004 * omega)
        view.c_world = view.c_world + 0.01 * shift
    x, y = query.features.xy_px.T
    features = replace(query.features, xy_px=torch.stack([479 - y, x], dim=1))
    taken = View(features, camera_for(lens, 480, 640))
    found = localize(index, [taken], [list(range(7))], seed=0)[0]
    assert found.camera == turned(lens, 1) and found.confidence > 0.5


def test_standard_deviations_know_of_inexact_index_poses(random_world, random_poses):
    """Index poses off by 2 cm: the map finds itself to no better, and says so of its answers."""
    world = random_world(43, count=600)
    views = [world.view(*pose, noise_px=0.3) for pose in random_poses(12, 44)]
    index, queries = views[:9], views[9:]
    generator = torch.Generator().manual_seed(45)
    for view in index:
        view.c_world = view.c_world + 0.02 / 3**0.5 * torch.randn(3, generator=generator).double()
    found = answers(index, queries)
    errors = [error(estimate, query)[0] for estimate, query in zip(found, queries)]
    assert max(errors) > 0.003
    assert all(off < 4 * estimate.sigma_m for off, estimate in zip(errors, found))
    assert all(estimate.sigma_m < 0.06 and estimate.confidence > 0.5 for estimate in found)


def test_a_mirrored_query_is_not_believed(random_world, random_poses):
    """All points on one wall: a mirrored picture is that wall seen from behind."""
    world = random_world(31, count=600)
    world.points[:, 1] = 6.0
    views = [world.view(*pose) for pose in random_poses(7, 32)]
    features = views[6].features
    mirrored = features.xy_px * torch.tensor([-1.0, 1.0]) + torch.tensor([639.0, 0.0])
    query = View(replace(features, xy_px=mirrored), CAMERA)
    found = localize(views[:6], [query], [list(range(6))], seed=0)[0]
    assert sensible(found) and found.confidence < 0.5


def test_what_is_not_sure_is_answered_where_least_is_lost():
    def guess(x: float, method: str = "retrieval") -> Guess:
        c = torch.tensor([x, 0.0, 0.0], dtype=torch.float64)
        return Guess(torch.eye(3).double(), c, method, 0, math.inf, math.inf)

    def answer(x: float, confidence: float) -> Estimate:
        return Estimate(**{**vars(guess(x, "pnp")), "inliers": 13}, confidence=confidence)

    near = [guess(0.0), guess(0.5), guess(1.0)]
    far = _least_expected_error(answer(19.0, 0.02), near, 0.1)
    assert far.method == "retrieval" and float(far.c_world[0]) == 0.5 and far.confidence == 0
    assert _least_expected_error(answer(19.0, 0.45), near, 0.1).method == "pnp"
    assert _least_expected_error(answer(0.55, 0.02), near, 0.1).method == "pnp"
    assert float(_least_expected_error(None, near, 0.1).c_world[0]) == 0.5


def test_confidence_is_lowered_by_the_chance_that_standard_deviations_leave():
    c = torch.zeros(3, dtype=torch.float64)

    def sure(sigma_m: float, sigma_deg: float) -> float:
        return _within(Estimate(torch.eye(3).double(), c, "pnp", 99, sigma_m, sigma_deg, 1.0))

    assert sure(0.25, 0.1) == sure(0.01, 2.0) == pytest.approx(0.6827, abs=1e-4)  # one of a normal's
    assert sure(0.125, 0.1) == pytest.approx(0.9545, abs=1e-4)
    assert sure(math.inf, 0.1) == 0 and sure(0.0, 0.0) == 1


def test_no_answer_is_more_confident_than_the_scene_is_trusted(random_world, random_poses):
    world = random_world(0)
    views = [world.view(*pose) for pose in random_poses(9, 1)]
    found = localize(views[:8], queries_of(views[8:]), [list(range(8))], seed=0, trust=0.4)[0]
    assert found.confidence == 0.4


WHOLE = Camera(500.0, 500.0, 320.0, 240.0, 640, 480)


@pytest.mark.parametrize(
    ("lens", "possible"),
    [
        (Camera(500, 500, 320, 240, 640, 480), True),
        (Camera(700, 700, 448, 336, 896, 672), True),  # larger
        (Camera(500, 500, 320, 0, 320, 240), True),  # the lower half of the left part
        (Camera(1000, 1000, 640, 480, 640, 480), True),  # a quarter, twice as large
        (Camera(1000, 1000, 0, 0, 640, 480), True),  # the opposite one
        (Camera(500, 500, 320, 340, 640, 680), True),  # bars above and below
        (Camera(375, 500, 240, 240, 480, 480), True),  # squeezed
        (Camera(500, 500, 240, 320, 480, 640), True),  # turned
        (Camera(535, 535, 115, 225, 640, 480), False),  # no cut leaves that much and enlarges so little
        (Camera(480, 480, 134, 230, 640, 480), False),
        (Camera(560, 560, 320, 150, 640, 480), False),
        (Camera(1000, 1000, 700, 480, 640, 480), False),
    ],
)
def test_a_lens_of_its_own_is_that_of_a_cut_image(lens, possible):
    assert _is_cut(WHOLE, lens) == possible
