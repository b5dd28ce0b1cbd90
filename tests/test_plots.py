import numpy as np
import pandas as pd
import pytest

from qfbench.analysis.catalogue import MEASURES
from qfbench.analysis.measures import by_layer
from qfbench.analysis.plots import (
    conversion,
    forgetting_curves,
    layer_curve,
    learning_rates,
    retention_matrices,
)
from qfbench.analysis.rows import regular
from qfbench.analysis.sequences import forgetting
from qfbench.analysis.styles import OTHER, STYLES


def drawn(axes):
    """The lines of one panel by the name that the legend gives them."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def points(x, y):
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]


def rows(regime, step, kind, *generated, **more):
    """One edited row per value of `generated`, each of another fact."""
    frame = pd.DataFrame({"generated": generated, "fact_id": [f"{kind}{n}" for n in range(len(generated))]})
    same = {"regime": regime, "step": step, "kind": kind, "taught": step, "condition": "edited", "layer": 2}
    same |= {"model": "m", "editor": "QF", "checkpoint": True, "fresh": False, "leaked": False, "relative_norm": 0.5}
    return regular(frame.assign(**(same | more)))


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
        "QF sequential": [[2, 0.5], [4, 0.25]],
        "QF joint": [[2, 1.0], [4, 0.75]],
        "QF my own": [[4, 0.0]],
    }
    assert drawn(prior) == {
        "QF sequential": [[2, 0.75], [4, 0.25]],
        "QF joint": [[2, 1.0], [4, 0.5]],
        "QF my own": [[4, 0.0]],
    }
    assert {text.get_text() for text in kept.figure.legends[0].get_texts()} == set("QF " + curves.regime)


def test_prior_knowledge_begins_with_what_the_unedited_model_answers_and_has_a_band():
    asked = rows("unedited", 0, "prior", True, True, True, False, True, False)  # the last two are not asked again
    frame = pd.concat([asked.assign(condition="unedited", editor="none"), RETAINED])
    frame = frame[frame.regime.isin(["unedited", "sequential"])]
    kept, prior = forgetting_curves(forgetting(frame), frame).axes
    assert drawn(prior) == {"QF sequential": [[0, 0.75], [2, 0.75], [4, 0.25]]}
    for axes, steps in ((kept, {2, 4}), (prior, {0, 2, 4})):
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        assert set(corners[:, 0]) == steps
        line = dict(axes.lines[0].get_xydata())
        assert all(
            min(y for at, y in corners if at == x) < line[x] < max(y for at, y in corners if at == x) for x in line
        )


def test_without_questions_of_prior_knowledge_its_panel_is_empty():
    frame = RETAINED[RETAINED.kind == "edit"]
    kept, prior = forgetting_curves(forgetting(frame), frame).axes
    assert len(kept.collections) == 3
    assert not prior.collections


def test_forgetting_curves_of_several_editors_and_models_are_apart_and_named():
    first = RETAINED[RETAINED.regime == "sequential"]
    second = first.assign(editor="QF2", generated=~first.generated)
    frame = pd.concat([first, second])
    kept, prior = forgetting_curves(forgetting(frame), frame).axes
    assert drawn(kept) == {"QF sequential": [[2, 0.5], [4, 0.25]], "QF2 sequential": [[2, 0.5], [4, 0.75]]}
    assert drawn(prior) == {"QF sequential": [[2, 0.75], [4, 0.25]], "QF2 sequential": [[2, 0.25], [4, 0.75]]}
    assert kept.lines[0].get_color() != kept.lines[1].get_color()
    frame = pd.concat([first, first.assign(model="n", generated=True), second.assign(model="n")])
    kept, prior = forgetting_curves(forgetting(frame), frame).axes
    assert drawn(kept) == {
        "QF sequential, m": [[2, 0.5], [4, 0.25]],
        "QF sequential, n": [[2, 1.0], [4, 1.0]],
        "QF2 sequential, n": [[2, 0.5], [4, 0.75]],
    }
    assert drawn(prior) == {
        "QF sequential, m": [[2, 0.75], [4, 0.25]],
        "QF sequential, n": [[2, 1.0], [4, 1.0]],
        "QF2 sequential, n": [[2, 0.25], [4, 0.75]],
    }


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
        assert styles == {
            "QF sequential": STYLES["QF sequential"],
            "QF joint": STYLES["QF joint"],
            "QF my own": OTHER,
        }


def test_no_two_styles_are_alike():
    # Retention is drawn as efficacy, which it is later on.
    of_measures = {name: m.style for name, m in MEASURES.items() if any(m.style) and name != "retention"}
    for styles in (STYLES, of_measures):
        assert len(set(styles.values())) == len({colour for colour, _, _ in styles.values()}) == len(styles)
        assert len({(line, marker) for _, line, marker in styles.values()}) == len(styles)


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


DRAWN = ("efficacy", "paraphrase", "prior", "leakage")
RATES = pd.DataFrame(
    {
        "scheme": ["all_tokens", "all_tokens", "name_only", "name_only"],
        "lr": [0.01, 0.1, 0.02, 0.2],
        "efficacy": [0.1, 0.9, 0.2, 0.8],
        "paraphrase": [0.05, 0.7, 0.15, 0.6],
        "prior": [1.0, 0.3, 0.95, 0.4],
        "leakage": [0.0, 0.25, 0.35, 0.45],
        "balance": [0.5, 0.5, 0.5, 0.5],
    }
)
REFERENCE = pd.DataFrame(
    {"scheme": ["QF"], "lr": [np.nan], "efficacy": [0.77], "paraphrase": [0.66], "prior": [0.55], "leakage": [0.44]}
)


def test_learning_rates_draw_each_measure_at_its_rate_a_panel_per_scheme():
    figure = learning_rates(RATES, REFERENCE)
    assert [axes.get_title() for axes in figure.axes] == ["all tokens", "name only"]
    for axes, (_, own) in zip(figure.axes, RATES.groupby("scheme"), strict=True):
        lines = {name: xy for name, xy in drawn(axes).items() if not name.startswith("_")}
        assert lines == {name: points(own.lr, own[name]) for name in DRAWN}
        assert axes.get_xscale() == "log"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(DRAWN)


def test_a_reference_is_a_tick_at_the_right_edge_of_each_panel_in_the_colour_of_its_measure():
    figure = learning_rates(RATES, REFERENCE)
    figure.draw_without_rendering()
    for axes in figure.axes:
        colours = {line.get_color(): line.get_label() for line in axes.lines if not line.get_label().startswith("_")}
        ticks = {
            colours[line.get_color()]: line.get_xydata().tolist()
            for line in axes.lines
            if line.get_label().startswith("_")
        }
        assert ticks == {name: [[1.0, REFERENCE[name].item()]] for name in DRAWN}
        for line in axes.lines:
            if line.get_label().startswith("_"):
                (x, y) = line.get_transform().transform(line.get_xydata())[0]
                assert x == pytest.approx(axes.bbox.x1)
                assert axes.transData.inverted().transform((x, y))[1] == pytest.approx(line.get_ydata()[0])


def test_learning_rates_without_a_reference_have_lines_alone():
    figure = learning_rates(RATES[RATES.scheme == "name_only"], REFERENCE[:0])
    (axes,) = figure.axes
    assert list(drawn(axes)) == list(DRAWN)


def test_a_conversion_is_drawn_with_its_smoothed_loss_and_its_share():
    steps = np.arange(60)
    frame = pd.DataFrame({"step": steps, "loss": np.where(steps < 30, 4.0, 2.0), "alpha": 0.9**steps})
    loss, share = conversion(frame).axes
    (smooth,), (alpha,) = (axes.lines for axes in (loss, share))
    np.testing.assert_allclose(alpha.get_xydata(), np.column_stack([steps, frame.alpha]))
    assert list(smooth.get_xdata()) == list(steps)
    values = smooth.get_ydata()
    assert list(values[:30]) == pytest.approx([4.0] * 30)
    assert list(values[54:]) == pytest.approx([2.0] * 6)
    assert values[39] == pytest.approx((15 * 4 + 10 * 2) / 25)  # mean of steps 15 to 39
    assert loss.get_ylim()[0] == 0
    assert loss.get_ylabel().startswith("loss")
    assert "α" in share.get_ylabel()
    assert smooth.get_color() != alpha.get_color()


def matrix(*lines):
    steps = pd.Index(range(1, len(lines) + 1), name="step")
    return pd.DataFrame(lines, steps, pd.Index([f"f{k}" for k in range(len(lines[0]))], name="fact_id"), dtype=float)


SEQUENTIAL = matrix([1, np.nan, np.nan], [0, 1, np.nan], [1, 0, 1])
CHECKED = matrix(  # asked in full at the edits 1, 2 and 5; at 3 and 4 the newest alone
    [1, np.nan, np.nan, np.nan, np.nan],
    [0, 1, np.nan, np.nan, np.nan],
    [np.nan, np.nan, 1, np.nan, np.nan],
    [np.nan, np.nan, np.nan, 0, np.nan],
    [1, 0, 0, 1, 1],
)


def cells(axes):
    """The values drawn in one panel, n down and k across; NaN where nothing is, and where the cells begin and end."""
    (mesh,) = axes.collections
    grid = mesh.get_coordinates()
    return np.ma.filled(mesh.get_array(), np.nan), grid[0, :, 0].tolist(), grid[:, 0, 1].tolist()


def test_retention_matrices_are_drawn_cell_by_cell_a_panel_per_sequence():
    figure = retention_matrices({("m", "QF", "sequential", 0): SEQUENTIAL, ("m", "QF2", "joint", 0): CHECKED})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["answered", "not answered"]
    assert [axes.get_title() for axes in figure.axes] == ["QF sequential", "QF2 joint"]
    values, across, down = cells(figure.axes[0])
    np.testing.assert_array_equal(values, SEQUENTIAL)
    assert (across, down) == ([0.5, 1.5, 2.5, 3.5], [0.5, 1.5, 2.5, 3.5])
    values, across, down = cells(figure.axes[1])
    np.testing.assert_array_equal(values, CHECKED.loc[[1, 2, 5]])
    assert across == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert down == [0.5, 1.5, 3.5, 5.5]  # a row holds its own step and ends half way to its neighbours
    for axes in figure.axes:
        assert axes.yaxis_inverted()
        assert axes.collections[0].get_clim() == (0, 1)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("fact, in order of teaching", "edits")
    dark, light = (sum(figure.axes[0].collections[0].cmap(value)[:3]) for value in (1.0, 0.0))
    assert dark < light


def test_retention_matrices_show_the_first_order_and_name_models_where_there_are_several():
    of = {
        ("m", "QF", "joint", 2): matrix([0]),
        ("m", "QF", "joint", 1): matrix([1]),
        ("n", "QF", "joint", 3): matrix([0, np.nan], [0, 0]),
    }
    first, second = retention_matrices(of).axes
    assert (first.get_title(), second.get_title()) == ("QF joint, m", "QF joint, n")
    assert cells(first)[0].tolist() == [[1]]
    assert cells(second)[0].shape == (2, 2)
    (alone,) = retention_matrices({key: value for key, value in of.items() if key[0] == "m"}).axes
    assert alone.get_title() == "QF joint"


def test_a_placebo_has_no_curve():
    frame = pd.concat([RETAINED, rows("sequential", 4, "edit", True, condition="placebo")])
    kept, _ = forgetting_curves(forgetting(frame), frame).axes
    assert drawn(kept) == drawn(forgetting_curves(forgetting(RETAINED), RETAINED).axes[0])


def test_a_placebo_is_no_part_of_the_curve_of_prior_knowledge():
    placebo = rows("sequential", 4, "prior", True, True, True, True, condition="placebo")
    frame = pd.concat([RETAINED, placebo])
    _, prior = forgetting_curves(forgetting(frame), frame).axes
    assert drawn(prior)["QF sequential"] == [[2, 0.75], [4, 0.25]]
