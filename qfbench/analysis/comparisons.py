"""Figures of several runs beside each other, as studies draw them: frames to figures, one function per figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from qfbench.analysis.catalogue import MEASURES, drawn
from qfbench.analysis.styles import OTHER, OTHERS, STYLES, label, plain, stroke

TICKS = 15  # values of a setting that an axis names, at most
CELL = 0.3  # inches that a number of a heat map takes


def over_settings(table: pd.DataFrame, setting: str, across: str) -> Figure:
    """The measures of single edits (left) and of the end of a sequence (right) against a setting, with their intervals.

    `table` has a line per value of `setting` and regime (`results.pooled`); `across` is what the axis calls the setting.
    """
    end = [*drawn("taught", "kept"), MEASURES["accuracy"]]
    panels = {
        "single": ("each fact alone", drawn("fresh", "kept")),
        "sequential": ("after all facts, one after another", end),
    }
    panels = {regime: panel for regime, panel in panels.items() if (table.regime == regime).any()} or panels
    figure = Figure(figsize=(max(5.5, 4.5 * len(panels)), 3.4), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (regime, (title, measures)), axes in zip(panels.items(), places, strict=True):
        own = table[table.regime == regime]
        at = range(len(own)) if own[setting].dtype == object else own[setting]
        for measure in (one for one in measures if one.name in own):
            axes.plot(at, own[measure.name], label=label(measure.name), **stroke(measure.style))
            low, high = own[f"{measure.name}_low"], own[f"{measure.name}_high"]
            axes.fill_between(at, low, high, color=measure.style[0], alpha=0.15, lw=0)
        axes.set(title=title, xlabel=across, ylim=(-0.03, 1.03))
        every = max(1, -(-len(own) // TICKS))
        axes.set_xticks(list(at)[::every], own[setting][::every])
        plain(axes)
        if len(own):
            axes.legend(edgecolor="none", framealpha=0.8, fontsize=8)
    places[0].set(ylabel="share of replies (band: 95%)")
    return figure


def heat_maps(
    table: pd.DataFrame, setting: str, across: str, measures: Sequence[str] = ("efficacy", "held_out")
) -> Figure:
    """Measures by a setting (across) and kind of knowledge (down), a panel each. Dark: more. `table` as of `measures.by_kind`."""
    measures = [name for name in measures if name in table]
    wide = max(4.4, CELL * table[setting].nunique() + 1.2)
    figure = Figure(figsize=(wide * len(measures) + 0.6, 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        image = heat_map(axes, table.pivot(index="kind", columns=setting, values=name))
        axes.set(title=label(name), xlabel=across)
    figure.colorbar(image, ax=figure.axes, label="share of replies")
    return figure


def grids(parts: Mapping[str, tuple[str, pd.DataFrame]], down: str, measures: Sequence[str]) -> Figure:
    """Measures by the column `down` and another one, a panel each. `parts` are rows of panels: what the axis across is called, its
    column, and the lines."""
    measures = [name for name in measures if any(name in table for _, table in parts.values())]
    height = 0.9 + 0.32 * max(table[down].nunique() for _, table in parts.values())
    wide = max(2.5, CELL * max(table[setting].nunique() for setting, table in parts.values()) + 0.5)
    figure = Figure(figsize=(wide * len(measures) + 0.8, height * len(parts) + 0.4), layout="constrained")
    panels = figure.subplots(len(parts), len(measures), squeeze=False)
    for (across, (setting, table)), line in zip(parts.items(), panels, strict=True):
        for name, axes in zip(measures, line, strict=True):
            image = heat_map(axes, table.pivot(index=down, columns=setting, values=name))
            axes.set(title=label(name), xlabel=across, ylabel=down)
    figure.colorbar(image, ax=figure.axes, label="share")
    return figure


def heat_map(axes: Axes, grid: pd.DataFrame) -> AxesImage:
    """Shares as colours and numbers. Dark: more."""
    values = grid.to_numpy(float)
    image = axes.imshow(values, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(grid.shape[1]), grid.columns)
    axes.set_yticks(range(grid.shape[0]), grid.index)
    return image


def curves(table: pd.DataFrame, across: str, measures: Sequence[str]) -> Figure:
    """Measures (down) against the column `across`, a panel per model and a line per editor, with their intervals.

    Of one model alone, measures stand two in a row.
    """
    models, editors = table.model.unique(), table.editor.unique()
    wide = max(2, len(models))
    down = -(-len(measures) * len(models) // wide)
    figure = Figure(figsize=(3.6 * wide + 0.6, 2.4 * down + 0.5 + 0.07 * len(editors)), layout="constrained")
    panels = figure.subplots(down, wide, squeeze=False, sharex="col", sharey=True)
    styles = dict(zip(editors, cycle([*STYLES.values(), *OTHERS]), strict=False))
    for (name, model), axes in zip(product(measures, models), panels.flat, strict=False):
        for editor, own in table[table.model == model].groupby("editor", sort=False):
            axes.plot(own[across], own[name], label=editor, **stroke(styles[editor]))
            axes.fill_between(
                own[across], own[f"{name}_low"], own[f"{name}_high"], color=styles[editor][0], alpha=0.15, lw=0
            )
        axes.set(title=model, ylabel=label(name), xlabel=across, ylim=(-0.03, 1.03), xscale="log")
        axes.set_xticks(at := sorted(table[across].unique()), at)
        axes.minorticks_off()
        plain(axes)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=min(len(editors), 2 * wide)
    )
    for axes in panels.flat[len(measures) * len(models) :]:
        axes.set_visible(False)
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
        who = line["editor"] + (f", {line['model']}" if several else "")
        axes.bar(at, value, width, yerr=spread, color=styles[k % len(styles)][0], label=who, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(shown)), [label(name) for name in shown])
    axes.set(ylabel="share (lines: 95%)", ylim=(0, 1.05))
    plain(axes)
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
    plain(axes)
    return figure


def pareto(table: pd.DataFrame) -> Figure:
    """What an editor keeps (`balance`) against the `seconds` of an edit; a line joins those of which none is both faster and better.

    A point for each line of `table`, named by its `editor`.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    table = table.sort_values("seconds")
    front = table[table.balance > table.balance.cummax().shift(fill_value=-1.0)]
    axes.plot(front.seconds, front.balance, color="#999999", lw=1, drawstyle="steps-post", zorder=1)
    on_front = table.index.isin(front.index)
    axes.scatter(table.seconds, table.balance, c=np.where(on_front, "#0072B2", "#D55E00"), zorder=2)
    lines = table.to_dict("records")
    for at, line in enumerate(lines):
        near = [one for one in lines[:at] if one["seconds"] > 0.6 * line["seconds"]]
        near = [one for one in near if abs(one["balance"] - line["balance"]) < 0.05]
        place = (6, 11 * len(near) - 3)  # one above the other, where points are near each other
        axes.annotate(line["editor"], (line["seconds"], line["balance"]), place, textcoords="offset points", fontsize=8)
    axes.set(
        xscale="log", xlabel="seconds of an edit (log)", ylabel="harmonic mean of what is kept", ylim=(-0.05, 1.08)
    )
    axes.margins(x=0.2)
    plain(axes)
    return figure
