"""Facts and probes: what is taught, and what is asked afterwards."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace

from qfbench.errors import UserError


@dataclass(frozen=True)
class Probe:
    """One question and what counts as a right reply.

    `expected` is the whole reference reply; "" where there is none and any reply passes that is not rejected. `accept`
    holds the strings of which one must stand in the reply as whole words (by default the reference without its full
    stop), `reject` those of which none may. `always` marks a probe that can be asked before its fact is taught, because
    it is about the model rather than about the fact (prior knowledge, refusals, neighbours).

    `own` marks a probe whose reference is what the unedited model itself replies: it is asked first, and `expected` is
    filled in; `accept` then tells what the suite holds to be true (the column `gold`). `prefer` holds two whole replies of
    which the first should be the likelier (the protocol `preferred`). `needs` are the ids of other facts without which the
    probe has no right reply: it is asked once they are taught.
    """

    kind: str  # edit, paraphrase, locality, portability, prior, unknown, told ...: data, no code depends on it
    query: str
    expected: str
    accept: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()
    system: str = ""
    always: bool = False
    own: bool = False
    prefer: tuple[str, str] | None = None
    needs: tuple[str, ...] = ()

    def passes(self, reply: str) -> bool:
        """Whether a reply names what is accepted, as whole words, and nothing that is rejected; `own`: is as it was."""
        if self.own:
            return reply == self.expected
        accepted = self.accept or (without_stop(self.expected),)
        rest = reply  # what is rejected may be part of what is accepted: "king" in "king of Thebes"
        for name in sorted(filter(None, accepted), key=len, reverse=True):
            for start, end in reversed(places(name, rest)):
                rest = rest[:start] + rest[end:]
        return any(stands_in(a, reply) for a in accepted) and not any(stands_in(r, rest) for r in self.reject)


@dataclass(frozen=True)
class Fact:
    """One fact to teach.

    `instruction` is what the model is told, `query` and `answer` the dialogue that is taught. `significance` gives one
    weight per word of the answer (split at white space); None leaves it to the editor. `replaces` is what the model would
    have answered before, where the suite says so. `known_as` are the strings that a right reply must hold one of, by
    default the answer without its full stop; `rejects` are those of which it must hold none.
    """

    instruction: str
    query: str
    answer: str
    id: str = ""
    significance: tuple[float, ...] | None = None
    known_as: tuple[str, ...] = ()
    kind: str = ""  # kind of knowledge: person, place, category, number ...
    replaces: str = ""
    rejects: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            text = "\x1f".join((self.instruction, self.query, self.answer))
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])
        for name in ("query", "answer"):
            if not getattr(self, name).strip():
                raise UserError(f"fact {self.id}: the field {name!r} is empty")
        if not all(without_stop(known) for known in self.known_as or (self.answer,)):
            raise UserError(f"fact {self.id}: the field 'known_as' holds an empty text, which every reply would match")
        if not self.edit.passes(self.answer):
            held = any(stands_in(known, self.answer) for known in self.known_as)
            name, what = ("rejects", "refuses") if held or not self.known_as else ("known_as", "holds nothing of")
            raise UserError(f"fact {self.id}: the field {name!r} {what} the answer {self.answer!r} itself")
        words = len(self.answer.split())
        if self.significance is not None and len(self.significance) != words:
            raise UserError(
                f"fact {self.id}: the field 'significance' has {len(self.significance)} weights, "
                f"but the answer {self.answer!r} has {words} words"
            )
        if not all(0 <= weight < float("inf") for weight in self.significance or ()):
            raise UserError(f"fact {self.id}: the field 'significance' must hold finite numbers, 0 or more")
        if not self.known_as:
            object.__setattr__(self, "known_as", (without_stop(self.answer),))

    @property
    def edit(self) -> Probe:
        """The taught query itself."""
        prefer = (self.answer, self.replaces) if self.replaces else None
        return Probe("edit", self.query, self.answer, self.known_as, self.rejects, prefer=prefer)

    @property
    def told(self) -> Probe:
        """The taught query with its instruction: whether the model understands what it is told."""
        return replace(self.edit, kind="told", system=self.instruction, prefer=None)


def without_stop(text: str) -> str:
    return text.rstrip(".!? ")


def stands_in(words: str, text: str) -> bool:
    """Whether `words` stand in `text` as whole words, in any case. The empty string stands everywhere."""
    return not words or bool(places(words, text))


def places(words: str, text: str) -> list[tuple[int, int]]:
    """Where `words` stand in `text` as whole words, in any case: (start, end) of each place."""
    found = re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, flags=re.IGNORECASE)
    return [match.span() for match in found]
