"""The suite `everyday`: its data are sound, and what it makes of them."""

import re
import tomllib
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from qfbench import UserError
from qfbench.facts import everyday as module
from qfbench.facts.everyday import everyday
from qfbench.facts.matching import key, stands_in

FACTS, QUESTIONS = 252, 360


def data(name):
    return tomllib.loads(Path(module.__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


INVENTED, KNOWN = data("everyday"), data("everyday_knowledge")
TABLES = [pytest.param(table, id=name) for name, table in (INVENTED | KNOWN).items()]


def twice(names):
    return [name for name, count in Counter(map(key, names)).items() if count > 1]


def giveaways(fact):
    """The questions about a fact in which what is to be said stands already."""
    asked = [(fact.query, fact.known_as), (fact.query, fact.rejects)]
    asked += [
        (p.query, (*p.accept, *p.reject)) for p in fact.probes if p.kind in ("paraphrase", "portability", "prior")
    ]
    return [query for query, names in asked if any(stands_in(name, query) for name in names)]


@pytest.fixture(scope="module")
def invented():
    return everyday(FACTS, prior=2, unknown=2, locality=4)


@pytest.fixture(scope="module")
def known():
    return everyday(QUESTIONS, about="known", locality=0)


def of(kind, facts):
    return [probe for fact in facts for probe in fact.probes if probe.kind == kind]


def test_it_is_as_large_as_it_says(invented):
    assert len(INVENTED) == 18
    assert all(len(table["facts"]) == 14 and len(table["strangers"]) == 4 for table in INVENTED.values())
    assert len(invented) == len({f.id for f in invented}) == len({f.query for f in invented}) == FACTS
    assert len({p.query for p in of("prior", invented)}) == QUESTIONS == sum(len(t["facts"]) for t in KNOWN.values())


@pytest.mark.parametrize("table", TABLES)
def test_the_wordings_of_a_relation_are_five_that_differ(table):
    asked = [table["query"], *table["others"]]
    assert len(asked) == 5
    assert not twice(asked)
    assert all("{s}" in wording and "{o}" not in wording for wording in asked)
    assert all("{s}" in table[name] and "{o}" in table[name] for name in ("instruction", "answer"))
    openings = Counter(" ".join(wording.split()[:2]) for wording in asked)
    assert openings.most_common(1)[0][1] <= 2


@pytest.mark.parametrize("table", TABLES)
def test_a_relation_has_no_subject_twice_and_no_answer_too_often(table):
    rows = [*table["facts"], *table.get("neighbours", ())]
    assert not twice([*(row[0] for row in rows), *table.get("strangers", ())])
    for cell in chain.from_iterable(rows):
        names = cell.split("|")
        assert all(key(name) for name in names)
        assert not twice(names)
    answers = Counter(row[1].split("|")[0] for row in table["facts"])
    assert answers.most_common(1)[0][1] <= len(table["facts"]) / 3


def test_no_invented_name_is_anothers():
    """A subject, a stranger or an invented person stands in one fact alone, so that questions read backwards have one answer."""
    subjects = [row[0] for table in INVENTED.values() for row in table["facts"]]
    strangers = [name for table in INVENTED.values() for name in table["strangers"]]
    objects = [row[1].split("|")[0] for table in INVENTED.values() for row in table["facts"] if len(row) == 2]
    assert not twice(subjects + strangers + objects)
    real = [row[0] for table in INVENTED.values() for row in table["neighbours"]]
    assert not {*map(key, subjects + strangers)} & {*map(key, real)}


def test_common_knowledge_names_nothing_invented_and_no_neighbour(invented):
    own = [f.subject for f in invented] + [name for table in INVENTED.values() for name in table["strangers"]]
    own += [row[1].split("|")[0] for table in INVENTED.values() for row in table["facts"] if len(row) == 2]
    near = [row[0] for table in INVENTED.values() for row in table["neighbours"]]
    asked = {p.query: p.accept for p in of("prior", invented)}
    everything = " | ".join(chain(asked, *asked.values()))
    assert not [name for name in own if stands_in(name, everything)]
    assert not [name for name in near if stands_in(name, " | ".join(asked))]


def test_answers_are_of_many_lengths(invented):
    words = Counter(len(f.known_as[0].split()) for f in invented)
    assert all(words[n] >= 10 for n in (1, 2))
    assert words[3] + words[4] >= 10


def test_no_question_gives_its_answer_away(invented, known):
    for fact in invented + known:
        assert not giveaways(fact), fact.id


def test_the_check_for_giveaways_can_fail():
    fact = everyday(1)[0]
    object.__setattr__(fact, "query", f"Is it {fact.known_as[0]}?")
    assert giveaways(fact) == [fact.query]


def test_no_name_of_an_invented_subject_hints_at_its_answer(invented):
    def words(text):
        return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}

    for fact in invented:
        said = set().union(*map(words, fact.known_as))
        assert not said & words(fact.subject), fact.id
        assert not [word for word in said if word[:5] in fact.subject.lower()], fact.id


def test_every_wording_names_its_subject_and_every_reference_passes(invented, known):
    for fact in invented + known:
        about = key(fact.subject).removeprefix("the ")
        assert all(stands_in(about, text) for text in (fact.instruction, fact.query, fact.answer))
        for probe in fact.probes:
            assert stands_in(key(probe.subject).removeprefix("the "), probe.query), probe
            assert not re.search(r"[{}|]|\b(the the|a [aeio])\b", probe.query + probe.expected, re.I), probe
            if probe.expected:
                assert probe.passes(probe.expected), probe
            if probe.kind == "paraphrase":
                assert probe.subject == fact.subject
                assert probe.expected == fact.answer


def test_what_follows_is_the_subject_or_a_second_step(invented):
    for fact in invented:
        (follows,) = (p for p in fact.probes if p.kind == "portability")
        backwards = stands_in(fact.known_as[0], follows.query)
        right = fact.subject if backwards else follows.expected
        assert stands_in(follows.accept[0], right)
        assert backwards != stands_in(key(fact.subject).removeprefix("the "), follows.query)
        assert not set(map(key, follows.accept)) & set(map(key, fact.known_as))


def test_neighbours_and_strangers_are_asked_of_the_model_itself(invented):
    for fact in invented:
        relation = INVENTED[fact.id.partition("-")[0]]
        own = [p for p in fact.probes if p.kind in ("locality", "unknown")]
        assert len(own) == 6
        assert all(p.always and p.own and not p.expected for p in own)
        for p in own:
            assert bool(p.accept) == (p.kind == "locality")
            assert p.subject in (
                relation["strangers"] if p.kind == "unknown" else [r[0] for r in relation["neighbours"]]
            )
            assert p.prefer is None or p.prefer[0] != p.prefer[1]
    assert len({p.query for p in of("unknown", everyday(FACTS, unknown=1))}) == FACTS


def test_facts_against_common_knowledge_replace_what_is_true(known):
    truth = {p.query: p for p in of("prior", everyday(FACTS))}
    assert {f.query for f in known} == set(truth)
    for fact in known:
        true = truth[fact.query]
        assert (fact.replaces, fact.rejects) == (true.expected, true.accept)
        assert fact.edit.prefer == (fact.answer, true.expected)
        assert not true.passes(fact.answer)
        assert not fact.edit.passes(true.expected)
        for p in fact.probes:
            if p.kind == "paraphrase":
                assert (p.reject, p.prefer) == (true.accept, fact.edit.prefer)
    some = everyday(100, about="known", prior=3)
    assert not {f.query for f in some} & {p.query for f in some for p in f.probes if p.always}
    assert len(of("prior", some)) > 150
    assert len(of("locality", some)) > 100


@pytest.mark.parametrize("about", ["invented", "known"])
def test_a_seed_gives_the_same_facts_and_a_larger_n_begins_with_them(about):
    bare = {"about": about, "prior": 0, "locality": 0}  # of what is known, a larger n leaves fewer of these
    facts = everyday(40, seed=3, **bare)
    assert everyday(40, seed=3, **bare) == facts
    assert everyday(25, seed=3, **bare) == facts[:25]
    assert everyday(40, seed=4, **bare) != facts
    relations = len(INVENTED if about == "invented" else KNOWN)
    assert len({f.id.partition("-")[0] for f in facts[:relations]}) == relations


def test_every_draw_of_a_false_answer_makes_a_sound_fact():
    for seed in (1, 2):
        everyday(QUESTIONS, seed=seed, about="known", paraphrases=0, prior=0, unknown=0, locality=0)


def test_the_parts_share_nothing():
    def said(part):
        facts = [*everyday(126, part=part, unknown=2, locality=4), *everyday(50, part=part, about="known", prior=0)]
        return {f.query for f in facts} | {p.query for f in facts for p in f.probes}

    tune, test = said("tune"), said("test")
    assert not tune & test
    assert {f.query for f in everyday(FACTS)} <= tune | test


def test_a_question_of_common_knowledge_is_asked_once():
    asked = [p.query for p in of("prior", everyday(30, prior=20))]
    assert len(asked) == len(set(asked)) == QUESTIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "facts.n=0: must be 1 to 252"),
        ({"n": 253}, "facts.n=253: must be 1 to 252"),
        ({"n": 361, "about": "known"}, "facts.n=361: must be 1 to 360"),
        ({"n": 127, "part": "test"}, "facts.n=127: must be 1 to 126"),
        ({"locality": 5}, "facts.locality=5: must be 0 to 4"),
        ({"unknown": -1}, "facts.unknown=-1: must be 0 to 4"),
        ({"about": "novel"}, "facts.about=novel: must be invented or known"),
        ({"part": "train"}, "facts.part=train: must be one of all, tune, test"),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        everyday(**change)
