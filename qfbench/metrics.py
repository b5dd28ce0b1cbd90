"""Rows to measures: pure functions of one frame of rows (see `probes.ask` and `retention.check` for the columns)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def interval(values: ArrayLike, clusters: ArrayLike, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a mean, resampling whole clusters (all values of one fact together).

    With one cluster, or where all clusters have the same mean, the interval has no width and says nothing.
    """
    frame = pd.DataFrame({"value": np.asarray(values, float), "cluster": np.asarray(clusters)})
    sums = frame.groupby("cluster")["value"].agg(["sum", "count"]).to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def forgetting(rows: pd.DataFrame) -> pd.DataFrame:
    """Retention after n edits: the share of facts taught so far whose taught query is still answered (mean_k R[n, k]).

    Returns columns `model`, `editor`, `regime`, `step` (n), `mean`, `low`, `high` (95%, over facts); nothing of regimes that do not accumulate.
    """
    edited = rows[rows.condition == "edited"]
    asked = edited[(edited.kind == "edit") & edited.checkpoint.astype(bool) & (edited.taught == edited.step)]
    out = []
    by = ["model", "editor", "regime", "step"]
    for key, group in asked.groupby(by, sort=False):
        low, high = interval(group.generated, group.fact_id)
        measured = {"mean": group.generated.mean(), "low": low, "high": high}
        out.append(dict(zip(by, key, strict=True)) | measured)
    return pd.DataFrame(out, columns=[*by, "mean", "low", "high"])


def shares(rows: pd.DataFrame, *kinds: str) -> dict[str, float]:
    """For each kind of probe, the share of replies that pass under the `generated` protocol; NaN where none was asked."""
    return {kind: rows.generated[rows.kind == kind].astype(float).mean() for kind in kinds}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, editor and regime, below the unedited model (`unedited`) and what it answers when told (`in_context`).

    Right after each fact's own edit: `efficacy` (its query), `paraphrase`, `held_out` (wordings that training never
    used), `portability` (what follows from it). After the last edit: `retention` (all taught queries), `prior` (of what
    the unedited model knew), `refused` (of unknown subjects refused before), `leakage` (unknown subjects that got a
    taught answer), `norm` (‖ΔW‖ / ‖W‖). Regime `single` accumulates nothing: it has no `retention`, and its other
    measures are means over all edits. In the line `unedited`, `prior` and `refused` are of all that was asked.
    """
    out: list[dict[str, Any]] = []
    for (model, editor), own in rows.groupby(["model", "editor"], sort=False):
        who = {"model": model, "editor": editor}
        for condition in ("unedited", "in_context"):
            asked = own[own.condition == condition]
            if len(asked):
                out.append(who | {"regime": condition, **_fresh(asked), "retention": float("nan"), **_kept(asked)})
        for regime, group in own[own.condition == "edited"].groupby("regime", sort=False):
            accumulates = (group.taught == group.step).all()
            last = group[group.step == group.step.max()] if accumulates else group
            kept = shares(last, "edit")["edit"] if accumulates else float("nan")
            fresh = _fresh(group[group.fresh.astype(bool)])
            out.append(who | {"regime": regime, **fresh, "retention": kept, **_kept(last)})
    return pd.DataFrame(out).dropna(axis=1, how="all")


def by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per layer: the measures of `summary` for single edits, then after the last of the sequential ones."""
    edited = rows[rows.condition == "edited"]
    out = []
    for layer, group in edited.groupby("layer"):
        single, run = group[group.regime == "single"], group[group.regime == "sequential"]
        last = run[run.step == run.step.max()]
        after = {"retention": shares(last, "edit")["edit"]} | _kept(last)
        after = {f"seq_{name}": value for name, value in after.items()}
        out.append({"layer": int(layer)} | _fresh(single[single.fresh.astype(bool)]) | _kept(single) | after)
    return pd.DataFrame(out).dropna(axis=1, how="all")


def by_setting(rows: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """One line per setting of the editor: the measures of `summary`, over single edits.

    `balance` is the harmonic mean of efficacy and prior: high only where an edit teaches and spares at once.
    """
    single = rows[(rows.condition == "edited") & (rows.regime == "single")]
    out = []
    for key, group in single.groupby(list(settings), sort=False, dropna=False):
        line = dict(zip(settings, key, strict=True)) | _fresh(group[group.fresh.astype(bool)]) | _kept(group)
        both = line["efficacy"] + line["prior"]
        out.append(line | {"balance": 2 * line["efficacy"] * line["prior"] / both if both else 0.0})
    return pd.DataFrame(out).dropna(axis=1, how="all")


def _fresh(rows: pd.DataFrame) -> dict[str, float]:
    measured = shares(rows, "edit", "paraphrase", "paraphrase_held_out", "portability")
    names = {"edit": "efficacy", "paraphrase_held_out": "held_out"}
    return {names.get(kind, kind): value for kind, value in measured.items()}


def _kept(rows: pd.DataFrame) -> dict[str, float]:
    kept = shares(rows, "prior", "unknown")
    leaked = rows.leaked[rows.kind == "unknown"].astype(float).mean()
    return {"prior": kept["prior"], "refused": kept["unknown"], "leakage": leaked, "norm": rows.relative_norm.mean()}
