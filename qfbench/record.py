"""Activations at a site, read through hooks that never outlive the call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qfbench.dialogue import Rendering
from qfbench.lm import LanguageModel
from qfbench.sites import Site


@dataclass(frozen=True)
class Activations:
    """What QF reads at every position of one dialogue, in the model's dtype."""

    key: Float[Tensor, "tokens f"]  # u: the input of down_proj
    residual: Float[Tensor, "tokens d"]  # v: the residual stream entering the feed-forward block


class _Done(Exception):
    """Raised by the last hook: the layers above the site need not run."""


@contextmanager
def reading(lm: LanguageModel, site: Site) -> Iterator[dict[str, list[Tensor]]]:
    """While open, every forward pass appends its `key` and `residual`, each `[batch, tokens, .]`, at the site."""
    seen: dict[str, list[Tensor]] = {"key": [], "residual": []}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].detach().clone())

        return hook

    norm, linear = site.residual_norm(lm.model), site.linear(lm.model)
    handles = [
        norm.register_forward_pre_hook(keep("residual")),
        linear.register_forward_pre_hook(keep("key")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(lm: LanguageModel, dialogues: Sequence[Rendering], site: Site) -> list[Activations]:
    """Keys and residuals of whole dialogues, by one teacher-forced pass that stops at the site.

    Each dialogue runs alone, unpadded: an activation must not depend on the company it was recorded in.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Done

    out = []
    for dialogue in dialogues:
        with reading(lm, site) as seen:
            handle = site.linear(lm.model).register_forward_pre_hook(stop)
            try:
                lm.model(input_ids=torch.tensor([dialogue.ids], device=lm.device), use_cache=False)
            except _Done:
                pass
            finally:
                handle.remove()
        out.append(Activations(seen["key"][0][0], seen["residual"][0][0]))
    return out
