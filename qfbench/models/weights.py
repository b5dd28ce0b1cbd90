"""The weights of a model as a folder or the hub holds them: read whole or not at all, and no code with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from qfbench.errors import UserError

# Tensors of old folders that follow from the configuration: the angles of rotary positions, the mask of causal attention.
FOLLOW = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


def load_weights(source: str, dtype: torch.dtype, device_map: str | None, fires: Sequence[int]) -> PreTrainedModel:
    """The model of a folder or hub id (`read_weights`), of safetensors alone.

    Raises:
        UserError: it holds other weights; or some are missing, of another shape, or of no use to the model.
    """
    folder = Path(source)
    if (
        folder.is_dir()
        and not [*folder.glob("*.safetensors*")]
        and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pt")])
    ):
        raise UserError(
            f"it holds its weights in {pickled[0].name}, which is not opened, since that would run code; save it as safetensors"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError("it holds an adapter; merge it into the weights first (merge_and_unload of peft)")
    return read_weights(source, fires, dtype=dtype, device_map=device_map, use_safetensors=True)


def read_weights(source: str, fires: Sequence[int] = (), **how: Any) -> PreTrainedModel:
    """A model with all the weights that its configuration asks for, and no others; `how` transformers is to read it.

    The gates of layers that are to fire (`fires`) may be left out: they are not used, and are 0 then.

    Raises:
        UserError: weights are missing, of another shape, or of no use to the model.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused here, by name
        output_loading_info=True,
        **how,
    )
    model, found = loaded
    refuse_offloaded(model, source)
    fires = [*fires, *(getattr(model.config, "firing_layers", None) or ())]
    unused = re.compile(rf"(^|\.)layers\.({'|'.join(map(str, fires))})\.mlp\.gate_proj\.")
    missing = set(found["missing_keys"])
    gates = {name for name in missing if fires and unused.search(name)}
    for name in gates:
        model.get_parameter(name).data.zero_()  # not what was drawn at random
    other_shape = [
        f"{name} ({list(here)}, not {list(wanted)})" for name, here, wanted in sorted(found["mismatched_keys"])
    ]
    beyond = [name for name in found["unexpected_keys"] if not FOLLOW.search(name)]
    for what, names in (
        ("lack", missing - gates),
        ("hold in another shape than the configuration says", other_shape),
        ("hold what the configuration has no place for:", beyond),
    ):
        if names:
            raise UserError(f"its weights {what} {_listed(names)}; config.json and the weights do not belong together")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings and head is not None
    if tied and not torch.equal(head.weight, embedding.weight):
        raise UserError(
            "config.json ties lm_head to the embedding, but its weights hold another; mend tie_word_embeddings"
        )
    return model


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters, first 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_offloaded(model: PreTrainedModel, name: str) -> None:
    """Accelerate keeps the weights that no GPU holds in memory or on disk, and a change of them would be lost.

    Raises:
        UserError: there are such weights.
    """
    for weight, tensor in model.named_parameters():
        if tensor.is_meta:
            raise UserError(
                f"{weight} of {name} is offloaded to memory or disk, where no edit reaches it: the GPUs are too small for the "
                "model. Use more of them, or a smaller model.dtype, or model.device=cpu"
            )


def refuse_recurrent(model: PreTrainedModel, name: str) -> None:
    """A recurrent state takes in the padding before a prompt, so that replies would depend on the batch.

    Raises:
        UserError: the model, or a part of it, has such a state.
    """
    if any(isinstance(part, PreTrainedModel) and part._is_stateful for part in model.modules()):
        raise UserError(
            f"{name} is a recurrent model ({type(model).__name__}), whose replies would depend on what else is asked with them; "
            "use one that has attention alone"
        )


def refuse_not_finite(model: PreTrainedModel, name: str) -> None:
    """A model that computes nothing but NaN would be found only once it is asked.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    for weight, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{weight} of {name} holds a NaN or an infinity in {tensor.dtype}: the file is spoilt, or model.dtype too narrow"
            )


def check_device(device: Any) -> None:
    """A device is tried before weights are read for it, which may take minutes.

    Raises:
        UserError: there is no such device.
    """
    try:
        there = isinstance(device, str) and torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        raise UserError(
            f"model.device={device}: torch sees no such device here; use auto, balanced, cpu, cuda or cuda:N"
        )


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; what kind it is, where it was not made for readers."""
    text = str(error).strip().split("\n")[0]
    made = isinstance(error, OSError | ValueError | RuntimeError | ImportError | AssertionError) and text
    return text if made else f"a file of it is spoilt ({type(error).__name__}: {text})"


def _listed(names: Collection[str]) -> str:
    """The first few, and how many more."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own report of what does not fit: there is an error instead."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
