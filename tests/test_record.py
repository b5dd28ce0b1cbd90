import pytest
import torch
from transformers import DynamicCache

from qfbench import Unsupported, UserError
from qfbench.models.activations import reading, record
from qfbench.models.cut import cache_argument
from qfbench.models.dialogue import Rendering
from qfbench.models.sites import Site


@pytest.fixture
def dialogues(tiny, facts):
    lm = tiny("qwen2")
    return [lm.render(fact.query, said, fact.answer) for fact in facts[:2] for said in (fact.instruction, "")]


def hooks(lm):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in lm.model.modules() for kind in kinds)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_recorded_equals_read_while_decoding_token_by_token(tiny, arch, dialogues, layer):
    lm, site = tiny(arch), Site(layer)
    for dialogue, recorded in zip(dialogues[:2], record(lm, dialogues[:2], site), strict=True):
        cache = DynamicCache(config=lm.model.config)
        with reading(lm, site) as seen, torch.no_grad():
            for token in dialogue.ids:
                lm.model(input_ids=torch.tensor([[token]]), **{cache_argument(lm.model.forward): cache})
        for name in ("key", "residual"):
            stepwise, whole = torch.cat(seen[name], 1)[0], getattr(recorded, name)
            torch.testing.assert_close(whole, stepwise, rtol=1e-4, atol=1e-5)
            assert (whole[1:] - whole[:-1]).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layer_output_is_the_weight_times_key_plus_residual(tiny, arch_or_biased, dialogues, layer):
    lm, outputs = tiny(arch_or_biased, torch.float64), []
    handle = Site(layer).block(lm.model).register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad():
        for dialogue in dialogues:
            lm.model(input_ids=torch.tensor([dialogue.ids]))
    handle.remove()
    linear = Site(layer).linear(lm.model)
    bias = torch.zeros(1) if linear.bias is None else linear.bias
    assert bias.any() == arch_or_biased.endswith("+bias")
    for recorded, output in zip(record(lm, dialogues, Site(layer)), outputs, strict=True):
        formed = recorded.key @ linear.weight.T + recorded.residual + bias
        torch.testing.assert_close(formed, output[0], rtol=1e-10, atol=1e-10)
        assert (recorded.key @ linear.weight.T).norm() > 0.1 * output.norm()


def test_a_recording_does_not_depend_on_its_company(tiny, arch, dialogues):
    lm = tiny(arch)
    together = record(lm, dialogues, Site(2))
    alone = [record(lm, [dialogue], Site(2))[0] for dialogue in dialogues]
    assert all(
        torch.equal(a.key, b.key) and torch.equal(a.residual, b.residual) for a, b in zip(together, alone, strict=True)
    )


def test_layers_above_the_site_do_not_run(tiny, arch, dialogues):
    lm, calls = tiny(arch), [0, 0, 0]

    def count(number):
        def hook(_module, _args):
            calls[number] += 1

        return hook

    for number, block in enumerate(lm.model.model.layers):
        block.register_forward_pre_hook(count(number))
    record(lm, dialogues, Site(1))
    assert calls == [len(dialogues), len(dialogues), 0]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([dialogues[0].ids]))
    assert calls[2] == 1


def test_no_hook_is_left_after_recording(tiny, arch, dialogues):
    lm = tiny(arch)
    before = hooks(lm)
    with reading(lm, Site(1)):
        assert hooks(lm) > before
    record(lm, dialogues, Site(1))
    assert hooks(lm) == before


def test_no_hook_is_left_after_an_exception(tiny, arch):
    lm = tiny(arch)
    before = hooks(lm)
    unknown_token = Rendering((len(lm.tokenizer) + 7,), 0, 0, 1, ())
    with pytest.raises(IndexError):
        record(lm, [unknown_token], Site(1))
    assert hooks(lm) == before
    with pytest.raises(KeyError), reading(lm, Site(1)):
        raise KeyError
    assert hooks(lm) == before
    Site(1).block(lm.model).mlp.down_proj = torch.nn.Identity()
    for site, error in ((Site(3), UserError), (Site(-1), UserError), (Site(1), Unsupported)):
        with pytest.raises(error):
            record(lm, [unknown_token], site)
    assert hooks(lm) == before


def test_the_model_runs_as_before_after_a_recording(tiny, arch, dialogues):
    lm = tiny(arch)

    def run():
        with torch.no_grad():
            out = lm.model(input_ids=torch.tensor([dialogues[0].ids]), output_hidden_states=True)
        return out.logits, out.hidden_states

    (logits, states), _ = run(), record(lm, dialogues, Site(0))
    again, states_again = run()
    assert torch.equal(logits, again)
    assert len(states_again) == len(states) == 4


def test_what_was_recorded_does_not_alias_the_model(tiny, dialogues):
    lm = tiny("llama")
    first, second = (record(lm, dialogues[:1], Site(0))[0] for _ in range(2))
    first.key.fill_(7)
    first.residual.fill_(7)
    (third,) = record(lm, dialogues[:1], Site(0))
    assert torch.equal(second.key, third.key)
    assert torch.equal(second.residual, third.residual)
