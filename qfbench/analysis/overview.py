"""A table of many runs made short: only what varies, by short names, baselines once; the lines and columns that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from qfbench.analysis.catalogue import BESIDE, MEASURES
from qfbench.errors import UserError

WHO = ["model", "editor", "regime"]
BASELINES = ("unedited", "in_context")


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `results.pooled`: first who, then the settings that tell its lines apart, then measures.

    Settings that follow from model and editor are left out; the others lose what stands before their last dot, where that is
    enough. Lines about the unedited model that say the same stand once, without settings of an editor.
    """
    settings = [name for name in table if name in _settings(table)]
    follow = [name for name in settings if (table.groupby(["model", "editor"])[name].nunique(dropna=False) == 1).all()]
    settings = [name for name in settings if name not in follow]
    short = [name.rsplit(".", 1)[-1] for name in settings]
    taken = [*short, *(name for name in table if name not in settings)]
    names = {a: b for a, b in zip(settings, short, strict=True) if taken.count(b) == 1}
    table = table.drop(columns=follow).rename(columns=names)
    shown = [names.get(name, name) for name in settings]
    base = table.regime.isin(BASELINES)
    table[shown] = table[shown].astype(object).mask(base, None).infer_objects()
    table["editor"] = table.editor.mask(base, "")
    measures = [name for name in table if name in MEASURES]
    table = table[~(base & table.round(9).duplicated(["model", "regime", *measures]))]
    first = [*(name for name in WHO if name in table), *shown]
    table = table[[*first, *(name for name in table if name not in first)]].reset_index(drop=True)
    table.attrs["settings"] = shown
    return table


def _settings(table: pd.DataFrame) -> list[str]:
    beside = {f"{name}_{what}" for name in MEASURES for what in BESIDE}
    return [name for name in table if name not in (*WHO, "of", "norm", *MEASURES, *beside)]


def where(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The lines for which every condition `column=value` holds; `column=a,b` takes either. A placebo goes with its regime.

    Raises:
        UserError: there is no such column, or no such line.
    """
    for condition in conditions:
        name, _, values = condition.partition("=")
        _known(table, [name], "--where")
        held = table[name].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
        wanted = values.split(",")
        holds = held.isin(wanted)
        if name == "regime" and "of" in table:
            holds |= (table.regime == "placebo") & table.of.isin(wanted)
        if not holds.any():
            raise UserError(f"--where {condition}: no line has it; there are {', '.join(dict.fromkeys(held))}")
        table = table[holds]
    return table


def ordered(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The lines by one column: measures from the highest, all else from the lowest."""
    _known(table, [by], "--sort")
    return table.sort_values(by, ascending=by not in MEASURES, kind="stable", na_position="last")


def narrowed(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Only these columns, with what stands beside them."""
    _known(table, columns, "--columns")
    beside = [f"{name}_{what}" for name in columns for what in BESIDE]
    return table[[*columns, *(name for name in beside if name in table)]]


def _known(table: pd.DataFrame, names: Sequence[str], option: str) -> None:
    for name in names:
        if name not in table:
            own = [column for column in table if not column.endswith(tuple(f"_{what}" for what in BESIDE))]
            raise UserError(f"{option} {name}: no such column; there are {', '.join(own)}")
