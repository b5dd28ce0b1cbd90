"""A user's own facts, from a JSONL or CSV file."""

from __future__ import annotations

import csv
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.collection import collect
from qfbench.facts.records import Record, existing, json_lines

REQUIRED = ("instruction", "query", "answer")
LISTS = ("known_as", "rejects", "significance", "paraphrases")
KNOWN = (*REQUIRED, "id", "kind", "subject", *LISTS)


def table(
    path: str, n: int | None = None, seed: int | None = None, on_error: str = "stop", on_conflict: str = "stop"
) -> list[Fact]:
    """Read facts from `path`: one JSON object per line (.jsonl) or one row per fact under a header (.csv).

    Fields: `instruction`, `query`, `answer`; and, if wanted, `id`, `kind`, `subject` (what the query asks about: a rejected
    name within it does not count), `known_as` (strings of which a right reply must hold one), `rejects` (of which it must
    hold none), `significance` (a weight per word of the answer) and `paraphrases` (other wordings of the query). In a CSV the
    last four are separated by "|". `n`, `seed`, `on_error` and `on_conflict` as in `collect`.

    Raises:
        UserError: naming the file, the line and the field.
    """
    return collect(path, facts_of, n, seed, on_error, on_conflict, _read)


def _read(path: str) -> list[Record | UserError]:
    file = existing(path, "give a .jsonl or .csv file")
    if file.suffix.lower() == ".jsonl":
        return json_lines(path, file, "line")
    if file.suffix.lower() != ".csv":
        raise UserError(f"facts.path={path}: must end in .jsonl or .csv")
    line = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.reader(opened, strict=True)
            header, records = next(rows, []), []
            for place, name in enumerate(header, 1):
                if not name.strip() or name in header[: place - 1]:
                    what = f"names {name!r} twice" if name.strip() else f"has no name for column {place}"
                    raise UserError(f"facts.path={path}: the header {what}")
            for row in rows:
                line = rows.line_num
                if row:
                    records.append(_of_csv(header, row, path, line))
            return records
    except csv.Error as error:
        raise UserError(
            f"facts.path={path}: cannot be read as CSV ({error}, after line {line}; is a quote not closed?)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"facts.path={path}: cannot be read as CSV ({error})") from error


def _of_csv(header: list[str], row: list[str], path: str, line: int) -> Record | UserError:
    if len(row) != len(header):
        return UserError(
            f"{path}, line {line}: has {'more' if len(row) > len(header) else 'fewer'} fields than the header"
        )
    texts = {name: text for name, text in zip(header, row, strict=True) if text}
    held: dict[str, Any] = texts | {name: _parts(texts[name]) for name in LISTS if name in texts}
    record = Record(held, path, line, unit="line")
    try:
        if "significance" in held:
            held["significance"] = [float(weight.replace("_", "?")) for weight in held["significance"]]
    except ValueError as error:
        return record.error("significance", f"must hold numbers ({error})")
    return record


def _parts(cell: str) -> list[str]:
    """The parts of a list in a CSV; the last may be followed by a "|"."""
    parts = [part.strip() for part in cell.split("|")]
    return parts[:-1] if len(parts) > 1 and not parts[-1] else parts


def facts_of(record: Record) -> list[Fact]:
    """The fact that a record says, in the fields that `table` names.

    Raises:
        UserError: a field is missing, unknown or malformed.
    """
    for name in record.fields():
        if name not in KNOWN:
            raise record.error(name, f"is unknown; known are {', '.join(KNOWN)}")
    texts = {name: record.text(name) for name in (*REQUIRED, "id", "kind", "subject") if name in record.fields()}
    for name in REQUIRED:
        if name not in texts:
            raise record.error(name, "is missing")
    known_as, rejects, paraphrases = (
        tuple(record.texts(name)) if name in record.fields() else () for name in ("known_as", "rejects", "paraphrases")
    )
    significance = record.numbers("significance") if "significance" in record.fields() else None
    about = texts.get("subject", "")
    probes = tuple(
        Probe("paraphrase", query, texts["answer"], known_as, rejects, subject=about) for query in paraphrases
    )
    return [Fact(**texts, significance=significance, known_as=known_as, rejects=rejects, probes=probes)]
