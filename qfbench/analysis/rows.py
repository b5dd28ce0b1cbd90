"""Rows as all of analysis takes them: each column there, each with its type."""

from __future__ import annotations

import pandas as pd

from qfbench.analysis.catalogue import MEASURES

# What stands where a row does not say it: a run without orders has order 0, the unedited model was asked everything.
ABSENT = {
    "run": "",
    "order": 0,
    "draw": 0,
    "fact_id": "",
    "query": "",
    "group": "",
    "subject": "",
    "asked": "",
    "fresh": False,
    "checkpoint": True,
}
# Empty (NaN) where it was not asked or does not apply.
EMPTY = (
    *("condition", "kind", "regime", "taught", "suite"),
    *(column for m in MEASURES.values() for column in (m.column, m.minus) if column),
    *("tokens", "gold_logprob", "chance", "relative_norm", "rounding_loss"),
)


def regular(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a run or of several, of any task, with every column that analysis asks for.

    Columns of `ABSENT` get the type of what stands there; all others stay as they are. To be called once, where rows are
    read; a second time it changes nothing.
    """
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, *ABSENT, *EMPTY])))
    return rows.assign(
        **{
            name: rows[name].astype(object).where(rows[name].notna(), value).astype(type(value))
            for name, value in ABSENT.items()
        }
    )
