"""The command `qfbench-results`: the summary of stored runs, or of two compared, or a small copy of them."""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from rich.markup import escape

from qfbench.analysis.drops import drops, power
from qfbench.analysis.measures import together
from qfbench.analysis.tables import HIDDEN, console, laid_out
from qfbench.commands import show_all
from qfbench.errors import UserError
from qfbench.pages.results import compare, folders, pooled, retention, ship
from qfbench.runs.provenance import SAME


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(
        prog="qfbench-results", description="The summary of stored runs, or of two compared, or a small copy of them."
    )
    parser.add_argument("folders", nargs="+", help="folders of runs, or folders that hold some")
    parser.add_argument("--against", help="print the differences from this run, paired by probe and order")
    parser.add_argument(
        "--across", nargs="+", default=[], choices=SAME, help="in what the two runs are meant to differ"
    )
    parser.add_argument("--holm", action="store_true", help="~ by tests that hold all together at 5%%, not each")
    parser.add_argument("--ship", metavar="DIR", help="copy the runs into the new folder DIR, small enough for git")
    args = parser.parse_args()
    show_all()
    out = console()
    try:
        if args.ship:
            size = sum(path.stat().st_size for run in ship(args.ship, *args.folders) for path in run.iterdir())
            out.print(f"wrote [bold]{escape(args.ship)}[/bold]: {size / 1000:.0f} kB", soft_wrap=True)
        elif args.against:
            frame = pd.concat([compare(folder, args.against, args.across) for folder in folders(*args.folders)])
            title = f"Differences from {args.against} (± 95%, paired)"
            hidden = [*HIDDEN, "model_of", "editor_of", "regime_of"]
            if frame.editor_of.nunique() > 1:
                frame.insert(3, "from", frame.editor_of)
            frame = together(frame, hidden) if args.holm else frame
            out.print(laid_out(frame, title, [*hidden, *(["model"] if frame.model.nunique() == 1 else [])]))
        else:
            rows = retention(*args.folders)
            table = pooled(rows)
            constant = [name for name in ("model", "editor") if table[name].nunique() == 1]
            title = f"{rows.run.nunique()} runs (± 95% over facts, orders and seeds)"
            table = together(table, HIDDEN) if args.holm else table
            out.print(laid_out(table, title, [*HIDDEN, *constant]))
            lost = pooled(rows, drops)
            if len(lost):
                out.print(laid_out(lost, f"General ability: {power(lost)}", ["of", "asked", *constant]))
    except UserError as error:
        print(f"qfbench-results: {error}", file=sys.stderr)
        sys.exit(2)
