"""Where a run's numbers come from: model, suite, seed, machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qfbench.digest import hashed
from qfbench.facts import Fact
from qfbench.models.dialogue import undated
from qfbench.models.lm import LanguageModel

# How replies are scored (`probes.ask`); to be raised when that changes, since older runs then compare no more.
PROBES = 3

# What two runs must share before their numbers may be compared.
SAME = (
    "suite_hash",
    "model_hash",
    "config_hash",
    "tokenizer_hash",
    "told",
    "prompt_hash",
    "dtype",
    "batch_size",
    "max_new_tokens",
    "probes",
)


def protocol(lm: LanguageModel) -> dict[str, Any]:
    """What the rows of an unedited model depend on, beside what it is asked."""
    return {
        "model": lm.name,
        "model_hash": lm.weights_hash(),
        "weights": _weights(lm.model.config),
        "config_hash": hashed(
            json.dumps(lm.model.config.to_dict(), sort_keys=True, default=str), str(sorted(lm.stops()))
        ),
        "tokenizer_hash": hashed(lm.tokenizer.backend_tokenizer.to_str(), str(undated(lm.tokenizer.chat_template))),
        "template": lm.template,
        "told": lm.told,
        "preamble": lm.preamble,
        "prompt_hash": prompt_hash(lm),
        "max_new_tokens": lm.max_new_tokens,
        "batch_size": lm.batch_size,
        "device": ", ".join(lm.devices),
        "device_name": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else platform.machine(),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "lm_eval": _version("lm_eval"),
        "probes": PROBES,
    }


def provenance(
    seed: int, known: Mapping[str, Any], facts: Sequence[Fact], command: Sequence[str] = ()
) -> dict[str, Any]:
    """What one needs to know to trust, repeat or compare a run; `known` is the `protocol` of its model."""
    packages = ("qfbench", "tokenizers", "hydra-core", "pandas")
    return dict(known) | {
        "command": list(command),
        "seed": seed,
        "suite_hash": suite_hash(facts),
        "facts": [f.id for f in facts],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git_commit": _commit(),
    }


def _weights(config: Any) -> str | None:
    """What a model's weights were before qfbench wrote them anew (`gguf.folder_of`); None of weights as they were given."""
    was = getattr(config, "dequantized_from", None)
    return was and f"dequantized from {was['type']} (GGUF file of SHA-256 {was['sha256']})"


def prompt_hash(lm: LanguageModel) -> str:
    """Of what a dialogue renders to, with and without an instruction: a template may put in the date, say."""
    said, query, answer = "Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi."
    return hashed(*(repr(lm.render(query, system, answer)) for system in (said, "")))


def suite_hash(facts: Sequence[Fact]) -> str:
    return hashed(*(repr((f, f.probes)) for f in facts))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that qfbench runs from; None for an installed package."""
    package = Path(__file__).parents[1]
    if (package / "conf").is_dir():
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
