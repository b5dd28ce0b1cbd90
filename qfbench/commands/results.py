"""The command `qfbench-results`: the summary of stored runs, or of two compared, or a small copy of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape

from qfbench.analysis.drops import drops, power
from qfbench.analysis.flips import differing, flips
from qfbench.analysis.measures import together
from qfbench.analysis.overview import narrowed, ordered, overview, where
from qfbench.analysis.tables import HIDDEN, console, show, written
from qfbench.commands import show_all
from qfbench.commands.rescore import rescored
from qfbench.errors import UserError
from qfbench.pages.leaderboard import leaderboard
from qfbench.pages.results import compare, differing_settings, folders, pooled, retention, ship, told_apart
from qfbench.runs.provenance import SAME

KINDS = ("csv", "json", "markdown", "latex")


def summarize(args: argparse.Namespace, out: Console) -> None:
    rows = retention(*args.folders)
    if args.rescore:
        rows, said = rescored(rows)
        out.print(said, markup=False, soft_wrap=True)
    table = pooled(rows)
    table = overview(together(table, HIDDEN) if args.holm else table, rows.attrs["settings"])
    conclude(table, f"{rows.run.nunique()} runs (± 95% over facts, orders and seeds)", HIDDEN, args, out)
    lost = pooled(rows, drops)
    if len(lost) and not (args.where or args.sort or args.columns):
        constant = [name for name in ("model", "editor") if lost[name].nunique() == 1]
        show(out, lost, f"General ability: {power(lost)}", ["of", "asked", *constant])


def differences(args: argparse.Namespace, out: Console) -> None:
    parts, found = [], folders(*args.folders)
    for folder in found:
        try:
            parts.append(compare(folder, args.against, args.across).assign(run=str(folder)))
        except UserError as error:
            if len(found) == 1:
                raise
            out.print(f"left out: {error}", style="yellow", markup=False, soft_wrap=True)
    if not parts:
        raise UserError(f"no run in {', '.join(args.folders)} can be compared with {args.against}")
    frame = pd.concat(parts, ignore_index=True)
    settings = told_apart(differing_settings(found))
    for place, name in enumerate(settings):
        frame.insert(place, name, frame.run.map(settings[name]))
    if frame.editor_of.nunique() > 1:
        frame.insert(len(settings) + 3, "from", frame.editor_of)
    hidden = [*HIDDEN, "model_of", "editor_of", "regime_of", "run"]
    frame = together(frame, hidden) if args.holm else frame
    conclude(overview(frame, list(settings)), f"Differences from {args.against} (± 95%, paired)", hidden, args, out)


def print_flips(args: argparse.Namespace, out: Console) -> None:
    compare(args.folders[0], args.against, args.across)  # refuses what cannot be compared
    lines = differing(flips(retention(args.folders[0])), flips(retention(args.against)))
    shown = lines[["kind", "query", "expected", "before", "after", "other"]].rename(columns={"other": "against"})
    title = f"{len(lines)} questions that one passes and {args.against} does not, or the other way round"
    show(out, shown.fillna(""), title)


def check(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing beside the others.

    Raises:
        UserError: naming them.
    """
    chosen = [name for name in ("where", "sort", "columns", *KINDS) if getattr(args, name)]
    if args.flips and not args.against:
        raise UserError("--flips: needs --against RUN")
    if args.flips and len(args.folders) > 1:
        raise UserError(f"--flips: compares two runs; {len(args.folders)} are given beside --against")
    for option, others in {
        "leaderboard": ["ship", "against", "across", "flips", "rescore", "holm", *chosen],
        "ship": ["against", "flips", "rescore", "holm", *chosen],
        "flips": ["rescore", "holm", *chosen],
        "against": ["rescore"],
    }.items():
        for other in others if getattr(args, option) else ():
            if getattr(args, other):
                raise UserError(f"--{option} and --{other} cannot be given together")


def conclude(table: pd.DataFrame, title: str, hidden: Sequence[str], args: argparse.Namespace, out: Console) -> None:
    """Print the lines and columns that are asked for, and write them to the files."""
    table = where(table, args.where)
    table = ordered(table, args.sort) if args.sort else table
    if args.columns:
        table, hidden = narrowed(table, args.columns.split(",")), ()
    hidden = [*hidden, *(name for name in ("model", "editor") if name in table and table[name].nunique() == 1)]
    show(out, table, title, hidden)
    for kind in KINDS:
        if path := getattr(args, kind):
            write(path, written(table, kind, hidden), out)


def write(path: str, text: str, out: Console) -> None:
    """Write a file that was asked for, and say so.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    out.print(f"wrote {path}", markup=False, soft_wrap=True)


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
    parser.add_argument(
        "--flips", action="store_true", help="with --against RUN: each question that one passes and the other does not"
    )
    parser.add_argument(
        "--rescore", action="store_true", help="score stored replies again, by today's rules, without a model"
    )
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="only these lines (VALUE,VALUE: either)"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="measures from the highest, all else from the lowest")
    parser.add_argument("--columns", metavar="NAME,NAME", help="only these columns")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the table as {kind}")
    parser.add_argument("--ship", metavar="DIR", help="copy the runs into the new folder DIR, small enough for git")
    parser.add_argument("--leaderboard", metavar="FILE", help="write a page of results by model and number of edits")
    args = parser.parse_args()
    show_all()
    out = console()
    try:
        check(args)
        if args.ship:
            size = sum(path.stat().st_size for run in ship(args.ship, *args.folders) for path in run.iterdir())
            out.print(f"wrote [bold]{escape(args.ship)}[/bold]: {size / 1000:.0f} kB", soft_wrap=True)
        elif args.leaderboard:
            write(args.leaderboard, leaderboard(args.folders, Path(args.leaderboard)), out)
        elif args.flips:
            print_flips(args, out)
        elif args.against:
            differences(args, out)
        else:
            summarize(args, out)
    except UserError as error:
        print(f"qfbench-results: {error}", file=sys.stderr)
        sys.exit(2)
