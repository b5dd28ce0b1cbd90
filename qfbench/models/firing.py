"""The firing block that QF2 needs, and the blend by which QFt turns an ordinary decoder layer into one.

    FF_α(x) = α · down(silu(gate x) · up x) + (1 - α) · down(σ(β · up x))
    layer output = α · residual + FF_α(x)          (QF2 preprint; x is the normalised residual stream)

α = 1 is the stock layer, α = 0 the firing block alone: no gate, and no residual around the feed-forward. Models that hold
such layers are families of their own (`firing_qwen2` and so on), known to transformers' Auto classes once qfbench is
imported: they are saved and loaded like any other, and no remote code has to be trusted. Parameters keep their stock names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from qfbench.errors import Unsupported, UserError


class FiringLayer(nn.Module):
    """Abstract: a decoder layer whose feed-forward is blended. A family adds it to its own layer, whose parts it uses."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    beta: float  # β, the slope of the sigmoid
    alpha: float  # α, the share of the stock layer: 0, but while converting

    def forward(self, hidden_states: Float[Tensor, "batch tokens d"], **kwargs: Any) -> Float[Tensor, "batch tokens d"]:
        """As the stock layer's. The residual around the attention stays; that around the feed-forward counts α."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        residual = hidden_states + attended
        x = self.post_attention_layernorm(residual)
        if self.alpha == 1:
            return residual + self.mlp(x)
        fired = self.mlp.down_proj(torch.sigmoid(self.beta * self.mlp.up_proj(x)))
        if self.alpha == 0:
            return fired
        return self.alpha * (residual + self.mlp(x)) + (1 - self.alpha) * fired


FAMILIES: dict[str, Any] = {}  # the model class with firing layers, by the stock model_type


def _add_family(stock: Any, layer: type[nn.Module]) -> None:
    """Define and register configuration and model of one family: its stock model with some layers replaced."""
    stock_config: Any = stock.config_class
    firing_layer = type(f"Firing{layer.__name__}", (FiringLayer, layer), {})

    def build(self: Any, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        for i in config.firing_layers or ():
            self.model.layers[i] = firing_layer(config, i)
            self.model.layers[i].alpha, self.model.layers[i].beta = 0.0, config.firing_beta
        self.post_init()

    settings = {
        "__annotations__": {"firing_layers": list[int] | None, "firing_beta": float},
        "__module__": __name__,
        "model_type": f"firing_{stock_config.model_type}",
        "firing_layers": None,
        "firing_beta": 10.0,
    }
    config = type(f"Firing{stock_config.__name__}", (stock_config,), settings)
    unsplit = [*stock._no_split_modules, firing_layer.__name__]
    parts = {"__init__": build, "__module__": __name__, "config_class": config, "_no_split_modules": unsplit}
    model = type(f"Firing{stock.__name__}", (stock,), parts)
    AutoConfig.register(settings["model_type"], config)
    AutoModelForCausalLM.register(config, model)
    FAMILIES[stock_config.model_type] = model


_add_family(modeling_qwen2.Qwen2ForCausalLM, modeling_qwen2.Qwen2DecoderLayer)
_add_family(modeling_qwen3.Qwen3ForCausalLM, modeling_qwen3.Qwen3DecoderLayer)
_add_family(modeling_llama.LlamaForCausalLM, modeling_llama.LlamaDecoderLayer)
_add_family(modeling_mistral.MistralForCausalLM, modeling_mistral.MistralDecoderLayer)


def with_firing_layers(model: Any, layers: Sequence[int], beta: float = 10.0, alpha: float = 0.0) -> PreTrainedModel:
    """The same weights in a model whose `layers`, too, are firing blocks, blended by `alpha`. Tensors are shared, not copied.

    Layers of `model` that fire already stay as they are.

    Raises:
        Unsupported: the family has no such form here.
        UserError: the model has no such layer, or β is not positive, or not that of the layers that fire already.
    """
    config = model.config
    stock = config.model_type.removeprefix("firing_")
    if stock not in FAMILIES:
        raise Unsupported(
            f"model type {config.model_type!r} has no firing block here; use one of {', '.join(FAMILIES)}"
        )
    depth = config.num_hidden_layers
    if not layers or not all(isinstance(i, int) and 0 <= i < depth for i in layers):
        raise UserError(f"layers={list(layers)}: give at least one; the model has layers 0 to {depth - 1}")
    if beta <= 0:
        raise UserError(f"beta={beta}: the slope must be above 0")
    family, values = FAMILIES[stock], config.to_dict()
    firing_already = {i: model.model.layers[i].alpha for i in values.get("firing_layers") or ()}
    if firing_already and beta != config.firing_beta:
        raise UserError(f"beta={beta}: the model's firing layers have {config.firing_beta}, and a model has one slope")
    alphas = dict.fromkeys(layers, alpha) | firing_already
    values |= {"firing_layers": sorted(alphas), "firing_beta": float(beta)}
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        firing = family._from_config(family.config_class(**values), attn_implementation=config._attn_implementation)
    firing.load_state_dict(model.state_dict(), assign=True)
    firing.tie_weights()
    firing.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    firing.generation_config = model.generation_config
    for i in alphas:
        firing.model.layers[i].alpha = alphas[i]
    if spread := getattr(model, "hf_device_map", None):  # accelerate's hooks do not come with the layers
        from accelerate import dispatch_model

        dispatch_model(firing, spread, skip_keys=firing._skip_keys_device_placement)
    frozen = not any(p.requires_grad for p in model.parameters())
    return firing.train(model.training).requires_grad_(not frozen)
