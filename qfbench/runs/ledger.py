"""The checksums of a run's files, in `checksums.json` beside them: how damage is found before it becomes a number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "checksums.json"
# What a run's numbers are made of.
MADE_OF = ("config.yaml", "provenance.json", "progress.json", "rows.parquet")


class Ledger:
    """Writes the files of a folder, whole and atomically, and knows whether they are as they were written.

    Of each file the checksums of the last two versions count: a process may be killed between noting the new one and putting
    the file in its place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, list[str]] = {}
        self._readable = True
        try:
            checksum, _, text = (folder / FILE).read_text(encoding="utf-8", errors="replace").partition("\n")
            self._readable = checksum == hashlib.sha256(text.encode()).hexdigest()
            self._known = json.loads(text) if self._readable else {}
        except FileNotFoundError:
            pass
        for name in self._known:
            now = _sum(folder / name)
            self._known[name] = [now] if now in self._known[name] else [""]

    def damaged(self, *names: str) -> list[str]:
        """Those of the files that are not what was written here, or are gone; of files written elsewhere nothing is known."""
        return [name for name in names if self._known.get(name) == [""]] if self._readable else [FILE]

    def write(self, name: str, write: Callable[[Path], object]) -> bool:
        """Let `write` make a file, note its checksum, and put it in place; whether that could be done."""
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            write(part)
            before = self._known.get(name) or [_sum(path)]  # as long as the new one is not in place
            new = _sum(part)
            self._note(self._known | {name: [new, before[-1]]})
            part.replace(path)
        except OSError:
            return False
        self._known[name] = [new]
        return True

    def write_text(self, name: str, text: str) -> bool:
        return self.write(name, lambda part: part.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, values: Mapping[str, Any]) -> bool:
        return self.write_text(name, json.dumps(values, indent=2) + "\n")

    def _note(self, known: Mapping[str, list[str]]) -> None:
        part = self.folder / "checksums.part"
        text = json.dumps(known, indent=1) + "\n"
        part.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
        part.replace(self.folder / FILE)
        self._known = dict(known)


def _sum(path: Path) -> str:
    """The checksum of a file; "absent" where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "absent"
