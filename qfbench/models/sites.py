"""Where an edit goes: a layer and a matrix of its feed-forward block. The only file that knows Hugging Face module names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from qfbench.errors import Unsupported, UserError
from qfbench.models.firing import FiringLayer


@dataclass(frozen=True)
class Site:
    """One weight matrix: `module` of the feed-forward block, or of the attention, of layer `layer` (counted from 0)."""

    layer: int
    module: str = "down_proj"

    def linear(self, model: nn.Module) -> nn.Linear:
        """The linear module at this site.

        Raises:
            UserError: the model has no such layer.
            Unsupported: the layer has no such matrix.
        """
        block = self.block(model)
        inside = [getattr(getattr(block, part, None), self.module, None) for part in ("mlp", "self_attn")]
        linear = next((found for found in inside if isinstance(found, nn.Linear)), None)
        if linear is None:
            raise Unsupported(
                f"layer {self.layer} of {type(model).__name__} has no mlp.{self.module}; "
                "editors here need gated feed-forward blocks, as in Qwen2, Qwen3, Llama or Mistral"
            )
        return linear

    def block(self, model: nn.Module) -> nn.Module:
        """The decoder layer."""
        blocks = layers(model)
        if not 0 <= self.layer < len(blocks):
            raise UserError(f"editor.layer={self.layer}: the model has layers 0 to {len(blocks) - 1}")
        return blocks[self.layer]

    def fires(self, model: nn.Module) -> bool:
        """Whether the layer is a firing block (QF2), which adds no residual to its feed-forward output.

        Raises:
            Unsupported: the layer is half converted: a blend, whose output no editor's equation gives.
        """
        block = self.block(model)
        if not isinstance(block, FiringLayer) or block.alpha == 1:
            return False
        if block.alpha != 0:
            raise Unsupported(
                f"layer {self.layer} is half converted (α = {block.alpha:.3g}); finish its conversion first"
            )
        return True

    def slope(self, model: nn.Module) -> float:
        """β of the firing block at this layer.

        Raises:
            Unsupported: it is none.
        """
        block = self.block(model)
        if not (self.fires(model) and isinstance(block, FiringLayer)):
            raise Unsupported(
                f"QF2 needs a firing block at layer {self.layer}; "
                f"`qfbench experiment=convert model=... model.layer={self.layer}` makes one (model=world-s-qf2 has one at layer 4)"
            )
        return block.beta

    def residual_norm(self, model: nn.Module) -> nn.Module:
        """The normalisation whose input is the residual stream that enters the feed-forward block."""
        block = self.block(model)
        norm = getattr(block, "post_attention_layernorm", None)
        if not isinstance(norm, nn.Module):
            raise Unsupported(
                f"layer {self.layer} of {type(model).__name__} does not add its feed-forward output to the residual "
                "stream as Qwen2 and Llama do; QF's equation does not hold there"
            )
        return norm

    def home(self, model: nn.Module) -> torch.device:
        """Where a change of this weight is solved, in float64: on the weight's own device, but mps has no float64."""
        device = self.linear(model).weight.device
        return torch.device("cpu") if device.type == "mps" else device

    def weight_name(self, model: nn.Module) -> str:
        """The parameter's name in the model's state dict."""
        linear = self.linear(model)
        return next(f"{name}.weight" for name, module in model.named_modules() if module is linear)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, first to last; of a model that also sees or hears, those of its text decoder.

    Raises:
        Unsupported: the model keeps no list of decoder layers.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layers", "h", "blocks"):
            return module
    raise Unsupported(f"{type(model).__name__} has no list of decoder layers")
