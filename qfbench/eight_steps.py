"""The eight steps of the papers' Table 1: the smallest experiment there is, on two facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from qfbench.delta import WeightDelta
from qfbench.facts.base import Fact
from qfbench.facts.oxinnovate import Step
from qfbench.probes import ask
from qfbench.regimes import Regime
from qfbench.run import Run


def eight_steps(
    run: Run, facts: Sequence[Fact], steps: Callable[[Sequence[Fact]], Sequence[Step]], regime: Regime
) -> None:
    """Teach `facts` one after another under `regime` and ask each step's probe after as many facts as it says.

    Edits are made even where step 2 finds that the model does not understand what it is told; the table then says so.
    """
    states = [WeightDelta(), *(total for _, total in regime(run.editor, run.lm, facts))]
    table = Table(
        "step",
        "query",
        "reply",
        "verdict",
        title=f"The eight steps: {run.title}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for step in steps(facts):
        with states[step.taught].applied_to(run.lm):
            (row,) = ask(run.lm, [step.probe])
        run.log(row | run.health(states[step.taught]), step=step.taught, number=step.number, fact_id=facts[0].id)
        query = step.probe.query
        if step.probe.system:
            query = f"[dim]told: {step.probe.system}[/dim]\n{query}"
        verdict = "[green]pass[/green]" if row["generated"] else "[red]FAIL[/red]"
        table.add_row(str(step.number), query, row["reply"], verdict)
        if step.probe.kind == "told" and not row["generated"]:
            run.warn(f"not_understood: the model does not answer {step.probe.query!r} when told {step.probe.system!r}")
    run.console.print(table)
    run.save(states[-1], "eight_steps")
