"""Intervals of the summary, what cannot be told from a placebo, and comparisons."""

import math

import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.catalogue import MEASURES
from qfbench.analysis.measures import compared, summary, together
from qfbench.analysis.rows import regular


def asked(kind, values, step=1, condition="edited", regime="sequential", **more):
    """Rows of one kind of probe, one a fact, with the results `generated`."""
    rows = pd.DataFrame({"generated": values, "fact_id": [f"f{n}" for n in range(len(values))]})
    rows = rows.assign(kind=kind, query=[f"{kind} {n}?" for n in range(len(values))], step=step, taught=step)
    rows = rows.assign(model="m", editor="E", condition=condition, regime=regime, checkpoint=True, leaked=False)
    rows = rows.assign(fresh=kind == "edit" and condition == "edited", relative_norm=0.5).assign(**more)
    return regular(rows)


def joined(*parts):
    return regular(pd.concat([part.astype(object) for part in parts], ignore_index=True))


def passages(nll, tokens, **more):
    return asked("perplexity", [None] * len(nll), nll=nll, tokens=tokens, **more)


def everything(seed=0, n=30, **more):
    """Rows of which every measure of the summary can be taken, at random."""
    rng = np.random.default_rng(seed)
    parts = []
    for order in range(2):
        for kind in ("edit", "paraphrase", "paraphrase_held_out", "portability", "prior", "locality", "unknown"):
            part = asked(kind, rng.random(n) < 0.6, order=order, forced=rng.random(n), leaked=rng.random(n) < 0.3)
            part["stopped"] = rng.random(n) < 0.9
            part["fresh"] = kind.startswith(("edit", "para", "port"))
            part = part.assign(preferred=rng.random(n) < 0.5, gold=rng.random(n) < 0.5 if kind == "locality" else None)
            parts.append(part)
        parts.append(passages(rng.random(n) + 1, rng.integers(3, 30, n), order=order))
        parts.append(asked("question", [None] * n, correct=rng.random(n) < 0.6, suite="quiz", order=order))
    return joined(*parts).assign(**more)


def test_every_measure_has_an_interval_around_it():
    (line,) = summary(everything()).to_dict("records")
    assert set(MEASURES) <= set(line)
    for name in MEASURES:
        assert line[f"{name}_low"] < line[name] < line[f"{name}_high"], name
    names = list(summary(everything()))
    assert [name for name in names if name in MEASURES] == list(MEASURES)  # in their order
    assert not [name for name in names if name.endswith("_same")]  # against nothing


def test_what_no_line_measures_has_no_column():
    assert {"efficacy", "efficacy_low", "retention_high", "norm"} <= set(summary(asked("edit", [True, False])))
    assert not {"prior", "prior_low", "perplexity"} & set(summary(asked("edit", [True, False])))


def test_inflation_by_hand():
    """Of the taught queries right after their own edit, and of nothing else."""
    rows = joined(
        asked("edit", [False, True, True], forced=[0.75, 1.0, 0.5]),
        asked("edit", [False], forced=[1.0], fresh=False),
        asked("paraphrase", [False], forced=[1.0], fresh=True),
    )
    (line,) = summary(rows).to_dict("records")
    assert line["inflation"] == pytest.approx((0.75 + 0 - 0.5) / 3)
    assert line["inflation"] == pytest.approx(line["forced"] - line["efficacy"])
    assert -1 <= line["inflation_low"] < -0.5 < 0.75 < line["inflation_high"] <= 1  # of three


def test_perplexity_is_exp_of_the_mean_over_tokens():
    unedited = passages([1.0, 3.0], [10, 30], condition="unedited", step=0, regime=None)
    rows = joined(unedited, passages([9.0, 9.0], [10, 30], step=1), passages([2.0, 4.0], [10, 30], step=2))
    rows = joined(rows, asked("edit", [True, True], step=2))
    lines = summary(rows).set_index("regime")
    assert lines.perplexity["unedited"] == pytest.approx(math.exp(2.5))
    assert lines.perplexity["sequential"] == pytest.approx(math.exp(3.5))  # at the last checkpoint
    for regime, mean in (("unedited", 2.5), ("sequential", 3.5)):
        assert lines.perplexity_low[regime] * lines.perplexity_high[regime] == pytest.approx(math.exp(2 * mean))


def last(edited, placebo, kind="prior", **more):
    """Rows of a regime, and of its placebo."""
    return joined(asked(kind, edited), asked(kind, placebo, condition="placebo", draw=0, **more))


YES, NO = [True] * 10, [False] * 10


@pytest.mark.parametrize(
    ("edited", "placebo", "same"),
    [
        (YES, NO, False),
        (NO, YES, False),
        (YES, YES, True),
        (NO, NO, True),
        (YES, [False] + [True] * 9, True),
        ([False] * 5 + [True] * 5, YES, True),  # McNemar: 2 / 2^5
        ([False] * 6 + [True] * 4, YES, False),  # 2 / 2^6
        ([True] * 6 + [False] * 4, NO, False),
        ([True] * 5 + [False] * 5, [False] * 5 + [True] * 5, True),  # five won, five lost
    ],
)
def test_a_placebo_line_marks_what_it_cannot_be_told_from(edited, placebo, same):
    line, below = summary(last(edited, placebo)).to_dict("records")
    assert below["regime"] == "placebo"
    assert below["prior_same"] is same
    assert not isinstance(line["prior_same"], bool)  # a regime is compared with nothing


def test_draws_of_a_placebo_are_averaged_before_they_are_compared():
    """Under each draw another half is lost: every fact is lost under one of two."""
    halves = [[n % 2 == draw for n in range(10)] for draw in (0, 1)]
    draws = [asked("prior", half, condition="placebo", draw=draw) for draw, half in enumerate(halves)]
    _, below = summary(joined(asked("prior", YES), *draws)).to_dict("records")
    assert below["prior"] == 0.5
    assert below["prior_same"] is False
    assert 2 / 2**10 < below["prior_p"] < 0.02
    assert below["prior_low"] < 0.5 < below["prior_high"]


def test_the_marks_of_a_placebo_are_those_of_the_regime_above_it():
    rows = joined(last(YES, NO), last(NO, NO).assign(regime="joint"))
    marks = summary(rows)[["regime", "of", "prior_same"]].query("regime == 'placebo'")
    assert list(marks.itertuples(index=False, name=None)) == [
        ("placebo", "sequential", False),
        ("placebo", "joint", True),
    ]


def test_regimes_are_compared_with_the_first_by_hand():
    rows = joined(
        asked("edit", YES),
        asked("prior", YES),
        asked("edit", [True] * 4 + [False] * 6, regime="joint"),
        asked("prior", YES, regime="joint"),
        asked("edit", NO, editor="F"),
        asked("prior", NO[:6], editor="F"),  # fewer are asked: only those count
        asked("prior", NO, condition="placebo"),
        asked("prior", NO, condition="unedited", regime=None),
        asked("edit", NO, condition="in_context", regime=None),
    )
    lines = compared(rows)
    columns = [
        "editor",
        "regime",
        "editor_of",
        "regime_of",
        "facts",
        "efficacy",
        "prior",
        "efficacy_same",
        "prior_same",
    ]
    assert list(lines[columns].itertuples(index=False, name=None)) == [
        ("E", "joint", "E", "sequential", 10, -0.6, 0.0, False, True),
        ("F", "sequential", "E", "sequential", 10, -1.0, -1.0, False, False),
    ]
    assert (lines.efficacy_low[0], lines.efficacy_high[0]) == pytest.approx((-0.9, -0.1), abs=0.05)
    assert (lines.efficacy_low[1], lines.efficacy_high[1]) == pytest.approx((-1, -0.5), abs=0.05)
    assert list(lines.efficacy_p) == pytest.approx([2 / 2**6, 2 / 2**10])


def test_a_single_regime_is_compared_with_nothing():
    assert compared(joined(asked("edit", YES), asked("edit", NO, condition="in_context", regime=None))).empty


def test_rows_are_compared_with_the_same_regimes_of_others():
    ours = joined(asked("edit", YES), asked("edit", YES, regime="joint"))
    theirs = joined(asked("edit", NO, editor="F"), asked("edit", NO, regime="protected"))
    (line,) = compared(ours, theirs).to_dict("records")
    assert (line["regime"], line["regime_of"], line["editor"], line["editor_of"]) == ("sequential",) * 2 + ("E", "F")
    assert (line["efficacy"], line["facts"]) == (1.0, 10)
    assert compared(ours, theirs[theirs.regime == "protected"]).empty


def test_to_compare_the_other_way_round_gives_the_negative():
    one, other = everything(1), everything(2, editor="F")
    (there,), (back,) = (compared(*pair).to_dict("records") for pair in ((one, other), (other, one)))
    assert (there["editor"], there["editor_of"]) == (back["editor_of"], back["editor"]) == ("E", "F")
    for name in set(MEASURES) - {"perplexity"}:
        assert there[name] == pytest.approx(-back[name])
        ends = sorted((-back[f"{name}_low"], -back[f"{name}_high"]))
        assert [there[f"{name}_low"], there[f"{name}_high"]] == pytest.approx(ends)
        assert there[f"{name}_same"] == back[f"{name}_same"]
    assert there["perplexity"] == pytest.approx(1 / back["perplexity"])  # a ratio
    assert there["perplexity_low"] == pytest.approx(1 / back["perplexity_high"])
    assert any(abs(there[name]) > 0.01 for name in set(MEASURES) - {"perplexity"})


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param((20, 20), id="alike"),
        pytest.param((10, 30), id="unlike"),
    ],
)
def test_the_perplexity_of_a_comparison_is_the_ratio_of_two_summaries(tokens):
    one, other = (joined(asked("edit", YES), passages(nll, tokens)) for nll in ([1.0, 3.0], [1.0, 2.0]))
    ratio = summary(one).perplexity[0] / summary(other).perplexity[0]
    assert compared(one, other).perplexity[0] == pytest.approx(ratio)


def test_marks_that_hold_together_are_holms():
    """Of three comparisons, of which one is hidden: 6 of 10 lost (p = 0.031) differs by itself, not beside another."""
    halves = [asked(kind, YES) for kind in ("edit", "prior", "locality")]
    lost = [asked(kind, [n > 5 for n in range(10)], regime="joint") for kind in ("edit", "prior", "locality")]
    table = compared(joined(*halves, *lost))
    names = ["efficacy", "prior", "locality", "retention"]
    assert not table[[f"{name}_same" for name in names]].to_numpy().any()
    held = together(table)
    assert list(held[[f"{name}_p" for name in names]].iloc[0]) == pytest.approx([4 * 2 / 2**6] * 4)
    assert held[[f"{name}_same" for name in names]].to_numpy().all()
    alone = together(table, ["prior", "locality", "retention"])
    assert alone.efficacy_same[0] is False
    assert alone.prior_p[0] == table.prior_p[0]
