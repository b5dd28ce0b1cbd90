"""UltraEdit (Gu et al. 2025): one gradient, normalized by what all edits so far had, and a ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qfbench.editors.base import Recorder, check_layers, matrices
from qfbench.editors.finetune import answers, summed_nll
from qfbench.facts.base import Fact
from qfbench.models.delta import NOTHING, LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site

EPSILON = torch.finfo(torch.float32).eps  # added to each deviation, as in the released code


@dataclass(frozen=True)
class Moments:
    """Mean and deviation, feature by feature, of all tokens so far."""

    tokens: int
    mean: Float[Tensor, " z"]
    squares: Float[Tensor, " z"]  # the sum of the squared distances from the mean

    @classmethod
    def of(cls, features: Float[Tensor, "taught z"]) -> Moments:
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).pow(2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        """Those of both together (Chan et al. 1983)."""
        tokens, apart = self.tokens + other.tokens, other.mean - self.mean
        squares = self.squares + other.squares + apart.pow(2) * (self.tokens * other.tokens / tokens)
        return Moments(tokens, self.mean + apart * (other.tokens / tokens), squares)

    def normalized(self, features: Float[Tensor, "taught z"]) -> Float[Tensor, "taught z"]:
        """Distances from the mean in sample deviations; 0 where there is but one token."""
        deviation = (self.squares / max(1, self.tokens - 1)).sqrt()
        return (features - self.mean.to(features)) / (deviation + EPSILON).to(features)


def wanted(
    keys: Float[Tensor, "taught f"], gradients: Float[Tensor, "taught d"], moments: Moments, lr: float
) -> Float[Tensor, "taught d"]:
    """v = −η ‖h̃‖² g̃ of each token: what is to be added to the output of the matrix; h̃ and g̃ are normalized."""
    h, g = moments.normalized(torch.cat([keys, gradients], 1)).split([keys.shape[1], gradients.shape[1]], 1)
    return -lr * h.pow(2).sum(1, keepdim=True) * g


def shift(keys: Float[Tensor, "taught f"], values: Float[Tensor, "taught d"], ridge: float) -> LowRank:
    """ΔW of min Σ ‖ΔW h − v‖² + λ ‖ΔW‖²: ΔWᵀ = (HᵀH + λI)⁻¹ HᵀV = Hᵀ (HHᵀ + λI)⁻¹ V. Its rank is at most that of H."""
    cost = keys @ keys.T + ridge * torch.eye(len(keys)).to(keys)
    return LowRank(torch.linalg.solve(cost, values).T, keys)


@dataclass(frozen=True)
class UltraEdit(Recorder):
    """Training-, subject- and memory-free lifelong editing (arXiv 2505.14679).

    One pass of each fact gives, at each matrix and taught token, its input h and the gradient g of the answer's nats with
    respect to its output. Both are normalized by the mean and the deviation of all that came so far, this edit included, and
    `wanted` and `shift` make the change of it. The loss is that of `FineTune`; significance is not used. Nothing but the
    mean and the deviation is remembered from edit to edit. They are of features that were read while the model changed: the order
    of the facts matters in `sequential`, and not in `joint`, where all facts are one edit of the unedited model.

    Where details are open, this follows the code that the authors released, also in EasyEdit (zjunlp): statistics are shared by
    matrices of the same shape; h is normalized for ‖h̃‖² alone, and not for the ridge regression. It departs from that code in:
    the sum of squares, where the code counts a batch of n tokens as n / (n − 1) times its own (the paper's formula, with the variance
    over n, is this one); the loss, summed over tokens, where the code takes a batch's mean; and float64. The paper edits 100 facts at a
    time, `sequential` one: at first few tokens make the statistics.

    Args:
        layer: a decoder layer that is changed, from 0.
        lr: η. ‖h̃‖² is about the number of inputs, so that 1 / inputs asks for a step of one deviation of the gradient.
        more_layers: further layers that are changed as well, all by the same pass.
        target_modules: which matrices of these layers, as `LoRA` has them. The paper has `gate_proj` and `up_proj` in Llama and Qwen,
            `down_proj` in Mistral.
        ridge: λ, in squared units of h; the paper's is 1.
        prompt: whether the prompt's tokens are taken in too (EasyEdit's settings), or those alone that predict the answer
            and its end (the paper).
    """

    layer: int
    lr: float
    more_layers: Sequence[int] = ()
    target_modules: Sequence[str] = ("down_proj",)
    ridge: float = 1.0
    prompt: bool = False

    above_zero: ClassVar[tuple[str, ...]] = ("lr", "ridge")

    def __post_init__(self) -> None:
        super().__post_init__()
        matrices((self.layer,), self.target_modules)

    @property
    def sites(self) -> tuple[Site, ...]:
        return matrices((self.layer, *self.more_layers), self.target_modules)

    def check(self, lm: LanguageModel) -> None:
        check_layers(lm, self.more_layers)
        super().check(lm)

    def record(self, lm: LanguageModel, fact: Fact) -> list[tuple[Tensor, Tensor]]:
        """Of each site (h, g), in float64."""
        (dialogue,) = answers(lm, [fact])
        fixed = {name: p.detach() for name, p in lm.model.named_parameters()}
        with torch.enable_grad(), traced(lm, self.sites) as seen:
            gradients = torch.autograd.grad(summed_nll(lm, [dialogue], fixed), [seen[site][1] for site in self.sites])
        found = []
        for site, gradient in zip(self.sites, gradients, strict=True):
            pair = seen[site][0][0], gradient[0]  # of the one dialogue
            h, g = (t[0 if self.prompt else dialogue.answer - 1 :].to(site.home(lm.model), torch.float64) for t in pair)
            if not (torch.isfinite(h).all() and torch.isfinite(g).all()):
                raise FloatingPointError(
                    f"fact {fact.id}: an activation or a gradient at layer {site.layer} is not finite"
                )
            found.append((h, g))
        return found

    def together(self, lm: LanguageModel, parts: Sequence[Any]) -> WeightDelta:
        return self._shifted(lm, parts, {})

    def one_by_one(
        self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0
    ) -> Iterator[Callable[[], WeightDelta]]:
        """A sequence that goes on teaches the first `done` facts again, for the statistics of the model as it then stood."""
        so_far: dict[tuple[int, int], Moments] = {}
        total = NOTHING
        for fact in facts[:done]:
            with total.applied_to(lm):
                step = self._next(lm, fact, so_far)
            total = total + step
        for fact in facts[done:]:
            yield partial(self._next, lm, fact, so_far)

    def _next(self, lm: LanguageModel, fact: Fact, so_far: dict[tuple[int, int], Moments]) -> WeightDelta:
        if not lm.changed:  # regime=single: nothing was taught before
            so_far.clear()
        return self._shifted(lm, [self.record(lm, fact)], so_far)

    def _shifted(
        self,
        lm: LanguageModel,
        parts: Sequence[list[tuple[Tensor, Tensor]]],
        so_far: dict[tuple[int, int], Moments],
    ) -> WeightDelta:
        """The change of one edit, after its features are added to the statistics, which are by the shape of the matrix."""
        pairs = [tuple(map(torch.cat, zip(*own, strict=True))) for own in zip(*parts, strict=True)]
        for keys, gradients in pairs:
            shape, new = (
                (keys.shape[1], gradients.shape[1]),
                Moments.of(torch.cat([keys, gradients], 1).cpu()),
            )  # matrices of one shape may be on several devices
            so_far[shape] = so_far[shape] + new if shape in so_far else new
        changes = {}
        for site, (keys, gradients) in zip(self.sites, pairs, strict=True):
            moments = so_far[keys.shape[1], gradients.shape[1]]
            changes[site.weight_name(lm.model)] = shift(keys, wanted(keys, gradients, moments, self.lr), self.ridge)
        return WeightDelta(changes, {"tokens": float(len(pairs[0][0]))})


@contextmanager
def traced(lm: LanguageModel, sites: Sequence[Site]) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
    """While open, a pass leaves for each site its input, and a zero that was added to its output, to take a gradient of."""
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def trace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            seen[site] = args[0].detach(), zero
            return output + zero

        return trace

    handles = [site.linear(lm.model).register_forward_hook(hook(site)) for site in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
