"""The commands: the only place that knows of a command line and of Hydra's start."""

import io
import sys


def show_all() -> None:
    """Show by its number what the terminal's encoding lacks, instead of failing there."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
