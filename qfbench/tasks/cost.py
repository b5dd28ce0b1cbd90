"""What one edit costs: seconds to record, to solve and to write, tokens seen, memory; apart from it, seconds to ask.

No two clock readings are alike, so they are rows of this task and never of `retention`, whose rows can be had again.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pandas as pd
import torch

from qfbench.analysis import plots
from qfbench.editors.base import Editor, Recorder
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.probes import ask
from qfbench.models.lm import LanguageModel
from qfbench.regression import Suite
from qfbench.tasks.run import Run

PARTS = ("record", "solve", "write")


def cost(run: Run, beside: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Time the edit of each of the run's facts, each alone, by the run's editor and by what stands `beside` it.

    The first fact is edited too, but left out: a first call pays for what later ones find ready. Editors take turns, so that
    a machine that is busy for a while is so for all. After each edit the fact's own probes are asked once. Each entry of
    `beside` holds a `model` and an `editor`.
    """
    if len(run.facts) < 2:
        raise UserError("task=cost: the first edit is left out, so it takes 2 facts or more")
    entrants = run.beside(beside or {})
    able = [there for there in entrants if there.earlier(condition="unsupported").empty]
    with run.progress(len(run.facts) * len(able)) as advance:
        for n, fact in enumerate(run.facts):
            probes = [fact.edit, *fact.probes]
            for there in list(able):
                about = there.editor.about
                advance(f"{there.editor_name}: edit {n}")
                if n and not there.earlier(fact_id=fact.id).empty:
                    continue
                try:
                    row = timed(there.lm, there.editor, fact, probes)
                except Unsupported as error:
                    there.log({"condition": "unsupported", "reply": str(error)} | about)
                    there.warn(f"{there.title}: {error}")
                    able.remove(there)
                    continue
                if n:
                    there.log(row | about, condition="edited", step=n, fact_id=fact.id, probes=len(probes))
            if n:
                run.commit()
    rows = run.rows()
    if (rows.condition == "edited").any():
        table = medians(rows)
        title = f"Milliseconds of one edit ({machine(run.lm)}): medians of {len(run.facts) - 1} ± half of the interquartile range"
        printed = table.rename(columns=lambda name: name.replace("_ms", ""))
        for name in (*PARTS, "evaluation"):
            for side, sign in (("low", -1), ("high", 1)):
                printed[f"{name}_{side}"] = printed[name] + sign * printed[f"{name}_iqr"] / 2
        run.table(table, title, hidden=[name for name in printed if name.endswith("_iqr")], printed=printed)
        run.console.print(
            "The first edit by each is left out. Where record is empty, all is solve: the editor has no such split. "
            + ("peak: on the GPU, during an edit." if run.lm.device.type == "cuda" else "peak: of the process, so far.")
        )
        run.figure(plots.cost(table), "cost")


def timed(lm: LanguageModel, editor: Editor, fact: Fact, probes: Sequence[Probe] = ()) -> dict[str, float]:
    """Edit once and put the weights back; between the two, ask `probes`.

    In seconds: `record` (NaN where an editor is no `Recorder`: then all is `solve`), `solve`, `write` (add the change to the
    weights, and put them back), `evaluation`. `tokens` are those of all forward passes that found the change, padding included,
    as often as they passed; `peak_gib` is the most memory held during the edit on CUDA, or by the process so far.
    """
    tokens = 0

    def count(_model: object, _args: object, given: Mapping[str, Any]) -> None:
        nonlocal tokens
        tokens += given["input_ids"].numel()

    if lm.device.type == "cuda":
        for device in lm.devices:
            torch.cuda.reset_peak_memory_stats(device)
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


def reckoned(
    lm: LanguageModel,
    editors: Sequence[Editor],
    facts: Sequence[Fact],
    suites: Mapping[str, Suite],
    at: Sequence[int],
    orders: int,
    placebo: int,
    at_most: int | None,
) -> float:
    """Seconds that sequences of edits by all `editors` will take: of one edit and one evaluation by each, times their number.

    All is asked after each of `at` edits. An editor that this model does not suit counts by its evaluation alone.
    """
    own = sum(1 + sum(not p.always for p in f.probes) for f in facts) / len(facts)
    kinds = Counter(p.kind for f in facts for p in f.probes if p.always)
    always, n = sum(k if at_most is None else min(k, at_most) for k in kinds.values()), len(facts)
    asked = n * own + sum(step + always for step in at) + (1 + placebo) * (n * own + always)
    probes = [p for f in facts for p in (f.edit, *f.probes)][:64]
    start = now(lm)
    ask(lm, probes)
    general = now(lm)
    for suite in suites.values():
        suite(lm)
    each = asked * (general - start) / len(probes) + (len(at) + placebo) * (now(lm) - general)
    seconds = 0.0
    for editor in editors:
        start = now(lm)
        with suppress(Unsupported):
            editor.edit(lm, facts[:1])
        seconds += orders * (each + n * (now(lm) - start))
    return seconds


def now(lm: LanguageModel) -> float:
    """Seconds, once the devices have done all that they were given to do."""
    if lm.device.type != "cpu":
        for device in lm.devices:
            torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_gib(lm: LanguageModel) -> float:
    if lm.device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, lm.devices)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine(lm: LanguageModel) -> str:
    """What the figures hold for."""
    if lm.device.type == "cuda":
        return torch.cuda.get_device_name(lm.device)
    threads = torch.get_num_threads()
    return f"{lm.device.type.upper()}, {threads} thread{'s' * (threads > 1)}"


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per model and editor: medians over edits, and interquartile ranges, in milliseconds; the highest peak."""
    rows = rows[rows.condition == "edited"]
    rows = rows.assign(total=rows[list(PARTS)].sum(axis=1))
    lines = []
    for (model, editor), own in rows.groupby(["model", "editor"], sort=False):
        line: dict[str, Any] = {"model": model, "editor": editor}
        for name in (*PARTS, "total", "evaluation"):
            low, middle, high = 1000 * own[name].quantile([0.25, 0.5, 0.75])
            line |= {f"{name}_ms": middle, f"{name}_ms_iqr": high - low}
        line |= {name: round(own[name].median()) for name in ("tokens", "probes")}
        lines.append(line | {"peak_gib": own.peak_gib.max()})
    return pd.DataFrame(lines)
