"""QF2 (QF2 preprint): a Hebbian outer product on the up-projection of a firing block; no gradient, no inverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import Recorder
from qfbench.editors.teach import lesson, record_pairs
from qfbench.errors import UserError
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


def stopped(
    fired: Float[Tensor, "taught f"],
    inputs: Float[Tensor, "taught d"],
    weights: Float[Tensor, " taught"],
    lr: float,
    drive: Float[Tensor, "taught f"],
    beta: float,
    stop: float,
    rounds: int,
) -> tuple[LowRank, float]:
    """Beyond the paper: Eq. (3) again and again, each time for those neurons alone that do not yet fire as told.

    A neuron is left out at a token once σ(β (W + ΔW) x') is `stop` or more from ½, on the side of y*. This is the
    perceptron's rule with a margin (Rosenblatt 1958): where the taught inputs are independent, enough rounds end it.

    Args:
        fired, inputs, weights, lr: as of `hebbian`.
        drive: β W x', what the neurons get alone before the change.
        stop: 0 to below ½.
        rounds: how often at most.

    Returns:
        ΔW, [f, d], and the share of neurons, over all tokens, that fell short of it in the end.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    step = hebbian(fired, inputs, weights, lr).left.T
    side, overlap, pushed = (fired - 0.5).sign(), beta * inputs @ inputs.T, torch.zeros_like(step)

    def short() -> Tensor:
        return (side != 0) & (weights > 0)[:, None] & (side * (torch.sigmoid(drive + overlap @ pushed) - 0.5) < stop)

    for _ in range(rounds):
        push = step * short()
        if not push.any():
            break
        pushed = pushed + push
    return LowRank(pushed.T, inputs), short().double().mean().item()


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
        stop: goes beyond the paper: the rule is applied in rounds, and a neuron is left out at a token once it is so far from ½,
            on its told side (`stopped`). Facts taught `joint` share the rounds. None: the paper's rule, once.
        rounds: how many of them, at most; of no effect without `stop`.

    Punctuation inside the answer weighs 0, as in the released code.

    Raises:
        UserError: `stop` is not below ½, or `rounds` is 0.
    """

    layer: int
    lr: float
    named: float = 10.0
    rest: float = 1.0
    opener: float = 0.0
    closer: float | None = None
    stop: float | None = None
    rounds: int = 100

    needs_firing = True
    above_zero = ("lr", "rounds")
    not_negative = ("named", "rest", "opener", "closer", "stop")
    ahead = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop is not None and self.stop >= 0.5:
            raise UserError(f"editor.stop={self.stop}: must be below 0.5, since no neuron fires above 1")

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
        if self.stop is None:
            change = hebbian(y, x, s, self.lr)
        else:
            drive = torch.cat([beta * up(part.inputs) for part in parts]).to(home, torch.float64)
            change, notes["residual"] = stopped(y, x, s, self.lr, drive, beta, self.stop, self.rounds)
        return WeightDelta({site.weight_name(lm.model): change}, notes, keys)

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """Without a stop facts are summed: each is added to the change of those before it."""
        if self.stop is not None:
            yield from super().joint(lm, facts, done)
            return
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
