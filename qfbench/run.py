"""The command `qfbench`: compose a configuration, load the model, run the tasks, keep everything in one folder."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qfbench.delta import WeightDelta
from qfbench.editors import Editor
from qfbench.errors import UserError
from qfbench.facts import Fact
from qfbench.lm import LanguageModel
from qfbench.provenance import provenance
from qfbench.tracking import About, Mirror, ParquetStore

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
    tracker: Mirror = field(default_factory=Mirror)

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
        there = replace(self, lm=load(model), editor=editor)
        if (there.lm.name, there.editor_name) == (self.lm.name, self.editor_name):
            there.label = f"{there.editor_name} {name}"
        path = self.folder / "provenance.json"
        known = json.loads(path.read_text())
        known.setdefault("models_beside", {})[there.lm.name] = there.lm.weights_hash()
        path.write_text(json.dumps(known, indent=2) + "\n")
        return there

    def log(self, row: Mapping[str, Any], **more: Any) -> None:
        same = {"run_id": self.run_id, "task": self.task}
        self.store.log(same | {"model": self.lm.name, "editor": self.editor_name} | more | dict(row))

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
        frame.to_csv(self.folder / f"{name or self.task}.csv", index=False)
        self.tracker.table(name or self.task, frame)
        frame = frame if printed is None else printed
        shown = frame.drop(columns=[column for column in hidden if column in frame])
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
        for name in shown:
            header = "by" if name == "editor" else str(name).replace("_", " ")  # 80 columns are soon full
            table.add_column(header, justify="right" if shown[name].dtype.kind in "fi" else "left")
        for line in shown.itertuples(index=False):
            table.add_row(*map(_cell, shown, line))
        self.console.print(table)

    def figure(self, figure: Figure, name: str) -> None:
        (self.folder / "figures").mkdir(exist_ok=True)
        path = self.folder / "figures" / name
        for ending in (".png", ".pdf"):
            figure.savefig(path.with_suffix(ending), dpi=150)
        self.tracker.figure(name, path.with_suffix(".png"))
        self.console.print(f"figure: [bold]{os.path.relpath(path)}.png[/bold]", soft_wrap=True)

    def save(self, delta: WeightDelta, name: str) -> None:
        (self.folder / "deltas").mkdir(exist_ok=True)
        delta.save(self.folder / "deltas" / f"{name}.safetensors")
        lost = delta.rounding_loss(self.lm)
        if lost > 1e-3:
            self.warn(f"{name}: written in {self.lm.dtype}, {lost:.1%} of the change is lost to rounding")

    def health(self, delta: WeightDelta, whole: bool = True) -> dict[str, float]:
        """Columns of a row about the change itself.

        `relative_norm` (‖ΔW‖_F / ‖W‖_F over the changed weights), what the editor noted, as `solve_...`, and if `whole`, which
        costs more, `rounding_loss` (the share of ΔW lost when written in the model's dtype) and `top` (the largest singular
        value of ΔW over ‖W‖_F).
        """
        parameters = dict(self.lm.model.named_parameters())
        size = sum(parameters[name].float().norm().item() ** 2 for name in delta.changes) ** 0.5
        health = {"relative_norm": delta.norm() / size if size else 0.0}
        if whole:
            top = max((change.top() for change in delta.changes.values()), default=0.0)
            health |= {"rounding_loss": delta.rounding_loss(self.lm), "top": top / size if size else 0.0}
        return health | {f"solve_{name}": value for name, value in delta.notes.items()}

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar; call what it gives after each unit of work, with what is being done."""
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)


def execute(cfg: DictConfig, folder: Path, console: Console | None = None) -> Run:
    """Run one resolved configuration into `folder`.

    Raises:
        UserError: bad input; what had been measured by then is on disk.
    """
    console = console or Console()
    for name in ("seed", "threads"):
        if not isinstance(cfg[name], int) or cfg[name] < 0:
            raise UserError(f"{name}={cfg[name]}: must be a whole number, 0 or more")
    check_folder(cfg, folder)
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    editor, facts, mirror = build(cfg, "editor"), build(cfg, "facts"), Mirror(build(cfg, "tracker"), console)
    lm = load(cfg.model)
    editor.site.block(lm.model)  # an unknown layer is found before anything is computed
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    run = Run(lm, editor, facts, folder, ParquetStore(folder, mirror.rows), console, tracker=mirror)
    known = provenance(cfg.seed, lm, facts)
    (folder / "provenance.json").write_text(json.dumps(known, indent=2) + "\n")
    with mirror.of(about(run, cfg, known)):
        try:
            for run.task, task in build(cfg, "task").items():
                task(run)
        finally:
            run.store.flush()
            mirror.replies(run.store.frame())
    console.print(f"wrote [bold]{os.path.relpath(folder)}[/bold]: {contents(folder)}", soft_wrap=True)
    return run


def about(run: Run, cfg: DictConfig, known: Mapping[str, Any]) -> About:
    """What a tracker is told of a run; `known` is its provenance."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    return About(
        run_id=run.run_id,
        folder=run.folder,
        config=settings(cfg) | {"provenance": known},
        usual={"model": run.lm.name, "editor": run.editor_name, "layer": run.editor.site.layer, "condition": "edited"},
        tags=[Path(run.lm.name).name, run.editor_name, cfg.facts._target_.rpartition(".")[2]],
        experiment=job.runtime.choices["experiment"] if job else None,
        sweep=Path(job.sweep.dir).name if job and job.mode == RunMode.MULTIRUN else None,
    )


def settings(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value] # a mapping gives a dict


def load(model: Mapping[str, Any]) -> LanguageModel:
    """The model that a group `model` describes; what it says for editors does not matter here."""
    return LanguageModel.load(model["path"], **{name: model[name] for name in LOADED})


def check_folder(cfg: DictConfig, folder: Path) -> None:
    """Refuse a folder that holds a run, unless this one continues it (`resume`), which takes the same configuration (but `tracker`)."""
    if not (folder / "rows.parquet").exists():
        return
    if not cfg.resume:
        raise UserError(f"{folder} holds a run already; give another hydra.run.dir, or remove it")
    if settings(OmegaConf.load(folder / "config.yaml")) | {"tracker": None} != settings(cfg) | {"tracker": None}:
        raise UserError(
            f"{folder} holds a run with other settings (config.yaml); give another hydra.run.dir, or remove it"
        )


def contents(folder: Path) -> str:
    """What a run's folder holds, in one line."""
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    for name in ("figures", "deltas"):
        held = sorted((folder / name).glob("*"))
        files += [f"{name}/{held[0].name}"] if len(held) == 1 else [f"{name}/ ({len(held)} files)"] if held else []
    return ", ".join(files)


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
        return instantiate(cfg[group])
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{group}: {error.__cause__ or error}") from error


def _cell(column: object, value: object) -> str:
    """A table's cell: shares with two decimals, rates as they were given."""
    if not isinstance(value, float):
        return str(value)
    return "" if value != value else f"{value:g}" if column == "lr" else f"{value:.2f}"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    try:
        execute(cfg, Path(job.runtime.output_dir))
    except (UserError, FloatingPointError) as error:
        if job.mode == RunMode.MULTIRUN:
            raise  # the other jobs go on; Hydra reports this one after them
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
