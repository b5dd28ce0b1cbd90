"""Rows measured on an unedited model, kept on disk: the jobs of a sweep measure them once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def remembered(
    folder: Path | None, protocol: Mapping[str, Any], asked: Sequence[object], measure: Callable[[], Rows]
) -> Rows:
    """What `measure` gives, or gave when it was last asked the same under the same protocol (`provenance.protocol`).

    One JSON file each in `folder`, named by the hash of both; without a folder nothing is kept. A file that cannot be
    read is measured anew.
    """
    if folder is None:
        return measure()
    key = json.dumps([dict(protocol), [repr(one) for one in asked]], sort_keys=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        rows: Rows = json.loads(path.read_text())
        return rows
    except (OSError, ValueError):
        rows = measure()
    with suppress(OSError):  # a cache that cannot be written to costs time, not the run
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # several jobs may share the folder
        part.write_text(json.dumps(rows))
        part.replace(path)
    return rows
