"""What a test of general ability is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from qfbench.facts.probes import Row
from qfbench.models.lm import LanguageModel


@runtime_checkable
class Suite(Protocol):
    """Asks a model as it is, and gives one row per passage or question, the same ones every time.

    Each row has `kind` (`perplexity`: `nll` in nats per token, `tokens`; `question`: see `harness.Questions`), `query` and
    `fact_id`, which is unique in the suite.
    """

    @property
    def fingerprint(self) -> str:
        """A hash of all that is asked and how: two runs may be compared where it is the same."""

    def __call__(self, lm: LanguageModel) -> list[Row]: ...
