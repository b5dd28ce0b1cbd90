"""`experiment=convert`, by its configuration."""

import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_contract import composed
from test_qft_train import bits_differ, of_layers, weights
from transformers import AutoConfig

from qfbench import LanguageModel, UserError
from qfbench.commands.execution import execute
from qfbench.models import difference
from qfbench.tasks import convert as training

SMALL = (
    "experiment=convert",
    "model=world-xs",
    "hydra.job.num=0",
    "hydra.job.id=test",
    "data.batch=3",
    "task.convert.conversion.steps=6",
    "task.convert.conversion.decay=0.5",
    "task.convert.conversion.cutoff=0.2",
    "task.convert.every=4",
    "task.convert.abilities.n=2",
)


def executed(folder, *overrides):
    console = Console(record=True, width=120, quiet=False)
    cfg = composed(*SMALL, *overrides)
    del cfg.hydra
    return execute(cfg, folder, console), console.export_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return executed(tmp_path_factory.mktemp("convert"))


def test_the_task_keeps_a_model_that_loads_and_says_what_became_of_it(whole):
    run, text = whole
    base, converted = LanguageModel.load("world-xs"), LanguageModel.load(run.folder / "model")
    before, after = weights(base.model), weights(converted.model)
    assert bits_differ(before, after) == of_layers(before, (1, 2, 3))
    assert converted.model.config.firing_layers == [2]
    stored_as = AutoConfig.from_pretrained(run.folder / "model").dtype
    assert stored_as == AutoConfig.from_pretrained(base.model.config.name_or_path).dtype == torch.float16
    assert run.lm.weights_hash() == base.weights_hash()
    table = pd.read_csv(run.folder / "convert.csv")
    assert list(table.model) == ["world-xs", "converted"]
    assert {"known", "told", "unknown"} <= set(table.columns)
    recipe = json.loads((run.folder / "model" / "recipe.json").read_text())
    assert (recipe["base"], recipe["layers"], recipe["steps"]) == ("world-xs", [2], 6)
    rows = pd.read_parquet(run.folder / "rows.parquet")
    assert list(rows.step) == list(range(6))
    assert set(rows.model) == {"world-xs"}
    assert (run.folder / "figures" / "conversion.png").stat().st_size > 0
    assert "converted model" in text


def test_a_difference_from_the_task_is_the_same_model(whole, tmp_path):
    run, _ = executed(tmp_path, "task.convert.save=difference", "task.convert.abilities=null")
    a, b = (LanguageModel.load(folder) for folder in (whole[0].folder / "model", tmp_path / "difference"))
    assert a.weights_hash() == b.weights_hash()
    assert difference.base_of(str(tmp_path / "difference")) == "world-xs"
    sizes = [p.stat().st_size for p in (tmp_path / "difference").glob("*.safetensors")]
    assert sizes[0] < (whole[0].folder / "model" / "model.safetensors").stat().st_size
    assert not (tmp_path / "convert.csv").exists()
    assert list(run.rows("convert").loss) == list(whole[0].rows("convert").loss)


def test_a_killed_task_started_again_ends_with_the_same_files(whole, tmp_path, monkeypatch):
    real, calls = training.text_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "text_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executed(tmp_path, "task.convert.abilities=null")
    assert list(pd.read_parquet(tmp_path / "rows.parquet").step) == list(range(5))
    run, _ = executed(tmp_path, "task.convert.abilities=null")
    assert len(calls) == 6 + 2  # steps 4 and 5
    for name in ("model/model.safetensors", "model/config.json", "model/recipe.json"):
        assert (tmp_path / name).read_bytes() == (whole[0].folder / name).read_bytes()
    frames = [r.store.frame().drop(columns="run_id") for r in (run, whole[0])]
    pd.testing.assert_frame_equal(*frames)
    with pytest.raises(UserError, match="other settings"):
        executed(tmp_path, "task.convert.conversion.lr=0.5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.convert.conversion.layers=[4]"], r"layers=\[4\]: .* layers 0 to 3"),
        (["task.convert.conversion.layers=[]"], r"layers=\[\]: give at least one"),
        (["task.convert.conversion.decay=1.5"], r"decay=1.5"),
        (["data=messages"], r"path is needed"),
        (["data=messages", "data.path=/none.jsonl"], r"data.path=/none.jsonl: no such file"),
    ],
)
def test_bad_settings_give_one_message_that_names_them(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        executed(
            tmp_path,
            "task.convert.abilities=null",
            *overrides,
            *(() if "data=messages" not in overrides else ("~data.batch", "+data.batch=1")),
        )
