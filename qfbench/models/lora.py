"""Changes of weights as LoRA adapters (Hu et al. 2022), in the files of the package peft; peft itself is not needed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfbench.errors import UserError
from qfbench.models.delta import LowRank, WeightDelta

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings that change nothing once an adapter is trained, and those that are read here. Any other must be off.
READ = set("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights".split())
IDLE = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules lora_dropout "
    "layers_to_transform layers_pattern megatron_core qalora_group_size loftq_config eva_config runtime_config".split()
)
# Others (pissa, olora, corda, loftq ...) change the weights of the model that is trained.
INIT = (True, False, None, "gaussian", "eva", "orthogonal")
PAIR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def write(delta: WeightDelta, folder: Path, base: str, rank: int | None = None) -> dict[str, float]:
    """Write an adapter of matrices of at most this rank, by default the rank that each has, in float32.

    Returns the share of each change that is cut off, ‖ΔW − BA‖_F / ‖ΔW‖_F; of all together at "".

    Raises:
        UserError: the rank is no rank, or the folder cannot be written to.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: must be 1 or more")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    cut: dict[str, float] = {}
    lost = 0.0
    for name, change in delta.changes.items():
        module, size = name.removesuffix(".weight"), change.norm()
        near = change.truncated(rank)
        assert near.right is not None
        missing = (change.dense().double() - near.dense()).norm().item()
        lost += missing**2
        cut[name] = missing / size if size else 0.0
        ranks[module] = near.rank
        for letter, factor in (("A", near.right), ("B", near.left)):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.float().contiguous()
    most = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": most,
        "lora_alpha": most,  # the scaling is alpha / r, which is 1
        "rank_pattern": {module: own for module, own in ranks.items() if own != most},
        "alpha_pattern": {module: own for module, own in ranks.items() if own != most},
        "lora_dropout": 0.0,
        "bias": "none",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written to ({error})") from error
    return cut | {"": math.sqrt(lost) / delta.norm() if delta.norm() else 0.0}


def read(folder: Path) -> WeightDelta:
    """The change of weights that a LoRA adapter of linear layers makes.

    Raises:
        UserError: there is no adapter, it cannot be read, or it is of another kind (DoRA, biases, embeddings ...).
    """
    config = _config(folder)
    try:
        tensors = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error}); weights must be safetensors") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = PAIR.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise UserError(f"{folder}: {name} is no LoRA of a linear layer, the only kind that is read here")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    changes = {}
    for module, pair in pairs.items():
        rank = _matching(config.get("rank_pattern"), module, config.get("r"))
        alpha = _matching(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if len(pair) < 2 or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise UserError(f"{folder}: the factors of {module} are not both there, or not of the rank {rank}")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[f"{module}.weight"] = LowRank(pair["B"].double() * scaling, pair["A"].double())
    if not all(torch.isfinite(side).all() for c in changes.values() for side in (c.left, c.right) if side is not None):
        raise UserError(f"{folder}: the adapter holds a NaN or an infinity")
    return WeightDelta(dict(sorted(changes.items())))


def fingerprint(folder: Path) -> str:
    """SHA-256 over the files of an adapter, first 16 hex digits; "" where they cannot be read."""
    try:
        return hashlib.sha256((folder / CONFIG).read_bytes() + (folder / FILE).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error}); give the folder of a LoRA adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder}: the adapter is of the kind {kind}; only LORA is read here")
    on = {key: value for key, value in config.items() if key not in READ | IDLE and value not in (None, False, "none")}
    on = {key: value for key, value in on.items() if value not in ([], {})}
    if config.get("init_lora_weights") not in INIT:
        on["init_lora_weights"] = config["init_lora_weights"]
    if on:
        named = ", ".join(f"{key}={value!r:.60}" for key, value in sorted(on.items()))
        raise UserError(f"{folder}: only plain LoRA is read here, and its {CONFIG} has {named}; merge it with peft")
    return config


def _matching(pattern: Mapping[str, int] | None, module: str, default: Any) -> int | float:
    """What peft takes for a module: the first key of the pattern that its name ends in, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    if not isinstance(default, int | float) or default <= 0:
        raise UserError(f"{module}: its adapter says neither rank nor alpha in numbers above 0")
    return default
