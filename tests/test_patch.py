"""The rank-one patch of each token: where it is QF, and where it is not."""

import pytest
import torch
from test_qf import close, dense, problem

from qfbench.editors import QF, QFPatch
from qfbench.editors.patch import patch
from qfbench.editors.qf import solve
from qfbench.editors.regimes import joint, sequential

SWEEPS = [0, 1, 2, 4]


def by_hand(keys, wanted, sweeps):
    """Token by token, each patch added to the matrix before the next is found."""
    change = torch.zeros(wanted.shape[1], keys.shape[1], dtype=keys.dtype)
    for _ in range(max(sweeps, 1)):
        for k, r in zip(keys, wanted, strict=True):
            missing = r - change @ k if sweeps else r
            change = change + torch.outer(missing, k) / (k @ k)
    return change


@pytest.mark.parametrize("sweeps", SWEEPS)
@pytest.mark.parametrize("taught", [1, 5, 40])
def test_the_patches_are_those_of_the_tokens_one_after_another(taught, sweeps):
    keys, wanted, _ = problem(taught)
    assert close(patch(keys, wanted, sweeps).dense(), by_hand(keys, wanted, sweeps), 1e-9)


@pytest.mark.parametrize("sweeps", SWEEPS)
def test_one_token_is_qf(sweeps):
    assert close(patch(*problem(1)[:2], sweeps).dense(), solve(*problem(1)).change.dense())


@pytest.mark.parametrize("sweeps", SWEEPS)
def test_orthogonal_keys_are_qf_and_others_are_not(sweeps):
    keys, wanted, weights = problem(6)
    lengths = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    orthogonal = lengths * torch.linalg.qr(keys.T)[0].T
    assert close(patch(orthogonal, wanted, sweeps).dense(), solve(orthogonal, wanted, weights).change.dense())
    assert not close(patch(keys, wanted, sweeps).dense(), solve(keys, wanted, weights).change.dense(), 1e-6)


def test_the_last_token_is_exact_when_corrected_and_the_others_are_nearer_sweep_by_sweep():
    keys, wanted, weights = problem(8)
    exact = solve(keys, wanted, weights).change.dense()
    assert close(patch(keys, wanted, 1).dense() @ keys[-1], wanted[-1])
    assert not close(patch(keys, wanted, 0).dense() @ keys[-1], wanted[-1], 0.1)
    away = [(patch(keys, wanted, sweeps).dense() - exact).norm().item() for sweeps in (1, 2, 4, 8, 16)]
    assert away == sorted(away, reverse=True)
    assert close(patch(keys, wanted, 2000).dense(), exact)


@pytest.mark.parametrize("sweeps", SWEEPS)
def test_a_key_of_zero_has_no_patch(sweeps):
    keys, wanted, _ = problem(5)
    keys[2] = 0
    kept = [0, 1, 3, 4]
    assert close(patch(keys, wanted, sweeps).dense(), patch(keys[kept], wanted[kept], sweeps).dense())


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_raises(which):
    given = list(problem(3)[:2])
    given[which][1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        patch(*given)


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_on_a_model_many_sweeps_are_qf_and_none_are_not(tiny, facts, arch):
    lm = tiny(arch, torch.float64)
    before = lm.weights_hash()
    exact = dense(QF(1, opener=0.0).edit(lm, facts))
    editors = [QFPatch(1, opener=0.0, sweeps=sweeps) for sweeps in (0, 1, 5000)]
    changes = [editor.edit(lm, facts) for editor in editors]
    assert [close(dense(delta), exact, 1e-4) for delta in changes] == [False, False, True]
    assert changes[0].notes["residual"] > changes[1].notes["residual"] > 1e-3 > changes[2].notes["residual"]
    assert lm.weights_hash() == before
    (change,) = changes[0].changes.values()
    assert change.rank == changes[0].notes["tokens"] == sum(map(len, changes[0].keys))


@pytest.mark.parametrize("sweeps", [0, 1])
def test_regimes_and_going_on(tiny, facts, sweeps):
    lm, editor = tiny("qwen2", torch.float64), QFPatch(1, sweeps=sweeps)
    alone = [dense(editor.edit(lm, [fact])) for fact in facts]
    for regime in (joint, sequential):
        whole = [total for _, total in regime(editor, lm, facts)]
        *_, (_, rest) = regime(editor, lm, facts, 1, whole[0])
        assert torch.equal(dense(rest), dense(whole[-1]))
        # Patches that nothing corrects add up, whatever is taught beside them, as long as W is the unedited one.
        assert close(dense(whole[-1]), sum(alone), 1e-9) == (regime is joint and sweeps == 0)
