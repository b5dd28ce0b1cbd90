"""Figures of a run: frames to figures, one function per figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from qfbench.analysis.catalogue import MEASURES, drawn
from qfbench.analysis.sequences import forgetting, matrices, prior_kept
from qfbench.analysis.styles import OTHERS, STYLES, label, plain, stroke


def forgetting_curves(curves: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Retention of taught facts (left), of prior knowledge, and where it was asked the accuracy on questions of general ability
    (right; the dashed line is chance) against the number of edits. After 0 edits stands what the unedited model answers.

    A curve for each model, editor and regime; models are named where there are several.
    """
    questions = rows[rows.kind == "question"]
    questions = questions[questions.suite == questions.suite.iloc[0]] if len(questions) else questions
    panels = 3 if len(questions) else 2
    figure = Figure(figsize=(4.5 * panels, 3.9), layout="constrained")
    kept, prior, *ability = figure.subplots(1, panels, sharex=True, sharey=True)
    others, left = cycle(OTHERS), prior_kept(rows)
    for (model, editor, regime), curve in curves.groupby(["model", "editor", "regime"], sort=False):
        name = f"{editor} {regime}"
        look = stroke(STYLES.get(name) or next(others), ms=3.5)
        look["label"] = name if curves.model.nunique() == 1 else f"{name}, {model}"
        kept.plot(curve.step, curve["mean"], **look)
        kept.fill_between(curve.step, curve.low, curve.high, color=look["color"], alpha=0.15, lw=0)
        known = left[(left.model == model) & (left.editor == editor) & (left.regime == regime)]
        prior.plot(known.step, known["mean"], **look)
        if len(known):
            prior.fill_between(known.step, known.low, known.high, color=look["color"], alpha=0.15, lw=0)
        for axes in ability:
            own = questions[(questions.model == model) & (questions.editor == editor)]
            own = own[(own.condition == "unedited") | ((own.condition == "edited") & (own.regime == regime))]
            share = own.groupby("step").correct.mean()
            axes.plot(share.index, share, **look)
    for axes in ability:
        axes.set(title=f"general ability ({questions.suite.iloc[0]}, accuracy)")
        chance = questions.chance.mean()
        if chance > 0:
            axes.axhline(chance, color="black", ls="--", lw=0.8)
            axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8)
    kept.set(title="taught facts still answered (band: 95%)", ylabel="share of replies (generated)")
    prior.set(title="prior knowledge still answered (band: 95%)")
    for axes in (kept, prior, *ability):
        axes.set(xlabel="edits", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes)
    labels = kept.get_legend_handles_labels()
    figure.legend(*labels, frameon=False, loc="outside upper center", ncols=min(3, len(labels[1])))
    return figure


def learning_rates(curve: pd.DataFrame, reference: pd.DataFrame) -> Figure:
    """What single edits teach and keep against the learning rate, a panel per scheme.

    `reference` holds the same measures of another editor, which has no rate: ticks at the right edge of each panel.
    """
    schemes = list(curve.scheme.unique())
    figure = Figure(figsize=(3.3 * len(schemes), 3.5), layout="constrained")
    for axes, scheme in zip(figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0], schemes, strict=True):
        own = curve[curve.scheme == scheme]
        for name in ("efficacy", "paraphrase", "prior", "leakage"):
            if name not in own:
                continue
            style, edge = MEASURES[name].style, axes.get_yaxis_transform()
            axes.plot(own.lr, own[name], label=name, **stroke(style))
            for value in reference[name]:
                axes.plot(1, value, color=style[0], marker="_", ms=14, mew=2.5, transform=edge, clip_on=False)
        axes.set(title=scheme.replace("_", " "), xlabel="learning rate", xscale="log", ylim=(-0.03, 1.03))
        plain(axes)
    figure.axes[0].set(ylabel="share of replies (generated)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    return figure


def retention_matrices(matrices: Mapping[tuple[str, str, str, int], pd.DataFrame]) -> Figure:
    """R[n, k] as a heat map for the first order of each model, editor and regime: n edits down, the k-th fact across.

    Dark: answered; light: not; white: not taught yet. A line at each checkpoint, as tall as the way to its neighbours.
    """
    shown = {
        key: matrix for key, matrix in matrices.items() if key[3] == min(k[3] for k in matrices if k[:3] == key[:3])
    }
    figure = Figure(figsize=(3.4 * len(shown) + 0.4, 3.6), layout="constrained")
    several = len({key[0] for key in shown}) > 1
    for axes, (key, matrix) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        # The checkpoints; between them only the newest is asked.
        matrix = matrix[matrix.notna().sum(axis=1) == matrix.index]
        facts = np.arange(matrix.shape[1] + 1) + 0.5
        steps = matrix.index.to_numpy(float)
        edges = np.concatenate([[0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
        axes.pcolormesh(facts, edges, np.ma.masked_invalid(matrix.to_numpy()), cmap="cividis_r", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set(title=f"{key[1]} {key[2]}" + (f", {key[0]}" if several else ""))
        axes.set(xlabel="fact, in order of teaching", ylabel="edits")
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    named = [Patch(color=colormaps["cividis_r"](value), label=name) for value, name in ANSWERED]
    figure.legend(handles=named, frameon=False, loc="outside lower center", ncols=2)
    return figure


ANSWERED = ((1.0, "answered"), (0.0, "not answered"))


def capacity(curve: pd.DataFrame, width: int) -> Figure:
    """Retention and prior knowledge against the number of keys taught; the line marks the width of the matrix."""
    regimes = list(curve.regime.unique())
    figure = Figure(figsize=(4 * len(regimes), 3.4), layout="constrained")
    for axes, regime in zip(figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0], regimes, strict=True):
        own = curve[curve.regime == regime]
        for name in ("retention", "prior"):
            axes.plot(own["keys"], own[name], label=name, **stroke(MEASURES[name].style))
        axes.axvline(width, color="0.4", lw=1, ls=":")
        axes.annotate(f"width {width}", (width, 0.5), rotation=90, ha="right", va="center", fontsize=8, color="0.4")
        axes.set(title=regime, xlabel="keys taught (tokens)", ylim=(-0.03, 1.03))
        plain(axes)
    figure.axes[0].set(ylabel="share of replies (generated)")
    figure.axes[0].legend(frameon=False)
    return figure


def layer_curve(curve: pd.DataFrame) -> Figure:
    """What single edits teach and keep at each layer (left), and what is left after all of them in sequence (right)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    alone, sequence = figure.subplots(1, 2, sharey=True)
    panels = ((alone, "", drawn("fresh", "kept")), (sequence, "seq_", drawn("taught", "kept")))
    for axes, lead, measures in panels:
        for measure in measures:
            if lead + measure.name in curve:
                name = label(measure.name) if measure.part == "fresh" else measure.name
                axes.plot(curve.layer, curve[lead + measure.name], label=name, **stroke(measure.style))
        axes.set(xlabel="edited layer", ylim=(-0.03, 1.03), xticks=curve.layer)
        plain(axes)
        axes.legend(frameon=False, fontsize=8)
    alone.set(title="each fact alone", ylabel="share of replies (generated)")
    sequence.set(title="after all facts, one after another")
    return figure


def conversion(rows: pd.DataFrame) -> Figure:
    """Loss (left scale, smoothed over 25 steps) and α (right scale) of a conversion against its steps."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    loss = figure.subplots()
    share = loss.twinx()
    loss.plot(rows.step, rows.loss.rolling(25, min_periods=1).mean(), color="#0072B2", label="loss")
    share.plot(rows.step, rows.alpha, color="#D55E00", ls="--", label="α")
    loss.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    share.set(ylabel="α: share of the stock layer", ylim=(-0.03, 1.03))
    loss.grid(alpha=0.3)
    for axes in (loss, share):
        axes.spines["top"].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return figure


PARTS = {"record": ("#0072B2", ""), "solve": ("#E69F00", "///"), "write": ("#009E73", "...")}


def cost(table: pd.DataFrame) -> Figure:
    """The parts of an edit's median time end to end, in milliseconds (left) and as shares (right); a bar for each line of `table` (`cost.medians`)."""
    figure = Figure(figsize=(9, 0.45 * len(table) + 1.3), layout="constrained")
    time, share = figure.subplots(1, 2, sharey=True)
    at, spent = np.arange(len(table)), table[[f"{part}_ms" for part in PARTS]].fillna(0).to_numpy(float)
    for axes, lengths in ((time, spent), (share, spent / spent.sum(1, keepdims=True))):
        starts = lengths.cumsum(1) - lengths
        for k, (part, (colour, hatch)) in enumerate(PARTS.items()):
            axes.barh(
                at, lengths[:, k], 0.6, starts[:, k], label=part, color=colour, hatch=hatch, edgecolor="white", lw=0
            )
        plain(axes)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
    for y, total in enumerate(table.total_ms):
        time.annotate(f"{total:.3g}", (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    time.set_yticks(at, table.editor + ", " + table.model)
    time.invert_yaxis()
    time.margins(x=0.1)
    time.set(xlabel="milliseconds for one edit (median)")
    share.set(xlabel="share of the edit", xlim=(0, 1))
    figure.legend(*time.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    return figure


@dataclass(frozen=True)
class OfSequences:
    """A figure of all sequences of edits in a frame of rows, and what pages say of it."""

    draw: Callable[[pd.DataFrame], Figure]
    title: str
    caption: str


OF_SEQUENCES = {
    "forgetting_curves": OfSequences(
        lambda rows: forgetting_curves(forgetting(rows), rows),
        "Forgetting curves",
        "the share of taught facts (left) and of prior knowledge that is still "
        "answered, and where it was asked general ability (right), against the number of edits.",
    ),
    "retention_matrix": OfSequences(
        lambda rows: retention_matrices(matrices(rows)),
        "Retention heat map",
        "the result on the k-th fact (across) after n edits (down), first order. "
        "Dark: still answered; light: not; white: not taught yet, or not asked.",
    ),
}
