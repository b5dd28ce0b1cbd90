"""QF as a stream: what is taught, at the least cost to what is to stay, in closed form, one fact after another.

Each layer solves min Σ s ‖ΔW k − r‖² + λ tr(ΔW (C + βI) ΔWᵀ) over all taught tokens so far: k the key when alone, r the wanted
change of the layer's output (told minus alone), C the second moment of keys whose outputs are to stay. With P the inverse of
λ (C + βI) + Σ s k kᵀ this is recursive least squares: it needs no earlier fact, and gives the same as all facts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.digest import hashed
from qfbench.editors.base import TOGETHER, Editor
from qfbench.editors.teach import SAMPLE, Lesson, lesson
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.activations import climb, record, record_many, summed
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel, Score
from qfbench.models.sites import Site


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

    def teach(
        self, keys: Float[Tensor, "taught f"], wanted: Float[Tensor, "taught d"], weights: Float[Tensor, " taught"]
    ) -> LowRank:
        """Take in one fact's tokens; a weight below 0 takes them out again. Returns the step of `change`."""
        reach = keys @ self.inverse
        gain = torch.linalg.solve(
            torch.diag(1 / weights) + reach @ keys.T, torch.cat([wanted - keys @ self.change.T, reach], 1)
        )
        missed, back = gain.split([self.change.shape[0], keys.shape[1]], 1)
        step = LowRank(missed.T, reach)
        self.change = self.change + step.dense()
        inverse = self.inverse - reach.T @ back
        self.inverse = (inverse + inverse.T) / 2
        return step


@dataclass(frozen=True)
class QFStream(Editor):
    """QF for long sequences: facts in any order, one after another, at the least cost to what is to stay.

    What is wanted of a token is what the unedited model gives when told. With `more_layers`, the lowest layer is changed first, and
    each layer above takes what is still missing after it; then the order of the facts matters a little, for the keys of
    earlier facts were read under earlier changes. Regimes `sequential` and `joint` give the same.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0.
        more_layers: further layers that are changed as well.
        keep: facts that are not taught. Their queries in all wordings (subjects unknown to the model), and the questions of common
            knowledge that they carry, are asked of the unedited model; the keys that predict its replies are what is to stay.
            What the taught facts ask, too, is left out.
        penalty: λ, in taught tokens: how much the mean token that is to stay counts.
        floor: β, as a share of the mean eigenvalue of C.
        opener, closer, query: significance of tokens around the answer (`teach.lesson`).
        surprise: answer tokens that the unedited model gives less nats than this, alone, are not taught.
        strength: what is wanted is multiplied by this.
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

    above_zero = ("penalty", "floor", "strength")
    not_negative = ("opener", "closer", "query", "surprise")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "down_proj") for layer in sorted({self.layer, *self.more_layers}))

    def check(self, lm: LanguageModel) -> None:
        super().check(lm)
        record(lm, [lesson(lm, SAMPLE).alone], self.sites[0])

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
        streams = self._begin(lm, facts)
        names = [site.weight_name(lm.model) for site in self.sites]
        for pair, told in self._told(lm, facts):
            steps: dict[str, LowRank] = {}
            read: list[Tensor] = []
            significance = torch.tensor(pair.weights, dtype=torch.float64)

            def change(i: int, keys: Tensor, residual: Tensor) -> Tensor:
                stream, site = streams[i], self.sites[i]
                where = stream.change
                key, given, output = (t.to(where.device, where.dtype) for t in (keys, significance, told[i]))  # noqa: B023
                weight = site.linear(lm.model).weight.detach().to(where.device, where.dtype)
                wanted = output - key @ weight.T
                if not site.fires(lm.model):
                    wanted = wanted - residual.to(where.device, where.dtype)
                steps[names[i]] = stream.teach(key, self.strength * wanted, given)  # noqa: B023
                read.append(keys.float())  # noqa: B023
                return stream.change

            climb(lm, pair.alone, self.sites, pair.alone_at, change)
            notes = {"tokens": float(len(pair.weights))}
            total = {name: LowRank(stream.change) for name, stream in zip(names, streams, strict=True)}
            yield WeightDelta(steps, notes, read[:1]), WeightDelta(total, notes)

    def _told(self, lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[tuple[Lesson, list[Tensor]]]:
        """Each fact's lesson, and what each layer gives when told; recorded `TOGETHER` at a time."""
        for start in range(0, len(facts), TOGETHER):
            own = facts[start : start + TOGETHER]
            pairs = [lesson(lm, fact, self.opener, self.closer, query=self.query) for fact in own]
            if self.surprise:
                scores = lm.score([pair.alone for pair in pairs])
                pairs = [self._surprising(*both) for both in zip(own, pairs, scores, strict=True)]
            read = record_many(lm, [pair.told for pair in pairs], self.sites, [pair.told_at for pair in pairs])
            for i, pair in enumerate(pairs):
                yield pair, [there[i].output for there in read]

    def _surprising(self, fact: Fact, pair: Lesson, score: Score) -> Lesson:
        nats = dict(zip(range(pair.alone.answer - 1, pair.alone.closer), score.nll, strict=True))
        kept = [i for i, at in enumerate(pair.alone_at) if nats.get(at, self.surprise) >= self.surprise]
        if not kept:
            raise UserError(f"fact {fact.id}: editor.surprise={self.surprise} leaves no token to teach")
        left = {name: tuple(getattr(pair, name)[i] for i in kept) for name in ("told_at", "alone_at", "weights")}
        return replace(pair, **left)

    def _begin(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Stream]:
        homes = [site.home(lm.model) for site in self.sites]
        shapes = [site.linear(lm.model).weight.shape for site in self.sites]
        if self.keep:
            stay = second_moments(lm, staying(lm, self.keep, facts), self.sites)
        else:
            stay = [torch.zeros(f, f, dtype=torch.float64) for _, f in shapes]
        return [
            Stream.begin(moment.to(home), d, self.penalty, self.floor)
            for moment, home, (d, _) in zip(stay, homes, shapes, strict=True)
        ]


def staying(lm: LanguageModel, keep: Sequence[Fact], facts: Sequence[Fact]) -> list[Rendering]:
    """What `lm` replies to the queries of `keep`, in all wordings, and to what else they ask; but for what is asked of `facts`."""
    taken = {
        said for fact in facts for probe in (fact.edit, *fact.probes) for said in (probe.query, probe.expected) if said
    }
    probes = [probe for fact in keep for probe in (fact.edit, *fact.probes) if not probe.system and not probe.needs]
    queries = [probe.query for probe in probes if not taken & {probe.query, probe.expected}]
    prompts = [lm.render(query) for query in dict.fromkeys(queries)]
    replies = lm.replies(prompts)
    return [
        lm.render(q, "", reply.text) for q, reply in zip(dict.fromkeys(queries), replies, strict=True) if reply.text
    ]


_MOMENTS: dict[str, list[Tensor]] = {}  # of the last model, for the next job of a sweep


def second_moments(
    lm: LanguageModel, dialogues: Sequence[Rendering], sites: Sequence[Site]
) -> list[Float[Tensor, "f f"]]:
    """For each site the mean of k kᵀ, in float64, over the tokens that predict the replies, on `lm` as it stands."""
    ids = str([dialogue.ids for dialogue in dialogues])
    key = hashed(lm.weights_hash(), ids, str(sites))
    if key not in _MOMENTS:
        at = [range(d.answer - 1, d.closer) for d in dialogues]
        _MOMENTS.clear()
        _MOMENTS[key] = summed(lm, dialogues, sites, at)
    return _MOMENTS[key]
