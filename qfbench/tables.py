"""Frames of measures as tables for the console."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

# Of the summary, in the CSV only.
HIDDEN = (
    "of",
    "held_out",
    "forced",
    "inflation",
    "preferred",
    "locality_gold",
    "locality_preferred",
    "perplexity",
    "norm",
)

# 80 columns are soon full.
HEADERS = {
    "editor": "by",
    "paraphrase": "para-\nphrase",
    "portability": "porta-\nbility",
    "retention": "reten-\ntion",
}


def laid_out(frame: pd.DataFrame, title: str, hidden: Collection[str] = ()) -> Table:
    """A frame as a table, without its `hidden` columns.

    Where a column has its interval beside it (`<column>_low`, `<column>_high`), half of its width is printed with it,
    and a "~" where `<column>_same`.
    """
    beside = {f"{column}_{what}" for column in frame for what in ("low", "high", "same")}
    shown = [column for column in frame if column not in {*hidden, *beside}]
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for column in shown:
        header = HEADERS.get(column, str(column).replace("_", " "))
        table.add_column(header, justify="right" if frame[column].dtype.kind in "fi" else "left")
    for line in frame.to_dict("records"):
        table.add_row(*(_cell(column, line) for column in shown))
    return table


def _cell(column: str, line: Mapping[str, Any]) -> str:
    """A table's cell: shares with two decimals and half of their interval's width, rates as they were given."""
    value = line[column]
    if not isinstance(value, float):
        return escape(str(value))
    if math.isnan(value):
        return ""
    if column == "lr":
        return f"{value:g}"
    text = f"{value:.2f}"
    width = (line.get(f"{column}_high", value) - line.get(f"{column}_low", value)) / 2
    if width:
        text = f"{text}±{width:.2f}".replace("0.", ".")
    return text + "~" * (line.get(f"{column}_same") is True)
