"""Recursive least squares: one matrix that takes in tokens, some at a time, as if all had been solved together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.models.delta import LowRank


def least(
    inverse: Float[Tensor, "f f"],
    keys: Float[Tensor, "taught f"],
    wanted: Float[Tensor, "taught d"],
    weights: Float[Tensor, " taught"],
) -> tuple[LowRank, Float[Tensor, "taught f"]]:
    """ΔW of min Σ s ‖ΔW k − r‖² + tr(ΔW M ΔWᵀ), M given by its inverse P; and (S⁻¹ + K P Kᵀ)⁻¹ K P, of which the new inverse is made.

    Where M is singular, P may be a pseudo-inverse: ΔW is then 0 off its range. A weight s of infinity asks for ΔW k = r exactly.
    """
    reach = keys @ inverse
    gain = torch.linalg.solve(torch.diag(1 / weights) + reach @ keys.T, torch.cat([wanted, reach], 1))
    missed, back = gain.split([wanted.shape[1], keys.shape[1]], 1)
    return LowRank(missed.T, reach), back


@dataclass
class Stream:
    """One matrix: the change W of all that was taught, and the inverse P of what its keys, and those that are to stay, span."""

    inverse: Float[Tensor, "f f"]
    change: Float[Tensor, "d f"]

    @classmethod
    def begin(
        cls, stay: Float[Tensor, "f f"], d: int, penalty: float, floor: float, also: Float[Tensor, "f f"] | None = None
    ) -> Stream:
        """Nothing taught. `stay` is C; `floor` is β as a share of C's mean eigenvalue (of 1, where C is 0). `also` is added to C, and does
        not count for β."""
        f = stay.shape[0]
        mean = stay.diagonal().mean().item() or 1.0
        cost = stay + floor * mean * torch.eye(f, dtype=stay.dtype, device=stay.device) + (0 if also is None else also)
        return cls(torch.cholesky_inverse(torch.linalg.cholesky(penalty * cost)), stay.new_zeros(d, f))

    def like(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.change.device, self.change.dtype)

    def teach(
        self, keys: Float[Tensor, "taught f"], wanted: Float[Tensor, "taught d"], weights: Float[Tensor, " taught"]
    ) -> LowRank:
        """Take in one fact's tokens; a weight below 0 takes them out again. Returns the step of `change`."""
        step, back = least(self.inverse, keys, wanted - keys @ self.change.T, weights)
        self.change = self.change + step.dense()
        assert step.right is not None
        inverse = self.inverse - step.right.T @ back
        self.inverse = (inverse + inverse.T) / 2
        return step
