"""Facts and probes: what is taught, and what is asked afterwards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from unicodedata import category

from qfbench.errors import UserError
from qfbench.facts.matching import key, places, stands_in, visible, without_stop


@dataclass(frozen=True)
class Probe:
    """One question and what counts as a right reply.

    `expected` is the whole reference reply; "" where there is none and any reply passes that is not rejected. `accept`
    holds the strings of which one must stand in the reply as whole words (by default the reference without its full
    stop), `reject` those of which none may: `facts/matching.py` has the rules. What stands within a mention of the `subject`
    asked about, or of what is accepted, is not rejected ("Zunda" in "Zunda A5", "king" in "king of Thebes"). `always` marks
    a probe that can be asked before its fact is taught, because it is about the model rather than about the fact (prior
    knowledge, refusals, neighbours).

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
    subject: str = ""

    def __post_init__(self) -> None:
        for name in (*self.accept, *self.reject):
            if not key(name):
                raise UserError(f"the probe {self.query!r} accepts or rejects {name!r}, which names nothing")

    def passes(self, reply: str) -> bool:
        """Whether a reply names what is accepted, as whole words, and nothing that is rejected; `own`: is as it was."""
        if self.own:
            return reply == self.expected
        accepted = self.accept or (without_stop(self.expected),)
        if not any(stands_in(name, reply) for name in accepted):
            return False
        said = [span for name in (*accepted, self.subject) for span in places(name, reply)]
        rejected = [span for name in self.reject for span in places(name, reply)]
        return all(any(start <= first and last <= end for start, end in said) for first, last in rejected)


@dataclass(frozen=True)
class Fact:
    """One fact to teach.

    `instruction` is what the model is told, `query` and `answer` the dialogue that is taught. `significance` gives one
    weight per word of the answer (split at white space); None leaves it to the editor. `replaces` is what the model would
    have answered before, where the suite says so. `known_as` are the strings that a right reply must hold one of, by
    default the answer without its full stop; `rejects` are those of which it must hold none, but within a mention of the
    `subject` or of what is known. `known_as` and `rejects` are compared as `facts/matching.py` says.

    Raises:
        UserError: a text is empty or none, the weights do not suit the answer, or the fact's own answer is not right.
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
    subject: str = ""  # what the fact is about, as the query names it
    probes: tuple[Probe, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            text = "\x1f".join((self.instruction, self.query, self.answer))
            object.__setattr__(self, "id", hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12])
        filled, free = ("query", "answer", "known_as", "rejects"), ("id", "instruction", "kind", "replaces", "subject")
        for name in filled + free:
            held = getattr(self, name)
            for text in (held,) if isinstance(held, str) else held:
                what = flaw(text, empty=name in free)
                if what:
                    raise UserError(f"fact {ascii(self.id)[1:-1]}: the field {name!r} {what}")
        if not all(without_stop(known) for known in self.known_as or (self.answer,)):
            raise UserError(f"fact {self.id}: the field 'known_as' holds an empty text, which every reply would match")
        known = {key(name) for name in self.known_as or (self.answer,)}
        for name in self.rejects:
            if key(name) in known:
                raise UserError(f"fact {self.id}: the field 'rejects' holds {name!r}, which is accepted; take it out")
        if self.replaces and key(self.replaces) == key(self.answer):
            raise UserError(f"fact {self.id}: the field 'replaces' is the answer {self.answer!r} itself")
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
        if self.significance is not None and not any(self.significance):
            raise UserError(
                f"fact {self.id}: the field 'significance' is 0 for every word, which leaves no token to teach"
            )
        if not self.known_as:
            object.__setattr__(self, "known_as", (without_stop(self.answer),))

    @property
    def edit(self) -> Probe:
        """The taught query itself."""
        prefer = (self.answer, self.replaces) if self.replaces else None
        return Probe("edit", self.query, self.answer, self.known_as, self.rejects, prefer=prefer, subject=self.subject)

    @property
    def told(self) -> Probe:
        """The taught query with its instruction: whether the model understands what it is told."""
        return replace(self.edit, kind="told", system=self.instruction, prefer=None)


BROKEN = "holds half a surrogate pair, which is no text"


def is_broken(text: str) -> bool:
    return not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text)


def flaw(text: str, empty: bool = False) -> str | None:
    """What is wrong with a text that no model should be asked, or None. It may be `empty` where nothing need be said."""
    if not visible(text) and (text or not empty):
        return "is empty" + (f" but for {text!r}" if text else "")
    if text.isprintable():
        return None
    if is_broken(text):
        return BROKEN
    control = next((letter for letter in text if category(letter) == "Cc" and not letter.isspace()), None)
    return None if control is None else f"holds the control character {control!r}"
