"""Trackers: Weights & Biases and TensorBoard, neither imported unless it is asked for."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.image import imread

from qfbench.analysis.catalogue import MEASURES
from qfbench.errors import UserError
from qfbench.runs.tracking import About


def needed(module: str, package: str) -> Any:
    """Import what a tracker shows runs with, which not every installation has."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"tracker={package} needs {package}: pip install 'qfbench[{package}]'") from error


def headlines(frame: pd.DataFrame) -> dict[str, float]:
    """The measures of each edited line of a table of results, by `EDITOR REGIME/MEASURE`; nothing of other tables, nor of
    differences."""
    if not {"editor", "regime"} <= set(frame) or "editor_of" in frame:
        return {}
    lines = frame[~frame.regime.astype(str).str.contains("unedited|in_context|placebo")]
    if lines.duplicated(["editor", "regime"]).any():
        return {}
    by = {f"{line.editor} {line.regime}": line for _, line in lines.iterrows()}
    return {
        f"{who}/{name}": float(line[name]) for who, line in by.items() for name in MEASURES if pd.notna(line.get(name))
    }


class WandB:
    """Weights & Biases. Online where one is logged in, else offline: its files are then in the run's folder, for `wandb sync`."""

    def __init__(
        self,
        project: str = "qfbench",
        entity: str | None = None,
        mode: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        placebo: bool = False,
    ) -> None:
        self.wandb = needed("wandb", "wandb")
        self.placebo = placebo
        self.project, self.entity, self.mode, self.group, self.tags = project, entity, mode, group, tags

    def start(self, about: About) -> str:
        wandb, mode = self.wandb, self.mode or os.environ.get("WANDB_MODE")
        wandb.setup(settings=wandb.Settings(silent=True))
        if not mode:
            mode = None if wandb.login(prompt=False, verify=False) else "offline"
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group or about.sweep,
            job_type=about.experiment,
            name=about.run_id,
            id=re.sub(r"[^\w.-]", "-", about.run_id, flags=re.ASCII)[-128:],
            tags=[tag[:64] for tag in (*about.tags, *self.tags)],
            config=dict(about.config),
            dir=about.folder,
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30, finish_timeout=120, finish_timeout_raises=True
            ),
        )
        self.run.define_metric("edit_step")
        self.run.define_metric("*", step_metric="edit_step")
        if self.run.offline:
            path = os.path.relpath(Path(self.run.dir).parent)
            return f"wandb: offline; `wandb sync {shlex.quote(path)}` uploads it"
        return f"wandb: {self.run.url or 'disabled'}"

    def log(self, values: Mapping[str, float], edit_step: int) -> None:
        shown = {
            name: value for name, value in values.items() if self.placebo or "placebo" not in name.partition("/")[0]
        }
        if shown:
            self.run.log({"edit_step": edit_step, **shown})

    def figure(self, name: str, path: Path) -> None:
        self.run.log({f"figures/{name}": self.wandb.Image(str(path))})

    def table(self, name: str, frame: pd.DataFrame) -> None:
        self.run.log({f"tables/{name}": self.wandb.Table(dataframe=frame, allow_mixed_types=True)})
        self.run.summary.update(headlines(frame))

    def close(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self) -> None:
        self.writers = needed("torch.utils.tensorboard", "tensorboard")

    def start(self, about: About) -> str:
        self.writer = self.writers.SummaryWriter(str(about.folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(about.config, indent=2)}\n```")
        return f"tensorboard --logdir {shlex.quote(os.path.relpath(about.folder))}"

    def log(self, values: Mapping[str, float], edit_step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, edit_step)

    def figure(self, name: str, path: Path) -> None:
        self.writer.add_image(f"figures/{name}", imread(path), dataformats="HWC")

    def table(self, name: str, frame: pd.DataFrame) -> None:
        lines = [list(frame), ["---"] * frame.shape[1], *frame.astype(str).values.tolist()]
        cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
        self.writer.add_text(f"tables/{name}", "\n".join(f"| {' | '.join(line)} |" for line in cells))

    def close(self, ok: bool) -> None:
        self.writer.close()
