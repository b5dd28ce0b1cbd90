from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from test_contract import composed
from test_qf2 import FOUNDER, D, F, close, dense, problem

from qfbench import LanguageModel, UserError
from qfbench.editors import QF2
from qfbench.editors.qf2 import hebbian, stopped
from qfbench.editors.regimes import joint, sequential
from qfbench.facts.probes import ask
from qfbench.facts.world import world
from qfbench.models.firing import with_firing_layers

BETA = 10.0


def given(taught, seed=0):
    """A problem of `taught` tokens, a matrix, and what its neurons get at the taught inputs."""
    fired, inputs, weights = problem(taught, seed)
    weight = torch.randn(F, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 50))
    return fired, inputs, weights, weight, BETA * inputs @ weight.T


def fires(inputs, weight, change):
    return torch.sigmoid(BETA * inputs @ (weight + change.dense()).T)


# The rule, on random matrices


@pytest.mark.parametrize("taught", [1, 3, D - 2])
@pytest.mark.parametrize("stop", [0.0, 0.25, 0.49])
def test_with_independent_inputs_every_neuron_comes_to_fire_as_told(taught, stop):
    fired, inputs, weights, weight, drive = given(taught, seed=taught)
    change, short = stopped(fired, inputs, weights, 0.05, drive, BETA, stop, 10**5)
    side = (fired - 0.5).sign()
    assert short == 0
    assert (side * (fires(inputs, weight, change) - 0.5) >= stop).all()
    assert (side * (drive.sigmoid() - 0.5) < stop).any()  # it was not so before


def test_one_round_is_the_papers_rule_for_what_fires_otherwise_than_told():
    fired, inputs, weights, _, drive = given(4)
    change, _ = stopped(fired, inputs, weights, 0.05, drive, BETA, 0.3, 1)
    by_hand = torch.zeros(F, D, dtype=torch.float64)
    for t in range(4):
        for neuron in range(F):
            told, alone = fired[t, neuron] - 0.5, torch.sigmoid(drive[t, neuron]) - 0.5
            if told.sign() * alone < 0.3:
                by_hand[neuron] += 0.05 * weights[t] * told * inputs[t]
    assert close(change.dense(), by_hand)
    assert not close(change.dense(), hebbian(fired, inputs, weights, 0.05).dense(), 0.1)


def test_where_no_neuron_fires_as_told_one_round_is_the_papers_rule():
    fired, inputs, weights, _, _ = given(4)
    drive = -10 * (fired - 0.5)
    change, _ = stopped(fired, inputs, weights, 0.05, drive, BETA, 0.0, 1)
    assert close(change.dense(), hebbian(fired, inputs, weights, 0.05).dense())


def test_what_fires_as_told_everywhere_stays_as_it_is():
    fired, inputs, weights, _, drive = given(3)
    done = ((fired - 0.5).sign() * (drive.sigmoid() - 0.5) >= 0.25).all(0)
    assert 0 < done.sum() < F
    change, _ = stopped(fired, inputs, weights, 0.05, drive, BETA, 0.25, 10**5)
    assert (change.dense().norm(dim=1) == 0).tolist() == done.tolist()
    again, short = stopped(fired, inputs, weights, 0.05, drive + BETA * inputs @ change.dense().T, BETA, 0.25, 1000)
    assert short == 0
    assert again.norm() == 0  # taught again, it changes nothing: the paper's rule adds as much as before


def test_nothing_moves_at_inputs_that_are_orthogonal_to_all_that_is_taught():
    fired, inputs, weights, _, drive = given(3)
    change, _ = stopped(fired, inputs, weights, 0.05, drive, BETA, 0.4, 100)
    others = torch.linalg.qr(inputs.T, mode="complete").Q[:, 3:].T
    assert (others @ change.dense().T).abs().max() < 1e-12 * change.norm()
    assert change.rank == 3


def test_a_neuron_at_one_half_is_neither_pushed_nor_waited_for():
    fired, inputs, weights, _, drive = given(3)
    fired[:, 5] = 0.5
    change, short = stopped(fired, inputs, weights, 0.05, drive, BETA, 0.4, 10**5)
    assert change.dense()[5].norm() == 0
    assert short == 0


def test_what_cannot_be_met_ends_after_the_rounds_and_is_counted():
    """One input, twice, of which one token wants the first neuron on and the other off."""
    inputs = torch.ones(2, D, dtype=torch.float64)
    fired = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    weights, drive = torch.ones(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    change, short = stopped(fired, inputs, weights, 0.01, drive, BETA, 0.4, 50)
    assert short == 0.5
    assert change.dense()[0].norm() == 0
    assert change.dense()[1].norm() > 0


@pytest.mark.parametrize("where", [0, 1])
def test_a_value_that_is_not_finite_raises(where):
    fired, inputs, weights, _, drive = given(3)
    (fired, inputs)[where][1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        stopped(fired, inputs, weights, 0.05, drive, BETA, 0.4, 10)


# The editor


@pytest.fixture
def lm(tiny):
    stock = tiny("qwen2", torch.float64)
    return replace(stock, model=with_firing_layers(stock.model, [1], 1.5).requires_grad_(False))


def test_without_a_stop_the_rule_is_the_papers_to_the_bit(lm, facts):
    paper = dense(QF2(1, lr=0.2).edit(lm, facts))
    assert torch.equal(dense(QF2(1, lr=0.2, stop=None, rounds=7).edit(lm, facts)), paper)
    assert not close(dense(QF2(1, lr=0.2, stop=0.1).edit(lm, facts)), paper, 0.1)


def test_a_fact_that_is_taught_already_is_not_taught_again(lm):
    editor = QF2(1, lr=0.2, stop=0.05, rounds=10**4, named=1.0)
    delta = editor.edit(lm, [FOUNDER])
    assert delta.notes["residual"] == 0
    with delta.applied_to(lm):
        again, paper = editor.edit(lm, [FOUNDER]), QF2(1, lr=0.2).edit(lm, [FOUNDER])
    # what is told fires otherwise by now: those neurons alone are pushed
    assert dense(again).norm() < 0.5 * dense(paper).norm()


def test_facts_taught_joint_share_the_rounds(lm, facts):
    editor = QF2(1, lr=0.2, stop=0.05, rounds=200)
    *_, (_, last) = joint(editor, lm, facts)
    assert close(dense(last), dense(editor.edit(lm, facts)))
    assert not close(dense(last), sum(dense(editor.edit(lm, [fact])) for fact in facts), 1e-3)
    with editor.edit(lm, facts[:1]).applied_to(lm):
        second = dense(editor.edit(lm, facts[1:2]))
    (_, first), (_, both), *_ = sequential(editor, lm, facts)
    assert close(dense(both) - dense(first), second)


@pytest.mark.parametrize(("name", "value"), [("stop", 0.5), ("stop", -0.1), ("stop", float("nan")), ("rounds", 0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"editor.{name}={value}"):
        QF2(1, lr=0.1, **{name: value})


def test_on_a_shipped_model_a_fact_is_taught_and_nothing_else_is_lost_unlike_by_the_papers_rule():
    lm = LanguageModel.load("world-s-qf2", device="cpu")
    facts = world(n=8, seed=2, paraphrases=1, prior=4, unknown=0)

    def passed(name):
        editor = instantiate(composed("model=world-s-qf2", f"editor={name}").editor)
        found = {"edit": [], "prior": []}
        for fact in facts:
            with editor.edit(lm, [fact]).applied_to(lm):
                for row in ask(lm, [probe for probe in (fact.edit, *fact.probes) if probe.kind in found]):
                    found[row["kind"]].append(row["generated"])
        return {kind: sum(rows) / len(rows) for kind, rows in found.items()}

    stop, paper = passed("qf2_stop"), passed("qf2_answer_only")
    assert stop["edit"] >= 7 / 8 > paper["edit"]
    assert stop["prior"] >= 0.95 > paper["prior"]
