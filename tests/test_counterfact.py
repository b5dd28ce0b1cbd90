"""CounterFact: what a record becomes."""

import pytest

from qfbench import Fact, Probe, UserError
from qfbench.facts.counterfact import counterfact
from qfbench.models.dialogue import render

CLOZE = ("Learn: {cloze} {object}.", "Fill in: {cloze} ...", "So {cloze} {object}.")


def rewrite(n, prompt="{} flows through", new="Varnby", old="Ostrel", **more):
    return {
        "prompt": prompt,
        "subject": f"River {n}",
        "relation_id": "P9001",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
    } | more


def counterfact_record(n):
    return {
        "case_id": 100 + n,
        "requested_rewrite": rewrite(n),
        "paraphrase_prompts": [f"Rain. River {n} passes", f"The town on River {n} is", f"River {n} waters"],
        "neighborhood_prompts": [f"Brook {n}{letter} flows through" for letter in "abcdefg"],
        "generation_prompts": ["Boats there carry"],
        "rephrase_prompt": "must not be used",
    }


def test_counterfact(write):
    (fact,) = counterfact(write([counterfact_record(1)]), *CLOZE, paraphrases=2, locality=3)
    assert fact == Fact(
        id="counterfact-101",
        kind="P9001",
        instruction="Learn: River 1 flows through Varnby.",
        query="Fill in: River 1 flows through ...",
        answer="So River 1 flows through Varnby.",
        known_as=("Varnby",),
        replaces="So River 1 flows through Ostrel.",
        rejects=("Ostrel",),
        subject="River 1",
        probes=(
            *(
                Probe(
                    "paraphrase",
                    f"Fill in: {cloze} ...",
                    f"So {cloze} Varnby.",
                    accept=("Varnby",),
                    reject=("Ostrel",),
                    prefer=(f"So {cloze} Varnby.", f"So {cloze} Ostrel."),
                    subject="River 1",
                )
                for cloze in ("Rain. River 1 passes", "The town on River 1 is")
            ),
            *(
                Probe(
                    "locality",
                    f"Fill in: Brook 1{letter} flows through ...",
                    "",
                    accept=("Ostrel",),
                    always=True,
                    own=True,
                    prefer=(f"So Brook 1{letter} flows through Ostrel.", f"So Brook 1{letter} flows through Varnby."),
                )
                for letter in "abc"
            ),
        ),
    )
    assert fact.edit.prefer == (fact.answer, fact.replaces)


@pytest.mark.parametrize(("paraphrases", "locality", "kept"), [(0, 0, (0, 0)), (1, 4, (1, 4)), (9, 99, (3, 7))])
def test_counterfact_keeps_as_many_probes_as_asked(write, paraphrases, locality, kept):
    path = write([counterfact_record(1)])
    (fact,) = counterfact(path, *CLOZE, paraphrases=paraphrases, locality=locality)
    kinds = [probe.kind for probe in fact.probes]
    assert (kinds.count("paraphrase"), kinds.count("locality")) == kept
    assert len(kinds) == sum(kept)


@pytest.mark.parametrize(
    "setting",
    [
        "paraphrases",
        "locality",
    ],
)
def test_counterfact_refuses_a_negative_number_of_probes(write, setting):
    with pytest.raises(UserError, match=setting):
        counterfact(write([counterfact_record(1)]), *CLOZE, **{setting: -1})


def test_clozes_are_put_on_one_line(write):
    record = counterfact_record(1) | {"paraphrase_prompts": ["Rain.\n\n\nRiver 1\u00a0 passes"]}
    record["requested_rewrite"]["prompt"] = "{}\tflows \n through"
    (fact,) = counterfact(write([record]), *CLOZE, paraphrases=1)
    assert fact.query == "Fill in: River 1 flows through ..."
    assert fact.probes[0].query == "Fill in: Rain. River 1 passes ..."


def test_the_shipped_query_asks_for_no_name(suite, write):
    """What stands in the gap may be a language, a sport or a profession."""
    (fact,) = suite("counterfact", write([counterfact_record(1)]), paraphrases=1, locality=1)
    assert [probe.query for probe in (fact.edit, *fact.probes)] == [
        "Complete the sentence: River 1 flows through ...",
        "Complete the sentence: Rain. River 1 passes ...",
        "Complete the sentence: Brook 1a flows through ...",
    ]


def test_the_old_object_may_stand_in_the_subject_but_not_be_the_new_one(suite, error_of, write):
    inside, same = counterfact_record(1), counterfact_record(2)
    inside["requested_rewrite"] |= {"subject": "Ostrel on Sea"}
    inside["paraphrase_prompts"] = ["Rain. Ostrel on Sea lies at"]
    (fact,) = suite("counterfact", write([inside]))
    for probe in (fact.edit, fact.probes[0]):
        assert probe.passes("Ostrel on Sea flows through Varnby.")
        assert not probe.passes("Varnby. Ostrel on Sea flows through Ostrel.")
    for new in ("Ostrel", "ostrel", " Ostrel.", "Ｏstrel\u200b"):
        same["requested_rewrite"]["target_new"] = {"str": new}
        path = write([inside, same])
        message = error_of("counterfact", path)
        assert message.startswith(
            f"{path}, record 2: the field 'requested_rewrite.target_new.str' is {new.strip()!r}, which"
        )
        assert suite("counterfact", path, on_error="skip") == [fact]


def test_all_of_counterfact_loads(raw, real):
    records = raw("counterfact")
    facts = real("counterfact")
    assert [f.id for f in facts] == [f"counterfact-{r['case_id']}" for r in records]
    for fact, record in zip(facts, records, strict=True):
        wanted = record["requested_rewrite"]
        assert fact.known_as == (wanted["target_new"]["str"].strip(),)
        assert wanted["subject"] in fact.query
        asked = record["paraphrase_prompts"][:2] + record["neighborhood_prompts"][:5]
        for probe, prompt in zip(fact.probes, asked, strict=True):
            assert " ".join(prompt.split()) in probe.query
            assert probe.kind == ("paraphrase" if prompt in record["paraphrase_prompts"] else "locality")


def test_clozes_as_released_are_on_one_line(shared, raw, suite, plain_tokenizer):
    """67 of these 400 paraphrases have line breaks; a prompt without a chat template is a line a turn."""
    facts = suite("counterfact", shared("counterfact/counterfact_200.json"), locality=10)
    assert sum("\n" in prompt for record in raw("counterfact") for prompt in record["paraphrase_prompts"]) == 67
    asked = [probe.query for fact in facts for probe in (fact.edit, *fact.probes)]
    assert len(asked) == 200 + 400 + 2000
    assert not [query for query in asked if "\n" in query or not query.startswith("Complete the sentence: ")]
    bare = plain_tokenizer.decode(render(plain_tokenizer, "?").prompt).count("\n")
    prompts = [plain_tokenizer.decode(render(plain_tokenizer, query).prompt) for query in asked[::9]]
    assert {prompt.count("\n") for prompt in prompts} == {bare}
