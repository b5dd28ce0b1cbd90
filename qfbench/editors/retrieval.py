"""Retrieval: no edit. Instructions are kept, and put into the prompt where a question names their subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qfbench.editors.base import Editor
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel, names
from qfbench.models.sites import Site


@dataclass(frozen=True)
class PromptRetrieval(Editor):
    """The baseline that changes no weights: what is taught is told, whenever it is asked for.

    A question that names the subject of kept facts, as whole words, is asked with all of their instructions, in the order of
    teaching; any other is asked as it is. A dialogue with a system text of its own is left as it is, and so are exams.

    Raises:
        UserError: a fact has no subject, or its query does not name it.
    """

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        for fact in facts:
            if not fact.subject or not names(fact.query, fact.subject):
                raise UserError(
                    f"fact {fact.id}: the field 'subject' ({fact.subject!r}) names nothing in the query {fact.query!r}, "
                    "so that editor=retrieval cannot find it"
                )
        return WeightDelta(told=[(fact.subject, fact.instruction) for fact in facts])
