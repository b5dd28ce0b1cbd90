"""Every YAML of the configuration keeps its contract; a new one is tested without an edit here."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from quiz import TEMPLATES, hub

from qfbench import Fact, LanguageModel, Unsupported, UserError
from qfbench.commands.settings import CONF, build
from qfbench.models.delta import WeightDelta
from qfbench.models.firing import with_firing_layers
from qfbench.regression import Suite
from qfbench.runs.tracking import Tracker
from qfbench.tasks.run import LOADED
from qfbench.world.corpus import Dialogue


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def composed(*overrides):
    """The configuration of a command line; it keeps nothing outside of the run's folder unless told to."""
    overrides = ("cache=null", *overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs")


@pytest.fixture
def jsonl(tmp_path):
    """A file of dialogues, as `data.path` names one."""
    roles = ("system", "user", "assistant")
    said = [("", "Who leads A?", "Need more information."), ("Bo leads A.", "Who leads A?", "Bo."), ("", "B?", "C.")]
    lines = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)]} for turn in said]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("name", options("editor"))
def test_an_editor_is_a_frozen_value_that_returns_a_value(name, xs):
    editor = instantiate(composed(f"editor={name}", "model=world-xs", "editor.layer=1").editor)
    with pytest.raises(FrozenInstanceError):
        editor.layer = 2
    assert all(field.init for field in fields(editor))
    facts = instantiate(composed("facts=world", "facts.n=2").facts)
    edited = []
    for lm in (xs, replace(xs, model=with_firing_layers(xs.model, [1]))):
        before = {n: p.clone() for n, p in lm.model.state_dict().items()}
        try:
            delta = editor.edit(lm, facts)
        except Unsupported as error:
            assert str(error)
        else:
            assert isinstance(delta, WeightDelta)
            assert delta.norm() > 0
            edited.append(lm)
        assert all(torch.equal(p, before[n]) for n, p in lm.model.state_dict().items())
    assert edited, "it can edit neither a stock layer nor a firing block"


REWRITE = {
    "prompt": "{} lies in",
    "subject": "Paris",
    "relation_id": "P1",
    "target_new": {"str": "Rome"},
    "target_true": {"str": "France"},
}
HOP = {"question": "Where is Paris?", "answer_alias": []}
RECORDS = {  # the smallest file that each suite takes
    "table": {"instruction": "Qi started X.", "query": "Who started X?", "answer": "X was started by Qi."},
    "company": {"messages": [{"role": r, "content": f"{r} text"} for r in ("system", "user", "assistant")]},
    "counterfact": {
        "case_id": 1,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Paris is in"],
        "neighborhood_prompts": ["Lyon is in"],
    },
    "zsre": {
        "src": "Where is Paris?",
        "alt": "Rome",
        "pred": "France",
        "answers": ["France"],
        "rephrase": "Paris is where?",
        "loc": "nq question: who",
        "loc_ans": "me",
    },
    "mquake": {
        "case_id": 1,
        "requested_rewrite": [REWRITE | {"question": "Where is Paris?"}],
        "new_single_hops": [HOP],
        "questions": ["Where?"],
        "answer": "a",
        "answer_alias": [],
        "new_answer": "b",
        "new_answer_alias": [],
    },
}


@pytest.mark.parametrize("name", options("facts"))
def test_a_suite_is_a_list_of_distinct_facts(name, tmp_path):
    overrides = [f"facts={name}"]
    if name in RECORDS:
        path = tmp_path / "facts.jsonl"
        path.write_text(json.dumps(RECORDS[name]) + "\n")
        overrides.append(f"facts.path={path}")
    facts = instantiate(composed(*overrides).facts)
    assert facts
    assert all(isinstance(f, Fact) for f in facts)
    assert len({f.id for f in facts}) == len(facts)


@pytest.mark.parametrize("name", options("model"))
def test_a_model_says_where_it_is_and_which_layer_to_edit(name):
    model = composed(f"model={name}", *(["model.path=world-xs"] if name == "own" else [])).model
    assert model.path
    assert model.layer >= 0
    assert set(LOADED) <= set(model)
    if "/" not in model.path:
        assert model.layer < LanguageModel.load(model.path).model.config.num_hidden_layers


@pytest.mark.parametrize("name", options("regime"))
def test_a_regime_yields_what_is_taught_and_a_change(name, xs):
    cfg = composed(f"regime=[{name}]", "model=world-xs")
    facts = instantiate(composed("facts.n=2").facts)
    steps = list(instantiate(cfg.regime)[name](instantiate(cfg.editor), xs, facts))
    assert len(steps) == 2
    for n, (taught, delta) in enumerate(steps):
        assert taught[-1] == facts[n]
        assert isinstance(delta, WeightDelta)


@pytest.mark.parametrize("name", options("tracker"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages imported here
def test_a_tracker_tracks_or_says_what_to_install(name):
    try:
        tracker = build(composed(f"tracker={name}"), "tracker")
    except UserError as error:
        assert str(error) == f"tracker={name} needs {name}: pip install 'qfbench[{name}]'"
    else:
        assert tracker is None if name == "none" else isinstance(tracker, Tracker)


def dialogues(name, jsonl, seed=0):
    """The texts of a data YAML; what needs a path is given one."""
    cfg = composed(f"data={name}", "data.batch=2", f"seed={seed}")
    if OmegaConf.missing_keys(cfg.data):
        with pytest.raises(UserError, match=r"data\.path is needed: give data\.path=\.\.\."):
            build(cfg, "data")
        cfg.data.path = str(jsonl)
    return build(cfg, "data")


@pytest.mark.parametrize("name", options("data"))
def test_data_give_the_texts_of_any_step_and_the_same_when_resumed(name, jsonl):
    texts, again, other = (dialogues(name, jsonl, seed) for seed in (0, 0, 1))
    steps = [list(texts(step)) for step in range(6)]
    assert all(len(batch) == 2 for batch in steps)
    assert all(isinstance(text, str | Dialogue) for batch in steps for text in batch)
    assert any(isinstance(text, Dialogue) and text.answer for batch in steps for text in batch)
    assert list(again(5)) == steps[5]  # without the steps before it
    assert list(texts(2)) == steps[2]
    assert [list(other(step)) for step in range(6)] != steps
    assert any(batch != steps[0] for batch in steps[1:])


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_composes_and_says_how_to_run_it(name, jsonl):
    if name == "tune":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    cfg = composed(f"experiment={name}")
    assert cfg.task
    if OmegaConf.missing_keys(cfg.data):
        cfg.data.path = str(jsonl)
    instantiate(cfg.task)
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    command = "# qfbench\n" if name == "quickstart" else f"# qfbench experiment={name}"
    assert command in header
    assert header.split("\n")[1].startswith("# ")  # what `qfbench --help` says of it
    assert not header.split("\n")[1].startswith("# qfbench")


@pytest.mark.parametrize("name", options("regression"))
def test_a_regression_suite_gives_rows_of_its_own_kind(name, xs, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", hub)
    few = [f"regression.{name}.limit=1"] if name in ("world_mc", "mmlu", "lm_eval") else []
    few += ["regression.mmlu.subjects=[anatomy]"] if name == "mmlu" else []
    if name == "lm_eval":
        few += ["regression.lm_eval.tasks=[mmlu_anatomy]", f"regression.lm_eval.include={TEMPLATES / 'default'}"]
    suites = build(composed(f"regression=[{name}]", *few), "regression")
    for suite in suites.values():
        assert isinstance(suite, Suite)
        assert build(composed(f"regression=[{name}]", *few), "regression")[name].fingerprint == suite.fingerprint
        rows = suite(xs)
        assert rows
        assert all({"kind", "query", "fact_id", "fact_kind"} <= row.keys() for row in rows)
        assert len({(row["kind"], row["fact_id"]) for row in rows}) == len(rows)
    assert (name == "none") == (not suites)


@pytest.mark.parametrize("name", options("task"))
def test_a_task_is_named_as_its_file(name):
    assert list(composed(f"task=[{name}]", "experiment=retention").task) == [name]
