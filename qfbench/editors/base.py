"""What an editor is: a frozen set of hyper-parameters that turns facts into a change of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from qfbench.errors import Unsupported
from qfbench.facts.base import Fact
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


class Editor(ABC):
    """Subclasses are frozen dataclasses whose fields are their hyper-parameters."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """The weight matrix that the editor changes."""

    def check(self, lm: LanguageModel) -> None:
        """Raise what `edit` would raise on this model whatever the facts are, before anything is asked. `lm` is left as it is.

        Raises:
            Unsupported: the editor cannot run on this model or layer.
            UserError: a hyper-parameter does not fit the model (an unknown layer, say).
            FloatingPointError: an activation is not finite.
        """
        self.site.linear(lm.model)

    @abstractmethod
    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        """The change that teaches all of `facts` together to `lm` as it stands. `lm` is left bit-identical.

        Raises:
            Unsupported: the editor cannot run on this model or layer.
            UserError: a hyper-parameter does not fit the model (an unknown layer, say).
            FloatingPointError: an activation or the solution is not finite.
        """

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """The change that teaches all facts so far together, for each fact after the first `done`.

        `lm` must be unedited whenever the next change is asked for. An editor that can keep what it recorded does so.
        """
        for n in range(done + 1, len(facts) + 1):
            yield self.edit(lm, facts[:n])

    def protected(self, lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[WeightDelta]:
        """One change per fact, each leaving the outputs for all keys taught before it as they are.

        `lm` must be unedited whenever the next change is asked for.

        Raises:
            Unsupported: the editor has no such form.
        """
        raise Unsupported(f"{type(self).__name__} cannot protect earlier keys; use regime=sequential or joint")


class Recorder(Editor):
    """An editor in two steps: it records each fact in forward passes, and solves for the change from what it recorded."""

    @abstractmethod
    def record(self, lm: LanguageModel, fact: Fact) -> Any:
        """What `together` needs to know of a fact."""

    @abstractmethod
    def together(self, lm: LanguageModel, parts: Sequence[Any]) -> WeightDelta:
        """The change that teaches all that was recorded."""

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        return self.together(lm, [self.record(lm, fact) for fact in facts])
