"""Tensors in a safetensors file that holds a checksum of them: a damaged file is refused instead of read as other numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qfbench.errors import UserError

SEAL = "qfbench"  # one entry of the header holds all: safetensors writes several in any order


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors with `metadata` whole and atomically, whatever stood there before."""
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    part = path.with_suffix(".part")
    save_file(held, part, {SEAL: json.dumps([_digest(held, metadata), dict(metadata)], sort_keys=True)})
    part.replace(path)


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that `save` wrote. A file of other origin, which has no checksum, is not checked.

    Raises:
        UserError: the file is missing, cut short, or not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).strip()})") from error
    if SEAL in metadata:
        try:
            seal, metadata = json.loads(metadata[SEAL])
        except ValueError as error:
            raise UserError(f"{path}: is damaged") from error
        if seal != _digest(tensors, metadata):
            raise UserError(f"{path}: is damaged: it does not hold what was written")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, and names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
