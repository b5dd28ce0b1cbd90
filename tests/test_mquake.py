"""MQuAKE: what a record becomes."""

import pytest
from test_counterfact import rewrite
from test_zsre import QUESTION

from qfbench import Fact, Probe, UserError
from qfbench.facts.mquake import mquake


def mquake_record(n):
    return {
        "case_id": 200 + n,
        "requested_rewrite": [
            rewrite(n, question=f"Where does River {n} flow?"),
            rewrite(n, "The mayor of {} is", "Una Pell", "Jori Klee", question=f"Who is the mayor of River {n}?"),
        ],
        "questions": [f"Who governs the town on River {n}?", f"Name the mayor where River {n} flows."],
        "answer": "Jori Klee",
        "answer_alias": ["Klee", "JK", "J. Klee"],
        "new_answer": "Una Pell",
        "new_answer_alias": ["Pell", "up", "U", "Pel"],
        "new_single_hops": [
            {"question": f"Where does River {n} flow?", "answer": "Varnby", "answer_alias": ["va", "Varnby-on-Sea"]},
            {"question": f"Who is the mayor of River {n}?", "answer": "Una Pell", "answer_alias": []},
        ],
    }


def test_mquake(write):
    templates = ("Learn: {cloze} {object}.", "Asked: {question}", "{question} {cloze} {object}.")
    first, last = mquake(write([mquake_record(1)]), *templates)
    assert first == Fact(
        id="mquake-201-0",
        kind="P9001",
        instruction="Learn: River 1 flows through Varnby.",
        query="Asked: Where does River 1 flow?",
        answer="Where does River 1 flow? River 1 flows through Varnby.",
        known_as=("Varnby", "Varnby-on-Sea"),
        replaces="Where does River 1 flow? River 1 flows through Ostrel.",
        rejects=("Ostrel",),
        subject="River 1",
    )
    assert last == Fact(
        id="mquake-201-1",
        kind="P9001",
        instruction="Learn: The mayor of River 1 is Una Pell.",
        query="Asked: Who is the mayor of River 1?",
        answer="Who is the mayor of River 1? The mayor of River 1 is Una Pell.",
        known_as=("Una Pell",),
        replaces="Who is the mayor of River 1? The mayor of River 1 is Jori Klee.",
        rejects=("Jori Klee",),
        subject="River 1",
        probes=tuple(
            Probe(
                "portability",
                f"Asked: {question}",
                "Una Pell",
                accept=("Una Pell", "Pell", "Pel"),
                reject=("Jori Klee", "Klee", "J. Klee"),
                needs=("mquake-201-0",),
                subject="River 1",
            )
            for question in ("Who governs the town on River 1?", "Name the mayor where River 1 flows.")
        ),
    )


@pytest.mark.parametrize(
    ("new", "answer"), [("Apple Inc.", "It is Apple Inc."), ("J. R.", "It is J. R."), ("Inc", "It is Inc.")]
)
def test_a_name_that_ends_with_a_stop_has_one(write, new, answer):
    record = mquake_record(1)
    record["requested_rewrite"][1] |= {"target_new": {"str": new, "id": "Q1"}}
    record["new_single_hops"][1] |= {"answer": new}
    *_, last = mquake(write([record]), "Learn: {cloze} {object}.", "{question}", "It is {object}.")
    assert (last.answer, last.instruction) == (answer, f"Learn: The mayor of River 1 is {new.removesuffix('.')}.")
    assert last.known_as[0] == new
    assert last.edit.passes(answer)


def test_mquake_asks_each_case_after_its_own_last_rewrite(write):
    single = mquake_record(1) | {"requested_rewrite": mquake_record(1)["requested_rewrite"][:1]}
    facts = mquake(write([single, mquake_record(2)]), *QUESTION)
    assert [(f.id, len(f.probes)) for f in facts] == [("mquake-201-0", 2), ("mquake-202-0", 0), ("mquake-202-1", 2)]


def test_mquake_never_rejects_what_it_accepts(write):
    shared_alias = {"answer_alias": ["Klee", "Pell"], "new_answer_alias": ["Pell", "Jori Klee"]}
    *_, fact = mquake(write([mquake_record(1) | shared_alias]), *QUESTION)
    assert fact.probes[0].accept == ("Una Pell", "Pell", "Jori Klee")
    assert fact.probes[0].reject == ("Klee",)


def test_mquake_takes_aliases_from_the_hop_of_the_same_question(write):
    record = mquake_record(1)
    record["new_single_hops"] = [{"question": "Another?", "answer_alias": ["Nobody"]}, *record["new_single_hops"][::-1]]
    first, last = mquake(write([record]), *QUESTION)
    assert (first.known_as, last.known_as) == (("Varnby", "Varnby-on-Sea"), ("Una Pell",))


def cases(*rewrites):
    """A case for each tuple of (question, new object) pairs."""
    for n, pairs in enumerate(rewrites):
        own = [rewrite(n, "It of {} is", new, "Ostrel", question=question) for question, new in pairs]
        yield mquake_record(n) | {"requested_rewrite": own, "questions": [f"Multi {n}?"], "new_single_hops": []}


A, B, C = ("Who is A?", "Una"), ("Who is B?", "Bo"), ("Who is C?", "Cy")


def test_each_question_is_taught_once_and_its_cases_need_the_fact_that_teaches_it(write, caplog):
    said_otherwise = ("who is\u00a0A?", "UNA")
    path = write(list(cases([A, B], [B], [said_otherwise, C], [C, A], [C, C])))
    facts = mquake(path, *QUESTION)
    assert [(f.id, f.query) for f in facts] == [
        ("mquake-200-0", "Asked: Who is A?"),
        ("mquake-200-1", "Asked: Who is B?"),
        ("mquake-202-1", "Asked: Who is C?"),
    ]
    a, b, c = (f.id for f in facts)
    needed = {p.query: {f.id, *p.needs} for f in facts for p in f.probes}
    assert needed == {
        "Asked: Multi 0?": {a, b},
        "Asked: Multi 1?": {b},
        "Asked: Multi 2?": {a, c},
        "Asked: Multi 3?": {a, c},
        "Asked: Multi 4?": {c},
    }
    assert sum(len(f.probes) for f in facts) == 5
    assert all(f.id not in p.needs for f in facts for p in f.probes)
    assert not caplog.records
    for order in range(4):
        same = {p.query: {f.id, *p.needs} for f in mquake(path, *QUESTION, seed=order) for p in f.probes}
        assert {q: len(ids) for q, ids in same.items()} == {q: len(ids) for q, ids in needed.items()}
    assert [len(f.probes) for f in mquake(path, *QUESTION, n=2)] == [0, 2]  # a case that teaches nothing new counts


def test_another_object_for_the_same_question_is_a_conflict(write, caplog):
    other = (A[0], "Ida")
    path = write(list(cases([A, B], [C, other], [C])))
    with pytest.raises(
        UserError, match=f"{path}, record 2: .*'It is Ida.' here and .*'It is Una.' in record 1 .'mquake-200-0'"
    ):
        mquake(path, *QUESTION)
    left = mquake(path, *QUESTION, on_error="skip")
    assert [f.query for f in left] == [f"Asked: {question}" for question, _ in (A, B, C)]
    assert {p.query for f in left for p in f.probes} == {"Asked: Multi 0?", "Asked: Multi 2?"}
    caplog.clear()
    facts = mquake(path, *QUESTION, on_conflict="keep")
    assert [f.answer for f in facts] == ["It is Una.", "It is Bo.", "It is Cy.", "It is Ida."]
    needed = {p.query: {f.id, *p.needs} for f in facts for p in f.probes}
    assert needed["Asked: Multi 1?"] == {"mquake-201-0", "mquake-201-1"}
    (warning,) = caplog.messages
    assert "1 facts repeat or contradict another and are kept" in warning


def test_a_question_of_which_another_case_rewrites_a_hop_is_a_conflict(write, caplog):
    first, second = cases([A], [B])
    for names, right in ((["Bo"], True), (["Robert", "bo"], True), (["Otto"], False)):
        first["new_single_hops"] = [{"question": "Who is B?", "answer": names[0], "answer_alias": names[1:]}]
        path = write([first, second])
        if right:
            assert len(mquake(path, *QUESTION)) == 2
            continue
        with pytest.raises(
            UserError, match=f"{path}: 1 multi-hop questions .*'Asked: Multi 0.'.*'mquake-201-0' answers"
        ):
            mquake(path, *QUESTION)
        assert not caplog.messages
        left = mquake(path, *QUESTION, on_error="skip")
        assert [[p.query for p in f.probes] for f in left] == [[], ["Asked: Multi 1?"]]
        kept = mquake(path, *QUESTION, on_conflict="keep")
        assert [len(f.probes) for f in kept] == [1, 1]
        assert [m.rpartition("they are ")[2] for m in caplog.messages] == ["left out", "kept"]
    assert len(mquake(path, *QUESTION, n=1)) == 1  # what is not taught rewrites nothing


def test_an_alias_that_the_old_object_has_too_is_not_accepted(write):
    record = mquake_record(1)
    record["new_single_hops"][0]["answer_alias"] = ["OSTREL", "Varnby-on-Sea"]
    assert mquake(write([record]), *QUESTION)[0].known_as == ("Varnby", "Varnby-on-Sea")
    record["new_answer_alias"] = ["Ida Klee"]
    *_, fact = mquake(write([record | {"answer_alias": ["ida klee", "Klee"]}]), *QUESTION)
    assert fact.probes[0].reject == ("Jori Klee", "Klee")


def test_all_of_mquake_loads(raw, real):
    records = raw("mquake")
    facts = {f.query: f for f in real("mquake")}
    ids = {f.id for f in facts.values()}
    assert len(facts) == len(real("mquake")) == len({w["question"] for r in records for w in r["requested_rewrite"]})
    asked = {p.query: (f, p) for f in facts.values() for p in f.probes}
    for record in records:
        hops = {hop["question"]: hop for hop in record["new_single_hops"]}
        for wanted in record["requested_rewrite"]:
            fact = facts[wanted["question"]]
            aliases = hops[wanted["question"]]["answer_alias"] if wanted["question"] in hops else ()
            assert set(fact.known_as) == {wanted["target_new"]["str"], *(a for a in aliases if len(a.strip()) > 2)}
        for question in record["questions"]:
            fact, probe = asked.pop(question.strip())
            assert {fact.id, *probe.needs} == {facts[w["question"]].id for w in record["requested_rewrite"]} <= ids
            assert probe.expected == record["new_answer"]
            assert not set(probe.accept) & set(probe.reject)
    assert not asked


def test_mquake_as_released(shared, suite):
    facts = suite("mquake", shared("mquake/mquake_60.json"))
    assert len(facts) == 186
    assert sum(len(fact.probes) for fact in facts) == 180
    new, old = zip(*((fact.known_as[0], *fact.rejects) for fact in facts), strict=True)
    assert [sum(name.endswith(".") for name in names) for names in (new, old)] == [1, 8]
    assert not [text for f in facts for text in (f.instruction, f.answer, f.replaces) if text.endswith("..")]
