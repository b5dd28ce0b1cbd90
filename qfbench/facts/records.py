"""Records of published fact suites: read from a file or the hub, checked field by field, made into facts."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

    def error(self, field: str, what: str) -> UserError:
        return UserError(f"{self.path}, record {self.number}: the field {self.prefix + field!r} {what}")

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
        return Record(self._get(field, dict), self.path, self.number, f"{self.prefix}{field}.")

    def records(self, field: str) -> list[Record]:
        values = enumerate(self._get(field, list))
        return [Record(v, self.path, self.number, f"{self.prefix}{field}[{i}].") for i, v in values]

    def _get(self, field: str, kind: type | UnionType) -> Any:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.path}, record {self.number}: {self.prefix.rstrip('.') or 'it'} must be an object")
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
) -> list[Fact]:
    """The facts that `make` forms of the first `n` records (all by default) of a JSON, JSONL or hub data set.

    A `seed` draws the records at random instead. `on_error="skip"` leaves malformed records out and logs how many.

    Raises:
        UserError: the file cannot be read, holds no fact, or a record is malformed (file, record and field are named).
    """
    if on_error not in ("stop", "skip"):
        raise UserError(f"facts.on_error={on_error}: must be stop or skip")
    if n is not None and n < 1:
        raise UserError(f"facts.n={n}: must be 1 or more, or null for all")
    raw = _read(path)
    order = list(range(len(raw)))
    if seed is not None:
        random.Random(f"records-{seed}").shuffle(order)
    facts: dict[str, Fact] = {}
    refused: list[UserError] = []
    used = 0
    for i in order:
        if used == n:
            break
        try:
            made = make(Record(raw[i], path, i + 1))
            again = next((fact.id for fact in made if fact.id in facts), None)
            if again is not None:
                raise UserError(f"{path}, record {i + 1}: repeats the fact {again!r}")
        except UserError as error:
            if not str(error).startswith(path):  # from a fact itself, which knows of no file
                error = UserError(f"{path}, record {i + 1}: {error}")
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


def _read(path: str) -> list[Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return _hub(path)
        raise UserError(
            f"facts.path={path}: no such file; give a .json or .jsonl file, or a data set of the hub (owner/name)"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            return [_parsed(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        raw = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"facts.path={path}: not valid JSON ({error})") from error
    if not isinstance(raw, list):
        raise UserError(f"facts.path={path}: must hold a list of records")
    return raw


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error


def check_templates(*fields: str, **templates: str) -> None:
    """Refuse a template with a placeholder other than `fields`.

    Raises:
        UserError: naming the setting, and what it may hold.
    """
    for name, template in templates.items():
        try:
            template.format(**dict.fromkeys(fields, ""))
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            allowed = ", ".join(f"{{{field}}}" for field in fields)
            raise UserError(f"facts.{name}={template!r}: not a template that holds no other than {allowed}") from error


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
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"facts.path={name}: no such file; to load it from the hub, pip install 'qfbench[hub]'"
        ) from error
    try:
        splits = load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds, by what the hub answers
        raise UserError(f"facts.path={name}: no such file, and the hub gives no such data set ({error})") from error
    return [record for split in splits.values() for record in split]
