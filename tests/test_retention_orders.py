"""Checkpoints, orders of the facts, and placebos."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from notebook import prepared, suite, taught, untabled

from qfbench import UserError
from qfbench.analysis.sequences import matrices
from qfbench.editors.regimes import joint, sequential, single
from qfbench.models.delta import WeightDelta
from qfbench.tasks.retention import in_order, retention
from qfbench.tasks.teaching import checkpoints


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 24, 25, 100, 1000])
def test_checkpoints_left_open_are_dense_and_then_ever_fewer(n):
    steps = sorted(checkpoints(n, None))
    dense, rest = steps[: min(n, 20)], steps[min(n, 20) :]
    assert dense == list(range(1, min(n, 20) + 1))
    assert steps[-1] == n
    for earlier, step in zip(steps[19:], rest[:-1], strict=False):
        assert step / earlier == pytest.approx(1.2, abs=0.03)
    assert not rest or rest[-1] / steps[-2] <= 1.23
    if n == 100:
        assert rest == [24, 29, 35, 41, 50, 60, 72, 86, 100]


def test_checkpoints_take_other_scales_and_each_n_th_and_the_last():
    assert checkpoints(40, None, dense=4, ratio=2) == {1, 2, 3, 4, 8, 16, 32, 40}
    assert checkpoints(10, 4) == {4, 8, 10}
    assert checkpoints(8, 4) == {4, 8}
    assert checkpoints(3, 5) == {3}
    assert checkpoints(60, 1) == set(range(1, 61))


def test_orders_are_permutations_by_their_number():
    facts = [replace(suite()[0], id=str(n)) for n in range(12)]
    taught = [[f.id for f in in_order(facts, order)] for order in range(4)]
    assert taught[0] == [f.id for f in facts]
    assert all(sorted(ids) == sorted(taught[0]) for ids in taught)
    assert len({tuple(ids) for ids in taught}) == 4
    assert [[f.id for f in in_order(facts, order)] for order in range(4)] == taught
    assert [f.id for f in facts] == taught[0]


def test_every_regime_is_run_in_every_order_and_files_and_rows_say_which(tmp_path, drawn):
    run = prepared(tmp_path)
    retention(run, {"sequential": sequential, "joint": joint}, orders=3)
    rows, stored = run.rows(), run.store.frame()
    assert stored.order[stored.condition.isin(["unedited", "in_context"])].isna().all()
    found = matrices(rows)
    assert set(found) == {("notebook", "Note", regime, o) for regime in ("sequential", "joint") for o in range(3)}
    for (*_, order), matrix in found.items():
        assert list(matrix.columns) == [f.id for f in in_order(suite(), order)]
    assert len({tuple(matrix.columns) for matrix in found.values()}) > 1
    names = {f"Note-{regime}-layer0-order{o}" for regime in ("sequential", "joint") for o in range(3)}
    assert {p.stem for p in tmp_path.glob("deltas/*")} == names
    sequences = pd.read_csv(tmp_path / "sequences.csv")
    assert list(zip(sequences.regime, sequences.order, strict=True)) == [
        (regime, o) for o in range(3) for regime in ("sequential", "joint")
    ]
    assert set(sequences.edits) == {3}
    assert set(sequences.final) == {1.0}
    assert sequences.collapse.isna().all()
    assert (tmp_path / "figures" / "retention_matrix.png").stat().st_size > 1000


def test_one_order_is_as_given_and_goes_without_a_name(tmp_path):
    run, rows, _ = taught(tmp_path, tables=True)
    assert "order" not in run.store.frame()
    assert list(pd.read_csv(tmp_path / "sequences.csv").order) == [0]
    ((_, matrix),) = matrices(rows).items()
    assert list(matrix.columns) == [f.id for f in run.facts]


@pytest.mark.parametrize("orders", [0, -2])
def test_there_is_at_least_one_order(tmp_path, orders):
    with pytest.raises(UserError, match=f"orders={orders}"):
        retention(prepared(tmp_path), {"sequential": sequential}, orders=orders)


def test_a_placebo_is_asked_what_the_last_edit_was_and_has_its_norm(tmp_path):
    run, rows, edited = taught(tmp_path, sequential, joint, every=2, tables=True)
    run.store.flush()
    asked = ["fact_id", "kind", "query", "system", "expected", "taught", "step", "fresh"]
    for regime in ("sequential", "joint"):
        last = edited[(edited.regime == regime) & (edited.step == 3)]
        placebo = rows[(rows.condition == "placebo") & (rows.regime == regime)]
        pd.testing.assert_frame_equal(*(part[asked].reset_index(drop=True) for part in (last, placebo)))
        assert placebo.relative_norm.unique() == pytest.approx(last.relative_norm.unique())
        assert list(placebo.reply) != list(last.reply)
        assert placebo.checkpoint.all()
    assert (pd.read_parquet(tmp_path / "rows.parquet").condition == "placebo").sum() == len(placebo) * 2
    lines = pd.read_csv(tmp_path / "retention.csv")
    assert list(lines["of"][lines.regime == "placebo"]) == ["sequential", "joint"]


def placebo_seeds(run, monkeypatch, **settings):
    seeds, plain = [], WeightDelta.placebo
    monkeypatch.setattr(WeightDelta, "placebo", lambda self, seed: seeds.append(seed) or plain(self, seed))
    untabled(run, sequential, single, **settings)
    return seeds


def test_a_placebo_may_be_drawn_more_than_once(tmp_path, monkeypatch):
    run = prepared(tmp_path)
    seeds = placebo_seeds(run, monkeypatch, placebo=3, orders=2)
    assert len(seeds) == len(set(seeds)) == 6
    rows = run.rows()
    random, edited = (rows[rows.condition == condition] for condition in ("placebo", "edited"))
    assert set(zip(random.order, random.draw, strict=True)) == {(o, d) for o in (0, 1) for d in (0, 1, 2)}
    assert (
        random.groupby(["order", "draw"])["query"].agg(tuple).groupby("order").nunique().eq(1).all()
    )  # each draw is asked the same
    assert set(random.regime) == {"sequential"}
    assert (edited.draw == 0).all()
    assert np.ptp(random.relative_norm) < 1e-6
    assert len(random) == 3 * (edited.regime.eq("sequential") & edited.step.eq(3)).sum()


def test_no_two_draws_of_a_placebo_share_a_seed(tmp_path, monkeypatch):
    seeds = placebo_seeds(prepared(tmp_path), monkeypatch, placebo=11, orders=2)
    assert len(seeds) == len(set(seeds)) == 22


def test_there_is_no_placebo_where_none_is_wanted_and_none_of_single_edits(tmp_path):
    run = prepared(tmp_path)
    untabled(run, sequential, placebo=0)
    untabled(run, single)
    assert set(run.rows().condition) == {"unedited", "in_context", "edited"}
