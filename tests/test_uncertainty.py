"""Intervals, tests of paired differences, and how often both are wrong."""

import runpy
from fractions import Fraction
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from qfbench.analysis.uncertainty import estimate, holm, interval, p_of, p_value, paired, sign_flips
from qfbench.errors import UserError

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (19, 20), (20, 20), (1, 1), (150, 200)])
def test_of_one_reply_a_fact_it_is_agresti_and_coulls(right, n):
    share = (right + 2) / (n + 4)
    half = t.ppf(0.975, n + 3) * (share * (1 - share) / (n + 3)) ** 0.5
    found = interval([1] * right + [0] * (n - right), range(n), within=SHARE)
    assert found == pytest.approx((max(share - half, 0), min(share + half, 1)))
    assert found[0] <= right / n <= found[1]


def test_without_bounds_it_is_students():
    values = np.random.default_rng(0).normal(size=12)
    half = t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
    assert interval(values, range(12)) == pytest.approx((values.mean() - half, values.mean() + half))
    ninety = t.ppf(0.95, 11) / t.ppf(0.975, 11) * half
    assert interval(values, range(12), level=0.9) == pytest.approx((values.mean() - ninety, values.mean() + ninety))


def test_replies_about_one_fact_count_together():
    once, often = ([0, 1, 1, 0, 1], range(5)), (np.repeat([0, 1, 1, 0, 1], 7), np.repeat(range(5), 7))
    for within in (None, SHARE):
        assert interval(*often, within=within) == pytest.approx(interval(*once, within=within))
    low, high = interval(often[0], range(35), within=SHARE)
    assert high - low < 0.6 * np.diff(interval(*once, within=SHARE))


def test_facts_that_agree_leave_open_what_so_few_leave_open():
    lows = [interval(np.ones(n), range(n), within=SHARE)[0] for n in (1, 5, 20, 200)]
    assert lows == sorted(lows)
    assert lows[0] < 0.4
    assert 0.75 < lows[2] < 0.05 ** (1 / 20)  # which 20 of 20 would still show once in 20 runs
    assert interval([0.0] * 20, range(20), within=DIFFERENCE) == pytest.approx((-0.14, 0.14), abs=0.01)
    assert interval([2.5, 2.5], [0, 0]) == (2.5, 2.5)  # one text: nothing is known


def test_orders_that_differ_make_it_wider_and_one_order_says_nothing():
    facts, order = np.tile(range(40), 3), np.repeat([0, 1, 2], 40)
    values = (np.random.default_rng(0).random(120) < 0.5).astype(float)
    alone = interval(values, facts, within=SHARE)
    assert interval(values, facts, [np.zeros(120), order * 0], within=SHARE) == alone
    spread = np.where(order == 0, 1.0, values)
    assert np.diff(interval(spread, facts, [order], within=SHARE)) > 2.5 * np.diff(
        interval(spread, facts, within=SHARE)
    )


def test_levels_by_hand():
    """Two seeds of two orders, one fact: seeds about the mean, orders about their seed's."""
    values, seed, order = [1.0, 2.0, 5.0, 8.0], [0, 0, 1, 1], [0, 1, 0, 1]
    seeds, orders = 2 * (2.5**2 + 2.5**2) / 4, (4 / 2) * (0.5**2 + 0.5**2 + 1.5**2 + 1.5**2) / 16
    half = (t.ppf(0.975, 1) ** 2 * seeds + t.ppf(0.975, 2) ** 2 * orders) ** 0.5
    assert interval(values, [0] * 4, [seed, order]) == pytest.approx((4 - half, 4 + half))


def test_a_value_outside_of_the_bounds_is_refused():
    with pytest.raises(UserError, match="values of 0 to 1.5, not of 0 to 1"):
        interval([0, 1.5], [0, 1], within=SHARE)


def exact(sums):
    """All signs, one by one."""
    far = [abs(np.dot(signs, sums)) > abs(sum(sums)) - 1e-9 for signs in product((-1, 1), repeat=len(sums))]
    return sum(far) / len(far)


@pytest.mark.parametrize("sums", [[1, 1, -2, 3, 0], [0.25, 0.5, 1.0, -0.125], [0, 0], [3, 3, 3, 3, 3, 3], [0.1] * 3])
def test_signs_are_flipped_one_by_one(sums):
    assert sign_flips(sums) == pytest.approx(exact(sums))


@pytest.mark.parametrize(("lost", "gained"), [(3, 0), (5, 0), (6, 0), (0, 6), (8, 2), (40, 20)])
def test_of_one_reply_a_fact_the_test_is_mcnemars_exact_one(lost, gained):
    n, most = lost + gained, max(lost, gained)
    by_hand = min(Fraction(1), 2 * Fraction(sum(comb(n, k) for k in range(most, n + 1)), 2**n))
    assert sign_flips([1] * lost + [-1] * gained + [0] * 9) == pytest.approx(float(by_hand))
    values = [1] * lost + [-1] * gained + [0] * 9
    assert p_value(values, range(len(values)), within=DIFFERENCE) == pytest.approx(float(by_hand))


def test_ten_of_ten_against_seven_of_ten_may_be_the_same():
    assert p_value([1] * 3 + [0] * 7, range(10), within=DIFFERENCE) == pytest.approx(0.25)


def test_too_many_sums_are_left_to_students_test():
    values = np.random.default_rng(0).normal(0.3, 1, size=60)
    assert sign_flips(values) == 0
    by_hand = 2 * t.sf(values.mean() / values.std(ddof=1) * 60**0.5, 59)
    assert p_value(values, range(60)) == pytest.approx(by_hand)


def test_p_is_the_level_at_which_the_interval_ends_at_none():
    rng = np.random.default_rng(4)
    facts, order = np.tile(range(60), 3), np.repeat([0, 1, 2], 60)
    values = rng.normal(0.2, 1, size=180) + 0.1 * order
    p = p_value(values, facts, [order])
    assert 0.01 < p < 0.5
    assert interval(values, facts, [order], level=1 - p)[0] == pytest.approx(0, abs=1e-6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert list(holm([0.6, 0.5])) == [1, 1]
    assert len(holm([])) == 0


STUDY = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "intervals" / "simulate.py"))
FEW = {"facts": 10, "orders": 1, "probes": 2, "fact": 0.5, "order": 0.05}


@pytest.mark.parametrize(
    "point", [{"share": 0.95}, {"share": 0.5}, {"share": 0.9, "orders": 3}, {"share": 0.02, "facts": 20, "orders": 2}]
)
def test_intervals_hold_the_truth_where_the_bootstrap_did_not(point):
    assert STUDY["coverage"](300, FEW | point)[0] > 0.92
    if point == {"share": 0.95}:
        assert STUDY["coverage"](100, FEW | point, of=STUDY["old_interval"])[0] < 0.8


@pytest.mark.parametrize(
    "point", [{"orders": 1, "order": 0.0}, {"orders": 3, "facts": 50}, {"draws": 3}, {"draws": 2, "facts": 50}]
)
def test_no_difference_is_seldom_found(point):
    assert STUDY["found"](250, FEW | {"share": 0.5} | point) < 0.08
    if point == {"draws": 3}:
        assert STUDY["found"](60, FEW | {"share": 0.5, "facts": 50} | point, of=STUDY["old_p"]) > 0.15


def test_a_large_difference_is_found():
    assert STUDY["found"](60, FEW | {"share": 0.95, "other": 0.2, "facts": 20}) > 0.9
    assert STUDY["found"](60, FEW | {"share": 0.95, "other": 0.2, "facts": 20, "draws": 3}) > 0.7


def sample(*rows, **more):
    """Of (order, group, fact, probe, value)."""
    return pd.DataFrame(rows, columns=["order", "group", "fact_id", "probe", "value"]).assign(**more)


OURS = sample((0, 0, "a", "p", 1.0), (0, 0, "b", "p", 0.0), (0, 0, "c", "p", 1.0), (1, 10, "a", "p", 1.0))
THEIRS = sample(
    (0, 0, "a", "p", 0.0),
    (0, 1, "a", "p", 1.0),  # asked again, under another draw
    (0, 0, "a", "q", 1.0),
    (0, 0, "b", "p", 1.0),
    (1, 10, "a", "p", 0.25),
    (1, 11, "b", "p", 1.0),
)


def test_paired_differences_by_hand():
    """Of each draw of the other side; what one side alone was asked (c; the probe q; b in order 1) is left out."""
    found = paired(OURS, THEIRS)
    differences = found.set_index(["group", "fact_id", "probe"]).value.to_dict()
    assert differences == {(0, "a", "p"): 1.0, (1, "a", "p"): 0.0, (0, "b", "p"): -1.0, (10, "a", "p"): 0.75}
    back = paired(THEIRS, OURS)
    assert list(back.value) == [-value for value in found.value]
    shuffled = paired(OURS.iloc[::-1], THEIRS.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(shuffled, found)


def test_without_draws_groups_are_the_orders():
    ours, theirs = OURS, THEIRS[THEIRS.group % 10 == 0]
    found = paired(ours, theirs.assign(group=theirs.group + 5))
    assert found.set_index(["order", "fact_id"]).value.to_dict() == {(0, "a"): 1.0, (0, "b"): -1.0, (1, "a"): 0.75}
    assert list(found.group) == list(found.order)


def test_edits_on_both_sides_are_paired_edit_by_edit():
    edits = sample(*((0, edit, "a", "p", float(edit % 2)) for edit in range(6)))
    later = edits[edits.group > 1].assign(value=lambda own: 1 - own.value)
    assert dict(zip(*paired(edits, later)[["group", "value"]].to_numpy().T, strict=True)) == {2: -1, 3: 1, 4: -1, 5: 1}


def test_a_state_is_one_draw_more_than_those_of_its_placebo():
    """It must lie outside of where the draws lie, not only off their mean."""
    facts = range(50)
    state = sample(*((0, 0, f, "p", 1.0) for f in facts))
    draws = sample(*((0, d, f, "p", float(f >= 20 * d)) for d in (0, 1, 2) for f in facts))  # 1.0, 0.6, 0.2
    found = paired(state, draws)
    assert set(found.times) == {4}
    assert p_of(found, DIFFERENCE) > 0.2
    assert p_of(found.drop(columns=["group", "times"]), DIFFERENCE) < 0.001
    alike = sample(*((0, d, f, "p", float(f % 3 == d)) for d in (0, 1, 2) for f in facts))
    assert p_of(paired(state, alike), DIFFERENCE) < 0.001


def test_nothing_in_common_leaves_nothing():
    assert paired(OURS, THEIRS.assign(fact_id="z")).empty


def normal(rng, mean, shared, n=40):
    values = mean + shared + 0.1 * rng.standard_normal(n)
    return pd.DataFrame({"value": values, "fact_id": range(n), "probe": "p", "order": 0, "group": 0})


def test_a_paired_interval_covers_the_difference_and_is_narrow_where_the_sides_agree():
    rng, hits, ratios = np.random.default_rng(5), 0, []
    for _ in range(60):
        shared = rng.standard_normal(40)
        ours, theirs = normal(rng, 0.05, shared), normal(rng, 0.0, shared)
        _, low, high = estimate(paired(ours, theirs))
        hits += low <= 0.05 <= high
        apart = sum((np.ptp(estimate(side)[1:])) ** 2 for side in (ours, theirs)) ** 0.5
        ratios.append((high - low) / apart)
    assert hits / 60 > 0.88
    assert max(ratios) < 0.25  # 0.1 of the spread is not shared
    loose = normal(rng, 0.05, rng.standard_normal(40)), normal(rng, 0.0, rng.standard_normal(40))
    apart = sum((np.ptp(estimate(side)[1:])) ** 2 for side in loose) ** 0.5
    assert np.ptp(estimate(paired(*loose))[1:]) > 0.7 * apart  # nothing shared, nothing gained


def test_orders_count_in_paired_differences():
    facts = [f"f{n}" for n in range(40)]
    ours = sample(*((order, order, fact, "p", float(order == 0)) for order in (0, 1) for fact in facts))
    theirs = ours.assign(value=1 - ours.value)  # one order each is won
    assert estimate(paired(ours, theirs), DIFFERENCE) == (0.0, -1.0, 1.0)
    _, low, high = estimate(paired(ours.assign(order=0, group=0), theirs.assign(order=0, group=0)), DIFFERENCE)
    assert -0.1 < low < 0 < high < 0.1  # of facts alone, each won once


def test_a_weighted_mean_by_hand():
    mean, low, high = estimate(sample((0, 0, "a", "p", 1.0), (0, 0, "b", "p", 3.0), weight=[10, 30]))
    half = t.ppf(0.975, 1) * (2 * (15**2 + 15**2)) ** 0.5 / 40  # residuals, 1.5 and 0.5 nats, of 10 and 30 tokens
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
