"""What a run's numbers may depend on, of all its settings: two runs are the same where this is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Settings on which no number depends.
NOT_MEASURED = ("hydra", "cache", "rerun", "commit_seconds", "tracker", "objective", "study")


def identity(source: DictConfig | Path) -> str:
    """What a run's numbers may depend on, of its configuration or of the file that keeps it."""
    cfg = OmegaConf.load(source) if isinstance(source, Path) else source
    assert isinstance(cfg, DictConfig)
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_MEASURED])
    return OmegaConf.to_yaml(OmegaConf.create(placeless(OmegaConf.to_container(own, resolve=True))), sort_keys=True)


def placeless(values: Any) -> Any:
    """The same settings, with objects of qfbench called by their names alone: in which of its modules they stand changes no number."""
    if isinstance(values, list):
        return [placeless(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: value.rpartition(".")[2] if key == "_target_" and str(value).startswith("qfbench.") else placeless(value)
        for key, value in values.items()
    }
