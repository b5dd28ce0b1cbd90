"""A firing block in closed form: where a conversion may begin, instead of from the stock layer's `down_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.models.activations import record
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site

RIDGE = 1e-8  # of the mean square of a unit


def down_proj(
    base: LanguageModel, firing: LanguageModel, layer: int, batches: Iterable[Sequence[Rendering]]
) -> Float[Tensor, "d f"]:
    """The `down_proj` with which the layer of `firing`, firing as it does, comes nearest to what that of `base` puts out.

    min_D Σ ‖D y − o‖² / ‖o‖² over all tokens of the dialogues: o `[d]` is the output of the layer of `base`, y `[f]` how that of
    `firing` fires. Each token counts alike, though the first one's output may be a hundred times as long as others. This is
    ours; the QF2 preprint begins with the stock weights. Memory does not depend on how many dialogues there are.
    """
    site = Site(layer, "up_proj")
    home = site.home(firing.model)
    gram = cross = torch.zeros((), dtype=torch.float64, device=home)
    for dialogues in batches:
        wanted = torch.cat([read.output for read in record(base, dialogues, site)]).to(home, torch.float64)
        fired = torch.cat([read.key for read in record(firing, dialogues, site)]).to(home, torch.float64)
        weight = 1 / wanted.norm(dim=1, keepdim=True)
        if not (torch.isfinite(weight).all() and torch.isfinite(fired).all()):
            raise FloatingPointError(f"layer {layer}: an output is 0, or not finite")
        gram = gram + (fired * weight).T @ (fired * weight)
        cross = cross + (fired * weight).T @ (wanted * weight)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross).T.to(firing.device, firing.dtype)
