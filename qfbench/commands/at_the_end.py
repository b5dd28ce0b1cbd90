"""What Hydra calls at the end of a run, or of a sweep: the study of its runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qfbench.analysis.tables import console
from qfbench.pages import results
from qfbench.pages.study import Study


class AtTheEnd(Callback):
    """Hydra's hook behind a run, or all of a multirun: the study of them, in the folder `study` of the run or beside the runs.

    Runs of earlier sweeps belong to it if they differ only in what is swept. A study of one run may be None.
    """

    def __init__(self, study: Callable[[pd.DataFrame], Study | None]) -> None:
        self.study = study

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir)
        if (folder / "retention.csv").exists() and (study := self.study(results.retention(folder))):
            study.save(folder / "study", console())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if "params" not in config.hydra.sweeper:  # experiment=study sees to its own
            return
        folder, out = Path(config.hydra.sweep.dir), console()
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {*(config.hydra.sweeper.params or {}), *(one.key_or_group for one in given if one.is_sweep_override())}
        base = _others(config.hydra.overrides.task, swept)
        runs = [path.parent for path in sorted(folder.glob("*/retention.csv"))]
        runs = [run for run in runs if _others(_overrides(run), swept) == base]
        if not runs:
            if any(folder.glob("*/retention.csv")):
                out.print(f"no study: no run in {folder} has the settings of this sweep", markup=False, soft_wrap=True)
            return
        other = sorted(one for one in base if not one.startswith("experiment="))
        if study := self.study(results.retention(*runs)):
            study.save(folder / "_".join(["study", *map(_plain, other)]), out, runs)


def _overrides(folder: Path) -> list[str]:
    return list(results.provenance_of(folder).get("overrides", []))


def _others(overrides: list[str], swept: set[str]) -> set[str]:
    """Overrides but those of `swept`; a deletion ("~x") is kept by Hydra as "~x=null"."""
    return {one.removesuffix("=null").replace(" ", "") for one in overrides if one.split("=")[0] not in swept}


def _plain(override: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", override)
