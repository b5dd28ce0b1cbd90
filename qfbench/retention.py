"""Teach facts one after another and, at checkpoints, ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qfbench.delta import WeightDelta
from qfbench.editors import Editor
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe, stands_in
from qfbench.metrics import forgetting, summary
from qfbench.plots import forgetting_curves
from qfbench.probes import ask
from qfbench.regimes import Regime
from qfbench.run import Run

Asked = list[tuple[Fact, Probe]]


def retention(run: Run, regimes: Mapping[str, Regime], every: int = 1) -> None:
    """Run every regime over the run's facts and report what is kept, at every `every`-th edit and the last."""
    facts, always = understood(run)
    with run.progress(len(facts) * len(regimes)) as advance:
        for name in regimes:
            teach(run, run.editor, name, regimes[name], facts, always, every, advance)
    rows = run.rows("retention")
    if rows.rounding_loss.max() > 1e-3:
        run.warn(f"written in {run.lm.dtype}, up to {rows.rounding_loss.max():.1%} of a change is lost to rounding")
    run.table(summary(rows), f"{len(facts)} facts, one after another: {run.title}", hidden=["held_out", "norm"])
    run.figure(forgetting_curves(forgetting(rows), rows), "forgetting_curves")


def understood(run: Run) -> tuple[list[Fact], Asked]:
    """The facts that can be taught, and the probes about the model itself that it passes unedited.

    A fact that the model does not answer when told is `not_understood`: it is reported and left out, since editing it
    would measure comprehension.
    """
    told = ask(run.lm, [f.told for f in run.facts])
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
    before = ask(run.lm, [p for _, p in always])
    owners = [*run.facts, *(f for f, _ in always)]
    for fact, row in zip(owners, told + before, strict=True):
        run.log(row, condition="unedited", step=0, fact_id=fact.id)
    facts = [f for f, row in zip(run.facts, told, strict=True) if row["generated"]]
    if len(facts) < len(run.facts):
        run.warn(f"not_understood: {len(run.facts) - len(facts)} of {len(run.facts)} facts; they are left out")
    if not facts:
        raise UserError(f"{run.lm.name} answers none of the facts even when told them: there is nothing to teach")
    return facts, [pair for pair, row in zip(always, before, strict=True) if row["generated"]]


def teach(
    run: Run,
    editor: Editor,
    name: str,
    regime: Regime,
    facts: Sequence[Fact],
    always: Asked,
    every: int,
    advance: Callable[[str], None],
) -> None:
    """Run one regime, check at its checkpoints, and save its last change. An `Unsupported` becomes a row."""
    total = WeightDelta()
    try:
        for n, (taught, total) in enumerate(regime(editor, run.lm, facts), start=1):
            if n % every == 0 or n == len(facts):
                check(run, name, editor, n, taught, total, always, everything=n == len(facts))
            advance(f"{name}: edit {n}")
        run.save(total, f"{name}-layer{editor.site.layer}")
    except Unsupported as error:
        run.log({"regime": name, "condition": "unsupported", "reply": str(error)})
        run.warn(f"{name}: {error}")
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}, edit {n + 1} ({facts[n].id}): {error}") from error
    finally:
        run.store.flush()


def check(
    run: Run,
    regime: str,
    editor: Editor,
    step: int,
    taught: Sequence[Fact],
    total: WeightDelta,
    always: Asked,
    everything: bool,
) -> None:
    """Ask at one checkpoint: every taught query, the newest fact in all its wordings (`everything`: all facts), `always`."""
    asked = [(f, f.edit) for f in taught]
    asked += [(f, p) for f in (taught if everything else taught[-1:]) for p in f.probes if not p.always]
    asked += always
    same = {"regime": regime, "condition": "edited", "step": step, "layer": editor.site.layer} | run.health(total)
    with total.applied_to(run.lm):
        rows = ask(run.lm, [p for _, p in asked])
    for (fact, probe), row in zip(asked, rows, strict=True):
        row["fresh"] = not probe.always and fact.id == taught[-1].id
        row["leaked"] = probe.kind == "unknown" and any(stands_in(k, row["reply"]) for f in taught for k in f.known_as)
        run.log(row, fact_id=fact.id, fact_kind=fact.kind, **same)
