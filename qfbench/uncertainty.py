"""Intervals: bootstrap over facts, then over orders or seeds."""

from __future__ import annotations

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
) -> tuple[float, float]:
    """Bootstrap interval of a (weighted) mean, resampling whole clusters (all values of one fact together).

    With `groups` (orders, seeds), these are resampled first, then the clusters within each. With one cluster, or where
    all clusters have the same mean, the interval has no width and says nothing.
    """
    value = np.asarray(values, float)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, float)
    cluster, group = (np.zeros(len(value), int) if x is None else _codes(x) for x in (clusters, groups))
    rng, totals = np.random.default_rng(0), np.zeros((draws, 2))
    parts = []
    for g in range(group.max() + 1):
        own, code = group == g, _codes(cluster[group == g])
        parts.append(np.stack([np.bincount(code, w) for w in ((value * weight)[own], weight[own])], 1))
    for _ in parts:  # each draw takes as many groups as there are
        chosen = rng.integers(len(parts), size=draws)
        for g, sums in enumerate(parts):
            taken = np.flatnonzero(chosen == g)
            totals[taken] += sums[rng.integers(len(sums), size=(len(taken), len(sums)))].sum(axis=1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _codes(labels: ArrayLike) -> np.ndarray:
    """The labels' ranks in their sorted order, from 0."""
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def estimate(sample: pd.DataFrame) -> tuple[float, float, float]:
    """Mean and 95% interval of a sample: columns `value`, `fact_id`, `group` and, if need be, `weight`."""
    weight = sample.weight if "weight" in sample else None
    mean = float(np.average(sample.value, weights=weight))
    return mean, *interval(sample.value, sample.fact_id, sample.group, weights=weight)


def paired(sample: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The differences `sample` − `other`, probe by probe of each order: a sample itself, whose `estimate` is the comparison's.

    Both have columns `value`, `fact_id`, `probe` and `order`; what one side was asked several times (draws of a placebo,
    further edits) is averaged first, and what only one side was asked is left out.
    """
    key = ["order", "fact_id", "probe"]
    a, b = (part.groupby(key)[list(part.columns.intersection(["value", "weight"]))].mean() for part in (sample, other))
    both = ((a + b) / 2).assign(value=a.value - b.value).dropna().reset_index()
    return both.assign(group=both.order)
