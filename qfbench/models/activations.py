"""Activations at a site, read through hooks that never outlive the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class Activations:
    """What editors read at every position of one dialogue, in the model's dtype."""

    input: Float[Tensor, "tokens d"]  # x: the normalised input of the feed-forward block
    key: Float[Tensor, "tokens f"]  # u: the input of down_proj; in a firing block y = σ(β W x)
    residual: Float[Tensor, "tokens d"]  # v: the residual stream entering the feed-forward block
    output: Float[Tensor, "tokens d"]  # of the decoder layer: W u + v where QF applies


class _Done(Exception):
    """Raised by the hook behind the site's layer: the layers above need not run."""


@contextmanager
def reading(lm: LanguageModel, site: Site) -> Iterator[dict[str, list[Tensor]]]:
    """While open, every forward pass appends its `input`, `key`, `residual` and `output`, each `[batch, tokens, .]`, at the site's layer."""
    seen: dict[str, list[Tensor]] = {"input": [], "key": [], "residual": [], "output": []}

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen[name].append(args[0].detach().clone())

    def keep_output(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        return lambda _, args, out: seen[name].append((out[0] if isinstance(out, tuple) else out).detach().clone())

    norm, down, block = (
        site.residual_norm(lm.model),
        Site(site.layer, "down_proj").linear(lm.model),
        site.block(lm.model),
    )
    handles = [
        norm.register_forward_pre_hook(keep_input("residual")),
        norm.register_forward_hook(keep_output("input")),
        down.register_forward_pre_hook(keep_input("key")),
        block.register_forward_hook(keep_output("output")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(lm: LanguageModel, dialogues: Sequence[Rendering], site: Site) -> list[Activations]:
    """Activations of whole dialogues, by one teacher-forced pass that stops behind the site's layer.

    Each dialogue runs alone, unpadded: an activation must not depend on the company it was recorded in.
    """

    def stop(*_: object) -> None:
        raise _Done

    lm.check_lengths([dialogue.ids for dialogue in dialogues])
    out = []
    for dialogue in dialogues:
        with reading(lm, site) as seen:
            handle = site.block(lm.model).register_forward_hook(stop)
            try:
                lm.model(input_ids=torch.tensor([dialogue.ids], device=lm.device), use_cache=False)
            except _Done:
                pass
            finally:
                handle.remove()
        out.append(Activations(**{name: tensors[0][0] for name, tensors in seen.items()}))
    return out
