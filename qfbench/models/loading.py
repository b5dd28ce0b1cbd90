"""Where a model is, and how it is read: by a name, from a folder in Hugging Face form, a GGUF file, or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qfbench.errors import UserError
from qfbench.models import difference, gguf
from qfbench.models.dialogue import chosen, dated, settled
from qfbench.models.firing import with_firing_layers
from qfbench.models.weights import check_device, first_line, load_weights, quiet, refuse_not_finite

BUILT_IN = Path(__file__).parents[1] / "world" / "models"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and how its template is told something (`dialogue.settled`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    told: str
    system_turn: bool


def load(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    firing: Mapping[str, Any] | None = None,
    plain: bool = False,
    template: str | None = None,
    told: str = "auto",
) -> Loaded:
    """What `LanguageModel.load` says, in evaluation mode, without gradients."""
    source = find(name)
    device, dtype = placed(device, dtype)
    spread = device == "balanced"
    fires = () if firing is None else firing_layers(firing)
    if plain and template is not None:
        raise UserError(
            f"model.template={template}: with model.plain=true there is no chat template; leave one of them out"
        )
    try:
        with quiet():
            base = difference.base_of(source)
            whole = find(base) if base else source
            tokenizer = _tokenizer(name, whole)
            told, system_turn = prepared(name, tokenizer, plain, template, told)
            model: Any = load_weights(whole, FLOATS[dtype], device if spread else None, fires)
            if base:
                model = difference.apply(model, source)
            if firing is not None:
                model = with_firing_layers(model, fires, firing["beta"])
            model = (model if spread else model.to(device)).eval()
    except UserError as error:
        raise UserError(f"cannot load the model {source!r}: {error}") from error
    except Exception as error:  # of transformers and what it reads with; files may be spoilt in any way
        raise UserError(_why(name, source, device, error)) from error
    refuse_not_finite(model, name)
    return Loaded(model.requires_grad_(False), tokenizer, told, system_turn)


def _why(name: str, source: str, device: str, error: Exception) -> str:
    """In one line, why a model cannot be loaded, and what can be done."""
    said = first_line(error)
    if name in gguf.PACKAGED and not Path(source).is_dir():
        return f"{name} is not installed, and the hub does not give {source} ({said}); install it: {gguf.INSTALL}"
    what = f"cannot load the model {source!r} on {device}"
    if not Path(source).is_dir():
        what += ", which is no folder here and was looked for on the hub"
    if "trust_remote_code" in str(error):
        what += ", since it wants code of its own to be run, which qfbench never does"
    return f"{what}: {said}"


def placed(device: str, dtype: str) -> tuple[str, str]:
    """The device and the dtype that `auto` stands for here, both tried.

    Raises:
        UserError: there is no such device or dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "balanced":
        check_device(device)
    if dtype == "auto":
        on_cuda = torch.cuda.is_available() if device == "balanced" else device.startswith("cuda")
        dtype = "bfloat16" if on_cuda else "float32"
    if dtype not in tuple(FLOATS):
        raise UserError(f"model.dtype={dtype}: a model runs in one of auto, {', '.join(FLOATS)}")
    return device, dtype


def _tokenizer(name: str, folder: str) -> PreTrainedTokenizerBase:
    if Path(folder).is_dir() and not [*Path(folder).glob("tokenizer*"), *Path(folder).glob("vocab*")]:
        raise UserError("the folder has no tokenizer (tokenizer.json); copy the model's own into it")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def prepared(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    plain: bool = False,
    template: str | None = None,
    told: str = "auto",
) -> tuple[str, bool]:
    """Have the tokenizer render dialogues as `load` says; returns `dialogue.settled`.

    Raises:
        UserError: it is a slow one, or its chat template cannot be used.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name}: its tokenizer has no tokenizer.json, by which tokens are found in a text; make one")
    tokenizer.chat_template = None if plain else dated(chosen(tokenizer.chat_template, template), datetime.now())
    return settled(tokenizer, told)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer as its folder holds it, with its own chat templates.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    source = find(name)
    return _tokenizer(name, find(difference.base_of(source) or source))


def find(name: str) -> str:
    """Where a model is: a built-in model's folder, a folder as given, what a GGUF file is dequantized to, or a hub id.

    Raises:
        UserError: it is none of them, or the GGUF file cannot be read.
    """
    built_in = sorted(p.name for p in BUILT_IN.glob("*") if (p / "config.json").exists())
    if name in built_in:
        return str(BUILT_IN / name)
    if name in gguf.PACKAGED:
        file = gguf.packaged(name)
        return gguf.PACKAGED[name][1] if file is None else str(gguf.folder_of(file))
    path = Path(name).expanduser()
    if (path / "config.json").exists():
        return str(path)
    if path.is_dir():
        raise UserError(f"{name}: the folder has no config.json; give a folder in Hugging Face form, or a GGUF file")
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        return str(gguf.folder_of(path))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    named = ", ".join([*built_in, *gguf.PACKAGED])
    raise UserError(
        f"{name}: no such model. Give model.path=FOLDER or =FILE.gguf, a hub id (owner/name), or one of: {named}"
    )


def firing_layers(firing: Any) -> list[int]:
    """The layers that a setting `model.firing` names.

    Raises:
        UserError: it is no such setting.
    """
    layers, beta = (firing.get("layers"), firing.get("beta")) if isinstance(firing, Mapping) else (None, None)
    numbers = isinstance(layers, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
    if not (numbers and layers and isinstance(beta, int | float) and not isinstance(beta, bool) and len(firing) == 2):
        raise UserError(f"model.firing={firing}: must be null or like {{layers: [23], beta: 10}}")
    return list(layers)
