"""Records of published fact suites: read from a file or the hub, checked field by field, made into facts."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from types import UnionType
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import Fact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One record, or an object within it. Every reader raises a `UserError` that names file, record and field."""

    values: Any
    path: str
    number: int  # from 1
    prefix: str = ""
    unit: str = "record"

    @property
    def where(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"

    def error(self, field: str, what: str) -> UserError:
        return UserError(f"{self.where}: the field {self.prefix + field!r} {what}")

    def text(self, field: str, empty: bool = False) -> str:
        value = str(self._get(field, str)).strip()
        if not (value or empty):
            raise self.error(field, "is empty")
        if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self.error(field, "holds half a surrogate pair, which is no text")
        return value

    def key(self, field: str) -> str:
        """An identifier, a number or a text."""
        value = self._get(field, int | str)
        if isinstance(value, bool) or not str(value).strip():
            raise self.error(field, f"must be a number or a text, but is {value!r}")
        return str(value).strip()

    def texts(self, field: str) -> list[str]:
        values = self._get(field, list)
        for value in values:
            if not isinstance(value, str):
                raise self.error(field, f"must hold texts, but holds {value!r:.60}")
        return [value.strip() for value in values if value.strip()]

    def record(self, field: str) -> Record:
        return replace(self, values=self._get(field, dict), prefix=f"{self.prefix}{field}.")

    def records(self, field: str) -> list[Record]:
        values = enumerate(self._get(field, list))
        return [replace(self, values=v, prefix=f"{self.prefix}{field}[{i}].") for i, v in values]

    def _get(self, field: str, kind: type | UnionType) -> Any:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.where}: {self.prefix.rstrip('.') or 'it'} must be an object")
        if field not in self.values:
            raise self.error(field, "is missing")
        if not isinstance(self.values[field], kind):
            raise self.error(field, f"must be {_NAMES[kind]}, but is {self.values[field]!r:.60}")
        return self.values[field]


_NAMES: dict[Any, str] = {str: "a text", list: "a list", dict: "an object", int | str: "a number or a text"}


def load(
    path: str,
    make: Callable[[Record], Sequence[Fact]],
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
    read: Callable[[str], list[Record | UserError]] | None = None,
) -> list[Fact]:
    """The facts that `make` forms of the first `n` records (all by default) of a JSON, JSONL or hub data set.

    A `seed` draws the records at random instead. `on_error="skip"` leaves malformed records out and logs how many.
    `read` reads a file of another form; an error in place of a record says that it cannot be read.

    Raises:
        UserError: the file cannot be read, holds no fact, or a record is malformed (file, record and field are named).
    """
    if on_error not in ("stop", "skip"):
        raise UserError(f"facts.on_error={on_error}: must be stop or skip")
    if n is not None and n < 1:
        raise UserError(f"facts.n={n}: must be 1 or more, or null for all")
    records = (read or _read)(path)
    if seed is not None:
        random.Random(f"records-{seed}").shuffle(records)
    facts: dict[str, Fact] = {}
    refused: list[UserError] = []
    used = 0
    for record in records:
        if used == n:
            break
        try:
            if isinstance(record, UserError):
                raise record
            made = make(record)
            again = next((fact.id for fact in made if fact.id in facts), None)
            if again is not None:
                raise UserError(f"{record.where}: repeats the fact {again!r}")
        except UserError as error:
            if isinstance(record, Record) and not str(error).startswith(path):  # of a fact, which knows of no file
                error = UserError(f"{record.where}: {error}")
            if on_error == "stop":
                raise UserError(f"{error}. facts.on_error=skip leaves such records out") from error
            refused.append(error)
            continue
        facts |= {fact.id: fact for fact in made}
        used += bool(made)
    if refused:
        log.warning("%s: %d malformed records are left out; the first: %s", path, len(refused), refused[0])
    if not facts:
        raise UserError(
            f"{path}: holds no fact" + (f"; the first of {len(refused)} errors: {refused[0]}" if refused else "")
        )
    return list(facts.values())


def existing(path: str, what: str) -> Path:
    """The file at `path`; `what` says what to give instead where there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"facts.path={path}: is a folder; {what}")
    if not file.is_file():
        raise UserError(f"facts.path={path}: no such file; {what}")
    return file


def json_lines(path: str, file: Path, unit: str) -> list[Record | UserError]:
    """The records of a JSONL file, numbered by record or, as `unit`, by line; empty lines count as lines only."""
    lines = [(n, line) for n, line in enumerate(_text(path, file).split("\n"), 1) if line.strip()]
    return [_parsed(line, path, k if unit == "record" else n, n, unit) for k, (n, line) in enumerate(lines, 1)]


def _parsed(line: str, path: str, number: int, n: int, unit: str) -> Record | UserError:
    try:
        return Record(json.loads(line), path, number, unit=unit)
    except json.JSONDecodeError as error:
        return UserError(f"{path}, line {n}: not valid JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return UserError(f"{path}, line {n}: not valid JSON (nested too deeply)")


def _text(path: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"facts.path={path}: cannot be read as text ({error})") from error


def _read(path: str) -> list[Record | UserError]:
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists():
        raw = _hub(path)
    else:
        file = existing(path, "give a .json or .jsonl file, or a data set of the hub (owner/name)")
        if file.suffix.lower() == ".jsonl":
            return json_lines(path, file, "record")
        try:
            raw = json.loads(_text(path, file))
        except json.JSONDecodeError as error:
            raise UserError(f"facts.path={path}: not valid JSON ({error})") from error
        except RecursionError as error:
            raise UserError(f"facts.path={path}: not valid JSON (nested too deeply)") from error
        if not isinstance(raw, list):
            raise UserError(f"facts.path={path}: must hold a list of records")
    return [Record(values, path, number) for number, values in enumerate(raw, 1)]


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
    prompt = rewrite.text("prompt")
    if "{}" not in prompt:
        raise rewrite.error("prompt", "has no {} where the subject stands")
    return prompt.replace("{}", rewrite.text("subject"))


def _hub(name: str) -> list[Any]:
    from datasets import load_dataset  # takes long to import

    try:
        splits = load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds, by what the hub answers
        raise UserError(f"facts.path={name}: no such file, and the hub gives no such data set ({error})") from error
    return [record for split in splits.values() for record in split]
