"""Frames to figures, one function per figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in print.
STYLES = {
    "sequential": ("#D55E00", "-", "o"),
    "joint": ("#0072B2", "-", "s"),
    "protected": ("#009E73", "--", "^"),
    "single": ("#CC79A7", ":", "v"),
}
OTHER = ("#000000", "-.", "x")


def forgetting_curves(curves: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Retention of taught facts (left) and of prior knowledge (right) against the number of edits, a curve per regime."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    kept, prior = figure.subplots(1, 2, sharey=True)
    for regime, curve in curves.groupby("regime", sort=False):
        colour, line, marker = STYLES.get(str(regime), OTHER)
        kept.plot(curve.step, curve["mean"], color=colour, ls=line, marker=marker, ms=3.5, label=regime)
        kept.fill_between(curve.step, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
        known = rows[(rows.regime == regime) & (rows.kind == "prior")].groupby("step").generated.mean()
        prior.plot(known.index, known, color=colour, ls=line, marker=marker, ms=3.5, label=regime)
    kept.set(title="taught facts still answered", ylabel="share of replies (generated)")
    prior.set(title="prior knowledge still answered")
    for axes in (kept, prior):
        axes.set(xlabel="edits", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    kept.legend(frameon=False, title="band: 95% over facts")
    return figure


def layer_curve(curve: pd.DataFrame) -> Figure:
    """What single edits teach and keep at each layer (left), and what is left after all of them in sequence (right)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    alone, sequence = figure.subplots(1, 2, sharey=True)
    lines = {
        "efficacy": ("#0072B2", "-", "o"),
        "held_out": ("#56B4E9", "--", "s"),
        "prior": ("#D55E00", "-", "^"),
        "refused": ("#E69F00", "--", "v"),
    }
    for name, (colour, line, marker) in lines.items():
        if name not in curve:
            continue
        label = "paraphrase, unseen wording" if name == "held_out" else name
        alone.plot(curve.layer, curve[name], color=colour, ls=line, marker=marker, ms=4, label=label)
    lines = {"retention": lines["efficacy"], "prior": lines["prior"], "refused": lines["refused"]}
    for name, (colour, line, marker) in lines.items():
        if f"seq_{name}" not in curve:
            continue
        sequence.plot(curve.layer, curve[f"seq_{name}"], color=colour, ls=line, marker=marker, ms=4, label=name)
    alone.set(title="each fact alone", ylabel="share of replies (generated)")
    sequence.set(title="after all facts, one after another")
    for axes in (alone, sequence):
        axes.set(xlabel="edited layer", ylim=(-0.03, 1.03), xticks=curve.layer)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure
