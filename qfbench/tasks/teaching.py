"""The engine that the tasks share: teach facts under one regime, and ask at checkpoints what became of them and of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qfbench.analysis.measures import KEPT
from qfbench.analysis.sequences import COLLAPSED, ENOUGH, what_is_left
from qfbench.editors.regimes import Regime, Taught, accumulates
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact
from qfbench.facts.probes import Row, ask, ask_each, leaked
from qfbench.models.delta import WeightDelta
from qfbench.models.each import each_applied_to, side_by_side
from qfbench.tasks.baseline import Asked
from qfbench.tasks.run import Advance, Run

TOGETHER = 16  # edits that do not build on each other, asked about at once


@dataclass(frozen=True)
class Check:
    """A change of weights after so many edits, and what is asked under it; the first `n_fresh` are about the newest fact."""

    step: int
    taught: Sequence[Fact]
    change: WeightDelta
    whole: bool
    asked: Asked
    n_fresh: int


@dataclass
class Teaching:
    """One regime over some facts. `run` does all of it, or what an earlier process has left to be done.

    Args:
        within: the run whose model is taught, by whose editor.
        name: of the regime.
        always: the probes about the model itself.
        at: the edits at which all is asked.
        about: columns of every row, and part of the name of the file that the last change is saved in.
        placebo: how many times to ask everything once more at the end, under a random change of the same rank and norm.
        stop_on_collapse: end once prior knowledge has fallen under half.
    """

    within: Run
    name: str
    regime: Regime
    facts: Sequence[Fact]
    always: Asked
    at: Collection[int]
    about: Mapping[str, Any] = field(default_factory=dict)
    placebo: int = 0
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        self.about = self.within.editor.about | dict(self.about)
        self.accumulates = accumulates(self.regime)
        parts = [self.within.editor_name, self.name, *(f"{key}{value}" for key, value in self.about.items())]
        self.file = self.within.place + "-".join(parts)
        self.done, self.total = 0, WeightDelta()  # how many edits, and the change that they made
        self.taught: Sequence[Fact] = []
        self.drawn: set[int] = set()  # placebos
        self.fallen: set[str] = set()  # measures that have collapsed

    @property
    def title(self) -> str:
        order = f", order {self.about['order']}" if "order" in self.about else ""
        return f"{self.within.editor_name} {self.name}{order}"

    @property
    def work(self) -> int:
        """How many probes will be asked, unless it ends early."""
        n = len(self.facts)
        placebos = self.placebo * self.probes_at(n) if n and self.accumulates else 0
        return sum(map(self.probes_at, range(1, n + 1))) + placebos

    def probes_at(self, step: int) -> int:
        """About how many probes `check` asks after so many edits."""
        own = 1 + sum(not p.always for f in self.facts for p in f.probes) // len(self.facts)
        last = step == len(self.facts)
        taught = step if self.accumulates else 1
        return own * taught + len(self.always) if last else own + (step in self.at) * (taught + len(self.always))

    def run(self, advance: Advance) -> None:
        """Teach, check, draw placebos, save. An `Unsupported` becomes a row."""
        ended = f"{self.within.task}/{self.file}"
        if ended in self.within.store.ended:
            advance(f"{self.title}: done before", self.work, before=True)
            return
        self.resume()
        if self.done:
            advance(f"{self.title}: done before", sum(map(self.probes_at, range(1, self.done + 1))), before=True)
        try:
            self.teach(advance)
            self.draw_placebos(advance)
        except Unsupported as error:
            row = {"condition": "unsupported", "regime": self.name, "reply": str(error)}
            self.within.log(row | dict(self.about))
            self.within.warn(f"{self.name}: {error}")
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}, after {self.done} edits: {error}") from error
        if self.done and self.accumulates:
            self.within.save(self.total, self.file)
        self.within.store.ended.append(ended)

    def resume(self) -> None:
        """Go on where an earlier process stopped; from the beginning where its state is damaged or gone."""
        rows = self.within.earlier(regime=self.name, **self.about)
        edited = rows[rows.condition == "edited"]
        done = int(edited.step.max()) if len(edited) else 0
        if done and self.accumulates:
            try:
                sites = self.within.editor.sites
                home = sites[0].home(self.within.lm.model) if sites else "cpu"
                self.total = WeightDelta.load(self.within.state(self.file, done), home)
            except UserError as error:
                self.within.warn(f"{error}; {self.name} is measured again")
                self.within.forget(rows.index)
                return
            left = what_is_left(edited).items()
            self.fallen = {measure for measure, share in left if (share < COLLAPSED).any()}
        self.done, self.taught = done, self.facts[:done]
        self.drawn = set(rows.draw[rows.condition == "placebo"])

    def teach(self, advance: Advance) -> None:
        """Edit by edit; at the checkpoints ask, and keep what it takes to go on from there."""
        if self.collapsed:
            return
        edits = self.regime(self.within.editor, self.within.lm, self.facts, self.done, self.total)
        if not self.accumulates:
            self.teach_apart(edits, advance)
            return
        for step, (taught, total) in enumerate(edits, start=self.done + 1):
            self.taught, self.total = taught, total
            (left,) = self.check([self.asked(step, taught, total)])
            self.done = step
            advance(f"{self.title}: edit {step}", self.probes_at(step))
            self.announce(left)
            if step in self.at:
                self.within.commit(self.file, step, total)
            if self.collapsed:
                return

    def teach_apart(self, edits: Taught, advance: Advance) -> None:
        """Edits that do not build on each other: as many are asked about at once as have room beside the model.

        An edit has the same company wherever a run goes on.
        """
        names = [site.weight_name(self.within.lm.model) for site in self.within.editor.sites]
        most = min(TOGETHER, side_by_side(self.within.lm, names))
        for group in in_groups(edits, most, self.done):
            checks = [self.asked(self.done + i, *edit) for i, edit in enumerate(group, start=1)]
            alone = False
            try:
                self.check(checks)
            except (FloatingPointError, torch.OutOfMemoryError):
                if len(checks) == 1:
                    raise
                alone = True  # one after another: some of them can be measured
            for part in [[check] for check in checks] if alone else [checks]:
                if alone:
                    self.check(part)
                self.done += len(part)
                self.taught = part[-1].taught
                advance(f"{self.title}: edit {self.done}", sum(self.probes_at(check.step) for check in part))
                self.within.commit()

    @property
    def collapsed(self) -> bool:
        """Whether to teach no further."""
        return self.stop_on_collapse and "prior" in self.fallen

    def announce(self, left: Mapping[str, float]) -> None:
        """Say where collapse (of prior knowledge, neighbours, refusals: under half of what it was) is first seen.

        Of a few probes that is no news, unless it ends the regime.
        """
        asked = Counter(KEPT.get(probe.kind) for _, probe in self.always)
        for measure, share in left.items() if self.accumulates else ():
            if share < COLLAPSED and measure not in self.fallen:
                self.fallen.add(measure)
                few = f" of {asked[measure]} probes" if asked[measure] < ENOUGH else ""
                if not few or (measure == "prior" and self.stop_on_collapse):
                    self.within.warn(f"{self.name}: collapse after {self.done} edits: {measure} at {share:.2f}{few}")

    def draw_placebos(self, advance: Advance) -> None:
        for draw in range(self.placebo if self.done and self.accumulates else 0):
            advance(f"{self.title}: placebo {draw + 1}", self.probes_at(self.done))
            if draw not in self.drawn:
                change = self.total.placebo(seed=1_000_000 * self.about.get("order", 0) + 1000 * draw)
                self.check([self.asked(self.done, self.taught, change, whole=True)], condition="placebo", draw=draw)
                self.within.commit(self.file, self.done, self.total)

    def asked(self, step: int, taught: Sequence[Fact], change: WeightDelta, whole: bool = False) -> Check:
        """What is to be asked after so many edits: the newest fact in all its wordings, and what follows from it and earlier
        ones; at a checkpoint, or as a `whole`, all taught queries, and the probes about the model itself; at the end all."""
        newest, ids = taught[-1], {f.id for f in taught}
        own = [(f, p) for f in taught for p in (f.edit, *f.probes) if not p.always and ids.issuperset(p.needs)]
        fresh = [newest.id in (f.id, *p.needs) for f, p in own]
        asked = [pair for pair, new in zip(own, fresh, strict=True) if new]
        n_fresh, last = len(asked), step == len(self.facts)
        whole = whole or last or step in self.at
        if whole:
            asked += [(f, p) for (f, p), new in zip(own, fresh, strict=True) if not new and (last or p.kind == "edit")]
            asked += self.always
        return Check(step, taught, change, whole, asked, n_fresh)

    def check(self, checks: Sequence[Check], condition: str = "edited", **about: Any) -> list[dict[str, float]]:
        """Ask under one change, or under several side by side; where a change is a whole one, general ability as well.

        Returns of each the shares that are left of what the unedited model had (`measures.KEPT`); nothing of what was not asked.
        """
        lm, questions = self.within.lm, [[p for _, p in check.asked] for check in checks]
        if len(checks) == 1:
            with checks[0].change.applied_to(lm):
                answered = [ask(lm, questions[0])]
        else:
            with each_applied_to(lm, [check.change for check in checks]):
                answered = ask_each(lm, questions)
        generals = [self.general(check.change) if check.whole else [] for check in checks]
        shares = []
        for check, rows, general in zip(checks, answered, generals, strict=True):
            same: dict[str, Any] = {
                "regime": self.name,
                "condition": condition,
                "step": check.step,
                "taught": len(check.taught),
                "checkpoint": check.whole,
            }
            same |= dict(self.about) | about | self.within.health(check.change, check.whole)
            answers = {known for fact in check.taught for known in fact.known_as}
            for i, ((fact, probe), row) in enumerate(zip(check.asked, rows, strict=True)):
                row["fresh"] = i < check.n_fresh
                row["leaked"] = leaked(probe, row["reply"], answers)
                self.within.log(row, fact_id=fact.id, fact_kind=fact.kind, **same)
            for row in general:
                self.within.log(row, fresh=False, leaked=False, **same)
            left: dict[str, list[bool]] = {}
            for (_, probe), row in zip(check.asked, rows, strict=True):
                if probe.kind in KEPT:
                    left.setdefault(KEPT[probe.kind], []).append(row["generated"])
            shares.append({measure: sum(passed) / len(passed) for measure, passed in left.items()})
        return shares

    def general(self, change: WeightDelta) -> list[Row]:
        """Rows of general ability under a change."""
        if not self.within.regression:
            return []
        with change.applied_to(self.within.lm):
            return list(self.within.general())


def taught(run: Run, sequences: Sequence[Teaching]) -> None:
    """Run them one after another, under one progress bar."""
    with run.progress(sum(sequence.work for sequence in sequences)) as advance:
        for sequence in sequences:
            sequence.run(advance)


def in_groups(edits: Taught, most: int, done: int) -> Iterator[list[tuple[Sequence[Fact], WeightDelta]]]:
    """Up to `most` edits at a time, from a whole number of groups on. Where one fails, those before it come first."""
    group = []
    try:
        for edit in edits:
            group.append(edit)
            if (done + len(group)) % most == 0:
                yield group
                done, group = done + len(group), []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def checkpoints(n: int, every: int | Sequence[int] | None, dense: int = 20, ratio: float = 1.2) -> set[int]:
    """The edits after which all is asked, of 1 to `n`: each `every`-th, or those named, and the last; None: each up to `dense`,
    then ever fewer."""
    if every is not None and min([every] if isinstance(every, int) else every, default=1) < 1:
        raise UserError(f"task.retention.every={every}: must be 1 or more (or a list of such), or null")
    if isinstance(every, int):
        return {*range(every, n + 1, every), n}
    if every is not None:
        return {step for step in every if step < n} | {n}
    steps, step = set(range(1, min(n, dense) + 1)), float(dense)
    while (step := step * ratio) < n:
        steps.add(round(step))
    return steps | {n}
