"""What a careful reader should know before believing the numbers of stored runs: pure functions to sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from qfbench.analysis.catalogue import MEASURES
from qfbench.analysis.drops import SMALL, drops
from qfbench.analysis.sequences import over_sequence
from qfbench.analysis.tables import named
from qfbench.pages.results import groups, pooled

FEW_FACTS, FEW_SEQUENCES = 30, 3
ROUNDED = 1e-3  # share of a change lost in the model's dtype
ALIKE = ("dtype", "max_new_tokens", "probes", "device_name", "torch", "transformers", "git_commit")
Provenance = Mapping[str, Any]


def cautions(rows: pd.DataFrame, table: pd.DataFrame, known: Sequence[Provenance]) -> list[str]:
    """All that applies; `rows` of `results.retention`, `table` their pooled summary, `known` the provenance of each run."""
    return [
        *_sample(rows, known),
        *_left_out(rows),
        *_ended_early(rows),
        *_collapses(rows),
        *_placebos(rows, table),
        *_rounding(rows),
        *_agreement(known),
        *_power(rows),
        *_not_alike(known),
    ]


def who(line: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> str:
    """`QF sequential on world-s (editor.layer=2)`."""
    more = ", ".join(f"{name}={value}" for name, value in (settings or {}).items())
    return f"{line['editor']} {line['regime']} on {line['model']}" + (f" ({more})" if more else "")


def edited(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.condition == "edited"]


def _sample(rows: pd.DataFrame, known: Sequence[Provenance]) -> list[str]:
    """How few facts, seeds and orders there are."""
    out = []
    own = [group[group.kind == "edit"] for _, group in groups(edited(rows))]
    n = min((part.fact_id.nunique() for group in own for _, part in group.groupby(["model", "editor"])), default=0)
    if 0 < n < FEW_FACTS:
        out.append(
            f"Only {n} facts stand behind each line. A share of 0 or 1 then proves little: a true share of "
            f"{0.05 ** (1 / n):.2f} would still give {n} of {n} once in 20 such runs."
        )
    if len({run.get("seed") for run in known}) == 1:
        out.append("One seed only: other facts may give other numbers, and the intervals do not show it.")
    sequences = [group[group.taught == group.step] for group in own]
    orders = min((group.order.nunique() for group in sequences if (group.step > 1).any()), default=FEW_SEQUENCES)
    if orders < FEW_SEQUENCES:
        out.append(f"Only {orders} sequence{'s' * (orders > 1)} (orders and seeds) behind each curve: order matters.")
    return out


def understood(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run, model, editor and fact, whether its query is answered when told (`generated`)."""
    told = rows[(rows.condition == "in_context") & (rows.kind == "edit")]
    first = (
        told.groupby(["run", "model", "editor", "fact_id"], sort=False)[["generated", "query"]].first().reset_index()
    )
    return first.astype({"generated": bool})


def _left_out(rows: pd.DataFrame) -> list[str]:
    """Facts that were not understood, editors that cannot run."""
    told, out = understood(rows), []
    taught = edited(rows[rows.kind == "edit"]).groupby(["model", "fact_id"]).size().index
    for model, own in told.drop_duplicates(["run", "model", "fact_id"]).groupby("model", sort=False):
        lost = own[~own.generated]
        if len(lost):
            how = (
                "taught all the same"
                if (model, lost.fact_id.iloc[0]) in taught
                else "not taught, and not in the numbers"
            )
            out.append(
                f"{len(lost)} of {len(own)} facts are not understood by {model}, which does not answer them even when "
                f"told (not_understood): {how}: {named(list(lost['query'].unique()))}"
            )
    for line in rows[rows.condition == "unsupported"].drop_duplicates(["editor", "regime", "reply"]).to_dict("records"):
        out.append(f"{who(line)} could not run: {line['reply']}")
    return out


def _ended_early(rows: pd.DataFrame) -> list[str]:
    facts = understood(rows).groupby(["run", "model", "editor"]).generated.sum()
    out = []
    for key, steps in (
        edited(rows).groupby(["run", "model", "editor", "regime", "order"], sort=False).step.max().items()
    ):
        run, model, editor, regime, order = key
        n = int(facts.get((run, model, editor), 0))
        if steps < n:
            line = {"model": model, "editor": editor, "regime": regime}
            out.append(f"{who(line)}, order {order:g}: ends after {steps} of {n} edits ({run}).")
    return out


def _collapses(rows: pd.DataFrame) -> list[str]:
    """Where something that was to be kept fell under half."""
    out = []
    for settings, own in groups(rows):
        sequences = over_sequence(own)
        for _, lines in sequences.groupby(["model", "editor", "regime"], sort=False) if len(sequences) else ():
            for what, measure in MEASURES.items():
                at = lines.get(measure.collapse, pd.Series(dtype=float)).dropna()
                if len(at):
                    fallen = "at over twice its start" if measure.nats else "under half of its start"
                    when = f"{at.min():g}" if at.min() == at.max() else f"{at.min():g} to {at.max():g}"
                    out.append(
                        f"Collapse of {who(lines.iloc[0].to_dict(), settings)}: {what} {fallen} after {when} edits, "
                        f"in {len(at)} of {len(lines)} sequences."
                    )
    return out


def _placebos(rows: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Where an editor does no better than a random change of the same rank and size."""
    if not (table.regime == "placebo").any():
        sequence = edited(rows)
        return ["No placebo was measured."] if (sequence.taught > 1).any() else []
    out: list[str] = []
    above: dict[str, Any] = {}
    settings = [name for name in rows.attrs["settings"] if name != "seed"]
    for line in table.to_dict("records"):
        if line["regime"] == "placebo" and line.get("of") == above.get("regime"):
            name = who(above, {key: line[key] for key in settings})
            if line.get("retention_same") is True or above.get("retention", 1) < line.get("retention", 0):
                out.append(f"{name} is not shown to retain more taught facts than its placebo: it has shown nothing.")
            if above.get("prior_high", 1) < 1 and (
                line.get("prior_same") is True or above["prior"] <= line.get("prior", 0)
            ):
                out.append(
                    f"{name} is not shown to keep more prior knowledge than its placebo, a random change of the same size."
                )
        above = line
    return out


def _rounding(rows: pd.DataFrame) -> list[str]:
    out = []
    for _, own in edited(rows).groupby(["model", "editor", "regime"], sort=False):
        if own.rounding_loss.max() > ROUNDED:
            out.append(
                f"{who(own.iloc[0].to_dict())}: rounding loses up to {own.rounding_loss.max():.1%} of the change."
            )
    return out


def _agreement(known: Sequence[Provenance]) -> list[str]:
    """Models that do not even agree with themselves, once the batches are others."""
    shares: dict[str, float] = {}
    for run in known:
        for model, share in (run.get("self_agreement") or {}).items():
            shares[model] = min(share, shares.get(model, 1.0))
    return [
        f"{model} itself, unedited, gives {share:.1%} of its replies again when the batches are others (its dtype rounds): so much "
        "of any change of its replies may be the batches', not the edit's. Probes that it then failed are left out."
        for model, share in shares.items()
        if share < 1
    ]


def _power(rows: pd.DataFrame) -> list[str]:
    """Suites of questions that are too small to show a drop that matters."""
    lost = pooled(rows, drops)
    out = []
    for suite, own in lost[lost.regime != "placebo"].groupby("suite", sort=False) if len(lost) else ():
        if not own.detectable.max() <= SMALL:
            least = f"under {100 * own.detectable.max():.1f} points" if own.detectable.notna().all() else "of any size"
            out.append(
                f"{own.questions.max()} questions of {suite} cannot show a drop {least}: that none is seen proves little."
            )
    return out


def _not_alike(known: Sequence[Provenance]) -> list[str]:
    """In what runs differ that are shown together, and code that no commit holds."""
    out = []
    for name in ALIKE:
        values = sorted({str(run.get(name)) for run in known})
        if len(values) > 1:
            out.append(f"The runs differ in {name}: {', '.join(values)}.")
    for model in sorted({str(run.get("model")) for run in known}):
        for name in ("model_hash", "tokenizer_hash"):
            values = sorted({str(run.get(name)) for run in known if str(run.get("model")) == model})
            if len(values) > 1:
                out.append(f"The runs of {model} differ in {name}: {', '.join(values)}.")
    asked = [run.get("regression") or {} for run in known]
    for suite in sorted({name for own in asked for name in own}):
        if len({own[suite] for own in asked if suite in own}) > 1:
            out.append(f"The runs were not asked the same by {suite} (regression).")
    if any("dirty" in str(run.get("git_commit")) for run in known):
        out.append("The code had changes that no commit holds.")
    return out
