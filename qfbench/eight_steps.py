"""The eight steps of the papers' Table 1: the smallest experiment there is, on two facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from qfbench.delta import WeightDelta
from qfbench.facts.base import Fact
from qfbench.facts.oxinnovate import Step
from qfbench.probes import ask

if TYPE_CHECKING:
    from qfbench.run import Run


def eight_steps(
    run: Run, facts: Sequence[Fact], steps: Callable[[Sequence[Fact]], Sequence[Step]], regime: Callable
) -> None:
    """Teach `facts` one after another under `regime` and ask each step's probe after as many facts as it says.

    Edits are made even where step 2 finds that the model does not understand what it is told; the table then says so.
    """
    states = [WeightDelta(), *(total for _, total in regime(run.editor, run.lm, facts))]
    table = Table("step", "query", "reply", "verdict", "what", title=f"The eight steps: {run.title}")
    for step in steps(facts):
        with states[step.taught].applied_to(run.lm):
            (row,) = ask(run.lm, [step.probe])
        run.log(row, task="eight_steps", step=step.taught, number=step.number, fact_id=facts[0].id)
        told = f"[dim]told: {step.probe.system}[/dim]\n" if step.probe.system else ""
        verdict = "[green]pass[/green]" if row["generated"] else "[red]FAIL[/red]"
        table.add_row(str(step.number), told + step.probe.query, row["reply"], verdict, step.what)
        if step.probe.kind == "told" and not row["generated"]:
            run.warn(f"not_understood: the model does not answer {step.probe.query!r} when told {step.probe.system!r}")
    run.console.print(table)
    run.save(states[-1], "eight_steps")
