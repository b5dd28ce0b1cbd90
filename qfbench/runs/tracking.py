"""Trackers: a live mirror of a run. The source of every figure is the run's own table (`store`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from rich.console import Console

from qfbench.analysis.catalogue import MEASURES
from qfbench.runs.store import Rows


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run before its first point.

    `usual` is what rows of the run mostly have in the columns that tell series apart; `config` includes the provenance.
    """

    run_id: str
    folder: Path
    config: Mapping[str, Any]
    usual: Mapping[str, Any]
    tags: Sequence[str] = ()
    experiment: str | None = None
    sweep: str | None = None


@runtime_checkable
class Tracker(Protocol):
    """Shows runs elsewhere, one at a time. It may raise whatever it likes: `Mirror` sees to that."""

    def start(self, about: About) -> str:
        """Begin a run. Returns one line: where to watch it."""

    def log(self, values: Mapping[str, float], edit_step: int) -> None: ...

    def figure(self, name: str, path: Path) -> None:
        """Show a figure that the run has written as a PNG."""

    def table(self, name: str, frame: pd.DataFrame) -> None: ...

    def close(self, ok: bool) -> None:
        """End the run; `ok` says that it was not cut short."""


class Mirror:
    """Shows a run to a tracker. Whatever fails there is said once, and the run goes on without it."""

    def __init__(self, tracker: Tracker | None = None, console: Console | None = None) -> None:
        self.tracker, self.console = tracker, console or Console()

    @contextmanager
    def of(self, about: About) -> Iterator[None]:
        """Mirror a run while the block runs."""
        self.about, ok = about, False
        self._try("start", lambda t: self.console.print(t.start(about), soft_wrap=True, markup=False, highlight=False))
        try:
            yield
            ok = True
        finally:
            self._try("close", lambda t: t.close(ok))

    def rows(self, rows: Rows) -> None:
        def show(tracker: Tracker) -> None:
            for step, values in curves(pd.DataFrame(rows), self.about.usual):
                tracker.log(values, step)

        self._try("log", show)

    def figure(self, name: str, path: Path) -> None:
        self._try(f"figure {name}", lambda t: t.figure(name, path))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        self._try(f"table {name}", lambda t: t.table(name, frame))

    def replies(self, rows: pd.DataFrame) -> None:
        self._try("table replies", lambda t: t.table("replies", last_replies(rows, self.about.usual)))

    def _try(self, what: str, show: Callable[[Tracker], object]) -> None:
        if self.tracker is None:
            return
        try:
            show(self.tracker)
        except (Exception, SystemExit) as error:
            name, why = type(self.tracker).__name__, f"{type(error).__name__}: {error}".splitlines()[0]
            text = f"{name} failed ({what}: {why}); the run goes on without it, and its folder has everything"
            self.console.print(text, style="yellow", soft_wrap=True, markup=False, highlight=False)
            with suppress(Exception, SystemExit):
                self.tracker.close(False)
            self.tracker = None


SERIES = ("task", "model", "editor", "scheme", "regime", "condition", "layer", "lr", "order")
HEALTH = r"^(relative_norm|rounding_loss|top|overlap|solve_.*)$"


def curves(rows: pd.DataFrame, usual: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """The points that rows add to the live curves: a step, and values by name.

    `SERIES/KIND` is the share of replies of a kind that pass (`generated`) at a checkpoint, of all that is asked then;
    `SERIES/new_KIND` of those about the fact taught last; beside them the health of the change, and each measure that has a `curve`. A row that is no reply gives
    its numbers. A series is named by its task and by what it does not share with the run (`usual`): another editor, a layer ...
    """
    rows = _complete(rows)
    for (step, series), own in rows.groupby(["step", _series(rows, usual)], sort=False):
        asked = own[own.kind.notna()]
        values = own.drop(columns="step").mean(numeric_only=True) if asked.empty else asked.filter(regex=HEALTH).mean()
        points = values.dropna().to_dict()
        new = asked.fresh.eq(True)
        # Some kinds are asked about the new fact alone until the last checkpoint; then they have no share of all.
        of_all = (asked.checkpoint.ne(False) & ~new).groupby(asked.kind).transform("any")
        for prefix, part in (("", asked[of_all]), ("new_", asked[new])):
            shares = part.generated.astype(float).groupby(part.kind).mean()
            points |= {f"{prefix}{kind}": share for kind, share in shares.dropna().items()}
        for measure in MEASURES.values():
            its = asked[asked.kind == measure.kind]
            if measure.curve and len(its):
                names = its.suite if measure.curve == "suite" else pd.Series(measure.curve, its.index)
                points |= {name: measure.shown(measure.mean(part)) for name, part in its.groupby(names)}
        yield int(step), {f"{series}/{name}": float(value) for name, value in points.items()}


def last_replies(rows: pd.DataFrame, usual: Mapping[str, Any], most: int = 500) -> pd.DataFrame:
    """What was said after the last edit of each series, as `curves` names them; `most` lines, shared among the series."""
    asked = _complete(rows).dropna(subset=["kind", "step", "reply", "generated"])
    asked = asked.assign(series=_series(asked, usual))
    by = asked.groupby("series", sort=False)
    last = asked[asked.step == by.step.transform("max")]
    shown = last.groupby("series", sort=False).head(most // max(1, by.ngroups))
    return shown[["series", "step", "kind", "query", "expected", "reply", "generated"]]


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a step, with all columns that are asked for here."""
    wanted = ("step", "kind", "query", "expected", "reply", "generated", "checkpoint", "fresh")
    return rows.reindex(columns=list(dict.fromkeys([*rows, *wanted]))).dropna(subset=["step"])


def _series(rows: pd.DataFrame, usual: Mapping[str, Any]) -> pd.Series:
    names = pd.Series("", index=rows.index, name="series")
    for column in (c for c in SERIES if c in rows):
        for value in rows[column].dropna().unique():
            word = value if isinstance(value, str) else f"{column}{value:g}"
            if value != usual.get(column):
                # A number of a row that is no reply is what it measures (the rate of a step of training, say).
                named = (rows[column] == value) & (rows.kind.notna() | isinstance(value, str))
                names[named] += "_" + re.sub(r"[^\w-]+", "_", word)
    return names.str.removeprefix("_")
