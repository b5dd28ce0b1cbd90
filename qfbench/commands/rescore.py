"""Stored replies scored again, without a model: under today's rules of what a right reply is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from qfbench.commands.settings import build
from qfbench.facts.base import Fact
from qfbench.facts.probes import leaked
from qfbench.pages.results import provenance_of
from qfbench.runs.provenance import PROBES

KEY = ["fact_id", "kind", "query"]
AT_ONCE = ["model", "editor", "regime", "condition", "order", "step"]  # when and where something was asked


def rescored(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of `results.rows_of` with `generated` and `leaked` worked out anew from their replies, and in words what changed.

    The facts are those that a run's configuration makes today. Rows whose question they no longer hold, and replies that a shipped
    copy left out, stay as they are.

    Raises:
        UserError: the facts of a run cannot be made (its file is gone).
    """
    parts = [_again(Path(run), own) for run, own in rows.groupby("run", sort=False)]
    out = pd.concat(parts).loc[rows.index]
    out.attrs = rows.attrs
    asked = rows.reply.notna() & rows.kind.ne("question")
    changed = int((out.generated.eq(True) != rows.generated.eq(True))[asked].sum())
    before = sorted({str(provenance_of(Path(run)).get("probes", "before 2")) for run in rows.run.unique()})
    text = f"scored again by rules of version {PROBES} (the runs: {', '.join(before)}): "
    return out, text + f"{changed} of {asked.sum():,} verdicts changed"


def _again(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    facts: list[Fact] = build(config, "facts")
    probes = {(f.id, p.kind, p.query): p for f in facts for p in (f.edit, *f.probes)}
    known_as = {fact.id: fact.known_as for fact in facts}
    edits = rows[rows.kind == "edit"].groupby(AT_ONCE, dropna=False).fact_id.agg(set).to_dict()
    verdicts, leaks = [], []
    for line in rows[[*KEY, *AT_ONCE, "reply", "stopped", "expected", "generated", "leaked"]].to_dict("records"):
        probe = probes.get(tuple(line[name] for name in KEY))
        if probe is None or not isinstance(line["reply"], str):
            verdicts.append(line["generated"])
            leaks.append(line["leaked"])
            continue
        probe = replace(probe, expected=line["expected"]) if probe.own else probe
        verdicts.append((line["stopped"] is True or probe.own) and probe.passes(line["reply"]))
        taught = {
            name for fact in edits.get(tuple(line[name] for name in AT_ONCE), ()) for name in known_as.get(fact, ())
        }
        leaks.append(leaked(probe, line["reply"], taught) if line["kind"] == "unknown" else line["leaked"])
    return rows.assign(generated=verdicts, leaked=leaks)
