"""zsRE: what a record becomes."""

import pytest

from qfbench import Fact, Probe
from qfbench.facts.zsre import zsre

QUESTION = ("Learn: {question} {object}.", "Asked: {question}", "It is {object}.")


def zsre_record(n):
    return {
        "src": f"Which town made Lamp {n}?",
        "alt": "Varnby",
        "pred": "Skarn",  # not the truth, and not used
        "rephrase": f"Lamp {n} was made in which town?",
        "answers": ["Ostrel", "Ostrel Town"],
        "loc": f"nq question: who mended kettle {n}",
        "loc_ans": "Tilda Brask",
    }


def test_zsre(write):
    (fact,) = zsre(write([zsre_record(1)]), *QUESTION)
    assert fact == Fact(
        id="zsre-1",
        instruction="Learn: Which town made Lamp 1? Varnby.",
        query="Asked: Which town made Lamp 1?",
        answer="It is Varnby.",
        known_as=("Varnby",),
        replaces="It is Ostrel.",
        rejects=("Ostrel", "Ostrel Town"),
        probes=(
            Probe(
                "paraphrase",
                "Asked: Lamp 1 was made in which town?",
                "It is Varnby.",
                accept=("Varnby",),
                reject=("Ostrel", "Ostrel Town"),
                prefer=("It is Varnby.", "It is Ostrel."),
            ),
            Probe(
                "locality",
                "Asked: Who mended kettle 1?",
                "",
                accept=("Tilda Brask",),
                always=True,
                own=True,
            ),
        ),
    )


@pytest.mark.parametrize(
    ("loc", "asked"),
    [
        ("nq question: who did it", "Who did it?"),
        ("nq question: who did it?", "Who did it?"),
        ("who asked an nq question: once", "Who asked an nq question: once?"),
        ("Why did McArn go", "Why did McArn go?"),
        ("  élan is what ", "Élan is what?"),
    ],
)
def test_an_unrelated_question_of_zsre_reads_as_a_question(write, loc, asked):
    (fact,) = zsre(write([zsre_record(1) | {"loc": loc}]), *QUESTION)
    assert fact.probes[1].query == f"Asked: {asked}"


@pytest.mark.parametrize(
    ("answers", "rejected"),
    [(["Ostrel", "Old Varnby"], ("Ostrel", "Old Varnby")), ([], ()), ([" Ostrel "], ("Ostrel",))],
)
def test_zsre_rejects_the_true_answers_and_prefers_the_new_one_to_the_first(write, answers, rejected):
    (fact,) = zsre(write([zsre_record(1) | {"answers": answers}]), *QUESTION)
    assert fact.probes[0].reject == fact.edit.reject == rejected
    pair = ("It is Varnby.", "It is Ostrel.") if answers else None
    assert fact.probes[0].prefer == fact.edit.prefer == pair


def test_braces_in_a_record_are_text(write):
    record = zsre_record(1) | {"src": "What is {object} in {0}?", "alt": "{question}"}
    (fact,) = zsre(write([record]), *QUESTION)
    assert (fact.query, fact.answer) == ("Asked: What is {object} in {0}?", "It is {question}.")


@pytest.mark.parametrize("change", [{"answers": ["Ostrel", "Varnby"]}, {"answers": ["varnby."]}])
def test_an_answer_that_is_no_new_one_is_refused(error_of, write, change):
    path = write([zsre_record(1), zsre_record(2) | change])
    assert error_of("zsre", path).startswith(
        f"{path}, record 2: the field 'alt' is 'Varnby', which 'answers' hold too: it is true, and nothing is rewritten"
    )


@pytest.mark.parametrize("pred", [{}, {"pred": None}, {"pred": "Varnby"}, {"pred": "Ostrel"}])
def test_what_a_model_once_replied_changes_nothing(write, pred):
    record = zsre_record(1)
    expected = zsre(write([record]), *QUESTION)
    del record["pred"]
    assert zsre(write([record | pred]), *QUESTION) == expected


def test_zsre_knows_the_subject_where_the_file_does(write):
    (fact,) = zsre(write([zsre_record(1) | {"subject": "Ostrel Lamp"}]), *QUESTION)
    assert fact.edit.subject == fact.probes[0].subject == "Ostrel Lamp"
    assert fact.probes[0].passes("The Ostrel Lamp is by Varnby.")


def test_all_of_zsre_loads(raw, real):
    records = raw("zsre")
    facts = real("zsre")
    same = [r for r in records if r["alt"].strip().casefold() in (a.strip().casefold() for a in r["answers"])]
    assert len(same) < 0.1 * len(records)
    records = [r for r in records if r not in same]
    assert [f.known_as for f in facts] == [(r["alt"].strip(),) for r in records]
    for fact, record in zip(facts, records, strict=True):
        paraphrase, unrelated = fact.probes
        assert fact.query == record["src"].strip()
        assert paraphrase.query == record["rephrase"].strip()
        assert unrelated.accept == (record["loc_ans"].strip(),)
        assert not unrelated.query.lower().startswith("nq question")
        assert unrelated.query == unrelated.query[0].upper() + unrelated.query[1:]
        assert unrelated.query.endswith("?")
        assert unrelated.query.rstrip("?").lower() in record["loc"].lower()


def test_zsre_as_released(shared, suite, caplog):
    """Of the first 500 records of the file 21 have a new answer that is true, and 106 a true `pred`."""
    facts = suite("zsre", shared("zsre/zsre_500.json"), on_error="skip")
    assert len(facts) == 479
    assert "21 records are left out; the first: " in caplog.text
    assert "record 3: the field 'alt' is " in caplog.text
    assert sum(fact.edit.prefer == (fact.answer, fact.replaces) for fact in facts) == 479
    assert sum(fact.replaces.rstrip(".") == fact.rejects[0].rstrip(".") for fact in facts) == 479
