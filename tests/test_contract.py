"""Every YAML of the configuration keeps its contract; a new one is tested without an edit here."""

import json
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from quiz import TEMPLATES, hub

from qfbench import Fact, LanguageModel, Unsupported, UserError
from qfbench.commands.settings import CONF, build, check
from qfbench.editors import QF, QF2, FineTune
from qfbench.facts.world import world
from qfbench.models import lora
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.gguf import PACKAGED
from qfbench.regression import Suite
from qfbench.runs.tracking import Tracker
from qfbench.tasks.run import LOADED
from qfbench.world.corpus import Dialogue


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def composed(*overrides):
    """The configuration of a command line; unless told to it keeps nothing outside of the run's folder, and has one thread."""
    overrides = ("cache=null", "threads=1", *overrides)
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


BUILT_IN = ("world-xs", "world-s-qf2")  # a stock layer is edited, and a firing block


@pytest.fixture(scope="module")
def lessons():
    """The built-in models, each with facts of which it gives the answer when told: then there is something to teach."""
    found = {}
    for name in BUILT_IN:
        lm, facts = LanguageModel.load(name), world(8)
        replies = lm.replies([lm.render(fact.query, fact.instruction) for fact in facts])
        known = [fact for fact, reply in zip(facts, replies, strict=True) if fact.edit.passes(reply.text)]
        assert len(known) >= 3
        found[name] = lm, known[:3]
    return found


def nll(lm, facts):
    """Nats of the answers, alone."""
    return sum(sum(score.nll) for score in lm.score([lm.render(fact.query, "", fact.answer) for fact in facts]))


def check_editor(editors, lessons):
    """The first of the models that can be edited is taught: its answers cost less, on average. All are left as they were."""
    for (lm, facts), editor in zip(lessons.values(), editors, strict=True):
        before = {n: p.clone() for n, p in lm.model.state_dict().items()}
        try:
            delta = editor.edit(lm, facts)
        except Unsupported as error:
            assert str(error)
        else:
            assert isinstance(delta, WeightDelta)
            assert set(delta.changes) == {site.weight_name(lm.model) for site in editor.sites}
            assert bool(delta.changes) != bool(delta.told)
            untaught = nll(lm, facts)
            with delta.applied_to(lm):
                assert nll(lm, facts) < untaught, "it teaches nothing"
            return
        finally:
            assert all(torch.equal(p, before[n]) for n, p in lm.model.state_dict().items())
    raise AssertionError("it can edit neither a stock layer nor a firing block")


@pytest.fixture(scope="module")
def trained(lessons, tmp_path_factory):
    """The folder of an adapter of the first model that knows its facts, for an editor that needs a path."""
    lm, facts = lessons[BUILT_IN[0]]
    folder = tmp_path_factory.mktemp("adapter")
    lora.write(QF(1).edit(lm, facts), folder, lm.name)
    return str(folder)


@pytest.mark.parametrize("name", options("editor"))
def test_an_editor_is_a_frozen_value_that_teaches_and_leaves_the_model_alone(name, lessons, trained):
    each = [composed(f"editor={name}", f"model={model}") for model in BUILT_IN]
    for cfg in each:
        if OmegaConf.missing_keys(cfg.editor):
            cfg.editor.path = trained
        elif "layer" in cfg.editor:
            cfg.editor.layer = cfg.model.layer
    check(each[0])
    editors = [build(cfg, "editor") for cfg in each]
    with pytest.raises(FrozenInstanceError):
        editors[0].layer = 1
    assert all(field.init for field in fields(editors[0]))
    check_editor(editors, lessons)


@dataclass(frozen=True)
class Idle(FineTune):
    """Changes the right matrix by nothing."""

    def edit(self, lm, facts):
        name = self.sites[0].weight_name(lm.model)
        return WeightDelta({name: LowRank(torch.zeros_like(lm.model.get_parameter(name)))})


def test_an_editor_that_teaches_nothing_or_cannot_edit_is_noticed(lessons):
    with pytest.raises(AssertionError, match="it teaches nothing"):
        check_editor([Idle(1, 1.0, 1)] * 2, lessons)
    with pytest.raises(AssertionError, match="neither"):
        check_editor([QF2(1, 1.0)] * 2, lessons)


def sampled(group, name, place, conf=CONF):
    """The overrides by which an option reads the sample beside its YAML, NAME.sample.jsonl, if it has one."""
    path = conf / group / f"{name}.sample.jsonl"
    return [f"{place}.path={path}"] if path.exists() else []


def check_suite(name, conf=CONF):
    overrides = [f"hydra.searchpath=[file://{conf}]", f"facts={name}", *sampled("facts", name, "facts", conf)]
    facts = build(composed(*overrides), "facts")
    assert facts
    assert all(isinstance(f, Fact) for f in facts)
    assert len({f.id for f in facts}) == len(facts)


@pytest.mark.parametrize("name", options("facts"))
def test_a_suite_is_a_list_of_distinct_facts(name):
    check_suite(name)


def test_a_new_suite_is_tested_by_the_sample_beside_its_yaml(tmp_path):
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "new.yaml").write_text("_target_: qfbench.facts.table.table\npath: ???\n")
    with pytest.raises(UserError, match=r"facts\.path is needed"):
        check_suite("new", tmp_path)
    record = {"instruction": "Qi started X.", "query": "Who started X?", "answer": "X was started by Qi."}
    sample = tmp_path / "facts" / "new.sample.jsonl"
    sample.write_text(json.dumps(record))
    check_suite("new", tmp_path)
    sample.write_text(json.dumps(record | {"answer": ""}))
    with pytest.raises(UserError, match=r"new\.sample\.jsonl.*'answer'"):
        check_suite("new", tmp_path)


@pytest.mark.parametrize("name", options("model"))
def test_a_model_says_where_it_is_and_which_layer_to_edit(name):
    model = composed(f"model={name}", *(["model.path=world-xs"] if name == "own" else [])).model
    assert model.path
    assert model.layer >= 0
    assert set(LOADED) <= set(model)
    if "/" not in model.path and model.path not in PACKAGED:  # these are tried by tests/test_real.py
        assert model.layer < LanguageModel.load(model.path).model.config.num_hidden_layers


@pytest.mark.parametrize("name", options("regime"))
def test_a_regime_yields_what_is_taught_and_a_change(name, xs):
    cfg = composed(f"regime=[{name}]", "model=world-xs", "facts.n=2")
    facts = instantiate(cfg.facts)
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
    check(cfg)
    instantiate(cfg.task)
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    command = "# qfbench\n" if name == "quickstart" else f"# qfbench experiment={name}"
    assert command in header
    assert header.split("\n")[1].startswith("# ")  # what `qfbench --help` says of it
    assert not header.split("\n")[1].startswith("# qfbench")


@pytest.mark.parametrize("name", options("regression"))
def test_a_regression_suite_gives_rows_of_its_own_kind(name, xs, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", hub)
    few = sampled("regression", name, f"regression.{name}")
    few += ["regression.mmlu.subjects=[anatomy]"] if name == "mmlu" else []
    if name == "lm_eval":
        few += ["regression.lm_eval.tasks=[mmlu_anatomy]", f"regression.lm_eval.include={TEMPLATES / 'default'}"]
    cfg = composed(f"regression=[{name}]", *few)
    if "limit" in (cfg.regression.get(name) or {}):
        cfg.regression[name].limit = 1
    suites = build(cfg, "regression")
    for suite in suites.values():
        assert isinstance(suite, Suite)
        assert build(cfg, "regression")[name].fingerprint == suite.fingerprint
        rows = suite(xs)
        assert rows
        assert all({"kind", "query", "fact_id", "fact_kind"} <= row.keys() for row in rows)
        assert len({(row["kind"], row["fact_id"]) for row in rows}) == len(rows)
    assert (name == "none") == (not suites)


@pytest.mark.parametrize("name", options("task"))
def test_a_task_is_named_as_its_file(name):
    assert list(composed(f"task=[{name}]", "experiment=retention").task) == [name]
