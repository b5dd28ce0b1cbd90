"""What an editor cannot do is said by its check, as its edit would say it, and before anything is asked."""

import pandas as pd
import pytest
import torch
from test_contract import composed
from torch import nn
from transformers import AutoConfig, Gemma3Config, GPT2Config

from qfbench import Unsupported, UserError
from qfbench.commands.execution import execute
from qfbench.editors import QF, QF2, FineTune
from qfbench.facts.probes import ask
from qfbench.models.firing import with_firing_layers
from qfbench.models.sites import Site, layers

EDITORS = {"qf": QF, "qf2": lambda layer: QF2(layer, lr=0.1), "finetune": lambda layer: FineTune(layer, 0.01, 1)}
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def seeing(tokenizer, **text):
    """Gemma 3, which sees: as many layers look at images as read."""
    text = SMALL | {"head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 77} | text
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Gemma3Config(text_config=text | ids, vision_config=eyes | {"patch_size": 14}, **ids)


@pytest.fixture
def made(tiny, wrap, tokenizer):
    """A model of some kind."""

    def make(kind):
        if kind == "gemma3":
            return wrap(seeing(tokenizer))
        if kind == "gpt2":
            return wrap(
                GPT2Config(
                    n_layer=3,
                    n_embd=32,
                    n_head=4,
                    n_positions=64,
                    vocab_size=len(tokenizer),
                    bos_token_id=None,
                    eos_token_id=None,
                )
            )
        if kind in ("olmo2", "granite", "mixtral", "phi3", "apertus"):
            more = {"residual_multiplier": 0.5} if kind == "granite" else {"pad_token_id": 0}
            return wrap(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL, **more))
        lm = tiny("llama")
        if kind in ("firing", "half"):
            lm.model = with_firing_layers(lm.model, [1], alpha=0.0 if kind == "firing" else 0.5)
        if kind == "nan":
            lm.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        if kind == "quantized":  # or an adapter's: no nn.Linear
            lm.model.model.layers[1].mlp.down_proj = nn.Identity()
        return lm

    return make


def said(action, *args):
    try:
        action(*args)
    except (UserError, FloatingPointError) as error:
        return type(error), str(error).replace("fact-0", "sample")
    return None


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize(
    ("kind", "refuses"),
    [
        ("llama", {"qf2"}),
        ("firing", set()),
        ("half", {"qf", "qf2"}),
        ("nan", {"qf", "qf2", "finetune"}),
        ("quantized", {"qf", "qf2", "finetune"}),
        ("gemma3", {"qf", "qf2"}),
        ("olmo2", {"qf", "qf2"}),
        ("granite", {"qf", "qf2"}),
        ("apertus", {"qf", "qf2"}),
        ("mixtral", {"qf", "qf2", "finetune"}),
        ("phi3", {"qf2"}),
        ("gpt2", {"qf", "qf2", "finetune"}),
    ],
)
def test_a_check_says_what_an_edit_would_say(made, facts, kind, refuses, editor):
    lm, editor, name = made(kind), EDITORS[editor](1), editor
    before = lm.weights_hash()
    checked = said(editor.check, lm)
    assert lm.weights_hash() == before
    if (name, kind) == ("finetune", "nan"):  # whose loss alone shows it
        assert (checked, said(editor.edit, lm, facts[:1])[0]) == (None, FloatingPointError)
        return
    assert checked == said(editor.edit, lm, facts[:1])
    assert (checked is not None) == (name in refuses)
    if checked and kind != "nan":
        assert checked[0] is Unsupported


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_found_by_the_check(tiny, editor, layer):
    with pytest.raises(UserError, match=rf"editor.layer={layer}: the model has layers 0 to 2"):
        EDITORS[editor](layer).check(tiny("llama"))


@pytest.mark.parametrize("settings", [{"named": 0.0}, {"rest": 0.0}, {"opener": 0.0, "closer": 0.0}])
def test_a_check_does_not_depend_on_what_is_weighed(made, settings):
    QF2(1, lr=0.1, **settings).check(made("firing"))


def test_of_a_model_that_sees_the_layers_that_read_are_edited(made, facts):
    lm = made("gemma3")
    assert [name for name, m in lm.model.named_modules() if m is layers(lm.model)] == ["model.language_model.layers"]
    assert any(isinstance(m, nn.ModuleList) and "vision" in name for name, m in lm.model.named_modules())
    assert lm.positions == 77
    assert Site(2).weight_name(lm.model) == "model.language_model.layers.2.mlp.down_proj.weight"
    before = lm.score([lm.render(facts[0].query, "", facts[0].answer)])
    delta = FineTune(2, lr=0.05, steps=3).edit(lm, facts[:1])
    with delta.applied_to(lm):
        after = lm.score([lm.render(facts[0].query, "", facts[0].answer)])
    assert sum(after[0].nll) < sum(before[0].nll)
    prompts = [lm.render(q) for q in ("Who?", "Who started Oxinnovate?")]
    assert lm.replies(prompts) == [lm.replies([prompt])[0] for prompt in prompts]


def test_an_unsupported_editor_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("qfbench.tasks.run.ask", lambda lm, probes: asked.append(probes) or ask(lm, probes))
    folder = tmp_path / "run"
    settings = ("experiment=retention", "model=world-xs", "facts.n=2", "task.retention.not_understood=teach")
    settings += ("regression=none", "task.retention.placebo=0")
    with pytest.raises(Unsupported, match=r"QF2 needs a firing block at layer 2"):
        execute(composed(*settings, "editor=qf2", "editor.lr=0.1"), folder)
    assert not asked
    assert not (folder / "rows.parquet").exists()
    execute(composed(*settings), folder)
    assert asked
    assert len(pd.read_parquet(folder / "rows.parquet"))
