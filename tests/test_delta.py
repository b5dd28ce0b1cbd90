import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from qfbench import UserError
from qfbench.models.delta import LowRank, WeightDelta

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"  # [32, 80], [80, 32]
DTYPES = [torch.float32, torch.bfloat16]


def low_rank(rows, cols, rank, seed=0, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rows, rank), (rank, cols)))
    return LowRank(size * left, right)


def some_delta(seed=0, size=0.1, dtype=torch.float64):
    return WeightDelta(
        {DOWN: low_rank(32, 80, 3, seed, size, dtype), UP: LowRank(low_rank(80, 32, 2, seed + 9, size, dtype).dense())}
    )


def state(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(a, b):
    """Equal bit for bit: -0.0 is not 0.0."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(ints[a[k].itemsize]), b[k].view(ints[b[k].itemsize]))
        for k in a
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_applied_adds_the_change_and_restores_bit_for_bit(tiny, arch, dtype):
    lm, delta = tiny(arch, dtype), some_delta()
    lm.model.get_parameter(DOWN).data[0, :2] = torch.tensor([-0.0, 0.0], dtype=dtype)
    before = state(lm)
    with delta.applied_to(lm) as edited:
        during = state(lm)
        assert edited is lm
    for name, weight in during.items():
        wanted = before[name].double() + (delta.changes[name].dense() if name in delta.changes else 0)
        assert torch.equal(weight, wanted.to(dtype))
        assert torch.equal(weight, before[name]) == (name not in delta.changes)
    assert same(state(lm), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exception_in_the_body_restores_bit_for_bit(tiny, dtype):
    lm = tiny("qwen2", dtype)
    before = state(lm)

    def fail():
        with some_delta().applied_to(lm):
            assert not same(state(lm), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert same(state(lm), before)


def test_a_body_that_writes_the_changed_weight_is_undone_too(tiny):
    lm = tiny("qwen2")
    before = state(lm)
    with some_delta().applied_to(lm):
        lm.model.get_parameter(DOWN).data.zero_()
    assert same(state(lm), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_changes_add_up_and_unwind(tiny, dtype):
    lm, first, second = tiny("llama", dtype), some_delta(1), some_delta(2)
    before = state(lm)
    with first.applied_to(lm):
        inside = state(lm)
        with second.applied_to(lm):
            wanted = inside[DOWN].double() + second.changes[DOWN].dense()
            assert torch.equal(lm.model.get_parameter(DOWN), wanted.to(dtype))
        assert same(state(lm), inside)
    assert same(state(lm), before)


def test_an_edited_model_answers_otherwise(tiny):
    lm = tiny("qwen2")
    dialogue = lm.render("Who?", "", "It was Qi.")
    (before,) = lm.score([dialogue])
    with some_delta().applied_to(lm):
        (during,) = lm.score([dialogue])
    assert max(abs(a - b) for a, b in zip(before.nll, during.nll, strict=True)) > 0.01
    assert lm.score([dialogue])[0] == before


def test_an_empty_change_changes_nothing(tiny):
    lm = tiny("qwen2")
    before = state(lm)
    with WeightDelta().applied_to(lm):
        assert same(state(lm), before)
    assert WeightDelta().norm() == 0
    assert WeightDelta().rounding_loss(lm) == 0


@pytest.mark.parametrize(("ranks", "dense"), [((3, 4), False), ((4, 4), False), ((4, 5), True), ((40, 1), True)])
def test_a_sum_is_the_dense_sum_and_dense_once_wide(ranks, dense):
    a, b = low_rank(32, 80, ranks[0], 1), low_rank(32, 80, ranks[1], 2)
    torch.testing.assert_close((a + b).dense(), a.dense() + b.dense())
    assert ((a + b).right is None) == dense
    assert (a + b).rank == (32 if dense else sum(ranks))


def test_a_sum_with_a_dense_change_is_dense():
    a, b = low_rank(8, 5, 2, 1), LowRank(low_rank(8, 5, 2, 2).dense())
    for total in (a + b, b + a, b + b):
        assert total.right is None
    torch.testing.assert_close((b + a).dense(), a.dense() + b.dense())


def test_a_sum_of_deltas_merges_their_weights():
    a = WeightDelta({DOWN: low_rank(32, 80, 3, 1)}, {"tokens": 1.0})
    b = WeightDelta({DOWN: low_rank(32, 80, 2, 2), UP: low_rank(80, 32, 2, 3)}, {"tokens": 2.0})
    kept = a.changes[DOWN].dense()
    total = a + b
    assert total.changes.keys() == {DOWN, UP}
    torch.testing.assert_close(total.changes[DOWN].dense(), kept + b.changes[DOWN].dense())
    assert torch.equal(total.changes[UP].dense(), b.changes[UP].dense())
    assert a.changes.keys() == {DOWN}
    assert torch.equal(a.changes[DOWN].dense(), kept)
    assert (WeightDelta() + a).changes == a.changes


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_norm_is_the_dense_norm(rank):
    change = low_rank(8, 13, rank)
    assert change.norm() == pytest.approx(change.dense().norm().item(), rel=1e-12)
    assert LowRank(change.dense()).norm() == pytest.approx(change.norm(), rel=1e-12)
    delta = some_delta()
    flat = torch.cat([c.dense().flatten() for c in delta.changes.values()])
    assert delta.norm() == pytest.approx(flat.norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_saved_delta_loads_bit_for_bit(tmp_path, dtype):
    delta = some_delta(dtype=dtype)
    delta.save(tmp_path / "d.safetensors")
    loaded = WeightDelta.load(str(tmp_path / "d.safetensors"))
    assert loaded.changes.keys() == delta.changes.keys()
    for name, change in delta.changes.items():
        again = loaded.changes[name]
        assert (again.right is None) == (change.right is None)
        assert same({"": again.left}, {"": change.left})
        assert change.right is None or same({"": again.right}, {"": change.right})


def test_transposed_factors_and_an_empty_delta_can_be_saved(tmp_path):
    change = LowRank(torch.randn(2, 32).T, torch.randn(80, 2).T)
    WeightDelta({DOWN: change}).save(tmp_path / "t.safetensors")
    assert torch.equal(WeightDelta.load(tmp_path / "t.safetensors").changes[DOWN].dense(), change.dense())
    WeightDelta().save(tmp_path / "e.safetensors")
    assert WeightDelta.load(tmp_path / "e.safetensors").changes == {}


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "cut", "foreign"])
def test_what_is_no_delta_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "d.safetensors"
    some_delta().save(path)
    WeightDelta.load(path)
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif kind != "missing":
        path.write_bytes({"text": b"not a delta at all", "empty": b"", "cut": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UserError, match=r"delta|WeightDelta") as error:
        WeightDelta.load(path)
    assert str(path) in str(error.value)


BAD = {
    "another model": (
        {"model.layers.7.mlp.down_proj.weight": low_rank(32, 80, 1)},
        UserError,
        "layers.7.*another model",
    ),
    "another shape": ({UP: low_rank(32, 80, 1)}, UserError, r"up_proj.*\[32, 80\].*\[80, 32\]"),
    "nan": ({UP: LowRank(torch.full((80, 32), torch.nan))}, FloatingPointError, "up_proj"),
    "inf": ({UP: LowRank(torch.full((80, 1), torch.inf), torch.ones(1, 32))}, FloatingPointError, "up_proj"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_change_that_does_not_fit_is_refused_and_nothing_is_written(tiny, case):
    changes, error, says = BAD[case]
    lm = tiny("qwen2")
    before = state(lm)
    delta = WeightDelta({DOWN: low_rank(32, 80, 3), **changes})
    with pytest.raises(error, match=says), delta.applied_to(lm):
        pytest.fail("entered")
    assert same(state(lm), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_beyond_the_range_of_the_dtype_is_refused(tiny, dtype):
    lm = tiny("qwen2", dtype)
    before = state(lm)
    huge = WeightDelta({DOWN: LowRank(torch.full((32, 80), 1e60, dtype=torch.float64))})
    with pytest.raises(FloatingPointError, match="down_proj"), huge.applied_to(lm):
        pytest.fail("entered")
    assert same(state(lm), before)


def test_nothing_is_lost_where_the_dtype_holds_the_sum(tiny):
    lm = tiny("qwen2")
    for name in (DOWN, UP):
        lm.model.get_parameter(name).data.copy_(torch.randint(-8, 8, lm.model.get_parameter(name).shape) / 16)
    delta = WeightDelta({DOWN: LowRank(torch.full((32, 80), 0.25))})
    assert delta.rounding_loss(lm) == 0
    assert some_delta().rounding_loss(tiny("qwen2", torch.float64)) < 1e-14


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_rounding_loss_is_what_the_written_weights_lack(tiny, size):
    lm, delta = tiny("qwen2", torch.bfloat16), some_delta(size=size)
    before = state(lm)
    with delta.applied_to(lm):
        after = state(lm)
    gap = [(after[n].double() - before[n].double() - c.dense()).flatten() for n, c in delta.changes.items()]
    whole = [c.dense().flatten() for c in delta.changes.values()]
    assert delta.rounding_loss(lm) == pytest.approx((torch.cat(gap).norm() / torch.cat(whole).norm()).item(), rel=1e-9)
    assert same(state(lm), before)


def test_a_change_smaller_than_the_dtype_resolves_is_lost_wholly(tiny):
    lm = tiny("qwen2", torch.bfloat16)
    lm.model.get_parameter(DOWN).data.fill_(1)
    delta = WeightDelta({DOWN: LowRank(torch.full((32, 80), 1e-5))})
    assert delta.rounding_loss(lm) == pytest.approx(1)
    assert replace(delta, changes={DOWN: LowRank(torch.full((32, 80), 2.0**-7))}).rounding_loss(lm) == 0


CHANGES = {
    "thin": low_rank(32, 80, 3),
    "tall": low_rank(80, 32, 2),
    "rank_one": low_rank(8, 13, 1),
    "wider_than_the_matrix": low_rank(8, 5, 20),
    "dense": LowRank(low_rank(32, 80, 40).dense()),
    "single_precision": low_rank(32, 80, 3, dtype=torch.float32),
    "dependent": LowRank(torch.ones(6, 3).double(), torch.ones(3, 4).double()),
}
NOTHING = {
    "rank_zero": LowRank(torch.zeros(8, 0), torch.zeros(0, 5)),
    "zero_factors": LowRank(torch.zeros(8, 2), torch.ones(2, 5)),
    "zero_matrix": LowRank(torch.zeros(8, 5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_top_is_the_largest_singular_value(change):
    values = torch.linalg.svdvals(change.dense().double())
    assert change.top() == pytest.approx(values[0].item(), rel=1e-6)
    assert change.top() <= change.norm() * (1 + 1e-6)
    twice = LowRank(-2 * change.left, change.right)
    assert twice.top() == pytest.approx(2 * values[0].item(), rel=1e-6)


@pytest.mark.parametrize("change", NOTHING.values(), ids=NOTHING)
def test_a_change_of_nothing_has_no_top_and_a_placebo_of_nothing(change):
    assert change.top() == 0
    random = change.placebo(0)
    assert random.dense().shape == (8, 5)
    assert not random.dense().any()


def test_a_dense_change_of_half_precision_has_a_top():
    change = low_rank(8, 5, 2)
    factors = LowRank(change.left.bfloat16(), change.right.bfloat16())
    assert factors.top() == pytest.approx(change.top(), rel=0.02)
    assert LowRank(change.dense().bfloat16()).top() == pytest.approx(change.top(), rel=0.02)


FULL = {name: change for name, change in CHANGES.items() if name != "dependent"}


def numerical_rank(change):
    return torch.linalg.matrix_rank(change.dense().double(), rtol=1e-5).item()


@pytest.mark.parametrize("change", FULL.values(), ids=FULL)
def test_a_placebo_has_shape_rank_and_norm_of_the_change_and_nothing_else(change):
    random = change.placebo(3)
    assert random.dense().shape == change.dense().shape
    assert random.dense().dtype == change.dense().dtype
    assert numerical_rank(random) == numerical_rank(change)
    assert random.norm() == pytest.approx(change.norm(), rel=1e-6)
    assert random.dense().norm().item() == pytest.approx(change.dense().norm().item(), rel=1e-6)
    a, b = random.dense().double().flatten(), change.dense().double().flatten()
    if len(a) > 1000:
        assert abs(a @ b / (a.norm() * b.norm())) < 0.2


@pytest.mark.parametrize("change", [CHANGES["dependent"], LowRank(low_rank(32, 80, 3).dense())], ids=["wide", "dense"])
def test_a_placebo_of_a_change_of_lower_rank_than_its_form_has_that_rank(change):
    assert numerical_rank(change.placebo(0)) == numerical_rank(change)


def test_a_placebo_is_drawn_by_its_seed_and_changes_the_same_weights():
    delta = some_delta()
    kept = {name: change.dense().clone() for name, change in delta.changes.items()}
    one, again, other = (delta.placebo(seed) for seed in (0, 0, 5))
    assert one.changes.keys() == again.changes.keys() == other.changes.keys() == {DOWN, UP}
    assert one.norm() == pytest.approx(delta.norm(), rel=1e-9)
    for name, change in delta.changes.items():
        assert torch.equal(change.dense(), kept[name])
        assert torch.equal(one.changes[name].dense(), again.changes[name].dense())
        assert not torch.allclose(one.changes[name].dense(), other.changes[name].dense())
        assert one.changes[name].norm() == pytest.approx(change.norm(), rel=1e-9)
    assert WeightDelta().placebo(0).changes == {}


def test_two_weights_of_one_shape_get_placebos_of_their_own():
    alike = low_rank(32, 80, 3)
    drawn = list(WeightDelta({"a": alike, "b": alike}).placebo(0).changes.values())
    assert not torch.allclose(drawn[0].dense(), drawn[1].dense())


def test_the_global_generator_is_left_alone_by_a_placebo():
    before = torch.get_rng_state()
    some_delta().placebo(0)
    assert torch.equal(torch.get_rng_state(), before)


def keyed(*keys):
    return WeightDelta({DOWN: low_rank(32, 80, 1)}, keys=[torch.tensor(key) for key in keys])


@pytest.mark.parametrize(
    ("keys", "overlap"),
    [
        (([[1.0, 0.0]], [[0.0, 2.0]]), 0.0),
        (([[1.0, 0.0]], [[-3.0, 0.0]]), 1.0),
        (([[1.0, 0.0]], [[3.0, 4.0]]), 0.6),
        (([[1.0, 0.0], [0.0, 9.0]], [[3.0, -4.0]]), 0.8),  # the nearest of the earlier ones
        (([[3.0, 4.0]], [[5.0, 0.0], [0.0, 1.0]]), 0.8),  # and of the newest
        (([[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]), 0.0),  # earlier ones among themselves do not count
        (([[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]), 1.0),  # not the one before alone
    ],
)
def test_overlap_is_the_largest_cosine_of_the_newest_keys_with_earlier_ones(keys, overlap):
    assert keyed(*keys).overlap() == pytest.approx(overlap, abs=1e-6)
    total = keyed(keys[0])
    for key in keys[1:]:
        total = total + keyed(key)
    assert total.overlap() == pytest.approx(overlap, abs=1e-6)


def test_a_sum_keeps_the_latest_keys_within_its_bound(monkeypatch):
    monkeypatch.setattr("qfbench.models.delta.KEYS", 3 * 2 * 4)  # three keys of two float32
    total = keyed([[1.0, 0.0]])
    for key in ([[0.0, 1.0]], [[1.0, 1.0]]):
        total = total + keyed(key)
    assert len(total.keys) == 3
    total = total + keyed([[1.0, 0.0]])
    assert [key.tolist() for key in total.keys] == [[[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]]]
    assert total.overlap() == pytest.approx(0.5**0.5)  # that of the first, 1, is forgotten
    whole = keyed([[1.0, 0.0]] * 9)
    assert len((total + whole).keys) == 1  # the newest is kept, whatever its size


def test_a_long_sum_holds_no_more_than_its_matrix_and_the_keys(monkeypatch):
    monkeypatch.setattr("qfbench.models.delta.KEYS", 2**12)
    total = WeightDelta()
    for seed in range(60):
        step = replace(keyed(), changes={DOWN: low_rank(32, 80, 3, seed)}, keys=[torch.randn(3, 80)])
        total = total + step
        (change,) = total.changes.values()
        held = [*total.keys, change.left, *([] if change.right is None else [change.right])]
        assert sum(t.numel() * t.element_size() for t in held) <= 32 * 80 * 8 + 2**12
    assert change.right is None


def test_without_earlier_keys_there_is_no_overlap():
    assert math.isnan(keyed().overlap())
    assert math.isnan(keyed([[1.0, 0.0], [1.0, 0.0]]).overlap())
    assert math.isnan((keyed([[1.0]]) + keyed([[1.0]])).placebo(0).overlap())  # a placebo has no keys
