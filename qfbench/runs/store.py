"""The local table of a run, which is the source of every figure, and how far the run has come."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from qfbench.errors import UserError
from qfbench.runs.ledger import Ledger

Rows = list[dict[str, Any]]


PROGRESS: dict[str, Any] = {"rows": 0, "tasks": [], "ended": [], "finished": False}


class ParquetStore:
    """Rows of one run in `rows.parquet`, rewritten whole and atomically.

    `commit` says, in `progress.json`, up to which row the run need not be repeated. A run that is started again in the same
    folder begins with those rows (`earlier`); what stands behind them is measured again, unless a task recovers it.
    `ended` names the sequences that came to their end.
    """

    def __init__(self, folder: Path, seconds: float = 30, mirror: Callable[[Rows], None] = lambda rows: None) -> None:
        """`seconds` is how long to wait between two commits; `mirror` is shown the rows that each adds, once they are on disk.

        The folder's files are taken to be sound: `folder.check_folder` sees to that.
        """
        self.ledger, self.seconds = Ledger(folder), seconds
        progress = read_progress(folder)
        self.tasks: list[str] = progress["tasks"]
        self.ended: list[str] = progress["ended"]
        self.finished: bool = progress["finished"]
        path = folder / "rows.parquet"
        stored = pd.read_parquet(path) if path.exists() else pd.DataFrame()
        self.earlier, self._behind = stored[: progress["rows"]], stored[progress["rows"] :]
        self._rows: Rows = self.earlier.to_dict("records")
        self._last, self._cost = time.monotonic(), 0.0
        self._mirror, self._mirrored = mirror, 0

    def log(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))

    def recover(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Take over rows behind the last commit from a task that keeps count of its own."""
        self._rows += [row for row in self._behind.to_dict("records") if wanted(row)]

    def forget(self, unwanted: Collection[int]) -> None:
        """Leave out rows of `earlier`, by their places there: they are to be measured again."""
        self.earlier = self.earlier.drop(list(unwanted)).reset_index(drop=True)
        self._rows = [row for place, row in enumerate(self._rows) if place not in unwanted]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows)

    def due(self) -> bool:
        """Whether it is time to commit. Unless that is to be always, no more than a twentieth of the time goes into it."""
        return not self.seconds or time.monotonic() - self._last >= max(self.seconds, 20 * self._cost)

    def commit(self, task: str | None = None, finished: bool = False) -> bool:
        """Write all rows and say that they need not be measured again; `task` is done, or the run `finished`.

        Returns whether that could be written: with a full disk the rows stay here, for the next attempt.
        """
        start = time.monotonic()
        self.tasks += [task] if task is not None else []
        self.finished = finished
        progress = {"rows": len(self._rows), "tasks": self.tasks, "ended": self.ended, "finished": finished}
        written = self.flush() and self.ledger.write_json("progress.json", progress)
        self._last = time.monotonic()
        self._cost = self._last - start
        return written

    def flush(self) -> bool:
        """Write all rows; whether that could be done."""
        if not self._rows:
            return True
        if not self.ledger.write("rows.parquet", lambda part: self.frame().to_parquet(part, index=False)):
            return False
        new, self._mirrored = self._rows[self._mirrored :], len(self._rows)
        self._mirror(new)
        return True

    def rescue(self) -> Path:
        """Write all rows where there may be room: to the folder for temporary files."""
        path = Path(tempfile.mkdtemp(prefix="qfbench-")) / "rows.parquet"
        self.frame().to_parquet(path, index=False)
        return path


def read_progress(folder: Path) -> dict[str, Any]:
    """What `commit` wrote; nothing where it never did. The rows are written first, so they are there.

    Raises:
        UserError: it is something else.
    """
    path = folder / "progress.json"
    if not path.exists():
        return copy.deepcopy(PROGRESS)
    try:
        progress = copy.deepcopy(PROGRESS) | json.loads(path.read_text())
        wrong = [name for name, value in PROGRESS.items() if type(progress[name]) is not type(value)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); rerun=true measures all anew") from error
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is {progress[wrong[0]]!r}; rerun=true measures all anew")
    return progress


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder. The lock goes with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is working on this run; let it finish, or stop it") from error
    except (
        OSError,
        NotImplementedError,
    ) as error:  # a folder that is read-only, a file, or where nothing can be locked
        raise UserError(f"{folder}: a run cannot be kept there ({error}); give another hydra.run.dir") from error
    try:
        yield
    finally:
        lock.release()
