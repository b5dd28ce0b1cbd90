"""MEMIT: the ridge solution of its normal equations, its share of each layer, and the keys of earlier facts."""

from dataclasses import replace

import pytest
import torch
from test_rome import QUICK, close, drawn, known, moment  # noqa: F401 (a fixture)

from qfbench import UserError
from qfbench.editors import MEMIT, ROME
from qfbench.editors.locate import looked_up, moments_of
from qfbench.editors.recursive import Stream, least
from qfbench.editors.regimes import in_turn, sequential
from qfbench.editors.stays import staying
from qfbench.models.delta import NOTHING
from qfbench.models.sites import Site

F, D = 12, 5
ONES = torch.ones(7, dtype=torch.float64)
NAMES = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]


def test_it_solves_its_normal_equations_with_earlier_keys_and_without():
    c, keys, wanted, past = moment(0), drawn(1, 3, F), drawn(2, 3, D), drawn(3, 4, F)
    inverse = Stream.begin(c, D, 2.5, 1e-9).inverse
    change = least(inverse, keys, wanted, ONES[:3])[0].dense()
    assert close(change @ (2.5 * c + keys.T @ keys), wanted.T @ keys, 1e-6)
    both = torch.cat([past, keys]), torch.cat([torch.zeros(4, D, dtype=torch.float64), wanted])
    change = least(inverse, *both, ONES)[0].dense()
    assert close(change @ (2.5 * c + past.T @ past + keys.T @ keys), wanted.T @ keys, 1e-6)


@pytest.mark.parametrize("arch", ["qwen2", "llama+bias"])
def test_one_fact_at_one_layer_with_next_to_no_penalty_is_rome(tiny, known, arch):  # noqa: F811
    lm = tiny(arch, torch.float64)
    rome = ROME(1, keep=known[1:], steps=5, contexts=0).edit(lm, known[:1]).changes[NAMES[1]].dense()
    little, much = (
        MEMIT(1, keep=known[1:], steps=5, contexts=0, penalty=penalty).edit(lm, known[:1]).changes[NAMES[1]].dense()
        for penalty in (1e-9, 1e5)
    )
    assert close(little, rome, 1e-5)
    assert much.norm() < 0.9 * rome.norm()


def test_with_next_to_no_penalty_the_highest_layer_ends_at_what_was_searched(tiny, known):  # noqa: F811
    lm = tiny("llama", torch.float64)
    editor = MEMIT(1, more_layers=(0,), steps=5, contexts=0, penalty=1e-9)
    asked, scene = editor._begin(lm, known)
    found = editor._values(lm, asked)
    delta = editor.together(lm, scene, asked, found, [])
    assert list(delta.changes) == NAMES[:2]
    assert all(change.norm() > 0 for change in delta.changes.values())
    with delta.applied_to(lm):
        _, output = looked_up(lm, asked, Site(0), Site(1))
    assert close(output, torch.stack([one.output + one.change for one in found]), 1e-6)


def test_each_layer_takes_its_share_of_what_the_layers_below_left(tiny, known):  # noqa: F811
    lm = tiny("qwen2", torch.float64)
    editor = MEMIT(1, more_layers=(0,), **QUICK, keep=known[2:], penalty=0.5)
    asked, scene = editor._begin(lm, known[:2])
    found = editor._values(lm, asked)
    delta = editor.together(lm, scene, asked, found, [])
    target = torch.stack([one.output + one.change for one in found])
    inverses = scene.inverses
    keys, output = looked_up(lm, asked, Site(0), Site(1))
    assert not close(target, output, 0.1)
    first = least(inverses[0], keys, (target - output) / 2, ONES[:2])[0]
    assert close(delta.changes[NAMES[0]].dense(), first.dense())
    with replace(delta, changes={NAMES[0]: first}).applied_to(lm):
        keys, output = looked_up(lm, asked, Site(1), Site(1))
    assert close(delta.changes[NAMES[1]].dense(), least(inverses[1], keys, target - output, ONES[:2])[0].dense())


def test_at_one_layer_with_earlier_keys_a_sequence_is_rlsedits_recursion(tiny, known):  # noqa: F811
    """C_t and W_t of Wang et al. 2026 (RLSEdit), and its joint form: there no change moves a key, so keys read anew are those of then."""
    lm = tiny("qwen2", torch.float64)
    taught, kept = known[:2], known[2:]
    editor = MEMIT(1, steps=5, contexts=0, keep=kept, penalty=0.5, past=True)
    asked, _ = editor._begin(lm, taught)
    keys, _ = looked_up(lm, asked, Site(1), Site(1))
    (c,) = moments_of(lm, staying(lm, kept, taught), editor.sites)
    assert c.norm() > 0
    stream = Stream.begin(c, lm.model.config.hidden_size, 0.5, editor.floor)
    start, before, wanted = stream.inverse, NOTHING, []
    for i, (step, total) in enumerate(in_turn(editor, lm, taught)):
        with before.applied_to(lm):
            (found,) = editor._values(lm, asked[i : i + 1])
        wanted.append(stream.change @ keys[i] + found.change.double())
        assert close(step.changes[NAMES[1]].dense(), stream.teach(keys[i : i + 1], wanted[i][None], ONES[:1]).dense())
        before = total
    joint = least(start, keys, torch.stack(wanted), ONES[:2])[0].dense()
    assert close(before.changes[NAMES[1]].dense(), joint, 1e-6)


def test_what_earlier_keys_give_moves_less_where_they_are_kept(tiny, known):  # noqa: F811
    """By the last edit of a sequence; the first is the same."""
    lm = tiny("qwen2", torch.float64)
    moved, first = [], []
    for past in (False, True):
        editor = MEMIT(1, **QUICK, penalty=0.05, past=past)
        (_, one), (_, two) = sequential(editor, lm, known[:2])
        asked, _ = editor._begin(lm, known[:1])
        keys, _ = looked_up(lm, asked, Site(1), Site(1))
        step = two.changes[NAMES[1]].dense() - one.changes[NAMES[1]].dense()
        moved.append((step @ keys.T).norm().item())
        first.append(one.changes[NAMES[1]].dense())
    assert close(*first)
    assert moved[1] < 0.5 * moved[0]


def test_a_further_layer_that_is_not_there_is_named_by_its_own_setting(tiny):
    with pytest.raises(UserError, match=r"editor.more_layers=\[0, 7\]: the model has layers 0 to 2"):
        MEMIT(1, more_layers=(0, 7)).check(tiny("qwen2"))
