"""How figures are drawn: the colours, lines and markers of editors and of measures, and bare axes."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from qfbench.analysis.catalogue import MEASURES

Style = tuple[str, str, str]  # colour, line, marker

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in print.
STYLES: dict[str, Style] = {
    "QF sequential": ("#D55E00", "-", "o"),
    "QF joint": ("#0072B2", "-", "s"),
    "QF protected": ("#009E73", "--", "^"),
    "QF2 sequential": ("#CC79A7", "-.", "D"),
    "QF2 joint": ("#56B4E9", ":", "v"),
    "QFStream sequential": ("#1b1b6f", "-", "h"),
    "FineTune sequential": ("#E69F00", "-", "P"),
    "FineTune joint": ("#999999", "--", "X"),
}
OTHER: Style = ("#000000", "-.", "x")
OTHERS = (OTHER, ("#555555", ":", "*"), ("#8c6d31", "--", "d"), ("#17324d", "-", "<"))  # in turn


def stroke(style: Style, ms: float = 4) -> dict[str, Any]:
    """A style as `Axes.plot` takes it, with markers of `ms` points."""
    colour, dashes, marker = style
    return {"color": colour, "ls": dashes, "marker": marker, "ms": ms}


def label(measure: str) -> str:
    """What figures call a measure, or another column."""
    return (MEASURES[measure].label if measure in MEASURES else "") or measure


def plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
