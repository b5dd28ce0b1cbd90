"""Stored runs as one HTML page that needs nothing but itself (the command `qfbench-report`)."""

from __future__ import annotations

import base64
import io
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from qfbench.analysis.catalogue import MEASURES
from qfbench.analysis.drops import drops
from qfbench.analysis.measures import accumulating, compared
from qfbench.analysis.plots import OF_SEQUENCES
from qfbench.analysis.sequences import middle, over_sequence
from qfbench.analysis.tables import tabled
from qfbench.errors import UserError
from qfbench.pages import results
from qfbench.pages.cautions import cautions, edited
from qfbench.pages.html import filled
from qfbench.pages.legend import LINES, columns
from qfbench.pages.replies import examples, flipped
from qfbench.runs.provenance import SAME

EXAMPLES = 12
STEPS = 8  # of the table of weight health
Combinations = Sequence[tuple[dict[str, Any], pd.DataFrame]]  # `results.groups`


def page(folder: str | Path) -> str:
    """The page of the run in `folder`, of all runs below it with what a study left in `folder/study`, or of the study in `folder`.

    Raises:
        UserError: there is no run, or a file of one cannot be read.
    """
    folder = Path(folder).expanduser()
    found = results.folders(folder)
    known = {_name(run, folder): results.provenance_of(run) for run in found}
    every = results.rows_of(folder)
    rows = every[every.task == "retention"]
    values: dict[str, Any] = {
        "title": ", ".join(names)
        if len(names := dict.fromkeys(map(experiment, found))) <= 3
        else folder.resolve().name,
        "folder": folder.resolve().name,
        "cautions": _unfinished(folder, found),
        "runs": _provenance(known),
        "commands": list(dict.fromkeys(shlex.join(["qfbench", *run.get("command", [])]) for run in known.values())),
        "settings": OmegaConf.to_yaml(OmegaConf.load(found[0] / "config.yaml")),
        "stored": [_stored(path) for path in _others(folder, found)],
        "pictures": [_picture(path) for path in _pictures(folder, found)],
        "tasks": [str(task) for task in every.task.unique() if task != "retention"],
        "retention": None,
    }
    if len(rows):
        table = results.pooled(rows)
        values["cautions"] += cautions(rows, table, list(known.values()))
        values["retention"] = _retention(rows, table, list(known.values()), results.settings_of(found[0]))
    return filled("report.html.j2", **values)


def _retention(
    rows: pd.DataFrame, table: pd.DataFrame, known: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows of the task `retention`."""
    combinations = list(results.groups(rows))
    of = table.get("of", pd.Series("", table.index)).fillna("")
    main = table.assign(regime=table.regime.where(table.regime != "placebo", "placebo of " + of))
    differences = results.pooled(rows, compared)
    if len(differences):
        against = differences.editor_of + " " + differences.regime_of
        differences.insert(len(differences.columns), "against", against)
        differences = differences.drop(columns=["model_of", "editor_of", "regime_of"])
    hidden = ["of", *(name for name in ("model", "editor") if rows[name].nunique() == 1)]  # the sentence names it
    tables = {
        "main": tabled(main, hidden),
        "differences": tabled(differences, hidden),
        "ability": tabled(results.pooled(rows, drops), hidden),
        "sequences": tabled(results.pooled(rows, _sequences), hidden),
        "health": tabled(results.pooled(rows, health), hidden),
    }
    meaning = dict.fromkeys(rows.attrs["settings"], "a setting in which the runs differ, named as on the command line")
    meaning |= columns()
    legend = {name: meaning[name] for t in tables.values() for name in t["names"] if name in meaning}
    n = max(EXAMPLES // len(combinations), 3)
    return tables | {
        "sentence": sentence(rows, known, settings),
        "legend": [(name.replace("_", " "), text, questions(combinations, name)) for name, text in legend.items()],
        "lines": [(name, text) for name, text in LINES.items() if name in set(table.regime)],
        "figures": list(_figures(combinations)),
        "flips": flipped(rows),
        "examples": [(_label(at), part) for at, own in combinations for part in examples(own, n)],
        "sample": f"the first {n} facts of order 0"
        + (" of the first run (by name) at each setting" if rows.run.nunique() > 1 else ""),
    }


def sentence(rows: pd.DataFrame, known: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """What was done."""
    own = edited(rows)
    taught = own[own.kind == "edit"].groupby(["run", "model", "editor"]).fact_id.nunique()
    facts, of = _several(taught.sort_values()), _several(sorted({len(run.get("facts", [])) for run in known}))
    by = [
        f"{e} (layer {_several(g.layer.sort_values())})" if "layer" in g and g.layer.notna().any() else e
        for e, g in own.groupby("editor", sort=False)
    ]
    seeds = sorted({run.get("seed", 0) for run in known})
    orders = _several(own.groupby("run").order.nunique())
    if own.empty:
        return f"Nothing has been written into {_several(rows.model)} so far; only the unedited model was asked."
    suite = str(settings.get("facts._target_", "")).split(".")[-1]
    suite += f" ({Path(str(settings['facts.path'])).name})" if settings.get("facts.path", "null") != "null" else ""
    return (
        f"{facts if facts == of else f'{facts} of {of}'} facts of the suite {suite} were written into {_several(rows.model, ' and ')} by "
        f"{' and '.join(by)}, under the regimes {_several(own.regime)}; after the "
        f"edits the model was asked what it has learnt and what it has lost. Runs: {rows.run.nunique()}; orders of the facts in "
        f"each: {orders}; seed: {_several(seeds)}."
    )


def _several(values: Collection[Any], joint: str = ", ") -> str:
    distinct = pd.Series(values).dropna().unique()
    return joint.join(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in distinct)


def questions(combinations: Combinations, measure: str) -> str:
    """How many different questions a measure of the summary rests on, in each combination of settings, model and editor."""
    if measure not in MEASURES:
        return ""
    asked = []
    for _, rows in combinations:
        own = edited(rows[rows.kind == MEASURES[measure].kind])
        asked += [len(part.drop_duplicates(["fact_id", "query"])) for _, part in own.groupby(["model", "editor"])]
    return "–".join(str(n) for n in sorted({min(asked), max(asked)})) if asked else ""


def _sequences(rows: pd.DataFrame) -> pd.DataFrame:
    sequences = over_sequence(rows)
    return middle(sequences) if len(sequences) else pd.DataFrame()


def health(rows: pd.DataFrame, steps: int = STEPS) -> pd.DataFrame:
    """Of each sequence, the mean over orders of what is known about the change, at about `steps` of its checkpoints."""
    own = accumulating(edited(rows))
    own = own[own.checkpoint.astype(bool)].drop_duplicates(["model", "editor", "regime", "order", "step"])
    what = ["relative_norm", "top", "overlap", "rounding_loss", "solve_condition", "solve_residual"]
    what = [name for name in what if name in own]
    parts = []
    for _, part in own.groupby(["model", "editor", "regime"], sort=False):
        at = np.sort(part.step.unique())
        part = part[part.step.isin(at[np.unique(np.linspace(0, len(at) - 1, steps).round().astype(int))])]
        by = part.groupby(["model", "editor", "regime", "step"], as_index=False)
        parts.append(by[what].mean().rename(columns={"step": "edits"}))
    return pd.concat(parts) if parts else pd.DataFrame()


def _figures(combinations: Combinations) -> Iterator[tuple[str, str]]:
    """Captions and images."""
    for at, rows in combinations:
        if not len(over_sequence(rows)):
            continue
        where = f" ({_label(at)})" if at else ""
        for figure in OF_SEQUENCES.values():
            yield f"{figure.title}{where}: {figure.caption}", svg(figure.draw(rows))


def svg(figure: Figure) -> str:
    """A figure as an image that stands in the page itself; the same figure gives the same text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "qfbench"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _uri(buffer.getvalue(), "svg+xml")


def _picture(path: Path) -> tuple[str, str]:
    drawn = f"{path.stem.replace('_', ' ')} (as drawn in {path.parent.name}/{path.name})"
    return drawn, _uri(path.read_bytes(), "png")


def _uri(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _name(run: Path, folder: Path) -> str:
    """A run's name on the page: its path below the folder that is shown."""
    return run.name if run == folder else os.path.relpath(run, folder).removeprefix(f"..{os.sep}")


def _label(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def experiment(run: Path) -> str:
    """The name of a run's experiment; of its folder where nobody named one."""
    named = [one for one in results.provenance_of(run).get("overrides", []) if one.startswith("experiment=")]
    return named[-1].split("=")[1] if named else run.resolve().name


def _unfinished(folder: Path, found: Sequence[Path]) -> list[str]:
    begun = set(results.unfinished(found))
    empty = {path.parent for path in folder.rglob("provenance.json")} - {*found}
    said = {
        "were stopped or still run. What is shown is what they had measured": begun,
        "have measured nothing yet": empty,
    }
    of = len(found) + len(empty)
    return [
        f"Not finished: {len(runs)} of {of} runs {what}: {', '.join(_name(run, folder) for run in sorted(runs))}."
        for what, runs in said.items()
        if runs
    ]


def _provenance(known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all runs, and for the rest a line per run."""
    flat = {}
    for run, own in known.items():
        own = dict(own) | {"facts": len(own.get("facts", []))}
        own |= {f"{package} version": version for package, version in (own.pop("versions", None) or {}).items()}
        own |= {f"{suite} (regression)": asked for suite, asked in (own.pop("regression", None) or {}).items()}
        for model, beside in (own.pop("models_beside", None) or {}).items():
            own |= {f"{model}: {name}": value for name, value in beside.items() if name in SAME}
        own.pop("command", None)
        flat[run] = {name: "unknown" if value is None else str(value) for name, value in own.items()}
    names = list(dict.fromkeys(name for own in flat.values() for name in own))
    values = {name: {own.get(name, "unknown") for own in flat.values()} for name in names}
    same = {name: own.pop() for name, own in values.items() if len(own) == 1}
    rest = [name for name in names if name not in same]
    lines = [(run, [own.get(name, "unknown") for name in rest]) for run, own in flat.items()]
    return {"same": list(same.items()), "names": rest, "lines": lines}


def _others(folder: Path, found: Sequence[Path]) -> list[Path]:
    """Tables that are not worked out anew from rows: of the study, and of a single run's other tasks."""
    own = list(found[0].glob("*.csv")) if len(found) == 1 else []
    own = [path for path in own if path.stem not in ("retention", "compared", "sequences", "regression")]
    return sorted(_study(folder).glob("*.csv")) + sorted(own)


def _pictures(folder: Path, found: Sequence[Path]) -> list[Path]:
    own = list((found[0] / "figures").glob("*.png")) if len(found) == 1 else []
    own = [path for path in own if path.stem not in OF_SEQUENCES]
    return sorted(_study(folder).glob("*.png")) + sorted(own)


def _study(folder: Path) -> Path:
    return folder if (folder / results.RUNS).exists() else folder / "study"


def _stored(path: Path) -> dict[str, Any]:
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return {"title": path.stem.replace("_", " "), "table": tabled(frame, ("of",))}
