"""Checkpoints of a training run: parameters and optimizer state in one safetensors file, replaced atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfbench.errors import UserError


def save(
    path: Path, parameters: Mapping[str, Tensor], opts: Sequence[torch.optim.Optimizer], step: int, recipe: str
) -> None:
    """Write the run as it stands after `step` steps. `recipe` says what the run is, so that no other one continues it."""
    tensors = {f"model.{n}": p.detach() for n, p in parameters.items()}
    for o, opt in enumerate(opts):
        for i, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{o}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"step": str(step), "recipe": recipe})
    part.replace(path)


def step_of(path: Path, recipe: str) -> int:
    """How many steps the run at `path` has done: 0 where there is none.

    Raises:
        UserError: it is another run.
    """
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    if meta["recipe"] != recipe:
        raise UserError(f"{path} was written by another recipe; give another folder, or delete it to start afresh")
    return int(meta["step"])


def restore(path: Path, parameters: Mapping[str, Tensor], opts: Sequence[torch.optim.Optimizer]) -> None:
    """Put back what `save` wrote."""
    tensors = load_file(path)
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
