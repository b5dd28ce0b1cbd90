"""ROME (Meng et al. 2022): a fact is a key and a value, written into one matrix at the least cost to other keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.locate import Located, Scene, looked_up
from qfbench.editors.recursive import Stream, least
from qfbench.editors.value import Asked, Value
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class ROME(Located):
    """min tr(ΔW C ΔWᵀ) with (W + ΔW) k* = v*: ΔW = (v* − W k*) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*), Eq. 2 of ROME.

    The same k*, the mean over the contexts, stands in all places, as in r-ROME (Gupta et al. 2024): with the key of one context
    in some of them sequences collapse. Several facts at once are as many constraints (EMMET, Gupta et al. 2024):
    ΔW = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹.

    Args:
        floor: added to C's diagonal, as a share of its mean eigenvalue (of 1, where C is 0).
    """

    floor: float = 1e-3

    above_zero: ClassVar[tuple[str, ...]] = (*Located.above_zero, "floor")

    def inverse(self, stay: Float[Tensor, "f f"], site: Site) -> Float[Tensor, "f f"]:
        return Stream.begin(stay, 0, 1.0, self.floor).inverse

    def together(
        self, lm: LanguageModel, scene: Scene, asked: Sequence[Asked], found: Sequence[Value], past: Sequence[Asked]
    ) -> WeightDelta:
        (site,) = self.sites
        keys, _ = looked_up(lm, asked, site, site)
        alone, _ = looked_up(lm, [one.alone() for one in asked], site, site)
        weight = site.linear(lm.model).weight.detach().to(keys)
        # v* is what W gives alone, and δ; W k* is what it gives for the mean key.
        missing = torch.stack([one.change for one in found]).to(keys) + (alone - keys) @ weight.T
        step, _ = least(scene.inverses[0], keys, missing, torch.full_like(keys[:, 0], torch.inf))
        return WeightDelta({site.weight_name(lm.model): step}, keys=list(keys.float().split(1)))
