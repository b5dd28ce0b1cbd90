"""Checkpoints of a training run: parameters and optimizer state in one safetensors file, replaced atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qfbench.errors import UserError
from qfbench.models import sealed


def save(
    path: Path, parameters: Mapping[str, Tensor], opts: Sequence[torch.optim.Optimizer], step: int, recipe: str
) -> None:
    """Write the run as it stands after `step` steps. `recipe` says what the run is, so that no other one continues it."""
    tensors = {f"model.{n}": p for n, p in parameters.items()}
    for o, opt in enumerate(opts):
        for i, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{o}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    sealed.save(tensors, path, {"step": str(step), "recipe": recipe})


def step_of(path: Path, recipe: str) -> int:
    """How many steps the run at `path` has done: 0 where there is none.

    Raises:
        UserError: it is another run, or the file is damaged.
    """
    if not path.exists():
        return 0
    meta = _read(path)[1]
    if meta.get("recipe") != recipe:
        raise UserError(f"{path} was written by another recipe; give another folder, or delete it to start afresh")
    return int(meta["step"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return sealed.load(path)
    except UserError as error:
        raise UserError(f"{error}; delete it to start afresh") from error


def restore(path: Path, parameters: Mapping[str, Tensor], opts: Sequence[torch.optim.Optimizer]) -> None:
    """Put back what `save` wrote."""
    tensors, _ = _read(path)
    for n, p in parameters.items():
        p.data.copy_(tensors[f"model.{n}"])
    for o, opt in enumerate(opts):
        saved = opt.state_dict()
        saved["state"] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{o}."):
                i, field = key.split(".")[2:]
                saved["state"].setdefault(int(i), {})[field] = value
        opt.load_state_dict(saved)
