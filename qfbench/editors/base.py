"""What an editor is: a frozen set of hyper-parameters that turns facts into a change of weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from qfbench.editors.teach import SAMPLE
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site, layers

TOGETHER = 64  # facts that are recorded at once


class Editor(ABC):
    """Subclasses are frozen dataclasses whose fields are their hyper-parameters.

    Raises:
        UserError: a field that is annotated as an int is no whole number, one named in `above_zero` is not above 0, or one
            named in `not_negative` is below 0 (None is let through), or either is not finite.
    """

    above_zero: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ()
    needs_firing: ClassVar[bool] = False  # whether it runs at firing blocks alone
    sees_all: ClassVar[bool] = False  # whether its first change depends on facts that are still to come

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type in (int, "int") and not isinstance(value, int):
                raise UserError(f"editor.{field.name}={value!r}: must be a whole number")
            if field.name in self.above_zero and not 0 < value < math.inf:
                raise UserError(f"editor.{field.name}={value}: must be above 0, and finite")
            if field.name in self.not_negative and value is not None and not 0 <= value < math.inf:
                raise UserError(f"editor.{field.name}={value}: must be 0 or more, and finite")

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The weight matrices that the editor changes. Titles and tables name the layer of the first. Empty: it changes none."""

    @property
    def about(self) -> dict[str, Any]:
        """What rows say of where weights are changed."""
        return {"layer": self.sites[0].layer} if self.sites else {}

    def check(self, lm: LanguageModel) -> None:
        """Raise what `edit` would raise on this model whatever the facts are, before anything is asked. `lm` is left as it is.

        Raises:
            Unsupported: the editor cannot run on this model or layer.
            UserError: a hyper-parameter does not fit the model (an unknown layer, say).
            FloatingPointError: an activation is not finite.
        """
        for site in self.sites:
            site.linear(lm.model)

    @abstractmethod
    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        """The change that teaches all of `facts` together to `lm` as it stands. `lm` is left bit-identical.

        Raises:
            Unsupported: the editor cannot run on this model or layer.
            UserError: a hyper-parameter does not fit the model (an unknown layer, say).
            FloatingPointError: an activation or the solution is not finite.
        """

    def one_by_one(
        self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0
    ) -> Iterator[Callable[[], WeightDelta]]:
        """For each fact after the first `done`, what gives the change that teaches it alone to `lm` as it then stands.

        `lm` must be unedited whenever the next is asked for.
        """
        for fact in facts[done:]:
            yield partial(self.edit, lm, [fact])

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """The change that teaches all facts so far together, for each fact after the first `done`.

        `lm` must be unedited whenever the next change is asked for.
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


def check_layers(lm: LanguageModel, more_layers: Sequence[int]) -> None:
    """Refuse layers that the model does not have.

    Raises:
        UserError: naming the setting and the range.
    """
    highest = len(layers(lm.model)) - 1
    if not all(0 <= layer <= highest for layer in more_layers):
        raise UserError(f"editor.more_layers={list(more_layers)}: the model has layers 0 to {highest}")


def matrices(layers: Sequence[int], modules: Sequence[str]) -> tuple[Site, ...]:
    """These matrices of each of these layers, from low to high, each once.

    Raises:
        UserError: none is named.
    """
    if not modules:
        raise UserError("editor.target_modules=[]: name at least one matrix, such as down_proj")
    return tuple(Site(layer, module) for layer in sorted(set(layers)) for module in dict.fromkeys(modules))


class Recorder(Editor):
    """An editor in two steps: it records each fact in forward passes, and solves for the change from what it recorded.

    Where a record is the same whatever this editor has changed before (`ahead`), facts that are taught one after another are
    recorded on the unedited model, many in one pass.
    """

    ahead: ClassVar[bool] = False

    @abstractmethod
    def record(self, lm: LanguageModel, fact: Fact) -> Any:
        """What `together` needs to know of a fact."""

    @abstractmethod
    def together(self, lm: LanguageModel, parts: Sequence[Any]) -> WeightDelta:
        """The change that teaches all that was recorded, to `lm` as it stands."""

    def record_all(self, lm: LanguageModel, facts: Sequence[Fact]) -> list[Any]:
        """What `record` gives for each fact; an editor may make it in fewer passes."""
        return [self.record(lm, fact) for fact in facts]

    def check(self, lm: LanguageModel) -> None:
        self.record(lm, SAMPLE)

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        return self.together(lm, self.record_all(lm, facts))

    def recorded(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[Any]:
        """The records of all facts after the first `done`, `TOGETHER` of them made at a time.

        A fact has the same company wherever one begins: in two bytes a number it would be another record in another.
        """
        for start in range(done - done % TOGETHER, len(facts), TOGETHER):
            yield from self.record_all(lm, facts[start : start + TOGETHER])[max(0, done - start) :]

    def one_by_one(
        self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0
    ) -> Iterator[Callable[[], WeightDelta]]:
        if not self.ahead:
            yield from super().one_by_one(lm, facts, done)
            return
        for part in self.recorded(lm, facts, done):
            yield partial(self.together, lm, [part])

    def joint(self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0) -> Iterator[WeightDelta]:
        """Each fact is recorded once: on the unedited model its record is the same whatever is taught beside it."""
        records = self.recorded(lm, facts)
        parts = list(islice(records, done))
        for part in records:
            parts.append(part)
            yield self.together(lm, parts)
