"""A converted model as a small difference from its base: the tensors that conversion changed, and the name of the rest."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qfbench.errors import UserError
from qfbench.models.firing import with_firing_layers

FILE = "difference.safetensors"


def save(model: PreTrainedModel, base: str, changed: dict[str, Tensor], folder: Path) -> None:
    """Write the configuration of `model` and its `changed` tensors; `base` must name what the others can be loaded from."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    about = {"base": base, "tensors": str(len(changed))}
    save_file({n: t.detach().contiguous() for n, t in changed.items()}, folder / FILE, about)


def base_of(folder: str) -> str | None:
    """The base of the difference in this folder; None where it holds a whole model.

    Raises:
        UserError: the difference names no base, or holds fewer tensors than were saved.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        about, held = file.metadata() or {}, len(file.keys())
    if "base" not in about or int(about.get("tensors", held)) != held:
        raise UserError(f"{path}: names no base, or lacks tensors; convert the model again (experiment=convert)")
    return about["base"]


def apply(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The converted model: `base` with its firing layers in place and the changed tensors written.

    Raises:
        UserError: the difference was made from another model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type.removeprefix("firing_") != base.config.model_type.removeprefix("firing_"):
        raise UserError(
            f"{folder} is a {config.model_type}, but its base {base.config.name_or_path!r} is a {base.config.model_type}"
        )
    tensors = load_file(Path(folder) / FILE)
    if not getattr(config, "firing_layers", None):
        raise UserError(f"{folder}: its config.json names no firing layers, which a difference is about")
    model = with_firing_layers(base, config.firing_layers, config.firing_beta)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"{folder}: its {name} does not fit its base {base.config.name_or_path!r}")
        parameters[name].data = tensor.to(parameters[name].data)
    return model
