"""Intervals by bootstrap, and paired differences."""

import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.uncertainty import estimate, interval, paired


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
    wide, half = (by_clusters(values, clusters, draws=20000, level=level) for level in (0.95, 0.5))
    assert interval(values, clusters, draws=20000) == pytest.approx(wide, abs=0.01)
    one = interval(values, clusters, [5] * 30, draws=20000)  # one group: only its clusters are drawn
    assert one == interval(values, clusters, draws=20000)
    assert interval(values, clusters, draws=20000, level=0.5) == pytest.approx(half, abs=0.01)
    assert half != pytest.approx(wide, abs=0.05)


def test_groups_and_clusters_are_drawn_across_each_other():
    """Against a bootstrap one draw at a time: a value counts as often as its group times its cluster was drawn."""
    rng = np.random.default_rng(3)
    groups, clusters = np.repeat([0, 1, 2], [4, 10, 18]), rng.integers(6, size=32)
    values = rng.random(32) + groups + clusters
    draws = []
    for _ in range(4000):
        by_group = np.bincount(rng.integers(3, size=3), minlength=3)
        by_cluster = np.bincount(rng.integers(6, size=6), minlength=6)
        times = by_group[groups] * by_cluster[clusters]
        if times.sum():
            draws.append(np.average(values, weights=times))
    wanted = np.quantile(draws, [0.1, 0.9])
    assert interval(values, clusters, groups, draws=4000, level=0.8) == pytest.approx(wanted, abs=0.15)
    assert wanted[1] - wanted[0] > 1.5


def crossed(rng, facts=30, orders=6):
    """Values of the same facts in several orders: each has an effect of its own."""
    effect = rng.normal(size=(1, facts)) + rng.normal(size=(orders, 1)) + 0.1 * rng.normal(size=(orders, facts))
    order, fact = np.divmod(np.arange(facts * orders), facts)
    return effect.ravel(), fact, order


def test_the_interval_over_orders_and_facts_covers_the_truth_where_both_vary():
    """With facts drawn anew within each order, as if every order had its own, it covers far less than it says."""
    rng, hits, nested = np.random.default_rng(5), 0, 0
    for _ in range(150):
        values, fact, order = crossed(rng, facts=8, orders=12)
        low, high = interval(values, fact, order, draws=300)
        hits += low <= 0 <= high
        own = np.array([f"{o} {f}" for o, f in zip(order, fact, strict=True)])
        low, high = interval(values, own, order, draws=300)
        nested += low <= 0 <= high
    assert hits / 150 > 0.82
    assert nested / 150 < hits / 150 - 0.1


def test_runs_have_facts_of_their_own_and_share_texts():
    rng = np.random.default_rng(6)
    run, fact = np.divmod(np.arange(120), 30)
    values = rng.normal(size=30)[fact]  # the same value of a text in each run
    shared = np.ptp(interval(values, fact, runs=run))
    apart = np.ptp(interval(values, run * 30 + fact, runs=run))
    alone = np.ptp(interval(values[:30], fact[:30]))
    assert shared == pytest.approx(alone, rel=0.15)  # four runs know no more of the texts than one
    assert apart < 0.75 * alone


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


def sample(*rows, **more):
    return pd.DataFrame(rows, columns=["order", "fact_id", "probe", "value"]).assign(**more)


OURS = sample((0, "a", "p", 1.0), (0, "b", "p", 0.0), (0, "c", "p", 1.0), (1, "a", "p", 1.0))
THEIRS = sample(
    (0, "a", "p", 0.0),
    (0, "a", "p", 1.0),  # asked again, under another draw
    (0, "a", "q", 1.0),
    (0, "b", "p", 1.0),
    (1, "a", "p", 0.25),
    (1, "b", "p", 1.0),
)


def test_paired_differences_by_hand():
    """Draws are averaged; what one side alone was asked (c; the probe q; b in order 1) is left out."""
    found = paired(OURS, THEIRS)
    differences = found.set_index(["order", "fact_id", "probe"]).value.to_dict()
    assert differences == {(0, "a", "p"): 0.5, (0, "b", "p"): -1.0, (1, "a", "p"): 0.75}
    assert list(found.group) == list(found.order)
    assert estimate(found)[0] == pytest.approx(0.25 / 3)
    back = paired(THEIRS, OURS)
    assert list(back.value) == [-value for value in found.value]
    shuffled = paired(OURS.iloc[::-1], THEIRS.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(shuffled, found)


def test_nothing_in_common_leaves_nothing():
    assert paired(OURS, THEIRS.assign(fact_id="z")).empty


def normal(rng, mean, shared, n=40):
    values = mean + shared + 0.1 * rng.standard_normal(n)
    return pd.DataFrame({"value": values, "fact_id": range(n), "probe": "p", "order": 0, "group": 0})


def test_a_paired_interval_covers_the_difference_and_is_narrow_where_the_sides_agree():
    rng, hits, ratios = np.random.default_rng(5), 0, []
    for _ in range(200):
        shared = rng.standard_normal(40)
        ours, theirs = normal(rng, 0.05, shared), normal(rng, 0.0, shared)
        _, low, high = estimate(paired(ours, theirs))
        hits += low <= 0.05 <= high
        apart = sum((np.ptp(estimate(side)[1:])) ** 2 for side in (ours, theirs)) ** 0.5
        ratios.append((high - low) / apart)
    assert 0.88 < hits / 200 < 0.99
    assert max(ratios) < 0.25  # 0.1 of the spread is not shared
    loose = normal(rng, 0.05, rng.standard_normal(40)), normal(rng, 0.0, rng.standard_normal(40))
    apart = sum((np.ptp(estimate(side)[1:])) ** 2 for side in loose) ** 0.5
    assert np.ptp(estimate(paired(*loose))[1:]) > 0.7 * apart  # nothing shared, nothing gained


def test_orders_are_the_groups_of_paired_differences():
    facts = [f"f{n}" for n in range(40)]
    ours = sample(*((order, fact, "p", float(order == 0)) for order in (0, 1) for fact in facts))
    theirs = ours.assign(value=1 - ours.value)  # one order each is won
    assert estimate(paired(ours, theirs)) == (0.0, -1.0, 1.0)
    as_one = ours.assign(order=0), theirs.assign(order=0)
    assert estimate(paired(*as_one)) == (0.0, 0.0, 0.0)


def test_a_weighted_mean_by_hand():
    found = estimate(sample((0, "a", "p", 1.0), (0, "b", "p", 3.0), weight=[10, 30], group=0))
    assert found == (2.5, 1.0, 3.0)
