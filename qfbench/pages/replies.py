"""What was replied, as the page shows it: the first facts before and after, and what became of each question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from qfbench.analysis.flips import flips

MOST = 3000  # questions that the page lists
SIGNS = {"pass": "✓", "fail": "✗"}
PROTOCOLS = ("generated", "exact", "forced", "preferred")


def examples(rows: pd.DataFrame, n: int) -> Iterator[dict[str, Any]]:
    """For each model, editor and regime the first `n` facts of order 0 in the first run, passes and failures as they come."""
    rows = rows[rows.run == rows.run.iloc[0]]
    asked = rows[(rows.kind == "edit") & (rows.order == rows.order.min())]
    for (model, editor), own in asked.groupby(["model", "editor"], sort=False):
        before = own[own.condition == "unedited"].head(n)
        knows = set(own.fact_id[(own.condition == "in_context") & own.generated.astype(bool)])
        after = own[own.condition == "edited"]
        for regime, taught in after.groupby("regime", sort=False):
            keeps = (taught.taught == taught.step).all()
            end = taught.step[taught.checkpoint.astype(bool)].max()
            lines = []
            for fact in before.fact_id:
                asked_before, its = (part[part.fact_id == fact] for part in (before, taught))
                told = own[(own.condition == "in_context") & (own.fact_id == fact)]
                parts = (asked_before, told, its[its.fresh.astype(bool)], its[(its.step == end) & keeps])
                line = {name: asked_before[name].iloc[0] for name in ("query", "expected")}
                line |= {"note": "" if fact in knows else "not understood", "replies": [_reply(part) for part in parts]}
                lines.append(line)
            yield {"name": f"{editor} {regime} on {model}", "lines": lines, "keeps": keeps}


def flipped(rows: pd.DataFrame) -> dict[str, Any]:
    """Each question of the first run with what became of it; what they can be filtered by, each value with its number."""
    lines = flips(rows)
    axes = ["verdict", "kind", *(name for name in ("editor", "model", "regime") if lines[name].nunique() > 1)]
    values = {name: lines[name].value_counts().to_dict() for name in axes}
    places = {name: list(held) for name, held in values.items()}
    shown = lines.head(MOST).astype(object).where(lines.head(MOST).notna(), None).to_dict("records")
    for line in shown:
        line["at"] = " ".join(f"{name}-{places[name].index(line[name])}" for name in axes)
    return {"lines": shown, "values": values, "left_out": len(lines) - len(shown)}


def _reply(rows: pd.DataFrame) -> dict[str, Any] | None:
    """A reply and whether it passes under each protocol; None where it was not asked for."""
    if rows.empty:
        return None
    row = rows.iloc[0]
    marks = []
    for protocol in PROTOCOLS:
        value = row.get(protocol)
        if value is not None and not pd.isna(value):
            share = protocol == "forced"
            verdict = "pass" if value else "fail"
            marks.append((protocol, f"{value:.2f}" if share else SIGNS[verdict], "" if share else verdict))
    verdict = "pass" if row.generated else "fail"
    return {"text": row.reply, "marks": marks, "verdict": verdict, "sign": SIGNS[verdict], "cut": not row.stopped}
