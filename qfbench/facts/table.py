"""A user's own facts, from a JSONL or CSV file."""

from __future__ import annotations

import csv
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.records import Record, existing, json_lines, load

REQUIRED = ("instruction", "query", "answer")
LISTS = ("known_as", "rejects", "significance", "paraphrases")
OPTIONAL = ("id", "kind", *LISTS)


def table(path: str, n: int | None = None, seed: int | None = None, on_error: str = "stop") -> list[Fact]:
    """Read facts from `path`: one JSON object per line (.jsonl) or one row per fact under a header (.csv).

    Fields: `instruction`, `query`, `answer`; and, if wanted, `id`, `kind`, `known_as` (strings of which a right reply must
    hold one), `rejects` (of which it must hold none), `significance` (a weight per word of the answer) and `paraphrases`
    (other wordings of the query). In a CSV the last four are separated by "|". `n`, `seed` and `on_error` as in `records.load`.

    Raises:
        UserError: naming the file, the line and the field.
    """
    return load(path, lambda record: [_fact(record)], n, seed, on_error, _read)


def _read(path: str) -> list[Record | UserError]:
    file = existing(path, "give a .jsonl or .csv file")
    if file.suffix.lower() == ".jsonl":
        return json_lines(path, file, "line")
    if file.suffix.lower() != ".csv":
        raise UserError(f"facts.path={path}: must end in .jsonl or .csv")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            return [_of_csv(record, path, reader.line_num) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"facts.path={path}: cannot be read as CSV ({error})") from error


def _of_csv(record: dict[Any, Any], path: str, line: int) -> Record | UserError:
    if None in record:
        return UserError(f"{path}, line {line}: has more fields than the header")
    lists = {key: [part.strip() for part in record[key].split("|") if part.strip()] for key in LISTS if record.get(key)}
    return Record({key: value for key, value in record.items() if value} | lists, path, line, unit="line")


def _fact(record: Record) -> Fact:
    where, values = record.where, record.values
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a JSON object with the fields {', '.join(REQUIRED)}")
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"{where}: the field {name!r} is missing")
    for name, value in values.items():
        if name not in REQUIRED + OPTIONAL:
            raise UserError(f"{where}: unknown field {name!r}; known are {', '.join(REQUIRED + OPTIONAL)}")
        if name in LISTS:
            if not isinstance(value, list):
                raise UserError(f"{where}: the field {name!r} must be a list")
        elif not isinstance(value, str):
            raise UserError(f"{where}: the field {name!r} must be text, but is {value!r}")
    try:
        significance = tuple(map(float, values["significance"])) if "significance" in values else None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the field 'significance' must hold numbers ({error})") from error
    texts = {name: values[name] for name in (*REQUIRED, "id", "kind") if name in values}
    known_as, rejects = (tuple(map(str, values.get(name, ()))) for name in ("known_as", "rejects"))
    probes = tuple(
        Probe("paraphrase", str(query), values["answer"], known_as, rejects) for query in values.get("paraphrases", ())
    )
    return Fact(**texts, significance=significance, known_as=known_as, rejects=rejects, probes=probes)
