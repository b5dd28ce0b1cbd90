"""The core study (experiment=study): short lists to jobs, what they will take, their two stages, and what came out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from qfbench.analysis import tables
from qfbench.commands.run import quiet
from qfbench.commands.settings import CONF, build, check, check_fields, evenly, model_config
from qfbench.errors import UserError
from qfbench.pages import results
from qfbench.pages.study import core
from qfbench.tasks import run as context
from qfbench.tasks.cost import reckoned

Compose = Callable[[Sequence[str]], DictConfig]
Launch = Callable[..., Sequence[JobReturn]]
CONVERSIONS = "outputs/conversions"


@dataclass(frozen=True)
class Axes:
    """The settings `study`."""

    models: list[str]
    editors: list[str]
    layers: list[int] | None
    rates: dict[str, list[float]]
    edits: list[int]
    seeds: list[int]
    convert: bool
    conversion: list[str]
    reckon: bool
    dry: bool


@dataclass(frozen=True)
class Job:
    """One run of the study, and where it stands on the axes."""

    overrides: tuple[str, ...]
    config: DictConfig
    model: str
    editor: str
    layer: int
    lr: float | None
    seed: int

    @property
    def folder(self) -> Path:
        return place(self.config)


@dataclass
class Plan:
    """The jobs; the conversions that come before them, by the folder of the converted model; what is left out, and why.

    `stock` is each model's configuration as it is without a conversion.
    """

    stock: dict[str, DictConfig] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    conversions: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def place(config: DictConfig) -> Path:
    """The folder of a job of a sweep."""
    return Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir


def sweep(config: DictConfig, arguments: Sequence[str], compose: Compose, launch: Launch) -> list[Any]:
    """Print the plan; convert the layers that it needs; run its jobs; make the study of those that were finished.

    Raises:
        UserError: a setting of the study is wrong.
        Exception: of the first job that failed, after all others are done.
    """
    quiet()
    out, axes = tables.console(), settings(config)
    plan = planned(axes, passed_on(arguments), compose)
    show(plan, axes, out)
    if axes.dry or not plan.jobs:
        return []
    waiting = {name: made for name, made in plan.conversions.items() if not finished(name)}
    failures = run_all(launch, list(waiting.values()), 0)
    able = [job for job in plan.jobs if job.config.model.path not in waiting or finished(job.config.model.path)]
    failures += run_all(launch, [list(job.overrides) for job in able], len(waiting))
    conclude(able, axes, Path(config.hydra.sweep.dir), out)
    if failures:
        raise failures[0]
    return []


def run_all(launch: Launch, jobs: list[list[str]], first: int) -> list[Exception]:
    """Launch jobs, the first of which has the number `first`; what those that failed raised. A launcher may raise for one of them."""
    failures: list[Exception] = []
    try:
        for result in launch(jobs, initial_job_idx=first) if jobs else []:
            try:
                _ = result.return_value
            except Exception as error:
                failures.append(error)
    except Exception as error:
        failures.append(error)
    return failures


def settings(config: DictConfig) -> Axes:
    values: Any = OmegaConf.to_container(config.study, resolve=True)
    check_fields(values, Axes, "study.")
    axes = Axes(**values)
    for name in ("models", "editors", "edits", "seeds", "conversion"):
        if not getattr(axes, name):
            raise UserError(f"study.{name}=[]: name at least one")
    if min(axes.edits) < 1 or axes.layers == [] or min(axes.layers or [0]) < 0:
        raise UserError(f"study.edits={axes.edits}, study.layers={axes.layers}: numbers of edits from 1, layers from 0")
    return dataclasses.replace(axes, edits=sorted(set(axes.edits)))


def passed_on(arguments: Sequence[str]) -> list[str]:
    """What the command line says of every job.

    Raises:
        UserError: it sets, or sweeps, what the study's own lists are for.
    """
    own = {"model": "models", "editor": "editors", "editor.layer": "layers", "editor.lr": "rates.EDITOR"}
    own |= {"edits": "edits", "seed": "seeds", "task.retention.every": "edits"}
    kept = []
    for one in OverridesParser.create().parse_overrides(list(arguments)):
        if one.is_sweep_override() or one.key_or_group in own:
            remedy = f"study.{own[one.key_or_group]}=[...]" if one.key_or_group in own else "one value"
            raise UserError(f"{one.input_line}: with experiment=study give {remedy}")
        if not one.key_or_group.startswith("study."):
            kept.append(str(one.input_line))
    return kept


def planned(axes: Axes, common: Sequence[str], compose: Compose) -> Plan:
    """All jobs, those of one folder of weights after each other."""
    plan = Plan()
    for model in axes.models:
        plan.stock[model] = compose([*common, f"model={model}"])
        config = model_config(plan.stock[model].model.path)
        depth = config.num_hidden_layers
        for editor, layer in product(axes.editors, axes.layers or evenly(depth, 4)):
            if layer >= depth:
                plan.left_out.setdefault(f"{model} has no layer {layer}", []).append(editor)
                continue
            asked = [*common, f"model={model}", f"editor={editor}", f"editor.layer={layer}"]
            own = compose(asked)
            if axes.rates.get(editor) and "lr" not in own.editor:
                raise UserError(f"study.rates.{editor}={axes.rates[editor]}: {editor} has no rate (lr); leave it out")
            if build(own, "editor").needs_firing and layer not in (getattr(config, "firing_layers", None) or ()):
                where = fired(plan, axes, common, compose, model, layer)
                if not where:
                    why = f"{editor} needs layers that fire, and study.convert=false"
                    plan.left_out.setdefault(why, []).append(f"{model} layer {layer}")
                    continue
                asked = [*common, *where, *asked[-2:]]
            add(plan, axes, compose, asked, model, editor, layer)
    plan.jobs.sort(key=lambda job: (axes.models.index(job.model), job.config.model.path))
    return plan


def add(plan: Plan, axes: Axes, compose: Compose, asked: list[str], model: str, editor: str, layer: int) -> None:
    """A job for each rate and seed."""
    checkpoints = ["edits=" + str(axes.edits[-1]), f"task.retention.every={axes.edits}".replace(" ", "")]
    rates: Sequence[float | None] = axes.rates.get(editor) or [None]
    for lr, seed in product(rates, axes.seeds):
        overrides = (*asked, *checkpoints, f"seed={seed}", *([] if lr is None else [f"editor.lr={lr}"]))
        config = compose(overrides)
        check(config)
        plan.jobs.append(Job(overrides, config, model, editor, layer, lr, seed))


def fired(plan: Plan, axes: Axes, common: Sequence[str], compose: Compose, model: str, layer: int) -> list[str]:
    """The settings of the model with this layer converted: one that is shipped, or made before; empty without `convert`."""
    twin = f"{model}-qf2"
    if (CONF / "model" / f"{twin}.yaml").exists():
        path = compose([*common, f"model={twin}"]).model.path
        if "/" not in path and layer in (getattr(model_config(path), "firing_layers", None) or ()):
            return [f"model={twin}"]
    if not axes.convert:
        return []
    about = [
        one for one in common if one.split("=")[0].split(".")[0] in ("model", "threads", "cache", "commit_seconds")
    ]
    overrides = [*axes.conversion, f"model={model}", f"model.layer={layer}", *about, f"hydra.sweep.dir={CONVERSIONS}"]
    overrides.append(f"hydra.sweep.subdir={model}-layer{layer}-{compose(overrides).hydra.sweep.subdir.split('-')[-1]}")
    made = str(place(compose(overrides)) / "model")
    plan.conversions[made] = overrides
    return [f"model={model}", f"model.path={made}"]


def finished(model: str) -> bool:
    """Whether a conversion has written its model: the recipe comes last."""
    return (Path(model) / "recipe.json").exists()


def show(plan: Plan, axes: Axes, out: Console) -> None:
    """What will be done, what is left out, and how long it may take."""
    lines = pd.DataFrame([{"model": j.model, "editor": j.editor, "layer": j.layer, "lr": j.lr} for j in plan.jobs])
    if plan.jobs:
        grouped = lines.groupby(["model", "editor"], sort=False)
        shown = grouped.agg(lambda own: ", ".join(f"{v:g}" for v in sorted(set(own.dropna())))).reset_index()
        shown["jobs"] = grouped.size().to_numpy()
        edits, seeds = (", ".join(map(str, values)) for values in (axes.edits, axes.seeds))
        tables.show(out, shown, f"{len(plan.jobs)} jobs, asked after {edits} edits; seeds {seeds}")
    for why, what in plan.left_out.items():
        out.print(f"left out: {', '.join(dict.fromkeys(what))}: {why}", markup=False, soft_wrap=True)
    there = sum(map(finished, plan.conversions))
    if plan.conversions:
        out.print(
            f"layers to convert first: {len(plan.conversions) - there}, and {there} that are there ({CONVERSIONS})"
        )
    left = [job for job in plan.jobs if not (job.folder / "retention.csv").exists()]
    if len(left) < len(plan.jobs):
        out.print(f"measured already: {len(plan.jobs) - len(left)} jobs")
    text = f"about {gigabytes(plan, left):.1g} GB for changes of weights, and a copy of its model for each conversion"
    if left and axes.reckon:
        seconds = sum(seconds_of(plan.stock[model], [j for j in left if j.model == model]) for model in axes.models)
        text = f"about {seconds / 60:.0f} minutes one after another, before conversions; {text}"
    out.print(text, highlight=False, soft_wrap=True)


def gigabytes(plan: Plan, jobs: Sequence[Job]) -> float:
    """Of the changes that the jobs will keep: a matrix in float32 for each order."""
    configs = {model: model_config(stock.model.path) for model, stock in plan.stock.items()}
    matrices = {model: config.hidden_size * config.intermediate_size for model, config in configs.items()}
    return sum(4e-9 * matrices[job.model] * job.config.task.retention.orders for job in jobs)


def seconds_of(stock: DictConfig, jobs: Sequence[Job]) -> float:
    """What the jobs of one model will take, reckoned on the model as it is without a conversion."""
    if not jobs:
        return 0.0
    task = jobs[0].config.task.retention
    about = {name: task[name] for name in ("orders", "placebo", "at_most")} | {"at": list(task.every)}
    suites = build(stock, "regression")
    editors = [build(job.config, "editor") for job in jobs]
    return reckoned(context.load(stock.model), editors, build(jobs[0].config, "facts"), suites, **about)


def conclude(jobs: Sequence[Job], axes: Axes, folder: Path, out: Console) -> None:
    """Tables and figures of the jobs that were finished, in the folder `study`."""
    ended = [job for job in jobs if (job.folder / "retention.csv").exists()]
    if not ended:
        return
    rows = results.retention(*(job.folder for job in ended))
    about = pd.DataFrame([{"model": j.model, "editor": j.editor, "layer": j.layer, "lr": j.lr} for j in ended])
    study = core(rows, about.set_index(pd.Index([str(job.folder) for job in ended])), axes.edits)
    study.save(folder / "study", out, [job.folder for job in ended])
