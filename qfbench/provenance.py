"""Where a run's numbers come from: model, suite, seed, machine, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qfbench.facts import Fact
from qfbench.lm import LanguageModel


def provenance(seed: int, lm: LanguageModel, facts: Sequence[Fact]) -> dict[str, Any]:
    """What one needs to know to trust, repeat or compare a run."""
    packages = ("qfbench", "torch", "transformers", "tokenizers", "hydra-core", "pandas")
    suite = json.dumps([repr((f, f.probes)) for f in facts])
    return {
        "command": sys.argv[1:],
        "seed": seed,
        "device": str(lm.device),
        "device_name": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else platform.machine(),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": lm.name,
        "model_hash": lm.weights_hash(),
        "suite_hash": hashlib.sha256(suite.encode()).hexdigest()[:16],
        "facts": [f.id for f in facts],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git_commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that qfbench runs from; None for an installed package."""
    package = Path(__file__).parent
    if (package / "conf").is_dir():
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
