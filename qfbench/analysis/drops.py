"""What edits cost in general ability: rows of questions to paired statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qfbench.analysis.measures import summary_lines
from qfbench.analysis.uncertainty import estimate

SMALL = 0.02  # a drop that a sample ought to be able to show


def mcnemar(losses: int, gains: int) -> float:
    """McNemar's exact test, two-sided: how likely a split at least this uneven is where an answer is as often lost as gained.

    `losses` are questions answered right before and wrong after, `gains` the others that changed. 1 where none did.
    """
    from scipy.stats import binomtest  # here: it takes long to import, and most runs have no questions

    return float(binomtest(losses, losses + gains).pvalue) if losses + gains else 1.0


def detectable(n: int, gains: int = 0, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true drop (share of `n` questions) that `mcnemar` finds at `level` with this `power`.

    Beside the drop, answers are taken to be lost as often as `gains` of them were gained: the more answers change by themselves,
    the larger a drop must be. NaN where none is large enough.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    churn = gains / n
    changed = np.arange(n + 1)
    enough = (
        binom.isf(level / 2, changed, 0.5) + 1
    )  # losses out of so many changes: P(at least these) is at most level / 2

    def found(drop: float) -> float:
        share = (churn + drop) / (2 * churn + drop)
        return float(binom.pmf(changed, n, 2 * churn + drop) @ binom.sf(enough - 1, changed, share))

    most = 1 - 2 * churn
    if most <= 0 or found(most) < power:
        return float("nan")
    return float(brentq(lambda drop: found(drop) - power, 1e-9, most))


def drops(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per suite, model, editor and regime: the state after the last edit against the unedited model, on the same questions.

    `asked` ("chat": by the model's chat template, or "plain"), `questions` (n), `before` and `after` (accuracy), `drop`
    (before − after), `p` (`mcnemar`), `detectable` and `shift` (the mean change of the right answer's log-probability, in nats:
    the sensitive one); of `drop` and `shift` the 95% interval, over questions and orders. Where there are several orders (or, under `single`, edits; or draws of a placebo), `p` and `detectable` are the largest of theirs.
    """
    return pd.DataFrame([who | _measured(both) for who, both in _pairs(rows, ["suite"])])


def by_subject(rows: pd.DataFrame) -> pd.DataFrame:
    """`drops` of each `subject`, then of each `group`, then of all: each question counts once, as in lm-eval's groups."""
    grouped = rows[rows.group != ""]  # not all tasks are in one
    parts = [
        pd.DataFrame([who | _measured(both) for who, both in _pairs(own, ["suite", *by])])
        for own, by in ((rows, ["group", "subject"]), (grouped, ["group"]), (rows, []))
    ]
    frame = pd.concat(parts, ignore_index=True)
    first = [name for name in ("suite", "group", "subject") if name in frame]
    return frame[[*first, *(name for name in frame if name not in first)]]


def power(lost: pd.DataFrame) -> str:
    """What a table of `drops` can show, for its caption: of each suite how it was asked, how many questions
    there are, and the drop they can miss."""
    said = []
    for suite, own in lost[lost.regime != "placebo"].groupby("suite", sort=False):
        asked = " and ".join(sorted({*own.get("asked", pd.Series(dtype=str)).dropna()}))
        text = f"{suite}{asked and f' ({asked})'}, {own.questions.max()} questions"
        least = own.detectable.max()
        if not least <= SMALL:
            text += (
                f", which cannot show a drop under {100 * least:.1f} points"
                if least == least
                else ", too few to show any drop"
            )
        said.append(text)
    return "; ".join(said) + " (p: McNemar; shift: nats of the right answer)"


def _pairs(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each line, with its questions before and after."""
    asked = rows[rows.kind == "question"]
    same = ["suite", "fact_id", "run"]
    before: dict[tuple[str, str], pd.DataFrame] = {}
    for who, parts in summary_lines(asked) if len(asked) else ():
        who, own, name = dict(who), parts["kept"], (who["model"], who["editor"])
        if who["regime"] == "unedited":
            before[name] = own[[*same, "correct", "gold_logprob"]]
        if "of" not in who or name not in before:
            continue
        own = own.assign(state=1_000_000 * own.order + own.draw).merge(before[name], on=same, suffixes=("", "_before"))
        for key, both in own.groupby(list(by), sort=False):
            yield dict(zip(by, key, strict=True)) | who, both


def _measured(both: pd.DataFrame) -> dict[str, Any]:
    about = both[["fact_id", "run", "order"]].assign(group=both.state)
    lost = about.assign(value=both.correct_before - both.correct)
    asked = both.asked.iloc[0]  # "" in older rows
    out: dict[str, Any] = ({"asked": asked} if asked else {}) | {"questions": both.fact_id.nunique()}
    out |= {"before": both.correct_before.mean(), "after": both.correct.mean()}
    out |= dict(zip(("drop", "drop_low", "drop_high"), estimate(lost, (-1.0, 1.0)), strict=True))
    states = lost.groupby(["run", "group"]).value
    changed = {(len(v), int((v > 0).sum()), int((v < 0).sum())) for _, v in states}
    out["p"] = max(mcnemar(losses, gains) for _, losses, gains in changed)
    out["detectable"] = float(np.max([detectable(n, gains) for n, gains in {(n, gains) for n, _, gains in changed}]))
    shift = about.assign(value=both.gold_logprob.astype(float) - both.gold_logprob_before.astype(float)).dropna()
    if len(shift):
        out |= dict(zip(("shift", "shift_low", "shift_high"), estimate(shift), strict=True))
    return out
