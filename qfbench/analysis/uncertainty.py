"""Intervals: bootstrap over facts and orders, and over seeds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def interval(
    values: ArrayLike,
    clusters: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = 1000,
    level: float = 0.95,
    weights: ArrayLike | None = None,
    runs: ArrayLike | None = None,
) -> tuple[float, float]:
    """Bootstrap interval of a (weighted) mean, resampling whole clusters (all values of one fact together).

    With `groups` (orders, draws of a placebo, edits) these are resampled as well, independently: all groups share their
    clusters, and a value counts as often as its group times its cluster was drawn (Owen 2007, the pigeonhole bootstrap). With
    `runs` (seeds), which have facts of their own, runs are resampled first; a cluster that several runs share (a held text) is
    drawn for all of them. With one cluster, or where all clusters have the same mean, the interval has no width and says
    nothing.
    """
    value = np.asarray(values, float)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, float)
    cluster, group, run = (np.zeros(len(value), int) if x is None else _codes(x) for x in (clusters, groups, runs))
    group = _codes(run * (group.max() + 1) + group)
    run_of_group = _first(group, run)
    in_runs = np.array([np.unique(run[cluster == c]).size for c in range(cluster.max() + 1)])
    pool_of_cluster = np.where(in_runs > 1, -1, _first(cluster, run))
    by_group, by_cluster = _drawn(tuple(run_of_group.tolist()), tuple(pool_of_cluster.tolist()), draws)
    totals = []
    for summed in (value * weight, weight):
        cells = np.zeros((group.max() + 1, cluster.max() + 1))
        np.add.at(cells, (group, cluster), summed)
        totals.append(((by_group @ cells) * by_cluster).sum(axis=1))
    drawn = totals[1] > 0
    low, high = np.quantile(totals[0][drawn] / totals[1][drawn], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)  # most measures of a table are about the same facts
def _drawn(
    run_of_group: tuple[int, ...], pool_of_cluster: tuple[int, ...], draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each group and each cluster is drawn, `[draws, units]`."""
    rng, runs = np.random.default_rng(0), np.array(run_of_group)
    drawn_runs = _counts(rng, np.zeros(runs.max() + 1, int), draws)
    by_group = _counts(rng, runs, draws) * drawn_runs[:, runs]
    return by_group, _counts(rng, np.array(pool_of_cluster), draws)


def _codes(labels: ArrayLike) -> np.ndarray:
    """The labels' ranks in their sorted order, from 0."""
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def _first(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each code, the value where it first stands."""
    return values[np.unique(codes, return_index=True)[1]]


def _counts(rng: np.random.Generator, pools: np.ndarray, draws: int) -> np.ndarray:
    """How often each unit is drawn, `[draws, units]`: with replacement, from each pool as many as it has."""
    counts = np.zeros((draws, len(pools)))
    for pool in np.unique(pools):
        units = np.flatnonzero(pools == pool)
        counts[:, units] = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=draws)
    return counts


def estimate(sample: pd.DataFrame) -> tuple[float, float, float]:
    """Mean and 95% interval of a sample: columns `value`, `fact_id`, `group` and, if need be, `weight` and `run`."""
    weight, run = (sample.get(name) for name in ("weight", "run"))
    mean = float(np.average(sample.value, weights=weight))
    return mean, *interval(sample.value, sample.fact_id, sample.group, weights=weight, runs=run)


def paired(sample: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The differences `sample` − `other`, probe by probe of each order: a sample itself, whose `estimate` is the comparison's.

    Both have columns `value`, `fact_id`, `probe` and `order`; what one side was asked several times (draws of a placebo,
    further edits) is averaged first, and what only one side was asked is left out.
    """
    key = [name for name in ("run", "order", "fact_id", "probe") if name in sample]
    a, b = (part.groupby(key)[list(part.columns.intersection(["value", "weight"]))].mean() for part in (sample, other))
    both = ((a + b) / 2).assign(value=a.value - b.value).dropna().reset_index()
    return both.assign(group=both.order)
