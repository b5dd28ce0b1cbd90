"""Fine-tuning with replay of what the unedited model says to other questions."""

import pytest

from qfbench import UserError
from qfbench.editors import FineTune, Replay
from qfbench.editors.regimes import sequential
from qfbench.editors.stays import staying

HOW = {"layer": 1, "lr": 0.03, "steps": 30, "stop_at": 0.05}


def nats(lm, dialogues):
    return sum(sum(score.nll) for score in lm.score(dialogues))


def test_what_is_replayed_is_unlearnt_less_and_the_facts_are_learnt_all_the_same(tiny, facts):
    lm = tiny("qwen2")
    *taught, kept = facts
    said = staying(lm, [kept], taught)
    answers = [lm.render(fact.query, "", fact.answer) for fact in taught]
    before, costs = nats(lm, answers), {}
    for editor in (FineTune(**HOW), Replay(**HOW, keep=[kept], replay=8)):
        *_, (_, total) = sequential(editor, lm, taught)
        with total.applied_to(lm):
            costs[type(editor)] = nats(lm, said)
            assert nats(lm, answers[-1:]) < 0.5 * before / len(answers)
    assert costs[Replay] < 0.7 * costs[FineTune]


def test_the_loss_that_says_when_to_stop_is_that_of_the_answers_alone(tiny, facts):
    lm = tiny("llama")
    *taught, kept = facts
    delta = Replay(**(HOW | {"steps": 5}), keep=[kept], replay=4).edit(lm, taught)
    answers = [lm.render(fact.query, "", fact.answer) for fact in taught]
    with delta.applied_to(lm):
        wanted = nats(lm, answers) / sum(len(dialogue.reply) for dialogue in answers)
    assert delta.notes["loss"] == pytest.approx(wanted, rel=1e-3)


def test_a_run_that_goes_on_is_as_an_unbroken_one(tiny, facts):
    lm = tiny("qwen2")
    *taught, kept = facts
    editor = Replay(**(HOW | {"steps": 5}), keep=[kept], replay=4)
    whole = [total for _, total in sequential(editor, lm, taught)]
    *_, (_, rest) = sequential(editor, lm, taught, 1, whole[0])
    for name, change in whole[-1].changes.items():
        assert (rest.changes[name].dense() - change.dense()).norm() == 0


def test_with_nothing_to_replay_it_is_refused(tiny, facts):
    with pytest.raises(UserError, match=r"editor\.keep: asks nothing that the facts do not ask"):
        Replay(**HOW, keep=facts[:1]).edit(tiny("qwen2"), facts)
