"""Records: read from a file or the hub, checked field by field."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from qfbench.errors import UserError
from qfbench.facts.base import flaw
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
    def which(self) -> str:
        return f"{self.unit} {self.number}"

    @property
    def where(self) -> str:
        return f"{self.path}, {self.which}"

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
            self.stripped.append(f"{self.which}, {self.prefix + field!r}")
        what = flaw(text, empty)
        if what:
            raise self.error(field, what)
        if breaks == "refuse" and ("\n" in text or "\r" in text):
            raise self.error(field, "holds a line break, and a turn may be a line; put it all on one line")
        return " ".join(text.split()) if breaks == "join" else text


_NAMES: dict[Any, str] = {str: "a text", list: "a list", dict: "an object", int | str: "a number or a text"}


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


def records_in(path: str) -> list[Record | UserError]:
    """The records of a .json or .jsonl file, or of a data set of the hub (owner/name); an error in place of a line that is none.

    Raises:
        UserError: there is no such file or data set, or it is no list of records.
    """
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


def _hub(name: str) -> list[Any]:
    from datasets import load_dataset  # takes long to import

    try:
        splits = load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds, by what the hub answers
        why = " ".join(str(error).split())
        raise UserError(f"facts.path={name}: no such file, and the hub gives no such data set ({why})") from error
    return [record for split in splits.values() for record in split]
