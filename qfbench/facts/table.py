"""A user's own facts, from a JSONL or CSV file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe

REQUIRED = ("instruction", "query", "answer")
LISTS = ("known_as", "significance", "paraphrases")
OPTIONAL = ("id", "kind", *LISTS)


def table(path: str | Path) -> list[Fact]:
    """Read facts from `path`: one JSON object per line (.jsonl) or one row per fact under a header (.csv).

    Fields: `instruction`, `query`, `answer`; and, if wanted, `id`, `kind`, `known_as` (strings of which a right reply must
    hold one), `significance` (a weight per word of the answer) and `paraphrases` (other wordings of the query). In a CSV
    the last three are separated by "|".

    Raises:
        UserError: naming the file, the line and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"facts.path={path}: no such file; give a .jsonl or .csv file")
    read = {".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"facts.path={path}: must end in .jsonl or .csv")
    facts: dict[str, Fact] = {}
    for line, record in read(path):
        fact = _fact(record, f"{path}, line {line}")
        if fact.id in facts:
            raise UserError(f"{path}, line {line}: the field 'id' repeats {fact.id!r}")
        facts[fact.id] = fact
    if not facts:
        raise UserError(f"{path}: holds no fact")
    return list(facts.values())


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: must be a JSON object with the fields {', '.join(REQUIRED)}")
        yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for record in reader:
            if None in record:
                raise UserError(f"{path}, line {reader.line_num}: has more fields than the header")
            lists = {key: _split(value) for key, value in record.items() if key in LISTS and value}
            yield reader.line_num, {key: value for key, value in record.items() if value} | lists


def _split(cell: str) -> list[str]:
    return [part.strip() for part in cell.split("|") if part.strip()]


def _fact(record: dict[str, Any], where: str) -> Fact:
    for name in REQUIRED:
        if name not in record:
            raise UserError(f"{where}: the field {name!r} is missing")
    for name, value in record.items():
        if name not in REQUIRED + OPTIONAL:
            raise UserError(f"{where}: unknown field {name!r}; known are {', '.join(REQUIRED + OPTIONAL)}")
        if name in LISTS:
            if not isinstance(value, list):
                raise UserError(f"{where}: the field {name!r} must be a list")
        elif not isinstance(value, str):
            raise UserError(f"{where}: the field {name!r} must be text, but is {value!r}")
    try:
        significance = tuple(map(float, record["significance"])) if "significance" in record else None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the field 'significance' must hold numbers ({error})") from error
    texts = {name: record[name] for name in (*REQUIRED, "id", "kind") if name in record}
    known_as = tuple(map(str, record.get("known_as", ())))
    probes = tuple(Probe("paraphrase", str(q), record["answer"], known_as) for q in record.get("paraphrases", ()))
    try:
        return Fact(**texts, significance=significance, known_as=known_as, probes=probes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
