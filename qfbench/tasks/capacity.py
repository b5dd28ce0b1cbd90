"""How many facts one matrix holds: facts taught together until their keys are as many as the layer is wide, and beyond."""

from __future__ import annotations

from collections.abc import Mapping

from qfbench.analysis import plots
from qfbench.analysis.measures import capacity as measured
from qfbench.editors.regimes import Regime
from qfbench.errors import UserError
from qfbench.tasks.baseline import baseline
from qfbench.tasks.run import Run
from qfbench.tasks.teaching import Teaching, checkpoints, taught


def capacity(run: Run, regimes: Mapping[str, Regime], every: int = 4) -> None:
    """Teach the run's facts under each regime; at every `every`-th edit ask all so far, and compare with the keys taught.

    A key is one taught token's input of the edited matrix; `width` is how many of them can be independent.
    """
    if not run.editor.sites:
        raise UserError(f"task=capacity: {run.editor_name} changes no matrix")
    facts, always = baseline(run)
    at = checkpoints(len(facts), every)
    sequences = [Teaching(run, name, regime, facts, always, at) for name, regime in regimes.items()]
    taught(run, sequences)
    rows = run.rows()
    if not (rows.condition == "edited").any():
        return
    width = run.editor.sites[0].linear(run.lm.model).in_features
    curve = measured(rows)
    run.table(
        curve.assign(width=width), f"{len(facts)} facts in a matrix of {width} inputs: {run.title}", hidden=["width"]
    )
    run.figure(plots.capacity(curve, width), "capacity")
