"""Seconds of an edit in a sequence, by `qf_stream` and by fine-tuning: CPU time of one thread, no question asked.

    python benchmarks/stream.py --edits 100
    python benchmarks/stream.py --edits 20 --editors finetune_replay
    python benchmarks/stream.py --edits 20 --editors qf_stream model=smollm2-135m-instruct facts=everyday facts@editor.keep=everyday

Further words are settings, as `qfbench` takes them. *Before the first* is what is done once: asking the unedited model what is to
stay, or recording all facts. The printed mean is over the later edits, what is solved anew included. `--csv FILE` adds a line to a
file, for experiments/rivals/figures.py: there the mean takes in what is done once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir

from qfbench import LanguageModel
from qfbench.commands.settings import CONF, build
from qfbench.editors.regimes import sequential
from qfbench.tasks.run import LOADED


def measured(name: str, edits: int, overrides: Sequence[str]) -> tuple[str, float]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=[f"edits={edits}", *overrides, f"editor={name}"], return_hydra_config=True)
    lm = LanguageModel.load(cfg.model.path, **{key: cfg.model[key] for key in LOADED})
    editor, facts = build(cfg, "editor"), build(cfg, "facts")
    taken, last = [], time.process_time()
    for _ in sequential(editor, lm, facts):
        now = time.process_time()
        taken.append(now - last)
        last = now
    later = taken[1:]
    print(
        f"{name}: before the first and the first {taken[0]:.1f} s; then {statistics.mean(later):.3f} s an edit "
        f"(median {statistics.median(later):.3f}, longest {max(later):.2f})"
    )
    return type(editor).__name__, statistics.mean(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--editors", nargs="+", default=["qf_stream", "finetune_tuned"])
    parser.add_argument("--csv", type=Path, help="put editor and seconds here, in place of the same editor before")
    args, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    overrides += [word for word in args.editors if "=" in word]  # which stand behind the names
    lines = [measured(name, args.edits, overrides) for name in args.editors if "=" not in name]
    if args.csv:
        table = pd.DataFrame(lines, columns=["editor", "seconds"])
        before = pd.read_csv(args.csv) if args.csv.exists() else table[:0]
        pd.concat([before[~before.editor.isin(table.editor)], table]).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
