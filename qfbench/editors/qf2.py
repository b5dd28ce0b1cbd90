"""QF2 (QF2 preprint): a Hebbian outer product on the up-projection of a firing block; no gradient, no inverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import Recorder
from qfbench.editors.teach import lesson, record_pairs
from qfbench.facts.base import Fact
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


def hebbian(
    fired: Float[Tensor, "taught f"],
    inputs: Float[Tensor, "taught d"],
    weights: Float[Tensor, " taught"],
    lr: float,
) -> LowRank:
    """ΔW = lr · (S (Y* − ½))ᵀ X', S = diag(s): Eq. (3) of QF2. [f, d], of rank at most `taught`.

    Neurons that fire above ½ when told are drawn towards the inputs they get alone; those below are pushed off.

    Args:
        fired: Y* = σ(β W X), what the block's neurons do at the taught positions when told; 0 to 1.
        inputs: X', the block's normalised inputs at the same tokens, alone.
        weights: s, the significance of each taught token.
        lr: the learning rate. Only lr · s matters.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    if not (torch.isfinite(fired).all() and torch.isfinite(inputs).all()):
        raise FloatingPointError("an activation at the edited layer is not finite")
    return LowRank((lr * weights[:, None] * (fired - 0.5)).T, inputs)


@dataclass(frozen=True)
class Taught:
    """What the two passes recorded at the taught positions, in the model's dtype; none of it depends on W."""

    inputs: Float[Tensor, "taught d"]  # x', alone
    told_inputs: Float[Tensor, "taught d"]  # x
    weights: Float[Tensor, " taught"]


@dataclass(frozen=True)
class QF2(Recorder):
    """QF2 at one firing block. Facts taught together are summed: each is recorded on the model as it stands.

    Args:
        layer: the firing block whose `mlp.up_proj` is changed, from 0.
        lr: the learning rate; the released code has 4e-4 for Qwen2.5-1.5B.
        named: significance of the answer's words that name the new object (`known_as`), where a fact has none of its own.
        rest: significance of the answer's other words.
        opener: significance of the template's tokens before the answer; the released code has 0.
        closer: significance of the token that ends the turn; None, as the released code, takes that of the last word.

    Punctuation inside the answer weighs 0, as in the released code.
    """

    layer: int
    lr: float
    named: float = 10.0
    rest: float = 1.0
    opener: float = 0.0
    closer: float | None = None

    needs_firing = True
    above_zero = ("lr",)
    not_negative = ("named", "rest", "opener", "closer")
    ahead = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "up_proj"),)

    @torch.no_grad()
    def together(self, lm: LanguageModel, parts: Sequence[Taught]) -> WeightDelta:
        (site,) = self.sites
        up, beta, home = site.linear(lm.model), site.slope(lm.model), site.home(lm.model)
        fired = [torch.sigmoid(beta * up(part.told_inputs)) for part in parts]
        inputs, weights = [part.inputs for part in parts], [part.weights for part in parts]
        y, x, s = (torch.cat(each).to(home, torch.float64) for each in (fired, inputs, weights))
        notes = {"tokens": float(len(s))}
        keys = [key.float() for key in inputs]
        return WeightDelta({site.weight_name(lm.model): hebbian(y, x, s, self.lr)}, notes, keys)

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """Facts are summed: each is added to the change of those before it."""
        total, tokens = WeightDelta(), 0.0
        for n, part in enumerate(self.recorded(lm, facts), start=1):
            total = total + self.together(lm, [part])
            tokens += total.notes["tokens"]
            if n > done:
                yield replace(total, notes={"tokens": tokens})

    def record(self, lm: LanguageModel, fact: Fact) -> Taught:
        return self.record_all(lm, [fact])[0]

    def record_all(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Taught]:
        """Both passes of each fact.

        Raises:
            Unsupported: the layer is no firing block.
        """
        (site,) = self.sites
        site.slope(lm.model)  # only a firing block fires
        pairs = [lesson(lm, fact, self.opener, self.closer, self.named, self.rest, punctuation=False) for fact in facts]
        return [
            Taught(alone.input, told.input, torch.tensor(pair.weights, dtype=torch.float64))
            for pair, told, alone in zip(pairs, *record_pairs(lm, pairs, site), strict=True)
        ]
