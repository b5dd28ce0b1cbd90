"""A model in two parts that share its weights: the layers below a cut, and those from there on with the head."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from qfbench.models.firing import FAMILIES

LOGITS = 2**28  # bytes that the logits of one product with the head may take, in float32


def divides(model: Any, tokens: int) -> bool:
    """Whether a model can be run in two parts here, on dialogues of up to so many `tokens`."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_device_map", None):
        return False
    config = model.config
    if config.model_type.removeprefix("firing_") not in FAMILIES:
        return False
    window = getattr(config, "sliding_window", None) or tokens
    return config._attn_implementation in ("sdpa", "eager") and tokens <= window


class Cut:
    """A model that `divides`, cut below `layer`; at 0 nothing but the embedding is below.

    `cache` of a pass takes keys and values of the layers that run. A `mask` is additive (`mask`), `[rows, 1, queries, keys]`;
    None where each token may look at all before it.
    """

    def __init__(self, model: Any, layer: int):
        decoder = model.get_decoder()
        self.layer, self.bottom, self.top = layer, _part(decoder, 0, layer), _part(decoder, layer)
        self.head, self.device = model.get_output_embeddings(), model.device
        self.cache_argument = cache_argument(decoder.forward)

    def below(
        self, ids: Int[Tensor, "rows tokens"], positions: Tensor, mask: Tensor | None, cache: DynamicCache | None
    ) -> Float[Tensor, "rows tokens d"]:
        """The states that enter the cut."""
        if not self.layer:
            embedded: Tensor = self.bottom.embed_tokens(ids)
            return embedded
        return self._run(self.bottom, positions, mask, cache, input_ids=ids)

    def above(
        self,
        states: Float[Tensor, "rows tokens d"],
        positions: Tensor,
        mask: Tensor | None,
        cache: DynamicCache | None,
    ) -> Float[Tensor, "rows tokens d"]:
        """The normalised output, of the states that enter the cut."""
        return self._run(self.top, positions, mask, cache, inputs_embeds=states)

    def _run(
        self, part: Any, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None, **inputs: Tensor
    ) -> Tensor:
        given = {self.cache_argument: cache, "use_cache": True} if cache is not None else {"use_cache": False}
        out: Tensor = part(attention_mask=mask, position_ids=positions, **inputs, **given).last_hidden_state
        return out

    def read(
        self, normed: Float[Tensor, "nodes d"], wanted: list[int], targets: list[int]
    ) -> tuple[list[int], list[float]]:
        """The likeliest next token at each node; the log-probability of `targets[i]` at the node `wanted[i]`.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        size = max(1, LOGITS // (4 * self.head.weight.shape[0]))
        at = torch.tensor(wanted, device=normed.device, dtype=torch.long)
        target = torch.tensor(targets, device=normed.device, dtype=torch.long)
        logprob = torch.zeros(len(wanted), device=normed.device)
        likeliest = []
        for start in range(0, len(normed), size):
            logits = self.head(normed[start : start + size]).float()
            if not torch.isfinite(logits).all():
                raise FloatingPointError("it gives logits that are not finite")
            likeliest.append(logits.argmax(-1))
            here = ((at >= start) & (at < start + size)).nonzero()[:, 0]
            rows = at[here] - start
            logprob[here] = logits[rows, target[here]] - logits.logsumexp(-1)[rows]
        return torch.cat(likeliest).tolist(), logprob.tolist()

    def mask(self, allowed: Bool[Tensor, "rows queries keys"]) -> Float[Tensor, "rows 1 queries keys"]:
        """0 where a token may look, and the lowest number elsewhere."""
        dtype = self.head.weight.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)[:, None].to(self.device)


def _part(decoder: Any, start: int, stop: int | None = None) -> Any:
    """The decoder with its layers from `start` to before `stop` alone; with a `stop` its output is not normalised."""
    some = copy.copy(decoder)
    some._modules = dict(decoder._modules)
    some.layers = nn.ModuleList(list(decoder.layers)[start:stop])
    some.config = copy.copy(decoder.config)
    some.config.num_hidden_layers = len(some.layers)
    if getattr(decoder.config, "layer_types", None):
        some.config.layer_types = decoder.config.layer_types[start:stop]
    if stop is not None:
        some.norm = nn.Identity()
    return some


def cache_argument(forward: Any) -> str:
    """What a forward pass calls its key-value cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def held(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each `[rows, heads, tokens, .]`, of the layers that have run."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def stacked(cache: DynamicCache) -> Float[Tensor, "two_layers rows heads tokens width"]:
    """Keys and values of all layers that have run, in one tensor."""
    return torch.stack([tensor for pair in held(cache) for tensor in pair])
