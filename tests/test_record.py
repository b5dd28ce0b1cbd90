import pytest
import torch
from transformers import DynamicCache

from qfbench import Unsupported, UserError
from qfbench.models import activations
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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_a_recording_depends_on_its_company_by_rounding_alone(tiny, arch, dialogues, dtype, bound):
    lm = tiny(arch, dtype)
    lm.batch_size = len(dialogues)
    together, passes = counted(lm, lambda: record(lm, dialogues, Site(2)))
    assert len(passes) < len(dialogues) == len({len(d.ids) for d in dialogues}) > 2  # some were padded
    for dialogue, recorded in zip(dialogues, together, strict=True):
        (alone,) = record(lm, [dialogue], Site(2))
        for name, tensor in vars(alone).items():
            assert ((getattr(recorded, name) - tensor).norm(dim=1) <= bound * tensor.norm(dim=1)).all(), name
            assert ((tensor[1:] - tensor[:-1]).norm(dim=1) > 1e3 * bound * tensor[1:].norm(dim=1)).all()


def counted(lm, run):
    """What `run` gives, and the shape of the token ids of each pass."""
    passes = []
    handle = lm.model.register_forward_pre_hook(
        lambda _m, _a, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    try:
        return run(), passes
    finally:
        handle.remove()


def test_only_the_positions_asked_for_are_kept(tiny, dialogues):
    lm = tiny("qwen2")
    at = [[3], [0, 2, 1], [], [len(dialogues[3].ids) - 1]]
    for whole, part, own in zip(record(lm, dialogues, Site(1)), record(lm, dialogues, Site(1), at), at, strict=True):
        for name, tensor in vars(part).items():
            assert torch.equal(tensor, getattr(whole, name)[own])
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # no view of all that a pass made


def test_a_dialogue_given_twice_runs_once_and_is_read_at_the_positions_of_each(tiny, dialogues):
    lm = tiny("qwen2")
    (first, second), passes = counted(lm, lambda: record(lm, [dialogues[0]] * 2, Site(1), [[4, 5], [1]]))
    assert passes == [(1, len(dialogues[0].ids))]
    (whole,) = record(lm, [dialogues[0]], Site(1))
    assert torch.equal(first.key, whole.key[[4, 5]])
    assert torch.equal(second.key, whole.key[[1]])


@pytest.mark.parametrize(("most", "n"), [(1, 4), (100, 3), (150, 2), (1000, 2)])
def test_no_pass_is_larger_than_its_bound(tiny, dialogues, monkeypatch, most, n):
    monkeypatch.setattr(activations, "TOKENS", most)
    lm = tiny("qwen2")
    lm.batch_size = 3
    recorded, passes = counted(lm, lambda: record(lm, dialogues, Site(0)))
    assert [len(one.key) for one in recorded] == [len(dialogue.ids) for dialogue in dialogues]
    assert all(rows <= 3 and (rows == 1 or rows * tokens <= most) for rows, tokens in passes)
    assert len(passes) == n


def test_half_of_the_dialogues_run_at_a_time_where_memory_is_short(tiny, dialogues):
    lm = tiny("qwen2")
    lm.batch_size, tried = 4, []
    wanted = record(lm, dialogues, Site(1))

    def short(_module, _args, given):
        tried.append(len(given["input_ids"]))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("no room")

    lm.model.register_forward_pre_hook(short, with_kwargs=True)
    limit = 1
    for a, b in zip(record(lm, dialogues, Site(1)), wanted, strict=True):
        torch.testing.assert_close(a.key, b.key, rtol=1e-4, atol=1e-5)
    assert max(tried) > 1
    assert tried.count(1) == len(dialogues)
    limit, before = 0, hooks(lm)
    with pytest.raises(torch.OutOfMemoryError):
        record(lm, dialogues, Site(1))
    assert hooks(lm) == before


def test_layers_above_the_site_do_not_run(tiny, arch, dialogues):
    lm, calls = tiny(arch), [0, 0, 0]

    def count(number):
        def hook(_module, _args):
            calls[number] += 1

        return hook

    for number, block in enumerate(lm.model.model.layers):
        block.register_forward_pre_hook(count(number))
    _, passes = counted(lm, lambda: record(lm, dialogues, Site(1)))
    assert calls == [len(passes), len(passes), 0]
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
