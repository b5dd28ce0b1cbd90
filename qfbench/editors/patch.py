"""The patch of a context, token by token: each token's rank-one change of weights, told minus alone, added up.

That a context acts on a token as a rank-one change of a weight matrix is Theorem 2.2 of Dherin et al. 2025 (arXiv 2507.16003);
Goldwaser et al. 2025 have it for gated feed-forward blocks. Here it is the down-projection that is changed, as in QF.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import Recorder
from qfbench.editors.qf import QF, Taught
from qfbench.facts.base import Fact
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


def patch(keys: Float[Tensor, "taught f"], wanted: Float[Tensor, "taught d"], sweeps: int = 0) -> LowRank:
    """ΔW = Σ_t c_t k_tᵀ / ‖k_t‖². [d, f], of rank at most `taught`.

    With no sweeps c_t = r_t: each token's own patch, exact where it stands alone. The keys of other tokens that are not orthogonal
    to it spoil it. A sweep corrects them one after another: c_t grows by what token t is given too little of, all patches so far
    applied. That is Kaczmarz's method (1937): where the keys are independent, many sweeps end at QF's least-norm change.

    Args:
        keys: U', the inputs of down_proj at the taught positions, alone. A key of 0 has no patch.
        wanted: R, the wanted change of the layer output at these positions.
        sweeps: passes over all tokens, in order.

    Raises:
        FloatingPointError: a key or a wanted change is not finite.
    """
    if not (torch.isfinite(keys).all() and torch.isfinite(wanted).all()):
        raise FloatingPointError("an activation at the edited layer is not finite")
    dual = keys / keys.square().sum(1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
    given = keys @ dual.T  # [t, j]: how much of token j's patch token t is given
    steps = torch.zeros_like(wanted) if sweeps else wanted
    for _ in range(sweeps):
        steps = steps + torch.linalg.solve_triangular(
            given.tril(), wanted - given @ steps, upper=False, unitriangular=True
        )
    return LowRank(steps.T, dual)


@dataclass(frozen=True)
class QFPatch(Recorder):
    """QF with each token's rank-one patch in place of the joint solution.

    Args:
        layer, opener, closer, query: as `QF` has them. Of a significance it matters only whether it is 0.
        sweeps: 0: each token by itself; 1: one token after another, each corrected for those before; more: `patch`.
    """

    layer: int
    opener: float = 1.0
    closer: float = 1.0
    query: float = 0.0
    sweeps: int = 0

    not_negative = ("opener", "closer", "query", "sweeps")
    ahead = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "down_proj"),)

    @property
    def _qf(self) -> QF:
        return QF(self.layer, self.opener, self.closer, self.query)

    def record(self, lm: LanguageModel, fact: Fact) -> Taught:
        return self._qf.record(lm, fact)

    def record_all(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Taught]:
        return self._qf.record_all(lm, facts)

    def together(self, lm: LanguageModel, parts: Sequence[Taught]) -> WeightDelta:
        keys, wanted, weights = self._qf.problem(lm, parts)
        change = patch(keys, wanted, self.sweeps)
        missed = (keys @ change.dense().T - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny)
        notes = {"tokens": float(len(weights)), "residual": missed.item()}
        name = self.sites[0].weight_name(lm.model)
        return WeightDelta({name: change}, notes, [part.keys.float() for part in parts])
