"""AlphaEdit (Fang et al. 2025): MEMIT within the null space of the keys that are to stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.locate import Spread
from qfbench.errors import UserError
from qfbench.models.sites import Site


@dataclass(frozen=True)
class AlphaEdit(Spread):
    """ΔW = R K₁ᵀ P (K_p K_pᵀ P + K₁ K₁ᵀ P + λ I)⁻¹ at each layer, Eq. 12 of AlphaEdit (λ = 1 there). P projects on the null space of C:
    on its eigenvectors whose eigenvalue is below `threshold`. K_p are the keys of earlier facts in a sequence, read on the model as it
    then stands.

    Solved as R K₁ᵀ (λ P⁺ + K_p K_pᵀ + K₁ K₁ᵀ)⁻¹ within the range of P, which is the same.

    Args:
        threshold: of eigenvalues of C, as a share of their mean.
        ridge: λ, in squared units of the keys.
    """

    threshold: float = 0.1
    ridge: float = 1.0

    above_zero: ClassVar[tuple[str, ...]] = (*Spread.above_zero, "threshold", "ridge")

    def inverse(self, stay: Float[Tensor, "f f"], site: Site) -> Float[Tensor, "f f"]:
        """P / λ.

        Raises:
            UserError: no eigenvalue is below the threshold.
        """
        sizes, vectors = torch.linalg.eigh(stay)
        null = vectors[:, sizes <= self.threshold * sizes.mean()]
        if not null.shape[1]:
            raise UserError(f"editor.threshold={self.threshold}: leaves no direction of layer {site.layer} to change")
        return null @ null.T / self.ridge
