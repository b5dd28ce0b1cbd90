from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from notebook import Note, prepared
from rich.console import Console
from test_contract import composed

from qfbench import LanguageModel, UserError
from qfbench.commands.execution import execute
from qfbench.editors import QF, QF2
from qfbench.facts.world import world
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.firing import with_firing_layers
from qfbench.runs.store import ParquetStore
from qfbench.tasks.learning_rate import learning_rate
from qfbench.tasks.run import Run


@dataclass(frozen=True)
class Loud(Note):
    """Writes each fact as loud as it is told to: what is too loud writes all facts at once."""

    lr: float = 0.0
    named: float = 1.0

    def edit(self, lm, facts):
        loudness = self.lr * self.named
        delta = super().edit(lm, lm.facts if loudness > 2 else facts).changes["weight"].dense()
        return WeightDelta({"weight": LowRank(torch.eye(1), loudness * delta)})


SAYS = {"Where is Town0?": ("North.", "North.", "North.", "South.")}  # wrong once it knows all three facts
RATES, SCHEMES = [3.0, 0.2, 1.0], {"weak": {}, "strong": {"named": 10.0}}


def learnt(folder, editor=None, reference=None, console=None, rates=RATES, schemes=SCHEMES, **setting):
    run = replace(
        prepared(folder, editor=editor or Loud(), console=console, says=SAYS, **setting), task="learning_rate"
    )
    learning_rate(run, rates, schemes, reference)
    return run, run.rows()


def test_each_scheme_is_measured_at_each_rate_and_the_reference_once(tmp_path):
    _, rows = learnt(tmp_path, reference=Note())
    table = pd.read_csv(tmp_path / "learning_rate.csv")
    measured = table.set_index(["scheme", "lr"])[["efficacy", "prior", "balance"]]
    own = measured[measured.index.get_level_values("scheme") != "Note"]
    assert {key: tuple(values) for key, values in own.T.items()} == {
        ("weak", 0.2): (0.0, 1.0, 0.0),
        ("weak", 1.0): (1.0, 1.0, 1.0),
        ("weak", 3.0): (1.0, pytest.approx(2 / 3), pytest.approx(0.8)),
        ("strong", 0.2): (1.0, 1.0, 1.0),
        ("strong", 1.0): (1.0, pytest.approx(2 / 3), pytest.approx(0.8)),
        ("strong", 3.0): (1.0, pytest.approx(2 / 3), pytest.approx(0.8)),
    }
    (reference,) = table[table.scheme == "Note"].itertuples()
    assert np.isnan(reference.lr)
    assert (reference.efficacy, reference.prior) == (1.0, 1.0)
    edited = rows[rows.condition == "edited"]
    assert set(edited.regime) == {"single"}
    asked = edited.fillna({"lr": -1.0}).groupby(["scheme", "lr"]).fact_id.nunique().to_dict()
    assert asked == {("Note", -1.0): 3} | {(scheme, lr): 3 for scheme in SCHEMES for lr in RATES}
    assert edited.groupby("scheme").editor.agg(set).to_dict() == {
        "weak": {"Loud"},
        "strong": {"Loud"},
        "Note": {"Note"},
    }
    assert (rows.condition == "unedited").sum() == 3 * 4  # asked once, not at every rate


def test_the_best_rate_of_each_scheme_is_printed_and_a_figure_drawn(tmp_path):
    console = Console(record=True, width=200)
    learnt(tmp_path, console=console)
    said = console.export_text()
    assert "3 facts, each alone: notebook" in said
    assert "weak: best balance at lr 1 (efficacy 1.00, prior 1.00)" in said
    assert "strong: best balance at lr 0.2 (efficacy 1.00, prior 1.00)" in said
    assert (tmp_path / "figures" / "learning_rates.png").stat().st_size > 0


def test_the_runs_own_settings_hold_where_a_scheme_says_nothing(tmp_path):
    run, rows = learnt(tmp_path, editor=Loud(layer=2, lr=9.0, named=10.0), rates=[0.2], schemes={"own": {}})
    assert run.editor == Loud(layer=2, lr=9.0, named=10.0)
    edited = rows[rows.condition == "edited"]
    assert set(zip(edited.layer, edited.lr, strict=True)) == {(2, 0.2)}
    assert edited.relative_norm.unique() == pytest.approx([0.2 * 10 / 2])


@pytest.mark.parametrize("missing", [{"rates": []}, {"schemes": {}}])
def test_without_rates_or_schemes_there_is_nothing_to_learn(tmp_path, missing):
    with pytest.raises(UserError, match="at least one of rates and one of schemes"):
        learnt(tmp_path, **missing)


def test_an_editor_without_a_rate_is_refused_and_told_which_have_one(tmp_path):
    with pytest.raises(UserError, match="Note has no learning rate; use editor=qf2 or finetune"):
        learnt(tmp_path, editor=Note())


@pytest.mark.parametrize("reference", [None, Note()], ids=["alone", "beside_a_reference"])
def test_an_editor_that_cannot_run_is_a_row_at_each_rate_and_no_crash(tmp_path, reference):
    """As QF2 on a stock model: what is left is the reference."""
    _, rows = learnt(tmp_path, editor=Loud(broken="0"), reference=reference)
    unsupported = rows[rows.condition == "unsupported"]
    assert len(unsupported) == len(RATES) * len(SCHEMES)
    assert set(unsupported.reply) == {"no room for fact 0"}
    assert set(rows.scheme[rows.condition == "edited"]) == ({"Note"} if reference else set())


def test_facts_without_prior_knowledge_can_be_studied(tmp_path):
    run = replace(prepared(tmp_path, editor=Loud()), task="learning_rate")
    run.facts[:] = [replace(f, probes=()) for f in run.facts]
    learning_rate(run, RATES, SCHEMES)
    table = pd.read_csv(tmp_path / "learning_rate.csv").set_index(["scheme", "lr"])
    assert table.efficacy["weak", 0.2] == 0
    assert table.efficacy["weak", 1.0] == 1


# QF2 on a block that really fires


@pytest.fixture(scope="module")
def firing():
    """world-xs with a firing block at layer 2, whose down-projection is fitted so that it says what the stock layer says."""
    lm, seen = LanguageModel.load("world-xs", device="cpu"), {"in": [], "out": []}
    block = lm.model.model.layers[2]
    handles = [
        block.post_attention_layernorm.register_forward_hook(lambda _m, _a, out: seen["in"].append(out[0])),
        block.register_forward_hook(lambda _m, _a, out: seen["out"].append(out[0])),
    ]
    for fact in world(12, seed=5):
        for probe in (fact.edit, *fact.probes):
            for told in ("", fact.instruction):
                dialogue = lm.render(probe.query, told, probe.expected)
                with torch.no_grad():
                    lm.model(input_ids=torch.tensor([dialogue.ids]))
    for handle in handles:
        handle.remove()
    x, y = (torch.cat(parts).double() for parts in seen.values())
    lm = replace(lm, model=with_firing_layers(lm.model, [2]))
    mlp = lm.model.model.layers[2].mlp
    fired = torch.sigmoid(10 * x @ mlp.up_proj.weight.double().T)
    gram = fired.T @ fired + 1e-3 * torch.eye(fired.shape[1], dtype=torch.float64)
    mlp.down_proj.weight = torch.nn.Parameter(torch.linalg.solve(gram, fired.T @ y).T.float(), requires_grad=False)
    return lm


def test_qf2_is_studied_on_a_firing_block(firing, tmp_path):
    run = Run(firing, QF2(2, lr=1.0), world(2), tmp_path, ParquetStore(tmp_path), Console(quiet=True), "learning_rate")
    before = firing.weights_hash()
    schemes = {
        "answer_only": {"named": 1.0, "rest": 1.0, "closer": 0.0},
        "name_only": {"named": 1.0, "rest": 0.0, "closer": 0.0},
    }
    learning_rate(run, [0.05, 0.1], schemes, QF(2))
    assert firing.weights_hash() == before
    rows = run.rows()
    assert (rows.condition == "unsupported").sum() == 0
    edited = rows[(rows.condition == "edited") & (rows.kind == "edit") & rows.fresh]
    assert set(zip(edited.scheme, edited.editor, strict=True)) == {("QF", "QF"), *((name, "QF2") for name in schemes)}
    by = edited.set_index(["scheme", "lr", "fact_id"])
    for fact in run.facts:
        for scheme in schemes:  # only lr times significance matters
            twice = by.relative_norm[scheme, 0.1, fact.id] / by.relative_norm[scheme, 0.05, fact.id]
            assert twice == pytest.approx(2)
        assert by.solve_tokens["name_only", 0.1, fact.id] < by.solve_tokens["answer_only", 0.1, fact.id]
    table = pd.read_csv(tmp_path / "learning_rate.csv")
    assert table[table.scheme == "QF"].efficacy.item() == 1
    prior = table.set_index(["scheme", "lr"]).prior
    assert prior["answer_only", 0.05] > prior["answer_only", 0.1]
    moved = edited.groupby(["scheme", "lr"]).nll.mean()
    assert (
        moved["answer_only", 0.1]
        < moved["answer_only", 0.05]
        < rows.nll[(rows.condition == "unedited") & (rows.kind == "edit")].mean()
    )


def test_the_experiment_runs_on_a_folder_with_a_firing_block(firing, tmp_path):
    firing.model.save_pretrained(tmp_path / "model")
    firing.tokenizer.save_pretrained(tmp_path / "model")
    cfg = composed(
        "experiment=qf2_learning_rate",
        "model=world-xs",
        f"model.path={tmp_path / 'model'}",
        "facts.n=1",
        "regression=none",
        "task.learning_rate.rates=[0.1]",
    )
    del cfg.hydra
    done = execute(cfg, tmp_path / "run", Console(quiet=True))
    table = pd.read_csv(tmp_path / "run" / "learning_rate.csv")
    assert list(table.scheme) == ["all_tokens", "answer_only", "name_x10", "name_only", "QF"]
    assert list(table.lr[:4]) == [0.1] * 4
    norms = table.norm[:4]
    assert norms.is_unique
    assert norms[2] > norms[1] > norms[3]  # the name counts ten times, once, and alone
    assert set(done.rows("learning_rate").layer.dropna()) == {2}


# Fine-tuning, whose schemes are numbers of steps


@pytest.mark.slow
def test_the_experiment_of_fine_tuning_has_schemes_of_its_own(tmp_path):
    cfg = composed(
        "experiment=finetune_learning_rate",
        "model=world-xs",
        "facts.n=2",
        "task.learning_rate.rates=[0.002,0.02]",
    )
    del cfg.hydra
    done = execute(cfg, tmp_path / "run", Console(quiet=True))
    table = pd.read_csv(tmp_path / "run" / "learning_rate.csv").set_index(["scheme", "lr"])
    schemes = list(cfg.task.learning_rate.schemes)
    assert list(dict.fromkeys(table.index.get_level_values("scheme"))) == [*schemes, "QF"]
    assert table.efficacy[schemes[0], 0.002] == 0
    assert table.efficacy[schemes[-1], 0.02] == 1
    rows = done.rows("learning_rate")
    edited = rows[(rows.condition == "edited") & (rows.kind == "edit") & (rows.scheme != "QF")]
    most = {scheme: settings.steps for scheme, settings in cfg.task.learning_rate.schemes.items()}
    assert (edited.solve_steps <= edited.scheme.map(most)).all()
    assert edited.groupby("scheme").solve_steps.max().nunique() > 1
    assert (edited.solve_loss < 0.01).equals(edited.solve_steps < edited.scheme.map(most))
