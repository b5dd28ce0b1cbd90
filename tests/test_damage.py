"""What is damaged in a run's folder is found and named, and measured again; it never becomes a number."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_kill import NAME, kept, killed_at_row, plain, quick, settings, start, tabled, without  # noqa: F401 (fixtures)

from qfbench import UserError
from qfbench.commands.execution import execute
from qfbench.models import sealed
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.pages import results
from qfbench.runs.ledger import Ledger
from qfbench.runs.store import ParquetStore

SPOILT = {
    "a bit": lambda data: bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 4, *data[len(data) // 2 + 1 :]]),
    "cut short": lambda data: data[: len(data) * 2 // 3],
    "emptied": lambda data: b"",
    "{}": lambda data: b"{}",
    "[]": lambda data: b"[]",
    "null": lambda data: b"null",
    "a digit": lambda data: data.replace(b"1", b"2", 1).replace(b"0", b"9", 1),
}


def said(cfg, folder):
    console = Console(record=True, width=300)
    return execute(copy.deepcopy(cfg), folder, console, brief=True), console.export_text()


def begun(cfg, tmp_path):
    """A finished run, and one that was killed in the midst of its first sequence, after a commit."""
    whole, broken_off = (tmp_path / name / NAME for name in ("whole", "killed"))
    with without(tables=False), pytest.MonkeyPatch.context() as patched:
        start(cfg, whole)
        killed_at_row(cfg, broken_off, patched, lambda row: row.get("condition") == "edited" and row["step"] == 3)
    assert list(broken_off.glob("state/*"))
    return whole, broken_off


@pytest.fixture(scope="module")
def few():
    """Where all is measured again, a little is enough."""
    cfg = settings(orders=1, placebo=1)
    del cfg.regime.single, cfg.regime.protected
    return cfg


@pytest.fixture(scope="module")
def begun_few(few, tmp_path_factory):
    return begun(few, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def begun_plain(plain, tmp_path_factory):  # noqa: F811
    return begun(plain, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def whole(tmp_path, begun_plain, quick):  # noqa: F811
    return shutil.copytree(begun_plain[0], tmp_path / "whole" / NAME)


@pytest.fixture
def broken_off(tmp_path, begun_plain, quick):  # noqa: F811
    return shutil.copytree(begun_plain[1], tmp_path / "killed" / NAME)


@pytest.mark.parametrize("name", ["rows.parquet", "progress.json", "provenance.json", "checksums.json"])
def test_a_damaged_file_is_named_and_all_is_measured_again(tmp_path, few, begun_few, quick, name):  # noqa: F811
    """In one of the two runs each, so that both have every damage to some file, and some damage to every file."""
    for n, (how, spoil) in enumerate(SPOILT.items()):
        run = begun_few[(n + len(name)) % 2]
        folder = shutil.copytree(run, tmp_path / f"copy{n}" / NAME)
        spoilt = spoil((folder / name).read_bytes())
        (folder / name).write_bytes(spoilt)
        if json_of(spoilt) == json_of((run / name).read_bytes()):
            continue  # nothing is changed but white space
        done, text = said(few, folder)
        assert done is not None, how
        assert f"damaged: {name}" in text, how
        assert kept(folder) == kept(begun_few[0]), how
        if name != "checksums.json":
            assert (folder / f"{name}.damaged").read_bytes() == spoilt, how
        if how == "a bit":
            assert said(few, folder)[0] is None  # and is finished now


def json_of(data):
    try:
        return json.loads(data)
    except ValueError:
        return data


@pytest.mark.parametrize("name", ["rows.parquet", "progress.json", "provenance.json"])
def test_a_file_that_is_gone_is_named_and_all_is_measured_again(tmp_path, few, begun_few, quick, name):  # noqa: F811
    folder = shutil.copytree(begun_few[1], tmp_path / NAME)
    (folder / name).unlink()
    assert f"damaged: {name}" in said(few, folder)[1]
    assert kept(folder) == kept(begun_few[0])


def test_a_run_whose_settings_are_damaged_is_refused_as_it_is(plain, whole):  # noqa: F811
    sound = (whole / "config.yaml").read_bytes()
    for how, spoil in SPOILT.items():
        (whole / "config.yaml").write_bytes(spoil(sound))
        before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        with pytest.raises(
            UserError, match=r"config.yaml: is damaged, so that nobody knows .*; give another hydra.run.dir, or rer"
        ):
            start(plain, whole)
        assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before, how


@pytest.mark.parametrize("how", [None, "a bit", "cut short", "emptied"])
def test_a_sequence_whose_state_is_damaged_or_gone_is_measured_again(plain, whole, broken_off, how):  # noqa: F811
    (state,) = broken_off.glob("state/*")
    if how is None:
        state.unlink()
    else:
        state.write_bytes(SPOILT[how](state.read_bytes()))
    text = said(plain, broken_off)[1]
    assert f"{state}: " in text
    assert "sequential is measured again" in text
    assert kept(broken_off) == kept(whole)


@pytest.mark.parametrize("bits", [6, pytest.param(80, marks=pytest.mark.slow)])
def test_any_one_bit_of_what_a_run_goes_on_from_is_found(tmp_path, plain, whole, broken_off, bits):  # noqa: F811
    """Rows are the same as those of the unbroken run, whichever bit is turned."""
    draw = random.Random(bits)
    for n in range(bits):
        folder = shutil.copytree(broken_off, tmp_path / f"copy{n}" / NAME)
        path = draw.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size])
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            start(plain, folder)
        except UserError as error:
            assert path.name == "config.yaml", error
        else:
            assert kept(folder) == kept(whole), path


def test_results_of_a_damaged_run_are_refused(whole):
    assert len(results.rows_of(whole))
    for name in ("rows.parquet", "config.yaml", "provenance.json", "progress.json"):
        data = (whole / name).read_bytes()
        (whole / name).write_bytes(SPOILT["a bit"](data))
        with pytest.raises(UserError, match=f"{name}: is damaged or gone"):
            results.rows_of(whole)
        (whole / name).write_bytes(data)
    assert len(results.rows_of(whole))


def test_a_table_that_was_changed_is_not_printed_as_the_runs_own(tmp_path, plain, tabled):  # noqa: F811
    folder = tmp_path / NAME
    start(plain, folder)
    (folder / "retention.csv").write_text((folder / "retention.csv").read_text().replace("0.", "9."))
    console = Console(record=True, width=300)
    assert execute(copy.deepcopy(plain), folder, console) is None
    text = console.export_text()
    assert "retention.csv is not as the run wrote it; qfbench-results makes it of the rows" in text
    assert "measured already" in text


def test_finished_is_said_once_at_the_end(tmp_path, plain, quick, monkeypatch):  # noqa: F811
    told, real = [], ParquetStore.commit

    def commit(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        told.append(json.loads((tmp_path / NAME / "progress.json").read_text())["finished"])
        return done

    monkeypatch.setattr(ParquetStore, "commit", commit)
    start(plain, tmp_path / NAME)
    assert len(told) > 5
    assert told == [False] * (len(told) - 1) + [True]


def test_a_ledger_knows_the_last_two_versions_of_a_file(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.write_text("a.txt", "one")
    first = (tmp_path / "a.txt").read_bytes()
    assert ledger.write_text("a.txt", "two")
    assert Ledger(tmp_path).damaged("a.txt", "never.txt") == []
    (tmp_path / "a.txt").write_bytes(first)  # killed before the second was put in place
    again = Ledger(tmp_path)
    assert again.damaged("a.txt") == []
    assert again.write_text("a.txt", "three")
    (tmp_path / "a.txt").write_bytes(b"two")
    assert Ledger(tmp_path).damaged("a.txt", "never.txt") == ["a.txt"]
    (tmp_path / "checksums.json").write_text("null")
    assert Ledger(tmp_path).damaged("a.txt") == ["checksums.json"]


def test_a_ledger_that_cannot_write_says_so_and_keeps_what_was_there(tmp_path):
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    ledger = Ledger(tmp_path)
    assert ledger.write_text("a.txt", "one")
    assert not ledger.write("a.txt", full)
    assert (tmp_path / "a.txt").read_text() == "one"
    assert Ledger(tmp_path).damaged("a.txt") == []


def test_a_change_of_weights_that_finds_no_room_is_written_when_there_is_some(tmp_path, plain, whole, monkeypatch):  # noqa: F811
    folder, real = tmp_path / "full" / NAME, WeightDelta.save

    def save(self, path, keys=False):
        if "deltas" in Path(path).parts:
            raise OSError(28, "No space left on device")
        real(self, path, keys)

    with monkeypatch.context() as patched:
        patched.setattr(WeightDelta, "save", save)
        with pytest.raises(
            UserError, match=r"deltas/.* cannot be written \(is the disk full\?\); start again once there is room"
        ):
            start(plain, folder)
    start(plain, folder)
    assert kept(folder) == kept(whole)


def test_a_change_of_weights_with_any_one_bit_turned_is_refused(tmp_path):
    path, draw = tmp_path / "delta.safetensors", random.Random(0)
    delta = WeightDelta({"w": LowRank(torch.randn(3, 2), torch.randn(2, 4))}, keys=[torch.randn(2, 4)])
    delta.save(path, keys=True)
    whole = path.read_bytes()
    assert torch.equal(WeightDelta.load(path).changes["w"].left, delta.changes["w"].left)
    harmless = 0
    for bit in draw.sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = WeightDelta.load(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # of the padding of the header, or its key: then nothing can be checked, and nothing is changed
            harmless += 1
            assert torch.equal(found.changes["w"].dense(), delta.changes["w"].dense())
    assert harmless < 40


def test_what_is_sealed_comes_back_as_it_was(tmp_path):
    tensors = {"a": torch.tensor(1.5), "b": torch.arange(6).reshape(2, 3).T, "c": torch.ones(2, dtype=torch.bfloat16)}
    sealed.save(tensors, tmp_path / "x.safetensors", {"step": "3", "who": "me"})
    found, about = sealed.load(tmp_path / "x.safetensors")
    assert about == {"step": "3", "who": "me"}
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    first = (tmp_path / "x.safetensors").read_bytes()
    sealed.save(tensors, tmp_path / "x.safetensors", {"who": "me", "step": "3"})
    assert (tmp_path / "x.safetensors").read_bytes() == first
