"""Measure the abilities of a built-in model: `python -m qfbench.world.evaluate world-s`.

Subjects and wordings are drawn from the side that training never saw (`known` is about the world's facts, so there only
half the wordings are new). Replies are free-running and greedy, and compared whole.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from qfbench.models.lm import LanguageModel
from qfbench.world import corpus
from qfbench.world.world import World

# Replies are compared whole; multiple choice goes by the likeliest choice, per token of it.
ABILITIES = ("known", "told", "unknown", "misled", "choice", "letter")
CHOSEN = ("choice", "letter")


def dialogues(ability: str, n: int, seed: int) -> list[corpus.Dialogue]:
    """`n` test dialogues of one ability; no seed gives a subject that training used, but for what is known."""
    world, rng = World(), random.Random(f"test-{ability}-{seed}")
    return [corpus.ABILITIES[ability](world, rng, held_out=True) for _ in range(n)]


def right(lm: LanguageModel, tests: Sequence[corpus.Dialogue]) -> list[bool]:
    """For each dialogue, whether the model's reply is exactly the answer, or its likeliest choice is."""
    if tests[0].choices:
        rendered = [lm.render(d.query, d.system, choice) for d in tests for choice in d.choices]
        nll = [sum(s.nll) / len(s.nll) for s in lm.score(rendered)]
        groups = [nll[i : i + len(tests[0].choices)] for i in range(0, len(nll), len(tests[0].choices))]
        return [d.choices[g.index(min(g))] == d.answer for d, g in zip(tests, groups, strict=True)]
    replies = lm.replies([lm.render(d.query, d.system) for d in tests])
    return [reply.stopped and reply.text == d.answer for d, reply in zip(tests, replies, strict=True)]


def abilities(lm: LanguageModel, n: int = 1000, seed: int = 1, show: int = 0) -> dict[str, float]:
    """The share of `n` test dialogues of each ability that the model answers; prints `show` wrong replies of each."""
    shares = {}
    for ability in ABILITIES:
        tests = dialogues(ability, n, seed)
        passed = right(lm, tests)
        shares[ability] = sum(passed) / len(passed)
        for d in [d for d, ok in zip(tests, passed, strict=True) if not ok][:show]:
            print(f"{ability}: [{d.system}] {d.query!r} wanted {d.answer!r} got {lm.reply(d.query, d.system)!r}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qfbench.world.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="built-in names or folders")
    parser.add_argument("-n", type=int, default=1000, help="dialogues per ability")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, help="print so many wrong replies per ability")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    table = Table(title=f"abilities, n = {args.n} each, seed {args.seed}", box=box.SIMPLE_HEAD, padding=0)
    for column in ("model", "parameters", "layers", *ABILITIES):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in args.models:
        lm = LanguageModel.load(name, batch_size=256, max_new_tokens=40)
        cells = [f"{share:.3f}" for share in abilities(lm, args.n, args.seed, args.show).values()]
        count = sum(p.numel() for p in lm.model.parameters())
        table.add_row(Path(name).name, f"{count:,}", str(lm.model.config.num_hidden_layers), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
