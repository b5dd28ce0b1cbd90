"""Rows measured on an unedited model, kept on disk: the jobs of a sweep measure them once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
log = logging.getLogger(__name__)


def remembered(
    folder: Path | None, protocol: Mapping[str, Any], asked: Sequence[object], measure: Callable[[], Rows]
) -> Rows:
    """What `measure` gives, or gave when it was last asked the same under the same protocol (`provenance.protocol`).

    One JSON file each in `folder`, named by the hash of both, that holds a checksum and the rows; without a folder nothing
    is kept. A file that is not as it was written is named in the log, and measured anew.
    """
    if folder is None:
        return measure()
    key = json.dumps([dict(protocol), [repr(one) for one in asked]], sort_keys=True)
    path = folder / f"{_sum(key)[:32]}.json"
    with suppress(OSError):
        checksum, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        if checksum == _sum(key + text):
            rows: Rows = json.loads(text)
            return rows
        log.warning("%s is damaged: measured again", path)
    rows = measure()
    text = json.dumps(rows)
    with suppress(OSError):  # a cache that cannot be written to costs time, not the run
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # several jobs may share the folder
        part.write_text(f"{_sum(key + text)}\n{text}", encoding="utf-8")
        part.replace(path)
    return rows


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
