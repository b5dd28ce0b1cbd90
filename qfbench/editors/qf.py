"""QF (arXiv 2507.04300): align one down-projection so that, alone, it gives the layer output it gave when told.

On a firing block (QF2) the layer output is W u alone, without a residual, and R = U Wᵀ − U' Wᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import Recorder, check_layers
from qfbench.editors.teach import SAMPLE, lesson, record_pairs
from qfbench.errors import Unsupported
from qfbench.facts.base import Fact
from qfbench.models.activations import Activations, record_many
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class Solution:
    """A change of weights, with the figures that say how far to trust it."""

    change: LowRank  # [d, f]
    condition: float  # ratio of the largest to the smallest singular value of √s U'
    residual: float  # ‖change · keysᵀ − wantedᵀ‖ / ‖wanted‖: 0 where every key is interpolated
    directions: Float[Tensor, "rank f"]  # orthonormal: what the solution answers to


def solve(
    keys: Float[Tensor, "taught f"],
    wanted: Float[Tensor, "taught d"],
    weights: Float[Tensor, " taught"],
    ridge: float = 0.0,
    rcond: float = 1e-6,
    scale: float | None = None,
) -> Solution:
    """Least-norm change ΔW with ΔW U'ᵀ = Rᵀ: Eq. (3) of QF and the batched form of its appendix.

    Solves min Σ_t s_t ‖ΔW u'_t − r_t‖² + λ‖ΔW‖_F² through the singular values of √s U', which never squares the
    condition of the keys as (U'ᵀU')⁻¹ would. With λ = 0 this is ΔW = (U'⁺ R)ᵀ, and the weights s matter only where the
    keys are dependent. Singular values below `rcond` times `scale` (by default the largest) count as zero.

    Args:
        keys: U', the inputs of down_proj at the taught positions, alone.
        wanted: R, the wanted change of the layer output at these positions.
        weights: s, the significance of each taught token, above 0.
        ridge: λ, in squared units of the keys.

    Raises:
        FloatingPointError: a key or a wanted change is not finite.
    """
    if not (torch.isfinite(keys).all() and torch.isfinite(wanted).all()):
        raise FloatingPointError("an activation at the edited layer is not finite")
    root = weights.sqrt()[:, None]
    p, sigma, q = torch.linalg.svd(root * keys, full_matrices=False)
    kept = sigma > rcond * (sigma[0] if scale is None else scale)
    p, sigma_kept, q = p[:, kept], sigma[kept], q[kept]
    gain = sigma_kept / (sigma_kept**2 + ridge)
    left = (gain[:, None] * (p.T @ (root * wanted))).T
    missed = keys @ q.T @ left.T - wanted
    return Solution(
        LowRank(left, q),
        condition=(sigma[0] / sigma[-1]).item() if sigma[-1] > 0 else float("inf"),
        residual=(missed.norm() / wanted.norm()).item() if wanted.norm() > 0 else 0.0,
        directions=q,
    )


@dataclass(frozen=True)
class Taught:
    """What the two passes recorded at the taught positions, in the model's dtype; none of it depends on W."""

    keys: Float[Tensor, "taught f"]  # u'
    told_keys: Float[Tensor, "taught f"]  # u
    residual: Float[Tensor, "taught d"]  # v'
    told_residual: Float[Tensor, "taught d"]  # v
    weights: Float[Tensor, " taught"]


@dataclass(frozen=True)
class QF(Recorder):
    """QF at one layer, stock or firing.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0.
        opener: significance of the template's tokens before the answer, but the first (`teach.lesson`); the released code has 1.
        closer: significance of the token that ends the turn; the released code has 1.
        query: significance of the query's tokens; the released code has 0.
        ridge: λ of the solve.
        rcond: relative cut-off of singular values of the keys.
    """

    layer: int
    opener: float = 1.0
    closer: float = 1.0
    query: float = 0.0
    ridge: float = 0.0
    rcond: float = 1e-6

    not_negative = ("opener", "closer", "query", "ridge", "rcond")
    ahead = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "down_proj"),)

    def together(self, lm: LanguageModel, parts: Sequence[Taught]) -> WeightDelta:
        keys, wanted, weights = self.problem(lm, parts)
        solution = solve(keys, wanted, weights, self.ridge, self.rcond)
        return self._delta(lm, solution, [part.keys for part in parts])

    def problem(
        self, lm: LanguageModel, parts: Sequence[Taught]
    ) -> tuple[Float[Tensor, "taught f"], Float[Tensor, "taught d"], Float[Tensor, " taught"]]:
        """U', R = (U Wᵀ + V) − (U' Wᵀ + V') for W as it stands, and the significance, in float64; V counts 0 in a firing block."""
        (site,) = self.sites
        home = site.home(lm.model)
        keys, told_keys, residual, told_residual, weights = (
            torch.cat([getattr(part, f.name) for part in parts]).to(home, torch.float64) for f in fields(Taught)
        )
        wanted = (told_keys - keys) @ site.linear(lm.model).weight.detach().to(home, torch.float64).T
        if not site.fires(lm.model):
            wanted += told_residual - residual
        return keys, wanted, weights

    def protected(self, lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[WeightDelta]:
        """Each fact is solved with its keys projected off all earlier keys; what those give stays exactly as it is.

        Keys at a layer do not depend on that layer's `down_proj`, so the basis of earlier keys only grows. Without a
        ridge, and as long as all keys are independent, the sum equals `edit` of all facts at once. Where they are not,
        earlier facts win here, whereas `edit` finds a least-squares compromise.
        """
        basis, total = None, None
        for part in self.recorded(lm, facts):
            keys, wanted, weights = self.problem(lm, [part])
            scale = torch.linalg.matrix_norm(weights.sqrt()[:, None] * keys, 2).item()
            if basis is not None and total is not None:
                wanted = wanted - keys @ total.dense().T
                for _ in range(2):  # once leaves rounding errors of the size of the projection
                    keys = keys - keys @ basis.T @ basis
            solution = solve(keys, wanted, weights, self.ridge, self.rcond, scale)
            basis = solution.directions if basis is None else torch.cat([basis, solution.directions])
            total = solution.change if total is None else total + solution.change
            yield self._delta(lm, solution, [part.keys])

    def record(self, lm: LanguageModel, fact: Fact) -> Taught:
        return self.record_all(lm, [fact])[0]

    def record_all(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Taught]:
        """Both passes of each fact.

        Raises:
            Unsupported: the layer is not one for which QF's equation holds.
            FloatingPointError: an activation is not finite.
        """
        (site,) = self.sites
        site.linear(lm.model)
        site.fires(lm.model)  # refuses a half converted layer
        pairs = [lesson(lm, fact, self.opener, self.closer, query=self.query) for fact in facts]
        told, alone = record_pairs(lm, pairs, site)
        for read in (told, alone):
            check_finite(site, facts, read)
        check_block(lm, site, told)
        return [
            Taught(a.key, t.key, a.residual, t.residual, torch.tensor(pair.weights, dtype=torch.float64))
            for pair, t, a in zip(pairs, told, alone, strict=True)
        ]

    def _delta(self, lm: LanguageModel, solution: Solution, keys: Sequence[Tensor]) -> WeightDelta:
        tokens = float(sum(map(len, keys)))
        notes = {"tokens": tokens, "condition": solution.condition, "residual": solution.residual}
        return WeightDelta({self.sites[0].weight_name(lm.model): solution.change}, notes, [key.float() for key in keys])


def check_finite(site: Site, facts: Sequence[Fact], read: Sequence[Activations]) -> None:
    """Refuse what was read of the dialogues of `facts`, one each, where it holds a NaN or an infinity.

    Raises:
        FloatingPointError: naming the first such fact.
    """
    for fact, one in zip(facts, read, strict=True):
        if not torch.isfinite(one.output).all():
            raise FloatingPointError(f"layer {site.layer}, fact {fact.id}: an activation is not finite")


def check_block(lm: LanguageModel, site: Site, read: Sequence[Activations]) -> None:
    """Some families scale or normalise the feed-forward output; an editor would silently miss its target there.

    Raises:
        Unsupported: what was read is not W u + v.
    """
    linear, home = site.linear(lm.model), site.home(lm.model)
    u, v, y = (
        torch.cat([getattr(one, name) for one in read]).to(home, torch.float64)
        for name in ("key", "residual", "output")
    )
    formed = u @ linear.weight.detach().to(home, torch.float64).T + (0 if site.fires(lm.model) else v)
    if linear.bias is not None:
        formed += linear.bias.detach().to(home, torch.float64)
    missed = ((formed - y).norm() / y.norm()).item()
    if missed > (0.05 if lm.dtype.itemsize == 2 else 1e-3):  # some ten times what rounding alone gives
        raise Unsupported(
            f"layer {site.layer} of {type(lm.model).__name__} is not W u + v: its output differs by {missed:.1%}; "
            "QF needs a feed-forward block added as it is to the residual stream, as in Qwen2, Llama or Mistral"
        )


def check_sites(lm: LanguageModel, more_layers: Sequence[int], sites: Sequence[Site]) -> None:
    """Refuse layers that the model lacks, or whose output is no W u + v.

    Raises:
        UserError: `more_layers` names a layer that is not there.
        Unsupported: as `qf.check_block`.
    """
    check_layers(lm, more_layers)
    for site, read in zip(sites, record_many(lm, [lesson(lm, SAMPLE).alone], sites), strict=True):
        check_block(lm, site, read)
