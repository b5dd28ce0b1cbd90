"""Coverage of the intervals and error of the tests of `qfbench.analysis.uncertainty`, by simulation. See README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri

from qfbench.analysis.uncertainty import interval, p_value

SHARES = (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)
Array = np.ndarray
Point = dict[str, Any]


class World:
    """Replies about `facts`, right or not, `[facts, orders, probes]`, of which a true `share` is right.

    A reply is right where a normal number of variance 1 is over a threshold. A part `fact` of the variance is the fact's, a
    part `order` the order's (or draw's), the rest each reply's own.
    """

    def __init__(self, rng: np.random.Generator, facts: int, fact: float) -> None:
        self.rng, self.fact = rng, fact
        self.of_fact = np.sqrt(fact) * rng.standard_normal((facts, 1, 1))

    def replies(self, share: float, orders: int, probes: int, order: float) -> tuple[Array, float]:
        """And the share that an interval is about: with one order that of this order, else that of all."""
        of_order = np.sqrt(order) * self.rng.standard_normal((1, orders, 1))
        own = self.rng.standard_normal((len(self.of_fact), orders, probes))
        right = ndtri(share) + of_order + self.of_fact + np.sqrt(1 - self.fact - order) * own > 0
        here = ndtr((ndtri(share) + of_order.item()) / np.sqrt(1 - order)) if orders == 1 else share
        return right.astype(float), float(here)


def labels(values: Array) -> tuple[Array, Array]:
    """Of each value the fact, and the order."""
    fact, order, _ = np.indices(values.shape)
    return fact.ravel(), order.ravel()


def new_interval(values: Array) -> tuple[float, float]:
    fact, order = labels(values)
    return interval(values.ravel(), fact, [order], within=(0.0, 1.0))


def old_interval(values: Array, draws: int = 400) -> tuple[float, float]:
    """The percentile bootstrap over facts and orders that qfbench had before (Owen 2007)."""
    rng, cells = np.random.default_rng(0), values.mean(axis=2)
    by_fact, by_order = (rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in cells.shape)
    low, high = np.quantile(np.einsum("df,fo,do->d", by_fact, cells, by_order), [0.025, 0.975])
    return float(low), float(high)


def coverage(
    times: int, point: Point, seed: int = 0, of: Callable[[Array], tuple[float, float]] = new_interval
) -> tuple[float, float]:
    """How often the interval holds the true share, and its mean width."""
    rng, hits, width = np.random.default_rng(seed), 0, 0.0
    for _ in range(times):
        world = World(rng, point["facts"], point["fact"])
        values, share = world.replies(point["share"], point["orders"], point["probes"], point["order"])
        low, high = of(values)
        hits, width = hits + (low <= share <= high), width + high - low
    return hits / times, width / times


def new_p(values: Array, draws: int) -> float:
    """Of the difference of two editors in the same orders; or of one state from the `draws` of a placebo, of one order."""
    fact, order = labels(values)
    levels = [np.zeros_like(order), order] if draws else [order]
    return p_value(values.ravel(), fact, levels, within=(-1.0, 1.0), times=1 + draws if draws else 1)


def old_p(values: Array, draws: int) -> float:
    """0 where the old interval of the differences does not hold 0 (draws averaged), else 1."""
    low, high = old_interval(values.mean(axis=1, keepdims=True) if draws else values)
    return float(low <= 0 <= high)


def found(times: int, point: Point, seed: int = 0, of: Callable[[Array, int], float] = new_p) -> float:
    """How often the test says that two editors differ, whose true shares are `share` and `other`; an error where these are equal.

    With `draws`, the other is a placebo of so many draws, and its effects are each draw's.
    """
    rng, n = np.random.default_rng(seed), 0
    for _ in range(times):
        world, draws = World(rng, point["facts"], point["fact"]), point.get("draws", 0)
        more = point["probes"], point["order"]
        one, _ = world.replies(point["share"], 1 if draws else point["orders"], *more)
        other, _ = world.replies(point.get("other", point["share"]), draws or point["orders"], *more)
        n += of(one - other, draws) <= 0.05
    return n / times


def grid(**axes: Any) -> list[Point]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def coverages(times: int) -> pd.DataFrame:
    size = {"facts": (10, 20, 50, 100, 200), "orders": (1, 2, 3), "probes": (1, 2, 3)}
    few = {"share": SHARES[:5], "facts": (10, 20, 50, 200), "orders": (1, 2, 3), "probes": (1, 3)}
    points = [
        *grid(share=SHARES, **size, fact=(0.5,), order=(0.05,)),
        *(
            p
            for fact, order in ((0.0, 0.0), (0.9, 0.05), (0.3, 0.2))
            for p in grid(**few, fact=(fact,), order=(order,))
        ),
    ]
    table = pd.DataFrame(
        [p | dict(zip(("coverage", "width"), coverage(times, p, n), strict=True)) for n, p in enumerate(points)]
    )
    for at in table.nsmallest(5, "coverage").index:  # the least of many is in part bad luck
        table.loc[at, "coverage"] = coverage(10 * times, points[at], 1000 + at)[0]
    for at, p in enumerate(points):
        if (
            p["share"] in (0.02, 0.5, 0.9, 0.98)
            and p["facts"] <= 50
            and (p["fact"], p["order"]) == (0.5, 0.05)
            and p["probes"] != 2
        ):
            table.loc[at, ["bootstrap", "bootstrap_width"]] = coverage(times // 4, p, at, old_interval)
    return table


def errors(times: int) -> pd.DataFrame:
    size = {"share": (0.1, 0.5, 0.9), "facts": (10, 20, 50, 200), "probes": (1, 3), "fact": (0.5,)}
    points = [
        *grid(**size, orders=(1,), order=(0.0,), draws=(0,)),
        *grid(**size, orders=(2, 3), order=(0.0, 0.05, 0.1), draws=(0,)),
        *grid(**size, orders=(1,), order=(0.0, 0.05, 0.1), draws=(2, 3, 5)),
    ]
    table = pd.DataFrame([p | {"error": found(times, p, n)} for n, p in enumerate(points)])
    for at in table.nlargest(5, "error").index:
        table.loc[at, "error"] = found(10 * times, points[at], 1000 + at)
    for at, p in enumerate(points):
        if p["share"] != 0.1 and p["probes"] == 1:
            table.loc[at, "bootstrap"] = found(times // 4, p, at, old_p)
    return table


def powers(times: int) -> pd.DataFrame:
    pairs = [{"share": a, "other": b} for a, b in ((0.9, 0.5), (0.7, 0.5), (0.98, 0.9))]
    states = [{"orders": orders, "draws": draws} for orders, draws in ((1, 0), (2, 0), (3, 0), (1, 3), (1, 10))]
    same = {"probes": 1, "fact": 0.5, "order": 0.02}
    points = [pair | {"facts": n} | state | same for pair in pairs for n in (20, 50, 200) for state in states]
    return pd.DataFrame([p | {"power": found(times, p, n)} for n, p in enumerate(points)])


def drawn(table: pd.DataFrame) -> Figure:
    """Coverage of each point of the grid against the share: of the interval, and of the old one where it was tried."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True), ("bootstrap", "coverage"), ("before", "now"), strict=True
    ):
        axes.plot(table.share, table[column], "o", ms=3, alpha=0.5, color="#0072B2")
        axes.axhline(0.95, color="black", lw=0.8, ls="--")
        axes.set(title=title, xlabel="true share", ylim=(0, 1.02))
    figure.axes[0].set(ylabel="coverage of a nominal 95%")
    return figure


def main(folder: Path, times: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"coverage": coverages(times), "errors": errors(times), "power": powers(times)}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    drawn(tables["coverage"]).savefig(folder / "coverage.png", dpi=120)
    for name, by, column in (
        ("coverage", ["order", "orders"], "coverage"),
        ("errors", ["draws", "orders", "order"], "error"),
    ):
        columns = [one for one in (column, "bootstrap") if one in tables[name]]
        print(tables[name].groupby(by)[columns].agg(["mean", "min", "max"]).round(3).to_string(), end="\n\n")
    power = tables["power"].pivot(index=["share", "other", "facts"], columns=["orders", "draws"], values="power")
    print(power.round(2).to_string())


if __name__ == "__main__":
    main(Path(__file__).parent / "results", int(sys.argv[1]) if len(sys.argv) > 1 else 800)
