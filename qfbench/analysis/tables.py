"""Frames of measures as tables, for the console and for pages."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from qfbench.analysis.catalogue import BESIDE, MEASURES

SMALL = 20  # a measure of fewer questions than this shows how many
HIDDEN = ("of", *(name for name, measure in MEASURES.items() if measure.hidden), "norm")  # of the summary


def console() -> Console:
    """The terminal; where output goes elsewhere as many columns as COLUMNS says, or 100."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)


def laid_out(frame: pd.DataFrame, title: str, hidden: Collection[str] = ()) -> Table:
    """A frame as a table, without its `hidden` columns.

    Where a column has its interval beside it (`<column>_low`, `<column>_high`), the way to its farther end is printed with
    it, and a "~" where `<column>_same`. Below stand how many comparisons there are, and the numbers of questions
    (`<column>_n`) that are under `SMALL`.
    """
    shown = _shown(frame, hidden)
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    below = [text for text in (family(frame, hidden), _few(frame, shown)) if text]
    table.caption, table.caption_justify = "\n".join(below) or None, "left"
    for column in shown:
        number = frame[column].dtype.kind in "fi"
        table.add_column(escape(_header(column)), justify="right" if number else "left", no_wrap=number)
    for line in frame.to_dict("records"):
        table.add_row(*(_cell(column, line, _given(frame)) for column in shown))
    return table


def show(out: Console, frame: pd.DataFrame, title: str, hidden: Collection[str] = ()) -> None:
    """Print a frame as tables that the console is wide enough for: each has the columns before the first measure, and some more."""
    shown = _shown(frame, hidden)
    first = next((i for i, name in enumerate(shown) if name in MEASURES), len(shown))
    who, rest = shown[:first], shown[first:]
    while True:
        part = list(rest)
        while len(part) > 1 and _width(out, frame, [*who, *part]) > out.width:
            part.pop()
        left_out = [name for name in shown if name not in (*who, *part)]
        out.print(laid_out(frame, title, [*hidden, *left_out]))
        rest = rest[len(part) :]
        if not rest:
            return


def _width(out: Console, frame: pd.DataFrame, shown: Sequence[str]) -> int:
    hidden = [name for name in frame if name not in shown]
    return Measurement.get(out, out.options.update(max_width=10_000), laid_out(frame, "", hidden)).maximum


def written(frame: pd.DataFrame, kind: str, hidden: Collection[str] = ()) -> str:
    """A frame as text: `csv` and `json` with all columns, `markdown` and `latex` (booktabs) as it is printed."""
    if kind == "csv":
        return frame.to_csv(index=False)
    if kind == "json":
        return frame.to_json(orient="records", indent=2, force_ascii=False) + "\n"
    shown = _shown(frame, hidden)
    lines = [
        shown,
        *(
            [_cell(name, line, _given(frame)).replace("\\[", "[") for name in shown]
            for line in frame.to_dict("records")
        ),
    ]
    numbers = [frame[name].dtype.kind in "fi" for name in shown]
    if kind == "markdown":
        rule = ["---:" if number else "---" for number in numbers]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (lines[0], rule, *lines[1:]))
    special = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": "\\textasciitilde{}", "±": "$\\pm$"})
    body = [" & ".join(cell.translate(special) for cell in cells) + " \\\\" for cells in lines]
    columns = "".join("r" if number else "l" for number in numbers)
    head = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", body[0], "\\midrule", *body[1:]]
    return "\n".join([*head, "\\bottomrule", "\\end{tabular}", ""])


def _shown(frame: pd.DataFrame, hidden: Collection[str]) -> list[str]:
    beside = {f"{column}_{what}" for column in frame for what in BESIDE}
    return [str(column) for column in frame if column not in {*hidden, *beside}]


def family(frame: pd.DataFrame, hidden: Collection[str] = ()) -> str:
    """How many comparisons a table shows, and at which level; "" where there are none."""
    n = sum(int(frame[f"{column}_p"].count()) for column in _shown(frame, hidden) if f"{column}_p" in frame)
    level = "5% for all together (Holm)" if frame.attrs.get("together") else "5% each"
    return f"{n} comparison{'s' * (n > 1)} (~: may be none), at {level}" if n else ""


def _few(frame: pd.DataFrame, shown: Sequence[str]) -> str:
    """`Few questions: efficacy 5, locality 2 to 4`; "" where there are enough."""
    said = []
    for column in shown:
        n = frame.get(f"{column}_n", pd.Series(dtype=float))
        if len(n := n[n < SMALL]):
            said.append(f"{column.replace('_', ' ')} {' to '.join(f'{n:g}' for n in sorted({n.min(), n.max()}))}")
    return f"Few questions: {', '.join(said)}" if said else ""


def named(names: Sequence[str], most: int = 10) -> str:
    """The names, in a sentence; of many, the first."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _farther(column: str, line: Mapping[str, Any]) -> float:
    """From a value to the farther end of its interval; 0 where it has none."""
    value = line[column]
    return max(line.get(f"{column}_high", value) - value, value - line.get(f"{column}_low", value))


def _header(column: str) -> str:
    if column in MEASURES and MEASURES[column].header:
        return MEASURES[column].header
    return "by" if column == "editor" else str(column).replace("_", " ").replace(".", ".\n")


def _given(frame: pd.DataFrame) -> Collection[str]:
    """Columns that hold settings, to be written as they were given."""
    return ("lr", *frame.attrs.get("settings", ()))


def _cell(column: str, line: Mapping[str, Any], given: Collection[str]) -> str:
    """A table's cell: shares with two decimals and the farther end of their interval, rates and other settings as they were given."""
    value = line[column]
    if not isinstance(value, float):
        return escape(str(value))
    if math.isnan(value):
        return ""
    if column in given or "." in column:  # as `editor.lr`
        return f"{value:g}"
    if column in ("p", "detectable"):
        return "<.001" if value < 0.001 else f"{value:.2g}"
    width = _farther(column, line)
    # Nats may differ by little; shares are never known to more than two decimals.
    decimals = min(5, max(2, -math.floor(math.log10(width)))) if column == "shift" and width else 2
    text = f"{value:.{decimals}f}"
    if width:
        text = re.sub(r"(?<!\d)0\.", ".", f"{text}±{width:.{decimals}f}")
    return text + "~" * (line.get(f"{column}_same") is True)


TWO_DECIMALS = {"before", "after", "drop", "immediate", "final", "forgetting"}  # beside the measures


@dataclass(frozen=True)
class Cell:
    text: str
    number: bool = False
    interval: str = ""
    same: bool = False  # cannot be told from no difference
    few: int = 0  # of how many questions, where these are under `SMALL`


def tabled(frame: pd.DataFrame, hidden: Collection[str] = ()) -> dict[str, Any]:
    """A frame as the template shows it: intervals and marks go into the cell of their column."""
    names = _shown(frame, hidden)
    lines = [[cell(name, line) for name in names] for line in frame.to_dict("records")]
    return {"names": names, "lines": lines, "family": family(frame, hidden)}


def cell(name: str, line: Mapping[str, Any]) -> Cell:
    value = line[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return Cell("" if value is None else str(value))
    if math.isnan(value):
        return Cell("", number=True)
    if name == "p" and value < 0.001:
        return Cell("< 0.001", number=True)
    write: Callable[[float], str] = "{:z.2f}".format if name in MEASURES or name in TWO_DECIMALS else _short
    low, high = (line.get(f"{name}_{side}", value) for side in ("low", "high"))
    text, interval = write(value), ""
    if high > low:
        text += f" ± {write(_farther(name, line))}"
        interval = f"95%: {write(low)} to {write(high)}".replace("-", "−")
    n = line.get(f"{name}_n", SMALL)
    few = int(n) if n < SMALL else 0
    return Cell(text.replace("-", "−"), True, interval, line.get(f"{name}_same") is True, few)


def _short(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")
