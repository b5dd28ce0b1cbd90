from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from qfbench import UserError
from qfbench.models import checkpoint

ADAMW = partial(torch.optim.AdamW, lr=0.03, betas=(0.9, 0.98), weight_decay=0.1)
MUON = partial(torch.optim.Muon, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


class Training:
    """A run of a small network, its matrices under Muon (or AdamW) and the rest under AdamW."""

    def __init__(self, muon, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.parameters = dict(self.net.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim == 2]
        vectors = [p for p in self.parameters.values() if p.ndim == 1]
        first = MUON if muon else ADAMW
        self.opts = [first(matrices), ADAMW(vectors)]

    def steps(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(8, n, generator=generator) for n in (6, 4))
            F.mse_loss(self.net(x), y).backward()
            for opt in self.opts:
                opt.step()
                opt.zero_grad()

    def weights(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("muon", [True, False])
def test_a_run_taken_up_again_ends_with_the_same_weights_to_the_bit(path, muon):
    unbroken = Training(muon)
    unbroken.steps(0, 5)
    checkpoint.save(path, unbroken.parameters, unbroken.opts, 5, "a recipe")
    halfway = unbroken.weights()
    unbroken.steps(5, 9)
    resumed = Training(muon, seed=1)
    assert checkpoint.step_of(path, "a recipe") == 5
    checkpoint.restore(path, resumed.parameters, resumed.opts)
    assert same(resumed.weights(), halfway)
    resumed.steps(5, 9)
    assert same(resumed.weights(), unbroken.weights())
    forgetful = Training(muon, seed=1)
    checkpoint.restore(path, forgetful.parameters, [])
    assert same(forgetful.weights(), halfway)
    forgetful.steps(5, 9)
    assert not same(forgetful.weights(), unbroken.weights())  # the optimizers' state matters


@pytest.mark.parametrize("muon", [True, False])
def test_every_optimizer_gets_its_own_state_back(path, muon):
    saved, fresh = Training(muon), Training(muon)
    saved.steps(0, 3)
    checkpoint.save(path, saved.parameters, saved.opts, 3, "r")
    checkpoint.restore(path, fresh.parameters, fresh.opts)
    for wanted, got in zip(saved.opts, fresh.opts, strict=True):
        a, b = wanted.state_dict(), got.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert len(a["state"]) == 2
        assert a["state"].keys() == b["state"].keys()
        for number, state in a["state"].items():
            assert same(state, b["state"][number])
            assert {t.dtype for t in state.values()} == {t.dtype for t in b["state"][number].values()}
    names = set(saved.opts[0].state_dict()["state"][0])
    assert names == ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"})


def test_more_than_ten_parameters_keep_their_own_states(path):
    def made(seed):
        ps = [nn.Parameter(torch.full((2,), float(seed + i))) for i in range(12)]
        return {f"p{i}": p for i, p in enumerate(ps)}, [torch.optim.AdamW(ps, lr=0.1)]

    parameters, opts = made(0)
    for i, p in enumerate(parameters.values()):
        p.grad = torch.full((2,), float(i + 1))
    opts[0].step()
    checkpoint.save(path, parameters, opts, 1, "r")
    again, others = made(50)
    checkpoint.restore(path, again, others)
    states = others[0].state_dict()["state"]
    averages = [states[i]["exp_avg"][0].item() for i in range(12)]
    assert averages == pytest.approx([0.1 * (i + 1) for i in range(12)])
    assert all(torch.equal(again[name], p) for name, p in parameters.items())


def test_a_part_of_the_parameters_can_be_kept_and_others_stay(path):
    saved, other = Training(True), Training(True, seed=1)
    checkpoint.save(path, {"2.weight": saved.parameters["2.weight"]}, [], 1, "r")
    before = other.weights()
    checkpoint.restore(path, {"2.weight": other.parameters["2.weight"]}, [])
    changed = {name for name, tensor in other.weights().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.weight"}
    assert torch.equal(other.parameters["2.weight"], saved.parameters["2.weight"])


def test_restoring_writes_into_the_parameters_and_keeps_their_dtype(path):
    source = nn.Parameter(torch.tensor([1.0, 2.0]))
    checkpoint.save(path, {"w": source}, [], 1, "r")
    held = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    checkpoint.restore(path, {"w": held}, [])
    assert held.dtype == torch.float64
    assert held.tolist() == [1, 2]
    assert held.requires_grad


def test_a_checkpoint_is_a_copy(path):
    run = Training(True)
    checkpoint.save(path, run.parameters, run.opts, 0, "r")
    at_save = run.weights()
    run.steps(0, 2)
    assert not same(run.weights(), at_save)
    assert same({name: load_file(path)[f"model.{name}"] for name in at_save}, at_save)


def test_weights_that_are_not_contiguous_are_kept_as_they_read(path):
    turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    checkpoint.save(path, {"w": turned}, [], 1, "r")
    held = nn.Parameter(torch.zeros(3, 2))
    checkpoint.restore(path, {"w": held}, [])
    assert torch.equal(held, turned)


def test_where_there_is_none_no_step_is_done(path):
    assert checkpoint.step_of(path, "r") == 0


def test_the_last_checkpoint_counts(path):
    run = Training(False)
    for step in (1, 4):
        run.steps(0, 1)
        checkpoint.save(path, run.parameters, run.opts, step, "r")
    assert checkpoint.step_of(path, "r") == 4
    fresh = Training(False, seed=1)
    checkpoint.restore(path, fresh.parameters, fresh.opts)
    assert same(fresh.weights(), run.weights())


def test_a_checkpoint_of_another_recipe_is_refused(path):
    run = Training(False)
    checkpoint.save(path, run.parameters, run.opts, 3, '{"lr": 1}')
    with pytest.raises(UserError, match=r"checkpoint\.safetensors was written by another recipe; give another folder"):
        checkpoint.step_of(path, '{"lr": 2}')
    assert checkpoint.step_of(path, '{"lr": 1}') == 3


def test_a_save_that_breaks_off_leaves_the_last_checkpoint_whole(path, monkeypatch):
    run = Training(True)
    run.steps(0, 2)
    checkpoint.save(path, run.parameters, run.opts, 2, "r")
    before, weights = path.read_bytes(), run.weights()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing beside it

    def broken(_tensors, place, _metadata):
        place.write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    run.steps(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.sealed, "save_file", broken)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, run.parameters, run.opts, 3, "r")
    assert path.read_bytes() == before
    assert checkpoint.step_of(path, "r") == 2
    fresh = Training(True, seed=1)
    checkpoint.restore(path, fresh.parameters, fresh.opts)
    assert same(fresh.weights(), weights)
    checkpoint.save(path, run.parameters, run.opts, 3, "r")  # what was left behind is no hindrance
    assert checkpoint.step_of(path, "r") == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]
