"""A table of many runs made short, and written in other forms."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from qfbench import UserError
from qfbench.analysis.overview import narrowed, ordered, overview, where
from qfbench.analysis.tables import show, written

NAN = float("nan")


def table():
    lines = []
    for lr in (0.003, 0.01):
        for layer in (2, 10):
            about = {"model.path": "world-s", "editor._target_": "FineTune", "editor.layer": layer, "editor.lr": lr}
            who = {"model": "world-s", "editor": "FineTune", "of": "sequential"}
            told = about | who | {"regime": "unedited", "efficacy": 0.0, "prior": 1.0, "of": None}
            after = {"regime": "sequential", "efficacy": lr * layer, "efficacy_low": 0.0, "efficacy_high": 0.5}
            lines += [told, about | who | after | {"prior": 1 - lr}, about | who | {"regime": "placebo", "prior": 0.9}]
    return pd.DataFrame(lines)


def test_only_what_varies_is_shown_by_short_names_and_baselines_stand_once():
    got = overview(table())
    assert list(got)[:5] == ["model", "editor", "regime", "layer", "lr"]
    assert not {"model.path", "editor._target_"} & set(got)
    assert got.regime.value_counts().to_dict() == {"sequential": 4, "placebo": 4, "unedited": 1}
    base = got[got.regime == "unedited"].iloc[0]
    assert base.editor == ""
    assert np.isnan(base.layer)
    assert np.isnan(base.lr)


def test_a_short_name_that_means_two_things_stays_long():
    got = overview(table().assign(**{"facts.layer": np.arange(12)}))
    assert {"editor.layer", "facts.layer", "lr"} <= set(got)


def test_a_baseline_of_another_size_stays():
    changed = table()
    changed.loc[3, "prior"] = 0.5
    assert (overview(changed).regime == "unedited").sum() == 2


def test_lines_are_chosen_by_what_they_hold():
    got = overview(table())
    assert len(where(got, ["lr=0.003", "layer=10"])) == 2
    assert set(where(got, ["regime=sequential"]).regime) == {"sequential", "placebo"}
    assert len(where(got, ["layer=2,10"])) == 8
    with pytest.raises(UserError, match=r"--where layer=3: no line has it; there are nan, 2, 10"):
        where(got, ["layer=3"])
    with pytest.raises(UserError, match="--where rate: no such column; there are model, editor, regime, layer, lr"):
        where(got, ["rate=1"])


def test_measures_are_sorted_from_the_highest_and_settings_from_the_lowest():
    got = overview(table())
    assert ordered(got, "efficacy").efficacy.dropna().tolist() == [0.1, 0.03, 0.02, 0.006, 0.0]
    assert ordered(got, "layer").layer.dropna().tolist() == [2.0] * 4 + [10.0] * 4
    with pytest.raises(UserError, match="--sort age"):
        ordered(got, "age")


def test_columns_keep_their_intervals():
    assert list(narrowed(overview(table()), ["layer", "efficacy"])) == [
        *("layer", "efficacy", "efficacy_low", "efficacy_high")
    ]


def printed(frame, width):
    out = Console(file=io.StringIO(), width=width)
    show(out, frame, "runs", ["of"])
    return out.file.getvalue()


@pytest.mark.parametrize("width", [200, 60, 52])
def test_no_number_is_cut_where_the_window_is_narrow(width):
    text = printed(overview(table()), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in ("0.003", "10", ".10±.40", "0.99"):
        assert number in text
    assert text.count("regime") == (1 if width > 60 else text.count("runs"))


def test_a_table_can_be_written_in_four_forms():
    frame = overview(table())
    assert pd.read_csv(io.StringIO(written(frame, "csv"))).efficacy.tolist() == pytest.approx(
        frame.efficacy.tolist(), nan_ok=True
    )
    assert json.loads(written(frame, "json"))[1]["lr"] == 0.003
    markdown = written(frame, "markdown", ["of"]).splitlines()
    assert markdown[0] == "| model | editor | regime | layer | lr | efficacy | prior |"
    assert markdown[1] == "| --- | --- | --- | ---: | ---: | ---: | ---: |"
    assert "| world-s | FineTune | sequential | 10 | 0.003 | .03±.47 | 1.00 |" in markdown
    latex = written(frame.assign(model="a_b"), "latex", ["of"])
    assert latex.startswith("\\begin{tabular}{lllrrrr}\n\\toprule\nmodel & editor & regime & layer & lr")
    assert "a\\_b & FineTune & sequential & 10 & 0.003 & .03$\\pm$.47 & 1.00 \\\\" in latex
