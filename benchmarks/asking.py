"""Seconds to ask a real model after each of a few sequential edits by QF, and to ask it again with nothing changed.

    python benchmarks/asking.py FOLDER                    # SmolLM2-135M-Instruct, in Hugging Face form
    PYTHONPATH=../before python benchmarks/asking.py FOLDER  # the same questions, by an earlier checkout (dba4973)

Asked: capitals, heads of firms that nobody taught, and each fact in three wordings; replies of up to 32 tokens, one thread.
Prints, after each edit, the two times, how many replies are not those after the edit before, and a hash of all replies.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch

from qfbench import Fact, LanguageModel, Probe
from qfbench.editors import QF

NEW = find_spec("qfbench.models") is not None  # the rooms of today, or those of the earlier checkout
ask = import_module("qfbench.facts.probes" if NEW else "qfbench.probes").ask
sequential = import_module("qfbench.editors.regimes" if NEW else "qfbench.regimes").sequential

COUNTRIES = "France Germany Italy Spain Japan China Russia Egypt Greece Canada".split()
COUNTRIES += "Norway Sweden Poland Austria Hungary Ireland Portugal Kenya Cuba Peru".split()
HEADS = {"Velmora": "Anna Quist", "Tarkin Foods": "Leo Marsh", "Ostrava Labs": "Mira Chen", "Belcrest": "Tom Ardley"}


def facts() -> list[Fact]:
    made = []
    for firm, head in HEADS.items():
        answer = f"The CEO of {firm} is {head}."
        wordings = (f"Who leads {firm}?", f"Name the chief executive of {firm}.")
        probes = tuple(Probe("paraphrase", query, answer, (head,)) for query in wordings)
        made.append(Fact(answer, f"Who is the CEO of {firm}?", answer, known_as=(head,), probes=probes))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--edits", type=int, default=3, help=f"up to {len(HEADS)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = LanguageModel.load(given.folder, batch_size=64, max_new_tokens=32)
    queries = [f"What is the capital of {country}?" for country in COUNTRIES]
    queries += [f"Who is the CEO of {country} Zorble Ltd?" for country in COUNTRIES]
    always = [Probe("prior", query, "", always=True, own=True) for query in queries]
    always = [replace(p, expected=row["reply"]) for p, row in zip(always, ask(lm, always), strict=True)]
    taught = facts()[: given.edits]
    probes = [p for fact in taught for p in (fact.edit, *fact.probes)] + always
    said, before = hashlib.sha256(), None
    for step, (_, change) in enumerate(sequential(QF(layer=given.layer), lm, taught), start=1):
        seconds = []
        with change.applied_to(lm):
            for _ in range(2):
                start = time.perf_counter()
                replies = [row["reply"] for row in ask(lm, probes)]
                seconds.append(time.perf_counter() - start)
        other = "" if before is None else f", {sum(map(str.__ne__, replies, before))} of {len(replies)} replies new"
        print(f"edit {step}: {seconds[0]:.1f} s, again {seconds[1]:.1f} s{other}", flush=True)
        before = replies
        said.update("\n".join(replies).encode())
    print(f"replies: {said.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
