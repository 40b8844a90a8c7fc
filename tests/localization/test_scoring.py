"""The score of polished poses: light tells repeated places apart, one exposure more or less does not."""

from dataclasses import replace

import torch

from localization.matching import mutual_matches
from localization.scoring import epipolar_scores, gather_evidence
from localization.triangulation import triangulate_views


def test_a_place_lit_otherwise_scores_less_and_another_exposure_as_much(random_world, random_poses):
    world = random_world(5)
    (R, c), *index_poses = random_poses(5, seed=2)
    light = torch.linspace(-2, -0.5, len(world.points))

    def view(pose, lit):
        seen = world.view(*pose, clutter=0)
        seen.features = replace(seen.features, log_light=lit[seen.seen])
        return seen

    index = [view(pose, light) for pose in index_poses]
    points = triangulate_views(index)

    def score(lit, polished=True):
        query = view((R, c), lit)
        matches = {i: mutual_matches(query.features, v.features) for i, v in enumerate(index)}
        evidence = gather_evidence(query, index, points, matches)
        return float(epipolar_scores(evidence, R.T[None], c[None], polished=polished)[0])

    generator = world.generator.get_state()

    def again(lit, polished=True):
        world.generator.set_state(generator)  # the same noise each time
        return score(lit, polished)

    same = again(light)
    assert same > 50
    assert abs(again(light + 0.7) - same) < 1e-3 * same
    assert again(light.flip(0)) < 0.5 * same
    assert again(light.flip(0), polished=False) == again(light, polished=False)
