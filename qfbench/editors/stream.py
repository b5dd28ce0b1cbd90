"""QF as a stream: what is taught, at the least cost to what is to stay, in closed form, one fact after another.

Each layer solves min Σ s ‖ΔW k − r‖² + λ tr(ΔW (C + βI) ΔWᵀ) over all taught tokens so far: k the key when alone, r the wanted
change of the layer's output (told minus alone), C the second moment of keys whose outputs are to stay. With P the inverse of
λ (C + βI) + Σ s k kᵀ this is recursive least squares: it needs no earlier fact, and gives the same as all facts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import TOGETHER, Editor, check_layers
from qfbench.editors.qf import check_block, check_finite
from qfbench.editors.teach import SAMPLE, Lesson, lesson
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.activations import climb, record_many
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel, Score
from qfbench.models.sites import Site


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
    def begin(cls, stay: Float[Tensor, "f f"], d: int, penalty: float, floor: float) -> Stream:
        """Nothing taught. `stay` is C; `floor` is β as a share of C's mean eigenvalue (of 1, where C is 0)."""
        f = stay.shape[0]
        mean = stay.diagonal().mean().item() or 1.0
        cost = penalty * (stay + floor * mean * torch.eye(f, dtype=stay.dtype, device=stay.device))
        return cls(torch.cholesky_inverse(torch.linalg.cholesky(cost)), stay.new_zeros(d, f))

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


@dataclass(frozen=True)
class Taught:
    """One fact: where it is taught, and what each layer gives there when told."""

    pair: Lesson
    told: list[Float[Tensor, "taught d"]]


@dataclass(frozen=True)
class QFStream(Editor):
    """QF for long sequences: facts in any order, one after another, at the least cost to what is to stay.

    What is wanted of a token is what the unedited model gives when told. With `more_layers`, the lowest layer is changed first, and
    each layer above takes what is still missing after it; then the order of the facts matters, for the keys of earlier facts, and
    of what is to stay, were read under earlier changes, until the next `refresh`. Regimes `sequential` and `joint` give the same.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0.
        more_layers: further layers that are changed as well.
        keep: facts that are not taught. Their queries in all wordings (subjects unknown to the model), and the questions of common
            knowledge that they carry, are asked of the unedited model; the keys that predict its replies are what is to stay.
            What the taught facts ask, or is answered alike, is left out.
        penalty: λ, in taught tokens: how much the mean token that is to stay counts.
        floor: β, as a share of the mean eigenvalue of C.
        opener, closer, query: significance of tokens around the answer (`teach.lesson`).
        surprise: answer tokens that the unedited model gives less nats than this, alone, are not taught.
        strength: what is wanted is multiplied by this.
        refresh: with several layers, solve all facts so far anew after so many, with the keys that the changed layers below now
            give; 0: never. It costs a pass over all facts so far and all that is kept.
    """

    layer: int
    more_layers: Sequence[int] = ()
    keep: Sequence[Fact] = field(default=(), repr=False)
    penalty: float = 100.0
    floor: float = 0.03
    opener: float = 0.0
    closer: float = 0.0
    query: float = 0.0
    surprise: float = 0.0
    strength: float = 1.0
    refresh: int = 0

    above_zero = ("penalty", "floor", "strength")
    sees_all: ClassVar[bool] = True  # what is kept is asked without what the facts ask
    not_negative = ("opener", "closer", "query", "surprise", "refresh")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "down_proj") for layer in sorted({self.layer, *self.more_layers}))

    def check(self, lm: LanguageModel) -> None:
        check_sites(lm, self.more_layers, self.sites)

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        *_, (_, total) = self._taught(lm, facts)
        return total

    def one_by_one(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[partial[WeightDelta]]:
        for n, (step, _) in enumerate(self._taught(lm, facts)):
            if n >= done:
                yield partial(lambda step: step, step)

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        for n, (_, total) in enumerate(self._taught(lm, facts)):
            if n >= done:
                yield total

    def _taught(self, lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[tuple[WeightDelta, WeightDelta]]:
        """For each fact its step, and the change so far. `lm` must be unedited whenever the next is asked for."""
        kept, so_far = staying(lm, self.keep, facts), list[Taught]()
        streams = self._anew(lm, kept, so_far)
        names = [site.weight_name(lm.model) for site in self.sites]
        refresh = self.refresh if len(names) > 1 else 0
        for n, taught in enumerate(self._told(lm, facts), start=1):
            if refresh:
                so_far.append(taught)
            if refresh and n % refresh == 0:
                before, streams = streams, self._anew(lm, kept, so_far)
                steps = [LowRank(now.change - was.change) for now, was in zip(streams, before, strict=True)]
            else:
                steps = self._take_in(lm, streams, taught)
            notes = {"tokens": float(len(taught.pair.weights))}
            total = {name: LowRank(stream.change) for name, stream in zip(names, streams, strict=True)}
            yield WeightDelta(dict(zip(names, steps, strict=True)), notes), WeightDelta(total, notes)

    def _take_in(self, lm: LanguageModel, streams: Sequence[Stream], taught: Taught) -> list[LowRank]:
        """Teach one more fact, each layer what is missing after the ones below. Returns the steps."""
        steps = []

        def change(i: int, keys: Tensor, residual: Tensor) -> Tensor:
            given = streams[i].like(torch.tensor(taught.pair.weights))
            steps.append(streams[i].teach(*self._missing(lm, i, keys, residual, taught.told[i]), given))
            return streams[i].change

        climb(lm, [taught.pair.alone], self.sites, [taught.pair.alone_at], change)
        return steps

    def _anew(self, lm: LanguageModel, kept: Sequence[Rendering], so_far: Sequence[Taught]) -> list[Stream]:
        """Each layer solved for all facts so far, with the keys, of facts and of what is to stay, that the layers below now give."""
        at = [range(dialogue.answer - 1, dialogue.closer) for dialogue in kept]
        n = sum(map(len, at))
        streams: list[Stream] = []
        weights = torch.tensor([weight for taught in so_far for weight in taught.pair.weights], dtype=torch.float64)

        def change(i: int, keys: Tensor, residual: Tensor) -> Tensor:
            site = self.sites[i]
            stay = keys[:n].to(site.home(lm.model), torch.float64)
            moment = stay.T @ stay / max(n, 1)
            streams.append(Stream.begin(moment, residual.shape[1], self.penalty, self.floor))
            if so_far:
                told = torch.cat([taught.told[i] for taught in so_far])
                streams[i].teach(*self._missing(lm, i, keys[n:], residual[n:], told), streams[i].like(weights))
            return streams[i].change

        pairs = [taught.pair for taught in so_far]
        asked = [*kept, *(pair.alone for pair in pairs)] or [lesson(lm, SAMPLE).alone]
        climb(lm, asked, self.sites, [*at, *(pair.alone_at for pair in pairs)] or [()], change)
        return streams

    def _missing(
        self, lm: LanguageModel, i: int, keys: Tensor, residual: Tensor, told: Tensor
    ) -> tuple[Float[Tensor, "taught f"], Float[Tensor, "taught d"]]:
        """The keys, and what the unedited matrix gives too little of when alone, in float64."""
        site = self.sites[i]
        home = site.home(lm.model)
        key, beside, wanted = (t.to(home, torch.float64) for t in (keys, residual, told))
        linear = site.linear(lm.model)
        given = key @ linear.weight.detach().to(home, torch.float64).T
        if linear.bias is not None:
            given = given + linear.bias.detach().to(home, torch.float64)
        return key, self.strength * (wanted - given - (0 if site.fires(lm.model) else beside))

    def _told(self, lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[Taught]:
        """Each fact's lesson, and what each layer gives when told; recorded `TOGETHER` at a time."""
        for start in range(0, len(facts), TOGETHER):
            own = facts[start : start + TOGETHER]
            pairs = [lesson(lm, fact, self.opener, self.closer, query=self.query) for fact in own]
            if self.surprise:
                scores = lm.score([pair.alone for pair in pairs])
                pairs = [self._surprising(*both) for both in zip(own, pairs, scores, strict=True)]
            read = record_many(lm, [pair.told for pair in pairs], self.sites, [pair.told_at for pair in pairs])
            for site, there in zip(self.sites, read, strict=True):
                check_finite(site, own, there)
                check_block(lm, site, there)
            for i, pair in enumerate(pairs):
                yield Taught(pair, [there[i].output for there in read])

    def _surprising(self, fact: Fact, pair: Lesson, score: Score) -> Lesson:
        nats = dict(zip(range(pair.alone.answer - 1, pair.alone.closer), score.nll, strict=True))
        kept = [i for i, at in enumerate(pair.alone_at) if nats.get(at, self.surprise) >= self.surprise]
        if not kept:
            raise UserError(f"fact {fact.id}: editor.surprise={self.surprise} leaves no token to teach")
        return replace(
            pair,
            told_at=tuple(pair.told_at[i] for i in kept),
            alone_at=tuple(pair.alone_at[i] for i in kept),
            weights=tuple(pair.weights[i] for i in kept),
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


def staying(lm: LanguageModel, keep: Sequence[Fact], facts: Sequence[Fact]) -> list[Rendering]:
    """What `lm` replies to the queries of `keep`, in all wordings, and to what else they ask; but for what is asked of `facts`, or has an
    answer that they expect."""
    taken = {
        said for fact in facts for probe in (fact.edit, *fact.probes) for said in (probe.query, probe.expected) if said
    }
    probes = [probe for fact in keep for probe in (fact.edit, *fact.probes) if not probe.system and not probe.needs]
    queries = list(dict.fromkeys(probe.query for probe in probes if not taken & {probe.query, probe.expected}))
    replies = lm.replies([lm.render(query) for query in queries])
    return [lm.render(query, "", r.text) for query, r in zip(queries, replies, strict=True) if r.text]
