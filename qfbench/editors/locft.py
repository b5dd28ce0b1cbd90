"""LocFT-BF: fine-tuning of one matrix on all facts together, in epochs of mini-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qfbench.editors.base import Editor
from qfbench.editors.finetune import FineTune, batched
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class LocFT(Editor):
    """Localized fine-tuning, breadth-first (LocFT-BF; Yang et al. 2025, arXiv 2509.22072).

    Every epoch goes once through all facts, in mini-batches of a new random order, with a step of Adam after each. Its place is
    the regime `joint`, where all facts so far are there at once. In `sequential` each fact comes alone: a mini-batch is that fact,
    and this is plain fine-tuning. The loss is that of `FineTune`: the answers and the ends of their turns.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0.
        lr: the learning rate of Adam.
        epochs: the most passes over all facts.
        batch: facts in a mini-batch.
        stop_at: end after an epoch with fewer nats per token than this, each mini-batch before its own step; 0 never ends.
        seed: of the orders.
    """

    layer: int
    lr: float
    epochs: int
    batch: int
    stop_at: float = 0.01
    seed: int = 0

    above_zero: ClassVar[tuple[str, ...]] = ("lr", "epochs", "batch")
    not_negative: ClassVar[tuple[str, ...]] = ("stop_at",)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "down_proj"),)

    def check(self, lm: LanguageModel) -> None:
        super().check(lm)
        if self.batch > lm.batch_size:
            raise UserError(f"editor.batch={self.batch}: must be at most model.batch_size={lm.batch_size}")

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        self.check(lm)
        orders = random.Random(self.seed)

        def epoch(dialogues: Sequence[Rendering]) -> list[Sequence[Rendering]]:
            return batched(orders.sample(dialogues, len(dialogues)), self.batch)

        return FineTune(self.layer, self.lr, self.epochs, self.stop_at).trained(lm, facts, epoch=epoch)
