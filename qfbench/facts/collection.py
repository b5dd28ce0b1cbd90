"""Records into the facts of a suite: which records, what of a malformed one, and what of a query that is taught twice."""

from __future__ import annotations

import logging
import random
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.facts.matching import key
from qfbench.facts.records import Record, records_in, warn_of_stripped

log = logging.getLogger(__name__)


def collect(
    path: str,
    make: Callable[[Record], Sequence[Fact]],
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
    on_conflict: str = "stop",
    read: Callable[[str], list[Record | UserError]] = records_in,
    join: Callable[[Sequence[Fact], Mapping[str, Fact]], Sequence[Fact]] = lambda made, _: made,
) -> list[Fact]:
    """The facts that `make` forms of the first `n` records (all by default) of a JSON, JSONL or hub data set.

    A `seed` draws the records at random instead. `on_error="skip"` leaves out what would be an error and logs how many.
    A query may be taught once: a record whose query an earlier one has is an error like others, whether its answer is another
    or the same; `on_conflict="keep"` keeps both and logs how many. `read` reads a file of another form; an error in
    place of a record says that it cannot be read. `join` is given a record's facts and, by their ids, the earlier facts that
    have their queries; it returns what to teach, earlier facts in a new form among them.

    Raises:
        UserError: the file cannot be read, holds no fact, or a record is malformed (file, record and field are named).
    """
    _check(n, on_error, on_conflict)
    records = read(path)
    if seed is not None:
        random.Random(f"records-{seed}").shuffle(records)
    taken = _Taken()
    refused: list[UserError] = []
    kept: list[str] = []
    used = 0
    for record in records:
        if used == n:
            break
        try:
            if isinstance(record, UserError):
                raise record
            made = taken.new(record, make)
            earlier = taken.earlier(made)
            made = join(made, earlier)
            clashes = taken.clashes(record, made, earlier)
            if clashes and on_conflict == "stop":
                raise UserError(f"{clashes[0]}. facts.on_conflict=keep measures both")
        except UserError as error:
            if isinstance(record, Record) and not str(error).startswith(path):  # of a fact, which knows of no file
                error = UserError(f"{record.where}: {error}")
            if on_error == "stop":
                raise UserError(f"{error}. facts.on_error=skip leaves such records out") from error
            refused.append(error)
            continue
        taken.add(record, made)
        kept += clashes
        used += bool(made)
    warn_of_stripped(path, records)
    if refused:
        log.warning("%s: %d records are left out; the first: %s", path, len(refused), refused[0])
    if kept:
        log.warning("%s: %d facts repeat or contradict another and are kept; the first: %s", path, len(kept), kept[0])
    if not taken.facts:
        why = f"; the first of {len(refused)} errors: {refused[0]}" if refused else ""
        raise UserError(f"{path}: holds no fact{why}")
    return list(taken.facts.values())


def _check(n: int | None, on_error: str, on_conflict: str) -> None:
    for name, value, other in (("on_error", on_error, "skip"), ("on_conflict", on_conflict, "keep")):
        if value not in ("stop", other):
            raise UserError(f"facts.{name}={value}: must be stop or {other}")
    if n is not None and n < 1:
        raise UserError(f"facts.n={n}: must be 1 or more, or null for all")


@dataclass
class _Taken:
    """The facts taken so far by their ids, the record that each is of, and the first one that asks a query, by its key."""

    facts: dict[str, Fact] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)

    def new(self, record: Record, make: Callable[[Record], Sequence[Fact]]) -> Sequence[Fact]:
        """What `make` forms of a record, none of it taken before.

        Raises:
            UserError: the record is malformed, or repeats a fact.
        """
        record.check()
        made = make(record)
        for fact in made:
            if fact.id in self.facts:
                raise UserError(f"{record.where}: repeats the fact {fact.id!r} of {self.origin[fact.id]}")
        return made

    def earlier(self, made: Sequence[Fact]) -> dict[str, Fact]:
        """Of each fact whose query was asked before, in another record or the same one, the fact that asks it first."""
        own, asked = {fact.id: fact for fact in made}, ChainMap({}, self.asked)
        first = {fact.id: asked.setdefault(key(fact.query), fact.id) for fact in made}
        return {id: own.get(other) or self.facts[other] for id, other in first.items() if other != id}

    def clashes(self, record: Record, made: Sequence[Fact], earlier: Mapping[str, Fact]) -> list[str]:
        """In words, each fact whose query an earlier one asks."""
        both = [(fact, earlier[fact.id]) for fact in made if fact.id in earlier]
        return [
            f"{record.where}: {_clash(fact, other, self.origin.get(other.id, record.which))}" for fact, other in both
        ]

    def add(self, record: Record, made: Sequence[Fact]) -> None:
        for fact in made:
            self.facts[fact.id] = fact
            self.origin.setdefault(fact.id, record.which)
            self.asked.setdefault(key(fact.query), fact.id)


def _clash(fact: Fact, other: Fact, where: str) -> str:
    if key(fact.answer) == key(other.answer):
        return f"the fact {fact.id!r} is {other.id!r} of {where} again: the same query {fact.query!r} and answer"
    return (
        f"the query {fact.query!r} has the answer {fact.answer!r} here and {other.answer!r} in {where} ({other.id!r})"
    )
