"""Whole sequences of edits: the retention matrix, forgetting, collapse. Pure functions of one frame of rows, as `measures`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qfbench.analysis.catalogue import MEASURES
from qfbench.analysis.measures import KEPT, accumulating
from qfbench.analysis.uncertainty import interval

SEQUENCE = ["model", "editor", "regime", "order"]
COLLAPSED = 0.5  # of what the unedited model had
ENOUGH = 10  # probes: of fewer, a half may fall by chance, and no collapse is told


def forgetting(rows: pd.DataFrame) -> pd.DataFrame:
    """Retention after n edits: the share of facts taught so far whose taught query is still answered (mean_k R[n, k]).

    Returns columns `model`, `editor`, `regime`, `step` (n), `mean`, `low`, `high` (95%, over orders and facts); nothing of regimes that do not accumulate.
    """
    edited = accumulating(rows[rows.condition == "edited"])
    return _by_step(edited[(edited.kind == "edit") & edited.checkpoint.astype(bool)])


def prior_kept(rows: pd.DataFrame) -> pd.DataFrame:
    """Prior knowledge after n edits, in the columns of `forgetting`; after 0 edits what the unedited model answers of what is asked
    later (what it does not know is not)."""
    asked = rows[rows.kind == "prior"]
    edited = asked[asked.condition == "edited"]
    later = edited[["model", "fact_id", "query"]].drop_duplicates()
    before = asked[asked.condition == "unedited"].drop(columns=["editor", "regime"]).merge(later)
    each = edited[["model", "editor", "regime"]].drop_duplicates()
    return _by_step(pd.concat([before.merge(each, on="model").assign(step=0), edited]))


def _by_step(asked: pd.DataFrame) -> pd.DataFrame:
    out = []
    by = ["model", "editor", "regime", "step"]
    for key, group in asked.groupby(by, sort=False):
        low, high = interval(group.generated, group.fact_id, [group.run, group.order], within=(0.0, 1.0))
        measured = {"mean": group.generated.astype(float).mean(), "low": low, "high": high}
        out.append(dict(zip(by, key, strict=True)) | measured)
    return pd.DataFrame(out, columns=[*by, "mean", "low", "high"])


def matrices(rows: pd.DataFrame, protocol: str = "generated") -> dict[tuple[str, str, str, int], pd.DataFrame]:
    """The retention matrix R[n, k] of each sequence: the result on the k-th fact after n edits, under one protocol.

    By (model, editor, regime, order). Index `step` (n), columns `fact_id` in the order of teaching; NaN before a fact is
    taught and where it was not asked. Nothing of regimes that do not accumulate.
    """
    edited = accumulating(rows[(rows.condition == "edited") & (rows.kind == "edit")])
    out = {}
    for (model, editor, regime, order), own in edited.groupby(SEQUENCE, sort=False):
        taught = own[own.fresh.astype(bool)].sort_values("step").fact_id
        values = own.assign(value=own[protocol].astype(float)).pivot(index="step", columns="fact_id", values="value")
        out[model, editor, regime, int(order)] = values[list(taught)]
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
    under half of its start; NaN if none), the same as `collapse_<measure>` for the other measures that have a `collapse`, of
    those in nats once they are over twice their start; and `edits` (N). A share of fewer than `ENOUGH` probes does not collapse.
    """
    out = []
    for key, matrix in matrices(rows).items():
        full = matrix[matrix.notna().sum(axis=1) == matrix.index]  # the checkpoints
        if full.empty:
            continue
        who = dict(zip(SEQUENCE, key, strict=True))
        first = matrix.iloc[:, 0]
        right_after = [matrix[fact].dropna().iloc[0] for fact in matrix]
        measures = {
            "edits": int(matrix.index[-1]),
            "immediate": float(np.mean(right_after)),
            "final": float(full.iloc[-1].mean()),
            "forgetting": average_forgetting(matrix.loc[: full.index[-1]]),
            "half_life": half_life(matrix),
            "first": float(first[first == 1].index.max()) if (first == 1).any() else 0.0,
        }
        out.append(who | measures | _collapses(rows, who))
    return pd.DataFrame(out)


def _collapses(rows: pd.DataFrame, who: dict[str, Any]) -> dict[str, float]:
    """The first checkpoint at which each measure is under half of what it was; NaN where it never is."""
    own = rows[rows.condition == "edited"]
    for name, value in who.items():
        own = own[own[name] == value]
    asked = own.groupby(["kind", "step"]).size().groupby("kind").max()
    left = {name: share for name, share in what_is_left(own).items() if asked[MEASURES[name].kind] >= ENOUGH}
    before = rows[(rows.condition == "unedited") & (rows.model == who["model"])]
    for name, measure in MEASURES.items():
        unedited, held = (part[part.kind == measure.kind] for part in (before, own))
        if measure.collapse and measure.nats and len(unedited):
            start, steps = measure.mean(unedited), held.groupby("step")
            left[name] = pd.Series({step: np.exp(start - measure.mean(g)) for step, g in steps}, dtype=float)
    fallen = {MEASURES[name].collapse: share.index[share < COLLAPSED] for name, share in left.items()}
    at = {column: float(steps[0]) if len(steps) else float("nan") for column, steps in fallen.items()}
    return {"collapse": float("nan")} | at


def what_is_left(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Of each measure of `KEPT` that was taken in one sequence, the share that is left of what the unedited model had, by step."""
    asked = {measure: rows[rows.kind == kind] for kind, measure in KEPT.items()}
    return {m: own.generated.astype(float).groupby(own.step).mean() for m, own in asked.items() if len(own)}


def middle(sequences: pd.DataFrame) -> pd.DataFrame:
    """The median over orders of `over_sequence`, for each model, editor and regime.

    What never came about (`half_life`, `collapse`: NaN) counts as later than everything: NaN if that is the median.
    """
    by = ["model", "editor", "regime"]
    late = sequences.drop(columns="order").fillna(np.inf)
    return late.groupby(by, sort=False, as_index=False).median().replace(np.inf, np.nan)
