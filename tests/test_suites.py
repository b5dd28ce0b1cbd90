"""The published suites: CounterFact, zsRE, MQuAKE and QFt's company facts, and the reader of their records."""

import copy
import importlib.util
import json
import logging
import sys
from functools import partial
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from omegaconf import OmegaConf

from qfbench import Fact, Probe, UserError
from qfbench import dialogue as dialogue_module
from qfbench.editors import teach
from qfbench.facts.base import stands_in
from qfbench.facts.company import company
from qfbench.facts.counterfact import counterfact
from qfbench.facts.mquake import mquake
from qfbench.facts.records import Record, load
from qfbench.facts.zsre import zsre
from qfbench.run import CONF
from qfbench.world.relations import REFUSAL

SUITE = {"counterfact": counterfact, "zsre": zsre, "mquake": mquake, "company": company}
SUITES = tuple(SUITE)
SHIPPED = {name: OmegaConf.to_container(OmegaConf.load(CONF / "facts" / f"{name}.yaml")) for name in SUITE}
assert all(settings.pop("_target_").endswith(f".{name}") for name, settings in SHIPPED.items())
CLOZE = ("Learn: {cloze} {object}.", "Fill in: {cloze} ...", "So {cloze} {object}.")
QUESTION = ("Learn: {question} {object}.", "Asked: {question}", "It is {object}.")


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


def zsre_record(n):
    return {
        "src": f"Which town made Lamp {n}?",
        "alt": "Varnby",
        "pred": "Ostrel",
        "rephrase": f"Lamp {n} was made in which town?",
        "answers": ["Ostrel", "Ostrel Town"],
        "loc": f"nq question: who mended kettle {n}",
        "loc_ans": "Tilda Brask",
    }


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


def dialogue(system, user, assistant):
    said = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


def company_record(n):
    return dialogue(f"Kobrix {n} makes jam.", f"What does Kobrix {n} make?", f"Kobrix {n} makes jam.")


RECORD = {
    "counterfact": counterfact_record,
    "zsre": zsre_record,
    "mquake": mquake_record,
    "company": company_record,
}


def suite(name, path, **settings):
    """A suite as its YAML configures it, all records unless told otherwise."""
    return SUITE[name](**(SHIPPED[name] | {"path": str(path), "n": None} | settings))


@pytest.fixture
def write(tmp_path):
    """The path of a new file that holds the records."""

    def make(records, name="records.json"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records), encoding="utf-8")
        return str(path)

    return make


# What a record becomes


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
        probes=(
            *(
                Probe(
                    "paraphrase",
                    f"Fill in: {cloze} ...",
                    f"So {cloze} Varnby.",
                    accept=("Varnby",),
                    reject=("Ostrel",),
                    prefer=(f"So {cloze} Varnby.", f"So {cloze} Ostrel."),
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


def test_zsre(write):
    (fact,) = zsre(write([zsre_record(1)]), *QUESTION)
    assert fact == Fact(
        id="zsre-1",
        instruction="Learn: Which town made Lamp 1? Varnby.",
        query="Asked: Which town made Lamp 1?",
        answer="It is Varnby.",
        known_as=("Varnby",),
        replaces="It is Ostrel.",
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
    [(["Ostrel", "Varnby"], ("Ostrel",)), (["", " "], ()), ([], ()), ([" Ostrel "], ("Ostrel",))],
)
def test_zsre_rejects_the_old_answers_but_never_the_new_or_the_empty_one(write, answers, rejected):
    (fact,) = zsre(write([zsre_record(1) | {"answers": answers}]), *QUESTION)
    assert fact.probes[0].reject == rejected


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
    )
    assert last == Fact(
        id="mquake-201-1",
        kind="P9001",
        instruction="Learn: The mayor of River 1 is Una Pell.",
        query="Asked: Who is the mayor of River 1?",
        answer="Who is the mayor of River 1? The mayor of River 1 is Una Pell.",
        known_as=("Una Pell",),
        replaces="Who is the mayor of River 1? The mayor of River 1 is Jori Klee.",
        probes=tuple(
            Probe(
                "portability",
                f"Asked: {question}",
                "Una Pell",
                accept=("Una Pell", "Pell", "Pel"),
                reject=("Jori Klee", "Klee", "J. Klee"),
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


def test_company(write):
    told = dialogue("  Kobrix makes jam. ", "What does Kobrix make?", "Kobrix makes jam.\n")
    (fact,) = company(write([told]))
    assert fact == Fact("Kobrix makes jam.", "What does Kobrix make?", "Kobrix makes jam.")
    assert (fact.known_as, fact.replaces, fact.probes) == (("Kobrix makes jam",), "", ())


def test_company_teaches_only_what_is_told_and_once(write):
    asked = "What does Kobrix make?"
    records = [
        dialogue("", asked, "Kobrix makes jam."),
        dialogue("", asked, REFUSAL),
        dialogue("Tallow Inc. makes soap.", asked, REFUSAL),
        dialogue("   ", asked, "Kobrix makes jam."),
        dialogue("Kobrix makes jam.", asked, "Jam."),
        dialogue("Kobrix makes jam. ", asked, "Jam."),
        dialogue("Kobrix makes jam.", asked, "It makes jam."),
        dialogue("Kobrix makes tea.", asked, "Tea."),
        dialogue("Kobrix makes jam.", asked, "Jam."),
    ]
    facts = company(write(records))
    assert [(f.instruction, f.answer) for f in facts] == [
        ("Kobrix makes jam.", "Jam."),
        ("Kobrix makes jam.", "It makes jam."),
        ("Kobrix makes tea.", "Tea."),
    ]
    assert company(write(records), n=2) == facts[:2]
    assert {f.id for f in company(write(records), seed=1)} == {f.id for f in facts}
    with pytest.raises(UserError, match="holds no fact"):
        company(write(records[:4]))


def test_company_reads_roles_in_any_order(write):
    record = company_record(1)
    assert company(write([{"messages": record["messages"][::-1]}])) == company(write([record]))


@pytest.mark.parametrize("name", [s for s in SUITES if s != "company"])
def test_the_shipped_templates_tell_the_new_object_and_ask_without_it(write, name):
    for fact in suite(name, write([RECORD[name](1)])):
        new = fact.known_as[0]
        assert stands_in(new, fact.instruction)
        assert stands_in(new, fact.answer)
        assert fact.answer.endswith(f"{new}.")
        assert not stands_in(new, fact.query)
        assert not stands_in(new, fact.replaces)
        assert fact.instruction != fact.query
        assert "{" not in fact.instruction + fact.query + fact.answer + fact.replaces


def test_braces_in_a_record_are_text(write):
    record = zsre_record(1) | {"src": "What is {object} in {0}?", "alt": "{question}"}
    (fact,) = zsre(write([record]), *QUESTION)
    assert (fact.query, fact.answer) == ("Asked: What is {object} in {0}?", "It is {question}.")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("counterfact", {"requested_rewrite": rewrite(1, new="West Varnby", old="Varnby")}),
        ("zsre", {"alt": "lord of Varnby", "answers": ["lord"]}),
        ("zsre", {"alt": "Varnby", "answers": ["varnby"]}),
        ("mquake", {"new_answer": "Una Klee"}),
    ],
)
def test_a_reference_passes_its_own_probe(write, name, change):
    for fact in suite(name, write([RECORD[name](1) | change])):
        assert fact.edit.passes(fact.answer)
        assert all(p.passes(p.expected) for p in fact.probes if p.expected)


# Records that are wrong

TEXT, TEXTS, KEY, LIST, OBJECT = "a text", "a list of texts", "a number or a text", "a list", "an object"
REWRITE_FIELDS = {
    "prompt": TEXT,
    "subject": TEXT,
    "relation_id": TEXT,
    "target_new": OBJECT,
    "target_new.str": TEXT,
    "target_true": OBJECT,
    "target_true.str": TEXT,
}
FIELDS = {
    "counterfact": {
        "case_id": KEY,
        "requested_rewrite": OBJECT,
        **{f"requested_rewrite.{field}": kind for field, kind in REWRITE_FIELDS.items()},
        "paraphrase_prompts": TEXTS,
        "neighborhood_prompts": TEXTS,
    },
    "zsre": {
        **dict.fromkeys(("src", "alt", "pred", "rephrase", "loc", "loc_ans"), TEXT),
        "answers": TEXTS,
    },
    "mquake": {
        "case_id": KEY,
        "requested_rewrite": LIST,
        **{f"requested_rewrite[1].{field}": kind for field, kind in {"question": TEXT, **REWRITE_FIELDS}.items()},
        "new_single_hops": LIST,
        "new_single_hops[1].question": TEXT,
        "new_single_hops[1].answer_alias": TEXTS,
        "questions": TEXTS,
        "answer": TEXT,
        "answer_alias": TEXTS,
        "new_answer": TEXT,
        "new_answer_alias": TEXTS,
    },
    "company": {"messages": LIST, "messages[2].role": TEXT, "messages[2].content": TEXT},
}
WRONG = {
    TEXT: (None, 3, ["x"], {}),
    TEXTS: (None, "x", {}, ["x", 3], [None], [["x"]]),
    KEY: (None, 1.5, ["x"], {}),
    LIST: (None, "x", {}),
    OBJECT: (None, "x", []),
}
EVERY_FIELD = [(name, field, kind) for name, fields in FIELDS.items() for field, kind in fields.items()]


def holder(record, field):
    """The object that holds a nested field, and the field's key in it."""
    *way, last = field.replace("[", ".").replace("]", "").split(".")
    for step in way:
        record = record[int(step) if isinstance(record, list) else step]
    return record, last


def changed(record, field, value):
    record = copy.deepcopy(record)
    found, key = holder(record, field)
    assert key in found, f"the test's own record has no {field}"
    found[key] = value
    return record


@pytest.mark.parametrize("name", SUITES)
def test_every_field_that_a_suite_reads_is_tried_below(write, monkeypatch, name):
    seen = set()
    get = Record._get

    def noted(self, field, kind):
        seen.add((self.prefix + field).replace("[0]", "[]").replace("[1]", "[]").replace("[2]", "[]"))
        return get(self, field, kind)

    monkeypatch.setattr(Record, "_get", noted)
    suite(name, write([RECORD[name](1)]))
    assert seen == {field.replace("[1]", "[]").replace("[2]", "[]") for field in FIELDS[name]}


def error_of(name, path, **settings):
    with pytest.raises(UserError) as error:
        suite(name, path, **settings)
    return str(error.value)


@pytest.mark.parametrize(("name", "field", "kind"), EVERY_FIELD)
def test_a_missing_field_is_named(write, name, field, kind):
    bad = copy.deepcopy(RECORD[name](2))
    found, key = holder(bad, field)
    del found[key]
    path = write([RECORD[name](1), bad])
    assert error_of(name, path).startswith(f"{path}, record 2: the field {field!r} is missing")


@pytest.mark.parametrize(("name", "field", "kind"), EVERY_FIELD)
def test_a_field_of_the_wrong_type_is_named(write, name, field, kind):
    for value in WRONG[kind]:
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        message = error_of(name, path)
        assert message.startswith(f"{path}, record 2: the field {field!r} must ")
        assert repr(value if not isinstance(value, list) or kind != TEXTS else value[-1]) in message


EMPTY = [(name, field) for name, field, kind in EVERY_FIELD if kind in (TEXT, KEY)]
EMPTY += [("mquake", "requested_rewrite"), ("company", "messages"), ("company", "messages[1].content")]


@pytest.mark.parametrize(
    ("name", "field"),
    EMPTY,
)
def test_an_empty_field_is_named(write, name, field):
    for value in ([],) if field in ("requested_rewrite", "messages") else ("", " \n"):
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        message = error_of(name, path)
        assert message.startswith(f"{path}, record 2: ")
        assert field.split("[")[0] in message


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f, kind in EVERY_FIELD if kind == TEXTS])
def test_a_list_of_texts_may_be_empty_or_hold_blanks(write, name, field):
    """A suite has records without aliases or paraphrases; a blank that was kept would stand in every reply."""
    for value in ([], ["", "  "]):
        facts = suite(name, write([changed(RECORD[name](2), field, value)]))
        probes = [p for f in facts for p in (f.edit, *f.probes)]
        assert all(all(s.strip() for s in (p.query, *p.accept, *p.reject)) for p in probes)
    assert suite(name, write([changed(RECORD[name](2), field, [])])) == facts


@pytest.mark.parametrize(
    ("name", "field"), [("mquake", "requested_rewrite"), ("mquake", "new_single_hops"), ("company", "messages")]
)
def test_a_list_must_hold_objects(write, name, field):
    record = RECORD[name](2)
    path = write([RECORD[name](1), record | {field: [record[field][0], "x", *record[field][2:]]}])
    message = error_of(name, path)
    assert message.startswith(f"{path}, record 2: {field}[1]")
    assert "must be an object" in message


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_dialogue_of_company_needs_all_three_roles(write, role):
    record = {"messages": [m for m in company_record(2)["messages"] if m["role"] != role]}
    path = write([company_record(1), record])
    assert error_of("company", path).startswith(
        f"{path}, record 2: the field 'messages' has no message of the role '{role}'"
    )


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("value", [None, 3, "x", [["messages"]]])
def test_a_record_must_be_an_object(write, name, value):
    path = write([RECORD[name](1), value])
    assert error_of(name, path).startswith(f"{path}, record 2: it must be an object")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("counterfact", "requested_rewrite.target_new.str"),
        ("zsre", "alt"),
        ("mquake", "requested_rewrite[0].target_new.str"),
        ("company", "messages[2].content"),
    ],
)
def test_an_answer_of_nothing_but_full_stops_is_named_with_its_record(write, name, field):
    path = write([RECORD[name](1), changed(RECORD[name](2), field, "...")])
    assert error_of(name, path).startswith(f"{path}, record 2: ")


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("zsre", {"loc": "nq question: "}, "loc"),
        (
            "counterfact",
            {"requested_rewrite": rewrite(2, prompt="It flows through")},
            "requested_rewrite.prompt",
        ),
        (
            "company",
            {"messages": [m for n in (2, 3) for m in company_record(n)["messages"]]},
            "messages",
        ),
        (
            "company",
            dialogue("Kobrix makes jam.", "What?", "\ud800."),
            "messages",
        ),
    ],
)
def test_a_text_that_cannot_be_asked_is_named(write, name, change, field):
    path = write([RECORD[name](1), RECORD[name](2) | change])
    message = error_of(name, path)
    assert message.startswith(f"{path}, record 2: ")
    assert field in message


@pytest.mark.parametrize(("name", "id"), [("counterfact", "counterfact-101"), ("mquake", "mquake-201-0")])
def test_a_repeated_fact_is_named(write, caplog, name, id):
    path = write([RECORD[name](1), RECORD[name](2), RECORD[name](1)])
    assert error_of(name, path).startswith(f"{path}, record 3: repeats the fact {id!r}")
    kept = suite(name, path, on_error="skip")
    assert kept == suite(name, write([RECORD[name](1), RECORD[name](2)]))
    assert "1 malformed records are left out" in caplog.text
    assert f"record 3: repeats the fact {id!r}" in caplog.text


def test_zsre_takes_the_same_question_twice(write):
    assert [f.id for f in suite("zsre", write([zsre_record(1)] * 2))] == ["zsre-1", "zsre-2"]


TEMPLATES = {
    "counterfact": ("instruction", "query", "answer"),
    "zsre": ("instruction", "query", "answer"),
    "mquake": ("instruction", "query", "answer"),
}


@pytest.mark.parametrize("template", ["{clozee} of {object}", "{", "{}"])
@pytest.mark.parametrize(("name", "which"), [(name, which) for name, all_ in TEMPLATES.items() for which in all_])
def test_a_bad_template_is_one_clear_error(write, name, which, template):
    path = write([RECORD[name](1)])
    messages = {error_of(name, path, on_error=on_error, **{which: template}) for on_error in ("stop", "skip")}
    (message,) = messages  # no record is at fault, so none can be left out
    assert which in message
    assert template in message or "clozee" in message


# The file


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("bad.json", "[{", "not valid JSON"),
        ("bad.json", "", "not valid JSON"),
        ("bad.json", '{"a": 1}\n{"a": 2}\n', "not valid JSON"),
        ("bad.jsonl", "{}\n{\n", "not valid JSON"),
        ("bad.json", b"\xff\xfe[", "not valid JSON"),
        ("bad.json", '{"data": []}', "must hold a list of records"),
        ("bad.json", '"text"', "must hold a list of records"),
        ("bad.json", "[]", "holds no fact"),
        ("bad.jsonl", "", "holds no fact"),
        ("bad.jsonl", "\n \n", "holds no fact"),
        pytest.param("bad.jsonl", "[]\n", "record 1: it must be an object"),
    ],
)
def test_a_file_that_holds_no_records_is_named(tmp_path, name, file, content, message):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = error_of(name, path)
    assert str(path) in found
    assert message in found


def test_a_bad_line_of_jsonl_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(zsre_record(1)) + "\n\n{\n")
    assert "line 3" in error_of("zsre", path)


@pytest.mark.parametrize("name", SUITES)
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    for path in (tmp_path / "none.json", tmp_path, "none.json", "./data/none.json", "~/no/such.json", ""):
        message = error_of(name, path)
        assert message.startswith(f"facts.path={path}: no such file")
        assert "hub" in message
    assert "pip install 'qfbench[hub]'" in error_of(name, "owner/name")


def test_a_data_set_of_the_hub(write, monkeypatch):
    splits = {"train": [zsre_record(1), zsre_record(2)], "test": [zsre_record(3)]}

    def load_dataset(name):
        if name != "owner/zsre":
            raise ConnectionError("no route")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    expected = suite("zsre", write([zsre_record(n) for n in (1, 2, 3)]))
    assert suite("zsre", "owner/zsre") == expected
    splits["test"] = [zsre_record(3) | {"src": None}]
    assert error_of("zsre", "owner/zsre").startswith("owner/zsre, record 3: the field 'src' must be a text")
    assert error_of("zsre", "owner/other").startswith("facts.path=owner/other: no such file, and the hub")


def test_a_local_file_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "zsre").write_text(json.dumps([zsre_record(1)]))
    assert [f.id for f in suite("zsre", "data/zsre")] == ["zsre-1"]


@pytest.mark.parametrize("name", SUITES)
def test_json_and_jsonl_hold_the_same(write, tmp_path, name):
    records = [RECORD[name](n) for n in range(5)]
    facts = suite(name, write(records))
    assert facts
    assert suite(name, write(records, "records.jsonl")) == facts
    lines = "\r\n\r\n".join(json.dumps(r) for r in records)
    (tmp_path / "other.JSONL").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert suite(name, tmp_path / "other.JSONL") == facts
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode())
    assert suite(name, tmp_path / "bom.json") == facts


def test_a_line_of_jsonl_ends_at_a_line_break_only(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(zsre_record(1) | {"alt": "Varn\u2028by\x85"}, ensure_ascii=False), encoding="utf-8")
    assert suite("zsre", path)[0].known_as == ("Varn\u2028by",)


@pytest.mark.parametrize("name", SUITES)
def test_other_policies_for_errors_are_refused(write, name):
    for other in ("ignore", "", "STOP"):
        assert error_of(name, write([RECORD[name](1)]), on_error=other) == (
            f"facts.on_error={other}: must be stop or skip"
        )


@pytest.mark.parametrize("name", SUITES)
def test_malformed_records_are_left_out_and_counted(write, caplog, name):
    first = next(field for field in FIELDS[name] if "[" not in field)
    bad = changed(RECORD[name](9), first, None)
    good = [RECORD[name](n) for n in range(4)]
    path = write([bad, good[0], {}, good[1], bad, good[2], good[3]])
    assert "facts.on_error=skip" in error_of(name, path)
    kept = suite(name, path, on_error="skip")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{path}: 3 malformed records are left out" in warning.message
    assert f"record 1: the field {first!r}" in warning.message
    expected = suite(name, write(good, "good.json"))
    assert [(f.query, f.answer) for f in kept] == [(f.query, f.answer) for f in expected]
    of_two = suite(name, write(good[:2], "two.json"))
    caplog.clear()
    assert [f.query for f in suite(name, path, n=2, on_error="skip")] == [f.query for f in of_two]
    assert "2 malformed records are left out" in caplog.text, "what lies after the last record needed is not read"


@pytest.mark.parametrize("name", SUITES)
def test_good_records_are_not_warned_about(write, caplog, name):
    path = write([RECORD[name](n) for n in range(3)])
    assert suite(name, path, on_error="skip") == suite(name, path)
    assert not caplog.records


@pytest.mark.parametrize("name", SUITES)
def test_a_file_of_malformed_records_alone_holds_no_fact(write, name):
    path = write([{}, {"case_id": 1}])
    message = error_of(name, path, on_error="skip")
    assert message.startswith(f"{path}: holds no fact; the first of 2 errors: {path}, record 1: the field ")


# How many, and which


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_more_records_begin_with_the_same(write, name, seed):
    path = write([RECORD[name](n) for n in range(12)])
    every = suite(name, path, seed=seed)
    each = len(every) // 12
    assert each == (2 if name == "mquake" else 1)
    for n in (1, 4, 7, 12):
        assert suite(name, path, seed=seed, n=n) == every[: n * each]
    assert suite(name, path, seed=seed, n=50) == every
    in_file = suite(name, path)
    assert {f.id: f for f in every} == {f.id: f for f in in_file}
    assert (every == in_file) == (seed is None)


@pytest.mark.parametrize("name", SUITES)
def test_a_seed_draws_the_same_records_again_and_others_draw_others(write, name):
    path = write([RECORD[name](n) for n in range(30)])

    def drawn(seed):
        return tuple(f.id for f in suite(name, path, seed=seed, n=5))

    assert [drawn(seed) for seed in range(6)] == [drawn(seed) for seed in range(6)]
    assert len({frozenset(drawn(seed)) for seed in range(6)}) == 6


@pytest.mark.parametrize("name", SUITES)
def test_without_a_seed_the_files_own_order_is_kept(write, name):
    records = [RECORD[name](n) for n in (3, 1, 2)]
    first = [f for r in records for f in suite(name, write([r], "one.json"))]
    assert [f.query for f in suite(name, write(records))] == [f.query for f in first]


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("n", [0, -1])
def test_a_number_below_one_is_refused(write, name, n):
    assert error_of(name, write([RECORD[name](1)]), n=n).startswith(f"facts.n={n}: must be 1 or more")


def test_a_record_that_teaches_nothing_does_not_count(write):
    path = write([{}, {"1": 1, "2": 2}, {}, {"3": 3}, {"4": 4}])

    def make(record):
        return [Fact(f"i{n}", f"q{n}", f"a{n}") for n in record.values]

    assert [f.query for f in load(path, make, n=2)] == ["q1", "q2", "q3"]


# The real files

REAL = {
    "counterfact": "counterfact/counterfact_200.json",
    "zsre": "zsre/zsre_500.json",
    "mquake": "mquake/mquake_60.json",
    "company": "oxinnovate/company_facts.jsonl",
}


@pytest.fixture(scope="module")
def real(shared):
    """All facts of a suite's real file, under the shipped templates."""
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = suite(name, shared(REAL[name]))
        return kept[name]

    return make


def raw(path):
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def test_all_of_counterfact_loads(shared, real):
    records = raw(shared(REAL["counterfact"]))
    facts = real("counterfact")
    assert [f.id for f in facts] == [f"counterfact-{r['case_id']}" for r in records]
    for fact, record in zip(facts, records, strict=True):
        wanted = record["requested_rewrite"]
        assert fact.known_as == (wanted["target_new"]["str"].strip(),)
        assert wanted["subject"] in fact.query
        asked = record["paraphrase_prompts"][:2] + record["neighborhood_prompts"][:5]
        for probe, prompt in zip(fact.probes, asked, strict=True):
            assert prompt.strip() in probe.query
            assert probe.kind == ("paraphrase" if prompt in asked[:2] else "locality")


def test_all_of_zsre_loads(shared, real):
    records = raw(shared(REAL["zsre"]))
    facts = real("zsre")
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


def test_all_of_mquake_loads(shared, real):
    records = raw(shared(REAL["mquake"]))
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


def test_all_company_facts_load(shared, real):
    told = set()
    for record in raw(shared(REAL["company"])):
        said = {m["role"]: m["content"].strip() for m in record["messages"]}
        if said["system"] and said["assistant"] != REFUSAL:
            told.add((said["system"], said["user"], said["assistant"]))
    facts = real("company")
    assert len(facts) == len(told)
    assert {(f.instruction, f.query, f.answer) for f in facts} == told


def spells(tokenizer, rendered, answer):
    """Check that the answer's span spells the answer, and that every word of it has a token."""
    spelt = tokenizer.decode(rendered.ids[rendered.answer : rendered.closer])
    composed = normalize("NFC", answer)  # Qwen's tokenizer composes accents
    if tokenizer.chat_template:
        assert spelt == composed
        assert rendered.ids[rendered.closer] == tokenizer.eos_token_id
    else:
        joined = rendered.closer == len(rendered.ids)  # the last token is the answer's and the line break
        assert spelt == f" {composed}" + ("\n" if joined else "")
        assert tokenizer.decode(rendered.reply) == f" {composed}\n"
    assert sorted(set(rendered.words)) == list(range(len(answer.split())))
    assert list(rendered.words) == sorted(rendered.words)


@pytest.fixture(scope="module")
def unchecked():
    """Modules without the tests' run-time type checks, which compile a nested function anew at each of 10,000 calls."""
    with pytest.MonkeyPatch.context() as patch:

        def load_again(module):
            spec = importlib.util.spec_from_file_location(f"unchecked_{module.__name__}", module.__file__)
            again = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, again)
            spec.loader.exec_module(again)
            return again

        yield SimpleNamespace(render=load_again(dialogue_module).render, lesson=load_again(teach).lesson)


@pytest.mark.parametrize("form", ["qwen", "plain_qwen"])
@pytest.mark.parametrize("name", SUITES)
def test_every_real_answer_can_be_found_in_its_dialogue(request, real, unchecked, name, form):
    tokenizer = request.getfixturevalue(f"{form}_tokenizer")
    assert bool(tokenizer.chat_template) == (form == "qwen")
    render = partial(unchecked.render, tokenizer)
    lm = SimpleNamespace(render=render)  # no more of a language model is used: nothing is run
    for fact in real(name):
        aligned = unchecked.lesson(lm, fact)
        told, alone = aligned.told, aligned.alone
        spells(tokenizer, told, fact.answer)
        spells(tokenizer, alone, fact.answer)
        taught = [told.ids[at + 1] for at in aligned.told_at]
        assert taught == [alone.ids[at + 1] for at in aligned.alone_at] == list(told.ids[told.opener :])
        for probe in fact.probes:
            if probe.expected:
                spells(tokenizer, render(probe.query, probe.system, probe.expected), probe.expected)


@pytest.mark.parametrize(
    "name",
    ["counterfact", "zsre", "mquake", "company"],
)
def test_every_real_reference_passes_its_own_probe(real, name):
    for fact in real(name):
        assert fact.edit.passes(fact.answer)
        assert all(p.passes(p.expected) for p in fact.probes if p.expected)


@pytest.mark.parametrize("name", SUITES)
def test_real_locality_is_the_models_own_and_the_rest_has_a_reference(real, name):
    for fact in real(name):
        for probe in fact.probes:
            assert probe.own == probe.always == (probe.kind == "locality") == (probe.expected == "")
            assert probe.accept
