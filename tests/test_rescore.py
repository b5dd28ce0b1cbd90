"""Stored replies are scored again under today's rules."""

import json

import pandas as pd
import pytest

from qfbench import UserError
from qfbench.commands.rescore import rescored
from qfbench.facts.world import world
from qfbench.pages.results import rows_of

CONFIG = "seed: 0\nfacts: {_target_: qfbench.facts.world.world, n: 2, locality: 1}\n"


def run(folder, rows, config=CONFIG):
    folder.mkdir()
    same = {"task": "retention", "model": "tiny", "editor": "QF", "condition": "edited", "regime": "sequential"}
    pd.DataFrame(rows).assign(**same, step=1, taught=1).to_parquet(folder / "rows.parquet")
    (folder / "config.yaml").write_text(config)
    (folder / "provenance.json").write_text(json.dumps({"probes": 2}))
    (folder / "progress.json").write_text(json.dumps({"rows": len(rows), "tasks": [], "finished": True}))
    return folder


def row(fact, probe, reply, generated, stopped=True):
    about = {"fact_id": fact.id, "kind": probe.kind, "query": probe.query, "expected": probe.expected or "As before."}
    return about | {"reply": reply, "stopped": stopped, "generated": generated}


def test_each_verdict_is_the_one_of_today(tmp_path):
    first, second = world(2, locality=1)
    near = next(p for p in first.probes if p.own)
    rows = [
        row(first, first.edit, first.answer, False),
        row(second, second.edit, first.answer, True),
        row(second, second.edit, second.answer, True, stopped=False),
        row(first, near, "As before.", False, stopped=False),  # a neighbour is compared by its text
        row(first, near, "Otherwise.", True),
        row(first, first.edit, None, False),  # left out of a shipped copy
        row(first, first.edit, first.answer, False) | {"query": "Asked of old?"},
    ]
    again, said = rescored(rows_of(run(tmp_path / "run", rows)))
    assert again.generated.tolist() == [True, False, False, True, False, False, False]
    assert said.startswith("scored again by rules of version 3 (the runs: 2): 5 of 6 verdicts changed")


def test_what_was_leaked_is_told_by_what_was_taught_until_then(tmp_path):
    first, second = world(2, locality=1)
    stranger = next(p for p in first.probes if p.kind == "unknown")
    name = {fact.id: fact.known_as[0] for fact in (first, second)}
    asked = row(first, stranger, f"It is {name[first.id]}.", False) | {"leaked": False}
    other = row(first, stranger, f"It is {name[second.id]}.", False) | {"leaked": True}  # which is not taught
    rows = [row(first, first.edit, first.answer, True) | {"leaked": False}, asked, other]
    again, _ = rescored(rows_of(run(tmp_path / "run", rows)))
    assert again.leaked.tolist() == [False, True, False]


def test_facts_that_cannot_be_made_are_named(tmp_path):
    config = "seed: 0\nfacts: {_target_: qfbench.facts.table.table, path: gone.jsonl}\n"
    (fact,) = world(1)
    with pytest.raises(UserError, match="gone.jsonl"):
        rescored(rows_of(run(tmp_path / "run", [row(fact, fact.edit, "x", True)], config)))
