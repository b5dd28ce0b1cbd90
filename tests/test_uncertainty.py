"""Intervals by bootstrap, and paired differences."""

import numpy as np
import pandas as pd
import pytest

from qfbench.uncertainty import interval


def test_interval_resamples_whole_facts():
    values = [1, 1, 1, 1, 0, 0, 0, 0]
    together = interval(values, list("aaaabbbb"))
    apart = interval(values, list("abcdefgh"))
    assert together == (0.0, 1.0)  # two facts: a resample may hold one of them twice
    assert together[0] < apart[0] < 0.5 < apart[1] < together[1]
    assert interval([1, 1], ["a", "b"]) == pytest.approx((1.0, 1.0))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval(rng.random(40) < 0.3, range(40), draws=300)
        hits += low <= 0.3 <= high
    assert 0.88 < hits / 200 <= 1.0


def by_clusters(values, clusters, draws=1000, level=0.95):
    """The interval without groups, as it has always been."""
    sums = pd.DataFrame({"v": np.asarray(values, float), "c": clusters}).groupby("c").v.agg(["sum", "count"]).to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
    return tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - level) / 2, (1 + level) / 2]))


@pytest.mark.parametrize("seed", range(3))
def test_without_groups_an_interval_is_that_of_the_clusters_alone(seed):
    rng = np.random.default_rng(seed)
    values, clusters = rng.random(30), rng.integers(7, size=30)
    expected = pytest.approx(by_clusters(values, clusters), rel=1e-12)
    assert interval(values, clusters) == expected
    assert interval(values, clusters, [5] * 30) == expected  # one group: only its clusters are drawn
    half = interval(values, clusters, level=0.5)
    assert half == pytest.approx(by_clusters(values, clusters, level=0.5), rel=1e-12)
    assert half != expected


def test_groups_are_drawn_first_and_clusters_within_each():
    """Against a bootstrap one draw at a time: groups of different size, clusters of different size."""
    rng = np.random.default_rng(3)
    groups = np.repeat([0, 1, 2], [4, 10, 18])
    clusters = np.concatenate([np.arange(4) // 2, np.arange(10) // 2, np.arange(18) // 3])
    values = rng.random(32) + groups
    draws = []
    for _ in range(4000):
        taken = []
        for group in rng.integers(3, size=3):
            own = np.unique(clusters[groups == group])
            taken += [values[(groups == group) & (clusters == c)] for c in rng.choice(own, size=len(own))]
        draws.append(np.concatenate(taken).mean())
    wanted = np.quantile(draws, [0.1, 0.9])
    assert interval(values, clusters, groups, draws=4000, level=0.8) == pytest.approx(wanted, abs=0.05)
    assert wanted[1] - wanted[0] > 0.5


def test_groups_that_differ_make_an_interval_wider_and_those_that_do_not_leave_it():
    values, facts, orders = [0] * 8 + [1] * 8, [*range(8), *range(8)], [0] * 8 + [1] * 8
    assert interval(values, facts) == (0.5, 0.5)  # every fact: once right, once not
    assert interval(values, facts, orders) == (0.0, 1.0)
    rng = np.random.default_rng(0)
    alike = rng.random(400)
    facts, orders = np.arange(400), np.repeat(range(4), 100)
    alone, grouped = (interval(alike, facts, groups) for groups in (None, orders))
    assert grouped == pytest.approx(alone, abs=0.03)
    shifted = alike + 3 * (orders == 0)
    alone, grouped = (np.ptp(interval(shifted, facts, groups)) for groups in (None, orders))
    assert grouped > 3 * alone
