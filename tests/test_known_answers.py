"""Editors whose result is known beforehand, through the whole retention task and its table."""

from dataclasses import dataclass, field, replace

import pandas as pd
import pytest
import torch
from rich.console import Console

from qfbench import LanguageModel
from qfbench.editors import QF, Editor
from qfbench.editors.regimes import joint, sequential
from qfbench.facts.world import world
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.sites import Site
from qfbench.regression import Perplexity
from qfbench.runs.store import ParquetStore
from qfbench.tasks.retention import retention
from qfbench.tasks.run import Run

SITE = Site(2, "down_proj")
HELD = Perplexity(n=8)
REGIMES = {"sequential": sequential, "joint": joint}


def suite(prior=2, unknown=1):
    """Facts that world-xs answers in every wording when told, and in none otherwise."""
    return world(4, seed=1, paraphrases=1, prior=prior, unknown=unknown)


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs", device="cpu", max_new_tokens=20)


@dataclass
class Oracle(LanguageModel):
    """Is given the instruction with every question about a fact whose mark stands in its weight."""

    facts: tuple = ()
    blank: torch.Tensor | None = field(default=None, repr=False)

    def render(self, query, system="", answer=""):
        marked = (SITE.linear(self.model).weight - self.blank)[0].nonzero()[:, 0].tolist()
        for fact in (self.facts[k] for k in marked):
            if query in [p.query for p in (fact.edit, *fact.probes) if not p.always]:
                return super().render(query, fact.instruction, answer)
        return super().render(query, system, answer)


@dataclass(frozen=True)
class Marker(Editor):
    """Marks the taught facts by changes too small to matter."""

    ids: tuple
    sites = (SITE,)

    def edit(self, lm, facts):
        weight = SITE.linear(lm.model).weight
        change = torch.zeros(weight.shape, dtype=torch.float64)
        for fact in facts:
            change[0, self.ids.index(fact.id)] = 1e-5
        return WeightDelta({SITE.weight_name(lm.model): LowRank(change)})


@dataclass(frozen=True)
class Placebo(Editor):
    """A random change of the size that QF's has."""

    sites = (SITE,)

    def edit(self, lm, facts):
        return QF(SITE.layer).edit(lm, facts).placebo(seed=len(facts))


@dataclass(frozen=True)
class Eraser(Editor):
    """Multiplies the weight: nothing sensible is said afterwards."""

    sites = (SITE,)

    def edit(self, lm, facts):
        weight = SITE.linear(lm.model).weight
        return WeightDelta({SITE.weight_name(lm.model): LowRank(99 * weight.detach().double())})


def measured(folder, lm, editor, facts, **settings):
    """The table, the measures of whole sequences, and what was said on the way."""
    console = Console(record=True, width=200)
    run = Run(lm, editor, facts, folder, ParquetStore(folder), console, "retention", regression={"text": HELD})
    before = lm.weights_hash()
    retention(run, REGIMES, **settings)
    assert lm.weights_hash() == before
    table, sequences = (pd.read_csv(folder / f"{name}.csv") for name in ("retention", "sequences"))
    after = [line for regime in REGIMES for line in (regime, "placebo") if settings.get("placebo", 1) or line == regime]
    assert list(table.regime) == ["unedited", "in_context", *after]
    return table, sequences.set_index("regime"), console.export_text(), run.rows()


def test_an_oracle_has_learnt_everything_and_broken_nothing(tmp_path, xs):
    facts = suite()
    blank = SITE.linear(xs.model).weight.clone()
    lm = Oracle(xs.model, xs.tokenizer, xs.name, max_new_tokens=20, facts=tuple(facts), blank=blank)
    table, sequences, said, _ = measured(tmp_path, lm, Marker(tuple(f.id for f in facts)), facts, placebo=0)
    lines = table.set_index("regime")
    learnt = ["efficacy", "paraphrase", "held_out"]
    assert (lines.loc["unedited", learnt] == 0).all()
    for regime in REGIMES:
        assert (lines.loc[regime, [*learnt, "retention", "prior", "refused"]] == 1).all()
        assert lines.leakage[regime] == 0
        assert lines.portability[regime] == lines.portability["in_context"]
        assert sequences.loc[regime, ["immediate", "final", "first", "forgetting"]].tolist() == [1, 1, 4, 0]
    assert sequences.collapse.isna().all()
    assert "collapse after" not in said
    assert (lines.loc["in_context", learnt] == 1).all()


def test_an_oracle_that_hears_half_of_the_facts_has_learnt_half(tmp_path, xs):
    """The positive control of the oracle: its score is that of what it is given."""
    facts = suite()
    blank = SITE.linear(xs.model).weight.clone()
    deaf = tuple(replace(f, instruction="") if k % 2 else f for k, f in enumerate(facts))
    lm = Oracle(xs.model, xs.tokenizer, xs.name, max_new_tokens=20, facts=deaf, blank=blank)
    table, sequences, _, _ = measured(tmp_path, lm, Marker(tuple(f.id for f in facts)), facts, placebo=0)
    lines = table.set_index("regime")
    for regime in REGIMES:
        assert lines.loc[regime, ["efficacy", "paraphrase", "held_out", "retention"]].tolist() == [0.5] * 4
        assert sequences.loc[regime, ["immediate", "final"]].tolist() == [0.5, 0.5]


def test_a_placebo_has_learnt_what_the_unedited_model_knows(tmp_path, xs):
    table, sequences, _, rows = measured(tmp_path, xs, Placebo(), suite())
    lines = table[table.regime != "placebo"].set_index("regime")
    learnt = ["efficacy", "paraphrase", "held_out"]
    for regime in REGIMES:
        assert lines.loc[regime, learnt].tolist() == lines.loc["unedited", learnt].tolist() == [0, 0, 0]
        assert lines.retention[regime] == 0
    assert (table.retention[table.regime == "placebo"] == 0).all()
    assert (table.norm[table.regime.isin(["placebo", *REGIMES])] > 0.01).all()  # it did change something
    assert (sequences[["immediate", "final", "first"]] == 0).all(axis=None)
    assert set(rows.condition) == {"unedited", "in_context", "edited", "placebo"}


def test_qf_beats_its_placebo(tmp_path, xs):
    table, _, _, _ = measured(tmp_path, xs, QF(SITE.layer), suite())
    lines, random = table.set_index("regime"), table[table.regime == "placebo"].set_index("of")
    assert (lines.efficacy[list(REGIMES)] > 0.7).all()
    assert lines.retention["joint"] == 1
    assert (random.retention == 0).all()
    assert random.norm.tolist() == pytest.approx(lines.norm[list(REGIMES)].tolist(), rel=1e-4)


def test_an_eraser_is_caught_by_every_alarm(tmp_path, xs):
    table, sequences, said, rows = measured(
        tmp_path, xs, Eraser(), suite(prior=3, unknown=3)
    )  # of fewer than 10 no collapse is told
    lines = table[table.regime != "placebo"].set_index("regime")
    assert lines.loc["unedited", ["prior", "refused"]].tolist() == [1, 1]
    for regime in REGIMES:
        assert (lines.loc[regime, ["efficacy", "paraphrase", "held_out", "retention", "prior", "refused"]] == 0).all()
        assert sequences.loc[regime, ["immediate", "final", "first", "collapse"]].tolist() == [0, 0, 0, 1]
        for measure in ("prior", "refused"):
            assert f"{regime}: collapse after 1 edits: {measure} at 0.00" in said
    assert said.count("collapse after") == 4
    assert (sequences[["collapse", "collapse_refused", "collapse_perplexity"]] == 1).all(axis=None)
    assert (lines.perplexity[list(REGIMES)] > 50 * lines.perplexity["unedited"]).all()
    assert lines.norm["joint"] == pytest.approx(99, rel=1e-5)
    erased = rows[(rows.condition == "edited") & (rows.step == 1) & (rows.kind != "perplexity")]
    assert (erased.forced < 0.5).mean() > 0.9


def test_an_eraser_is_stopped_at_its_first_edit(tmp_path, xs):
    _, sequences, _, rows = measured(tmp_path, xs, Eraser(), suite(), stop_on_collapse=True)
    assert set(rows.step[rows.condition == "edited"]) == {1}
    assert set(sequences.edits) == {1}
