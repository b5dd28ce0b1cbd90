"""Seconds of an edit in a sequence, by `qf_stream` and by fine-tuning: CPU time of one thread, no question asked.

    python benchmarks/stream.py --edits 100
    python benchmarks/stream.py --edits 20 --editors finetune_replay
    python benchmarks/stream.py --edits 20 --editors qf_stream model=smollm2-135m-instruct facts=everyday facts@editor.keep=everyday

Further words are settings, as `qfbench` takes them. *Before the first* is what is done once: asking the unedited model what is to
stay. The mean is over all edits, what is solved anew included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir

from qfbench import LanguageModel
from qfbench.commands.settings import CONF, build
from qfbench.editors.regimes import sequential
from qfbench.tasks.run import LOADED


def measured(name: str, edits: int, overrides: Sequence[str]) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--editors", nargs="+", default=["qf_stream", "finetune_tuned"])
    args, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    for name in args.editors:
        measured(name, args.edits, overrides)


if __name__ == "__main__":
    main()
