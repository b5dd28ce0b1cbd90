"""Stored runs: their rows in one frame, their summary, and the comparison of two (the command `qfbench-results`)."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
from omegaconf import OmegaConf
from yaml import YAMLError

from qfbench.analysis.catalogue import GENERAL, MEASURES
from qfbench.analysis.measures import compared, summary
from qfbench.analysis.rows import regular
from qfbench.analysis.tables import named
from qfbench.errors import UserError
from qfbench.runs.identity import NOT_MEASURED, placeless
from qfbench.runs.ledger import MADE_OF, Ledger
from qfbench.runs.provenance import SAME
from qfbench.runs.store import read_progress

log = logging.getLogger(__name__)

RUNS = "runs.txt"  # in the folder of a study: its runs, a line each, by their paths from there


def folders(*paths: str | Path) -> list[Path]:
    """The runs in `paths` and below, and those of studies whose folders are given, in order.

    Raises:
        UserError: one of them holds none.
    """
    found: set[Path] = set()
    for path in paths:
        folder = Path(path).expanduser()
        listed = (folder / RUNS).read_text(encoding="utf-8").splitlines() if (folder / RUNS).is_file() else []
        own = {Path(os.path.normpath(folder / line)) for line in listed}
        if gone := [run for run in sorted(own) if not (run / "rows.parquet").exists()]:
            raise UserError(f"{folder / RUNS}: names {gone[0]}, which holds no run")
        own |= {p.parent for p in folder.rglob("rows.parquet")}
        if not own:
            raise UserError(f"{path}: holds no run (a folder with rows.parquet and provenance.json)")
        found |= own
    return sorted(found)


def unfinished(found: Iterable[Path]) -> list[Path]:
    """Of runs, those that were stopped or still run: they hold what they had measured. A shipped copy is of one that has ended."""
    return [run for run in found if (run / "progress.json").exists() and not read_progress(run)["finished"]]


def rows_of(*paths: str | Path) -> pd.DataFrame:
    """The rows of all runs in `paths` and below, as one frame. Runs that are not finished are named in the log.

    Column `run` is a run's folder; each setting in which runs differ is a column, named as on the command line
    (`editor.layer`). The frame's `attrs["settings"]` names those that it takes to tell the runs apart: none that follows
    from others (`facts.seed` from `seed`).

    Raises:
        UserError: there is no run, or a file of one cannot be read.
    """
    found = folders(*paths)
    for folder in found:
        if damaged := Ledger(folder).damaged(*MADE_OF):
            raise UserError(f"{folder / damaged[0]}: is damaged or gone; the run's own command measures it again")
    if begun := unfinished(found):
        log.warning(
            "not finished: %d of %d runs; their figures are of what they had measured: %s",
            *(len(begun), len(found), named(list(map(str, begun)))),
        )
    table = differing_settings(found)
    parts = []
    for folder in found:
        try:
            rows = pd.read_parquet(folder / "rows.parquet")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'rows.parquet'}: cannot be read ({error})") from error
        same = pd.DataFrame({"run": str(folder)} | table.loc[str(folder)].to_dict(), index=rows.index)
        parts.append(pd.concat([rows, same], axis=1))  # at once: they may be many
    rows = regular(pd.concat(parts, ignore_index=True).infer_objects().copy())  # in one piece: columns may be many
    rows.attrs["settings"] = list(told_apart(table))
    return rows


def differing_settings(found: Sequence[Path]) -> pd.DataFrame:
    """The settings in which runs differ, named as on the command line: a line a run, by its folder; those with the fewest dots first."""
    table = pd.DataFrame([settings_of(folder) for folder in found], index=list(map(str, found)), dtype=object)
    table = table[[name for name in table if name.split(".")[0] not in NOT_MEASURED]]
    table = table.reindex(columns=sorted(table.columns, key=lambda name: (name.count("."), name)))
    return table[[name for name in table if table[name].map(repr).nunique() > 1]]


def told_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Of `differing_settings`, those that it takes to tell the runs apart: none that follows from others."""
    text, names = table.map(repr), list[str]()
    for name in table:
        if len(text[[*names, name]].drop_duplicates()) > (len(text[names].drop_duplicates()) if names else 1):
            names.append(name)
    return table[names]


def pooled(rows: pd.DataFrame, measure: Callable[[pd.DataFrame], pd.DataFrame] = summary) -> pd.DataFrame:
    """`measures.summary` (or another measure) of each combination of settings of several runs, those that differ in `seed`
    taken together: an interval is over facts, orders and seeds."""
    parts = []
    for settings, own in groups(rows):
        frame = measure(own)
        done = {name: f"{name}_done" for name in settings if name in frame}  # `edits` are set, and done
        frame = frame.rename(columns=done)
        for place, (name, value) in enumerate(settings.items()):
            frame.insert(place, name, value)
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def groups(rows: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each combination of settings but `seed`, with its rows: `order` and `fact_id` tell those of different runs apart."""
    by = [name for name in rows.attrs["settings"] if name not in ("seed", "facts.seed")]
    run = pd.factorize(rows.run)[0]
    facts = rows.fact_id.where(rows.kind.isin(GENERAL), rows.run + " " + rows.fact_id)
    rows = rows.assign(order=1000 * run + rows.order, fact_id=facts)
    for key, own in rows.groupby(by, dropna=False) if by else [((), rows)]:
        yield dict(zip(by, key, strict=True)), own


def retention(*paths: str | Path) -> pd.DataFrame:
    """Of `rows_of`, the rows of the task `retention`, which have a summary and can be compared.

    Raises:
        UserError: there are none.
    """
    rows = rows_of(*paths)
    rows = rows[rows.task == "retention"]
    if rows.empty:
        raise UserError(f"{', '.join(map(str, paths))}: holds no rows of the task retention")
    return rows


def origin(*paths: str | Path) -> pd.DataFrame:
    """How the runs in `paths` and below were made: one line per command, with how many runs it gave and where they ran."""
    lines = []
    for folder in folders(*paths):
        known = provenance_of(folder)
        line = {"command": shlex.join(["qfbench", *known["command"]])}
        lines.append(line | {name: known.get(name) or "" for name in ("model", "device_name", "dtype", "git_commit")})
    table = pd.DataFrame(lines)
    return table.groupby(list(table), dropna=False, sort=False).size().reset_index(name="runs")


def ship(to: str | Path, *paths: str | Path) -> list[Path]:
    """Copy the runs in `paths` and below into the new folder `to`, small enough for a repository; returns the copies.

    Every table and figure stays as it is. Left out are the changes of weights, the figures, and of the rows what no measure uses and
    what does not compress: replies that did not end, the nats per token (`nll`) of what is not held text, texts of
    questions about general ability, and log-probabilities of their choices but where a measure uses them.

    Raises:
        UserError: there is no run, two have the same name, one is not finished, or `to` holds something already.
    """
    found, to = folders(*paths), Path(to)
    if begun := unfinished(found):
        raise UserError(f"{begun[0]}: is not finished, which a copy would not say; its own command goes on from there")
    if len({folder.name for folder in found}) < len(found):
        raise UserError(f"{', '.join(map(str, paths))}: holds two runs of the same name")
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: holds something already; remove it first, or give another folder")
    for folder in found:
        (to / folder.name).mkdir(parents=True)
        rows = pd.read_parquet(folder / "rows.parquet")
        if "reply" in rows:
            used = {measure.kind for measure in MEASURES.values() if "nll" in (measure.column, measure.minus)}
            rows["nll"] = rows.nll.where(rows.kind.isin(used))
            rows["reply"] = rows.reply.where(rows.stopped.eq(True))
        if "logprobs" in rows:
            rows = rows.drop(columns="logprobs").assign(
                gold_logprob=rows.gold_logprob.where(_shown(regular(rows))).astype("float32")
            )
            texts = ["query", "expected"]
            rows[texts] = rows[texts].where(rows.kind != "question", "")
        table = pyarrow.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata()  # which is 16 kB a file
        small: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "store_schema": False}
        files: dict[str, Callable[[Path], object]] = {
            "config.yaml": partial(shutil.copyfile, folder / "config.yaml"),
            "provenance.json": partial(_provenance, folder),
            "rows.parquet": partial(pyarrow.parquet.write_table, table, **small),
        }
        ledger = Ledger(to / folder.name)
        for name, write in files.items():
            if not ledger.write(name, write):
                raise UserError(f"{folder / name} cannot be copied to {to} (is it there, and is there room?)")
    return [to / folder.name for folder in found]


def _provenance(folder: Path, to: Path) -> None:
    """A copy that does not say in which folder of its machine the run lay."""
    known = provenance_of(folder)
    known["command"] = [
        word for word in known.get("command", []) if not word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))
    ]
    to.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _shown(rows: pd.DataFrame) -> pd.Series:
    """Whether a row's log-probability stands behind a measure: not in the midst of a sequence."""
    sequence = ["model", "editor", "regime", "order"]
    last = (
        rows.step.where(rows.kind == "question")
        .groupby([rows[name] for name in sequence], dropna=False)
        .transform("max")
    )
    return (rows.taught != rows.step) | (rows.step == last)


def compare(run: str | Path, other: str | Path, across: Collection[str] = ()) -> pd.DataFrame:
    """What `run` scores beyond `other`, paired by probe and order (`measures.compared`).

    Raises:
        UserError: they were not measured in the same way: a field of `SAME` differs that is not named in `across`.
    """
    (folder,), (reference,) = (_one(path) for path in (run, other))
    ours, theirs = (provenance_of(path) for path in (folder, reference))
    beside = [run.get("models_beside", {}) for run in (ours, theirs)]
    both = [(ours, theirs), *((beside[0][name], beside[1][name]) for name in beside[0].keys() & beside[1].keys())]
    for a, b in both:
        for name in SAME:
            if name not in across and a.get(name) != b.get(name):
                of = f" of {a['model']}" if a is not ours else ""
                raise UserError(
                    f"{folder} and {reference} differ in {name}{of}: {a.get(name)} and {b.get(name)}; they cannot be "
                    f"compared, unless that is what is studied (--across {name})"
                )
    asked = [run.get("regression", {}) for run in (ours, theirs)]
    for name in asked[0].keys() & asked[1].keys():
        if asked[0][name] != asked[1][name]:
            raise UserError(
                f"{folder} and {reference} differ in what {name} asks (regression); they cannot be compared"
            )
    return compared(*(retention(path).assign(run=0) for path in (folder, reference)))


def _one(path: str | Path) -> list[Path]:
    found = folders(path)
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} runs; give one of them, as {found[0]}")
    return found


def provenance_of(folder: Path) -> dict[str, Any]:
    """What `qfbench.runs.provenance` wrote of a run."""
    path = folder / "provenance.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise UserError(f"{path}: cannot be read (must be an object)")
    return known


def settings_of(folder: Path) -> dict[str, Any]:
    """All settings of a run, named as on the command line."""
    path = folder / "config.yaml"
    try:
        return _flat(placeless(OmegaConf.to_container(OmegaConf.load(path))))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {name: values if isinstance(values, (int, float, str)) else json.dumps(values)}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
