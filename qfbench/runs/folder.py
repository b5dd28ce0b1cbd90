"""A run's folder: what it is called, whether a run may work in it, and what it holds."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from qfbench.analysis import tables
from qfbench.errors import UserError
from qfbench.facts import Fact
from qfbench.runs.identity import identity
from qfbench.runs.ledger import FILE as LEDGER
from qfbench.runs.ledger import MADE_OF, Ledger
from qfbench.runs.provenance import SAME, suite_hash
from qfbench.runs.store import read_progress

log = logging.getLogger(__name__)


def check_folder(cfg: DictConfig, folder: Path, facts: Sequence[Fact]) -> str:
    """Refuse a folder that holds another run, or one of other facts; empty it for `rerun`, and where a file of it is damaged.

    Returns what is damaged, in words; the files are kept beside, as `NAME.damaged`.
    """
    if cfg.rerun:
        _empty(folder)
        return ""
    config, elsewhere = folder / "config.yaml", "give another hydra.run.dir, or rerun=true to measure this one anew"
    damaged = Ledger(folder).damaged(*MADE_OF)
    if "config.yaml" in damaged and config.exists():
        raise UserError(f"{config}: is damaged, so that nobody knows what was measured there; {elsewhere}")
    if (folder / "rows.parquet").exists() and not (config.exists() and identity(config) == identity(cfg)):
        raise UserError(f"{folder} holds a run with other settings (config.yaml); {elsewhere}")
    if damaged or not _consistent(folder):
        for name in MADE_OF[1:]:
            if (folder / name).exists():
                (folder / name).replace(folder / f"{name}.damaged")
        _empty(folder, keep=("checkpoint.safetensors",))
        return ", ".join(damaged or MADE_OF[2:])
    known = recorded(folder)
    if known and known.get("suite_hash") != suite_hash(facts):
        raise UserError(f"{folder} holds a run of other facts (the file has changed since?); {elsewhere}")
    return ""


def _consistent(folder: Path) -> bool:
    """Whether there are as many rows as the run says it has measured."""
    path, progress = folder / "rows.parquet", read_progress(folder)
    return progress["rows"] <= (pyarrow.parquet.read_metadata(path).num_rows if path.exists() else 0)


def _empty(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what a run left in its folder: the checksums last, for what they do not know counts as damaged."""
    last = ("config.yaml", LEDGER)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in ("figures", "deltas", "state", "study"):
            shutil.rmtree(path)
        elif path.name in {"checkpoint.safetensors", *MADE_OF} - {*last, *keep} or path.suffix == ".csv":
            path.unlink()
    for name in last:
        (folder / name).unlink(missing_ok=True)


def check_same(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuse to go on with a model other than the one the run began with."""
    before = recorded(folder)
    if not before or not (folder / "progress.json").exists():
        return
    for name in SAME:
        if before.get(name) != known[name]:
            why = (
                " (its chat template puts in a date, and the run began on another day)" if name == "prompt_hash" else ""
            )
            raise UserError(f"{folder} holds a run with another {name}{why}; rerun=true measures it anew")
    for name in ("versions", "torch", "transformers", "device_name", "git_commit"):
        if before.get(name) != known[name]:
            log.warning("%s: %s changed since the run began: %s, now %s", folder, name, before.get(name), known[name])


def check_questions(folder: Path, asked: Mapping[str, str]) -> None:
    """Refuse to go on with other texts or questions than the run began with; `asked` is the fingerprint of each suite."""
    before = recorded(folder).get("regression", {}) if (folder / "progress.json").exists() else {}
    for name, fingerprint in asked.items():
        if before.get(name, fingerprint) != fingerprint:
            raise UserError(f"{folder} holds a run with another {name} (regression); rerun=true measures it anew")


def recorded(folder: Path) -> dict[str, Any]:
    """A run's provenance; empty where there is none yet."""
    path = folder / "provenance.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); rerun=true measures all anew") from error
    if not isinstance(known, dict):
        raise UserError(f"{path}: must be an object; rerun=true measures all anew")
    return known


def show(folder: Path, console: Console, brief: bool) -> None:
    """Print the tables of a finished run."""
    ledger = Ledger(folder)
    for path in [] if brief else sorted(folder.glob("*.csv")):
        if ledger.damaged(path.name):
            console.print(
                f"[yellow]{escape(path.name)} is not as the run wrote it; qfbench-results makes it of the rows[/yellow]"
            )
        else:
            tables.show(console, pd.read_csv(path), path.stem, tables.HIDDEN)
    where = os.path.relpath(folder)
    console.print(f"measured already: [bold]{escape(where)}[/bold]; rerun=true measures it anew", soft_wrap=True)


def contents(folder: Path) -> str:
    """What a run's folder holds, in one line."""
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (".lock", "progress.json", LEDGER))
    for name in ("figures", "deltas"):
        held = sorted((folder / name).glob("*"))
        files += [f"{name}/{held[0].name}"] if len(held) == 1 else [f"{name}/ ({len(held)} files)"] if held else []
    return ", ".join(files)
