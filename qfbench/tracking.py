"""Where rows go: the local table, which is the source of every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd


class ParquetStore:
    """Rows of one run in `rows.parquet`. `flush` rewrites the file whole and atomically: a killed run leaves what it had last flushed.

    Rows that the folder holds already are not part of the run unless a task that continues an earlier one recovers them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.parquet"
        self._rows: list[dict[str, Any]] = []
        self._earlier = pd.read_parquet(self.path) if self.path.exists() else pd.DataFrame()

    def log(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))

    def recover(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Take over the wanted rows of the run that is continued; it will measure the others again."""
        self._rows += [row for row in self._earlier.to_dict("records") if wanted(row)]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows)

    def flush(self) -> None:
        if self._rows:
            part = self.path.with_suffix(".part")
            self.frame().to_parquet(part, index=False)
            part.replace(self.path)
