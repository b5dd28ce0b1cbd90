# ruff: noqa: F811
"""Several changes side by side, a row of a pass under each: answers are those under each change alone."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_contract import composed
from test_run import SMALL
from test_suffix import ANSWERS, QUERIES, change, lm  # noqa: F401 (a fixture)

from qfbench import Unsupported, UserError
from qfbench.commands.execution import execute
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.each import ROOM, each_applied_to, side_by_side
from qfbench.models.sites import Site
from qfbench.tasks import teaching


def parts(lm):
    """Prompts that changes share, prompts of their own, and different replies to rate."""
    shared = [lm.render(query) for query in QUERIES[:2]]
    rated = [lm.render(query, "", answer) for query, answer in zip(QUERIES, ANSWERS, strict=False)]
    return [(shared, rated), ([*shared, lm.render(QUERIES[3])], rated[1:]), (shared[::-1], rated[:1]), (shared, [])]


def alike(found, wanted):
    for (replies, scores), (others, known) in zip(found, wanted, strict=True):
        assert replies == others
        assert [score.hit for score in scores] == [score.hit for score in known]
        for score, other in zip(scores, known, strict=True):
            assert score.nll == pytest.approx(other.nll, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_each_row_is_answered_as_under_its_change_alone(lm, layer, batch_size):
    lm = replace(lm, batch_size=batch_size)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    changes = [change(lm, layer, 1), WeightDelta(), change(lm, layer, 2), change(lm, 2, 3) + change(lm, layer, 4)]
    asked, wanted = parts(lm), []
    for delta, part in zip(changes, asked, strict=True):
        with delta.applied_to(lm):
            wanted.append(lm.answer(*part))
    assert len({tuple(replies) for replies, _ in wanted}) > 2  # they do change what is said
    for _ in range(2):  # states and last replies made, then kept
        with each_applied_to(lm, changes):
            alike(lm.answer_each(asked), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert not lm.changed
    alike([lm.answer(*asked[0])], [lm.answer_each(asked[:1])[0]])


def test_a_model_that_is_not_cut_answers_each_row_as_well(tiny, monkeypatch):
    lm = tiny("qwen2")
    changes = [change(lm, 1, 1), change(lm, 1, 2)]
    with each_applied_to(lm, changes):
        wanted = lm.answer_each(parts(lm)[:2])
        monkeypatch.setattr("qfbench.models.lm.divides", lambda *_: False)
        alike(lm.answer_each(parts(lm)[:2]), wanted)
    assert wanted[0][0] != wanted[1][0][:2]


def test_rows_that_nobody_has_given_a_change_are_refused(tiny):
    lm = tiny("qwen2")
    with each_applied_to(lm, [change(lm, 1, 1)]), pytest.raises(RuntimeError, match="nobody said which is under which"):
        lm.model(torch.zeros(3, 2, dtype=torch.long))
    lm.model(torch.zeros(3, 2, dtype=torch.long))


def test_only_linear_maps_of_layers_are_changed_for_each_row(tiny):
    lm = tiny("qwen2")
    name = "model.embed_tokens.weight"
    delta = WeightDelta({name: LowRank(torch.zeros_like(lm.model.get_parameter(name)))})
    with (
        pytest.raises(UserError, match="embed_tokens.weight: is no weight of a linear map"),
        each_applied_to(lm, [delta]),
    ):
        pass
    assert side_by_side(lm, [name]) == 1
    inside = Site(1).weight_name(lm.model)
    size = 4 * lm.model.get_parameter(inside).numel()
    assert side_by_side(lm, [inside]) == ROOM // size
    assert side_by_side(lm, [inside, Site(2).weight_name(lm.model)]) == ROOM // (2 * size)


def test_a_change_that_is_not_finite_leaves_no_trace(tiny):
    lm = tiny("qwen2")
    good, bad = change(lm, 1, 1), change(lm, 2, 2, size=float("nan"))
    before = lm.replies([lm.render(query) for query in QUERIES])
    with pytest.raises(FloatingPointError, match="NaN or an infinity"), each_applied_to(lm, [good, bad]):
        pass
    assert lm.replies([lm.render(query) for query in QUERIES]) == before


SINGLE = ["model=world-xs", "experiment=retention", "facts.n=5", "regime=[single]", "regression=[none]"]


def measured(folder, monkeypatch, at_once, editor="qf"):
    monkeypatch.setattr(teaching, "TOGETHER", at_once)
    cfg = composed(*SMALL, *SINGLE, f"editor={editor}", "editor.layer=2")
    del cfg.hydra
    execute(cfg, folder, Console(quiet=True), brief=True)
    return pd.read_parquet(folder / "rows.parquet")


@pytest.mark.parametrize("editor", ["qf", "finetune"])
def test_single_edits_give_the_same_rows_together_as_one_by_one(tmp_path, monkeypatch, editor):
    alone = measured(tmp_path / "alone", monkeypatch, 1, editor)
    opened = []
    monkeypatch.setattr(
        teaching, "each_applied_to", lambda lm, own: opened.append(len(own)) or each_applied_to(lm, own)
    )
    together = measured(tmp_path / "together", monkeypatch, 3, editor)
    edits = alone.step[alone.condition == "edited"].max()
    assert opened == [n for n in (min(3, edits - at) for at in range(0, edits, 3)) if n > 1]
    numbers = alone.select_dtypes("number").columns
    assert numbers.isin(["nll", "forced", "relative_norm"]).sum() == 3
    pd.testing.assert_frame_equal(together[numbers], alone[numbers], rtol=1e-4, atol=1e-5)
    rest = alone.columns.difference([*numbers, "run_id"])
    pd.testing.assert_frame_equal(together[rest], alone[rest])


def test_groups_begin_at_whole_ones_and_what_came_before_a_failure_is_not_lost():
    def edits(n, fails=False):
        yield from range(n)
        if fails:
            raise Unsupported("no room")

    assert list(teaching.in_groups(edits(7), 3, 0)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(teaching.in_groups(edits(5), 3, 1)) == [[0, 1], [2, 3, 4]]
    assert list(teaching.in_groups(edits(2), 1, 5)) == [[0], [1]]
    found = []
    with pytest.raises(Unsupported):
        found.extend(teaching.in_groups(edits(4, fails=True), 3, 0))
    assert found == [[0, 1, 2], [3]]


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_edit_that_breaks_the_model_ends_the_run_and_those_before_it_are_measured(tmp_path, monkeypatch, at_once):
    """The second of the edits gives logits that are not finite."""
    real = teaching.Teaching.asked

    def asked(self, step, *about, **more):
        check = real(self, step, *about, **more)
        return replace(check, change=check.change if step != 2 else huge(check.change))

    monkeypatch.setattr(teaching.Teaching, "asked", asked)
    with pytest.raises(FloatingPointError, match="after 1 edits"):
        measured(tmp_path, monkeypatch, at_once)
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert set(rows.step[rows.condition == "edited"]) == {1}


def huge(delta):
    return WeightDelta({name: LowRank(torch.full_like(change.dense(), 3e38)) for name, change in delta.changes.items()})
