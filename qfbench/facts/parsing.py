"""JSON as facts and dialogues are read from: nothing in it is bent, and what is wrong with it is found by its field."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import BROKEN, is_broken

DEEPEST = 50  # levels of a record; no suite has ten
TWICE = object()  # the value of a field that an object names twice


def parsed(text: str) -> Any:
    """What a JSON text holds. What JSON does not allow or Python would bend, `fault` finds, which knows the field.

    Raises:
        UserError: it is no JSON, with the reason.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"not valid JSON ({error.msg}, column {error.colno}{line})") from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deeply)") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        values |= {name: TWICE for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return values


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < 300 else math.inf  # which no float holds either


def fault(value: Any, field: str = "", depth: int = 0) -> tuple[str, str] | None:
    """The first field, at any depth, that is none, and what is wrong with it."""
    if value is TWICE:
        return field, "stands twice in one object; keep one of them"
    if isinstance(value, float) and not math.isfinite(value):
        return field, f"is {value}, which is no number of JSON, or too large a one"
    if isinstance(value, str) and is_broken(value):
        return field, BROKEN
    if depth > DEEPEST:
        return field, f"is nested too deeply, more than {DEEPEST} levels"
    if isinstance(value, dict):
        inner = [(f"{field}.{name}" if field else name, name, held) for name, held in value.items()]
    else:
        inner = [(f"{field}[{i}]", "", held) for i, held in enumerate(value)] if isinstance(value, list) else []
    for place, name, held in inner:
        wrong = (place, f"has a name that {BROKEN}") if is_broken(name) else fault(held, place, depth + 1)
        if wrong:
            return wrong
    return None
