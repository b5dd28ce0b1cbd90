"""Records of published fact suites: read from a file or the hub, checked field by field, made into facts."""

from __future__ import annotations

import logging
import random
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from types import UnionType
from typing import Any, Literal

from qfbench.errors import UserError
from qfbench.facts.base import Fact, flaw
from qfbench.facts.matching import key
from qfbench.facts.parsing import fault, parsed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One record, or an object within it. Every reader raises a `UserError` that names file, record and field.

    White space around a text is taken off and noted in `stripped`, which `warn_of_stripped` reads.
    """

    values: Any
    path: str
    number: int  # from 1
    prefix: str = ""
    unit: str = "record"
    stripped: list[str] = field(default_factory=list, compare=False)

    @property
    def where(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"

    def error(self, field: str, what: str) -> UserError:
        return UserError(f"{self.where}: the field {self.prefix + field!r} {what}")

    def check(self) -> None:
        """Refuse what is no JSON anywhere in it, whatever is read of it."""
        wrong = fault(self.values)
        if wrong:
            field, what = wrong
            raise self.error(field, what) if field else UserError(f"{self.where}: it {what}")

    def text(self, field: str, empty: bool = False, breaks: Literal["refuse", "join", "keep"] = "refuse") -> str:
        """A text that can be asked. `join` makes one space of each run of white space.

        A line break within it is refused by default, since in a prompt without a chat template a turn is a line.
        """
        return self._sound(field, self._get(field, str), empty, breaks)

    def key(self, field: str) -> str:
        """An identifier, a number or a text."""
        value = self._get(field, int | str)
        if isinstance(value, bool):
            raise self.error(field, f"must be a number or a text, but is {value!r}")
        return self._sound(field, str(value))

    def texts(self, field: str, breaks: Literal["refuse", "join", "keep"] = "refuse") -> list[str]:
        values = self._get(field, list)
        for value in values:
            if not isinstance(value, str):
                raise self.error(field, f"must hold texts, but holds {value!r:.60}")
        return [self._sound(f"{field}[{i}]", value, breaks=breaks) for i, value in enumerate(values)]

    def numbers(self, field: str) -> tuple[float, ...]:
        values = self._get(field, list)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self.error(field, f"must hold numbers, but holds {value!r:.60}")
        return tuple(map(float, values))

    def record(self, field: str) -> Record:
        return replace(self, values=self._get(field, dict), prefix=f"{self.prefix}{field}.")

    def records(self, field: str) -> list[Record]:
        values = enumerate(self._get(field, list))
        return [replace(self, values=v, prefix=f"{self.prefix}{field}[{i}].") for i, v in values]

    def fields(self) -> Mapping[str, Any]:
        """All that it holds, unchecked; for fields that may be left out."""
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.where}: {self.prefix.rstrip('.') or 'it'} must be an object")
        return self.values

    def _get(self, field: str, kind: type | UnionType) -> Any:
        values = self.fields()
        if field not in values:
            raise self.error(field, "is missing")
        if not isinstance(values[field], kind):
            raise self.error(field, f"must be {_NAMES[kind]}, but is {values[field]!r:.60}")
        return values[field]

    def _sound(self, field: str, value: str, empty: bool = False, breaks: str = "refuse") -> str:
        text = value.strip()
        if text != value:
            self.stripped.append(f"{self.unit} {self.number}, {self.prefix + field!r}")
        what = flaw(text, empty)
        if what:
            raise self.error(field, what)
        if breaks == "refuse" and ("\n" in text or "\r" in text):
            raise self.error(field, "holds a line break, and a turn may be a line; put it all on one line")
        return " ".join(text.split()) if breaks == "join" else text


_NAMES: dict[Any, str] = {str: "a text", list: "a list", dict: "an object", int | str: "a number or a text"}


def load(
    path: str,
    make: Callable[[Record], Sequence[Fact]],
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
    on_conflict: str = "stop",
    read: Callable[[str], list[Record | UserError]] | None = None,
    join: Callable[[Sequence[Fact], Mapping[str, Fact]], Sequence[Fact]] | None = None,
) -> list[Fact]:
    """The facts that `make` forms of the first `n` records (all by default) of a JSON, JSONL or hub data set.

    A `seed` draws the records at random instead. `on_error="skip"` leaves malformed records out and logs how many.
    A query may be taught once: a record whose query an earlier one has is an error like others, whether its answer is another
    or the same; `on_conflict="keep"` keeps both and logs how many. `read` reads a file of another form; an error in
    place of a record says that it cannot be read. `join` is given a record's facts and, by their ids, the earlier facts that
    have their queries; it returns what to teach, earlier facts in a new form among them.

    Raises:
        UserError: the file cannot be read, holds no fact, or a record is malformed (file, record and field are named).
    """
    for name, value, other in (("on_error", on_error, "skip"), ("on_conflict", on_conflict, "keep")):
        if value not in ("stop", other):
            raise UserError(f"facts.{name}={value}: must be stop or {other}")
    if n is not None and n < 1:
        raise UserError(f"facts.n={n}: must be 1 or more, or null for all")
    records = (read or _read)(path)
    if seed is not None:
        random.Random(f"records-{seed}").shuffle(records)
    facts: dict[str, Fact] = {}
    origin: dict[str, str] = {}  # the record of each fact, by its id
    asked: dict[str, str] = {}  # the first fact that asks a query, by the query's key
    refused: list[UserError] = []
    kept: list[str] = []
    used = 0
    for record in records:
        if used == n:
            break
        try:
            if isinstance(record, UserError):
                raise record
            record.check()
            made = make(record)
            again = next((fact.id for fact in made if fact.id in facts), None)
            if again is not None:
                raise UserError(f"{record.where}: repeats the fact {again!r} of {origin[again]}")
            own, asks = {fact.id: fact for fact in made}, ChainMap({}, asked)
            first = {fact.id: asks.setdefault(key(fact.query), fact.id) for fact in made}
            earlier = {id: own.get(other) or facts[other] for id, other in first.items() if other != id}
            made = join(made, earlier) if join else made
            here = f"{record.unit} {record.number}"
            clashes = [
                f"{record.where}: {_clash(fact, earlier[fact.id], origin.get(earlier[fact.id].id, here))}"
                for fact in made
                if fact.id in earlier
            ]
            if clashes and on_conflict == "stop":
                raise UserError(f"{clashes[0]}. facts.on_conflict=keep measures both")
        except UserError as error:
            if isinstance(record, Record) and not str(error).startswith(path):  # of a fact, which knows of no file
                error = UserError(f"{record.where}: {error}")
            if on_error == "stop":
                raise UserError(f"{error}. facts.on_error=skip leaves such records out") from error
            refused.append(error)
            continue
        kept += clashes
        facts |= {fact.id: fact for fact in made}
        for fact in made:
            origin.setdefault(fact.id, here)
        asked |= asks.maps[0]
        used += bool(made)
    warn_of_stripped(path, records)
    if refused:
        log.warning("%s: %d malformed records are left out; the first: %s", path, len(refused), refused[0])
    if kept:
        log.warning("%s: %d facts repeat or contradict another and are kept; the first: %s", path, len(kept), kept[0])
    if not facts:
        raise UserError(
            f"{path}: holds no fact" + (f"; the first of {len(refused)} errors: {refused[0]}" if refused else "")
        )
    return list(facts.values())


def _clash(fact: Fact, other: Fact, where: str) -> str:
    if key(fact.answer) == key(other.answer):
        return f"the fact {fact.id!r} is {other.id!r} of {where} again: the same query {fact.query!r} and answer"
    return (
        f"the query {fact.query!r} has the answer {fact.answer!r} here and {other.answer!r} in {where} ({other.id!r})"
    )


def warn_of_stripped(path: str, records: Iterable[Record | UserError]) -> None:
    """Say in one line how many texts of a file had white space around them."""
    texts = list(dict.fromkeys(text for record in records if isinstance(record, Record) for text in record.stripped))
    if texts:
        log.warning("%s: white space is taken off the ends of %d texts; the first: %s", path, len(texts), texts[0])


def existing(path: str, what: str, setting: str = "facts.path") -> Path:
    """The file at `path`; `what` says what to give instead where there is none."""
    try:
        file = Path(path).expanduser()
        folder, there = file.is_dir(), file.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; no such user
        raise UserError(f"{setting}={path:.200}: is no name of a file ({error!s:.200}); {what}") from error
    if folder or not there:
        raise UserError(f"{setting}={path}: {'is a folder' if folder else 'no such file'}; {what}")
    return file


def json_lines(path: str, file: Path, unit: str, setting: str = "facts.path") -> list[Record | UserError]:
    """The records of a JSONL file, numbered by record or, as `unit`, by line; empty lines count as lines only."""
    lines = [(n, line) for n, line in enumerate(read_text(path, file, setting).split("\n"), 1) if line.strip()]
    records: list[Record | UserError] = []
    for number, (n, line) in enumerate(lines, 1):
        try:
            records.append(Record(parsed(line), path, number if unit == "record" else n, unit=unit))
        except UserError as error:
            records.append(UserError(f"{path}, line {n}: {error}"))
    return records


def read_text(path: str, file: Path, setting: str = "facts.path") -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path}: cannot be read as text ({error})") from error


def _read(path: str) -> list[Record | UserError]:
    if _may_be_on_the_hub(path):
        return [Record(values, path, number) for number, values in enumerate(_hub(path), 1)]
    file = existing(path, "give a .json or .jsonl file, or a data set of the hub (owner/name)")
    if file.suffix.lower() == ".jsonl":
        return json_lines(path, file, "record")
    text = read_text(path, file)
    try:
        raw = parsed(text)
    except UserError as error:
        raise UserError(f"facts.path={path}: {error}") from error
    if not isinstance(raw, list):
        raise UserError(f"facts.path={path}: must hold a list of records")
    return [Record(values, path, number) for number, values in enumerate(raw, 1)]


def _may_be_on_the_hub(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and len(path) < 200 and not Path(path).exists()


def check_templates(*fields: str, needs: str, **templates: str) -> None:
    """Refuse a template with a placeholder other than `fields`, or without one of those in `needs` ("question or cloze").

    Raises:
        UserError: naming the setting, and what it may hold.
    """
    for name, template in templates.items():
        try:
            held = {field for _, field, _, _ in Formatter().parse(template)}
            template.format(**dict.fromkeys(fields, ""))
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            allowed = ", ".join(f"{{{field}}}" for field in fields)
            raise UserError(f"facts.{name}={template!r}: not a template that holds no other than {allowed}") from error
        if not held & set(needs.split(" or ")):
            raise UserError(f"facts.{name}={template!r}: must hold {{{needs.replace(' or ', '} or {')}}}")


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise UserError(f"facts.{name}={value}: must be 0 or more")


def with_subject(rewrite: Record) -> str:
    """The cloze of a rewrite in ROME's schema, its subject in place."""
    prompt = rewrite.text("prompt", breaks="join")
    if "{}" not in prompt:
        raise rewrite.error("prompt", "has no {} where the subject stands")
    return prompt.replace("{}", rewrite.text("subject", breaks="join"))


def objects(rewrite: Record) -> tuple[str, str]:
    """The new object of a rewrite in ROME's schema and the old one, which differ."""
    new, old = (rewrite.record(f"target_{which}").text("str") for which in ("new", "true"))
    if key(new) == key(old):
        raise rewrite.error("target_new.str", f"is {new!r}, which target_true says too: nothing is rewritten")
    return new, old


def _hub(name: str) -> list[Any]:
    from datasets import load_dataset  # takes long to import

    try:
        splits = load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds, by what the hub answers
        why = " ".join(str(error).split())
        raise UserError(f"facts.path={name}: no such file, and the hub gives no such data set ({why})") from error
    return [record for split in splits.values() for record in split]
