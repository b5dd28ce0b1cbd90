"""What unedited models answered is measured once."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from notebook import Note, prepared, suite
from test_run import run

from qfbench import Probe
from qfbench.editors.regimes import sequential
from qfbench.runs.cache import remembered
from qfbench.tasks.retention import retention

PROTOCOL = {"model_hash": "abc", "dtype": "float32", "batch_size": 4}
PROBES = [Probe("edit", "Who?", "Qi.", ("Qi",)), Probe("prior", "Where?", "North.", always=True)]
ROWS = [{"reply": "Łódź", "forced": math.nan, "preferred": None, "generated": True, "nll": 0.1 + 0.2, "n": 3}, {}]


@pytest.fixture
def ask(tmp_path):
    """`remembered` in one folder, and how often it has measured."""
    calls = []

    def remember(protocol=PROTOCOL, probes=PROBES, folder=tmp_path / "kept", rows=ROWS):
        found = remembered(folder, protocol, probes, lambda: calls.append(1) or rows)
        return found, len(calls)

    return remember


def test_the_same_is_measured_once_and_comes_back_as_it_was(ask):
    first, second = ask(), ask(dict(reversed(PROTOCOL.items())), [replace(p) for p in PROBES])
    assert (first[1], second[1]) == (1, 1)
    for rows, _ in (first, second):
        assert math.isnan(rows[0]["forced"])
        assert rows[0]["generated"] is True
        assert rows[0]["preferred"] is None
        assert {k: v for k, v in rows[0].items() if k != "forced"} == {
            k: v for k, v in ROWS[0].items() if k != "forced"
        }
        assert rows[1] == {}


@pytest.mark.parametrize("name", [*PROTOCOL, "another"])
def test_any_other_protocol_is_measured_anew(ask, name):
    ask()
    assert ask(PROTOCOL | {name: "other"})[1] == 2
    assert ask(PROTOCOL | {name: "other"})[1] == ask()[1] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "told"},
        {"query": "Who"},
        {"expected": "Qi"},
        {"accept": ("Qi", "Bo")},
        {"reject": ("Bo",)},
        {"system": "Qi did."},
        {"own": True},
        {"prefer": ("Qi.", "Bo.")},
    ],
)
def test_any_other_probe_is_measured_anew(ask, change):
    ask()
    assert ask(probes=[replace(PROBES[0], **change), PROBES[1]])[1] == 2
    assert ask()[1] == 2


def test_fewer_probes_or_another_order_of_them_are_measured_anew(ask):
    assert [ask(probes=probes)[1] for probes in (PROBES, PROBES[:1], PROBES[::-1], [])] == [1, 2, 3, 4]


def test_a_damaged_file_is_named_measured_anew_and_mended(ask, tmp_path, caplog):
    ask()
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    assert ask()[1] == 1
    broken = [b"", b"{}", b"[]", b"null", b'[{"reply": "Q', b"\xff\xfe", whole[:-1], whole + b" "]
    broken += [bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in range(len(whole))]  # any one bit
    for n, content in enumerate(broken, start=2):
        path.write_bytes(content)
        found, calls = ask()
        assert (found, calls) == (ROWS, n), content
        assert path.read_bytes() == whole
        assert f"{path} is damaged" in caplog.messages[-1]
    assert list((tmp_path / "kept").iterdir()) == [path]  # and nothing else is left there


def test_the_rows_of_another_question_are_not_taken_for_ones_own(ask, tmp_path):
    ask(), ask(probes=PROBES[:1], rows=[{"reply": "other"}])
    first, second = sorted((tmp_path / "kept").iterdir(), key=lambda path: len(path.read_bytes()))
    second.write_bytes(first.read_bytes())
    assert ask() == (ROWS, 3)


def test_without_a_folder_nothing_is_kept(ask, tmp_path):
    assert [ask(folder=None)[1] for _ in range(2)] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_what_fails_is_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        remembered(tmp_path, PROTOCOL, PROBES, lambda: [{"reply": 1 / 0}])
    assert remembered(tmp_path, PROTOCOL, PROBES, lambda: ROWS) is ROWS


@pytest.fixture
def asked(monkeypatch):
    """How many probes each unedited model has been asked."""
    from qfbench.tasks import run as module

    plain, calls = module.ask, []
    monkeypatch.setattr(module, "ask", lambda lm, probes: calls.append(len(probes)) or plain(lm, probes))
    return calls


def test_a_run_that_shares_its_cache_asks_the_unedited_model_nothing(tmp_path, asked):
    facts = [
        replace(
            f, probes=(*f.probes, Probe("locality", f"Where is Near{f.id}?", "", ("North",), always=True, own=True))
        )
        for f in suite()
    ]

    def rows(name, protocol=PROTOCOL, **setting):
        one = replace(prepared(tmp_path / name, **setting), facts=facts, cache=tmp_path / "kept", protocol=protocol)
        (tmp_path / name).mkdir()
        retention(one, {"sequential": sequential})
        return one.rows().drop(columns=["run_id"])

    first = rows("first")
    assert asked == [3, 15, 6]  # what neighbours are held against; all unedited; all told
    pd.testing.assert_frame_equal(rows("again"), first)
    layers = rows("layer", editor=Note(layer=1))
    assert set(layers.layer.dropna()) == {1}
    assert len(asked) == 3
    rows("other", PROTOCOL | {"model_hash": "abd"})
    assert len(asked) == 6


def test_the_jobs_of_a_sweep_reuse_what_a_real_model_answered(tmp_path, asked):
    def rows(name, *overrides):
        few = ("facts.n=2", "regression=[none]", "task.retention.placebo=0", f"cache={tmp_path / 'kept'}")
        return run(tmp_path / name, "experiment=retention", *few, *overrides)[0].store.frame().drop(columns="run_id")

    first = rows("first")
    assert asked == [0, *asked[1:]]  # no neighbours; all unedited; all told
    assert len(asked) == 3
    assert min(asked[1:]) > 5
    pd.testing.assert_frame_equal(rows("again"), first)
    other = rows("layer", "editor.layer=1")
    assert len(asked) == 3
    before = ["unedited", "in_context"]
    pd.testing.assert_frame_equal(*(f[f.condition.isin(before)].dropna(axis=1, how="all") for f in (first, other)))
