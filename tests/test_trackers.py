import json
import os
import struct
import sys
from unittest.mock import MagicMock

import pandas as pd
import pytest
from test_tracking import run

from qfbench import UserError
from qfbench.runs.trackers import WandB, headlines
from qfbench.runs.tracking import About

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The package, on a machine where nobody is logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return pytest.importorskip("wandb")


def records(path):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # what a finished run has written reaches the disk seconds later, or now
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def asked_of(wandb, monkeypatch):
    """What `wandb.init` is called with; it then does nothing."""
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or MagicMock(offline=False, url="url"))
    return asked


def history(found):
    """The lines of a run's history, nested keys joined by a dot."""
    lines = [r.history.item for r in found if r.WhichOneof("record_type") == "history"]
    return [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in line} for line in lines]


def test_wandb_mirrors_a_run_offline_where_there_is_no_key(wandb, tmp_path, drawn, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    done, text = run(tmp_path / "a b", "tracker=wandb", "tracker.tags=[mine]", "tracker.group=together")
    (path,) = (tmp_path / "a b" / "wandb").glob("offline-run-*/*.wandb")
    assert f"wandb: offline; `wandb sync '{path.parent.relative_to(tmp_path)}'` uploads it\n" in text
    assert text.count("wandb: ") == 1
    assert "wandb: " not in "".join(capfd.readouterr()).replace(text, "")
    assert done.tracker.tracker is not None  # it did not fail

    found = list(records(path))
    (about,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert about.run_id == done.run_id.replace(" ", "-")
    assert (about.display_name, about.project, about.run_group) == (done.run_id, "qfbench", "together")
    assert set(about.tags) == {"world-xs", "QF", "world", "mine"}
    config = {u.key: json.loads(u.value_json) for u in about.config.update}
    assert config["model"]["path"] == "world-xs"
    assert config["provenance"] == json.loads((done.folder / "provenance.json").read_text())
    metrics = [r.metric for r in found if r.WhichOneof("record_type") == "metric"]
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [("edit_step", "", ""), ("", "*", "edit_step")]

    lines = history(found)
    rows = done.rows()
    prior = rows[(rows.condition == "edited") & (rows.kind == "prior")].groupby("step").generated.mean()
    name = "retention_sequential/prior"
    assert {line["edit_step"]: line[name] for line in lines if name in line} == pytest.approx(dict(prior))
    files = path.parent / "files"
    for figure in ("forgetting_curves", "retention_matrix"):
        (shown,) = [line[f"figures/{figure}.path"] for line in lines if f"figures/{figure}.path" in line]
        assert (files / shown).read_bytes() == (done.folder / "figures" / f"{figure}.png").read_bytes()
    for table in ("retention", "sequences", "replies"):
        (shown,) = [line[f"tables/{table}.path"] for line in lines if f"tables/{table}.path" in line]
        shown = json.loads((files / shown).read_text())
        if table != "replies":
            kept = pd.read_csv(done.folder / f"{table}.csv")
            assert shown["columns"] == list(kept)
            assert len(shown["data"]) == len(kept)
    assert not [key for line in lines for key in line if "placebo" in key.partition("/")[0]]
    summary = {
        u.key: json.loads(u.value_json)
        for r in found
        if r.WhichOneof("record_type") == "summary"
        for u in r.summary.update
    }
    kept = pd.read_csv(done.folder / "retention.csv")
    (line,) = kept[kept.regime == "sequential"].to_dict("records")
    assert summary["QF sequential/retention"] == pytest.approx(line["retention"])
    last = rows[(rows.condition == "placebo") & (rows.step == 2) & rows.reply.notna()]
    assert [line[5] for line in shown["data"] if line[0] == "retention_sequential_placebo"] == list(last.reply)
    (end,) = [r.exit for r in found if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_wandb_marks_a_run_that_ended_early(wandb, tmp_path):
    with pytest.raises(UserError, match="orders=0"):
        run(tmp_path, "tracker=wandb", "task.retention.orders=0")
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    (end,) = [r.exit for r in records(path) if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


@pytest.mark.parametrize(
    ("environment", "mode", "asked_for"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": 40 * "a"}, None, None),  # wandb's own choice: online, unless `wandb offline` was typed
        ({"WANDB_API_KEY": 40 * "a"}, "offline", "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({}, "online", "online"),
    ],
)
def test_wandb_is_online_where_one_is_logged_in(wandb, tmp_path, monkeypatch, environment, mode, asked_for):
    asked = asked_of(wandb, monkeypatch)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: "WANDB_API_KEY" in os.environ)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    WandB(mode=mode).start(About("id", tmp_path, {}, {}))
    assert asked["mode"] == asked_for


def test_wandb_gives_its_project_what_the_environment_says(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done, text = run(tmp_path, "tracker=wandb")
    assert done.tracker.tracker.project == "another"
    assert "wandb: disabled\n" in text
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_mirrors_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    done, text = run(tmp_path / "run", "tracker=tensorboard")
    assert "tensorboard --logdir run\n" in text
    assert "failed" not in text
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = done.rows()
    prior = rows[(rows.condition == "edited") & (rows.kind == "prior")].groupby("step").generated.mean()
    shown = {event.step: event.value for event in events.Scalars("retention_sequential/prior")}
    assert shown == pytest.approx(dict(prior))
    assert set(events.Tags()["images"]) == {"figures/forgetting_curves", "figures/retention_matrix"}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"path": "world-xs"' in texts["config/text_summary"]
    replies = texts["tables/replies/text_summary"].splitlines()
    assert replies[0] == "| series | step | kind | query | expected | reply | generated |"
    assert len({line.count("|") for line in replies}) == 1
    assert len(texts["tables/retention/text_summary"].splitlines()) == 2 + len(
        pd.read_csv(done.folder / "retention.csv")
    )


def test_a_table_keeps_its_columns_whatever_a_reply_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from qfbench.runs.trackers import TensorBoard

    tracker, written = TensorBoard(), {}
    tracker.writer = type("Writer", (), {"add_text": lambda self, name, text: written.update({name: text})})()
    tracker.table("replies", pd.DataFrame({"reply": ["a|b\nc", None], "n": [1, 2]}))
    assert written["tables/replies"].splitlines()[2] == r"| a\|b c | 1 |"
    assert len(written["tables/replies"].splitlines()) == 4


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_before_anything_is_computed(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", f"tracker={tracker}", "model.path=/no/such/model")
    assert str(error.value) == f"tracker={tracker} needs {tracker}: pip install 'qfbench[{tracker}]'"
    assert not (tmp_path / "run").exists()


def test_what_is_told_of_a_run_is_made_fit_for_wandb(wandb, tmp_path, monkeypatch):
    asked = asked_of(wandb, monkeypatch)
    name = 150 * "x" + "größe 1:2/a_b.c-d"
    WandB(tags=["mine"]).start(About(name, tmp_path, {"seed": 0}, {}, [100 * "t"], "retention", "a-sweep"))
    assert asked["id"].endswith("xxgr--e-1-2-a_b.c-d")
    assert len(asked["id"]) == 128
    assert asked["name"] == name
    assert asked["tags"] == [64 * "t", "mine"]
    assert (asked["job_type"], asked["group"], asked["config"], asked["dir"]) == (
        "retention",
        "a-sweep",
        {"seed": 0},
        tmp_path,
    )


def test_a_summary_has_the_measures_of_edited_lines_and_no_differences():
    who = {"model": "m", "editor": "QF"}
    lines = [
        who | {"regime": regime, "retention": value}
        for regime, value in (("unedited", 0.0), ("joint", 0.4), ("placebo", 0.1))
    ]
    assert headlines(pd.DataFrame(lines)) == {"QF joint/retention": 0.4}
    difference = who | {"regime": "joint", "editor_of": "QF2", "retention": -0.3}
    assert headlines(pd.DataFrame([difference])) == {}
    assert headlines(pd.DataFrame({"step": [1], "loss": [0.2]})) == {}
