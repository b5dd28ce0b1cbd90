"""Locate and edit (ROME, MEMIT, AlphaEdit): what the three share.

A fact is looked up at the last token of its subject. There a layer's matrix W reads a key k, and is changed so that what is read gives
the answer: a value is searched (`value.values`), and ΔW solved in closed form, beside keys whose outputs are to stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import TOGETHER, Editor
from qfbench.editors.qf import check_finite, check_sites
from qfbench.editors.recursive import least
from qfbench.editors.stays import staying
from qfbench.editors.value import Asked, Value, values
from qfbench.facts.base import Fact
from qfbench.models.activations import record_many
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class Scene:
    """What an editor reads of the unedited model, once for all facts."""

    contexts: tuple[str, ...]
    inverses: tuple[Float[Tensor, "f f"], ...]  # of each site, as `Located.inverse` makes it


@dataclass(frozen=True)
class Located(Editor):
    """An editor that looks a fact up at its subject.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0.
        keep: facts that are not taught. What the unedited model replies to all that they ask (`stays.staying`) gives the keys
            that are to stay, of all tokens, and the contexts.
        contexts: in how many contexts, beside none, a fact is asked: other things that the model says, where an instruction
            would stand. Keys are the mean over them.
        lr, steps, stop_at, limit, weight_decay, kl: of the search for a value (`value.values`).
    """

    layer: int
    keep: Sequence[Fact] = field(default=(), repr=False)
    contexts: int = 2
    lr: float = 0.2
    steps: int = 25
    stop_at: float = 0.05
    limit: float = 4.0
    weight_decay: float = 0.1
    kl: float = 0.0625

    above_zero: ClassVar[tuple[str, ...]] = ("lr", "steps", "limit")
    sees_all: ClassVar[bool] = True  # what is kept is asked without what the facts ask
    not_negative: ClassVar[tuple[str, ...]] = ("contexts", "stop_at", "weight_decay", "kl")

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "down_proj"),)

    def check(self, lm: LanguageModel) -> None:
        check_sites(lm, (), self.sites)

    @abstractmethod
    def inverse(self, stay: Float[Tensor, "f f"], site: Site) -> Float[Tensor, "f f"]:
        """The inverse of what a change costs, where `stay` is the second moment of the keys that are to stay."""

    @abstractmethod
    def together(
        self, lm: LanguageModel, scene: Scene, asked: Sequence[Asked], found: Sequence[Value], past: Sequence[Asked]
    ) -> WeightDelta:
        """The change that gives the found values to `lm` as it stands, in which the facts of `past` are taught already."""

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        asked, scene = self._begin(lm, facts)
        return self._taught(lm, scene, asked, [])

    def one_by_one(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[partial[WeightDelta]]:
        """What was read of the unedited model is read once; of earlier facts nothing is remembered that is not read anew, so
        that a sequence goes on anywhere."""
        asked, scene = self._begin(lm, facts)
        for n in range(done, len(asked)):
            yield partial(self._taught, lm, scene, asked[n : n + 1], asked[:n])

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """Each value is searched once, on the unedited model."""
        asked, scene = self._begin(lm, facts)
        found: list[Value] = []
        for n in range(1, len(asked) + 1):
            if len(found) < n:
                found += self._values(lm, asked[n - 1 : n - 1 + TOGETHER])
            if n > done:
                yield self.together(lm, scene, asked[:n], found[:n], [])

    def _begin(self, lm: LanguageModel, facts: Sequence[Fact]) -> tuple[list[Asked], Scene]:
        self.check(lm)
        for fact in facts:
            Asked.of(lm, fact)  # before all that takes time
        kept = staying(lm, self.keep, facts)
        said = dict.fromkeys(str(lm.tokenizer.decode(list(d.ids[d.answer : d.closer]))).strip() for d in kept)
        texts = [text for text in said if text]
        contexts = tuple(texts[:: max(1, len(texts) // max(1, self.contexts))][: self.contexts])
        moments = zip(self.sites, moments_of(lm, kept, self.sites), strict=True)
        scene = Scene(contexts, tuple(self.inverse(moment, site) for site, moment in moments))
        return [Asked.of(lm, fact, contexts) for fact in facts], scene

    def _taught(self, lm: LanguageModel, scene: Scene, asked: Sequence[Asked], before: Sequence[Asked]) -> WeightDelta:
        # Where the model holds no change (regime=single), nothing was taught before.
        delta = self.together(lm, scene, asked, found := self._values(lm, asked), before if lm.changed else [])
        tokens = float(sum(len(one.dialogues[0].reply) for one in asked))
        return replace(delta, notes={"tokens": tokens, "loss": sum(one.loss for one in found) / len(found)})

    def _values(self, lm: LanguageModel, asked: Sequence[Asked]) -> list[Value]:
        how = self.lr, self.steps, self.stop_at, self.limit, self.weight_decay, self.kl
        return values(lm, self.sites[-1], asked, *how)


@dataclass(frozen=True)
class Spread(Located):
    """A located editor that spreads its change over layers: from low to high, each takes its share of what is still missing at the
    highest (MEMIT, Algorithm 1), which is searched there.

    Args:
        more_layers: further layers that are changed as well; the highest of all is where a value is searched.
    """

    more_layers: Sequence[int] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "down_proj") for layer in sorted({self.layer, *self.more_layers}))

    def check(self, lm: LanguageModel) -> None:
        check_sites(lm, self.more_layers, self.sites)

    def together(
        self, lm: LanguageModel, scene: Scene, asked: Sequence[Asked], found: Sequence[Value], past: Sequence[Asked]
    ) -> WeightDelta:
        changes: dict[str, LowRank] = {}
        for i, site in enumerate(self.sites):
            with WeightDelta(changes).applied_to(lm):
                keys, output = looked_up(lm, [*past, *asked], site, self.sites[-1])
            target = torch.stack([one.output + one.change for one in found]).to(keys)
            share = (target - output[len(past) :].to(keys)) / (len(self.sites) - i)
            wanted = torch.cat([share.new_zeros(len(past), share.shape[1]), share])  # what earlier keys give is to stay
            step, _ = least(scene.inverses[i], keys, wanted, torch.ones(len(keys)).to(keys))
            changes[site.weight_name(lm.model)] = step
        return WeightDelta(changes)


def looked_up(
    lm: LanguageModel, asked: Sequence[Asked], site: Site, top: Site
) -> tuple[Float[Tensor, "facts f"], Float[Tensor, "facts d"]]:
    """Each fact's key at `site`, the mean over its contexts, and what layer `top` gives when it is asked alone; in float64.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    dialogues = [dialogue for one in asked for dialogue in one.dialogues]
    at = [(place,) for one in asked for place in one.at]
    lower, upper = record_many(lm, dialogues, [site, top], at)
    check_finite(top, [one.fact for one in asked for _ in one.at], upper)
    size = len(asked[0].at)
    home = site.home(lm.model)
    keys = torch.cat([one.key for one in lower]).to(home, torch.float64)
    outputs = torch.cat([one.output for one in upper[::size]]).to(home, torch.float64)
    return keys.view(len(asked), size, -1).mean(1), outputs


def moments_of(lm: LanguageModel, dialogues: Sequence[Rendering], sites: Sequence[Site]) -> list[Float[Tensor, "f f"]]:
    """C of each site: the mean of k kᵀ over all tokens of the dialogues; 0 without any. In float64."""
    homes = [site.home(lm.model) for site in sites]
    widths = [site.linear(lm.model).in_features for site in sites]
    sums = [torch.zeros(f, f, dtype=torch.float64, device=home) for f, home in zip(widths, homes, strict=True)]
    for start in range(0, len(dialogues), TOGETHER):
        for i, read in enumerate(record_many(lm, dialogues[start : start + TOGETHER], sites)):
            keys = torch.cat([one.key for one in read]).to(homes[i], torch.float64)
            sums[i] += keys.T @ keys
    tokens = sum(len(dialogue.ids) for dialogue in dialogues)
    return [total / max(tokens, 1) for total in sums]
