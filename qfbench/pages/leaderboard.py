"""The page of results: a leaderboard by model and number of edits, made from stored runs alone."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qfbench.analysis.measures import accumulating, at_steps, summary
from qfbench.analysis.overview import BASELINES
from qfbench.analysis.rows import ABSENT, EMPTY
from qfbench.analysis.tables import cell
from qfbench.errors import UserError
from qfbench.pages.results import folders, groups, provenance_of, rows_of, settings_of

STEPS = (1, 10, 20, 48, 50, 96, 100, 200, 1000)  # beside the last edit of each sequence
ROUND = (50, 100)  # a table holds what is within 5% of these
MOST = 12  # lines of a table
TRIALS = "tuning"  # the folder of a search: its best trials were chosen by their score, which flatters them
NEEDED = (
    *("task", "model", "editor", "step", "layer"),
    *ABSENT,
    *EMPTY,
)  # columns; copies of the others take time
LAYERS = ("layer", "layers", "more_layers")
SINGLE, BASELINE = 0, -1  # tables without a number of edits

HEAD = """\
# Results

What stored runs measured, by model and number of edits. One command makes this page:

```
{command}
```

`taught`: taught facts that the edited model answers; `other wordings`: the same in other words.
`prior`: what the unedited model knew and still says. `refused`: strangers treated as before.
`leaked`: strangers answered with something that was taught; lower is better.
`mean`: the harmonic mean of `taught`, `prior` and `refused`. Lines are sorted by it.
`set`: the learning rate, and settings in which lines of the same editor differ. ±: to the farther
end of the 95% interval, over facts, orders and seeds. `facts` and `orders`: how many of them.

Lines of one table may differ in facts and settings. Only lines of one run are paired.
`run` leads to the stored run, one a seed. `command`: its number in the last table.
Trials of a search (`{trials}`) are left out.
"""
SEQUENCE = {"taught": "retention", "prior": "prior", "refused": "refused", "leaked": "leakage"}
ALONE = {"taught": "efficacy", "other wordings": "paraphrase", "prior": "prior", "refused": "refused"}
STATES = {"unedited": "unedited", "in_context": "told in the dialogue, not edited"}


def leaderboard(paths: Sequence[str], page: Path) -> str:
    """The text of the page, Markdown. A run that lies in several of `paths` stands there once.

    Args:
        paths: folders that hold runs.
        page: where it is to stand: its links lead from there.

    Raises:
        UserError: there is no run of the task `retention`, or a run cannot be read.
    """
    table = pd.DataFrame(line for rows in _studies(paths) for line in lines(rows))
    if table.empty:
        raise UserError(f"{', '.join(paths)}: holds no rows of the task retention")
    table["command"] = [shlex.join(["qfbench", *provenance_of(Path(runs[0]))["command"]]) for runs in table.runs]
    numbers = {command: n for n, command in enumerate(sorted(set(table.command)), 1)}
    table["number"] = table.command.map(numbers)
    made = shlex.join(["qfbench-results", *paths, "--leaderboard", str(page)])
    out = [HEAD.format(command=made, trials=TRIALS)]
    for model, own in table.groupby("model"):
        out.append(f"## {model}\n")
        for place, part in own.groupby("place"):
            out += _section(int(str(place)), part, page.parent)
    out.append("## Commands\n")
    out.append(_markdown([{"no.": n, "command": f"`{command}`"} for command, n in numbers.items()]))
    return "\n".join(out)


def _studies(paths: Sequence[str]) -> Iterator[pd.DataFrame]:
    """The rows of the task `retention`, study by study: of runs in one folder."""
    found = {folder.name: folder for folder in reversed(folders(*paths)) if TRIALS not in folder.parts}
    for study in sorted({folder.parent for folder in found.values()}):
        rows = rows_of(*sorted(folder for folder in found.values() if folder.parent == study))
        needed = [name for name in rows if name in NEEDED or name in rows.attrs["settings"]]
        yield rows.loc[rows.task == "retention", needed]


def lines(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Each line of the page, of rows of `results.rows_of`: who, `place` (the edits of its table), measures with intervals.

    Runs that differ in their seed alone are one line. A sequence has a line at each of `STEPS`, and after its last edit.
    """
    for _, group in groups(rows):
        group = group[[name for name in group if name in NEEDED]]
        for (model, editor), own in group.groupby(["model", "editor"], sort=False):
            runs = list(dict.fromkeys(own.run))
            edited = own[own.condition == "edited"]
            settings = editor_settings(Path(runs[0]), str(editor))
            who = {"model": model, "by": editor, "runs": runs, "layer": layers(settings, edited)}
            who["settings"] = {name: value for name, value in settings.items() if name not in LAYERS}
            for line in summary(own[own.condition.isin(BASELINES)]).to_dict("records"):
                yield line | who | {"place": BASELINE, "mean": _mean(line, ALONE)}
            single = edited[edited.regime == "single"]
            for line in summary(single).to_dict("records") if len(single) else ():
                yield line | who | {"place": SINGLE, "mean": _mean(line, ALONE)}
            for regime, sequence in accumulating(edited[edited.regime != "single"]).groupby("regime", sort=False):
                by = str(editor) if regime == "sequential" else f"{editor}, {regime}"
                lasts = sequence.step[sequence.checkpoint].groupby(sequence.order).max()
                steps = [step for step in STEPS if step < lasts.min()]
                sequence = sequence[sequence.step.isin(steps) | (sequence.step >= lasts.min())]
                end = summary(sequence).assign(edits=lasts.max())
                for line in pd.concat([at_steps(sequence, steps), end]).to_dict("records"):
                    place = next((n for n in ROUND if abs(line["edits"] - n) <= n / 20), line["edits"])
                    more = {"by": by, "place": place, "orders": len(lasts), "mean": _mean(line, SEQUENCE)}
                    yield line | who | more


def editor_settings(folder: Path, label: str) -> dict[str, Any]:
    """The settings of the editor that a run's rows call `label`: its class, and where two are alike a name from `beside`."""
    flat = settings_of(folder)
    kind, _, name = label.partition(" ")
    for target in flat:
        if target == "editor._target_" or (target.startswith("task.") and target.endswith(".editor._target_")):
            place = target.removesuffix("_target_")
            alike = str(flat[target]).rpartition(".")[2] == kind
            if alike and (not name or place.endswith(f".{name}.editor.")):
                return {n.removeprefix(place): v for n, v in flat.items() if n.startswith(place) and n != target}
    return {}


def layers(settings: dict[str, Any], edited: pd.DataFrame) -> str:
    """All layers that an editor changes, by its settings; where these say none, by its rows."""
    found: set[int] = set()
    for name in LAYERS:
        try:
            value = json.loads(str(settings.get(name)))
        except ValueError:
            continue
        found |= {n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)}
    if not found and "layer" in edited:
        found = set(edited.layer.dropna().astype(int))
    return ", ".join(map(str, sorted(found)))


def _mean(line: dict[str, Any], columns: dict[str, str]) -> float:
    """The harmonic mean of what was taught and what was kept; NaN where one of them was not asked."""
    parts = [line.get(columns[name], float("nan")) for name in ("taught", "prior", "refused")]
    if any(pd.isna(part) for part in parts):
        return float("nan")
    return 0.0 if min(parts) == 0 else len(parts) / sum(1 / part for part in parts)


def _section(place: int, table: pd.DataFrame, start: Path) -> list[str]:
    """One table with its heading; below it, how many lines it does not show."""
    if place == BASELINE:
        columns, title = ALONE, "Not edited"
        measures = [name for name in ALONE.values() if name in table]
        table = table[~table.round(9).duplicated(["regime", *measures])]
        table = table.assign(by=table.regime.map(STATES)).sort_values("by", ascending=False, kind="stable")
    else:
        columns, title = (ALONE, "Single edits") if place == SINGLE else (SEQUENCE, _edits(table))
        table = table.sort_values(["mean", columns["taught"]], ascending=False, kind="stable", na_position="last")
    said = set_apart(table)
    cells = []
    for line, settings in zip(table.head(MOST).to_dict("records"), said, strict=False):
        shown: dict[str, Any] = {"by": line["by"]}
        if place != BASELINE:
            shown |= {"layer": line["layer"], "set": settings}
        shown |= {header: cell(name, line).text for header, name in columns.items() if name in line}
        if place != BASELINE:
            shown["mean"] = "" if pd.isna(line["mean"]) else f"{line['mean']:.2f}"
        shown["facts"] = int(line[f"{columns['taught']}_n"])
        if columns is SEQUENCE:
            shown["orders"] = int(line["orders"])
            shown |= {"edits": int(line["edits"])} if table.edits.nunique() > 1 else {}
        links = [Path(os.path.relpath(run, start)).as_posix() for run in line["runs"]]
        first = Path(line["runs"][0]).resolve().parent
        study = first.parent.name if first.name == "runs" else first.name
        shown["run"] = " ".join(f"[{n if n > 1 else study}]({link})" for n, link in enumerate(links, 1))
        cells.append(shown | {"command": line["number"]})
    out = [f"### {title}\n", _markdown(cells)]
    best = "first" if place == BASELINE else "best"
    return [*out, f"The {best} {MOST} of {len(table)} lines.\n"] if len(table) > MOST else out


def _edits(table: pd.DataFrame) -> str:
    numbers = sorted(set(table.edits.astype(int)))
    return f"{' and '.join(map(str, numbers))} edit{'s' * (numbers != [1])} in sequence"


def set_apart(table: pd.DataFrame) -> list[str]:
    """Of each line, its rate and those settings that tell it from others of the same class of editor, as `opener=0`."""
    kinds = table.by.str.split(r"[ ,]").str[0]
    shown = []
    for kind, settings in zip(kinds, table.settings, strict=True):
        alike = list(table.settings[kinds == kind])
        names = [n for n, v in settings.items() if n == "lr" or any(other.get(n) != v for other in alike)]
        shown.append(" ".join(f"{n}={v:g}" if isinstance(v := settings[n], float) else f"{n}={v}" for n in names))
    return shown


def _markdown(cells: Sequence[dict[str, Any]]) -> str:
    """Lines as a table, without columns that are empty in all of them."""
    names = [
        name
        for name in dict.fromkeys(name for line in cells for name in line)
        if any(line.get(name) not in ("", None) for line in cells)
    ]
    body = [[str(line.get(name, "")).replace("|", "\\|") for name in names] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *body))
