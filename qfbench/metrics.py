"""Rows to measures: pure functions of one frame of rows (see `probes.ask` and `retention.check` for the columns)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def interval(values: Sequence[float], clusters: Sequence[str], draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a mean, resampling whole clusters (all values of one fact together).

    With one cluster, or where all clusters have the same mean, the interval has no width: it says nothing then.
    """
    frame = pd.DataFrame({"value": np.asarray(values, float), "cluster": list(clusters)})
    sums = frame.groupby("cluster")["value"].agg(["sum", "count"]).to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def forgetting(rows: pd.DataFrame) -> pd.DataFrame:
    """Retention after n edits: the share of facts taught so far whose taught query is still answered (mean_k R[n, k]).

    Returns columns `regime`, `step` (n), `mean`, `low`, `high` (95%, over facts).
    """
    asked = rows[(rows.condition == "edited") & (rows.kind == "edit")]
    out = []
    for (regime, step), group in asked.groupby(["regime", "step"], sort=False):
        low, high = interval(group.generated, group.fact_id)
        out.append({"regime": regime, "step": step, "mean": group.generated.mean(), "low": low, "high": high})
    return pd.DataFrame(out)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per regime, each measure a share of replies under the `generated` protocol.

    `efficacy` and `paraphrase`: right after each fact's own edit; `paraphrase_held_out`: the same in wordings that training
    never used. After the last edit: `retention` (taught queries), `prior` (of what the unedited model knew), `refused` (unknown
    subjects still refused, of those refused before), `leakage` (unknown subjects that got a taught answer).
    """
    edited = rows[rows.condition == "edited"]
    out = []
    for regime, group in edited.groupby("regime", sort=False):
        fresh, last = group[group.step == group.taught_at], group[group.step == group.step.max()]
        line = {
            "regime": regime,
            "efficacy": fresh[fresh.kind == "edit"].generated.mean(),
            "paraphrase": fresh[fresh.kind == "paraphrase"].generated.mean(),
            "paraphrase_held_out": fresh[fresh.kind == "paraphrase_held_out"].generated.mean(),
            "portability": fresh[fresh.kind == "portability"].generated.mean(),
            "retention": last[last.kind == "edit"].generated.mean(),
            "prior": last[last.kind == "prior"].generated.mean(),
            "refused": last[last.kind == "unknown"].generated.mean(),
            "leakage": last[last.kind == "unknown"].leaked.mean(),
            "norm": last.relative_norm.iloc[0],
        }
        out.append(line)
    return pd.DataFrame(out).dropna(axis=1, how="all")
