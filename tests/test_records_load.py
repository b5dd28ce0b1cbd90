"""The file that records are read from: its form, how many of them, and which."""

import json
import sys
from types import SimpleNamespace

import pytest
from test_suites import RECORD, SUITES
from test_zsre import zsre_record

from qfbench import Fact
from qfbench.facts.collection import collect


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("bad.json", "[{", "not valid JSON"),
        ("bad.json", "", "not valid JSON"),
        ("bad.json", '{"a": 1}\n{"a": 2}\n', "not valid JSON"),
        ("bad.jsonl", "{\n{}\n", "line 1: not valid JSON"),
        ("bad.json", b"\xff\xfe[", "cannot be read as text"),
        ("bad.jsonl", b"\xff\xfe[", "cannot be read as text"),
        ("bad.json", "[" * 200_000, "not valid JSON (nested too deeply)"),
        ("bad.jsonl", "[" * 200_000, "line 1: not valid JSON (nested too deeply)"),
        ("bad.json", '{"data": []}', "must hold a list of records"),
        ("bad.json", '"text"', "must hold a list of records"),
        ("bad.json", "[]", "holds no fact"),
        ("bad.jsonl", "", "holds no fact"),
        ("bad.jsonl", "\n \n", "holds no fact"),
        pytest.param("bad.jsonl", "[]\n", "record 1: it must be an object"),
    ],
)
def test_a_file_that_holds_no_records_is_named(error_of, tmp_path, name, file, content, message):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = error_of(name, path)
    assert str(path) in found
    assert message in found


def test_a_bad_line_of_jsonl_is_named(error_of, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(zsre_record(1)) + "\n\n{\n")
    assert "line 3" in error_of("zsre", path)


@pytest.mark.parametrize("name", SUITES)
def test_no_such_file(error_of, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    for path in (tmp_path / "none.json", "none.json", "./data/none.json", "~/no/such.json"):
        message = error_of(name, path)
        assert message.startswith(f"facts.path={path}: no such file")
        assert "hub" in message


@pytest.mark.parametrize("name", SUITES)
def test_a_folder_is_no_file_of_records(error_of, tmp_path, name):
    for path in (tmp_path, ""):
        assert error_of(name, path).startswith(f"facts.path={path}: is a folder; give a .json or .jsonl file")


def test_a_data_set_of_the_hub(suite, error_of, write, monkeypatch):
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


def test_a_local_file_comes_before_the_hub(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "zsre").write_text(json.dumps([zsre_record(1)]))
    assert [f.id for f in suite("zsre", "data/zsre")] == ["zsre-1"]


@pytest.mark.parametrize("name", SUITES)
def test_json_and_jsonl_hold_the_same(suite, write, tmp_path, name):
    records = [RECORD[name](n) for n in range(5)]
    facts = suite(name, write(records))
    assert facts
    assert suite(name, write(records, "records.jsonl")) == facts
    lines = "\r\n\r\n".join(json.dumps(r) for r in records)
    (tmp_path / "other.JSONL").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert suite(name, tmp_path / "other.JSONL") == facts
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode())
    assert suite(name, tmp_path / "bom.json") == facts


def test_a_line_of_jsonl_ends_at_a_line_break_only(suite, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(zsre_record(1) | {"alt": "Varn\u2028by\x85"}, ensure_ascii=False), encoding="utf-8")
    assert suite("zsre", path)[0].known_as == ("Varn\u2028by",)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_more_records_begin_with_the_same(suite, write, name, seed):
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
def test_a_seed_draws_the_same_records_again_and_others_draw_others(suite, write, name):
    path = write([RECORD[name](n) for n in range(30)])

    def drawn(seed):
        return tuple(f.id for f in suite(name, path, seed=seed, n=5))

    assert [drawn(seed) for seed in range(6)] == [drawn(seed) for seed in range(6)]
    assert len({frozenset(drawn(seed)) for seed in range(6)}) == 6


@pytest.mark.parametrize("name", SUITES)
def test_without_a_seed_the_files_own_order_is_kept(suite, write, name):
    records = [RECORD[name](n) for n in (3, 1, 2)]
    first = [f for r in records for f in suite(name, write([r], "one.json"))]
    assert [f.query for f in suite(name, write(records))] == [f.query for f in first]


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("n", [0, -1])
def test_a_number_below_one_is_refused(error_of, write, name, n):
    assert error_of(name, write([RECORD[name](1)]), n=n).startswith(f"facts.n={n}: must be 1 or more")


def test_a_record_that_teaches_nothing_does_not_count(write):
    path = write([{}, {"1": 1, "2": 2}, {}, {"3": 3}, {"4": 4}])

    def make(record):
        return [Fact(f"i{n}", f"q{n}", f"a{n}") for n in record.values]

    assert [f.query for f in collect(path, make, n=2)] == ["q1", "q2", "q3"]
