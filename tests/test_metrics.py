import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.measures import by_layer, by_setting, summary
from qfbench.analysis.rows import regular
from qfbench.analysis.sequences import forgetting
from qfbench.analysis.uncertainty import interval

COLUMNS = ("regime", "step", "kind", "fact_id", "generated", "fresh", "leaked")


def frame(*rows):
    table = pd.DataFrame(rows, columns=COLUMNS)
    same = {"model": "m", "editor": "E", "condition": "edited", "layer": 2, "relative_norm": 0.5, "checkpoint": True}
    return regular(table.assign(**same, taught=table.step))


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


def test_forgetting_takes_edited_rows_at_checkpoints_only():
    columns = ("condition", "step", "checkpoint", "generated", "fact_id")
    rows = [
        ("edited", 1, False, True, "a"),
        ("edited", 2, True, False, "a"),
        ("edited", 2, True, True, "b"),
        ("told", 2, True, True, "a"),
        ("edited", 3, False, True, "c"),
        ("edited", 4, True, False, "a"),
        ("told", 5, True, True, "a"),
    ]
    frame = pd.DataFrame(rows, columns=columns).assign(model="m", editor="E", regime="joint", kind="edit")
    curve = forgetting(regular(frame.assign(taught=frame.step)))
    assert list(zip(curve.step, curve["mean"], strict=True)) == [(2, 0.5), (4, 0.0)]


def test_layers_are_measured_apart():
    other = ROWS.assign(layer=5, generated=False)
    alone = ROWS[ROWS.fresh].assign(regime="single", taught=1)
    curve = by_layer(pd.concat([ROWS, alone, other, alone.assign(layer=5, generated=False)]))
    assert list(curve.layer) == [2, 5]
    assert list(curve.efficacy) == [1.0, 0.0]
    assert list(curve.seq_retention) == [0.5, 0.0]


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
    measured = {f"{name}{beside}" for name in ("efficacy", "prior") for beside in ("", "_low", "_high", "_n")}
    assert set(lines.columns) == {"lr", "norm", "balance"} | measured


def near(step, *rows, condition="edited", regime="sequential"):
    names = ("generated", "gold", "preferred")
    frame = pd.DataFrame(rows, columns=names).assign(kind="locality", fact_id="n", fresh=False, leaked=False)
    same = {"model": "m", "editor": "E", "relative_norm": 0.5, "checkpoint": True}
    return regular(frame.assign(**same, step=step, taught=step, condition=condition, regime=regime))


def test_locality_is_reported_against_the_models_own_reply_the_gold_and_by_likelihood():
    rows = pd.concat(
        [
            ROWS.assign(preferred=[True if kind == "edit" else None for kind in ROWS.kind], gold=None),
            near(1, (False, False, False)),  # not the last edit
            near(2, (True, True, True), (True, False, True), (False, True, True), (False, False, False)),
            near(2, (True, None, None)),  # a neighbour with nothing but its own reply
        ]
    )
    (line,) = summary(rows).to_dict("records")
    assert line["locality"] == 3 / 5
    assert line["locality_gold"] == 2 / 4
    assert line["locality_preferred"] == 3 / 4
    assert line["preferred"] == 1.0
    assert line["retention"] == 0.5


def test_preferred_is_that_of_the_taught_query_right_after_its_own_edit():
    frame = ROWS.assign(preferred=None, gold=None)
    frame.loc[frame.kind == "edit", "preferred"] = [True, False, False]  # a anew; a again; b anew
    frame.loc[frame.kind == "paraphrase", "preferred"] = True
    (line,) = summary(frame).to_dict("records")
    assert line["preferred"] == 0.5
    assert "locality" not in line
    assert "locality_gold" not in line
    assert "preferred" not in summary(regular(frame.drop(columns="preferred")))


def test_a_placebo_stands_below_its_regime_and_mixes_with_nothing():
    last = ROWS[ROWS.step == 2]
    random = last.assign(condition="placebo", generated=last.kind != "edit", leaked=False, relative_norm=0.25)
    joint = ROWS.assign(regime="joint", generated=True)
    rows = pd.concat([ROWS, random, joint, random.assign(regime="joint", generated=False, leaked=True)])
    lines = summary(rows)
    assert list(zip(lines.regime, lines["of"], strict=True)) == [
        ("sequential", "sequential"),
        ("placebo", "sequential"),
        ("joint", "joint"),
        ("placebo", "joint"),
    ]
    assert list(lines.retention) == [0.5, 0.0, 1.0, 0.0]
    assert list(lines.prior) == [0.5, 1.0, 1.0, 0.0]
    assert list(lines.refused) == [0.5, 1.0, 1.0, 0.0]
    assert list(lines.leakage) == [0.5, 0.0, 0.5, 1.0]
    assert list(lines.norm) == [0.5, 0.25, 0.5, 0.25]
    assert list(lines.efficacy.isna()) == [False, True, False, True]  # nothing is fresh under a placebo
    alone = summary(ROWS)
    pd.testing.assert_frame_equal(lines.loc[[0], list(alone.columns)], alone)
    assert set(lines.columns) - set(alone.columns) == {
        f"{m}_{what}" for m in ("retention", "prior", "refused", "leakage") for what in ("p", "same")
    }
    assert list(forgetting(rows)["mean"]) == [1.0, 0.5, 1.0, 1.0]


def test_an_order_that_ended_early_counts_in_the_summary():
    lost = ROWS[ROWS.step == 1].assign(order=1, generated=False)
    (line,) = summary(pd.concat([ROWS.assign(order=0), lost])).to_dict("records")
    assert line["prior"] < 0.5  # 1 of 2 in one order, 0 of 1 in the other


def test_a_curve_over_orders_has_the_interval_of_orders_and_facts():
    rows = pd.concat([ROWS.assign(order=0), ROWS.assign(order=1, generated=False)])
    curve = forgetting(rows)
    assert list(curve["mean"]) == [0.5, 0.25]
    assert (curve.low[0], curve.high[0]) == (0.0, 1.0)
    assert (forgetting(ROWS).low[0], forgetting(ROWS).high[0]) == pytest.approx(interval([1], ["a"], within=(0.0, 1.0)))
