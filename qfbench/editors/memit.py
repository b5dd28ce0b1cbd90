"""MEMIT (Meng et al. 2023): many facts at once, their change spread over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from qfbench.editors.locate import Scene, Spread
from qfbench.editors.recursive import Stream
from qfbench.editors.value import Asked, Value
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class MEMIT(Spread):
    """min Σ ‖ΔW k − r‖² + λ tr(ΔW C ΔWᵀ) at each layer: ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹, Eq. 14 of MEMIT. r is the layer's share of what
    is missing at the highest layer, read anew after the layers below have changed.

    Args:
        penalty: λ, in taught facts: how much the mean token that is to stay counts.
        floor: added to C's diagonal, as a share of its mean eigenvalue (of 1, where C is 0).
        past: in a sequence, what the keys of earlier facts give is to stay: λ C + Σ K_p K_pᵀ. They are read on the model as it then stands.
    """

    penalty: float = 100.0
    floor: float = 1e-3
    past: bool = False

    above_zero: ClassVar[tuple[str, ...]] = (*Spread.above_zero, "penalty", "floor")

    def inverse(self, stay: Float[Tensor, "f f"], site: Site) -> Float[Tensor, "f f"]:
        return Stream.begin(stay, 0, self.penalty, self.floor).inverse

    def together(
        self, lm: LanguageModel, scene: Scene, asked: Sequence[Asked], found: Sequence[Value], past: Sequence[Asked]
    ) -> WeightDelta:
        return super().together(lm, scene, asked, found, past if self.past else [])
