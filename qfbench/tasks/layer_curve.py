"""Which layer: every layer in turn, each fact alone and then all of them one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qfbench.analysis import plots
from qfbench.analysis.measures import by_layer
from qfbench.editors.regimes import sequential, single
from qfbench.models import sites
from qfbench.tasks.baseline import baseline
from qfbench.tasks.run import Run
from qfbench.tasks.teaching import Teaching, taught


def layer_curve(run: Run, layers: Sequence[int] | None = None) -> None:
    """Edit each of `layers` (all by default): single edits, then one sequential run over the same facts."""
    layers = range(len(sites.layers(run.lm.model))) if layers is None else layers
    facts, always = baseline(run)
    sequences = []
    for layer in layers:
        there = replace(run, editor=replace(run.editor, layer=layer))  # type: ignore[type-var] # every editor is a dataclass
        each, last = range(1, len(facts) + 1), [len(facts)]
        sequences.append(Teaching(there, "single", single, facts, always, each))
        sequences.append(Teaching(there, "sequential", sequential, facts, always, last))
    taught(run, sequences)
    rows = run.rows()
    if not (rows.condition == "edited").any():
        return
    curve = by_layer(rows)
    title = f"{len(facts)} facts, each alone, then one after another (seq): {run.lm.name}, {type(run.editor).__name__}"
    run.table(curve, title, hidden=["paraphrase", "portability", "leakage", "seq_leakage", "seq_norm"])
    run.figure(plots.layer_curve(curve), "layer_curve")
