"""Fine-tuning with replay: beside each step on the answers one on what the unedited model says to other questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from qfbench.editors.finetune import FineTune
from qfbench.editors.stays import staying
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel


@dataclass(frozen=True)
class Replay(FineTune):
    """Fine-tuning that may see what `QFStream` sees. (Rehearsal: Robins 1995; here of the model's own replies.)

    Args:
        keep: facts that are not taught, as `QFStream` has them; what the unedited model replies to all that they ask is replayed.
        replay: how many of these dialogues are drawn for each step. Their cross-entropy per token counts as much as that of the
            answers; when to stop is for the answers alone to say.

    Raises:
        UserError: nothing is left to replay.
    """

    keep: Sequence[Fact] = field(default=(), repr=False)
    replay: int = 32

    above_zero: ClassVar[tuple[str, ...]] = (*FineTune.above_zero, "replay")
    sees_all: ClassVar[bool] = True  # what is kept is asked without what the facts ask

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        return self.trained(lm, facts, self._drawn(lm, facts, "all"))

    def one_by_one(
        self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0
    ) -> Iterator[Callable[[], WeightDelta]]:
        kept = staying(lm, self.keep, facts)
        for fact in facts[done:]:
            yield partial(self.trained, lm, [fact], self._drawn(lm, facts, fact.id, kept))

    def _drawn(
        self, lm: LanguageModel, facts: Sequence[Fact], seed: str, kept: Sequence[Rendering] | None = None
    ) -> Callable[[], Sequence[Rendering]]:
        kept = staying(lm, self.keep, facts) if kept is None else kept
        if not kept:
            raise UserError("editor.keep: asks nothing that the facts do not ask, so that there is nothing to replay")
        return partial(random.Random(seed).choices, kept, k=self.replay)
