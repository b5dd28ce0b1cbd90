"""What edits cost in general ability: McNemar's test, the drop that can be seen, and tables worked out by hand."""

from fractions import Fraction
from functools import cache
from math import comb, nan

import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.drops import by_subject, detectable, drops, mcnemar, power
from qfbench.analysis.rows import regular
from qfbench.pages import results
from qfbench.pages.cautions import cautions


@pytest.mark.parametrize(
    ("losses", "gains", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (7, 7, 1.0),
        (150, 86, 3.716e-05),  # the approval of a prime minister, asked twice (Agresti 2013, chapter 11)
    ],
)
def test_mcnemars_exact_p(losses, gains, p):
    n, most = losses + gains, max(losses, gains)
    by_hand = min(Fraction(1), 2 * Fraction(sum(comb(n, k) for k in range(most, n + 1)), 2**n))
    assert mcnemar(losses, gains) == pytest.approx(float(by_hand))
    assert mcnemar(losses, gains) == pytest.approx(p, rel=1e-2)


def share_found(n, drop, churn, draws=4000):
    """How often McNemar's test at 5% sees a loss, where answers are lost with `churn + drop` and gained with `churn`."""
    lost, gained, _ = (
        np.random.default_rng(0).multinomial(n, [churn + drop, churn, 1 - 2 * churn - drop], draws).T.tolist()
    )
    p = cache(mcnemar)
    return np.mean([a > b and p(a, b) <= 0.05 for a, b in zip(lost, gained, strict=True)])


@pytest.mark.parametrize(("n", "gains"), [(20, 0), (100, 0), (100, 10), (500, 25), (2000, 0)])
def test_the_detectable_drop_is_found_four_times_in_five(n, gains):
    drop = detectable(n, gains)
    assert share_found(n, drop, gains / n) == pytest.approx(0.8, abs=0.03)
    assert share_found(n, 0.8 * drop, gains / n) < 0.75
    assert share_found(n, 1.2 * drop, gains / n) > 0.85 or 2 * gains / n + 1.2 * drop > 1


def test_the_detectable_drop_by_hand():
    # Where nothing is gained, six losses are needed (2 / 2^6 < 0.05 < 2 / 2^5).
    assert detectable(6) == pytest.approx(0.8 ** (1 / 6))  # all six
    drop = detectable(7)
    assert 7 * drop**6 * (1 - drop) + drop**7 == pytest.approx(0.8)
    assert np.isnan(detectable(5))
    assert np.isnan(detectable(10, 5))
    sizes = [detectable(n) for n in (10, 50, 500, 14042)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.001
    assert detectable(500, 5) < detectable(500, 50)
    assert detectable(500, level=0.01) > detectable(500) > detectable(500, power=0.5)


def asked(right, condition="edited", suite="quiz", step=1, logprob=-1.0, regime="joint", **more):
    """A row for each question: `right` is a text as "1101"; the first half is of subject a, group g, the rest of b, group h."""
    half = len(right) // 2
    edited = condition != "unedited"
    same = {"kind": "question", "model": "m", "editor": "QF", "suite": suite, "condition": condition, "step": step}
    same |= {"regime": regime, "taught": step, "checkpoint": True, "fresh": False} if edited else {"step": 0}
    return [
        same
        | {"fact_id": f"{'ab'[n >= half]}/{n}", "subject": "ab"[n >= half], "group": "gh"[n >= half]}
        | {"correct": float(answer), "gold_logprob": logprob - n, "chance": 0.25, "query": f"{n}?"}
        | more
        for n, answer in enumerate(right)
    ]


def frame(*parts):
    return regular(pd.DataFrame([row for part in parts for row in part]))


def test_a_drop_by_hand():
    before = asked("11111111110000000000", "unedited")
    after = asked("00000000111100000000", step=7, logprob=-1.5)
    midst = asked("0" * 20, step=3)
    line = drops(frame(before, midst, after)).iloc[0]
    assert (line.suite, line.model, line.editor, line.regime, line.questions) == ("quiz", "m", "QF", "joint", 20)
    assert (line.before, line.after, line["drop"]) == (0.5, 0.2, pytest.approx(0.3))
    assert line.p == pytest.approx(mcnemar(8, 2))
    assert line.detectable == detectable(20, 2)
    assert line["shift"] == line.shift_low == line.shift_high == pytest.approx(-0.5)
    # 0.3 ± 1.96 sqrt((10 / 20 - 0.09) / 20), a little wider
    assert -0.05 < line.drop_low < 0.02
    assert 0.55 < line.drop_high < 0.65


def test_nothing_changed_is_no_drop():
    line = drops(frame(asked("1100", "unedited"), asked("1100"))).iloc[0]
    assert (line["drop"], line.p, line["shift"], line.shift_low, line.shift_high) == (0, 1, 0, 0, 0)
    assert line.drop_low == -line.drop_high < -0.5  # four questions: half of them may yet be lost


def test_without_questions_there_is_no_table():
    text = {"kind": "perplexity", "suite": "text", "fact_id": "p", "nll": 1.0, "tokens": 2}
    rows = frame(asked("1", "unedited"), asked("0"))
    for none in (
        rows[:0],
        regular(rows.drop(columns="suite")),
        rows[:1],
        rows[1:],
        rows.assign(**text),
    ):
        assert drops(none).empty


def test_questions_without_log_probabilities_have_no_shift():
    rows = frame(asked("11", "unedited", "say"), asked("10", suite="say"))
    for lacking in (
        regular(rows.drop(columns="gold_logprob")),
        rows.assign(gold_logprob=nan),
        rows.assign(gold_logprob=None),
    ):
        line = drops(lacking).iloc[0]
        assert line["drop"] == 0.5
        assert "shift" not in line
    both = drops(frame(asked("11", "unedited"), asked("10"), *(rows.assign(gold_logprob=nan).to_dict("records"),)))
    assert list(both["shift"].isna()) == [False, True]


def test_suites_regimes_and_placebos_have_lines_of_their_own():
    rows = frame(
        asked("1111", "unedited"),
        asked("11", "unedited", "other"),
        asked("1100"),
        asked("01", suite="other"),
        asked("1111", regime="sequential"),
        asked("01", suite="other", regime="sequential"),
        asked("0000", "placebo", draw=0),
        asked("1100", "placebo", draw=1),
    )
    table = drops(rows).set_index(["suite", "regime", "of"])["drop"]
    assert table.to_dict() == {
        ("quiz", "joint", "joint"): 0.5,
        ("other", "joint", "joint"): 0.5,
        ("quiz", "sequential", "sequential"): 0.0,
        ("other", "sequential", "sequential"): 0.5,
        ("quiz", "placebo", "joint"): 0.75,
    }


def test_the_weakest_of_several_orders_counts():
    before = asked("1" * 10, "unedited")
    orders = [asked("0" * 10, order=0), asked("1" * 7 + "000", order=1)]
    line = drops(frame(before, *orders)).iloc[0]
    assert (line.questions, line["drop"]) == (10, 0.65)
    assert line.p == mcnemar(3, 0) > mcnemar(10, 0)
    churned = drops(
        frame(asked("1" * 5 + "0" * 5, "unedited"), asked("1" * 5 + "0" * 5, order=0), asked("1" * 10, order=1))
    )
    assert churned.detectable.isna().all()  # half the answers are gained in one of them
    assert churned["drop"].iloc[0] == -0.25


def test_each_single_edit_is_a_state():
    single = {"regime": "single", "taught": 1}
    edits = [asked(right, step=n + 1, **single) for n, right in enumerate(("1111", "0111", "0011"))]
    line = drops(frame(asked("1111", "unedited"), *edits)).iloc[0]
    assert (line.regime, line["drop"], line.p) == ("single", pytest.approx(3 / 12), 1.0)


def test_subjects_groups_and_all_count_each_question_once():
    rows = frame(asked("111111111", "unedited"), asked("011100000"))
    table = by_subject(rows).drop(columns=["model", "editor", "regime", "of"])
    lines = [
        (*(value if isinstance(value, str) else "" for value in line[:3]), *line[3:7])
        for line in table.itertuples(index=False)
    ]
    assert list(table)[:7] == ["suite", "group", "subject", "questions", "before", "after", "drop"]
    assert lines == [
        ("quiz", "g", "a", 4, 1.0, 0.75, 0.25),
        ("quiz", "h", "b", 5, 1.0, 0.0, 1.0),
        ("quiz", "g", "", 4, 1.0, 0.75, 0.25),
        ("quiz", "h", "", 5, 1.0, 0.0, 1.0),
        ("quiz", "", "", 9, 1.0, pytest.approx(3 / 9), pytest.approx(6 / 9)),
    ]


def test_runs_are_pooled_each_with_its_own_unedited_model():
    parts = []
    for run, (before, after) in {"a": ("1111", "1110"), "b": ("1100", "0000")}.items():
        parts.append(frame(asked(before, "unedited"), asked(after, order=0)).assign(run=run, seed=run))
    rows = pd.concat(parts, ignore_index=True)
    rows.attrs["settings"] = ["seed"]
    line = results.pooled(rows, drops).iloc[0]
    assert (line.questions, line.before, line.after, line["drop"]) == (
        4,
        0.75,
        pytest.approx(3 / 8),
        pytest.approx(3 / 8),
    )
    assert line.p == 1.0  # one loss of four, in run a
    rows.attrs["settings"] = ["editor.layer"]
    apart = results.pooled(rows.assign(**{"editor.layer": rows.run}), drops)
    assert list(apart["drop"]) == [0.25, 0.5]


def test_a_caption_says_what_cannot_be_seen():
    few = drops(frame(asked("1" * 50, "unedited"), asked("1" * 49 + "0")))
    assert power(few).startswith(
        f"quiz, 50 questions, which cannot show a drop under {100 * detectable(50):.1f} points (p:"
    )
    assert power(drops(frame(asked("11", "unedited"), asked("10")))).startswith(
        "quiz, 2 questions, too few to show any drop (p:"
    )
    many = drops(frame(asked("1" * 500, "unedited"), asked("1" * 500)))
    assert detectable(500) < 0.02 < detectable(300)
    assert power(many).startswith("quiz, 500 questions (p:")
    both = power(pd.concat([many, few.assign(suite="other")]))
    assert "quiz, 500 questions; other, 50 questions, which" in both
    form = pd.concat([many.assign(asked=asked) for asked in ("plain", "chat", "chat")])
    assert power(form).startswith("quiz (chat and plain), 500 questions")


def test_a_suite_that_is_too_small_is_a_caution():
    def said(*parts):
        rows = frame(*parts).assign(run="a", generated=None, exact=None, leaked=False, relative_norm=0.1, order=0)
        rows.attrs["settings"] = []
        return [text for text in cautions(rows, results.pooled(rows), []) if "proves little" in text]

    few = (asked("1" * 50, "unedited"), asked("1" * 50), asked("11", "unedited", "tiny"), asked("11", suite="tiny"))
    assert said(*few) == [
        f"50 questions of quiz cannot show a drop under {100 * detectable(50):.1f} points: that none is seen proves little.",
        "2 questions of tiny cannot show a drop of any size: that none is seen proves little.",
    ]
    assert not said(asked("1" * 500, "unedited"), asked("1" * 500))
