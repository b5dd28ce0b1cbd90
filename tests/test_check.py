"""`qfbench-facts`: a suite seen without a model."""

import json

import pytest

from qfbench import UserError
from qfbench.facts.check import check, main


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
