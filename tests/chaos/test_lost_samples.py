"""Samples that lay on a node which dies are missed where they are used, as what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arena import TUNED
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError

from cluster.learner_group import LearnerLost, RayLearner
from cluster.ray_cluster import connected
from cluster.reward_actors import RayScorer
from cluster.rollout_pool import RayRolloutPool
from recipes.schema import Recipe
from rl.catalogue import build_algorithm
from rl.items import Item
from rollout.draws import groups_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[tuple[Cluster, Any]]:
    """A head with one core and a node with two."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in TUNED.items():
            patch.setenv(key, value)
        started = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        node = started.add_node(num_cpus=2)
    yield started, node
    started.shutdown()


def test_the_learner_is_rebuilt_and_no_sample_is_blamed(
    cluster: tuple[Cluster, Any], digits_recipe: Callable[..., Recipe], tmp_path: Path
):
    ray_cluster, node = cluster
    recipe = digits_recipe(
        f"cluster.address={ray_cluster.address}", "cluster.colocated=false", "learner.ranks=1",
        "workers={count: 1, cpus: 2}", "evaluation.rewards=[]",
    )  # fmt: skip
    groups = groups_for(recipe.prompts.load(), seed=0, step=0, count=4, size=4)
    plans = build_algorithm(recipe.rl, recipe.rollout, recipe.seed).plans(0, groups)
    with connected(recipe) as placement:
        pool, scorer = (
            RayRolloutPool(recipe, placement, str(tmp_path)),
            RayScorer(recipe, str(tmp_path)),
        )
        pool.start()
        scorer.start()
        learner = RayLearner(recipe, placement, str(tmp_path))
        learner.start()
        samples = list(pool.generate(groups, plans, learner.publish(0)))
        pool.close()
        ray_cluster.remove_node(node, allow_graceful=False)
        with pytest.raises(ObjectLostError):
            scorer.score(iter(samples))
        ones = np.ones(4)
        items = [Item(s.replay, 4, s.group.prompt, ones, ones / 16, 0 * ones, 0) for s in samples]
        with pytest.raises(LearnerLost, match="samples were lost with the node"):
            learner.update([items])
        learner.stop()
