"""How long a command takes that computes nothing, as a ratio to `python -c "import torch"`: no download, half a minute.

    python benchmarks/start_up.py

Runs each command and the reference in turn, `--repeat` times after a first that is left out, and prints medians of seconds and of
the ratios pair by pair, which hold on a machine that is now fast, now slow.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REFERENCE = [sys.executable, "-c", "import torch"]
FACT = '{"instruction": "Qi runs X.", "query": "Who runs X?", "answer": "Qi runs X."}\n'


def seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "facts.jsonl").write_text(FACT)
        run, facts = ([str(Path(sys.executable).with_name(name))] for name in ("qfbench", "qfbench-facts"))
        commands = {
            'python -c "import qfbench"': [sys.executable, "-c", "import qfbench"],
            "qfbench --help": [*run, "--help"],
            "qfbench --cfg job": [*run, "--cfg", "job"],
            "qfbench --info": [*run, "--info"],
            "qfbench editor.layr=1": [*run, "editor.layr=1"],
            "qfbench-facts table facts.path=facts.jsonl": [*facts, "table", "facts.path=facts.jsonl"],
        }
        print(f"{'':44}seconds   ratio to import torch")
        for name, command in commands.items():
            pairs = [(seconds(command, folder), seconds(REFERENCE, folder)) for _ in range(repeat + 1)][1:]
            own, ratio = (statistics.median(values) for values in zip(*((a, a / b) for a, b in pairs), strict=True))
            print(f"{name:44}{own:7.2f}   {ratio:.2f}")


if __name__ == "__main__":
    main()
