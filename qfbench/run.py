"""The command `qfbench`: compose a configuration, load the model, run the tasks, keep everything in one folder."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from qfbench import context, tables
from qfbench.context import Run
from qfbench.errors import UserError
from qfbench.folder import check_folder, check_questions, check_same, contents, name_of, recorded, show
from qfbench.provenance import protocol, provenance
from qfbench.results import retention
from qfbench.store import ParquetStore, alone, write_json, write_text
from qfbench.tracking import About, Mirror

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # wheel, or repository


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
        lm = context.load(cfg.model)
        editor.check(lm)  # what cannot be edited is refused before anything is asked
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
