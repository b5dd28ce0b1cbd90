"""What one edit costs: seconds to record, to solve and to write, tokens seen, memory; apart from it, seconds to ask.

No two clock readings are alike, so they are rows of this task and never of `retention`, whose rows can be had again byte for byte.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from qfbench import plots
from qfbench.editors.base import Editor, Recorder
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe
from qfbench.lm import LanguageModel
from qfbench.probes import ask
from qfbench.run import Run

PARTS = ("record", "solve", "write")


def cost(run: Run, beside: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Time the edit of each of the run's facts, each alone, by the run's editor and by what stands `beside` it.

    The first fact is edited once before, and left out: a first call pays for what later ones find ready. After each edit the
    fact's own probes are asked once. Each entry of `beside` holds a `model` and an `editor`.
    """
    first, *facts = run.facts
    if not facts:
        raise UserError("task=cost: the first edit is left out, so it takes 2 facts or more")
    entrants = run.beside(beside or {})
    with run.progress(len(facts) * len(entrants)) as advance:
        for there in entrants:
            about = {"layer": there.editor.site.layer}
            rest = [(n, fact) for n, fact in enumerate(facts, 1) if there.earlier(fact_id=fact.id).empty]
            try:
                for n, fact in [(0, first), *rest] if rest and there.earlier(condition="unsupported").empty else []:
                    probes = [fact.edit, *fact.probes]
                    row = timed(there.lm, there.editor, fact, probes) | {"probes": len(probes), "fact_id": fact.id}
                    if n:
                        there.log(row | about, condition="edited", step=n)
                        there.commit()
                        advance(f"{there.editor_name}: edit {n}")
            except Unsupported as error:
                there.log({"condition": "unsupported", "reply": str(error)} | about)
                there.warn(f"{there.title}: {error}")
    rows = run.rows()
    if (rows.condition == "edited").any():
        table = medians(rows)
        title = (
            f"Milliseconds of one edit ({machine(run.lm)}): medians of {len(facts)} ± half of the interquartile range"
        )
        printed = table.drop(columns=["total_ms_low", "total_ms_high"])
        run.table(table, title, printed=printed.rename(columns=lambda name: name.replace("_ms", "")))
        run.console.print(
            "The first edit by each is left out. Where record is empty, all is solve: the editor has no such split. "
            + ("peak: on the GPU, during an edit." if run.lm.device.type == "cuda" else "peak: of the process, so far.")
        )
        run.figure(plots.cost(table), "cost")


def timed(lm: LanguageModel, editor: Editor, fact: Fact, probes: Sequence[Probe] = ()) -> dict[str, float]:
    """Edit once and put the weights back; between the two, ask `probes`.

    In seconds: `record` (NaN where an editor is no `Recorder`: then all is `solve`), `solve`, `write` (add the change to the
    weights, and put them back), `evaluation`. `tokens` are those of all forward passes that found the change, as often as they
    passed; `peak_gib` is the most memory held during the edit on CUDA, or by the process so far.
    """
    tokens = 0

    def count(_model: object, _args: object, given: Mapping[str, Any]) -> None:
        nonlocal tokens
        tokens += given["input_ids"].numel()

    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        start = recorded = now(lm)
        if isinstance(editor, Recorder):
            part = editor.record(lm, fact)
            recorded = now(lm)
            delta = editor.together(lm, [part])
        else:
            delta = editor.edit(lm, [fact])
        solved = now(lm)
    finally:
        handle.remove()
    with delta.applied_to(lm):
        written, peak = now(lm), peak_gib(lm)
        if probes:
            ask(lm, probes)
        asked = now(lm)
    return {
        "record": recorded - start if isinstance(editor, Recorder) else math.nan,
        "solve": solved - recorded,
        "write": written - solved + now(lm) - asked,
        "evaluation": asked - written,
        "tokens": tokens,
        "peak_gib": peak,
    }


def now(lm: LanguageModel) -> float:
    """Seconds, once the device has done all that it was given to do."""
    if lm.device.type != "cpu":
        torch.accelerator.synchronize(lm.device)
    return time.perf_counter()


def peak_gib(lm: LanguageModel) -> float:
    if lm.device.type == "cuda":
        return torch.cuda.max_memory_allocated(lm.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine(lm: LanguageModel) -> str:
    """What the figures hold for."""
    if lm.device.type == "cuda":
        return torch.cuda.get_device_name(lm.device)
    threads = torch.get_num_threads()
    return f"{lm.device.type.upper()}, {threads} thread{'s' * (threads > 1)}"


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per model and editor: medians over edits and the quartiles beside them, in milliseconds; the highest peak."""
    rows = rows[rows.condition == "edited"]
    rows = rows.assign(total=rows[list(PARTS)].sum(axis=1))
    lines = []
    for (model, editor), own in rows.groupby(["model", "editor"], sort=False):
        line: dict[str, Any] = {"model": model, "editor": editor}
        for name in (*PARTS, "total", "evaluation"):
            for side, quantile in (("", 0.5), ("_low", 0.25), ("_high", 0.75)):
                line[f"{name}_ms{side}"] = 1000 * own[name].quantile(quantile)
        line |= {name: round(own[name].median()) for name in ("tokens", "probes")}
        lines.append(line | {"peak_gib": own.peak_gib.max()})
    return pd.DataFrame(lines)
