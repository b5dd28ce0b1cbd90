"""The retention matrix of a sequence of edits, and what is measured on it."""

import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.rows import regular
from qfbench.analysis.sequences import average_forgetting, forgetting, half_life, matrices, middle, over_sequence

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
    """Edited rows whose retention matrix is `table`; `prior` holds, for each step, the results of prior knowledge, each five times."""
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
                for i, value in enumerate(5 * prior[n - 1])
            ]
    frame = pd.DataFrame(rows).assign(model="m", editor="E", regime="sequential", condition="edited", leaked=False)
    return regular(frame.assign(taught=frame.step, relative_norm=0.5).assign(**more))


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


@pytest.mark.parametrize("measure", [matrices, over_sequence, forgetting])
def test_single_edits_are_no_sequence(measure):
    single = sequence([[1, None], [1, 1]], "xy", regime="single").assign(taught=1, checkpoint=True)
    assert len(measure(single)) == 0


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


def kept(kind, shares, of=10, **more):
    """Rows about what an edit should leave as it is: the share that is left at each step."""
    rows = [
        {"step": step, "kind": kind, "fact_id": f"k{n}", "generated": n < round(share * of)}
        for step, share in enumerate(shares, start=1)
        for n in range(of)
    ]
    same = {"model": "m", "editor": "E", "regime": "sequential", "condition": "edited", "checkpoint": True}
    frame = pd.DataFrame(rows).assign(**same, fresh=False, leaked=False, relative_norm=0.5)
    return regular(frame.assign(taught=frame.step).assign(**more))


def held(nll, step, condition="edited", tokens=(10, 30), **more):
    frame = kept("perplexity", [0.0], of=len(nll)).assign(nll=nll, tokens=tokens, generated=None)
    return frame.assign(step=step, taught=step, condition=condition).assign(**more)


def test_the_collapse_of_each_measure_by_hand():
    rows = pd.concat(
        [
            sequence(),
            kept("prior", [1, 1, 0.5, 0.4]),
            kept("locality", [0.4, 1, 1, 1]),
            kept("unknown", [1, 0.5, 0.5, 0.5]),  # refusals: half is not under half
            held([1.0, 1.0], 0, "unedited"),
            *(held([1.0, 1.0 + change], step) for step, change in ((1, 0.0), (2, 0.92), (3, 0.93), (4, 0.0))),
            held([1.0, 1.0], 1, model="n"),  # another's
            held([-9.0, -9.0], 0, "unedited", model="n"),
        ],
        ignore_index=True,
    )
    (line,) = over_sequence(rows).to_dict("records")
    collapses = {name: value for name, value in line.items() if name.startswith("collapse")}
    assert np.isnan(collapses.pop("collapse_refused"))
    # Perplexity doubles where the mean over tokens rises by ln 2 = 0.6931: 30 of 40 tokens by 0.93, not by 0.92.
    assert collapses == {"collapse": 4.0, "collapse_locality": 1.0, "collapse_perplexity": 3.0}


def test_what_was_not_asked_has_no_collapse():
    (line,) = over_sequence(pd.concat([sequence(), held([9.0, 9.0], 3)])).to_dict("records")
    assert [name for name in line if name.startswith("collapse")] == ["collapse"]  # no start to fall from
    assert np.isnan(line["collapse"])


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ((5, np.nan, np.nan), np.nan),
        ((np.nan, 9, 5), 9),
        ((5, 7, 6), 6),
        ((5, np.nan), np.nan),
        ((5, 7), 6),
        ((np.nan,), np.nan),
        ((np.nan, 5, 5, np.nan, 1), 5),
    ],
)
def test_what_never_came_about_is_later_than_everything_in_the_middle(values, median):
    same = {"model": "m", "editor": "E", "regime": "joint", "final": 0.5}
    rows = pd.DataFrame([same | {"order": n, "collapse": value} for n, value in enumerate(values)])
    other = rows.assign(regime="single", collapse=3.0, final=0.25)
    found = middle(pd.concat([rows, other], ignore_index=True))
    assert list(found.regime) == ["joint", "single"]
    assert list(found.collapse) == pytest.approx([median, 3.0], nan_ok=True)
    assert list(found.final) == [0.5, 0.25]
    assert "order" not in found
