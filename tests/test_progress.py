"""How far a run is: in a log a line now and then, whose estimate counts what is asked, and not what was done before."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from notebook import prepared
from rich.console import Console

import qfbench.tasks.run
from qfbench.editors.regimes import sequential, single
from qfbench.tasks.baseline import baseline
from qfbench.tasks.teaching import Teaching


@pytest.fixture
def run(tmp_path):
    return prepared(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(qfbench.tasks.run, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def logged(run, clock, total, parts):
    """What a log shows of parts of work, each after so many seconds."""
    out = io.StringIO()
    with replace(run, console=Console(file=out, width=200), task="retention").progress(total) as advance:
        for seconds, *about in parts:
            clock.seconds += seconds
            advance(*about)
    return out.getvalue().splitlines()


def test_a_log_has_a_line_at_most_every_half_minute_and_knows_the_rest(run, clock):
    lines = logged(run, clock, 100, [(10, "edit 1", 10), (10, "edit 2", 10), (10, "edit 3", 30), (10, "edit 4", 30)])
    assert lines == ["retention: 50% done, about 0 minutes left (edit 3)"]
    clock.seconds = 0
    lines = logged(run, clock, 1000, [(60, f"edit {n}", 10) for n in range(2)])
    assert lines == [
        "retention: 1% done, about 99 minutes left (edit 0)",
        "retention: 2% done, about 98 minutes left (edit 1)",
    ]


def test_what_an_earlier_process_did_is_no_measure_of_the_pace(run, clock):
    lines = logged(run, clock, 100, [(0, "done before", 80, True), (60, "edit 9", 10)])
    assert lines == ["retention: 90% done, about 1 minutes left (edit 9)"]


@pytest.mark.parametrize("regime", [single, sequential])
def test_the_work_of_all_sequences_adds_up(run, regime):
    facts, always = baseline(run)
    told = []
    sequences = [Teaching(run, regime.__name__, regime, facts, always, {1, 3}, {"order": k}, placebo=2) for k in (0, 1)]
    for sequence in sequences:
        sequence.run(lambda text, work=1, before=False: told.append(work))
    assert sum(told) == sum(sequence.work for sequence in sequences) > 0
    told.clear()
    for sequence in sequences:  # they have ended
        sequence.run(lambda text, work=1, before=False: told.append((work, before)))
    assert told == [(sequence.work, True) for sequence in sequences]
