import numpy as np
import pandas as pd
import pytest

from qfbench.metrics import by_layer, forgetting
from qfbench.plots import OTHER, STYLES, forgetting_curves, layer_curve


def drawn(axes):
    """The lines of one panel by the name that the legend gives them."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def points(x, y):
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]


def rows(regime, step, kind, *generated, **more):
    """One edited row per value of `generated`, each of another fact."""
    frame = pd.DataFrame({"generated": generated, "fact_id": [f"{kind}{n}" for n in range(len(generated))]})
    same = {"regime": regime, "step": step, "kind": kind, "taught": step, "condition": "edited", "layer": 2}
    return frame.assign(**(same | {"checkpoint": True, "fresh": False, "leaked": False, "relative_norm": 0.5} | more))


RETAINED = pd.concat(
    [
        rows("sequential", 2, "edit", True, False),
        rows("sequential", 2, "prior", True, True, True, False),
        rows("sequential", 4, "edit", True, False, False, False),
        rows("sequential", 4, "prior", True, False, False, False),
        rows("joint", 2, "edit", True, True),
        rows("joint", 2, "prior", True, True),
        rows("joint", 4, "edit", True, True, True, False),
        rows("joint", 4, "prior", True, False),
        rows("my own", 4, "edit", False),
        rows("my own", 4, "prior", False),
    ],
    ignore_index=True,
)


def test_forgetting_curves_draw_retention_and_prior_of_each_regime():
    curves = forgetting(RETAINED)
    kept, prior = forgetting_curves(curves, RETAINED).axes
    assert drawn(kept) == {
        "sequential": [[2, 0.5], [4, 0.25]],
        "joint": [[2, 1.0], [4, 0.75]],
        "my own": [[4, 0.0]],
    }
    assert drawn(prior) == {
        "sequential": [[2, 0.75], [4, 0.25]],
        "joint": [[2, 1.0], [4, 0.5]],
        "my own": [[4, 0.0]],
    }
    assert {text.get_text() for text in kept.get_legend().get_texts()} == set(curves.regime)


def test_the_band_of_a_forgetting_curve_is_its_interval():
    curves = forgetting(RETAINED)
    kept, _ = forgetting_curves(curves, RETAINED).axes
    for band, (_, curve) in zip(kept.collections, curves.groupby("regime", sort=False), strict=True):
        corners = set(map(tuple, band.get_paths()[0].vertices.tolist()))
        assert corners == {*zip(curve.step, curve.low, strict=True), *zip(curve.step, curve.high, strict=True)}
    assert (curves.low < curves.high).any()


def test_a_regime_has_one_style_in_both_panels_and_an_unknown_one_has_its_own():
    kept, prior = forgetting_curves(forgetting(RETAINED), RETAINED).axes
    for panel in (kept, prior):
        styles = {line.get_label(): (line.get_color(), line.get_ls(), line.get_marker()) for line in panel.lines}
        assert styles == {"sequential": STYLES["sequential"], "joint": STYLES["joint"], "my own": OTHER}


LAYERS = pd.DataFrame(
    {
        "layer": [0, 1, 3],
        "efficacy": [0.1, 0.2, 0.3],
        "paraphrase": [0.91, 0.92, 0.93],
        "held_out": [0.4, np.nan, 0.6],
        "prior": [0.7, 0.8, 0.9],
        "refused": [1.0, 0.95, 0.85],
        "seq_retention": [0.15, 0.25, 0.35],
        "seq_prior": [0.45, 0.55, 0.65],
        "seq_refused": [0.75, 0.05, 0.0],
        "norm": [0.01, 0.02, 0.03],
    }
)
ALONE = {"efficacy": "efficacy", "held_out": "paraphrase, unseen wording", "prior": "prior", "refused": "refused"}
SEQUENCE = {"seq_retention": "retention", "seq_prior": "prior", "seq_refused": "refused"}


@pytest.mark.parametrize("missing", [None, *ALONE, *SEQUENCE])
def test_layer_curve_draws_each_measure_at_its_layer_and_skips_what_was_not_asked(missing):
    curve = LAYERS.drop(columns=[missing] if missing else [])
    figure = layer_curve(curve)
    for axes, names in zip(figure.axes, (ALONE, SEQUENCE), strict=True):
        lines = drawn(axes)
        assert list(lines) == [label for name, label in names.items() if name != missing]
        for name in names.keys() - {missing}:
            np.testing.assert_array_equal(lines[names[name]], points(curve.layer, curve[name]))
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
        assert list(axes.get_xticks()) == [0, 1, 3]


def test_layer_curve_draws_single_edits_left_and_the_sequence_right():
    alone = {"taught": 1, "layer": 5}
    after = {"layer": 5}
    curve = by_layer(
        pd.concat(
            [
                rows("single", 1, "edit", True, True, True, False, fresh=True, **alone),
                rows("single", 1, "prior", True, False, **alone),
                rows("single", 1, "unknown", True, True, leaked=True, relative_norm=0.1, **alone),
                rows("sequential", 1, "prior", True, True, **after),
                rows("sequential", 2, "edit", True, False, **after),
                rows("sequential", 2, "prior", False, False, **after),
                rows("sequential", 2, "unknown", True, False, False, False, **after),
            ]
        )
    )
    single, sequence = layer_curve(curve).axes
    assert drawn(single) == {"efficacy": [[5, 0.75]], "prior": [[5, 0.5]], "refused": [[5, 1.0]]}
    assert drawn(sequence) == {"retention": [[5, 0.5]], "prior": [[5, 0.0]], "refused": [[5, 0.25]]}
    assert (curve.leakage.item(), curve.seq_leakage.item()) == (1.0, 0.0)
    assert curve.norm.item() == pytest.approx((6 * 0.5 + 2 * 0.1) / 8)
    assert curve.seq_norm.item() == 0.5
