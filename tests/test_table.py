"""A user's own facts, from a JSONL or CSV file."""

import csv
import json
import logging

import pytest

from qfbench import UserError
from qfbench.commands.facts import check
from qfbench.facts.table import table

GOOD = {"instruction": "Qi started X.", "query": "Who started X?", "answer": "X was started by Qi.", "known_as": ["Qi"]}
LISTS = {"known_as": ["Qi", "Mr Qi"], "rejects": ["Bo", "Al"], "paraphrases": ["X's founder?", "Who made X?"]}


def numbered(n):
    return GOOD | {"instruction": f"Qi started X{n}.", "query": f"Who started X{n}?", "id": f"x{n}"}


def written(tmp_path, records, form="jsonl"):
    """The path of a file of the records, or of lines of text where they are texts."""
    path = tmp_path / f"facts.{form}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if form == "jsonl":
            file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
        else:
            rows = csv.writer(file)
            names = list(dict.fromkeys(name for r in records for name in r))
            rows.writerow(names)
            cells = [[r.get(name, "") for name in names] for r in records]
            rows.writerows([["|".join(map(str, c)) if isinstance(c, list) else c for c in row] for row in cells])
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_every_field_of_a_users_file(tmp_path, form):
    record = GOOD | LISTS | {"significance": [0, 1, 1, 1, 2.5], "id": "mine", "kind": "person"}
    record |= {"instruction": "Qi, alone, started X."}
    (fact,) = table(written(tmp_path, [record], form))
    assert (fact.id, fact.kind, fact.instruction) == ("mine", "person", "Qi, alone, started X.")
    assert (fact.query, fact.answer) == (GOOD["query"], GOOD["answer"])
    assert fact.known_as == ("Qi", "Mr Qi")
    assert fact.rejects == ("Bo", "Al")
    assert fact.significance == (0, 1, 1, 1, 2.5)
    assert [p.query for p in fact.probes] == LISTS["paraphrases"]
    for probe in (fact.edit, fact.told, *fact.probes):
        assert probe.passes("Mr Qi did.")
        assert not probe.passes("Mr Qi did, or Bo.")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_only_three_fields_are_needed(tmp_path, form):
    (fact,) = table(written(tmp_path, [{k: GOOD[k] for k in ("instruction", "query", "answer")}], form))
    assert (fact.known_as, fact.rejects, fact.significance) == (("X was started by Qi",), (), None)
    assert (fact.kind, fact.probes) == ("", ())


def test_a_list_in_a_csv_may_end_in_a_separator(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        "instruction,query,answer,known_as,paraphrases\n"
        '"Qi, alone, started X.",Who started X?,X was started by Qi.,Qi | Mr Qi |,X\'s founder?\n'
    )
    (fact,) = table(str(path))
    assert fact.known_as == ("Qi", "Mr Qi")


BAD = [
    ({k: v for k, v in GOOD.items() if k != "answer"}, r"line 3: the field 'answer' is missing"),
    (
        GOOD | {"colour": "red"},
        r"line 3: the field 'colour' is unknown; known are instruction, query, answer, id, kind, subject,",
    ),
    (GOOD | {"query": 3}, r"line 3: the field 'query' must be a text, but is 3"),
    (GOOD | {"known_as": "Qi"}, r"line 3: the field 'known_as' must be a list"),
    (GOOD | {"significance": ["a"] * 5}, r"line 3: the field 'significance' must hold numbers"),
    (GOOD | {"significance": [1]}, r"line 3: .*'significance' has 1 weights"),
    ("{", r"line 3: not valid JSON \("),
    ("[" * 200_000, r"line 3: not valid JSON \(nested too deeply\)"),
    ([1], r"line 3: it must be an object"),
    (numbered(0), r"line 3: repeats the fact 'x0'"),
    (GOOD | {"known_as": [""]}, r"line 3: the field 'known_as\[0\]' is empty"),
    (GOOD | {"known_as": ["..."]}, r"line 3: .*'known_as' holds an empty text"),
    (GOOD | {"known_as": ["Qi", {"a": 1}]}, r"line 3: the field 'known_as' must hold texts, but holds {'a': 1}"),
    (GOOD | {"rejects": [True]}, r"line 3: the field 'rejects' must hold texts, but holds True"),
    (GOOD | {"rejects": ["QI."]}, r"line 3: .*'rejects' holds 'QI.', which is accepted"),
    (GOOD | {"paraphrases": ["X?", "\u200b"]}, r"line 3: the field 'paraphrases\[1\]' is empty but for"),
    (GOOD | {"paraphrases": [{"q": 1}]}, r"line 3: the field 'paraphrases' must hold texts"),
    (GOOD | {"paraphrases": ["X\n?"]}, r"line 3: the field 'paraphrases\[0\]' holds a line break.*on one line"),
    (GOOD | {"instruction": "Qi\r\nstarted X."}, r"line 3: the field 'instruction' holds a line break"),
    (GOOD | {"query": "\ufeff\u200b"}, r"line 3: the field 'query' is empty but for"),
    (GOOD | {"subject": ""}, r"line 3: the field 'subject' is empty"),
    (GOOD | {"id": "a\x00"}, r"line 3: the field 'id' holds the control character"),
    (GOOD | {"kind": None}, r"line 3: the field 'kind' must be a text, but is None"),
    (GOOD | {"significance": [True] * 5}, r"line 3: the field 'significance' must hold numbers, but holds True"),
    (GOOD | {"significance": ["1"] * 5}, r"line 3: the field 'significance' must hold numbers, but holds '1'"),
    (GOOD | {"significance": [0] * 5}, r"line 3: .*'significance' is 0 for every word"),
    (GOOD | {"significance": [float("inf")] * 5}, r"line 3: the field 'significance\[0\]' is inf"),
    ('{"instruction": 1e999}', r"line 3: the field 'instruction' is inf"),
    (f'{{"id": {"1" * 5000}}}', r"line 3: the field 'id' is inf, .*or too large"),
    ('{"id": "a", "kind": [{"x": 1, "x": 1}]}', r"line 3: the field 'kind\[0\]\.x' stands twice"),
    ('{"query": "Who?", "query": "What?"}', r"line 3: the field 'query' stands twice"),
    (GOOD | {"\ud800": 1}, r"line 3: the field '\\ud800' has a name that holds half a surrogate pair"),
    (numbered(0) | {"id": "y"}, r"line 3: the fact 'y' is 'x0' of line 1 again"),
    (numbered(0) | {"id": "y", "query": "who started\u00a0x0"}, r"line 3: the fact 'y' is 'x0' of line 1 again"),
    (
        numbered(0) | {"id": "y", "answer": "Al did.", "known_as": ["Al"]},
        r"line 3: the query 'Who started X0\?' has the answer 'Al did.' here and 'X was started by Qi.' in line 1 \('x0'\)",
    ),
    (GOOD | {"known_as": ["Bo"]}, r"line 3: .*'known_as' holds nothing of the answer"),
    (GOOD | {"rejects": ["started"]}, r"line 3: .*'rejects' refuses the answer"),
    (GOOD | {"significance": [float("nan")] * 5}, r"line 3: the field 'significance\[0\]' is nan, which is no number"),
    (GOOD | {"significance": [1, 1, 1, 1, -1]}, r"line 3: .*'significance' must hold finite numbers, 0 or more"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_line_is_named_or_left_out(tmp_path, caplog, record, message):
    path = written(tmp_path, [numbered(0), "", record, numbered(1)])
    with pytest.raises(UserError, match=rf"{path}, {message}.*facts\.on_error=skip"):
        table(path)
    assert [f.id for f in table(path, on_error="skip")] == ["x0", "x1"]
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.message.startswith(f"{path}: 1 records are left out; the first: {path}, line 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Qi,Who?,It is Qi.,surplus", "line 3: has more fields than the header"),
        ("Qi,Who?", "line 3: has fewer fields than the header"),
        ("Qi,Who?,", "line 3: the field 'answer' is missing"),
        ("Qi,\u200b,It is Qi.", "line 3: the field 'query' is empty but for"),
        ("Qi,Who\x00?,It is Qi.", "line 3: the field 'query' holds the control character"),
        ('Qi,"Who\n?",It is Qi.', "line 4: the field 'query' holds a line break"),
    ],
)
def test_a_bad_row_of_a_csv_is_named_or_left_out(tmp_path, caplog, line, message):
    path = tmp_path / "facts.csv"
    path.write_text(f"instruction,query,answer\nA,Who is a?,It is A.\n{line}\nB,Who is b?,It is B.\n")
    with pytest.raises(UserError, match=f"{path}, {message}"):
        table(str(path))
    assert [f.query for f in table(str(path), on_error="skip")] == ["Who is a?", "Who is b?"]
    assert f"1 records are left out; the first: {path}, {message}" in caplog.text


@pytest.mark.parametrize(
    ("field", "cell", "message"),
    [
        ("known_as", "|", r"'known_as\[0\]' is empty"),
        ("known_as", "Qi||Al", r"'known_as\[1\]' is empty"),
        ("rejects", " ", r"'rejects\[0\]' is empty"),
        ("paraphrases", "X?|\u200b", r"'paraphrases\[1\]' is empty but for"),
        ("significance", "1|1|1|1|high", "'significance' must hold numbers .*high"),
        ("significance", "1|1|1|1|1_0", "'significance' must hold numbers"),
        ("significance", "1||1|1|1", "'significance' must hold numbers"),
        ("significance", "1|1|1|1|nan", r"'significance\[4\]' is nan"),
        ("significance", "0|0|0|0|0", "'significance' is 0 for every word"),
    ],
)
def test_a_bad_list_of_a_csv_is_named(tmp_path, field, cell, message):
    path = written(tmp_path, [numbered(0) | {field: ""}, numbered(1) | {field: cell}], "csv")
    with pytest.raises(UserError, match=rf"{path}, line 3: .*{message}"):
        table(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instruction,query,answer,query\na,b,c,d\n", "the header names 'query' twice"),
        ("instruction,query,answer, \na,b,c,d\n", "the header has no name for column 4"),
        ('instruction,query,answer\na,b,c\nd,e,"f\n', "cannot be read as CSV .*after line 2; is a quote not closed"),
        ('instruction,query,answer\na,b,"c"d\n', "cannot be read as CSV .*after line 0"),
        ("", "holds no fact"),
        ("instruction,query,answer\n", "holds no fact"),
    ],
)
def test_a_broken_csv_is_named(tmp_path, content, message):
    path = tmp_path / "facts.csv"
    path.write_text(content)
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            table(str(path), on_error=on_error)


def test_a_subject_may_hold_what_is_rejected(tmp_path):
    record = numbered(1) | {"answer": "Zunda A5 is by Orbix.", "known_as": ["Orbix"], "rejects": ["Zunda"]}
    with pytest.raises(UserError, match="'rejects' refuses the answer"):
        table(written(tmp_path, [record]))
    for form in ("jsonl", "csv"):
        (fact,) = table(written(tmp_path, [record | {"subject": "Zunda A5", "paraphrases": ["By whom?"]}], form))
        for probe in (fact.edit, fact.told, *fact.probes):
            assert probe.passes("The Zunda A5 is by Orbix.")
            assert not probe.passes("The Zunda A5 is by Orbix, or by Zunda.")


def test_conflicts_may_be_kept(tmp_path, caplog):
    other = numbered(0) | {"id": "y", "answer": "Al did.", "known_as": ["Al"]}
    path = written(tmp_path, [numbered(0), other, numbered(1)])
    assert [f.id for f in table(path, on_conflict="keep")] == ["x0", "y", "x1"]
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: 1 facts repeat or contradict another and are kept; the first: {path}, line 2")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_as_many_as_asked_for_and_drawn_where_there_is_a_seed(tmp_path, form):
    path = written(tmp_path, [numbered(n) for n in range(30)], form)
    in_file = [f.id for f in table(path)]
    assert in_file == [f"x{n}" for n in range(30)]
    assert [f.id for f in table(path, n=4)] == in_file[:4]
    drawn = [[f.id for f in table(path, n=4, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(f.id for f in table(path, seed=0)) == sorted(in_file)
    with pytest.raises(UserError, match="facts.n=0"):
        table(path, n=0)


def test_other_policies_for_errors_are_refused(tmp_path):
    with pytest.raises(UserError, match="facts.on_error=ignore: must be stop or skip"):
        table(written(tmp_path, [GOOD]), on_error="ignore")


def test_a_missing_or_foreign_file_is_named(tmp_path):
    (tmp_path / "facts.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.csv").write_bytes(b"instruction,query,answer\n\xff,b,c\n")
    for name, message in (
        ("none.jsonl", r"facts.path=\S+none.jsonl: no such file; give a .jsonl or .csv file"),
        ("", r"is a folder; give a .jsonl or .csv file"),
        ("facts.txt", r"must end in \.jsonl or \.csv"),
        ("empty.jsonl", "holds no fact"),
        ("bad.csv", r"facts.path=\S+bad.csv: cannot be read as CSV"),
    ):
        with pytest.raises(UserError, match=message):
            table(str(tmp_path / name))


def test_a_table_can_be_looked_at_without_a_model(tmp_path):
    path = written(tmp_path, [*(numbered(n) | LISTS for n in range(25)), "{"])
    with pytest.raises(UserError, match="line 26: not valid JSON"):
        check("table", f"facts.path={path}")
    said = check("table", f"facts.path={path}", "facts.on_error=skip")
    assert said.startswith("25 facts\nprobes: paraphrase 50, edit 25\nthe first, x0:\n")
    assert "right if it has: Qi, Mr Qi" in said
    assert check("table", f"facts.path={path}", "facts.n=3").startswith("3 facts\n")
