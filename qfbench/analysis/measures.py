"""Rows to measures: pure functions of one frame of `rows.regular` (see `probes.ask` and `retention.check` for the columns)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qfbench.analysis.catalogue import BESIDE, GENERAL, MEASURES
from qfbench.analysis.uncertainty import LEVEL, Range, estimate, holm, p_of, paired
from qfbench.errors import UserError

# What an edit should leave as it is, by kind of probe whose replies say so, and the measure of it.
KEPT = {m.kind: m.name for m in MEASURES.values() if m.collapse and not m.nats}


def accumulating(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of those regimes whose edits accumulate: `single` has taught one fact at every step."""
    return rows[(rows.taught == rows.step).groupby([rows.model, rows.editor, rows.regime]).transform("all")]


def shares(rows: pd.DataFrame, *kinds: str) -> dict[str, float]:
    """For each kind of probe, the share of replies that pass under the `generated` protocol; NaN where none was asked."""
    return {kind: rows.generated[rows.kind == kind].astype(float).mean() for kind in kinds}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, editor and regime, below the unedited model (`unedited`) and what it answers when told (`in_context`).

    A column for each measure of the `catalogue`: those of `fresh` facts right after their own edits, the others after the last
    edit; and `norm` (‖ΔW‖ / ‖W‖). Regime `single` accumulates nothing: it has no `retention`, and its other measures are means over
    all edits. A line `placebo` is the state after the last edit of the regime above it (`of`), with a random change of the same
    size instead. In the line `unedited`, `prior` and `refused` are of all that was asked.

    Beside each measure stand `<measure>_low` and `<measure>_high`: its 95% interval, over orders and facts; and
    `<measure>_n`, of how many different questions. In a line `placebo`, `<measure>_p` is how likely its difference from the
    regime above it is where there is none (`uncertainty.p_of`, paired by probe and order), and `<measure>_same` says that they
    cannot be told apart: p is over 0.05.
    """
    out: list[dict[str, Any]] = []
    above: dict[str, pd.DataFrame] = {}
    for line, parts in summary_lines(rows):
        samples = _samples(parts)
        line |= _estimates(samples) | {"norm": parts["kept"].relative_norm.mean() if "of" in line else float("nan")}
        if line["regime"] == "placebo":
            for name in samples.keys() & above.keys():
                line |= _tested(name, paired(above[name], samples[name]))
        above = samples
        out.append(line)
    return _ordered(out)


def compared(rows: pd.DataFrame, others: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every model, editor and regime against the first one; or, with `others`, against the same regime of those rows.

    Differences of the measures of `summary`, paired by probe and order, columns as there; `<measure>_p` and
    `<measure>_same` as in a line `placebo`. Of `model`, `editor`, `regime` against `model_of`, `editor_of`, `regime_of`;
    `facts` is how many facts both were asked about.
    """
    lines = _edited(rows)
    if others is None:
        pairs = [(line, lines[0]) for line in lines[1:]]
    else:
        pairs = [(a, b) for a in lines for b in _edited(others) if a[0]["regime"] == b[0]["regime"]]
    return _ordered([_difference(*pair) for pair in pairs])


Line = tuple[dict[str, Any], dict[str, pd.DataFrame]]


def _edited(rows: pd.DataFrame) -> list[Line]:
    """Who, and samples, of each line of the summary that is about an editor."""
    return [(who, _samples(parts)) for who, parts in summary_lines(rows) if who.get("of") == who["regime"]]


def _difference(line: Line, reference: Line) -> dict[str, Any]:
    (who, samples), (other, theirs) = line, reference
    both = {name: paired(samples[name], theirs[name]) for name in samples if name in theirs}
    both = {name: pair for name, pair in both.items() if len(pair)}
    about = {name: who[name] for name in ("model", "editor", "regime")}
    about |= {f"{name}_of": other[name] for name in ("model", "editor", "regime")}
    asked = [pair.fact_id.nunique() for name, pair in both.items() if MEASURES[name].kind not in GENERAL]
    about |= {"facts": max(asked, default=0)}
    about |= _estimates(both, differences=True)
    return about | {key: value for name, pair in both.items() for key, value in _tested(name, pair).items()}


def summary_lines(rows: pd.DataFrame) -> Iterator[tuple[dict[str, Any], dict[str, pd.DataFrame]]]:
    """The lines of the summary, each with its rows: those of the newest facts, of all taught ones, of what should be kept."""
    for (model, editor), own in rows.groupby(["model", "editor"], sort=False):
        who = {"model": model, "editor": editor}
        for condition in ("unedited", "in_context"):
            asked = own[own.condition == condition]
            if len(asked):
                yield who | {"regime": condition}, {"fresh": asked, "kept": asked}
        edited = own[own.condition.isin(["edited", "placebo"])]
        for (regime, condition), group in edited.groupby(["regime", "condition"], sort=False) if len(edited) else ():
            accumulates = (group.taught == group.step).all()
            last = _last(group) if accumulates else group.assign(draw=group.step)  # each edit is a draw
            parts = {"kept": last} | ({"taught": last} if accumulates else {})
            parts |= {"fresh": group[group.fresh.astype(bool)]} if condition == "edited" else {}
            yield who | {"regime": regime if condition == "edited" else "placebo", "of": regime}, parts


def _measured(parts: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Each measure that was taken, with the ends of its interval."""
    return _estimates(_samples(parts))


def _samples(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """For each measure that was taken, its values with what `uncertainty` needs to know of them."""
    out = {}
    for name, measure in MEASURES.items():
        if measure.part not in parts:
            continue
        rows = parts[measure.part]
        rows = rows[rows.kind == measure.kind]
        if measure.kind == "question" and len(rows):
            rows = rows[rows.suite == rows.suite.iloc[0]]
        rows = rows.assign(value=measure.values(rows)).dropna(subset="value")
        if rows.empty:
            continue
        sample = {column: rows[column] for column in ("value", "run", "order", "fact_id")}
        sample |= {"group": 1_000_000 * rows.order + rows.draw, "probe": rows.kind + " " + rows["query"]}
        out[name] = pd.DataFrame(sample | ({"weight": rows.tokens} if measure.nats else {}))
    return out


def _estimates(samples: dict[str, pd.DataFrame], differences: bool = False) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, sample in samples.items():
        within = MEASURES[name].within
        mean, low, high = map(MEASURES[name].shown, estimate(sample, _apart(within) if differences else within))
        n = float(len(sample[["fact_id", "probe"]].drop_duplicates()))  # a float, as where a line has none
        out |= {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}
    return out


def _apart(within: Range | None) -> Range | None:
    """Where the differences lie of values that lie `within`."""
    return (within[0] - within[1], within[1] - within[0]) if within else None


def _tested(name: str, differences: pd.DataFrame) -> dict[str, Any]:
    p = p_of(differences, _apart(MEASURES[name].within))
    return {f"{name}_p": p, f"{name}_same": p > LEVEL}


def together(table: pd.DataFrame, hidden: Collection[str] = ()) -> pd.DataFrame:
    """A table of `summary` or `compared` whose marks hold all at once at 5% (Holm), over lines and measures that are not `hidden`."""
    names = [name for name in MEASURES if f"{name}_p" in table and name not in hidden]
    adjusted = holm(table[[f"{name}_p" for name in names]].to_numpy(float).ravel()).reshape(len(table), len(names))
    out = table.copy()
    out.attrs["together"] = True
    for name, p in zip(names, adjusted.T, strict=True):
        out[f"{name}_p"] = p
        out[f"{name}_same"] = (out[f"{name}_p"] > LEVEL).astype(object).where(out[f"{name}_p"].notna())
    return out


def _ordered(lines: list[dict[str, Any]]) -> pd.DataFrame:
    """The lines as a frame: who, the measures in their order, then intervals and marks; nothing that no line has."""
    frame = pd.DataFrame(lines).dropna(axis=1, how="all")
    after = [f"{name}_{what}" for name in MEASURES for what in BESIDE]
    first = [name for name in frame if name not in MEASURES and name not in after and name != "norm"]
    return frame[[name for name in (*first, *MEASURES, "norm", *after) if name in frame]]


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` of each kind of knowledge (`fact_kind`) apart: `kind` and the measures of the facts' own probes."""
    parts = []
    for kind, own in rows[rows.fresh.astype(bool)].groupby("fact_kind", sort=True):
        parts.append(summary(own).assign(kind=kind))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["kind"])
    return frame[["kind", *(name for name in frame if name not in ("kind", "of"))]]


def at_steps(rows: pd.DataFrame, steps: Sequence[int], fresh: bool = False) -> pd.DataFrame:
    """The measures of `summary` that are about what is kept, after each of `steps` edits that is a checkpoint.

    With `fresh` also those of facts right after their own edits, of all up to there.
    """
    edited = accumulating(rows[rows.condition == "edited"])
    parts = []
    for step in steps:
        own = edited[(edited.step == step) & edited.checkpoint.astype(bool)]
        if len(own):
            own = edited[edited.step <= step] if fresh else own.assign(fresh=False)
            parts.append(summary(own).assign(edits=step))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["edits"])
    return frame[["edits", *(name for name in frame if name not in ("edits", "of"))]]


def by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per layer: the measures of `summary` for single edits, then after the last of the sequential ones (`seq_...`)."""
    edited = rows[rows.condition == "edited"]
    out = []
    for layer, group in edited.groupby("layer"):
        line: dict[str, Any] = {"layer": int(layer)}
        for who, parts in summary_lines(group):
            lead = "" if who["regime"] == "single" else "seq_"
            parts = {part: own for part, own in parts.items() if part != "fresh" or not lead}
            measured = _measured(parts) | {"norm": parts["kept"].relative_norm.mean()}
            line |= {lead + name: value for name, value in measured.items()}
        out.append(line)
    return pd.DataFrame(out).dropna(axis=1, how="all")


def by_setting(rows: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """One line per setting of the editor: the measures of `summary`, over single edits.

    `balance` is that of efficacy and prior.
    """
    single = rows[(rows.condition == "edited") & (rows.regime == "single")]
    out = []
    for key, group in single.groupby(list(settings), sort=False, dropna=False):
        line = dict(zip(settings, key, strict=True))
        line |= _measured({"fresh": group[group.fresh.astype(bool)], "kept": group})
        line["norm"] = group.relative_norm.mean()
        line["balance"] = balance(line.get("efficacy", float("nan")), line.get("prior", float("nan")))
        out.append(line)
    return pd.DataFrame(out).dropna(axis=1, how="all")


def balance(*shares: float) -> float:
    """Their harmonic mean: high only where facts are taught and prior knowledge is spared at once. NaN where one is not known."""
    if np.isnan(shares).any():
        return float("nan")
    return len(shares) / sum(1 / share for share in shares) if shares and all(shares) else 0.0


def balance_at_the_end(rows: pd.DataFrame, over: Sequence[str] = ("edit", "prior")) -> float:
    """What a search maximizes: the `balance` of the replies to these kinds of probes after the last edit, the mean over regimes.

    Of `single`, which retains nothing, they are those after each edit. 0 where nothing could be taught.
    """
    ends = [shares(parts["kept"], *over) for who, parts in summary_lines(rows) if who.get("of") == who["regime"]]
    for end in ends:
        if missing := [kind for kind, share in end.items() if np.isnan(share)]:
            raise UserError(
                f"objective.over={list(over)}: nothing of the kind {missing[0]} is asked (facts.paraphrases=1?)"
            )
    return float(np.mean([balance(*end.values()) for end in ends])) if ends else 0.0


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each order, the rows of its last checkpoint."""
    asked = rows[rows.checkpoint.astype(bool)]
    return asked[asked.step == asked.step.groupby(asked.order).transform("max")]


def capacity(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per regime and checkpoint: `facts` and `keys` taught so far, the share of them answered (`retention`), `prior`.

    `prior_n` is of how many questions `prior` is, `residual` how far the solution misses its targets (0: every key is
    interpolated), `norm` is ‖ΔW‖ / ‖W‖.
    """
    edited = rows[(rows.condition == "edited") & (rows.taught == rows.step)]
    out = []
    for regime, own in edited.groupby("regime", sort=False):
        tokens = own.groupby("step").solve_tokens.first()
        # `joint` solves for all keys at once, the others for those of the newest fact.
        keys = tokens if regime == "joint" else tokens.cumsum()
        for step, group in own[own.checkpoint.astype(bool)].groupby("step"):
            line = {"regime": regime, "facts": int(step), "keys": int(keys[step])} | shares(group, "edit", "prior")
            line["prior_n"] = int((group.kind == "prior").sum())
            out.append(line | {"residual": group.solve_residual.iloc[0], "norm": group.relative_norm.iloc[0]})
    return pd.DataFrame(out).rename(columns={"edit": "retention"})
