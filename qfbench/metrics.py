"""Rows to measures: pure functions of one frame of rows (see `probes.ask` and `retention.check` for the columns)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def interval(
    values: ArrayLike, clusters: ArrayLike, groups: ArrayLike | None = None, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of a mean, resampling whole clusters (all values of one fact together).

    With `groups` (orders, seeds), these are resampled first, then the clusters within each. With one cluster, or where
    all clusters have the same mean, the interval has no width and says nothing.
    """
    frame = pd.DataFrame({"value": np.asarray(values, float), "cluster": np.asarray(clusters)})
    frame["group"] = 0 if groups is None else np.asarray(groups)
    rng, totals = np.random.default_rng(0), np.zeros((draws, 2))
    parts = [
        own.groupby("cluster")["value"].agg(["sum", "count"]).to_numpy() for _, own in frame.groupby("group", sort=True)
    ]
    for _ in parts:  # each draw takes as many groups as there are
        chosen = rng.integers(len(parts), size=draws)
        for g, sums in enumerate(parts):
            taken = np.flatnonzero(chosen == g)
            totals[taken] += sums[rng.integers(len(sums), size=(len(taken), len(sums)))].sum(axis=1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def forgetting(rows: pd.DataFrame) -> pd.DataFrame:
    """Retention after n edits: the share of facts taught so far whose taught query is still answered (mean_k R[n, k]).

    Returns columns `model`, `editor`, `regime`, `step` (n), `mean`, `low`, `high` (95%, over orders and facts); nothing of regimes that do not accumulate.
    """
    edited = rows[rows.condition == "edited"]
    asked = edited[(edited.kind == "edit") & edited.checkpoint.astype(bool) & (edited.taught == edited.step)]
    out = []
    by = ["model", "editor", "regime", "step"]
    for key, group in asked.groupby(by, sort=False):
        low, high = interval(group.generated, group.fact_id, group.order.fillna(0) if "order" in group else None)
        measured = {"mean": group.generated.mean(), "low": low, "high": high}
        out.append(dict(zip(by, key, strict=True)) | measured)
    return pd.DataFrame(out, columns=[*by, "mean", "low", "high"])


SEQUENCE = ["model", "editor", "regime", "order"]


def matrices(rows: pd.DataFrame, protocol: str = "generated") -> dict[tuple[str, str, str, int], pd.DataFrame]:
    """The retention matrix R[n, k] of each sequence: the result on the k-th fact after n edits, under one protocol.

    By (model, editor, regime, order). Index `step` (n), columns `fact_id` in the order of teaching; NaN before a fact is
    taught and where it was not asked. Nothing of regimes that do not accumulate.
    """
    edited = rows[(rows.condition == "edited") & (rows.kind == "edit") & (rows.taught == rows.step)]
    edited = edited.assign(order=edited.order.fillna(0).astype(int) if "order" in edited else 0)
    out = {}
    for key, own in edited.groupby(SEQUENCE, sort=False):
        taught = own[own.fresh.astype(bool)].sort_values("step").fact_id
        values = own.assign(value=own[protocol].astype(float)).pivot(index="step", columns="fact_id", values="value")
        out[key] = values[list(taught)]
    return out


def average_forgetting(matrix: pd.DataFrame) -> float:
    """mean_k (max_n R[n, k] − R[N, k]): what the facts have lost since they were known best. 0 to 1 (Chaudhry et al. 2018)."""
    return float((matrix.max() - matrix.iloc[-1]).mean())


def half_life(matrix: pd.DataFrame) -> float:
    """After how many further edits facts are answered half as often as right after their own; NaN if they never are.

    The mean of R[n, k] over all n − k = l, for each l at which any fact was asked.
    """
    own_step = pd.Series(matrix.notna().idxmax(), dtype=float)
    long = matrix.stack().dropna().rename("value").reset_index()
    later = long["step"] - long["fact_id"].map(own_step)
    survival = long.groupby(later.to_numpy()).value.mean().sort_index()
    halved = survival[(survival <= 0.5 * survival.iloc[0]) & (survival.iloc[0] > 0)]
    return float(halved.index[0]) if len(halved) else float("nan")


def over_sequence(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, editor, regime and order, from its retention matrix.

    `immediate` (mean R[k, k]), `final` (mean R[N, ·]), `forgetting` (`average_forgetting`), `half_life` (in edits), `first`
    (after how many edits the first fact was last answered), `collapse` (the first checkpoint at which prior knowledge is
    under half; NaN if none) and `edits` (N).
    """
    out = []
    for key, matrix in matrices(rows).items():
        full = matrix[matrix.notna().sum(axis=1) == matrix.index]  # the checkpoints
        if full.empty:
            continue
        who = dict(zip(SEQUENCE, key, strict=True))
        own = rows[(rows.condition == "edited") & (rows.kind == "prior")]
        for name, value in who.items():
            own = own[own[name].fillna(0) == value] if name in own else own
        prior = own.groupby("step").generated.mean()
        fallen, first = prior[prior < 0.5], matrix.iloc[:, 0]
        right_after = [matrix[fact].dropna().iloc[0] for fact in matrix]
        measures = {
            "edits": int(matrix.index[-1]),
            "immediate": float(np.mean(right_after)),
            "final": float(full.iloc[-1].mean()),
            "forgetting": average_forgetting(matrix.loc[: full.index[-1]]),
            "half_life": half_life(matrix),
            "first": float(first[first == 1].index.max()) if (first == 1).any() else 0.0,
            "collapse": float(fallen.index[0]) if len(fallen) else float("nan"),
        }
        out.append(who | measures)
    return pd.DataFrame(out)


def shares(rows: pd.DataFrame, *kinds: str) -> dict[str, float]:
    """For each kind of probe, the share of replies that pass under the `generated` protocol; NaN where none was asked."""
    return {kind: rows.generated[rows.kind == kind].astype(float).mean() for kind in kinds}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, editor and regime, below the unedited model (`unedited`) and what it answers when told (`in_context`).

    Right after each fact's own edit: `efficacy` (its query), `paraphrase`, `held_out` (wordings that training never
    used), `portability` (what follows from it). After the last edit: `retention` (all taught queries), `prior` (of what
    the unedited model knew), `locality` (neighbours of which it says what it said), `refused` (of unknown subjects refused before), `leakage` (unknown subjects that got a
    taught answer), `norm` (‖ΔW‖ / ‖W‖). Regime `single` accumulates nothing: it has no `retention`, and its other
    measures are means over all edits. `preferred` and `locality_gold`, `locality_preferred` are the same under those protocols
    (`probes.ask`). A line `placebo` is the state after the last edit of the
    regime above it (`of`), with a random change of the same size instead. In the line `unedited`, `prior` and `refused` are of all that was asked.
    """
    out: list[dict[str, Any]] = []
    for (model, editor), own in rows.groupby(["model", "editor"], sort=False):
        who = {"model": model, "editor": editor}
        for condition in ("unedited", "in_context"):
            asked = own[own.condition == condition]
            if len(asked):
                out.append(who | {"regime": condition, **_fresh(asked), "retention": float("nan"), **_kept(asked)})
        edited = own[own.condition.isin(["edited", "placebo"])]
        for (regime, condition), group in edited.groupby(["regime", "condition"], sort=False):
            accumulates = (group.taught == group.step).all()
            last = _last(group) if accumulates else group
            kept = shares(last, "edit")["edit"] if accumulates else float("nan")
            fresh = _fresh(group[group.fresh.astype(bool)]) if condition == "edited" else {}
            line = {"regime": regime if condition == "edited" else "placebo", "of": regime}
            out.append(who | line | {**fresh, "retention": kept, **_kept(last)})
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


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each order, the rows of its last checkpoint."""
    asked = rows[rows.checkpoint.astype(bool)]
    order = asked.order.fillna(0) if "order" in asked else pd.Series(0, index=asked.index)
    return asked[asked.step == asked.step.groupby(order).transform("max")]


def capacity(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per regime and checkpoint: `facts` and `keys` taught so far, the share of them answered (`retention`), `prior`.

    `residual` is how far the solution misses its targets (0: every key is interpolated), `norm` is ‖ΔW‖ / ‖W‖.
    """
    edited = rows[(rows.condition == "edited") & (rows.taught == rows.step)]
    out = []
    for regime, own in edited.groupby("regime", sort=False):
        tokens = own.groupby("step").solve_tokens.first()
        # `joint` solves for all keys at once, the others for those of the newest fact.
        keys = tokens if regime == "joint" else tokens.cumsum()
        for step, group in own[own.checkpoint.astype(bool)].groupby("step"):
            line = {"regime": regime, "facts": int(step), "keys": int(keys[step])} | shares(group, "edit", "prior")
            out.append(line | {"residual": group.solve_residual.iloc[0], "norm": group.relative_norm.iloc[0]})
    return pd.DataFrame(out).rename(columns={"edit": "retention"})


def _fresh(rows: pd.DataFrame) -> dict[str, float]:
    measured = shares(rows, "edit", "paraphrase", "paraphrase_held_out", "portability")
    names = {"edit": "efficacy", "paraphrase_held_out": "held_out"}
    preferred = {"preferred": rows.preferred[rows.kind == "edit"].astype(float).mean()} if "preferred" in rows else {}
    return {names.get(kind, kind): value for kind, value in measured.items()} | preferred


def _kept(rows: pd.DataFrame) -> dict[str, float]:
    kept = shares(rows, "prior", "locality", "unknown")
    leaked = rows.leaked[rows.kind == "unknown"].astype(float).mean()
    measured = {"prior": kept["prior"], "locality": kept["locality"], "refused": kept["unknown"], "leakage": leaked}
    near = rows[rows.kind == "locality"]
    for protocol in ("gold", "preferred"):
        if protocol in near:
            measured[f"locality_{protocol}"] = near[protocol].astype(float).mean()
    return measured | {"norm": rows.relative_norm.mean()}
