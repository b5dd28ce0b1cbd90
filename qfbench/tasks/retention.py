"""Teach facts one after another; at checkpoints ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from qfbench.analysis.drops import by_subject, drops, power
from qfbench.analysis.measures import compared, summary
from qfbench.analysis.plots import OF_SEQUENCES
from qfbench.analysis.sequences import middle, over_sequence
from qfbench.analysis.tables import HIDDEN
from qfbench.editors.regimes import Regime
from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.tasks.baseline import Asked, baseline
from qfbench.tasks.run import Run
from qfbench.tasks.teaching import Teaching, checkpoints, taught


def retention(
    run: Run,
    regimes: Mapping[str, Regime],
    every: int | Sequence[int] | None = 1,
    orders: int = 1,
    at_most: int | None = None,
    placebo: int = 1,
    stop_on_collapse: bool = False,
    not_understood: str = "leave_out",
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run every regime over the run's facts, and over the same facts what is to stand `beside` it.

    Each fact is asked in all its wordings right after its own edit; all facts so far, prior knowledge, neighbours and
    unknown subjects at the checkpoints: at every `every`-th edit (a list: after so many) and after the last (None: see `checkpoints`).

    Args:
        at_most: how many probes of each kind that do not depend on what is taught (prior knowledge, neighbours, unknown
            subjects) to ask at a checkpoint: the first of each kind; None asks all.
        orders: how many orders of the facts to teach: as given, then permutations seeded 1, 2 ...
        placebo: how many times to ask everything once more after the last edit, under a random change of the same rank and norm.
        stop_on_collapse: end a regime once prior knowledge has fallen under half.
        not_understood: `leave_out` the facts that the model does not answer even when told, or `teach` them as well.
        beside: each entry holds a `model`, an `editor` and its `regimes`.
    """
    if orders < 1:
        raise UserError(f"task.retention.orders={orders}: must be 1 or more")
    if placebo < 0:
        raise UserError(f"task.retention.placebo={placebo}: must be 0 or more")
    if not_understood not in ("leave_out", "teach"):
        raise UserError(f"task.retention.not_understood={not_understood}: must be leave_out or teach")
    beside = beside or {}
    entrants, sequences = run.beside(beside), []
    for entrant, its_regimes in zip(entrants, [regimes, *(e["regimes"] for e in beside.values())], strict=True):
        facts, always = baseline(entrant, not_understood == "teach")
        always = [pair for n, pair in _numbered(always) if at_most is None or n < at_most]
        at = checkpoints(len(facts), every)
        for order, name in product(range(orders), its_regimes):
            about = {"order": order} if orders > 1 else {}
            # All facts are put in order, so that it is the same for entrants that understand different ones.
            own, regime = [f for f in in_order(run.facts, order) if f in facts], its_regimes[name]
            sequences.append(Teaching(entrant, name, regime, own, always, at, about, placebo, stop_on_collapse))
    taught(run, sequences)
    rows = run.rows()
    if (rows.condition == "edited").any():
        report(run, rows, "; ".join(entrant.title for entrant in entrants))


def report(run: Run, rows: pd.DataFrame, title: str) -> None:
    """Tables and figures of a run's rows: the summary, differences of regimes and editors, the measures of whole sequences,
    curves and retention matrices."""
    table, against = summary(rows), compared(rows)
    several = len(table[["model", "editor"]].drop_duplicates())
    same = [] if several > table.editor.nunique() else ["model"]
    same += ["editor"] if several == 1 else []
    over = "facts and orders" if rows.order.nunique() > 1 else "facts"
    taught = rows[(rows.condition == "edited") & (rows.kind == "edit")]
    n = sorted({own.fact_id.nunique() for _, own in taught.groupby(["model", "editor"])})
    about = f"{' and '.join(map(str, n))} of {len(run.facts)}" if n != [len(run.facts)] else f"{n[0]}"
    run.table(table, f"{about} facts, one after another: {title} (± 95% over {over})", hidden=[*same, *HIDDEN])
    if len(against):
        first = against.iloc[0]
        printed = against.drop(columns=[c for c in against if c.endswith("_of")])
        run.table(
            against,
            f"Differences from {first.editor_of} {first.regime_of}, same facts and orders",
            hidden=[*same, *HIDDEN, "facts"],
            name="compared",
            printed=printed,
        )
    lost = drops(rows)
    if len(lost):
        run.table(lost, f"General ability: {power(lost)}", hidden=[*same, "of", "asked"], name="regression")
        run.keep(by_subject(rows), "regression_subjects")
    sequences = over_sequence(rows)
    if len(sequences):
        printed = middle(sequences).drop(columns=[*same, "edits", "immediate", "final"])
        run.table(sequences, "", name="sequences", printed=printed)
        for name, figure in OF_SEQUENCES.items():
            run.figure(figure.draw(rows), name)


def _numbered(asked: Asked) -> Iterator[tuple[int, tuple[Fact, Probe]]]:
    """Each probe with its number among those of its kind, from 0."""
    seen: Counter[str] = Counter()
    for fact, probe in asked:
        yield seen[probe.kind], (fact, probe)
        seen[probe.kind] += 1


def in_order(facts: Sequence[Fact], order: int) -> list[Fact]:
    """The facts as given (order 0), or a permutation of them."""
    return list(facts) if order == 0 else random.Random(f"order-{order}").sample(list(facts), len(facts))
