"""What editors keep after so many edits: a table, the four measures as small multiples, and quality against the seconds of an edit.

See README.md. Seconds are of `benchmarks/stream.py --csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from qfbench.analysis.comparisons import pareto
from qfbench.pages import results
from qfbench.pages.study import rivals

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[HERE / "runs" / "side_by_side"], help="folders of runs")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 48, 96], help="after so many edits")
    parser.add_argument(
        "--to", type=Path, default=HERE / "results", help="folder; its seconds.csv is taken, if there is one"
    )
    parser.add_argument("--leaked", action="store_true", help="count strangers without a taught answer, not refusals")
    parser.add_argument("--at", type=int, default=48, help="edits at which quality is set against seconds")
    args = parser.parse_args()
    study = rivals(results.retention(*args.runs), args.steps, refuses=not args.leaked)
    table = study.tables["rivals"]
    table.to_csv(args.to / "rivals.csv", index=False, float_format="%.4f")
    study.figures["measures"].savefig(args.to / "measures.png", dpi=110)
    if (seconds := args.to / "seconds.csv").exists():
        table = table[table.edits == args.at].merge(pd.read_csv(seconds), on="editor")
        pareto(table).savefig(args.to / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
