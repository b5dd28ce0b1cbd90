"""LocFT-BF: epochs of mini-batches over all facts so far."""

import pytest
import torch
from test_finetune import CENTRE, START, adam_by_hand, bowl
from test_qf2 import FOUNDER, close, dense

from qfbench import LanguageModel, UserError
from qfbench.editors import FineTune, LocFT
from qfbench.editors import finetune as plain
from qfbench.editors.finetune import descend
from qfbench.editors.regimes import joint, sequential
from qfbench.facts.world import world

HOW = {"layer": 1, "lr": 0.01, "epochs": 6, "batch": 2, "stop_at": 0.0}


def rows(at):
    for row in range(2):
        yield 0.5 * (at - CENTRE)[row].pow(2).sum()


def test_by_term_there_is_a_step_after_each_term_and_the_last_pass_takes_none():
    turn = iter(range(1000))

    def own(at):  # the gradient of the row whose turn it is
        row = next(turn) % 2
        return torch.where(torch.arange(2)[:, None] == row, at - CENTRE, 0.0)

    path = adam_by_hand(START, own, 0.1, 14)
    at, taken, loss = descend(rows, START, 0.1, 7, by_term=True)
    assert close(at, path[14], 1e-6)
    assert taken == 7
    assert loss == pytest.approx(next(bowl(path[14])).item())
    assert not close(descend(rows, START, 0.1, 7)[0], at, 0.01)


def test_by_term_it_ends_after_the_first_pass_whose_loss_is_low_enough():
    passes, seen = [], []

    def watched(at):
        seen.append(0.0)
        for term in rows(at):
            seen[-1] += term.item()
            yield term

    descend(watched, START, 0.1, 9, by_term=True)
    passes, stop_at = seen[:-1], (seen[3] + seen[4]) / 2
    assert passes == sorted(passes, reverse=True)
    at, taken, loss = descend(rows, START, 0.1, 9, stop_at, by_term=True)
    assert (taken, loss) == (5, pytest.approx(passes[4]))
    assert torch.equal(at, descend(rows, START, 0.1, 5, by_term=True)[0])


def batches(lm, editor, facts, monkeypatch):
    """The queries of each mini-batch that was trained on, by the lengths of dialogues' ids."""
    seen, real = [], plain.summed_nll
    monkeypatch.setattr(
        plain,
        "summed_nll",
        lambda lm, drawn, weights: (seen.append([d.ids for d in drawn]), real(lm, drawn, weights))[1],
    )
    editor.edit(lm, facts)
    return seen


def test_each_epoch_goes_once_through_all_facts_in_a_new_order(tiny, facts, monkeypatch):
    lm = tiny("qwen2")
    seen = batches(lm, LocFT(**HOW), facts, monkeypatch)
    assert [len(batch) for batch in seen] == [2, 1] * 7  # the last epoch says where it ended
    whole = sorted(lm.render(fact.query, "", fact.answer).ids for fact in facts)
    epochs = [seen[i] + seen[i + 1] for i in range(0, len(seen), 2)]
    assert all(sorted(epoch) == whole for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2
    monkeypatch.undo()
    assert batches(lm, LocFT(**HOW), facts, monkeypatch) == seen


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_one_batch_of_all_facts_is_plain_fine_tuning(tiny, facts, arch):
    lm = tiny(arch, torch.float64)
    for taught in (facts, [FOUNDER]):
        own = LocFT(**(HOW | {"batch": 3})).edit(lm, taught)
        assert close(dense(own), dense(FineTune(1, 0.01, 6, 0.0).edit(lm, taught)), 1e-6)
        assert own.notes["steps"] == 6
    assert not close(dense(LocFT(**HOW).edit(lm, facts)), dense(FineTune(1, 0.01, 6, 0.0).edit(lm, facts)), 0.1)


def test_one_after_another_it_is_plain_fine_tuning(tiny, facts):
    lm = tiny("qwen2", torch.float64)
    both = [list(sequential(editor, lm, facts)) for editor in (LocFT(**HOW), FineTune(1, 0.01, 6, 0.0))]
    assert all(close(dense(a), dense(b), 1e-6) for (_, a), (_, b) in zip(*both, strict=True))


@pytest.mark.parametrize("regime", [joint, sequential])
def test_going_on_gives_the_same_bit_for_bit(tiny, facts, regime):
    lm, editor = tiny("llama"), LocFT(**HOW)
    before = lm.weights_hash()
    whole = [total for _, total in regime(editor, lm, facts)]
    rest = [total for _, total in regime(editor, lm, facts, 1, whole[0])]
    assert [torch.equal(dense(a), dense(b)) for a, b in zip(whole[1:], rest, strict=True)] == [True, True]
    if regime is joint:
        assert torch.equal(dense(whole[-1]), dense(editor.edit(lm, facts)))
        assert not close(dense(whole[-1]), dense(LocFT(**HOW, seed=1).edit(lm, facts)), 0.01)
    assert lm.weights_hash() == before
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_facts_taught_together_are_all_said():
    lm, facts = LanguageModel.load("world-xs", device="cpu"), world(5, seed=5)
    delta = LocFT(2, 0.02, 60, 2).edit(lm, facts)
    assert delta.notes["steps"] < 60
    with delta.applied_to(lm):
        assert [lm.reply(fact.query) for fact in facts] == [fact.answer for fact in facts]


def test_a_mini_batch_that_the_model_is_not_to_run_at_once_is_refused(tiny, facts):
    editor = LocFT(**(HOW | {"batch": 4}))
    for way in (editor.check, lambda lm: editor.edit(lm, facts)):
        with pytest.raises(UserError, match=r"editor\.batch=4: must be at most model\.batch_size=3"):
            way(tiny("qwen2"))
    with pytest.raises(UserError, match=r"editor\.epochs=0: must be above 0"):
        LocFT(1, 0.01, 0, 2)
