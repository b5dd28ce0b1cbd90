"""What an editor keeps, against what it costs."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfbench import UserError
from qfbench.analysis.comparisons import curves, pareto
from qfbench.analysis.measures import balance, summary
from qfbench.pages import results
from qfbench.pages.study import rivals

RUNS = Path(__file__).parents[1] / "experiments" / "rivals" / "runs" / "side_by_side"


def test_the_line_joins_those_of_which_none_is_both_faster_and_better():
    table = pd.DataFrame(
        {"editor": list("abcde"), "seconds": [1.0, 0.1, 10.0, 0.3, 3.0], "balance": [0.5, 0.2, 0.9, 0.1, 0.5]}
    )
    axes = pareto(table).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 0.2], [1.0, 0.5], [10.0, 0.9]]
    assert {text.get_text() for text in axes.texts} == set("abcde")
    points = axes.collections[0]
    assert sorted(map(tuple, points.get_offsets())) == sorted(zip(table.seconds, table.balance, strict=True))
    assert len(np.unique(points.get_facecolors(), axis=0)) == 2


@pytest.mark.parametrize(("shares", "worth"), [((0.5, 0.5), 0.5), ((1, 1, 0.5), 0.75), ((1, 0, 1, 1), 0), ((), 0)])
def test_balance_is_the_harmonic_mean(shares, worth):
    assert balance(*shares) == pytest.approx(worth)
    assert np.isnan(balance(*shares, np.nan))


def test_runs_that_differ_in_very_many_settings_are_read_without_a_warning():
    """pandas warns of frames in many pieces, once for every line of output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = results.retention(RUNS)
        assert rows.shape[1] > 100
        assert len(results.pooled(rows, summary))


def test_the_best_editor_stands_first_and_what_it_is_judged_by_stands_beside_it():
    rows = results.retention(RUNS)
    table = rivals(rows, (10, 48)).tables["rivals"]
    assert list(table.edits.unique()) == [10, 48]
    for _, own in table.groupby("edits"):
        assert own.balance.is_monotonic_decreasing
    for line in table.to_dict("records"):
        assert line["balance"] == pytest.approx(
            balance(*(line[n] for n in ("retention", "paraphrase", "prior", "refused")))
        )
    other = rivals(rows, (48,), refuses=False).tables["rivals"]
    for line in other.to_dict("records"):
        assert line["not_leaked"] == pytest.approx(1 - line["leakage"])
        assert line["not_leaked_low"] <= line["not_leaked"] <= line["not_leaked_high"]
        assert line["balance"] == pytest.approx(
            balance(*(line[n] for n in ("retention", "paraphrase", "prior", "not_leaked")))
        )


def test_two_runs_of_one_editor_are_not_mixed_up():
    rows = results.retention(RUNS, RUNS.parent / "by_hand")
    with pytest.raises(UserError, match="several runs have the editor .*: give one of each"):
        rivals(rows, (48,))


def test_what_was_not_asked_is_named():
    rows = results.retention(RUNS)
    without = rows[rows.kind != "paraphrase"]
    without.attrs = rows.attrs
    with pytest.raises(UserError, match="did not measure paraphrase: give facts.paraphrases"):
        rivals(without, (48,))


def test_three_measures_of_one_model_leave_a_place_empty():
    table = rivals(results.retention(RUNS), (10, 48)).tables["rivals"]
    panels = curves(table, "edits", ["retention", "prior", "refused"]).axes
    assert [axes.get_visible() for axes in panels] == [True, True, True, False]
