"""Which learning rate: single edits at every rate, under every scheme of other settings, beside an editor that has no rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from rich.markup import escape

from qfbench.analysis import plots
from qfbench.analysis.measures import by_setting
from qfbench.editors import Editor
from qfbench.editors.regimes import single
from qfbench.errors import UserError
from qfbench.tasks.baseline import baseline
from qfbench.tasks.run import Run
from qfbench.tasks.teaching import Teaching, taught


def learning_rate(
    run: Run, rates: Sequence[float], schemes: Mapping[str, Mapping[str, Any]], reference: Editor | None = None
) -> None:
    """Teach each fact alone at each of `rates` under each of `schemes` (settings of the run's editor by the scheme's name).

    `reference` is taught at its own settings, for comparison. Prints, for each scheme, the rate with the best balance.
    """
    if not rates or not schemes:
        raise UserError("task.learning_rate: give at least one of rates and one of schemes")
    if "lr" not in {field.name for field in fields(run.editor)}:  # type: ignore[arg-type] # every editor is a dataclass
        raise UserError(f"{type(run.editor).__name__} has no learning rate; use editor=qf2 or finetune")
    facts, always = baseline(run)
    each = range(1, len(facts) + 1)
    sequences = []
    for (scheme, settings), lr in product(schemes.items(), rates):
        editor = replace(run.editor, **{"lr": lr, **settings})  # type: ignore[type-var] # a dataclass
        there, about = replace(run, editor=editor), {"scheme": scheme, "lr": lr}
        sequences.append(Teaching(there, "single", single, facts, always, each, about))
    if reference is not None:
        there, about = replace(run, editor=reference), {"scheme": type(reference).__name__}
        sequences.append(Teaching(there, "single", single, facts, always, each, about))
    taught(run, sequences)
    rows = run.rows()
    if not (rows.condition == "edited").any():
        return
    curve = by_setting(rows, "scheme", "lr")
    run.table(curve, f"{len(facts)} facts, each alone: {run.lm.name}", hidden=["held_out", "portability"])
    if "lr" not in curve:  # nothing but the reference could be taught
        return
    own = curve[curve.lr.notna()].sort_values("lr", kind="stable")
    for scheme, lines in own.groupby("scheme", sort=False) if "balance" in own else ():
        best = lines.loc[lines.balance.idxmax()]
        run.console.print(
            f"{escape(scheme)}: best balance at lr {best.lr:g} (efficacy {best.efficacy:.2f}, prior {best.prior:.2f})"
        )
    run.figure(plots.learning_rates(own, curve[curve.lr.isna()]), "learning_rates")
