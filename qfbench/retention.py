"""Teach facts one after another; at checkpoints ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd

from qfbench.delta import WeightDelta
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe, stands_in
from qfbench.metrics import forgetting, matrices, over_sequence, summary
from qfbench.plots import forgetting_curves, retention_matrices
from qfbench.probes import ask
from qfbench.regimes import Regime, accumulates
from qfbench.run import Run

HIDDEN = ("of", "held_out", "preferred", "locality_gold", "locality_preferred", "norm")  # in the CSV only
Asked = list[tuple[Fact, Probe]]


def retention(
    run: Run,
    regimes: Mapping[str, Regime],
    every: int | None = 1,
    orders: int = 1,
    at_most: int | None = None,
    placebo: bool = True,
    stop_on_collapse: bool = False,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run every regime over the run's facts, and over the same facts what is to stand `beside` it.

    Each fact is asked in all its wordings right after its own edit; all facts so far, prior knowledge, neighbours and
    unknown subjects at the checkpoints: at every `every`-th edit and after the last (None: see `checkpoints`).

    Args:
        at_most: how many probes of each kind that do not depend on what is taught (prior knowledge, neighbours, unknown
            subjects) to ask at a checkpoint: the first of each kind; None asks all.
        orders: how many orders of the facts to teach: as given, then permutations seeded 1, 2 ...
        placebo: ask everything once more after the last edit, under a random change of the same rank and norm.
        stop_on_collapse: end a regime once prior knowledge has fallen under half.
        beside: each entry holds a `model`, an `editor` and its `regimes`.
    """
    if orders < 1:
        raise UserError(f"task.retention.orders={orders}: must be 1 or more")
    entrants = [(run, regimes)]
    entrants += [(run.elsewhere(e["model"], e["editor"], name), e["regimes"]) for name, e in (beside or {}).items()]
    for entrant, its_regimes in entrants:
        facts, always = baseline(entrant)
        always = [pair for n, pair in _numbered(always) if at_most is None or n < at_most]
        at = checkpoints(len(facts), every)
        with run.progress(len(facts) * len(its_regimes) * orders) as advance:
            for order, name in product(range(orders), its_regimes):
                about = {"order": order} if orders > 1 else {}
                taught, regime = in_order(facts, order), its_regimes[name]
                teach(entrant, name, regime, taught, always, at, advance, about, placebo, stop_on_collapse)
    rows = run.rows()
    if (rows.condition == "edited").any():
        report(run, rows, "; ".join(entrant.title for entrant, _ in entrants))


def report(run: Run, rows: pd.DataFrame, title: str) -> None:
    """Tables and figures of a run's rows: the summary, the measures of whole sequences, curves and retention matrices."""
    table = summary(rows)
    several = len(table[["model", "editor"]].drop_duplicates())
    same = [] if several > table.editor.nunique() else ["model"]
    same += ["editor"] if several == 1 else []
    run.table(table, f"{len(run.facts)} facts, one after another: {title}", hidden=[*same, *HIDDEN])
    sequences = over_sequence(rows)
    if len(sequences):
        by = ["model", "editor", "regime"]
        mean = sequences.drop(columns="order").groupby(by, sort=False, as_index=False).mean()
        run.table(sequences, "", name="sequences", printed=mean.drop(columns=[*same, "edits"]))
        run.figure(forgetting_curves(forgetting(rows), rows), "forgetting_curves")
        run.figure(retention_matrices(matrices(rows)), "retention_matrix")


def checkpoints(n: int, every: int | None, dense: int = 50, ratio: float = 1.2) -> set[int]:
    """The edits after which all is asked, of 1 to `n`: each `every`-th and the last; None: each up to `dense`, then ever fewer."""
    if every is not None and every < 1:
        raise UserError(f"task.retention.every={every}: must be 1 or more, or null")
    if every is not None:
        return {*range(every, n + 1, every), n}
    steps, step = set(range(1, min(n, dense) + 1)), float(dense)
    while (step := step * ratio) < n:
        steps.add(round(step))
    return steps | {n}


def _numbered(asked: Asked) -> Iterator[tuple[int, tuple[Fact, Probe]]]:
    """Each probe with its number among those of its kind, from 0."""
    seen: Counter[str] = Counter()
    for fact, probe in asked:
        yield seen[probe.kind], (fact, probe)
        seen[probe.kind] += 1


def in_order(facts: Sequence[Fact], order: int) -> list[Fact]:
    """The facts as given (order 0), or a permutation of them."""
    return list(facts) if order == 0 else random.Random(f"order-{order}").sample(list(facts), len(facts))


def baseline(run: Run) -> tuple[list[Fact], Asked]:
    """Ask everything of the unedited model, without and with each fact's instruction (`unedited`, `in_context`).

    Returns the facts that it understands when told, and the probes about the model itself that it passes unedited, the
    reference of its `own` ones filled in. A fact that is not understood is reported and left out, since editing it would
    measure comprehension.
    """
    own = [(f, p) for f in run.facts for p in (f.edit, *f.probes) if not p.always]
    told = [(f, replace(p, system=f.instruction)) for f, p in own]
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
    by_own = iter(run.lm.replies([run.lm.render(p.query, p.system) for _, p in always if p.own]))
    always = [(f, replace(p, expected=next(by_own).text) if p.own else p) for f, p in always]
    passed = {}
    for condition, asked in (("unedited", own + always), ("in_context", told)):
        rows = ask(run.lm, [p for _, p in asked])
        for (fact, _), row in zip(asked, rows, strict=True):
            run.log(row, condition=condition, step=0, fact_id=fact.id, fact_kind=fact.kind)
        passed[condition] = [pair for pair, row in zip(asked, rows, strict=True) if row["generated"]]
    run.store.flush()
    understood = {f.id for f, p in passed["in_context"] if p.kind == "edit"}
    facts = [f for f in run.facts if f.id in understood]
    if len(facts) < len(run.facts):
        run.warn(f"not_understood: {len(run.facts) - len(facts)} of {len(run.facts)} facts; they are left out")
    if not facts:
        raise UserError(f"{run.lm.name} answers none of the facts even when told them: there is nothing to teach")
    return facts, [(f, p) for f, p in passed["unedited"] if p.always]


def teach(
    run: Run,
    name: str,
    regime: Regime,
    facts: Sequence[Fact],
    always: Asked,
    at: Collection[int],
    advance: Callable[[str], None],
    about: Mapping[str, Any] | None = None,
    placebo: bool = False,
    stop_on_collapse: bool = False,
) -> None:
    """Run one regime, check at its checkpoints, and save its last change. An `Unsupported` becomes a row.

    Collapse (prior knowledge under half of what it was) is announced where it is first seen.

    `about` are columns of every row, and part of the name of the file that the change is saved in.
    """
    editor, about = run.editor, {"layer": run.editor.site.layer} | dict(about or {})
    done, taught, total, collapsed, sequence = 0, facts[:0], WeightDelta(), False, accumulates(regime)
    try:
        for taught, total in regime(editor, run.lm, facts):
            step = done + 1
            kept = check(run, name, about, step, taught, total, always, step in at, step == len(facts))
            if step in at:
                run.store.flush()
            done = step
            advance(f"{name}: edit {done}")
            if kept < 0.5 and sequence and not collapsed:
                collapsed = True
                run.warn(f"{name}: collapse after {step} edits: prior knowledge at {kept:.2f}")
                if stop_on_collapse:
                    break
        if placebo and done and sequence:
            other, last = total.placebo(seed=1000 * about.get("order", 0)), done == len(facts)
            check(run, name, about, done, taught, other, always, True, last, condition="placebo")
            run.store.flush()
    except Unsupported as error:
        run.log({"condition": "unsupported", "regime": name, "reply": str(error)} | about)
        run.warn(f"{name}: {error}")
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}, after {done} edits: {error}") from error
    if done and sequence:
        run.save(total, "-".join([run.editor_name, name, *(f"{key}{value}" for key, value in about.items())]))


def check(
    run: Run,
    regime: str,
    about: Mapping[str, Any],
    step: int,
    taught: Sequence[Fact],
    total: WeightDelta,
    always: Asked,
    checkpoint: bool,
    last: bool,
    condition: str = "edited",
) -> float:
    """Ask after one edit: the newest fact in all its wordings; at a checkpoint all taught queries and `always`; at last all.

    Returns the share of prior knowledge that is left; NaN where it was not asked.
    """
    newest = taught[-1]
    asked = [(newest, p) for p in (newest.edit, *newest.probes) if not p.always]
    if checkpoint or last:
        asked += [(f, f.edit) for f in taught[:-1]] + always
    if last:
        asked += [(f, p) for f in taught[:-1] for p in f.probes if not p.always]
    same: dict[str, Any] = {
        "regime": regime,
        "condition": condition,
        "step": step,
        "taught": len(taught),
        "checkpoint": checkpoint or last,
    }
    same |= dict(about) | run.health(total, whole=checkpoint or last)
    with total.applied_to(run.lm):
        rows = ask(run.lm, [p for _, p in asked])
    for (fact, probe), row in zip(asked, rows, strict=True):
        row["fresh"] = not probe.always and fact.id == newest.id
        row["leaked"] = probe.kind == "unknown" and any(stands_in(k, row["reply"]) for f in taught for k in f.known_as)
        run.log(row, fact_id=fact.id, fact_kind=fact.kind, **same)
    prior = [row["generated"] for (_, probe), row in zip(asked, rows, strict=True) if probe.kind == "prior"]
    return sum(prior) / len(prior) if prior else math.nan
