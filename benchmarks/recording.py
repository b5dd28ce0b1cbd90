"""Seconds to record and solve facts, beside a bare pass over the same dialogues; and of later edits beside early ones.

    python benchmarks/recording.py world-s --layer 4                 # no download
    python benchmarks/recording.py FOLDER --layer 24 --repeat 3      # SmolLM2-135M-Instruct, in Hugging Face form
    python benchmarks/recording.py world-s --layer 4 --edits 1000    # edit 10 beside the last, by regime

The bare pass runs the layers up to the edited one over all dialogues, told and alone, in batches of like length. Seconds of CPU
of one thread, on a GPU of the clock; medians of `--repeat` takes that alternate. An edit is what its regime does, and writing
the change; no question is asked. It is the median of 9 of which it is the last, without those in which facts were recorded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from qfbench import Fact, LanguageModel
from qfbench.editors import QF, regimes
from qfbench.editors.base import TOGETHER
from qfbench.editors.teach import lesson
from qfbench.facts.world import world
from qfbench.models.activations import TOKENS
from qfbench.models.cut import Cut
from qfbench.models.tree import Question, batches
from qfbench.tasks.cost import now


def seconds(lm: LanguageModel, run: Callable[[], object]) -> float:
    clock = time.process_time if lm.device.type == "cpu" else lambda: now(lm)
    start = clock()
    run()
    return clock() - start


def bare(lm: LanguageModel, layer: int, facts: Sequence[Fact]) -> Callable[[], None]:
    """A pass through the layers up to `layer`, of the dialogues of all facts."""
    cut = Cut(lm.model, layer + 1)
    pairs = [lesson(lm, fact) for fact in facts]
    asked = [Question(d.ids, reply=False) for pair in pairs for d in (pair.told, pair.alone)]

    @torch.no_grad()
    def run() -> None:
        for batch in batches(asked, lm.batch_size, TOKENS):
            ids = pad_sequence([torch.tensor(q.prompt) for q in batch], batch_first=True).to(lm.device)
            cut.below(ids, torch.arange(ids.shape[1], device=lm.device)[None], None, None)

    return run


def record(lm: LanguageModel, editor: QF, facts: Sequence[Fact], repeat: int) -> dict[str, float]:
    """Medians of seconds."""
    parts = editor.record_all(lm, facts)
    cases: dict[str, Callable[[], object]] = {
        "bare pass": bare(lm, editor.layer, facts),
        "recorded together": lambda: editor.record_all(lm, facts),
        "recorded one by one": lambda: [editor.record(lm, fact) for fact in facts],
        "solved together": lambda: editor.together(lm, parts),
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeat):
        for name, run in cases.items():
            taken[name].append(seconds(lm, run))
    return {name: statistics.median(times) for name, times in taken.items()}


def apart(lm: LanguageModel, editor: QF, facts: Sequence[Fact]) -> tuple[float, float]:
    """How far facts recorded together are from facts recorded one by one, relatively: the worst key, and the change."""
    together, alone = editor.record_all(lm, facts), [editor.record(lm, fact) for fact in facts]
    keys = [
        ((a.keys - b.keys).norm(dim=1) / b.keys.norm(dim=1)).max().item() for a, b in zip(together, alone, strict=True)
    ]
    (many,), (one,) = (editor.together(lm, parts).changes.values() for parts in (together, alone))
    return max(keys), ((many.dense() - one.dense()).norm() / one.norm()).item()


def edits(lm: LanguageModel, editor: QF, facts: Sequence[Fact], regime: str, limit: float) -> dict[int, float]:
    """Seconds of some edits, by their number; 0 stands for the mean of all, recording included."""
    taken: list[float] = []
    steps = getattr(regimes, regime)(editor, lm, facts)

    def step() -> None:
        _, delta = next(steps)
        with delta.applied_to(lm):
            pass

    while len(taken) < len(facts) and sum(taken) < limit:
        taken.append(seconds(lm, step))
    latest = {n: [t for i, t in enumerate(taken[:n]) if i % TOGETHER][-9:] for n in (10, 100, 300, len(taken))}
    return {n: statistics.median(latest[n]) for n in sorted(latest) if n <= len(taken)} | {0: statistics.mean(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--edits", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a regime ends")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm, editor = LanguageModel.load(given.model), QF(given.layer)
    facts = world(given.edits or given.facts, paraphrases=0, prior=0, unknown=0)
    print(f"{lm.name}, layer {editor.layer}, {len(facts)} facts, {lm.device.type}")
    for regime in ("sequential", "protected", "joint") if given.edits else ():
        taken = edits(lm, editor, facts, regime, given.limit)
        mean = taken.pop(0)
        each = ", ".join(f"edit {n}: {1000 * took:.1f} ms" for n, took in taken.items())
        print(f"  {regime:10} {each}; mean with recording: {1000 * mean:.1f} ms", flush=True)
    if not given.edits:
        times = record(lm, editor, facts, given.repeat)
        for name, took in times.items():
            print(f"  {name:20} {took:8.3f} s  {took / times['bare pass']:6.2f} of the bare pass")
        key, change = apart(lm, editor, facts)
        print(f"  together and one by one differ by {key:.1e} (keys) and {change:.1e} (change)")


if __name__ == "__main__":
    main()
