"""`qfbench-facts`: a suite seen without a model."""

import io
import json

import pytest

from qfbench import UserError
from qfbench.commands.facts import check, main


def said(query, answer):
    roles = {"system": "Kobrix makes jam.", "user": query, "assistant": answer}
    return [{"role": role, "content": content} for role, content in roles.items()]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "company.jsonl"
    lines = [{"messages": said(f"What does Kobrix {n} make?", f"Jam {n}.")} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_all_of_a_file_is_counted_and_the_first_fact_shown(path):
    shown = check("company", f"facts.path={path}")
    assert shown.startswith("30 facts\nprobes: edit 30\n")  # more than the 20 that a run takes by default
    assert "told      Kobrix makes jam." in shown
    assert "right if it has: Jam 0" in shown
    assert check("company", f"facts.path={path}", "facts.n=3").startswith("3 facts")
    assert "portability" in check("world", "edits=8")


def test_what_is_wrong_is_said_in_one_line(path, monkeypatch, capsys):
    path.write_text(path.read_text() + "\n{}")
    with pytest.raises(UserError, match=r"record 31: the field 'messages' is missing"):
        check("company", f"facts.path={path}")
    for words, message in ((["company"], "facts.path is needed"), (["nosuch"], "facts/nosuch")):
        monkeypatch.setattr("sys.argv", ["qfbench-facts", *words])
        with pytest.raises(SystemExit, match="2"):
            main()
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


ANSWER = "Łódź 🙂 东京"


def facts_file(tmp_path):
    path = tmp_path / "facts.jsonl"
    record = {"instruction": "i", "query": "Where?", "answer": ANSWER}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "\\u0141\\xf3d\\u017a \\U0001f642"), ("utf-8", ANSWER)])
def test_a_terminal_that_lacks_letters_shows_their_numbers(tmp_path, monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    monkeypatch.setattr("sys.argv", ["qfbench-facts", "table", f"facts.path={facts_file(tmp_path)}"])
    main()
    assert shown in written.getvalue().decode(encoding)


HELD = json.dumps({"instruction": "i", "query": "Who?", "answer": "Qi."})


@pytest.mark.parametrize(
    ("suite", "name", "content"),
    [
        ("table", "a.jsonl", b""),
        ("table", "a.jsonl", HELD.encode("utf-16")),
        ("table", "a.jsonl", b'{"id": ' + b"1" * 5000 + b"}"),
        ("table", "a.jsonl", b"[" * 200_000),
        ("table", "a.jsonl", b'{"id": ' + b"[" * 500 + b"]" * 500 + b"}"),
        ("table", "a.jsonl", f'{{"\\ud800": 1, {HELD[1:]}'.encode()),
        ("table", "a.csv", b""),
        ("table", "a.csv", b'instruction,query,answer\na,b,"c\nd,e,f\n'),
        ("table", "a.csv", b"instruction,query,answer,answer\na,b,c,d\n"),
        ("table", "a.csv", b"instruction,query,answer,\na,b,c,d\n"),
        ("table", "a.csv", b"instruction;query;answer\na;b;c\n"),
        ("table", "a.csv", b"instruction,query,answer\na,b\x00,c\n"),
        ("table", "a.csv", b"instruction,query,answer,significance\na,b,c,high\n"),
        ("table", "a.csv", b"instruction,query,answer,significance\na,b,c,nan\n"),
        ("table", "a.csv", "instruction,query,answer\na,\u200b,c\n".encode()),
        ("table", "x" * 300 + ".jsonl", None),
        ("table", "~nosuchuser/a.jsonl", None),
        ("zsre", "a.json", b'[{"src": NaN}]'),
        ("zsre", "a.json", b'[{"src": ' + b"9" * 5000 + b"}]"),
        ("zsre", "a.json", b'[{"src": {"a": 1, "a": 1}}]'),
        ("mquake", "x" * 300 + "/a.json", None),
        ("company", "a.jsonl", b'{"messages": [{"role": "user"}, "\\udfff"]}'),
    ],
)
def test_no_file_ends_in_more_than_a_line(tmp_path, monkeypatch, capsys, suite, name, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sys.argv", ["qfbench-facts", suite, f"facts.path='{name}'"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith((f"qfbench-facts: {name[:20]}", f"qfbench-facts: facts.path={name[:20]}"))


def test_the_inputs_that_went_wrong_end_in_one_line(shared, monkeypatch, capsys):
    cases = shared("cases/facts.json")
    for case in json.loads(cases.read_text(encoding="utf-8")):
        path = cases.parent / "facts" / case["file"]
        monkeypatch.setattr("sys.argv", ["qfbench-facts", case["suite"], f"facts.path={path}", *case["overrides"]])
        with pytest.raises(SystemExit, match="2"):
            main()
        error = capsys.readouterr().err
        assert (error.count("\n"), str(path) in error) == (1, True), case
    for name in ("chinese", "nfd", "long"):
        assert check("table", f"facts.path={cases.parent / 'facts' / name}.jsonl").startswith("1 facts")
