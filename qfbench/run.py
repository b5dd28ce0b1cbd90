"""The command `qfbench`: compose a configuration, load the model, run the tasks, keep everything in one folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from qfbench import tables
from qfbench.cache import remembered
from qfbench.delta import WeightDelta
from qfbench.editors import Editor
from qfbench.errors import UserError
from qfbench.facts import Fact, Probe
from qfbench.folder import check_folder, check_questions, check_same, contents, name_of, recorded, show
from qfbench.lm import LanguageModel
from qfbench.probes import Row, ask
from qfbench.provenance import SAME, protocol, provenance
from qfbench.regression import Suite
from qfbench.results import retention
from qfbench.store import ParquetStore, alone, write_json, write_text
from qfbench.tracking import About, Mirror

PACKAGE = Path(__file__).parent
# Of a model's settings, those that say how it is loaded.
LOADED = ("device", "dtype", "batch_size", "max_new_tokens", "firing", "plain")
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # wheel, or repository


@dataclass
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
        return f"{self.lm.name}, {self.editor_name} at layer {self.editor.site.layer}"

    def elsewhere(self, model: Mapping[str, Any], editor: Editor, name: str = "") -> Run:
        """The same run with another model and editor; rows and files go where this one's go.

        Where both are called as this run's own are (another layer, say), `name` is added to the editor's.
        """
        lm = load(model)
        there = replace(self, lm=lm, editor=editor, protocol=protocol(lm))
        if (there.lm.name, there.editor_name) == (self.lm.name, self.editor_name):
            there.label = f"{there.editor_name} {name}"
        known = recorded(self.folder)
        beside = known.setdefault("models_beside", {})
        before = beside.get(lm.name, {})
        if len(self.store.earlier) and any(before.get(n) != there.protocol[n] for n in SAME if n in before):
            raise UserError(f"{self.folder} holds a run with another {lm.name}; rerun=true measures it anew")
        beside[lm.name] = dict(there.protocol)
        write_json(self.folder / "provenance.json", known)
        return there

    def beside(self, entries: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """This run, and for each entry the same with its `model` and `editor`, all of them called differently."""
        runs = [self]
        for name, entry in entries.items():
            there = self.elsewhere(entry["model"], entry["editor"], name)
            if (there.lm.name, there.editor_name) in [(r.lm.name, r.editor_name) for r in runs]:
                there.label = f"{there.editor_name} {name}"
            runs.append(there)
        return runs

    def log(self, row: Mapping[str, Any], **more: Any) -> None:
        same = {"run_id": self.run_id, "task": self.task}
        self.store.log(same | {"model": self.lm.name, "editor": self.editor_name} | more | dict(row))

    def earlier(self, **about: Any) -> pd.DataFrame:
        """The rows that an earlier process measured of this task, model and editor, and of what they are `about`."""
        rows = self.store.earlier
        for name, value in ({"task": self.task, "model": self.lm.name, "editor": self.editor_name} | about).items():
            rows = rows[rows[name] == value] if name in rows else rows[:0]
        return rows.reindex(columns=rows.columns.union(["condition", "draw", "step", "kind", "generated"]))

    def commit(self, name: str = "", step: int = 0, total: WeightDelta | None = None) -> None:
        """Now and then, write all rows, and of a sequence what it needs to go on after `step` edits."""
        if not self.store.due():
            return
        kept, written = self.state(name, step), True
        if total is not None:
            kept.parent.mkdir(exist_ok=True)
            try:
                part = kept.with_suffix(".part")
                total.save(part, keys=True)
                part.replace(kept)
            except (OSError, SafetensorError):
                written = False
        if not (written and self.store.commit()):
            self.warn(f"{self.folder} cannot be written to (is the disk full?); what is measured stays in memory")
            return
        for path in kept.parent.glob("*"):
            if path != kept:
                path.unlink()

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
        """The rows of a task, by default of the one that is running."""
        frame = self.store.frame()
        return frame[frame.task == (task or self.task)]

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]{text}[/yellow]")

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
        self.console.print(tables.laid_out(frame if printed is None else printed, title, hidden))

    def keep(self, frame: pd.DataFrame, name: str) -> None:
        """Keep a frame as CSV beside the rows."""
        frame.to_csv(self.folder / f"{name}.csv", index=False)
        self.tracker.table(name, frame)

    def figure(self, figure: Figure, name: str) -> None:
        (self.folder / "figures").mkdir(exist_ok=True)
        path = self.folder / "figures" / name
        for ending in (".png", ".pdf"):
            figure.savefig(path.with_suffix(ending), dpi=150)
        self.tracker.figure(name, path.with_suffix(".png"))
        if not self.brief:
            self.console.print(f"figure: [bold]{os.path.relpath(path)}.png[/bold]", soft_wrap=True)

    def save(self, delta: WeightDelta, name: str) -> None:
        (self.folder / "deltas").mkdir(exist_ok=True)
        delta.save(self.folder / "deltas" / f"{name}.safetensors")
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
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar; call what it gives after each unit of work, with what is being done."""
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)


def execute(cfg: DictConfig, folder: Path, console: Console | None = None, brief: bool = False) -> Run | None:
    """Run one resolved configuration into `folder`, or go on where an earlier process stopped; None if all is done already.

    `brief` prints no tables.

    Raises:
        UserError: bad input, or another process works in the folder; what had been measured by then is on disk.
    """
    console = console or tables.console()
    for name in ("seed", "threads"):
        if not isinstance(cfg[name], int) or cfg[name] < 0:
            raise UserError(f"{name}={cfg[name]}: must be a whole number, 0 or more")
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    editor, facts, mirror = build(cfg, "editor"), build(cfg, "facts"), Mirror(build(cfg, "tracker"), console)
    with alone(folder):
        check_folder(cfg, folder, facts)
        store = ParquetStore(folder, cfg.commit_seconds, mirror.rows)
        lm = load(cfg.model)
        editor.site.block(lm.model)  # an unknown layer is found before anything is computed
        how = protocol(lm)
        known = provenance(cfg.seed, how, facts)
        check_same(folder, known)
        if store.finished:
            show(folder, console, brief)
            return None
        regression = build(cfg, "regression")
        known["regression"] = {name: suite.fingerprint for name, suite in regression.items()}
        check_questions(folder, known["regression"])
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        write_json(folder / "provenance.json", recorded(folder) | known)
        run = Run(lm, editor, facts, folder, store, console, tracker=mirror)
        run.regression, run.protocol = regression, how
        run.brief = brief
        run.cache = None if cfg.cache is None else Path(cfg.cache)
        if len(store.earlier):
            console.print(f"going on in [bold]{os.path.relpath(folder)}[/bold] after {len(store.earlier)} rows")
        with mirror.of(about(run, cfg, known)):
            try:
                for run.task, task in build(cfg, "task").items():
                    if run.task not in store.tasks:
                        task(run)
                        store.commit(run.task)
                if not store.commit(finished=True):
                    raise UserError(f"{folder} cannot be written to (disk full?); start again once there is room")
            finally:
                if not store.flush():
                    console.print(f"[yellow]all rows are in {store.rescue()}[/yellow]", soft_wrap=True)
                mirror.replies(store.frame())
    shutil.rmtree(folder / "state", ignore_errors=True)
    console.print(f"wrote [bold]{os.path.relpath(folder)}[/bold]: {contents(folder)}", soft_wrap=True)
    return run


def about(run: Run, cfg: DictConfig, known: Mapping[str, Any]) -> About:
    """What a tracker is told of a run; `known` is its provenance."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return About(
        run_id=run.run_id,
        folder=run.folder,
        config=config | {"provenance": known},
        usual={"model": run.lm.name, "editor": run.editor_name, "layer": run.editor.site.layer, "condition": "edited"},
        tags=[Path(run.lm.name).name, run.editor_name, cfg.facts._target_.rpartition(".")[2]],
        experiment=job.runtime.choices["experiment"] if job else None,
        sweep=Path(job.sweep.dir).name if job and job.mode == RunMode.MULTIRUN else None,
    )


_LOADED: dict[str, tuple[LanguageModel, str]] = {}  # with the hash of its weights


def load(model: Mapping[str, Any]) -> LanguageModel:
    """The model that a group `model` describes; what it says for editors does not matter here.

    The jobs of a sweep that run in one process share it: as many stay loaded as a run needs beside each other.
    """
    how = {name: model[name] for name in LOADED}
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


def build(cfg: DictConfig, group: str) -> Any:
    """Instantiate one group of the configuration.

    Raises:
        UserError: a value is missing, anywhere, or does not suit its target.
    """
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    missing = sorted(OmegaConf.missing_keys(own), key=len)  # the key itself before those that refer to it
    if missing:
        raise UserError(f"{missing[0]} is needed: give {missing[0]}=...")
    try:
        return instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{group}: {error.__cause__ or error}") from error


OmegaConf.register_new_resolver("run_name", name_of, replace=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    """One run; for a search its value, also of a run that was finished before."""
    job = HydraConfig.get()
    folder, swept = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    try:
        execute(cfg, folder, brief=swept)
        return None if cfg.objective is None else float(build(cfg, "objective")(retention(folder)))
    except (UserError, FloatingPointError) as error:
        if swept and cfg.objective is not None and isinstance(error, FloatingPointError):
            print(f"qfbench: {error}; this trial counts 0", file=sys.stderr)
            return 0.0
        if swept:
            # The other jobs go on, and Hydra reports this one after them; a search ends, for its settings are to be mended.
            raise CompactHydraException(f"qfbench: {error}") from None
        print(f"qfbench: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    _hydra_main()


if __name__ == "__main__":
    main()
