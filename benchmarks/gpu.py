"""One table of what edits cost on the geometry of real models, with random weights: `benchmarks/gpu.sh` runs it on a GPU.

    python benchmarks/gpu.py qwen2.5-1.5b qwen2.5-7b
    python benchmarks/gpu.py tiny --device cpu --edits 12            # to try it

Each line is of the benchmark that it names: `edit_speed.py` (one edit, by QF and by QF2), `recording.py` (64 facts at once;
edits one after another).
"""

from __future__ import annotations

import argparse

import torch
from edit_speed import GEOMETRY, load, measure
from recording import edits, record
from rich.console import Console
from rich.table import Table

from qfbench.editors import QF
from qfbench.facts.world import world
from qfbench.tasks.cost import PARTS, machine, peak_gib


def column(name: str, device: str, dtype: torch.dtype, n: int, repeat: int) -> tuple[str, dict[str, str]]:
    """Where it was measured, and what: of one model."""
    lm, layer = load(name, device, dtype)
    own = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 2**30
    found = {"weights, GiB": f"{own:.2f}"}
    facts = world(max(n, 64), paraphrases=0, prior=0, unknown=0)
    times = record(lm, QF(layer), facts[:64], repeat)
    found |= {f"recording: 64 facts, {part}, s": f"{took:.3f}" for part, took in times.items()}
    for regime in ("sequential", "protected"):
        taken = edits(lm, QF(layer), facts[:n], regime, limit=120)
        found |= {f"recording: {regime}, edit {i or 'mean'}, ms": f"{1000 * took:.1f}" for i, took in taken.items()}
    if lm.device.type == "cuda":
        found["peak beside the weights so far, GiB"] = f"{peak_gib(lm) - own:.2f}"
    for editor in ("QF", "QF2"):
        one = measure(lm, layer, editor == "QF2", repeat)
        found |= {f"edit_speed: {editor}, {part}, ms": f"{1000 * one[part]:.2f}" for part in PARTS}
    return machine(lm), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=GEOMETRY)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    columns = {
        name: column(name, given.device, getattr(torch, given.dtype), given.edits, given.repeat)
        for name in given.models
    }
    (where, *_), found = zip(*columns.values(), strict=True)
    table = Table("", *columns, title=f"{where}, {given.dtype}, torch {torch.__version__}")
    for line in dict.fromkeys(line for one in found for line in one):
        table.add_row(line, *(one.get(line, "") for one in found))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
