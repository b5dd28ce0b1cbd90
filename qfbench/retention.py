"""Teach facts one after another; at checkpoints ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qfbench.delta import WeightDelta
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe, stands_in
from qfbench.metrics import forgetting, summary
from qfbench.plots import forgetting_curves
from qfbench.probes import ask
from qfbench.regimes import Regime
from qfbench.run import Run

Asked = list[tuple[Fact, Probe]]


def retention(
    run: Run, regimes: Mapping[str, Regime], every: int = 1, beside: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Run every regime over the run's facts, and over the same facts what is to stand `beside` it.

    Each entry of `beside` holds a `model`, an `editor` and its `regimes`.

    Each fact is asked in all its wordings right after its own edit; all facts so far, prior knowledge and unknown subjects
    at every `every`-th edit and after the last.
    """
    if every < 1:
        raise UserError(f"task.retention.every={every}: must be 1 or more")
    entrants = [(run, regimes)]
    entrants += [(run.elsewhere(e["model"], e["editor"]), e["regimes"]) for e in (beside or {}).values()]
    for entrant, its_regimes in entrants:
        facts, always = baseline(entrant)
        with run.progress(len(facts) * len(its_regimes)) as advance:
            for name in its_regimes:
                teach(entrant, name, its_regimes[name], facts, always, every, advance)
    rows = run.rows()
    if (rows.condition == "edited").any():
        table = summary(rows)
        title = "; ".join(entrant.title for entrant, _ in entrants)
        several = len(table[["model", "editor"]].drop_duplicates())
        same = [] if several > table.editor.nunique() else ["model"]
        same += ["editor"] if several == 1 else []
        run.table(table, f"{len(run.facts)} facts, one after another: {title}", hidden=[*same, "held_out", "norm"])
        run.figure(forgetting_curves(forgetting(rows), rows), "forgetting_curves")


def baseline(run: Run) -> tuple[list[Fact], Asked]:
    """Ask everything of the unedited model, without and with each fact's instruction (`unedited`, `in_context`).

    Returns the facts that it understands when told, and the probes about the model itself that it passes unedited. A fact
    that is not understood is reported and left out, since editing it would measure comprehension.
    """
    own = [(f, p) for f in run.facts for p in (f.edit, *f.probes) if not p.always]
    told = [(f, replace(p, system=f.instruction)) for f, p in own]
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
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
    every: int,
    advance: Callable[[str], None],
    **about: Any,
) -> None:
    """Run one regime, check at its checkpoints, and save its last change. An `Unsupported` becomes a row.

    `about` are columns of every row, and part of the name of the file that the change is saved in.
    """
    editor, about = run.editor, {"layer": run.editor.site.layer} | about
    done, taught, total = 0, facts[:0], WeightDelta()
    try:
        for taught, total in regime(editor, run.lm, facts):
            step = done + 1
            check(run, name, about, step, taught, total, always, step % every == 0, step == len(facts))
            run.store.flush()
            done = step
            advance(f"{name}: edit {done}")
    except Unsupported as error:
        run.log({"condition": "unsupported", "regime": name, "reply": str(error)} | about)
        run.warn(f"{name}: {error}")
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}, after {done} edits: {error}") from error
    if done and len(taught) == done:
        run.save(total, "-".join([type(editor).__name__, name, *(f"{key}{value}" for key, value in about.items())]))


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
) -> None:
    """Ask after one edit: the newest fact in all its wordings; at a checkpoint all taught queries and `always`; at last all."""
    newest = taught[-1]
    asked = [(newest, p) for p in (newest.edit, *newest.probes) if not p.always]
    if checkpoint or last:
        asked += [(f, f.edit) for f in taught[:-1]] + always
    if last:
        asked += [(f, p) for f in taught[:-1] for p in f.probes if not p.always]
    same: dict[str, Any] = {
        "regime": regime,
        "condition": "edited",
        "step": step,
        "taught": len(taught),
        "checkpoint": checkpoint or last,
    }
    same |= dict(about) | run.health(total)
    with total.applied_to(run.lm):
        rows = ask(run.lm, [p for _, p in asked])
    for (fact, probe), row in zip(asked, rows, strict=True):
        row["fresh"] = not probe.always and fact.id == newest.id
        row["leaked"] = probe.kind == "unknown" and any(stands_in(k, row["reply"]) for f in taught for k in f.known_as)
        run.log(row, fact_id=fact.id, fact_kind=fact.kind, **same)
