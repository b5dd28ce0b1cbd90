"""The measures there are. Each is one entry: tables, CSV files, pages, figures, trackers and cautions follow it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Measure:
    """A column of the summary: of which rows it is the mean, and how it is shown.

    Args:
        part: the rows it is about (see `measures.summary_lines`): of the `fresh` facts, of all `taught` ones, of what should be `kept`.
        kind: of probe.
        column: of the rows; less the column `minus`, if there is one.
        legend: what it means, in plain words.
        nats: the column holds nats per token. Their mean is over tokens, and shown as its exp, a perplexity.
        hidden: it stands in the CSV and on pages, but not in the printed table.
        header: in the printed table, where its name is too long: 80 columns are soon full.
        curve: what trackers call it ("suite": as the suite), beside the share that passes, which they have of every kind.
        style: of its curves in figures: colour, line, marker.
        label: in figures, where its name is too short.
        drawn: figures over layers and settings show it, and the table of a search.
    """

    name: str
    part: str
    kind: str
    column: str
    legend: str
    minus: str = ""
    nats: bool = False
    hidden: bool = False
    header: str = ""
    curve: str = ""
    style: tuple[str, str, str] = ("", "", "")
    label: str = ""
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.part not in ("fresh", "taught", "kept") or not self.legend:
            raise ValueError(f"measure {self.name}: needs a legend, and a part that is fresh, taught or kept")
        if self.drawn and not all(self.style):
            raise ValueError(f"measure {self.name}: needs a style to be drawn")

    @property
    def collapse(self) -> str:
        """The column of `sequences.over_sequence` that says when it collapses; "" where an edit need not leave it as it is."""
        if self.part != "kept" or not (self.nats or self.column == "generated"):
            return ""
        return "collapse" if self.name == "prior" else f"collapse_{self.name}"

    @property
    def within(self) -> tuple[float, float] | None:
        """The least and the greatest value there can be; None of nats."""
        return None if self.nats else (-1.0, 1.0) if self.minus else (0.0, 1.0)

    def values(self, rows: pd.DataFrame) -> pd.Series:
        """Of each row what is averaged; NaN where it was not asked."""
        values = rows[self.column].astype(float)
        return values - rows[self.minus].astype(float) if self.minus else values

    def mean(self, rows: pd.DataFrame) -> float:
        """Of all rows that were asked, in the column's unit."""
        values = self.values(rows)
        return float(np.average(values, weights=rows.tokens.astype(float)) if self.nats else values.mean())

    def shown(self, mean: float) -> float:
        """A mean as it is shown. Of a difference of perplexities that is their ratio."""
        return float(np.exp(mean)) if self.nats else mean


_KNOWN = (
    Measure(
        *("efficacy", "fresh", "edit", "generated"),
        "taught queries answered right after their own edit",
        style=("#0072B2", "-", "o"),
        drawn=True,
    ),
    Measure(
        *("paraphrase", "fresh", "paraphrase", "generated"),
        "the same in other wordings",
        header="para-\nphrase",
        style=("#009E73", ":", "D"),
    ),
    Measure(
        *("held_out", "fresh", "paraphrase_held_out", "generated"),
        "the same in wordings that the training of a built-in model never used",
        hidden=True,
        style=("#56B4E9", "--", "s"),
        label="paraphrase, unseen wording",
        drawn=True,
    ),
    Measure(
        *("portability", "fresh", "portability", "generated"),
        "what follows from a fact (two hops, inverse), right after the edit",
        header="porta-\nbility",
    ),
    Measure(
        *("forced", "fresh", "edit", "forced"),
        "share of the answer's tokens that are right when the answer itself is fed in: what most harnesses report",
        hidden=True,
    ),
    Measure(
        *("inflation", "fresh", "edit", "forced"),
        "forced − efficacy: by how much that overstates",
        minus="generated",
        hidden=True,
    ),
    Measure(
        *("preferred", "fresh", "edit", "preferred"),
        "the new answer has fewer nats per token than the old one",
        hidden=True,
    ),
    Measure(
        *("retention", "taught", "edit", "generated"),
        "all taught queries, answered after the last edit",
        header="reten-\ntion",
        style=("#0072B2", "-", "o"),  # as efficacy: it is that, later on
        drawn=True,
    ),
    Measure(
        *("prior", "kept", "prior", "generated"),
        "what the unedited model knew, still answered after the last edit (single: after each)",
        style=("#D55E00", "-", "^"),
        label="prior knowledge",
        drawn=True,
    ),
    Measure("locality", "kept", "locality", "generated", "neighbours of taught facts: still answered as before"),
    Measure(
        *("locality_stopped", "kept", "locality", "stopped"),
        "neighbours: the reply ends by itself; of one that does not, the first model.max_new_tokens tokens are compared",
        hidden=True,
    ),
    Measure(
        *("locality_gold", "kept", "locality", "gold"),
        "neighbours: the reply names what the suite holds to be true",
        hidden=True,
    ),
    Measure(
        *("locality_preferred", "kept", "locality", "preferred"),
        "neighbours: the right reply has fewer nats per token than the taught one",
        hidden=True,
    ),
    Measure(
        *("refused", "kept", "unknown", "generated"),
        "subjects nobody taught: still refused, or else answered, as before",
        style=("#E69F00", "--", "v"),
        label="refusals kept",
        drawn=True,
    ),
    Measure(
        *("leakage", "kept", "unknown", "leaked"),
        "the same subjects: answered with something that was taught, and not before (lower is better)",
        style=("#CC79A7", "-.", "x"),
    ),
    Measure(
        *("perplexity", "kept", "perplexity", "nll"),
        "of held text (lower is better; in the differences, a ratio)",
        nats=True,
        hidden=True,
        curve="perplexity",
    ),
    Measure(
        *("accuracy", "kept", "question", "correct"),
        "general ability: questions of the first suite (group regression) answered right",
        header="accu-\nracy",
        curve="suite",
        style=("#000000", ":", "P"),
        label="questions of general ability",
    ),
)
MEASURES = {measure.name: measure for measure in _KNOWN}  # in the order of the summary's columns
# What stands beside a measure in a table: its interval; of how many questions; where it is compared, how likely so much is by chance, and
# the mark.
BESIDE = ("low", "high", "n", "p", "same")
# Kinds of rows that are about no fact of the suite: all orders and runs share them.
GENERAL = ("perplexity", "question")


def drawn(*parts: str) -> list[Measure]:
    """The measures of these parts of the rows that figures over layers and settings show."""
    return [m for m in MEASURES.values() if m.drawn and m.part in parts]
