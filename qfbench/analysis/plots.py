"""Frames to figures, one function per figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in print.
STYLES = {
    "QF sequential": ("#D55E00", "-", "o"),
    "QF joint": ("#0072B2", "-", "s"),
    "QF protected": ("#009E73", "--", "^"),
    "QF2 sequential": ("#CC79A7", "-.", "D"),
    "QF2 joint": ("#56B4E9", ":", "v"),
    "FineTune sequential": ("#E69F00", "-", "P"),
    "FineTune joint": ("#999999", "--", "X"),
}
OTHER = ("#000000", "-.", "x")
OTHERS = (OTHER, ("#555555", ":", "*"), ("#8c6d31", "--", "d"), ("#17324d", "-", "<"))  # in turn


def forgetting_curves(curves: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Retention of taught facts (left), of prior knowledge, and where it was asked the accuracy on questions of general ability
    (right; the dashed line is chance) against the number of edits.

    A curve for each model, editor and regime; models are named where there are several.
    """
    questions = rows[rows.kind == "question"]
    questions = questions[questions.suite == questions.suite.iloc[0]] if len(questions) else questions
    panels = 3 if len(questions) else 2
    figure = Figure(figsize=(4.5 * panels, 3.9), layout="constrained")
    kept, prior, *ability = figure.subplots(1, panels, sharex=True, sharey=True)
    others = 0
    for (model, editor, regime), curve in curves.groupby(["model", "editor", "regime"], sort=False):
        name = f"{editor} {regime}"
        label = name if curves.model.nunique() == 1 else f"{name}, {model}"
        colour, line, marker = STYLES.get(name) or OTHERS[others % len(OTHERS)]
        others += name not in STYLES
        kept.plot(curve.step, curve["mean"], color=colour, ls=line, marker=marker, ms=3.5, label=label)
        kept.fill_between(curve.step, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
        own = rows[(rows.model == model) & (rows.editor == editor) & (rows.regime == regime)]
        own = own[(own.condition == "edited") & (own.kind == "prior")]
        known = own.groupby("step").generated.mean()
        prior.plot(known.index, known, color=colour, ls=line, marker=marker, ms=3.5, label=label)
        for axes in ability:
            own = questions[(questions.model == model) & (questions.editor == editor)]
            own = own[(own.condition == "unedited") | ((own.condition == "edited") & (own.regime == regime))]
            share = own.groupby("step").correct.mean()
            axes.plot(share.index, share, color=colour, ls=line, marker=marker, ms=3.5, label=label)
    for axes in ability:
        axes.set(title=f"general ability ({questions.suite.iloc[0]}, accuracy)")
        chance = questions.chance.mean()
        if chance > 0:
            axes.axhline(chance, color="black", ls="--", lw=0.8)
            axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8)
    kept.set(title="taught facts still answered", ylabel="share of replies (generated)")
    prior.set(title="prior knowledge still answered")
    for axes in (kept, prior, *ability):
        axes.set(xlabel="edits", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes)
    kept.set(title="taught facts still answered (band: 95%)")
    labels = kept.get_legend_handles_labels()
    figure.legend(*labels, frameon=False, loc="outside upper center", ncols=min(3, len(labels[1])))
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


BY_MEASURE = {
    "efficacy": ("#0072B2", "-", "o"),
    "paraphrase": ("#009E73", ":", "D"),
    "held_out": ("#56B4E9", "--", "s"),
    "prior": ("#D55E00", "-", "^"),
    "refused": ("#E69F00", "--", "v"),
    "leakage": ("#CC79A7", "-.", "x"),
    "accuracy": ("#000000", ":", "P"),
}


AT_THE_END = {"retention": BY_MEASURE["efficacy"]} | {
    name: BY_MEASURE[name] for name in ("prior", "refused", "accuracy")
}
LABELS = {"held_out": "paraphrase, unseen wording", "refused": "refusals kept", "prior": "prior knowledge"}
LABELS |= {"accuracy": "questions of general ability"}


def over_settings(table: pd.DataFrame, setting: str, label: str) -> Figure:
    """The measures of single edits (left) and of the end of a sequence (right) against a setting, with their intervals.

    `table` has a line per value of `setting` and regime (`results.pooled`).
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels: dict[str, tuple[str, tuple[str, ...]]] = {}
    panels["single"] = ("each fact alone", ("efficacy", "held_out", "prior", "refused"))
    panels["sequential"] = ("after all facts, one after another", tuple(AT_THE_END))
    for axes, (regime, (title, names)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        own = table[table.regime == regime]
        at = range(len(own)) if own[setting].dtype == object else own[setting]
        for name in names:
            if name in own:
                colour, line, marker = (AT_THE_END if regime == "sequential" else BY_MEASURE)[name]
                axes.plot(at, own[name], color=colour, ls=line, marker=marker, ms=4, label=LABELS.get(name, name))
                axes.fill_between(at, own[f"{name}_low"], own[f"{name}_high"], color=colour, alpha=0.15, lw=0)
        axes.set(title=title, xlabel=label, ylim=(-0.03, 1.03))
        axes.set_xticks(at, own[setting])
        _plain(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set(ylabel="share of replies (band: 95%)")
    return figure


def heat_maps(
    table: pd.DataFrame, setting: str, label: str, measures: Sequence[str] = ("efficacy", "held_out")
) -> Figure:
    """Measures by a setting (across) and kind of knowledge (down), a panel each. Dark: more. `table` as of `measures.by_kind`."""
    measures = [name for name in measures if name in table]
    figure = Figure(figsize=(4.4 * len(measures) + 0.6, 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        grid = table.pivot(index="kind", columns=setting, values=name)
        image = axes.imshow(grid.to_numpy(float), cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid.to_numpy(float)):
            if not np.isnan(value):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.5 else "black",
                )
        axes.set_xticks(range(grid.shape[1]), grid.columns)
        axes.set_yticks(range(grid.shape[0]), grid.index)
        axes.set(title=LABELS.get(name, name), xlabel=label)
    figure.colorbar(image, ax=figure.axes, label="share of replies")
    return figure


def bars(table: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """Measures side by side for each line of `table` (model, editor), with their intervals."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    shown = [name for name in measures if name in table]
    width, several = 0.8 / len(table), table.model.nunique() > 1
    styles = [*STYLES.values(), OTHER]
    for k, line in enumerate(table.to_dict("records")):
        at = np.arange(len(shown)) + (k - (len(table) - 1) / 2) * width
        value = np.array([line[name] for name in shown], float)
        spread = [
            [abs(line[name] - line.get(f"{name}_{side}", line[name])) for name in shown] for side in ("low", "high")
        ]
        label = line["editor"] + (f", {line['model']}" if several else "")
        axes.bar(at, value, width, yerr=spread, color=styles[k % len(styles)][0], label=label, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(shown)), [LABELS.get(name, name) for name in shown])
    axes.set(ylabel="share (lines: 95%)", ylim=(0, 1.05))
    _plain(axes)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=min(3, len(table)))
    return figure


def inflation(table: pd.DataFrame) -> Figure:
    """How far the teacher-forced score (hollow) stands above the share of replies that are right (filled), with their intervals.

    A line for each line of `table` (model, editor, regime) that has both.
    """
    lines = table.dropna(subset=["efficacy", "forced"]).to_dict("records")
    several = {name for name in ("model", "regime") if len({line[name] for line in lines}) > 1}
    figure = Figure(figsize=(7, 1.1 + 0.35 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for at, line in enumerate(lines):
        axes.plot([line["efficacy"], line["forced"]], [at, at], color="#999999", lw=2, zorder=1)
        for name, (place, face, colour) in {
            "efficacy": (at + 0.08, "#0072B2", "#0072B2"),
            "forced": (at - 0.08, "none", "#D55E00"),
        }.items():
            low, high = (line.get(f"{name}_{side}", line[name]) for side in ("low", "high"))
            axes.plot([low, high], [place, place], color=colour, lw=0.9, zorder=1.5)
            size = 5 if name == "efficacy" else 9  # where they are equal, one stands in the other
            axes.plot(line[name], at, "o", ms=size, mfc=face, mec=colour, mew=1.5, zorder=2 + (size < 9))
        axes.annotate(
            f"{line['inflation']:+z.2f}", (1.02, at), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    names = [", ".join(str(line[n]) for n in ("editor", *sorted(several))) for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set(xlim=(-0.03, 1.03), xlabel="right replies (filled), right tokens when the answer is fed in (hollow)")
    axes.invert_yaxis()
    _plain(axes)
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
            colour, line, marker = BY_MEASURE[name]
            if name not in own:
                continue
            axes.plot(own.lr, own[name], color=colour, ls=line, marker=marker, ms=4, label=name)
            for value in reference[name]:
                axes.plot(
                    1,
                    value,
                    color=colour,
                    marker="_",
                    ms=14,
                    mew=2.5,
                    transform=axes.get_yaxis_transform(),
                    clip_on=False,
                )
        axes.set(title=scheme.replace("_", " "), xlabel="learning rate", xscale="log", ylim=(-0.03, 1.03))
        _plain(axes)
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
        matrix = matrix[
            matrix.notna().sum(axis=1) == matrix.index
        ]  # the checkpoints; between them only the newest is asked
        facts = np.arange(matrix.shape[1] + 1) + 0.5
        steps = matrix.index.to_numpy(float)
        edges = np.concatenate([[0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
        axes.pcolormesh(facts, edges, np.ma.masked_invalid(matrix.to_numpy()), cmap="cividis_r", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set(
            title=f"{key[1]} {key[2]}" + (f", {key[0]}" if several else ""),
            xlabel="fact, in order of teaching",
            ylabel="edits",
        )
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def capacity(curve: pd.DataFrame, width: int) -> Figure:
    """Retention and prior knowledge against the number of keys taught; the line marks the width of the matrix."""
    regimes = list(curve.regime.unique())
    figure = Figure(figsize=(4 * len(regimes), 3.4), layout="constrained")
    for axes, regime in zip(figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0], regimes, strict=True):
        own = curve[curve.regime == regime]
        for name in ("retention", "prior"):
            colour, line, marker = BY_MEASURE["efficacy" if name == "retention" else name]
            axes.plot(own["keys"], own[name], color=colour, ls=line, marker=marker, ms=4, label=name)
        axes.axvline(width, color="0.4", lw=1, ls=":")
        axes.annotate(f"width {width}", (width, 0.5), rotation=90, ha="right", va="center", fontsize=8, color="0.4")
        axes.set(title=regime, xlabel="keys taught (tokens)", ylim=(-0.03, 1.03))
        _plain(axes)
    figure.axes[0].set(ylabel="share of replies (generated)")
    figure.axes[0].legend(frameon=False)
    return figure


def layer_curve(curve: pd.DataFrame) -> Figure:
    """What single edits teach and keep at each layer (left), and what is left after all of them in sequence (right)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    alone, sequence = figure.subplots(1, 2, sharey=True)
    for name in ("efficacy", "held_out", "prior", "refused"):
        if name not in curve:
            continue
        colour, line, marker = BY_MEASURE[name]
        label = "paraphrase, unseen wording" if name == "held_out" else name
        alone.plot(curve.layer, curve[name], color=colour, ls=line, marker=marker, ms=4, label=label)
    for name in ("retention", "prior", "refused"):
        if f"seq_{name}" not in curve:
            continue
        colour, line, marker = BY_MEASURE["efficacy" if name == "retention" else name]
        sequence.plot(curve.layer, curve[f"seq_{name}"], color=colour, ls=line, marker=marker, ms=4, label=name)
    alone.set(title="each fact alone", ylabel="share of replies (generated)")
    sequence.set(title="after all facts, one after another")
    for axes in (alone, sequence):
        axes.set(xlabel="edited layer", ylim=(-0.03, 1.03), xticks=curve.layer)
        _plain(axes)
        axes.legend(frameon=False, fontsize=8)
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
        _plain(axes)
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
