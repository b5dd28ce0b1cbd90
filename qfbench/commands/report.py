"""The command `qfbench-report`: stored runs as one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qfbench.commands import show_all
from qfbench.errors import UserError
from qfbench.pages.report import page


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="qfbench-report", description="One HTML page of a run, or of a study.")
    parser.add_argument("folder", help="folder of a run, or one that holds several")
    parser.add_argument("--out", help="the file to write; FOLDER/report.html if not given")
    args = parser.parse_args()
    show_all()
    out = Path(args.out or Path(args.folder) / "report.html").expanduser()
    try:
        text = page(args.folder)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    except UserError as error:
        print(f"qfbench-report: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {out}")
