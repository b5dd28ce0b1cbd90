import numpy as np
import pandas as pd
import pytest

from qfbench.metrics import by_layer, forgetting, interval, summary

COLUMNS = ("regime", "step", "kind", "fact_id", "generated", "fresh", "leaked")


def frame(*rows):
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(condition="edited", layer=2, relative_norm=0.5, taught=table.step, checkpoint=True)


ROWS = frame(
    ("sequential", 1, "edit", "a", True, True, False),
    ("sequential", 1, "paraphrase", "a", False, True, False),
    ("sequential", 1, "prior", "x", True, False, False),
    ("sequential", 2, "edit", "a", False, False, False),
    ("sequential", 2, "edit", "b", True, True, False),
    ("sequential", 2, "paraphrase", "b", True, True, False),
    ("sequential", 2, "paraphrase", "a", False, False, False),
    ("sequential", 2, "prior", "x", True, False, False),
    ("sequential", 2, "prior", "y", False, False, False),
    ("sequential", 2, "unknown", "x", False, False, True),
    ("sequential", 2, "unknown", "y", True, False, False),
)


def test_summary_by_hand():
    line = summary(ROWS).iloc[0]
    assert line.efficacy == 1.0  # a at step 1, b at step 2
    assert line.paraphrase == 0.5
    assert line.retention == 0.5
    assert line.prior == 0.5
    assert line.refused == 0.5
    assert line.leakage == 0.5
    assert "portability" not in line  # never asked


def test_forgetting_by_hand():
    curve = forgetting(ROWS)
    assert list(curve.step) == [1, 2]
    assert list(curve["mean"]) == [1.0, 0.5]
    assert (curve.low <= curve["mean"]).all()
    assert (curve.high >= curve["mean"]).all()
    assert curve.low.iloc[1] == 0.0


def test_layers_are_measured_apart():
    other = ROWS.assign(layer=5, generated=False)
    alone = ROWS[ROWS.fresh].assign(regime="single", taught=1)
    curve = by_layer(pd.concat([ROWS, alone, other, alone.assign(layer=5, generated=False)]))
    assert list(curve.layer) == [2, 5]
    assert list(curve.efficacy) == [1.0, 0.0]
    assert list(curve.seq_retention) == [0.5, 0.0]


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
