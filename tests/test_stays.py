"""What is to stay: decoys, tokens that are not taught, and what breaks counts for more."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qfbench import LanguageModel, UserError
from qfbench.editors import QFStream
from qfbench.editors.regimes import sequential
from qfbench.editors.stays import (
    HEAVIEST,
    Passage,
    decoys,
    pieces,
    replied,
    staying,
    unchanged,
    up_to_the_name,
    wordings,
)
from qfbench.facts.base import Fact
from qfbench.facts.world import world
from qfbench.models import activations
from qfbench.models.activations import climb
from qfbench.models.sites import Site

SITES = [Site(1, "down_proj"), Site(2, "down_proj")]


@pytest.fixture
def named(facts):
    """Facts whose queries name their subjects."""
    return [
        replace(fact, subject=name) for fact, name in zip(facts, ("Oxinnovate", "Zenvora", "Kelpworks"), strict=True)
    ]


def close(a, b, tolerance=1e-8):
    return (a - b).norm() <= tolerance * b.norm()


def dense(delta):
    return [change.dense() for change in delta.changes.values()]


@pytest.mark.parametrize("whole", [False, True])
def test_a_climb_rates_what_the_changed_model_would_say(tiny, facts, monkeypatch, whole):
    lm = tiny("qwen2", torch.float64)
    if whole:
        monkeypatch.setattr(activations, "divides", lambda *_: False)
    dialogues = [lm.render(fact.query, "", fact.answer) for fact in facts]
    at = [range(dialogue.answer - 1, dialogue.closer) for dialogue in dialogues]
    delta = QFStream(1, (2,), penalty=1.0).edit(lm, facts[:1])
    changes, entering = dense(delta), {}
    for _ in range(2):  # the second time over states that were kept
        nats = climb(lm, dialogues, SITES, at, lambda i, *_: changes[i], entering, rate=True)
        with delta.applied_to(lm):
            wanted = [nat for score in lm.score(dialogues) for nat in score.nll]
        assert nats.tolist() == pytest.approx(wanted, rel=1e-5)
    assert len(entering) == (0 if whole else len(facts))


def test_a_subject_is_cut_where_its_tokens_are(tiny, named):
    lm = tiny("qwen2")
    for fact in named:
        found = pieces(lm, fact)
        assert "".join(found) == fact.subject
        assert len(found) > 1
    assert pieces(lm, replace(named[0], subject="")) == []
    assert pieces(lm, replace(named[0], subject="Nobody")) == []


def test_decoys_ask_the_same_of_subjects_named_nearly_so_and_are_the_same_again(tiny, named):
    lm = tiny("qwen2")
    fact, others = named[0], [pieces(lm, other) for other in named[1:]]
    asked = decoys(lm, fact, others, 20)
    assert asked == decoys(lm, fact, others, 20)
    assert decoys(lm, fact, others, 5) == asked[:5]
    own = pieces(lm, fact)
    for query in asked:
        assert query.startswith("Who started ")
        name = query.removeprefix("Who started ").removesuffix("?")
        assert name != fact.subject
        assert name.startswith(own[0]) != name.endswith(own[-1])
    assert decoys(lm, replace(fact, subject=""), others, 5) == decoys(lm, fact, [], 5) == []


def test_a_decoy_that_is_asked_of_a_fact_is_not_kept(tiny, named):
    lm = tiny("qwen2")
    editor = QFStream(1, keep=named[1:], decoys=4)
    (query, *_) = decoys(lm, named[0], [pieces(lm, fact) for fact in named[1:]], 4)
    asked = (*named[0].probes, replace(named[0].edit, kind="unknown", query=query))
    there = [
        {passage.dialogue.prompt for passage in next(editor._told(lm, [fact])).stays}
        for fact in (named[0], replace(named[0], probes=asked))
    ]
    assert there[0] - there[1] == {lm.render(query).prompt}


def test_all_of_an_answer_is_taught_or_stays(tiny, facts):
    lm = tiny("qwen2")
    nats = lm.score([lm.render(facts[0].query, "", facts[0].answer)])[0].nll
    editor = QFStream(1, surprise=sorted(nats)[len(nats) // 2], untaught=True)
    (taught,) = editor._told(lm, facts[:1])
    (own,), (rest,) = taught.own, taught.stays
    dialogue = own.dialogue
    assert rest.dialogue == dialogue
    assert sorted([*own.at, *rest.at]) == list(range(dialogue.answer - 1, dialogue.closer))
    assert min(map(len, (own.at, rest.at))) > 0


def test_with_decoys_the_order_of_facts_does_not_matter_and_solving_anew_gives_the_same(tiny, named):
    lm = tiny("llama", torch.float64)
    *facts, kept = named
    editor = QFStream(1, keep=[kept], penalty=1.0, untaught=True, decoys=3)
    forth, back = editor.edit(lm, facts), editor.edit(lm, facts[::-1])
    assert close(*dense(forth), *dense(back))
    layers = replace(editor, layer=2, more_layers=(1,))
    streamed, anew = dense(layers.edit(lm, facts)), dense(replace(layers, refresh=2).edit(lm, facts))
    assert close(streamed[0], anew[0])  # keys of the lowest layer are what they were
    assert not close(streamed[1], anew[1])


def test_what_stays_because_of_a_fact_is_changed_less(tiny, named):
    lm = tiny("qwen2", torch.float64)
    *facts, kept = named

    def moved(decoy):
        editor = QFStream(1, keep=[kept], penalty=1.0, floor=0.01, untaught=True, decoys=decoy)
        asked = [query for fact in facts for query in decoys(lm, fact, [pieces(lm, kept)], 6)]
        dialogues = unchanged(lm, list(replied(lm, asked).values()), False)
        at = [passage.at for passage in dialogues]
        keys = activations.record(lm, [passage.dialogue for passage in dialogues], SITES[0], at)
        (change,) = dense(editor.edit(lm, facts))
        return (torch.cat([one.key for one in keys]) @ change.T).norm()

    assert moved(6) < 0.7 * moved(0)


def test_weights_grow_with_what_broke_and_not_without_end(tiny, facts):
    passage = Passage(tiny("qwen2").render(facts[0].query), range(4), torch.ones(4), torch.tensor([0.0, 0.5, 0.0, 2.0]))
    passage.broke(torch.tensor([0.5, 0.5, 9.0, 1.0]), 4.0)
    assert passage.times.tolist() == [2.0, 1.0, 4.0, 1.0]
    for _ in range(9):
        passage.broke(torch.tensor([0.5, 0.5, 9.0, 1.0]), 4.0)
    assert passage.times.tolist() == [HEAVIEST, 1.0, HEAVIEST, 1.0]


def test_what_breaks_cannot_weigh_less():
    with pytest.raises(UserError, match=r"editor.boost=0.5: must be 1 or more"):
        QFStream(1, boost=0.5)


def test_what_stands_before_an_answer_cannot_break(tiny, facts):
    (taught,) = QFStream(1, opener=1.0, query=1.0, boost=4.0)._told(tiny("qwen2"), facts[:1])
    (own,) = taught.own
    own.broke(torch.full((len(own.at),), 9.0), 4.0)
    wanted = [4.0 if at >= own.dialogue.answer - 1 else 1.0 for at in own.at]
    assert own.times.tolist() == wanted
    assert set(wanted) == {1.0, 4.0}


@pytest.mark.parametrize(
    ("known", "subject", "reply", "taught"),
    [
        (("Qi", "Mr. Qi"), "", "It was Mr. Qi, of course, and Qi alone.", "It was Mr. Qi"),
        (("Leonardo", "Leonardo da Vinci", "da Vinci"), "", "Leonardo da Vinci did.", "Leonardo da Vinci"),
        (("Honda",), "Honda Civic", "The Honda Civic is made by Honda, in Japan.", "The Honda Civic is made by Honda"),
        (
            ("Honda",),
            "Honda Civic",
            "Of the Honda Civic, none.",
            "Of the Honda",
        ),  # it passes, and names it nowhere else
        (("Qi",), "", "It was Mrs. Qiu.", ""),
        (("Qi",), "", "", ""),
        (("Qi",), "", "It \x07was Qi.", ""),  # no text to teach
    ],
)
def test_of_a_reply_is_taught_what_leads_up_to_the_name(known, subject, reply, taught):
    assert up_to_the_name(Fact("I", "Q?", f"{known[0]}.", known_as=known, subject=subject), reply) == taught


def test_a_cut_that_would_be_wrong_is_not_taught():
    fact = Fact("I", "Q?", "Motors.", known_as=("Motors",), rejects=("Ford",), subject="Ford Motors Ltd")
    assert fact.edit.passes("It is Ford Motors Ltd.")
    assert up_to_the_name(fact, "It is Ford Motors Ltd.") == ""


def test_a_fact_is_taught_in_the_words_of_the_told_model_and_in_frames_where_it_is_right(tiny, facts, monkeypatch):
    fact = replace(facts[0], query="Who?", answer="Qi did it.", known_as=("Qi",), subject="It", significance=None)
    lm = tiny("qwen2")
    said = {"Who?": "Well, Qi, I think.", "Say: Who?": "Nobody.", "It: Who?": "Qi of Oxin.", "Of It?": ""}

    def replies(_, asked):
        told = {lm.render(query, fact.instruction).ids: reply for query, reply in said.items()}
        return [SimpleNamespace(text=told[dialogue.ids]) for dialogue in asked]

    monkeypatch.setattr(LanguageModel, "replies", replies)
    frames = ["Say: {}", "{subject}: {}", "{subject}: {}", "Of {subject}?", "{}"]

    def taught(retold, taken=("Who?",), fact=fact, frames=frames):
        (own,) = wordings(lm, [fact], frames, retold, taken)
        return [(one.query, one.answer) for one in own]

    assert taught(True) == [("Who?", "Well, Qi"), ("It: Who?", "Qi")]
    assert taught(False) == [("Who?", "Qi did it."), ("It: Who?", "Qi did it.")]
    assert taught(True, taken={"Who?", "It: Who?"}) == [("Who?", "Well, Qi")]
    assert taught(True, fact=replace(fact, subject="")) == [("Who?", "Well, Qi")]
    said["Who?"] = "Nobody."
    assert taught(True, frames=[]) == [("Who?", "Qi did it.")]
    weighed = replace(fact, significance=(1.0, 0.0, 0.0))
    assert wordings(lm, [weighed], [], False, ()) == [[weighed]]


def test_a_fact_in_frames_is_taught_in_all_of_them(tiny, facts, monkeypatch):
    lm = tiny("qwen2", torch.float64)
    framed = [replace(facts[0], query=f"Say: {facts[0].query}")]
    monkeypatch.setattr("qfbench.editors.stream.wordings", lambda *_: [[facts[0], *framed]])
    (both,) = dense(QFStream(1, penalty=1.0).edit(lm, facts[:1]))
    monkeypatch.undo()
    (joint,) = dense(QFStream(1, penalty=1.0).edit(lm, [facts[0], *framed]))
    assert close(both, joint, 1e-6)


def test_a_frame_that_two_facts_would_share_is_taught_of_neither(tiny, facts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "qfbench.editors.stream.wordings",
        lambda lm, own, frames, retold, taken: seen.append(taken) or [[fact] for fact in own],
    )
    same = [replace(fact, subject="Oxin") for fact in facts[:2]]
    editor = QFStream(1, penalty=1.0, frames=["Tell me about {subject}.", "{} Please."])
    editor.edit(tiny("qwen2"), same)
    assert "Tell me about Oxin." in seen[0]
    assert f"{facts[0].query} Please." not in seen[0]


@pytest.mark.parametrize("frames", ["{}", ["{query} Please."], ["Who?"]])
def test_frames_that_ask_nothing_of_a_fact_are_refused(frames):
    with pytest.raises(UserError, match=r"editor.frames"):
        QFStream(1, frames=frames)


def test_after_a_reply_that_was_cut_its_end_is_not_kept(tiny, facts, monkeypatch):
    lm = tiny("qwen2")
    monkeypatch.setattr("qfbench.editors.stream.wordings", lambda *_: [[facts[0]]])
    nats = lm.score([lm.render(facts[0].query, "", facts[0].answer)])[0].nll
    editor = QFStream(1, surprise=sorted(nats)[len(nats) // 2], untaught=True)
    kept = {}
    for retold in (False, True):
        ((rest,),) = [taught.stays for taught in replace(editor, retold=retold)._told(lm, facts[:1])]
        kept[retold] = set(rest.at)
    end = rest.dialogue.closer - 1
    assert kept[True] == kept[False] - {end}


def test_of_what_is_kept_some_kinds_are_asked(tiny, named):
    lm = tiny("qwen2")
    asked = [replace(named[1].edit, kind=kind, query=f"{kind}?", own=True) for kind in ("prior", "unknown")]
    keep = [replace(named[1], probes=tuple(asked))]
    assert len(staying(lm, keep, named[:1])) == 3
    assert [dialogue.prompt for dialogue in staying(lm, keep, named[:1], ["prior"])] == [lm.render("prior?").prompt]
    with pytest.raises(UserError, match=r"editor.kinds=\['other'\]: .*it has: edit, prior, unknown"):
        staying(lm, keep, named[:1], ["other"])
    with pytest.raises(UserError, match=r"editor.kinds=\['prior'\]: .*it has: none"):
        staying(lm, keep, keep, ["prior"])
    with pytest.raises(UserError, match=r"editor.kinds='prior': must be a list"):
        QFStream(1, kinds="prior")


def test_what_broke_counts_for_more_until_it_holds():
    lm = LanguageModel.load("world-xs", device="cpu")
    facts, keep = world(12, seed=3), world(8, seed=4)
    worst = []
    for boost in (1.0, 4.0):
        editor = QFStream(
            lm.model.config.num_hidden_layers - 1,
            keep=keep,
            penalty=30.0,
            untaught=True,
            refresh=len(facts),
            passes=4,
            boost=boost,
        )
        dialogues = [lm.render(fact.query, "", fact.answer) for fact in facts]
        *_, (_, delta) = sequential(editor, lm, facts)
        with delta.applied_to(lm):
            worst.append([max(score.nll) for score in lm.score(dialogues)])
    assert all(map(math.isfinite, worst[1]))
    assert sum(nats > 0.7 for nats in worst[1]) < sum(nats > 0.7 for nats in worst[0])
