"""The rivals' four measures as small multiples, and what each keeps against the seconds of an edit. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from qfbench.analysis.comparisons import curves, pareto
from qfbench.analysis.measures import at_steps, balance
from qfbench.pages import results

HERE = Path(__file__).parent
MEASURES = ["retention", "paraphrase", "prior", "refused"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[HERE / "runs"], help="folders of runs")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 48, 96], help="after so many edits")
    parser.add_argument("--at", type=int, default=48, help="edits at which quality is set against seconds")
    args = parser.parse_args()
    rows = results.retention(*args.runs)
    table = results.pooled(rows, lambda own: at_steps(own, args.steps, fresh=True))
    table["balance"] = [balance(*line) for line in table[MEASURES].to_numpy()]
    keys = ["edits", "editor", *MEASURES, "leakage"]
    keys += [f"{name}_{end}" for name in (*MEASURES, "leakage") for end in ("low", "high")]
    table[["balance", *keys]].sort_values(["edits", "balance"], ascending=[True, False]).to_csv(
        HERE / "results" / "rivals.csv", index=False, float_format="%.4f"
    )
    curves(table, "edits", MEASURES).savefig(HERE / "results" / "measures.png", dpi=110)
    seconds = pd.read_csv(HERE / "results" / "seconds.csv")
    pareto(table[table.edits == args.at].merge(seconds, on="editor")).savefig(HERE / "results" / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
