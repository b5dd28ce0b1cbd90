"""QF as a stream: what is taught, at the least cost to what is to stay, in closed form, one fact after another.

Each layer solves min Σ s ‖ΔW k − r‖² + λ tr(ΔW (C + βI) ΔWᵀ) over all taught tokens so far: k the key when alone, r the wanted
change of the layer's output (told minus alone), C the second moment of keys whose outputs are to stay. With P the inverse of
λ (C + βI) + Σ s k kᵀ this is recursive least squares: it needs no earlier fact, and gives the same as all facts at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.base import TOGETHER, Editor
from qfbench.editors.qf import check_block, check_finite, check_sites
from qfbench.editors.recursive import Stream
from qfbench.editors.stays import Passage, framings, of_decoys, pieces, rests, said_of, staying, unchanged, wordings
from qfbench.editors.teach import SAMPLE, Lesson, lesson, surprising
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.activations import climb, record_many
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site

GROWN = 1.2  # times as many facts, before all are solved anew


@dataclass(frozen=True)
class Taught:
    """One fact: what is taught of it, in each wording, and what is to stay because of it."""

    own: list[Passage]
    stays: list[Passage]


@dataclass(frozen=True)
class Ground:
    """What a sequence begins with: what is to stay whatever is taught, and the states of dialogues that enter the lowest layer."""

    kept: list[Passage]
    entering: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(len(passage.at) for passage in self.kept) or 1


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
        kinds: which of these are asked (`edit`: the query), or all where none is named.
        penalty: λ, in taught tokens: how much the mean token that is to stay counts.
        floor: β, as a share of the mean eigenvalue of C.
        opener, closer, query: significance of tokens around the answer (`teach.lesson`).
        surprise: answer tokens that the unedited model gives less nats than this, alone, are not taught.
        strength: what is wanted is multiplied by this.
        retold: what is taught is what the model says itself when told, up to the answer's name; the fact's own answer, where that is wrong.
        frames: further wordings in which a fact is taught, `{}` for its query and `{subject}`; none that another fact has or
            asks, or in which the told model is wrong.
        untaught: whether the tokens of a taught answer that are not taught are to stay as they are.
        decoys: what the unedited model replies to a fact's query is to stay, for so many made-up subjects that are named nearly as its own
            (`stays.decoys`; the other parts of their names are from `keep`).
        refresh: solve all facts so far anew after so many more, and a fifth more; 0: never. With the keys that the changed layers below
            now give, and the weights that `boost` has made. It costs `passes` over all facts so far and all that is kept.
        boost: at each of these passes, a token that the changed model gives more nats than it should (told, 0; to stay, those before)
            weighs so many times more per nat, up to one nat; 1: never (after AdaBoost, Freund and Schapire 1997).
    """

    layer: int
    more_layers: Sequence[int] = ()
    keep: Sequence[Fact] = field(default=(), repr=False)
    kinds: Sequence[str] = ()
    penalty: float = 100.0
    floor: float = 0.03
    opener: float = 0.0
    closer: float = 0.0
    query: float = 0.0
    surprise: float = 0.0
    strength: float = 1.0
    retold: bool = False
    frames: Sequence[str] = ()
    untaught: bool = False
    decoys: int = 0
    refresh: int = 0
    passes: int = 1
    boost: float = 1.0

    above_zero = ("penalty", "floor", "strength", "passes", "boost")
    sees_all: ClassVar[bool] = True  # what is kept is asked without what the facts ask
    not_negative = ("opener", "closer", "query", "surprise", "decoys", "refresh")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boost < 1:
            raise UserError(f"editor.boost={self.boost}: must be 1 or more; what breaks would weigh less")
        for name in ("kinds", "frames"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"editor.{name}={getattr(self, name)!r}: must be a list")
        for frame in self.frames:
            if "{}" not in frame and "{subject}" not in frame:
                raise UserError(
                    f"editor.frames: {frame!r} asks the same of every fact; it must hold {{}} or {{subject}}"
                )

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
        heed = self.boost != 1
        ground = Ground(unchanged(lm, staying(lm, self.keep, facts, self.kinds), heed))
        so_far: list[Taught] = []
        streams = self._anew(lm, ground, so_far)
        names = [site.weight_name(lm.model) for site in self.sites]
        refresh = self.refresh if len(names) > 1 or heed else 0
        fresh = 0  # facts when all was last solved anew
        for n, taught in enumerate(self._told(lm, facts), start=1):
            if refresh:
                so_far.append(taught)
            if refresh and n >= max(fresh + refresh, fresh * GROWN):
                fresh, before = n, streams
                for _ in range(self.passes if heed else 1):
                    streams = self._anew(lm, ground, so_far)
                steps = [LowRank(now.change - was.change) for now, was in zip(streams, before, strict=True)]
            else:
                steps = self._take_in(lm, ground, streams, taught)
            notes = {"tokens": float(sum(len(own.weights) for own in taught.own))}
            total = {name: LowRank(stream.change) for name, stream in zip(names, streams, strict=True)}
            yield WeightDelta(dict(zip(names, steps, strict=True)), notes), WeightDelta(total, notes)

    def _take_in(self, lm: LanguageModel, ground: Ground, streams: Sequence[Stream], taught: Taught) -> list[LowRank]:
        """Teach one more fact, each layer what is missing after the ones below; what of it breaks again, with more weight. Returns the
        steps."""
        before = [stream.change for stream in streams]
        passages = [*taught.own, *taught.stays]
        at = [passage.at for passage in passages]
        taken = sum(len(own.at) for own in taught.own)
        weights = torch.cat([p.weights * (1 if p.told else self.penalty / ground.tokens) for p in passages])
        given = torch.zeros_like(weights)

        def change(i: int, keys: Tensor, residual: Tensor) -> Tensor:
            told = torch.cat([own.told[i] for own in taught.own])
            own, wanted = self._missing(lm, i, keys[:taken], residual[:taken], told)
            stay = streams[i].like(keys[taken:])
            rows = torch.cat([own, stay]), torch.cat([wanted, wanted.new_zeros(len(stay), wanted.shape[1])])
            more = weights * torch.cat([passage.times for passage in passages]) - given
            streams[i].teach(*(streams[i].like(part[more > 0]) for part in (*rows, more)))
            return streams[i].change

        for _ in range(self.passes if self.boost != 1 else 1):
            nats = climb(lm, [p.dialogue for p in passages], self.sites, at, change, ground.entering, self.boost != 1)
            given = weights * torch.cat([passage.times for passage in passages])
            self._heed(passages, nats)
        return [LowRank(stream.change - was) for stream, was in zip(streams, before, strict=True)]

    def _anew(self, lm: LanguageModel, ground: Ground, so_far: Sequence[Taught]) -> list[Stream]:
        """Each layer solved for all facts so far, with the keys, of facts and of what is to stay, that the layers below now give. What
        breaks in this will weigh more in the next."""
        stays = [*ground.kept, *(passage for taught in so_far for passage in taught.stays)]
        owns = [own for taught in so_far for own in taught.own]
        n, kept = (sum(len(passage.at) for passage in some) for some in (stays, ground.kept))
        streams: list[Stream] = []

        def change(i: int, keys: Tensor, residual: Tensor) -> Tensor:
            stay = keys[:n].to(self.sites[i].home(lm.model), torch.float64)
            times = torch.cat([passage.times for passage in stays]).to(stay)[:, None] if stays else stay[:, :1]
            moment, also = (
                some.T @ (heavy * some) / ground.tokens
                for some, heavy in zip(stay.split([kept, n - kept]), times.split([kept, n - kept]), strict=True)
            )
            streams.append(Stream.begin(moment, residual.shape[1], self.penalty, self.floor, also))
            if owns:
                told = torch.cat([passage.told[i] for passage in owns])
                weights = torch.cat([passage.weights * passage.times for passage in owns])
                streams[i].teach(*self._missing(lm, i, keys[n:], residual[n:], told), streams[i].like(weights))
            return streams[i].change

        passages = [*stays, *owns]
        asked = [passage.dialogue for passage in passages] or [lesson(lm, SAMPLE).alone]
        at = [passage.at for passage in passages] or [()]
        heed = self.boost != 1 and bool(owns)
        nats = climb(lm, asked, self.sites, at, change, ground.entering, rate=heed)
        self._heed(passages, nats)
        return streams

    def _heed(self, passages: Sequence[Passage], nats: Float[Tensor, " tokens"] | None) -> None:
        if nats is not None:
            sizes = [len(passage.at) for passage in passages]
            for passage, now in zip(passages, nats.double().cpu().split(sizes), strict=True):
                passage.broke(now, self.boost)

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
        """Each fact's lessons, what each layer gives when told, and what is to stay because of it; recorded `TOGETHER` at a time."""
        names = [found for fact in self.keep if (found := pieces(lm, fact))] if self.decoys else []
        # Of one subject's facts a frame without the query would teach different answers to one question.
        framed = Counter(query for fact in facts for query in framings(fact, self.frames))
        taken = said_of(facts) | {query for query, n in framed.items() if n > 1}
        for start in range(0, len(facts), TOGETHER):
            own = facts[start : start + TOGETHER]
            worded = wordings(lm, own, self.frames, self.retold, taken)
            every = [lesson(lm, one, self.opener, self.closer, query=self.query) for said in worded for one in said]
            lessons = iter(surprising(lm, every, self.surprise))
            pairs = [[pair for _ in said if (pair := next(lessons))] for said in worded]
            for fact, of_it in zip(own, pairs, strict=True):
                if not of_it:
                    raise UserError(f"fact {fact.id}: editor.surprise={self.surprise} leaves no token to teach")
            flat = [(fact, pair) for fact, of_it in zip(own, pairs, strict=True) for pair in of_it]
            passages = iter(self._passages(lm, flat))
            heed = self.boost != 1
            left = rests(lm, pairs, heed, self.retold) if self.untaught else [[] for _ in own]
            strange = of_decoys(lm, own, names, self.decoys, taken, heed)
            for of_it, rest, replies in zip(pairs, left, strange, strict=True):
                yield Taught([next(passages) for _ in of_it], [*rest, *replies])

    def _passages(self, lm: LanguageModel, taught: Sequence[tuple[Fact, Lesson]]) -> Iterator[Passage]:
        """The tokens that are taught, and what each layer gives there when told."""
        pairs = [pair for _, pair in taught]
        read = record_many(lm, [pair.told for pair in pairs], self.sites, [pair.told_at for pair in pairs])
        for site, there in zip(self.sites, read, strict=True):
            check_finite(site, [fact for fact, _ in taught], there)
            check_block(lm, site, there)
        for i, pair in enumerate(pairs):
            weights = torch.tensor(pair.weights, dtype=torch.float64)
            # Of the answer's tokens each nat is a fault; what stands before it, the model need not say.
            nats = torch.tensor([0.0 if at >= pair.alone.answer - 1 else math.inf for at in pair.alone_at])
            yield Passage(pair.alone, pair.alone_at, weights, nats, [there[i].output for there in read])
