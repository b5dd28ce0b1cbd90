"""Where rows go: the local table, which is the source of every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd


class ParquetStore:
    """Rows of one run in `rows.parquet`. `flush` rewrites the file whole and atomically: a killed run leaves what it had last flushed.

    With `resume`, begins with the rows that the folder holds already.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.path = folder / "rows.parquet"
        self._rows: list[dict[str, Any]] = []
        if resume and self.path.exists():
            self._rows = pd.read_parquet(self.path).to_dict("records")

    def log(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Forget the rows that are not wanted: those that a resumed run will measure again."""
        self._rows = [row for row in self._rows if wanted(row)]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows)

    def flush(self) -> None:
        if self._rows:
            part = self.path.with_suffix(".part")
            self.frame().to_parquet(part, index=False)
            part.replace(self.path)
