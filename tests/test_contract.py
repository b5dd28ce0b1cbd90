"""Every YAML of the configuration keeps its contract; a new one is tested without an edit here."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from qfbench import Fact, LanguageModel, Unsupported
from qfbench.delta import WeightDelta
from qfbench.run import CONF


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs")


@pytest.mark.parametrize("name", options("editor"))
def test_an_editor_is_a_frozen_value_that_returns_a_value(name, xs):
    editor = instantiate(composed(f"editor={name}", "model=world-xs", "editor.layer=1").editor)
    with pytest.raises(FrozenInstanceError):
        editor.layer = 2
    assert all(field.init for field in fields(editor))
    facts = instantiate(composed("facts=world", "facts.n=2").facts)
    before = {n: p.clone() for n, p in xs.model.state_dict().items()}
    try:
        delta = editor.edit(xs, facts)
    except Unsupported as error:
        assert str(error)
    else:
        assert isinstance(delta, WeightDelta)
        assert delta.norm() > 0
    assert all(torch.equal(p, before[n]) for n, p in xs.model.state_dict().items())


@pytest.mark.parametrize("name", options("facts"))
def test_a_suite_is_a_list_of_distinct_facts(name, tmp_path):
    overrides = [f"facts={name}"]
    if name == "table":
        path = tmp_path / "facts.csv"
        path.write_text("instruction,query,answer\nQi started X.,Who started X?,X was started by Qi.\n")
        overrides.append(f"facts.path={path}")
    facts = instantiate(composed(*overrides).facts)
    assert facts
    assert all(isinstance(f, Fact) for f in facts)
    assert len({f.id for f in facts}) == len(facts)


@pytest.mark.parametrize("name", options("model"))
def test_a_model_says_where_it_is_and_which_layer_to_edit(name):
    model = composed(f"model={name}").model
    assert model.path
    assert model.layer >= 0
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


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_composes_and_says_how_to_run_it(name):
    cfg = composed(f"experiment={name}")
    assert cfg.task
    instantiate(cfg.task)
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    command = "# qfbench\n" if name == "quickstart" else f"# qfbench experiment={name}"
    assert command in header


@pytest.mark.parametrize("name", options("task"))
def test_a_task_is_named_as_its_file(name):
    assert list(composed(f"task=[{name}]", "experiment=retention").task) == [name]
