"""A run: load the model, do the tasks of a configuration, keep everything in one folder."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from qfbench.analysis import tables
from qfbench.commands.settings import build, check
from qfbench.errors import Unsupported, UserError
from qfbench.facts import Fact
from qfbench.facts.probes import check_lengths
from qfbench.models import sites
from qfbench.runs.folder import check_folder, check_questions, check_same, contents, recorded, show
from qfbench.runs.provenance import protocol, provenance
from qfbench.runs.store import ParquetStore, alone
from qfbench.runs.tracking import About, Mirror
from qfbench.tasks import run as context
from qfbench.tasks.run import Run


def execute(cfg: DictConfig, folder: Path, console: Console | None = None, brief: bool = False) -> Run | None:
    """Run one resolved configuration into `folder`, or go on where an earlier process stopped; None if all is done already.

    `brief` prints no tables.

    Raises:
        UserError: bad input, or another process works in the folder; what had been measured by then is on disk.
    """
    console = console or tables.console()
    check(cfg)
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    editor, facts, mirror = build(cfg, "editor"), build(cfg, "facts"), Mirror(build(cfg, "tracker"), console)
    with alone(folder):
        lm = context.load(cfg.model)
        editor.check(lm)  # what cannot be edited, or asked, is refused before anything is touched
        check_lengths(lm, facts)
        tasks = build(cfg, "task")
        regression = build(cfg, "regression") if cfg.rerun else {}  # elsewhere later: a finished run needs none
        store = opened(cfg, folder, facts, mirror, console)
        cache = None if cfg.cache is None else Path(cfg.cache)
        run = Run(
            lm, editor, facts, folder, store, console, protocol=protocol(lm), cache=cache, tracker=mirror, brief=brief
        )
        if OmegaConf.is_interpolation(cfg.model, "layer") and editor.about.get("layer") == cfg.model.layer:
            depth = len(sites.layers(lm.model))
            console.print(f"layer {cfg.model.layer} of {depth}, since none was given; editor.layer=... chooses another")
        known = provenance(cfg.seed, run.protocol, facts, sys.argv[1:])
        check_same(folder, known)
        if store.finished:
            show(folder, console, brief)
            return None
        run = replace(run, regression=regression or build(cfg, "regression"))
        known["overrides"] = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        known["regression"] = {name: suite.fingerprint for name, suite in run.regression.items()}
        begin(run, cfg, known)
        with mirror.of(about(run, cfg, known)):
            run = done(run, tasks)
    shutil.rmtree(folder / "state", ignore_errors=True)
    console.print(f"wrote [bold]{named(folder)}[/bold]: {escape(contents(folder))}", soft_wrap=True)
    return run


def opened(cfg: DictConfig, folder: Path, facts: Sequence[Fact], mirror: Mirror, console: Console) -> ParquetStore:
    """The rows of a folder that is this run's, or empty; what is damaged in it is said, and put aside."""
    damaged = check_folder(cfg, folder, facts)
    if damaged:
        text = f"{folder}: damaged: {damaged}; kept as NAME.damaged, and measured again"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return ParquetStore(folder, cfg.commit_seconds, mirror.rows)


def begin(run: Run, cfg: DictConfig, known: Mapping[str, Any]) -> None:
    """Write down what is to be measured, and how; `known` is its provenance.

    Raises:
        UserError: the run began with other questions, or its folder cannot be written to.
    """
    check_questions(run.folder, known["regression"])
    ledger, earlier = run.store.ledger, run.store.earlier
    if not (
        ledger.write_text("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        and ledger.write_json("provenance.json", {**recorded(run.folder), **known})
    ):
        raise UserError(f"{run.folder} cannot be written to (disk full, or read-only?)")
    if len(earlier):
        run.console.print(f"going on in [bold]{named(run.folder)}[/bold] after {len(earlier)} rows", soft_wrap=True)


def done(run: Run, tasks: Mapping[str, Callable[[Run], None]]) -> Run:
    """The run after its tasks: those that an earlier process finished are not done again. All rows are on disk, come what may.

    Raises:
        Unsupported: a task measured nothing.
        UserError: the folder cannot be written to.
    """
    store = run.store
    try:
        for name, task in tasks.items():
            run = replace(run, task=name)
            if name not in store.tasks:
                task(run)
                refuse_hollow(run)
                store.commit(name)
        if not store.commit(finished=True):
            raise UserError(f"{run.folder} cannot be written to (disk full?); start again once there is room")
    finally:
        if not store.flush():
            run.console.print(f"all rows are in {store.rescue()}", style="yellow", markup=False, soft_wrap=True)
        run.tracker.replies(store.frame())
    return run


def named(folder: Path) -> str:
    """A folder as a console shows it."""
    return escape(os.path.relpath(folder))


def refuse_hollow(run: Run) -> None:
    """A task that was to edit, and could not under any regime or at any layer, has measured nothing.

    Raises:
        Unsupported: saying why.
    """
    rows = run.rows()
    if "condition" in rows and "edited" not in set(rows.condition) and "unsupported" in set(rows.condition):
        reasons = rows.reply[rows.condition == "unsupported"].unique()
        raise Unsupported(f"{run.task} measured nothing: {'; '.join(reasons)}")


def about(run: Run, cfg: DictConfig, known: Mapping[str, Any]) -> About:
    """What a tracker is told of a run; `known` is its provenance."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return About(
        run_id=run.run_id,
        folder=run.folder,
        config=config | {"provenance": known},
        usual={
            "model": run.lm.name,
            "editor": run.editor_name,
            "condition": "edited",
        }
        | run.editor.about,
        tags=[Path(run.lm.name).name, run.editor_name, cfg.facts._target_.rpartition(".")[2]],
        experiment=job.runtime.choices["experiment"] if job else None,
        sweep=Path(job.sweep.dir).name if job and job.mode == RunMode.MULTIRUN else None,
    )
