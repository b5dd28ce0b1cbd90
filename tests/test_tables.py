"""What a frame looks like on the console."""

import io
import math

import pandas as pd
import pytest
from rich.console import Console

from qfbench.analysis.tables import family, laid_out, named


def printed(frame, hidden=()):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(laid_out(frame, "", hidden))
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def cell(value, low=None, high=None, same=None, column="prior"):
    beside = {"low": low, "high": high, "same": same}
    line = {column: value} | {f"{column}_{what}": x for what, x in beside.items() if x is not None}
    *_, (shown,) = printed(pd.DataFrame([line]))
    return shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.5,), "0.50"),
        ((0.5, 0.5, 0.5), "0.50"),
        ((0.5, 0.25, 0.75), ".50±.25"),
        ((0.8, 0.5, 0.9), ".80±.30"),  # the farther end
        ((-0.5, -0.75, -0.25), "-.50±.25"),
        ((1.0, 0.5, 1.0), "1.00±.50"),
        ((0.5, 0.25, 0.75, True), ".50±.25~"),
        ((0.5, 0.25, 0.75, False), ".50±.25"),
        ((0.0, 0.0, 0.0, True), "0.00~"),
        ((0.0004, None, None, None, "lr"), "0.0004"),
        ((0.0004, None, None, None, "editor.lr"), "0.0004"),
        (("QF",), "QF"),
        pytest.param((10.0, 9.5, 10.5), "10.00±.50"),
        pytest.param((30.25, 20.0, 40.5), "30.25±10.25"),
    ],
)
def test_a_cell_shows_its_interval_and_its_mark(values, shown):
    assert cell(*values) == shown


def test_intervals_and_marks_have_no_columns_and_hidden_ones_are_not_shown():
    frame = pd.DataFrame(
        [
            {"regime": "joint", "prior": 0.5, "prior_low": 0.4, "prior_high": 0.6, "prior_same": True, "norm": 9.0},
            {"regime": "placebo", "prior": math.nan, "prior_low": math.nan, "prior_high": math.nan, "norm": 9.0},
        ]
    )
    head, _, first, second = printed(frame, ["norm"])
    assert head == ["regime", "prior"]
    assert first == ["joint", ".50±.10~"]
    assert second == ["placebo"]
    assert printed(frame)[0] == ["regime", "prior", "norm"]


@pytest.mark.parametrize(
    ("efficacy", "prior", "below"),
    [
        ((19.0, 5.0), (20.0, 20.0), "Few questions: efficacy 5 to 19"),
        ((5.0, 5.0), (math.nan, 2.0), "Few questions: efficacy 5, prior 2"),
        ((20.0, 20.0), (math.nan, 400.0), ""),
    ],
)
def test_below_a_table_stand_the_numbers_of_questions_that_are_few(efficacy, prior, below):
    frame = pd.DataFrame({"efficacy": [0.5, 0.5], "prior": [0.5, 0.5], "leakage": [0.5, 0.5], "norm": [0.5, 0.5]})
    frame = frame.assign(efficacy_n=efficacy, prior_n=prior, norm_n=1.0)
    head, _, *lines = printed(frame, ["norm"])
    assert head == ["efficacy", "prior", "leakage"]
    assert " ".join(word for line in lines[2:] for word in line) == below


def test_of_many_names_the_first_are_given():
    assert named(["a", "b"]) == "a, b"
    assert named(list("abcdefghijkl"), most=3) == "a, b, c and 9 more"


def test_a_table_says_how_many_comparisons_it_shows():
    lines = [{"prior": 0.5, "prior_p": 0.1, "efficacy": 0.5, "efficacy_p": p, "norm": 1.0} for p in (0.01, math.nan)]
    frame = pd.DataFrame(lines)
    assert family(frame) == "3 comparisons (~: may be none), at 5% each"
    assert family(frame, ["prior"]) == "1 comparison (~: may be none), at 5% each"
    assert family(frame[["norm"]]) == family(frame, ["prior", "efficacy"]) == ""
    frame.attrs["together"] = True
    assert family(frame).endswith("at 5% for all together (Holm)")
    assert ["3", "comparisons", "(~:"] in [line[:3] for line in printed(frame)]
