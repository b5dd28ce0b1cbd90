"""Teach facts one after another and, at checkpoints, ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qfbench.delta import WeightDelta
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe, stands_in
from qfbench.metrics import forgetting, summary
from qfbench.plots import forgetting_curves
from qfbench.probes import ask

if TYPE_CHECKING:
    from qfbench.run import Run


def retention(run: Run, regimes: Mapping[str, Callable], every: int = 1) -> None:
    """Run every regime over the run's facts and report what is kept after each edit.

    Facts that the model does not answer when told are left out and reported as `not_understood`. Prior and unknown
    probes are those of all facts that the unedited model gets right. Checkpoints are every `every` edits and the last.
    """
    facts, asked_always = understood(run)
    steps = [n for n in range(1, len(facts) + 1) if n % every == 0 or n == len(facts)]
    with run.progress(len(facts) * len(regimes)) as advance:
        for name, regime in regimes.items():
            try:
                for n, (_, total) in enumerate(regime(run.editor, run.lm, facts), start=1):
                    if n in steps:
                        check(run, name, facts[:n], total, asked_always, everything=n == len(facts))
                    advance(f"{name}: edit {n}")
                run.save(total, name)
            except Unsupported as error:
                run.log({"regime": name, "unsupported": str(error)}, task="retention")
                run.warn(f"{name}: {error}")
            run.store.flush()
    rows = run.rows("retention")
    run.table(summary(rows), f"{len(facts)} facts, one after another: {run.title}")
    run.figure(forgetting_curves(forgetting(rows), rows), "forgetting_curves")


def understood(run: Run) -> tuple[list[Fact], list[tuple[Fact, Probe]]]:
    """The facts that can be taught, and the (fact, probe) pairs about the model itself that it passes unedited."""
    told = ask(run.lm, [f.told for f in run.facts])
    for fact, row in zip(run.facts, told, strict=True):
        run.log(row, task="retention", condition="unedited", step=0, fact_id=fact.id)
    facts = [f for f, row in zip(run.facts, told, strict=True) if row["generated"]]
    if len(facts) < len(run.facts):
        run.warn(f"not_understood: {len(run.facts) - len(facts)} of {len(run.facts)} facts; they are left out")
    if not facts:
        raise UserError("the model understands none of the facts when told them; editing would measure comprehension")
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
    rows = ask(run.lm, [p for _, p in always]) if always else []
    for (fact, _), row in zip(always, rows, strict=True):
        run.log(row, task="retention", condition="unedited", step=0, fact_id=fact.id)
    return facts, [pair for pair, row in zip(always, rows, strict=True) if row["generated"]]


def check(
    run: Run, regime: str, facts: Sequence[Fact], total: WeightDelta, always: Sequence[tuple[Fact, Probe]], everything: bool
) -> None:
    """Ask at one checkpoint: every taught fact, the newest in all its wordings (`everything`: all), and `always`."""
    asked = [(f, f.edit) for f in facts]
    asked += [(f, p) for f in (facts if everything else facts[-1:]) for p in f.probes if not p.always]
    asked += always
    with total.applied_to(run.lm):
        rows = ask(run.lm, [p for _, p in asked])
    order = {f.id: k for k, f in enumerate(facts, start=1)}
    health = {"relative_norm": run.relative_norm(total), **{f"solve_{k}": v for k, v in total.notes.items()}}
    for (fact, probe), row in zip(asked, rows, strict=True):
        row |= health
        row["taught_at"] = 0 if probe.always else order[fact.id]
        row["leaked"] = probe.kind == "unknown" and any(stands_in(known, row["reply"]) for f in facts for known in f.known_as)
        run.log(row, task="retention", regime=regime, condition="edited", step=len(facts), fact_id=fact.id)
