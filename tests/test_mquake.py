"""MQuAKE: what a record becomes."""

from test_counterfact import rewrite
from test_zsre import QUESTION

from qfbench import Fact, Probe
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
        probes=tuple(
            Probe(
                "portability",
                f"Asked: {question}",
                "Una Pell",
                accept=("Una Pell", "Pell", "Pel"),
                reject=("Jori Klee", "Klee", "J. Klee"),
                needs=("mquake-201-0",),
            )
            for question in ("Who governs the town on River 1?", "Name the mayor where River 1 flows.")
        ),
    )


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


def test_all_of_mquake_loads(raw, real):
    records = raw("mquake")
    facts = iter(real("mquake"))
    for record in records:
        hops = {hop["question"]: hop for hop in record["new_single_hops"]}
        of_case = [next(facts) for _ in record["requested_rewrite"]]
        for i, (fact, wanted) in enumerate(zip(of_case, record["requested_rewrite"], strict=True)):
            assert fact.id == f"mquake-{record['case_id']}-{i}"
            assert fact.query == wanted["question"]
            aliases = hops[wanted["question"]]["answer_alias"] if wanted["question"] in hops else ()
            assert set(fact.known_as) == {wanted["target_new"]["str"], *(a for a in aliases if len(a.strip()) > 2)}
        assert not any(f.probes for f in of_case[:-1])
        assert [p.query for p in of_case[-1].probes] == [q.strip() for q in record["questions"]]
        for probe in of_case[-1].probes:
            assert probe.expected == record["new_answer"]
            assert not set(probe.accept) & set(probe.reject)
    assert next(facts, None) is None
