import math
from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig

from qfbench import Fact, LanguageModel, Probe, UserError
from qfbench.facts.probes import ask, check_lengths, instructed
from qfbench.facts.world import world
from qfbench.models.lm import Reply, Score
from qfbench.runs.provenance import PROBES

ANSWER = "It was started by Qi."


class Scripted(LanguageModel):
    """Has one score and one reply ready for each query."""

    def __init__(self, **script: tuple[Score, Reply]) -> None:
        self.script = script

    def answer_each(self, asked, at_once=None):
        return [(self.replies(prompts), self.score(rated)) for prompts, rated in asked]

    def render(self, query, system="", answer=""):
        return query

    def score(self, dialogues):
        return [self.script[query][0] for query in dialogues]

    def replies(self, prompts):
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


def test_only_a_reply_that_is_exact_to_its_end_is_the_reference_and_all_stay_in_order():
    hits = {"first": [1, 0, 0], "all": [1, 1, 1], "but_last": [1, 1, 0], "none": [0, 0, 0]}
    lm = Scripted(**{name: (score(hit), Reply(f"{name}, decoded", True)) for name, hit in hits.items()})
    rows = ask(lm, [Probe("edit", name, ANSWER) for name in hits])
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


class Rated(LanguageModel):
    """Has the nats per token of each reply to each query ready."""

    def __init__(self, says, **nll):
        self.says, self.nll = says, nll

    def render(self, query, system="", answer=""):
        return query, answer

    def answer_each(self, asked, at_once=None):
        return [(self.replies(prompts), self.score(rated)) for prompts, rated in asked]

    def score(self, dialogues):
        return [Score(tuple(self.nll[answer]), (False,) * len(self.nll[answer])) for _, answer in dialogues]

    def replies(self, prompts):
        return [Reply(self.says, True) for _ in prompts]


NATS = {"ref": [1.0], "short": [2.0, 2.0], "long": [1.5] * 6, "first": [9.0, 0.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("first", "second", "preferred"),
    [
        ("long", "short", True),  # 1.5 a token against 2, though 9 in all against 4
        ("short", "long", False),
        ("first", "short", False),  # 2.25 a token; its last token alone is the likelier
        ("long", "long", False),  # alike is not likelier
    ],
)
def test_preferred_compares_the_mean_nats_per_token_of_two_replies(first, second, preferred):
    (row,) = ask(Rated("x", **NATS), [Probe("edit", "who", "ref", prefer=(first, second))])
    assert row["preferred"] is preferred
    assert row["nll"] == 1.0


@pytest.mark.parametrize("places", [(), (0,), (1, 3), (0, 1, 2, 3, 4)])
def test_each_pair_stays_with_its_probe_where_only_some_have_one(places):
    pairs = [("long", "short"), ("short", "long"), ("long", "first"), ("first", "long"), ("short", "first")]
    means = {name: sum(nll) / len(nll) for name, nll in NATS.items()}
    probes = [Probe("edit", f"q{i}", "ref", prefer=pairs[i] if i in places else None) for i in range(5)]
    rows = ask(Rated("x", **NATS), probes)
    wanted = [means[a] < means[b] if i in places else None for i, (a, b) in enumerate(pairs)]
    assert [row["preferred"] for row in rows] == wanted
    assert [row["query"] for row in rows] == [probe.query for probe in probes]
    assert {row["nll"] for row in rows} == {1.0}


@pytest.mark.parametrize(
    ("reply", "own", "accept", "generated", "gold"),
    [
        ("In Ulm.", True, ("Ulm",), True, True),
        ("In Bonn.", True, ("Ulm",), False, False),
        ("In Ulm, I think.", True, ("Ulm",), False, True),  # true, but not what it said before
        ("In Ulm.", True, (), True, None),  # the suite does not know
        ("In Ulm, I think.", False, ("Ulm",), True, None),
    ],
)
def test_own_passes_as_it_was_and_gold_as_the_suite_holds(reply, own, accept, generated, gold):
    lm = Scripted(where=(score([0, 1]), Reply(reply, True)))
    (row,) = ask(lm, [Probe("locality", "where", "In Ulm.", accept, own=own)])
    assert (row["generated"], row["gold"]) == (generated, gold)


def test_own_that_was_not_right_passes_if_it_is_as_it_was():
    lm = Scripted(where=(score([1, 1]), Reply("never decoded", True)))
    (row,) = ask(lm, [Probe("locality", "where", "In Bonn.", ("Ulm",), own=True)])
    assert (row["generated"], row["gold"], row["exact"], row["reply"]) == (True, False, True, "In Bonn.")


def test_own_passes_for_the_same_reply_alone():
    probe = Probe("locality", "where", "In Ulm.", ("Ulm",), own=True)
    assert probe.passes("In Ulm.")
    for other in ("In Ulm", "in Ulm.", "In Ulm. ", "", "Ulm"):
        assert not probe.passes(other)
    assert Probe("locality", "where", "", own=True).passes("")
    assert not Probe("locality", "where", "", own=True).passes("In Ulm.")


def test_a_fact_that_replaces_something_asks_which_is_likelier():
    fact = world(1)[0]
    assert fact.edit.prefer is None
    assert replace(fact, replaces="Before.").edit.prefer == (fact.answer, "Before.")
    assert replace(fact, replaces="Before.").told.prefer is None


def test_preferred_is_that_of_plain_passes_of_a_model(tiny, arch):
    lm = tiny(arch)
    texts = ["It was Qi.", "Need more information.", "Bo", "Qi and Bo started it in the year 1984, they say."]
    pairs = [(a, b) for a in texts for b in texts if a != b]
    probes = [Probe("edit", "Who?", "Qi.", prefer=pair, system="Told.") for pair in pairs]

    def nats(answer):
        dialogue = lm.render("Who?", "Told.", answer)
        logits = lm.model(input_ids=torch.tensor([dialogue.ids])).logits[0, dialogue.answer - 1 :]
        wanted = torch.tensor(dialogue.reply)
        return torch.nn.functional.cross_entropy(logits[: len(wanted)], wanted).item()

    mean = {text: nats(text) for text in texts}
    assert [row["preferred"] for row in ask(lm, probes)] == [mean[a] < mean[b] for a, b in pairs]


def test_a_trained_model_prefers_what_it_knows_and_what_it_is_told(xs):
    fact = next(f for f in world(1, prior=2))
    known = [p for p in fact.probes if p.kind == "prior"]
    wrong = "Need more information."
    probes = [replace(p, prefer=pair) for p in known for pair in ((p.expected, wrong), (wrong, p.expected))]
    probes += [replace(p, prefer=(fact.answer, wrong)) for p in (fact.told, fact.edit)]
    assert [row["preferred"] for row in ask(xs, probes)] == [True, False] * len(known) + [True, False]


SHIPPED = ["world-xs", "world-s", "world-m", "world-s-qf2", "world-m-qf2"]


def mixed(lm):
    """A dozen probes of all sorts: known, unknown, told, with pairs, with own and with no reference, short and long."""
    facts = world(2, paraphrases=1, prior=1, unknown=1)
    first, second = facts
    probes = [p for f in facts for p in (f.edit, f.told, *f.probes)][:9]
    prior = next(p for p in first.probes if p.kind == "prior")
    own = replace(prior, kind="locality", expected=lm.reply(prior.query), own=True)
    probes.insert(2, replace(own, prefer=(prior.expected, "Need more information.")))
    probes.insert(
        5, replace(second.edit, prefer=(second.answer, "No"), system=first.instruction + " " + second.instruction)
    )
    return [
        *probes,
        Probe("locality", "?", "", reject=("Qi",)),
        Probe("edit", "Who?", "Qi.", prefer=("Bo", "Ada Lin.")),
    ]


@pytest.mark.parametrize("name", [*SHIPPED, "stories"])
def test_a_mixed_bag_is_answered_as_one_by_one(name, request):
    lm = (
        request.getfixturevalue(name)
        if name == "stories"
        else LanguageModel.load(name, device="cpu", max_new_tokens=24)
    )
    probes = mixed(lm)
    together = ask(replace(lm, batch_size=5), probes)
    alone = [ask(lm, [probe])[0] for probe in probes]
    for row, single in zip(together, alone, strict=True):
        floats = {column: single.pop(column) for column in ("forced", "nll")}
        assert {column: row.pop(column) for column in floats} == pytest.approx(floats, abs=1e-4, nan_ok=True)
        assert row == single
    assert len({row["reply"] for row in together}) > 3
    assert {row["preferred"] for row in together} > {None}
    assert {row["gold"] for row in together} > {None}


def long(n, **more):
    return Fact("Qi started X.", "Who started X?", "It was Qi.", id="far", **more), "a b " * n


def test_facts_longer_than_the_model_are_refused_by_name_before_anything_is_asked(tiny):
    lm = tiny("llama", max_position_embeddings=96)
    lm.model.forward = None  # nothing is asked
    fact, text = long(40)
    check_lengths(lm, [fact])
    for spoilt, what in (
        (replace(fact, query=text + "?"), r"fact far \('a b a b"),
        (replace(fact, instruction=text), r"fact far \('Who started X\?'"),
        (replace(fact, answer=text + "Qi.", known_as=("Qi",)), r"fact far \('Who"),
        (replace(fact, replaces=text + "Bo."), r"fact far \('Who"),
        (
            replace(fact, probes=(Probe("locality", text + "?", "", always=True, own=True),)),
            r"fact far, probe 'locality' \('a b",
        ),
        (
            replace(fact, probes=(Probe("portability", "Who?", "Qi.", system=text, always=True),)),
            r"fact far, probe 'portability'",
        ),
        (replace(fact, probes=(Probe("hop", "Who?", text, needs=("far",)),)), r"fact far, probe 'hop'"),
    ):
        with pytest.raises(
            UserError, match=what + r".* is too long: \d+ tokens.* are more than the 96 positions of tiny-llama"
        ):
            check_lengths(lm, [fact, spoilt])
    lm.model.config.max_position_embeddings = 4096
    check_lengths(lm, [spoilt])


def test_the_reply_that_a_model_may_give_counts(tiny):
    lm = tiny("llama")
    fact, _ = long(0)
    prompt = len(lm.render(fact.query, fact.instruction).ids)
    for fits in (True, False):
        lm.model.config.max_position_embeddings = prompt + 200 - (not fits)
        lm.max_new_tokens = 200
        if fits:
            check_lengths(lm, [fact])
            continue
        with pytest.raises(UserError, match=f"{prompt} tokens, and up to 200 for the reply"):
            check_lengths(lm, [fact])


def test_what_other_facts_say_counts_where_a_probe_needs_them(tiny):
    lm, (fact, text) = tiny("llama", max_position_embeddings=120), long(30)
    first, second = replace(fact, id="a", instruction=text), replace(fact, id="b", instruction=text)
    check_lengths(lm, [first, second])
    both = replace(second, probes=(Probe("hop", "Who?", "Qi.", needs=("a",)),))
    assert instructed([first, both])[-1][1].system == f"{text} {text}"
    with pytest.raises(UserError, match="fact b, probe 'hop'"):
        check_lengths(lm, [first, both])


def test_a_query_of_200_000_characters_is_refused_and_not_printed(tiny):
    lm, fact = tiny("llama"), replace(long(0)[0], query="a" * 200_000)
    for action in (lambda: check_lengths(lm, [fact]), lambda: lm.reply(fact.query), lambda: lm.nll([fact.query])):
        with pytest.raises(UserError, match="more than the 512 positions") as error:
            action()
        assert len(str(error.value)) < 300


def test_a_model_that_names_no_positions_takes_any(wrap, tokenizer):
    bloom = {
        "n_layer": 1,
        "hidden_size": 32,
        "n_head": 4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    lm, (fact, text) = wrap(BloomConfig(vocab_size=len(tokenizer), **bloom)), long(400)
    assert lm.positions is None
    check_lengths(lm, [replace(fact, query=text)])
    assert lm.reply(text)


# The columns of a row, by the version of the cache (`provenance.PROBES`) under which they are kept.
COLUMNS = {
    3: "kind system query expected reply stopped generated exact forced nll preferred gold",
}


def test_other_columns_are_another_version_of_the_cache():
    lm = Scripted(**{"Who?": (Score((0.0,), (True,)), Reply("Qi.", True))})
    (row,) = ask(lm, [Probe("edit", "Who?", "Qi.")])
    what = "the columns of a row changed: raise PROBES (runs/provenance.py), and list them here under its new value"
    assert " ".join(row) == COLUMNS.get(PROBES), what
