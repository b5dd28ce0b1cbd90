"""A record that is wrong is named with its file and field, or left out, in every published suite."""

import copy
import json
import logging

import pytest
from test_company import company_record, dialogue
from test_counterfact import rewrite
from test_suites import RECORD, SUITES

from qfbench.facts.records import Record

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
        **dict.fromkeys(("src", "alt", "rephrase", "loc", "loc_ans"), TEXT),
        "answers": TEXTS,
    },
    "mquake": {
        "case_id": KEY,
        "requested_rewrite": LIST,
        **{f"requested_rewrite[1].{field}": kind for field, kind in {"question": TEXT, **REWRITE_FIELDS}.items()},
        "new_single_hops": LIST,
        "new_single_hops[1].question": TEXT,
        "new_single_hops[1].answer": TEXT,
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
OPTIONAL = ("new_single_hops[1].answer",)
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
def test_every_field_that_a_suite_reads_is_tried_below(suite, write, monkeypatch, name):
    seen = set()
    get = Record._get

    def noted(self, field, kind):
        seen.add((self.prefix + field).replace("[0]", "[]").replace("[1]", "[]").replace("[2]", "[]"))
        return get(self, field, kind)

    monkeypatch.setattr(Record, "_get", noted)
    suite(name, write([RECORD[name](1)]))
    assert seen == {field.replace("[1]", "[]").replace("[2]", "[]") for field in FIELDS[name]}


@pytest.mark.parametrize(("name", "field", "kind"), [f for f in EVERY_FIELD if f[1] not in OPTIONAL])
def test_a_missing_field_is_named(error_of, write, name, field, kind):
    bad = copy.deepcopy(RECORD[name](2))
    found, key = holder(bad, field)
    del found[key]
    path = write([RECORD[name](1), bad])
    assert error_of(name, path).startswith(f"{path}, record 2: the field {field!r} is missing")


@pytest.mark.parametrize(("name", "field", "kind"), EVERY_FIELD)
def test_a_field_of_the_wrong_type_is_named(error_of, write, name, field, kind):
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
def test_an_empty_field_is_named(error_of, write, name, field):
    for value in ([],) if field in ("requested_rewrite", "messages") else ("", " \n"):
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        message = error_of(name, path)
        assert message.startswith(f"{path}, record 2: ")
        assert field.split("[")[0] in message


BROKEN = {
    "\u200b\ufeff": "is empty but for",
    "\u3164": "is empty but for",
    "\u2060 \u00ad": "is empty but for",
    "x\ud800": "holds half a surrogate pair",
    "x\x00": "holds the control character",
    "\x1bx": "holds the control character",
}


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f, kind in EVERY_FIELD if kind in (TEXT, KEY)])
def test_what_is_no_text_is_named(error_of, write, name, field):
    for value, what in BROKEN.items():
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        assert error_of(name, path).startswith(f"{path}, record 2: the field {field!r} {what}")


LINES = ("prompt", "subject", "paraphrase_prompts", "neighborhood_prompts")  # clozes: they are put on one line


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f, kind in EVERY_FIELD if kind in (TEXT, TEXTS)])
def test_a_line_break_is_refused_but_in_a_cloze(suite, error_of, write, name, field):
    found, key = holder(copy.deepcopy(RECORD[name](2)), field)
    text = found[key] if isinstance(found[key], str) else "Ab"
    for broken in (f"{text}\nand", f"{text}\r\nand"):
        value = broken if isinstance(found[key], str) else ["x", broken]
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        if field.rpartition(".")[2] in LINES:
            facts = suite(name, path)
            assert not any("\n" in text for f in facts for p in (f.edit, *f.probes) for text in (p.query, p.expected))
        else:
            assert error_of(name, path).startswith(f"{path}, record 2: the field '{field}")
            assert "holds a line break" in error_of(name, path)


@pytest.mark.parametrize("name", SUITES)
def test_what_no_suite_reads_must_be_json_all_the_same(error_of, tmp_path, name):
    for form in ("json", "jsonl"):
        path = tmp_path / f"records.{form}"
        for more, field, what in (
            ('"own": 1, "own": 1', "own", "stands twice in one object"),
            ('"own": [{"a": {"b": 2, "b": 2}}]', "own[0].a.b", "stands twice in one object"),
            ('"own": [1, NaN]', "own[1]", "is nan"),
            ('"own": -Infinity', "own", "is -inf"),
            ('"own": 1e999', "own", "is inf"),
            (f'"own": {"9" * 5000}', "own", "is inf"),
            ('"own": {"x": "\\udc00"}', "own.x", "holds half a surrogate pair"),
            ('"own": {"\\ud800": 1}', "own.\ud800", "has a name that holds half a surrogate pair"),
            (f'"own": {"[" * 99}{"]" * 99}', "own" + "[0]" * 50, "is nested too deeply"),
        ):
            first, second = json.dumps(RECORD[name](1)), json.dumps(RECORD[name](2))[:-1] + f", {more}}}"
            path.write_text(f"{first}\n{second}\n" if form == "jsonl" else f"[{first}, {second}]", encoding="utf-8")
            assert error_of(name, path).startswith(f"{path}, record 2: the field {field!r} {what}")


@pytest.mark.parametrize("name", SUITES)
def test_white_space_around_texts_is_taken_off_and_said(suite, write, caplog, name):
    fields = [f for n, f, kind in EVERY_FIELD if n == name and kind == TEXT]
    record = RECORD[name](1)
    for field in fields:
        found, key = holder(record, field)
        found[key] = f" {found[key]}\u00a0\n"
    facts = suite(name, write([RECORD[name](0), record]))
    (warning,) = caplog.messages
    assert f"white space is taken off the ends of {len(fields)} texts; the first: record 2, '" in warning
    caplog.clear()
    assert facts == suite(name, write([RECORD[name](0), RECORD[name](1)]))
    assert not caplog.messages


@pytest.mark.parametrize("name", ["counterfact", "zsre", "company"])
def test_a_query_is_taught_once(suite, error_of, write, caplog, name):
    """MQuAKE's own rule is in its test."""
    answer = {"counterfact": "requested_rewrite.target_new.str", "zsre": "alt", "company": "messages[2].content"}[name]
    other = changed(RECORD[name](1), answer, "Elmstad")
    again = changed(RECORD[name](1), answer, "  VARNBY" if name != "company" else "kobrix 1 makes\u00a0jam")
    for record in (other, again):
        record |= {"case_id": 900} if "case_id" in record else {}
    first = suite(name, write([RECORD[name](0), RECORD[name](1)]))[1].id
    for record, what in ((other, "'Elmstad"), (again, "again: the same query")):
        path = write([RECORD[name](0), RECORD[name](1), RECORD[name](3), record, RECORD[name](4)])
        message = error_of(name, path)
        assert message.startswith(f"{path}, record 4: ")
        for part in (what, f"{first!r}", "record 2", "facts.on_conflict=keep", "facts.on_error=skip"):
            assert part in message
        caplog.clear()
        assert len(suite(name, path, on_error="skip")) == 4
        assert "1 records are left out" in caplog.text
        caplog.clear()
        assert len(suite(name, path, on_conflict="keep")) == 5
        assert "1 facts repeat or contradict another and are kept; the first: " in caplog.text


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f, kind in EVERY_FIELD if kind == TEXTS])
def test_a_list_of_texts_may_be_empty_but_hold_no_blanks(suite, error_of, write, name, field):
    """A suite has records without aliases or paraphrases; a blank that was kept would stand in every reply."""
    assert suite(name, write([changed(RECORD[name](2), field, [])]))
    for value in (["x", ""], ["x", "  "], ["x", "\u200b\ufeff"], ["x", "\ud800"], ["x", "a\x00"]):
        path = write([RECORD[name](1), changed(RECORD[name](2), field, value)])
        assert error_of(name, path).startswith(f"{path}, record 2: the field '{field}[1]' ")


@pytest.mark.parametrize(
    ("name", "field"), [("mquake", "requested_rewrite"), ("mquake", "new_single_hops"), ("company", "messages")]
)
def test_a_list_must_hold_objects(error_of, write, name, field):
    record = RECORD[name](2)
    path = write([RECORD[name](1), record | {field: [record[field][0], "x", *record[field][2:]]}])
    message = error_of(name, path)
    assert message.startswith(f"{path}, record 2: {field}[1]")
    assert "must be an object" in message


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("value", [None, 3, "x", [["messages"]]])
def test_a_record_must_be_an_object(error_of, write, name, value):
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
def test_an_answer_of_nothing_but_full_stops_is_named_with_its_record(error_of, write, name, field):
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
def test_a_text_that_cannot_be_asked_is_named(error_of, write, name, change, field):
    path = write([RECORD[name](1), RECORD[name](2) | change])
    message = error_of(name, path)
    assert message.startswith(f"{path}, record 2: ")
    assert field in message


@pytest.mark.parametrize(("name", "id"), [("counterfact", "counterfact-101"), ("mquake", "mquake-201-0")])
def test_a_repeated_fact_is_named(suite, error_of, write, caplog, name, id):
    path = write([RECORD[name](1), RECORD[name](2), RECORD[name](1)])
    assert error_of(name, path).startswith(f"{path}, record 3: repeats the fact {id!r}")
    kept = suite(name, path, on_error="skip")
    assert kept == suite(name, write([RECORD[name](1), RECORD[name](2)]))
    assert "1 records are left out" in caplog.text
    assert f"record 3: repeats the fact {id!r}" in caplog.text


TEMPLATES = {
    "counterfact": ("instruction", "query", "answer"),
    "zsre": ("instruction", "query", "answer"),
    "mquake": ("instruction", "query", "answer"),
}


@pytest.mark.parametrize("template", ["{clozee} of {object}", "{", "{}"])
@pytest.mark.parametrize(("name", "which"), [(name, which) for name, all_ in TEMPLATES.items() for which in all_])
def test_a_bad_template_is_one_clear_error(error_of, write, name, which, template):
    path = write([RECORD[name](1)])
    messages = {error_of(name, path, on_error=on_error, **{which: template}) for on_error in ("stop", "skip")}
    (message,) = messages  # no record is at fault, so none can be left out
    assert which in message
    assert template in message or "clozee" in message


NEEDED = {"instruction": "{object}", "answer": "{object}"}


@pytest.mark.parametrize(("name", "which"), [(name, which) for name, all_ in TEMPLATES.items() for which in all_])
def test_a_template_without_what_it_is_for_is_refused(suite, error_of, write, name, which):
    """An answer without {object} would teach every fact the same; a query without its question would ask nothing."""
    path = write([RECORD[name](1)])
    needed = NEEDED.get(which, "{cloze}" if name == "counterfact" else "{question}")
    for template in ("Say it.", "", needed.strip("{}"), f"{{{needed}}}"):
        for on_error in ("stop", "skip"):
            message = error_of(name, path, on_error=on_error, **{which: template})
            assert message == f"facts.{which}={template!r}: must hold {needed}"
    assert suite(name, path, **{which: f"So: {needed}"})
    if which != "query":
        return
    assert "not a template" in error_of(name, path, query=needed + "{object}")  # which would give the answer away


@pytest.mark.parametrize("name", SUITES)
def test_other_policies_for_errors_are_refused(error_of, write, name):
    for other in ("ignore", "", "STOP"):
        assert error_of(name, write([RECORD[name](1)]), on_error=other) == (
            f"facts.on_error={other}: must be stop or skip"
        )
    for other in ("skip", "", "KEEP"):
        message = error_of(name, write([RECORD[name](1)]), on_conflict=other)
        assert message == f"facts.on_conflict={other}: must be stop or keep"


@pytest.mark.parametrize("name", SUITES)
def test_malformed_records_are_left_out_and_counted(suite, error_of, write, caplog, name):
    first = next(field for field in FIELDS[name] if "[" not in field)
    bad = changed(RECORD[name](9), first, None)
    good = [RECORD[name](n) for n in range(4)]
    path = write([bad, good[0], {}, good[1], bad, good[2], good[3]])
    assert "facts.on_error=skip" in error_of(name, path)
    kept = suite(name, path, on_error="skip")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{path}: 3 records are left out" in warning.message
    assert f"record 1: the field {first!r}" in warning.message
    expected = suite(name, write(good, "good.json"))
    assert [(f.query, f.answer) for f in kept] == [(f.query, f.answer) for f in expected]
    of_two = suite(name, write(good[:2], "two.json"))
    caplog.clear()
    assert [f.query for f in suite(name, path, n=2, on_error="skip")] == [f.query for f in of_two]
    assert "2 records are left out" in caplog.text, "what lies after the last record needed is not read"


@pytest.mark.parametrize("name", SUITES)
def test_good_records_are_not_warned_about(suite, write, caplog, name):
    path = write([RECORD[name](n) for n in range(3)])
    assert suite(name, path, on_error="skip") == suite(name, path)
    assert not caplog.records


@pytest.mark.parametrize("name", SUITES)
def test_a_file_of_malformed_records_alone_holds_no_fact(error_of, write, name):
    path = write([{}, {"case_id": 1}])
    message = error_of(name, path, on_error="skip")
    assert message.startswith(f"{path}: holds no fact; the first of 2 errors: {path}, record 1: the field ")
