import math

import pytest
import torch

from qfbench import LanguageModel, Probe
from qfbench.facts.world import world
from qfbench.lm import Reply, Score
from qfbench.probes import ask

ANSWER = "It was started by Qi."


class Scripted(LanguageModel):
    """Has one score and one reply ready for each query, and notes which of them it had to decode."""

    def __init__(self, **script: tuple[Score, Reply]) -> None:
        self.script, self.decoded = script, []

    def render(self, query, system="", answer=""):
        return query

    def score(self, dialogues):
        return [self.script[query][0] for query in dialogues]

    def replies(self, prompts):
        self.decoded += prompts
        return [self.script[query][1] for query in prompts]


def score(hits, nll=None):
    return Score(tuple(nll or [0.5] * len(hits)), tuple(map(bool, hits)))


@pytest.mark.parametrize(
    ("reply", "stopped", "generated"),
    [
        ("So it was Qi", True, True),
        ("So it was Qi", False, False),  # it was cut off: what follows could take the answer back
        ("So it was Qin", True, False),
        ("So it was Qi or Bo", True, False),
        ("So it was Qi or Bo", False, False),
    ],
)
def test_generated_wants_a_reply_that_ends_and_names_the_answer_and_nothing_rejected(reply, stopped, generated):
    lm = Scripted(who=(score([0, 1]), Reply(reply, stopped)))
    (row,) = ask(lm, [Probe("edit", "who", ANSWER, ("Qi",), ("Bo",))])
    assert (row["generated"], row["stopped"], row["reply"]) == (generated, stopped, reply)


@pytest.mark.parametrize(
    ("hits", "nll", "forced", "mean", "exact"),
    [
        ([1, 1, 1, 1], [0.5, 0.5, 1.0, 2.0], 1.0, 1.0, True),
        ([1, 1, 1, 0], [0.0, 0.0, 0.0, 6.0], 0.75, 1.5, False),  # all but the end of the turn
        ([0, 0, 0, 1], [3.0, 2.0, 1.0, 0.0], 0.25, 1.5, False),  # the end of the turn alone
        ([0, 0], [4.0, 2.0], 0.0, 3.0, False),
    ],
)
def test_forced_and_nll_are_means_over_all_tokens_the_end_of_the_turn_included(hits, nll, forced, mean, exact):
    lm = Scripted(who=(score(hits, nll), Reply("Bo", True)))
    (row,) = ask(lm, [Probe("edit", "who", ANSWER)])
    assert (row["forced"], row["nll"], row["exact"]) == (forced, mean, exact)


def test_only_a_reply_that_is_exact_to_its_end_goes_undecoded_and_all_stay_in_order():
    hits = {"first": [1, 0, 0], "all": [1, 1, 1], "but_last": [1, 1, 0], "none": [0, 0, 0]}
    lm = Scripted(**{name: (score(hit), Reply(f"{name}, decoded", True)) for name, hit in hits.items()})
    rows = ask(lm, [Probe("edit", name, ANSWER) for name in hits])
    assert lm.decoded == ["first", "but_last", "none"]
    assert [r["reply"] for r in rows] == ["first, decoded", ANSWER, "but_last, decoded", "none, decoded"]
    assert [r["generated"] for r in rows] == [False, True, False, False]
    assert [r["query"] for r in rows] == list(hits)


@pytest.mark.parametrize(("reply", "generated"), [("Anything else.", True), ("It was Qi.", False)])
def test_a_probe_without_reference_is_decoded_and_has_no_teacher_forced_score(reply, generated):
    lm = Scripted(who=(score([1, 1]), Reply(reply, True)))
    (row,) = ask(lm, [Probe("locality", "who", "", reject=("Qi",))])
    assert math.isnan(row["forced"])
    assert math.isnan(row["nll"])
    assert not row["exact"]
    assert (row["reply"], row["generated"]) == (reply, generated)


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs", device="cpu")


@pytest.fixture(scope="module")
def asked(xs):
    """Every probe of two facts, alone and told, of which the model gets some right and some wrong."""
    facts = world(2)
    probes = [p for f in facts for p in (f.edit, f.told, *f.probes)]
    return probes, ask(xs, probes)


def test_the_shortcut_gives_what_decoding_gives(xs, asked):
    probes, rows = asked
    replies = xs.replies([xs.render(p.query, p.system) for p in probes])
    assert [Reply(r["reply"], r["stopped"]) for r in rows] == replies
    assert [r["exact"] for r in rows] == [r["reply"] == p.expected for p, r in zip(probes, rows, strict=True)]
    assert {r["exact"] for r in rows} == {True, False}  # both ways were gone
    assert {r["generated"] for r in rows if r["kind"] == "told"} == {True}  # the instruction reached the model


def test_forced_and_nll_are_those_of_one_plain_pass(xs, asked):
    for probe, row in zip(*asked, strict=True):
        dialogue = xs.render(probe.query, probe.system, probe.expected)
        logits = xs.model(input_ids=torch.tensor([dialogue.ids])).logits[0].double()
        wanted = torch.tensor(dialogue.ids[dialogue.answer :])[: len(dialogue.reply)]
        logits = logits[dialogue.answer - 1 :][: len(wanted)]
        assert wanted[-1] == xs.tokenizer.eos_token_id
        assert row["forced"] == pytest.approx((logits.argmax(-1) == wanted).double().mean().item())
        assert row["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item(), abs=1e-4)
