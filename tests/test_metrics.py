import numpy as np
import pandas as pd
import pytest

from qfbench.metrics import by_layer, by_setting, forgetting, interval, summary

COLUMNS = ("regime", "step", "kind", "fact_id", "generated", "fresh", "leaked")


def frame(*rows):
    table = pd.DataFrame(rows, columns=COLUMNS)
    same = {"model": "m", "editor": "E", "condition": "edited", "layer": 2, "relative_norm": 0.5, "checkpoint": True}
    return table.assign(**same, taught=table.step)


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


def test_models_and_editors_are_measured_apart():
    told = ROWS[ROWS.fresh].assign(condition="in_context")
    other = ROWS.assign(editor="F", generated=False, leaked=False)
    elsewhere = ROWS.assign(model="n", generated=True)
    rows = pd.concat([told, ROWS, told.assign(editor="F"), other, elsewhere])
    lines = summary(rows)
    assert list(zip(lines.model, lines.editor, lines.regime, strict=True)) == [
        ("m", "E", "in_context"),
        ("m", "E", "sequential"),
        ("m", "F", "in_context"),
        ("m", "F", "sequential"),
        ("n", "E", "sequential"),
    ]
    assert list(lines.paraphrase) == [0.5, 0.5, 0.5, 0.0, 1.0]
    assert list(lines.retention)[1::2] == [0.5, 0.0]
    assert lines.retention.iloc[-1] == 1.0
    assert list(lines.leakage)[1::2] == [0.5, 0.0]
    curves = forgetting(rows)
    assert list(zip(curves.model, curves.editor, curves.step, curves["mean"], strict=True)) == [
        ("m", "E", 1, 1.0),
        ("m", "E", 2, 0.5),
        ("m", "F", 1, 0.0),
        ("m", "F", 2, 0.0),
        ("n", "E", 1, 1.0),
        ("n", "E", 2, 1.0),
    ]


def test_a_frame_without_edits_has_an_empty_curve_with_its_columns():
    curve = forgetting(ROWS.assign(condition="unedited"))
    assert list(curve.columns) == ["model", "editor", "regime", "step", "mean", "low", "high"]
    assert curve.empty


SINGLE = (  # two facts, each alone: fact b's edit leaves half of what was known
    ("single", 1, "edit", "a", True, True, False),
    ("single", 1, "paraphrase", "a", False, True, False),
    ("single", 1, "prior", "x", True, False, False),
    ("single", 1, "unknown", "x", False, False, True),
    ("single", 2, "edit", "b", False, True, False),
    ("single", 2, "paraphrase", "b", False, True, False),
    ("single", 2, "edit", "a", True, False, False),  # an older fact, asked again: no efficacy
    ("single", 2, "prior", "x", True, False, False),
    ("single", 2, "prior", "y", False, False, False),
    ("single", 2, "unknown", "x", True, False, False),
)


def test_settings_are_measured_by_hand_over_single_edits():
    alone = frame(*SINGLE).assign(taught=1)
    rows = pd.concat(
        [
            alone.assign(scheme="one", lr=0.2),
            alone.assign(scheme="one", lr=0.1, generated=True, leaked=False, relative_norm=0.25),
            alone.assign(scheme="two", lr=0.1, generated=alone.kind != "edit"),
            alone.assign(scheme="two", lr=0.2, generated=False),
            alone.assign(scheme="QF", lr=np.nan),
            ROWS.assign(scheme="one", lr=0.2, generated=False),  # sequential
            alone.assign(scheme="one", lr=0.2, condition="in_context", generated=False),
        ]
    )
    lines = by_setting(rows, "scheme", "lr")
    assert list(zip(lines.scheme, lines.lr.fillna(-1), strict=True)) == [
        ("one", 0.2),
        ("one", 0.1),
        ("two", 0.1),
        ("two", 0.2),
        ("QF", -1),
    ]
    first = lines.iloc[0]
    assert (first.efficacy, first.paraphrase) == (0.5, 0.0)
    assert first.prior == pytest.approx(2 / 3)
    assert (first.refused, first.leakage, first.norm) == (0.5, 0.5, 0.5)
    assert first.balance == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))  # 4/7
    assert lines.balance.iloc[0] == lines.balance.iloc[4]
    assert list(lines.balance)[1:4] == [1.0, 0.0, 0.0]  # all; nothing taught; nothing taught and nothing kept
    assert (lines.efficacy[2], lines.prior[2]) == (0.0, 1.0)
    assert (lines.leakage[1], lines.norm[1]) == (0.0, 0.25)
    assert "portability" not in lines


def test_one_setting_is_enough_and_what_was_asked_of_nobody_has_no_column():
    rows = frame(*(row for row in SINGLE if row[2] in ("edit", "prior"))).assign(taught=1)
    lines = by_setting(pd.concat([rows.assign(lr=2.0), rows.assign(lr=1.0, generated=False)]), "lr")
    assert list(lines.lr) == [2.0, 1.0]
    assert list(lines.efficacy) == [0.5, 0.0]
    assert set(lines.columns) == {"lr", "efficacy", "prior", "norm", "balance"}
