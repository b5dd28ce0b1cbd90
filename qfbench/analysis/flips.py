"""Item by item: what became of each question. Rows in, one line a question out."""

from __future__ import annotations

import pandas as pd

from qfbench.analysis.catalogue import GENERAL

VERDICTS = {(True, True): "kept", (True, False): "lost", (False, True): "gained", (False, False): "never"}
ASKED = ["model", "kind", "fact_id", "query"]
QUESTION = ["editor", "regime", *ASKED]


def flips(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the first run and its first order, each question after the last edit (`single`: after its fact's own, or the last).

    Columns `model`, `editor`, `regime`, `kind`, `fact_id`, `query`, `expected`; the replies `told` (with the fact's instruction),
    `before` (unedited) and `after`; `passed` (after); `verdict`: kept, lost, gained or never, by what passes before and after.
    Questions of general ability and held texts are left out.
    """
    rows = rows[(rows.run == rows.run.iloc[0]) & ~rows.kind.isin(GENERAL)]
    rows = rows[rows.order == rows.order.min()]
    edited = rows[rows.condition == "edited"]
    groups = edited.groupby(["model", "editor", "regime"], sort=False)
    after = pd.concat([_after(own) for _, own in groups]) if len(edited) else edited
    out = after[[*QUESTION, "expected", "reply", "generated"]].rename(columns={"reply": "after", "generated": "passed"})
    for name, condition in (("before", "unedited"), ("told", "in_context")):
        asked = rows[rows.condition == condition].drop_duplicates(ASKED)  # editors beside each other share it
        asked = asked[[*ASKED, "reply", "generated"]].rename(columns={"reply": name, "generated": f"{name}_passed"})
        out = out.merge(asked, how="left", on=ASKED)
    pairs = zip(out.before_passed.eq(True), out.passed.eq(True), strict=True)
    return out.assign(verdict=[VERDICTS[bool(before), bool(now)] for before, now in pairs])


def _after(edited: pd.DataFrame) -> pd.DataFrame:
    """Of one model, editor and regime, the rows that tell what is left of each question."""
    if (edited.taught == edited.step).all():
        return edited[edited.step == edited.step[edited.checkpoint.astype(bool)].max()]
    fresh = edited.fresh.astype(bool)
    return edited[fresh | ~edited.kind.isin(edited.kind[fresh])].drop_duplicates(ASKED, keep="last")


def differing(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The questions of two `flips`, under the same regime, that pass after the edits of one and not of the other.

    Columns as of `flips`, and `other` (its reply): first those that `one` passes.
    """
    key = ["regime", "kind", "fact_id", "query"]
    theirs = other[[*key, "after", "passed"]].rename(columns={"after": "other", "passed": "other_passed"})
    both = one.merge(theirs, on=key)
    both = both[both.passed.eq(True) != both.other_passed.eq(True)]
    return both.sort_values("passed", ascending=False, kind="stable", ignore_index=True)
