"""The rivals' four measures as small multiples, and what each keeps against the seconds of an edit. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from qfbench.analysis.comparisons import curves, pareto
from qfbench.analysis.measures import at_steps, balance
from qfbench.pages import results

HERE = Path(__file__).parent
TAUGHT = ["retention", "paraphrase", "prior"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[HERE / "runs"], help="folders of runs")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 48, 96], help="after so many edits")
    parser.add_argument(
        "--to", type=Path, default=HERE / "results", help="folder; its seconds.csv is of benchmarks/stream.py"
    )
    parser.add_argument("--leaked", action="store_true", help="count strangers without a taught answer, not refusals")
    parser.add_argument("--at", type=int, default=48, help="edits at which quality is set against seconds")
    args = parser.parse_args()
    rows = results.retention(*args.runs)
    table = results.pooled(rows, lambda own: at_steps(own, args.steps, fresh=True))
    table = table.assign(
        edits=table.get("edits_done", table.edits),  # where runs differ in the edits that they were set to do
        not_leaked=1 - table.leakage,
        not_leaked_low=1 - table.leakage_high,
        not_leaked_high=1 - table.leakage_low,
    )
    measures = [*TAUGHT, "not_leaked" if args.leaked else "refused"]
    table["balance"] = [balance(*line) for line in table[measures].to_numpy()]
    names = [f"{name}{end}" for name in (*TAUGHT, "refused", "leakage", "not_leaked") for end in ("", "_low", "_high")]
    table = table[["edits", "editor", "regime", "balance", *names]].assign(model=table.model)
    table = table.sort_values(["edits", "balance"], ascending=[True, False])
    table.to_csv(args.to / "rivals.csv", index=False, float_format="%.4f")
    curves(table, "edits", measures).savefig(args.to / "measures.png", dpi=110)
    if (seconds := args.to / "seconds.csv").exists():
        table = table[table.edits == args.at].merge(pd.read_csv(seconds), on="editor")
        pareto(table).savefig(args.to / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
