"""Studies: several runs together, as tables and figures. Each is a function of the rows of `results.rows_of`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from qfbench.analysis import comparisons
from qfbench.analysis.catalogue import drawn
from qfbench.analysis.measures import at_steps, balance, balance_at_the_end, by_kind
from qfbench.analysis.tables import HIDDEN, show
from qfbench.errors import UserError
from qfbench.pages import results


@dataclass(frozen=True)
class Study:
    """What a study shows. Tables and figures by name; the first table is the one to read."""

    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    verdict: str = ""

    def save(self, folder: Path, console: Console, runs: Sequence[Path] = ()) -> None:
        """Write all to `folder`, and print the first table. With `runs` the folder names them, so that it can be shown as a page."""
        folder.mkdir(parents=True, exist_ok=True)
        if runs:
            (folder / results.RUNS).write_text("".join(f"{os.path.relpath(run, folder)}\n" for run in runs), "utf-8")
        for name, table in self.tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        for name, figure in self.figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.pdf")
        name, table = next(iter(self.tables.items()))
        constant = [c for c in ("model", "editor", "regime") if c in table and table[c].nunique() == 1]
        show(console, table, f"{name} (± 95%)", [*HIDDEN, *constant])
        if self.verdict:
            console.print(self.verdict, markup=False, soft_wrap=True)
        console.print(f"study: [bold]{escape(str(folder))}[/bold]", soft_wrap=True)
        if runs:
            console.print(f"the page: qfbench-report {folder}", markup=False, soft_wrap=True)


def sweep(rows: pd.DataFrame) -> Study | None:
    """The summary of several runs beside each other."""
    return Study({"runs": results.pooled(rows)}) if rows.run.nunique() > 1 else None


def layer_ablation(rows: pd.DataFrame) -> Study:
    """What each layer teaches and keeps, each fact alone and all in sequence, and each kind of knowledge apart."""
    layers = rows.layer.groupby(rows.run).transform("max").astype(int)
    rows = rows.assign(**{"editor.layer": layers})
    rows.attrs = {"settings": list(dict.fromkeys([*rows.attrs["settings"], "editor.layer"]))}
    table = results.pooled(rows)
    table = table[table.regime.isin(["single", "sequential"])]
    kinds = results.pooled(rows[(rows.regime == "single") & (rows.condition == "edited")], by_kind)
    figures = {
        "layers": comparisons.over_settings(table, "editor.layer", "edited layer"),
        "layers_by_kind": comparisons.heat_maps(kinds, "editor.layer", "edited layer"),
    }
    return Study({"layers": table, "layers_by_kind": kinds}, figures)


def generalization(rows: pd.DataFrame) -> Study:
    """Whether an edit is known in other words, and what follows from it, by editor and kind of knowledge."""
    table = results.pooled(rows)
    told = table[table.regime == "in_context"].drop_duplicates(["model"])
    table = pd.concat([told.assign(editor="in context"), table[table.regime == "single"]])
    kinds = results.pooled(rows[(rows.regime == "single") & (rows.condition == "edited")], by_kind)
    names = ("efficacy", "paraphrase", "held_out", "portability", "forced")
    figures = {
        "generalization": comparisons.bars(table, names),
        "inflation": comparisons.inflation(table[table.regime == "single"]),
    }
    return Study({"generalization": table, "by_kind": kinds}, figures)


def model_scale(rows: pd.DataFrame) -> Study:
    """The same edits on models of several sizes."""
    table = results.pooled(rows)
    table = table[table.regime.isin(["single", "sequential"])]
    return Study({"models": table}, {"models": comparisons.over_settings(table, "model", "model")})


def sequential_stress(rows: pd.DataFrame, steps: Sequence[int] = (20, 50, 200, 1000)) -> Study:
    """What is left after so many edits, of taught facts, of the first one, of prior knowledge."""
    taught = results.pooled(rows)
    figures = {"inflation": comparisons.inflation(taught[taught.of == taught.regime])}
    return Study({"steps": results.pooled(rows, lambda own: at_steps(own, steps))}, figures)


def rivals(rows: pd.DataFrame, steps: Sequence[int] = (10, 48, 96), refuses: bool = True) -> Study:
    """What each editor keeps after so many edits, best first.

    `balance` is the harmonic mean of taught facts that are answered, of their other wordings (right after the edit, of all up to
    there), of prior knowledge, and of strangers that are refused as before, or, where a model `refuses` nothing, that get no taught
    answer (`not_leaked`).
    """
    table = results.pooled(rows, lambda own: at_steps(own, steps, fresh=True))
    if missing := [name for name in ("retention", "paraphrase", "prior", "refused", "leakage") if name not in table]:
        raise UserError(
            f"these runs did not measure {', '.join(missing)}: give facts.paraphrases, facts.prior, facts.unknown"
        )
    table = table.assign(
        edits=table.get("edits_done", table.edits),  # where runs differ in the edits that they were set to do
        not_leaked=1 - table.leakage,
        not_leaked_low=1 - table.leakage_high,
        not_leaked_high=1 - table.leakage_low,
    )
    measures = ("retention", "paraphrase", "prior", "refused" if refuses else "not_leaked")
    if (twice := table.duplicated(["edits", "model", "editor", "regime"])).any():
        raise UserError(
            f"several runs have the editor {table.editor[twice].iloc[0]}: give one of each, or they are mixed up"
        )
    table["balance"] = [balance(*line) for line in table[list(measures)].to_numpy()]
    shown = [
        f"{name}{end}" for name in (*measures, "leakage") for end in ("", "_low", "_high", "_n") if name + end in table
    ]
    table = table[["edits", "model", "editor", "regime", "balance", *shown]]
    table = table.sort_values(["edits", "balance"], ascending=[True, False], ignore_index=True)
    return Study({"rivals": table}, {"measures": comparisons.curves(table, "edits", measures)})


def trials(rows: pd.DataFrame, over: Sequence[str] = ("edit", "prior")) -> Study:
    """The trials of a search, best first, and all settings of the best one's editor as overrides. Those that diverged are left out.

    `over` as in `balance_at_the_end`.
    """
    differ = dict.fromkeys([*rows.attrs["settings"], *(name for name in rows if name.startswith("editor."))])
    values = {run: balance_at_the_end(own, over) for run, own in rows.groupby("run")}
    rows = rows.assign(balance=rows.run.map(values))
    rows.attrs = {"settings": ["run", "balance", *differ]}
    table = results.pooled(rows)
    table = table[table.of == table.regime].sort_values("balance", ascending=False, kind="stable")
    best = results.settings_of(Path(table.run.iloc[0]))
    overrides = [f"{name}={best[name]}" for name in best if name.startswith("editor.") and name != "editor._target_"]
    verdict = f"best of {len(values)}, balance {table.balance.iloc[0]:.3f}: {' '.join(overrides)}"
    measures = [f"{m.name}{beside}" for m in drawn("taught", "kept") for beside in ("", "_low", "_high")]
    return Study(
        {"trials": table[[name for name in ("balance", *differ, "regime", *measures) if name in table]]},
        verdict=verdict,
    )


SHOWN = ("retention", "prior", "paraphrase", "accuracy")  # of the core study's heat maps


def core(rows: pd.DataFrame, about: pd.DataFrame, edits: Sequence[int]) -> Study:
    """Every model, editor, layer and rate after each of `edits`, and of each model and editor the best setting after the last.

    `about` says of each run its `model`, `editor`, `layer` and `lr`. The best setting has the highest `balance` of retention and prior.
    Where a model did not understand all facts, the last of `edits` is after those that it did: `retention_n` says how many.
    """
    told = rows[(rows.condition == "in_context") & (rows.kind == "edit") & rows.generated.eq(True)]
    all_of_them = rows.run.map(told.groupby("run").fact_id.nunique())
    end = rows.condition.isin(["edited", "placebo"]) & (rows.groupby("run").step.transform("max") == all_of_them)
    end &= rows.step == all_of_them
    rows = rows.assign(**{name: rows[name].mask(end, edits[-1]) for name in ("step", "taught")})
    rows = rows.assign(**{name: rows.run.map(about[name]) for name in about})
    rows.attrs["settings"] = ["layer", "lr"]
    table = results.pooled(rows, lambda own: at_steps(own, edits, fresh=True))
    table["balance"] = [balance(*pair) for pair in zip(table.retention, table.prior, strict=True)]
    table = table.sort_values(["model", "editor", "layer", "lr", "edits"], ignore_index=True)
    last = table[table.edits == table.edits.max()].sort_values("balance", ascending=False, kind="stable")
    best = last.drop_duplicates(["model", "editor"]).sort_values(["model", "balance"], ascending=[True, False])
    chosen = table.merge(best[["model", "editor", "layer", "lr"]])
    figures = {"curves": comparisons.curves(chosen, "edits", ("retention", "prior"))}
    for (model, editor), own in table.groupby(["model", "editor"]):
        rate = chosen.lr[(chosen.model == model) & (chosen.editor == editor)].iloc[0]
        at_rate = own[own.lr.fillna(0) == (0 if pd.isna(rate) else rate)]
        title = "" if pd.isna(rate) else f" at lr {rate:g}"
        parts = {f"edits{title}": ("edits", at_rate)}
        if own.lr.nunique() > 1:
            parts = {f"lr, after {own.edits.max()} edits": ("lr", own[own.edits == own.edits.max()])} | parts
        figures[f"{editor}_{model}"] = comparisons.grids(parts, "layer", SHOWN)
    front = ["model", "editor", "layer", "lr", "edits", "balance"]
    measures = [f"{name}{end}" for name in (*SHOWN, "leakage", "refused") for end in ("", "_low", "_high", "_n")]
    tables = {"best": best[[name for name in (*front, *measures) if name in best]]}
    return Study(tables | {"study": table[[*front, *(name for name in table if name not in front)]]}, figures)
