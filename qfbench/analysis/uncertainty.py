"""Intervals of means and tests of paired differences: over facts, and over the seeds, orders and draws that share them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from qfbench.errors import UserError

LEVELS = ("run", "order", "group")  # columns of a sample, each within the one before
LEVEL = 0.05  # of tests
MOST_SUMS = 20_000  # of an exact test; a sum with more values needs none
Range = tuple[float, float]


def interval(
    values: ArrayLike,
    clusters: ArrayLike,
    levels: Sequence[ArrayLike] = (),
    weights: ArrayLike | None = None,
    within: Range | None = None,
    times: float = 1.0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of a (weighted) mean over clusters (facts: all values of one together) and over `levels`, which cross them.

    `levels` are labels, each within the one before (seeds, orders, draws). Half of its width is √(Σ t² V): each source's
    variance with the Student t of its own degrees of freedom, which covers at least `level` where values are normal
    (Banerjee 1960). A level of one label is no source: the interval is then about that order alone.

    `within` is the least and greatest value there can be. The interval is then taken as if there were two more facts at
    either end of a share, as Agresti and Coull (1998) do for binomial ones, so that it has a width where all values are
    alike (of a difference of shares one fact at either end, of a wider range fewer). Without it, and with one cluster, it
    has no width and says nothing. `times` is how often the variance of the last level counts (see `paired`).

    Raises:
        UserError: a value does not lie `within`.
    """
    centre, variances, free = _sources(values, clusters, levels, weights, within, times)
    half = _half_width(1 - level, variances, free)
    least, most = within or (-np.inf, np.inf)
    return float(max(centre - half, least)), float(min(centre + half, most))


def p_value(
    values: ArrayLike,
    clusters: ArrayLike,
    levels: Sequence[ArrayLike] = (),
    weights: ArrayLike | None = None,
    within: Range | None = None,
    times: float = 1.0,
) -> float:
    """How likely a mean difference at least as far from 0 is where there is none, two-sided: the larger of two.

    The one is exact, over clusters (`sign_flips`); the other of all sources: the level at which `interval` ends at 0.
    """
    centre, variances, free = _sources(values, clusters, levels, weights, within, times)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        reaches = _half_width(middle, variances, free) > abs(centre)
        low, high = (middle, high) if reaches else (low, middle)
    _, cluster, weight = _columns(values, clusters, weights)
    return max(high, sign_flips(np.bincount(cluster, weight * np.asarray(values, float))))


def sign_flips(sums: ArrayLike) -> float:
    """Exact p, two-sided, of the sum of terms (one a fact) of which each might as well have had the other sign (Fisher 1935).

    Of terms ±1 it is McNemar's. 0, no evidence for or against, where there are more than `MOST_SUMS` sums to count.
    """
    from scipy.special import gammaln  # here: it takes long to import

    sums = np.asarray(sums, float)
    sizes, counts = np.unique(np.abs(sums).round(9), return_counts=True)
    at: np.ndarray = np.zeros(1)
    p: np.ndarray = np.ones(1)
    for size, n in zip(sizes[sizes > 0], counts[sizes > 0], strict=True):
        k = np.arange(n + 1)
        if len(at) * len(k) > 50 * MOST_SUMS:
            return 0.0
        share = np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) - n * np.log(2))
        at, place = np.unique(np.add.outer(at, size * (2 * k - n)).round(8), return_inverse=True)
        p = np.bincount(place.ravel(), np.outer(p, share).ravel())
        if len(at) > MOST_SUMS:
            return 0.0
    return min(1.0, float(p[np.abs(at) > abs(sums.sum()) - 1e-6].sum()))


def holm(p: ArrayLike) -> np.ndarray:
    """Adjusted p values of one family: those up to 0.05 hold all together at that level (Holm 1979). NaN is no member."""
    p = np.asarray(p, float)
    adjusted, order = np.full(len(p), np.nan), np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def _sources(
    values: ArrayLike,
    clusters: ArrayLike,
    levels: Sequence[ArrayLike],
    weights: ArrayLike | None,
    within: Range | None,
    times: float,
) -> tuple[float, np.ndarray, np.ndarray]:
    """The centre of an interval; of each source the variance it gives the mean, and its degrees of freedom.

    Sandwich estimates, clustered by facts and by each level (there about the mean of the level above). What is of a fact in
    one order alone is in both; Cameron, Gelbach and Miller (2011) take it off once, which fails with two or three orders.
    """
    value, cluster, weight = _columns(values, clusters, weights)
    if within and not (within[0] - 1e-9 <= value.min() and value.max() <= within[1] + 1e-9):
        raise UserError(
            f"a measure has values of {value.min():g} to {value.max():g}, not of {within[0]:g} to {within[1]:g}"
        )
    total, n = weight.sum(), cluster.max() + 1.0
    variances, free = [], []
    upper = np.zeros(len(value), int)
    for depth, labels in enumerate(levels, 1):
        own = _codes(upper * len(value) + _codes(labels))
        if own.max() > upper.max():
            mean = np.bincount(upper, weight * value) / np.bincount(upper, weight)
            sums = np.bincount(own, weight * (value - mean[upper]))
            free.append(own.max() - upper.max())
            variances.append(sums @ sums * (own.max() + 1) / free[-1] * (times if depth == len(levels) else 1))
        upper = own
    one, ends = total / n, np.array(within or ())
    more = 2 / (ends[1] - ends[0]) if within else 0.0  # facts at each end
    total, n = total + one * more * len(ends), n + more * len(ends)
    centre = (weight @ value + one * more * ends.sum()) / total
    if n > 1:
        sums = np.bincount(cluster, weight * (value - centre))
        squares = sums @ sums + more * one**2 * ((ends - centre) ** 2).sum()
        free.append(n - 1)
        variances.append(squares * n / (n - 1))
    return float(centre), np.array(variances) / total**2, np.array(free, float)


def _half_width(p: float, variances: np.ndarray, free: np.ndarray) -> float:
    from scipy.special import stdtrit  # as above

    return float(np.sqrt(stdtrit(free, 1 - p / 2) ** 2 @ variances)) if len(free) else 0.0


def _columns(
    values: ArrayLike, clusters: ArrayLike, weights: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    value = np.asarray(values, float)
    return value, _codes(clusters), np.ones(len(value)) if weights is None else np.asarray(weights, float)


def _codes(labels: ArrayLike) -> np.ndarray:
    return pd.factorize(np.asarray(labels))[0]


def estimate(sample: pd.DataFrame, within: Range | None = None) -> tuple[float, float, float]:
    """Mean and 95% interval of a sample: columns `value`, `fact_id`, those of `LEVELS` and, if need be, `weight`."""
    mean = float(np.average(sample.value, weights=sample.get("weight")))
    return mean, *interval(*_of(sample), within, _times(sample))


def p_of(differences: pd.DataFrame, within: Range | None = None) -> float:
    """The `p_value` of differences, as `paired` gives them; 1 of none."""
    return p_value(*_of(differences), within, _times(differences)) if len(differences) else 1.0


def _of(sample: pd.DataFrame) -> tuple[pd.Series, pd.Series, list[pd.Series], pd.Series | None]:
    return sample.value, sample.fact_id, [sample[name] for name in LEVELS if name in sample], sample.get("weight")


def _times(sample: pd.DataFrame) -> float:
    return float(sample.times.iloc[0]) if "times" in sample else 1.0


def paired(sample: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The differences `sample` − `other`, probe by probe of each order: a sample itself, whose `estimate` is the comparison's.

    Both have columns `value`, `fact_id`, `probe`, `order` and `group`. Where both have several groups in an order (single
    edits), they are paired group by group; where one side has (draws of a placebo), each of its groups with the other side's
    one, which counts as one draw more: their variance counts `times` (1 + draws), as where a new one is predicted. What only
    one side was asked is left out.
    """
    key = [name for name in ("run", "order", "fact_id", "probe") if name in sample]
    several = [part.group.nunique() > part.order.nunique() for part in (sample, other)]
    sides = []
    for part, many in zip((sample, other), several, strict=True):
        by = [*key, "group"] if many else key
        sides.append(part.groupby(by)[list(part.columns.intersection(["value", "weight"]))].mean().reset_index())
    by = [*key, "group"] if all(several) else key
    both = sides[0].merge(sides[1], on=by, suffixes=("", "_other"))
    both["value"] -= both.pop("value_other")
    if "weight" in both:
        both["weight"] = (both.weight + both.pop("weight_other")) / 2
    if not any(several):
        return both.assign(group=both.order)
    draws = both.group.nunique() / max(both.order.nunique(), 1)
    return both if all(several) else both.assign(times=1 + draws)
