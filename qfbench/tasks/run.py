"""What a task works with: the model, the editor, the facts, and where results go."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from qfbench.analysis import tables
from qfbench.analysis.rows import regular
from qfbench.editors import Editor
from qfbench.errors import UserError
from qfbench.facts import Fact, Probe
from qfbench.facts.probes import Row, ask, check_lengths
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.regression import Suite
from qfbench.runs.cache import remembered
from qfbench.runs.folder import recorded
from qfbench.runs.provenance import SAME, protocol
from qfbench.runs.store import ParquetStore
from qfbench.runs.tracking import Mirror

# Of a model's settings, those that say how it is loaded.
LOADED = ("device", "dtype", "batch_size", "max_new_tokens", "firing", "plain", "template", "told", "preamble")


EVERY = 30.0  # seconds between lines about what is done


# (text, work=1, before=False): told of each part of the work, how much it was, and whether an earlier process did it.
Advance = Callable[..., None]


@dataclass(frozen=True)
class Run:
    """What a task works with: the model, the editor, the facts, and where results go."""

    lm: LanguageModel
    editor: Editor
    facts: list[Fact]
    folder: Path
    store: ParquetStore
    console: Console
    task: str = ""
    label: str = ""
    place: str = ""  # before the names of files about a model that stands beside the run's own
    regression: Mapping[str, Suite] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)  # `provenance.protocol` of the model
    cache: Path | None = None  # where rows of unedited models are kept
    tracker: Mirror = field(default_factory=Mirror)
    brief: bool = False  # print no tables: the job of a sweep, which is read as a whole

    @property
    def run_id(self) -> str:
        return f"{self.folder.parent.name}-{self.folder.name}"

    @property
    def editor_name(self) -> str:
        return self.label or type(self.editor).__name__

    @property
    def title(self) -> str:
        where = [f"at layer {site.layer}" for site in self.editor.sites[:1]] or [
            "in the prompt (no weights are changed)"
        ]
        return f"{self.lm.name}, {self.editor_name} {where[0]}"

    def elsewhere(self, model: Mapping[str, Any], editor: Editor, name: str = "") -> Run:
        """The same run with another model and editor; rows and files go where this one's go.

        Where both are called as this run's own are (another layer, say), `name` is added to the editor's.
        """
        lm = load(model)
        check_lengths(lm, self.facts)
        place = "" if lm.name == self.lm.name else re.sub(r"[^\w.-]+", "-", Path(lm.name).name) + "-"
        there = replace(self, lm=lm, editor=editor, protocol=protocol(lm), place=place).unlike([self], name)
        known = recorded(self.folder)
        beside = known.setdefault("models_beside", {})
        before = beside.get(lm.name, {})
        if len(self.store.earlier) and any(before.get(n) != there.protocol[n] for n in SAME if n in before):
            raise UserError(f"{self.folder} holds a run with another {lm.name}; rerun=true measures it anew")
        beside[lm.name] = dict(there.protocol)
        self.store.ledger.write_json("provenance.json", known)
        return there

    def beside(self, entries: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """This run, and for each entry the same with its `model` and `editor`, all of them called differently."""
        runs = [self]
        for name, entry in entries.items():
            there = self.elsewhere(entry["model"], entry["editor"], name)
            runs.append(there.unlike(runs, name))
        return runs

    def unlike(self, runs: Sequence[Run], name: str) -> Run:
        """This run, with `name` added to its editor's where one of `runs` has a model and an editor of the same names."""
        taken = [(run.lm.name, run.editor_name) for run in runs]
        alike = (self.lm.name, self.editor_name) in taken
        return replace(self, label=f"{self.editor_name} {name}") if alike else self

    def log(self, row: Mapping[str, Any], **more: Any) -> None:
        same = {"run_id": self.run_id, "task": self.task}
        self.store.log(same | {"model": self.lm.name, "editor": self.editor_name} | more | dict(row))

    def earlier(self, **about: Any) -> pd.DataFrame:
        """The rows that an earlier process measured of this task, model and editor, and of what they are `about`."""
        rows = self.store.earlier
        for name, value in ({"task": self.task, "model": self.lm.name, "editor": self.editor_name} | about).items():
            rows = rows[rows[name] == value] if name in rows else rows[:0]
        return rows.reindex(columns=rows.columns.union(["condition", "draw", "step", "kind", "generated"]))

    def forget(self, rows: pd.Index) -> None:
        """Leave out rows of `earlier`, which are to be measured again."""
        self.store.forget(set(rows))

    def commit(self, name: str = "", step: int = 0, total: WeightDelta | None = None) -> None:
        """Now and then, write all rows, and of a sequence what it needs to go on after `step` edits."""
        if not self.store.due():
            return
        kept = self.state(name, step)
        written = total is None or self.written(kept, lambda path: total.save(path, keys=True))
        if not (written and self.store.commit()):
            self.warn(f"{self.folder} cannot be written to (is the disk full?); what is measured stays in memory")
            return
        for path in kept.parent.glob("*"):
            if path != kept:
                path.unlink()

    @staticmethod
    def written(path: Path, write: Callable[[Path], object]) -> bool:
        """Let `write` make a file in a folder of the run's; whether that could be done."""
        try:
            path.parent.mkdir(exist_ok=True)
            write(path)
        except (OSError, SafetensorError):
            return False
        return True

    def state(self, name: str, step: int) -> Path:
        """Where `commit` keeps a sequence. Once the next one is under way, it is no longer needed, and gone."""
        return self.folder / "state" / f"{name}-{step}.safetensors"

    def ask_unedited(self, probes: Sequence[Probe]) -> list[Row]:
        """`probes.ask` of the unedited model, or what it answered in an earlier run."""
        return remembered(self.cache, self.protocol, probes, lambda: ask(self.lm, probes))

    def general(self, unedited: bool = False) -> Iterator[Row]:
        """Rows of general ability: those of every regression suite on the model as it is, `suite` with its name in them.

        What the `unedited` model gave in an earlier run is not asked again.
        """
        for name, suite in self.regression.items():
            ask = partial(suite, self.lm)
            rows = remembered(self.cache, self.protocol, [name, suite.fingerprint], ask) if unedited else ask()
            yield from (row | {"suite": name} for row in rows)

    def rows(self, task: str = "") -> pd.DataFrame:
        """The rows of a task, by default of the one that is running, as analysis takes them."""
        frame = self.store.frame()
        return regular(frame[frame.task == (task or self.task)])

    def warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def table(
        self,
        frame: pd.DataFrame,
        title: str,
        hidden: Sequence[str] = (),
        name: str = "",
        printed: pd.DataFrame | None = None,
    ) -> None:
        """Keep a frame as CSV beside the rows, named as the task, and print it (or `printed`) without its `hidden` columns."""
        self.keep(frame, name or self.task)
        if self.brief:
            return
        tables.show(self.console, frame if printed is None else printed, title, hidden)

    def keep(self, frame: pd.DataFrame, name: str) -> None:
        """Keep a frame as CSV beside the rows."""
        if not self.store.ledger.write(f"{name}.csv", lambda path: frame.to_csv(path, index=False)):
            self.warn(f"{name}.csv could not be written (is the disk full?); qfbench-results makes it of the rows")
        self.tracker.table(name, frame)

    def figure(self, figure: Figure, name: str) -> None:
        path = self.folder / "figures" / name
        if not all(
            self.written(path.with_suffix(ending), lambda file: figure.savefig(file, dpi=150))
            for ending in (".png", ".pdf")
        ):
            self.warn(f"the figure {name} could not be written (is the disk full?)")
            return
        self.tracker.figure(name, path.with_suffix(".png"))
        if not self.brief:
            self.console.print(f"figure: [bold]{escape(os.path.relpath(path))}.png[/bold]", soft_wrap=True)

    def save(self, delta: WeightDelta, name: str) -> None:
        """Keep a change of weights.

        Raises:
            UserError: it cannot be written, and would be lost if the run went on.
        """
        path = self.folder / "deltas" / f"{name}.safetensors"
        if not self.written(path, delta.save):
            raise UserError(f"{path} cannot be written (is the disk full?); start again once there is room")
        lost = delta.rounding_loss(self.lm)
        if lost > 1e-3:
            self.warn(f"{name}: written in {self.lm.dtype}, {lost:.1%} of the change is lost to rounding")

    def health(self, delta: WeightDelta, whole: bool = True) -> dict[str, float]:
        """Columns of a row about the change itself.

        `relative_norm` (‖ΔW‖_F / ‖W‖_F over the changed weights), `overlap` (`WeightDelta.overlap`), what the editor noted, as
        `solve_...`, and if `whole`, which costs more, `rounding_loss` (the share of ΔW lost when written in the model's dtype) and `top` (the largest singular
        value of ΔW over ‖W‖_F).
        """
        parameters = dict(self.lm.model.named_parameters())
        size = sum(parameters[name].float().norm().item() ** 2 for name in delta.changes) ** 0.5
        health = {"relative_norm": delta.norm() / size if size else 0.0, "overlap": delta.overlap()}
        if whole:
            top = max((change.top() for change in delta.changes.values()), default=0.0)
            health |= {"rounding_loss": delta.rounding_loss(self.lm), "top": top / size if size else 0.0}
        return health | {f"solve_{name}": value for name, value in delta.notes.items()}

    @contextmanager
    def progress(self, total: int) -> Iterator[Advance]:
        """A progress bar over `total` units of work; call what it gives after some of them, with what is being done.

        Where there is no terminal (the log of a Slurm job) it is a line at most every `EVERY` seconds.
        """
        if not self.console.is_terminal:
            yield self._lines(total)
            return
        columns = (
            TextColumn("{task.description:32}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text, work=1, before=False: bar.update(task, advance=work, description=text)

    def _lines(self, total: int) -> Advance:
        start = said = time.monotonic()
        done = earlier = 0

        def advance(text: str, work: int = 1, before: bool = False) -> None:
            nonlocal said, done, earlier
            done, earlier = done + work, earlier + before * work
            if before or time.monotonic() - said < EVERY:
                return
            said = time.monotonic()
            minutes = (said - start) * (total - done) / (done - earlier) / 60
            self.console.print(
                f"{self.task}: {done / total:.0%} done, about {minutes:.0f} minutes left ({text})",
                markup=False,
                highlight=False,
            )

        return advance


_LOADED: dict[str, tuple[LanguageModel, str]] = {}  # with the hash of its weights


def load(model: Mapping[str, Any]) -> LanguageModel:
    """The model that a group `model` describes; what it says for editors does not matter here.

    The jobs of a sweep that run in one process share it: as many stay loaded as a run needs beside each other.
    """
    how = {name: model[name] for name in LOADED if name in model}
    key = json.dumps([model["path"], how], default=str)
    if key not in _LOADED:
        while len(_LOADED) >= (1 if torch.cuda.is_available() else 2):
            _LOADED.pop(next(iter(_LOADED)))
        lm = LanguageModel.load(model["path"], **how)
        _LOADED[key] = lm, lm.weights_hash()
    lm, weights = _LOADED[key]
    if lm.weights_hash() != weights:
        raise RuntimeError(f"{lm.name}: an earlier job did not put the weights back; please report this")
    return lm
