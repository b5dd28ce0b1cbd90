"""A run: load the model, do the tasks of a configuration, keep everything in one folder."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Mapping
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
        where, damaged = escape(os.path.relpath(folder)), check_folder(cfg, folder, facts)
        if damaged:
            text = f"{folder}: damaged: {damaged}; kept as NAME.damaged, and measured again"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        store = ParquetStore(folder, cfg.commit_seconds, mirror.rows)
        if OmegaConf.is_interpolation(cfg.model, "layer") and editor.sites[0].layer == cfg.model.layer:
            depth = len(sites.layers(lm.model))
            console.print(
                f"layer {editor.sites[0].layer} of {depth}, since none was given; editor.layer=... chooses another"
            )
        how = protocol(lm)
        known = provenance(cfg.seed, how, facts, sys.argv[1:])
        check_same(folder, known)
        if store.finished:
            show(folder, console, brief)
            return None
        regression = regression or build(cfg, "regression")
        known["overrides"] = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        known["regression"] = {name: suite.fingerprint for name, suite in regression.items()}
        check_questions(folder, known["regression"])
        if not (
            store.ledger.write_text("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            and store.ledger.write_json("provenance.json", recorded(folder) | known)
        ):
            raise UserError(f"{folder} cannot be written to (disk full, or read-only?)")
        run = Run(
            lm,
            editor,
            facts,
            folder,
            store,
            console,
            regression=regression,
            protocol=how,
            cache=None if cfg.cache is None else Path(cfg.cache),
            tracker=mirror,
            brief=brief,
        )
        if len(store.earlier):
            console.print(f"going on in [bold]{where}[/bold] after {len(store.earlier)} rows", soft_wrap=True)
        with mirror.of(about(run, cfg, known)):
            try:
                for name, task in tasks.items():
                    run = replace(run, task=name)
                    if name not in store.tasks:
                        task(run)
                        refuse_hollow(run)
                        store.commit(name)
                if not store.commit(finished=True):
                    raise UserError(f"{folder} cannot be written to (disk full?); start again once there is room")
            finally:
                if not store.flush():
                    console.print(f"all rows are in {store.rescue()}", style="yellow", markup=False, soft_wrap=True)
                mirror.replies(store.frame())
    shutil.rmtree(folder / "state", ignore_errors=True)
    console.print(f"wrote [bold]{where}[/bold]: {escape(contents(folder))}", soft_wrap=True)
    return run


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
            "layer": run.editor.sites[0].layer,
            "condition": "edited",
        },
        tags=[Path(run.lm.name).name, run.editor_name, cfg.facts._target_.rpartition(".")[2]],
        experiment=job.runtime.choices["experiment"] if job else None,
        sweep=Path(job.sweep.dir).name if job and job.mode == RunMode.MULTIRUN else None,
    )
