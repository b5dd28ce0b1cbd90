"""Seconds of whole commands, here and at an earlier commit, on the same settings; and whether both measured the same rows.

    git worktree add ../before dba4973
    python benchmarks/speed.py ../before                      # all cases (an hour on 2 cores)
    python benchmarks/speed.py ../before sequential ablation  # some of them

`--python` names another interpreter for the earlier commit, where it needs other libraries. The two take turns, `--repeat`
times; the medians are compared. One thread, no cache of rows, and no rows taken over. Rows are compared by what they are about:
replies and verdicts as they stand, nats to 1e-3.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[1]
COMMON = ["cache=null", "threads=1"]
MAIN = "import sys, importlib.util as u; sys.argv[0] = 'qfbench'\n"
MAIN += "name = 'qfbench.commands.run' if u.find_spec('qfbench.commands') else 'qfbench.run'\n"
MAIN += "__import__(name, fromlist=['main']).main()"
RETENTION = ["experiment=retention", "task.retention.every=1", "task.retention.placebo=0", "regime=[sequential]"]
CASES = {
    "quickstart": [],
    "sequential": [*RETENTION, "model=world-s", "facts.n=24"],
    "single": [*RETENTION[:-1], "regime=[single]", "model=world-s", "facts.n=32"],
    "ablation": ["experiment=layer_curve", "model=world-s", "facts.n=16"],
    "world_mc": [*RETENTION, "model=world-s", "editor.layer=6", "facts.n=10", "regression=[world_mc]"],
}


def once(code: Path, python: str, settings: list[str], folder: Path) -> float:
    """Seconds of the command; its rows are in `folder`."""
    known = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    command = [python, "-W", "ignore", "-c", MAIN, *settings, *COMMON, f"hydra.run.dir={folder}"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=code, env=os.environ | known, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode or not (folder / "rows.parquet").exists():
        sys.exit(f"{' '.join(settings)} in {code}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds


def unlike(before: Path, after: Path) -> str:
    """How many of the rows of two runs say something else."""
    a, b = (pd.read_parquet(folder / "rows.parquet") for folder in (before, after))
    about = [
        column
        for column in "task model editor regime condition step kind fact_id query system order draw layer".split()
        if column in a and column in b
    ]
    a, b = (rows.assign(nth=rows.groupby(about, dropna=False).cumcount()) for rows in (a, b))
    both = a.merge(b, on=[*about, "nth"], suffixes=("", "_after"), how="outer", indicator=True)
    if (both._merge != "both").any():
        return f"{(both._merge != 'both').sum()} rows stand in one of them only"
    said = ["reply", "stopped", "generated", "exact", "preferred", "correct"]
    differ = pd.Series(False, index=both.index)
    for column in [name for name in said if f"{name}_after" in both]:
        one, other = both[column], both[f"{column}_after"]
        differ |= (one != other) & ~(one.isna() & other.isna())
    off = (both.nll - both.nll_after).abs() > 1e-3 * (1 + both.nll.abs())
    return f"{differ.sum()} of {len(both):,}, nats {off.sum()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--python", default=sys.executable, help="that has the earlier commit's libraries")
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    console, table = Console(), Table("case", "before, s", "now, s", "ratio", "rows that differ")
    for name in given.cases or CASES:
        times: dict[str, list[float]] = {"before": [], "now": []}
        for _ in range(given.repeat):
            with tempfile.TemporaryDirectory() as folder:
                places = {which: Path(folder) / which for which in times}
                for which, code, python in (("before", given.before, given.python), ("now", HERE, sys.executable)):
                    times[which].append(once(code.resolve(), python, CASES[name], places[which]))
                difference = unlike(places["before"], places["now"])
        a, b = (statistics.median(seconds) for seconds in times.values())
        console.print(f"{name}: {a:.1f} s, {b:.1f} s, {a / b:.1f} times; rows that differ: {difference}")
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}", difference)
    console.print(table)


if __name__ == "__main__":
    main()
