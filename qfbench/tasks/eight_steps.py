"""The eight steps of the papers' Table 1: the smallest experiment there is, on two facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from qfbench.editors.regimes import Regime
from qfbench.errors import Unsupported
from qfbench.facts.base import Fact
from qfbench.facts.oxinnovate import Step
from qfbench.facts.probes import ask
from qfbench.models.delta import WeightDelta
from qfbench.models.gguf import INSTALL, PACKAGED, readable
from qfbench.tasks.run import Run


def eight_steps(
    run: Run,
    facts: Sequence[Fact],
    steps: Callable[[Sequence[Fact]], Sequence[Step]],
    regime: Regime,
    elsewhere: Mapping[str, Any] | None = None,
    title: str = "The eight steps",
) -> None:
    """Ask each step's probe, after teaching as many of `facts` under `regime` as the step says.

    `elsewhere` holds a `model` and an `editor` to do it with, where not the run's own; a model that comes by pip and is not
    installed is left out.
    Edits are made even where step 2 finds that the model does not understand what it is told; the output then says so.
    """
    if elsewhere and (name := elsewhere["model"]["path"]) in PACKAGED and not readable(name):
        run.console.print(f"{title}: {name} is not installed: {INSTALL}", markup=False, soft_wrap=True)
        return
    run = run.elsewhere(elsewhere["model"], elsewhere["editor"]) if elsewhere else run
    table = Table(title=escape(f"{title}: {run.title}"), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("step", "query", "reply", "verdict"):
        table.add_column(column)
    edits, total, taught = iter(regime(run.editor, run.lm, facts)), WeightDelta(), 0
    try:
        for step in steps(facts):
            while taught < step.taught:
                _, total = next(edits)
                taught += 1
            with total.applied_to(run.lm):
                (row,) = ask(run.lm, [step.probe])
            condition = "edited" if taught else "in_context" if step.probe.system else "unedited"
            about = {"condition": condition, "step": taught, "number": step.number, "fact_id": step.fact_id}
            run.log(row | about | run.health(total))
            told = f"[dim]told: {escape(step.probe.system)}[/dim]\n" if step.probe.system else ""
            verdict = "[green]pass[/green]" if row["generated"] else "[red]FAIL[/red]"
            table.add_row(str(step.number), told + escape(step.probe.query), escape(row["reply"]), verdict)
            if step.probe.system and not row["generated"]:
                run.warn(f"not_understood: told {step.probe.system!r}, the model does not answer {step.probe.query!r}")
    except Unsupported as error:
        run.log({"condition": "unsupported", "reply": str(error)})
        run.warn(str(error))
    run.console.print(table)
    if taught:
        run.save(total, run.task)
