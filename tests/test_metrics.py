import numpy as np
import pandas as pd
import pytest

from qfbench.metrics import (
    average_forgetting,
    by_layer,
    by_setting,
    forgetting,
    half_life,
    matrices,
    over_sequence,
    summary,
)
from qfbench.uncertainty import interval

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


def by_clusters(values, clusters, draws=1000, level=0.95):
    """The interval without groups, as it has always been."""
    sums = pd.DataFrame({"v": np.asarray(values, float), "c": clusters}).groupby("c").v.agg(["sum", "count"]).to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
    return tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - level) / 2, (1 + level) / 2]))


@pytest.mark.parametrize("seed", range(3))
def test_without_groups_an_interval_is_that_of_the_clusters_alone(seed):
    rng = np.random.default_rng(seed)
    values, clusters = rng.random(30), rng.integers(7, size=30)
    expected = by_clusters(values, clusters)
    assert interval(values, clusters) == expected
    assert interval(values, clusters, [5] * 30) == expected  # one group: only its clusters are drawn
    assert interval(values, clusters, level=0.5) == by_clusters(values, clusters, level=0.5)
    assert interval(values, clusters, level=0.5) != expected


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


# Four facts, c b d a in turn; asked again after every edit but the second
#          c  b  d  a
TABLE = [
    [1, None, None, None],
    [None, 1, None, None],
    [1, 0, 1, None],
    [0, 1, 0, 0],
]
ORDER = "cbda"


def sequence(table=TABLE, taught=ORDER, prior=(), **more):
    """Edited rows whose retention matrix is `table`; `prior` holds, for each step, the results of prior knowledge."""
    rows = []
    for n, line in enumerate(table, start=1):
        full = n != 2
        told = [(k, value) for k, value in enumerate(line) if value is not None]
        for k, value in reversed(told):  # the order of rows says nothing
            rows.append(
                {"step": n, "kind": "edit", "fact_id": taught[k], "generated": bool(value), "fresh": k == n - 1}
            )
            rows[-1] |= {"forced": value / 2, "checkpoint": full}
        rows.append({"step": n, "kind": "paraphrase", "fact_id": taught[n - 1], "generated": False, "fresh": True})
        if n <= len(prior):
            rows += [
                {"step": n, "kind": "prior", "fact_id": f"p{i}", "generated": bool(value), "fresh": False}
                for i, value in enumerate(prior[n - 1])
            ]
    frame = pd.DataFrame(rows).assign(model="m", editor="E", regime="sequential", condition="edited", leaked=False)
    return frame.assign(taught=frame.step, relative_norm=0.5).assign(**more)


def square(table=TABLE, order=ORDER):
    index = pd.Index(range(1, len(table) + 1), name="step")
    return pd.DataFrame(table, index, pd.Index(list(order), name="fact_id"), dtype=float)


def test_a_retention_matrix_by_hand():
    ((key, matrix),) = matrices(sequence()).items()
    assert key == ("m", "E", "sequential", 0)
    pd.testing.assert_frame_equal(matrix, square(), check_index_type=False, check_column_type=False)
    assert list(matrix.columns) == list(ORDER)  # as taught, not as sorted
    assert matrix.isna().to_numpy().sum() == 7


def test_a_retention_matrix_under_another_protocol():
    ((_, matrix),) = matrices(sequence(), "forced").items()
    pd.testing.assert_frame_equal(matrix, square() / 2, check_index_type=False, check_column_type=False)


def test_each_sequence_has_a_matrix_of_its_own_and_single_edits_and_other_conditions_have_none():
    other = [[1, None], [1, 1]]
    rows = pd.concat(
        [
            sequence(taught="cbda"),
            sequence(taught="adbc", table=[[1 - v if v is not None else v for v in line] for line in TABLE]).assign(
                order=1
            ),
            sequence(other, "xy", regime="joint"),
            sequence(other, "yx", editor="F", order=2),
            sequence(other, "xy", model="n"),
            sequence(other, "xy", regime="single").assign(taught=1).query("step > 1"),
            sequence(other, "xy", condition="placebo"),
            sequence(other, "xy", condition="in_context"),
        ],
        ignore_index=True,
    )
    found = matrices(rows)
    assert {key: "".join(matrix.columns) for key, matrix in found.items()} == {
        ("m", "E", "sequential", 0): "cbda",
        ("m", "E", "sequential", 1): "adbc",
        ("m", "E", "joint", 0): "xy",
        ("m", "F", "sequential", 2): "yx",
        ("n", "E", "sequential", 0): "xy",
    }
    np.testing.assert_array_equal(found["m", "E", "sequential", 1].to_numpy(), 1 - square().to_numpy())
    np.testing.assert_array_equal(found["m", "F", "sequential", 2].to_numpy(), np.array(other, float))
    assert matrices(rows[rows.condition != "edited"]) == {}


def test_average_forgetting_is_the_loss_since_the_best():
    assert average_forgetting(square()) == (1 + 0 + 1 + 0) / 4  # b was lost and came back; a was never known
    assert average_forgetting(square([[1, None], [1, 1]], "ab")) == 0
    late = [[0, None, None], [1, 1, None], [0, 1, 1]]
    assert average_forgetting(square(late, "abc")) == pytest.approx(1 / 3)  # the first was known best after the second


LOST = [[1, None, None, None], [1, 1, None, None], [0, 1, 1, None], [0, 0, 0, 1]]  # lags 0 to 3: 1, 2/3, 0, 0
SPARSE = [[1, None, None, None], [None, 1, None, None], [1, 1, 1, None], [0, 0, 1, 1]]  # lags 0 to 3: 1, 1, 1/2, 0


@pytest.mark.parametrize(
    ("table", "edits"),
    [
        pytest.param(LOST, 2),
        pytest.param([[1, None, None], [0, 1, None], [0, 0, 1]], 1),
        pytest.param(TABLE, 1),  # right after: 3 of 4; one edit later: 0 of 2
        ([[1, None, None], [1, 1, None], [1, 1, 1]], np.nan),
        ([[0, None, None], [0, 0, None], [0, 0, 0]], np.nan),  # nothing to be halved
    ],
)
def test_half_life_by_hand(table, edits):
    found = half_life(square(table, "abcd"[: len(table)]))
    assert found == pytest.approx(edits, nan_ok=True)


def test_what_is_answered_exactly_half_as_often_has_halved():
    assert half_life(square(SPARSE, "abcd")) == 2


PRIOR = ([1, 1, 1, 1], [], [1, 1, 0, 0], [1, 0, 0, 0])  # half is not under half


def test_the_measures_of_a_sequence_by_hand():
    (line,) = over_sequence(sequence(prior=PRIOR)).to_dict("records")
    line.pop("half_life")
    assert line == {"model": "m", "editor": "E", "regime": "sequential", "order": 0} | {
        "edits": 4,
        "immediate": 3 / 4,
        "final": 1 / 4,
        "forgetting": 1 / 2,
        "first": 3.0,
        "collapse": 4.0,
    }


def test_the_half_life_of_a_sequence_by_hand():
    assert list(over_sequence(sequence()).half_life) == [1.0]


@pytest.mark.parametrize(
    ("prior", "collapse"),
    [
        (([1, 1], [1, 0], [1, 0], [1, 0]), np.nan),
        (([0, 0], [1, 1], [1, 1], [1, 1]), 1),
        (([1, 1], [1, 1], [0, 0], [1, 1]), 3),  # the first time, though it recovers
        (([1, 1], [], [1, 0, 0], [0, 0]), 3),
        ((), np.nan),  # never asked
    ],
)
def test_collapse_is_the_first_checkpoint_with_prior_knowledge_under_half(prior, collapse):
    (found,) = over_sequence(sequence(prior=prior)).collapse
    assert found == pytest.approx(collapse, nan_ok=True)


@pytest.mark.parametrize(
    ("table", "first"),
    [
        ([[0, None], [0, 1]], 0),
        ([[1, None], [0, 1]], 1),
        ([[0, None], [1, 1]], 2),
        ([[1, None, None], [0, 1, None], [1, 1, 1]], 3),
    ],
)
def test_first_is_when_the_first_fact_was_last_answered(table, first):
    (found,) = over_sequence(sequence(table, "zyx"[: len(table)]))["first"]
    assert found == first


def test_prior_knowledge_of_one_sequence_says_nothing_of_another():
    kept = ([1, 1],) * 4
    rows = pd.concat(
        [
            sequence(prior=kept).assign(order=0),
            sequence(prior=([0, 0],) * 4).assign(order=1),
            sequence(prior=([0, 0],) * 4, regime="joint").assign(order=0),
            sequence(prior=([0, 0],) * 4, model="n").assign(order=0),
            sequence(prior=([0, 0],) * 4, condition="placebo").assign(order=0),
            sequence(prior=([0, 0],) * 4, condition="unedited"),
        ],
        ignore_index=True,
    )
    found = over_sequence(rows).set_index(["model", "regime", "order"]).collapse.to_dict()
    assert np.isnan(found.pop(("m", "sequential", 0)))
    assert found == {("m", "sequential", 1): 1, ("m", "joint", 0): 1, ("n", "sequential", 0): 1}


def test_sequences_without_edits_have_no_line():
    assert over_sequence(sequence(condition="in_context")).empty


def test_a_sequence_that_ended_between_checkpoints_is_measured_at_its_last_one():
    (line,) = over_sequence(sequence([[0], [None, 1]], "ab")).to_dict("records")
    assert line["final"] != 1  # the first fact is not known, and was last seen so


def near(step, *rows, condition="edited", regime="sequential"):
    names = ("generated", "gold", "preferred")
    frame = pd.DataFrame(rows, columns=names).assign(kind="locality", fact_id="n", fresh=False, leaked=False)
    same = {"model": "m", "editor": "E", "relative_norm": 0.5, "checkpoint": True}
    return frame.assign(**same, step=step, taught=step, condition=condition, regime=regime)


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
    assert "preferred" not in summary(frame.drop(columns="preferred"))


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
    pd.testing.assert_frame_equal(lines.iloc[[0]], summary(ROWS))
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
    assert (forgetting(rows.drop(columns="order")).low[0]) == 0.5
