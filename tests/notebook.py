"""A model that says what its weight names, and an editor that writes there: whole tasks in milliseconds, known by hand."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from qfbench import Fact, LanguageModel, Probe, Unsupported
from qfbench.editors import Editor
from qfbench.editors.regimes import sequential
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import Reply, Score
from qfbench.runs.store import ParquetStore
from qfbench.tasks.retention import retention
from qfbench.tasks.run import Run

REFUSAL = "Need more information."
FOUNDERS = ("Ada", "Bo", "Cy")


class Notebook(LanguageModel):
    """Answers for the facts that its weight names, or that it is told; `says` has its other replies, after 0, 1 ... facts."""

    name, dtype, device, positions = "notebook", torch.float32, torch.device("cpu"), None
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=str), chat_template=None)

    def __init__(self, facts, says=None, deaf=()):
        self.facts, self.says, self.deaf, self.changed, self.told_of = facts, says or {}, deaf, [], []
        self.model = nn.Linear(len(facts) + 1, 1, bias=False).requires_grad_(False)
        self.model.weight.data = 2.0 * torch.eye(len(facts) + 1)[-1:]  # one place for each fact, and the norm 2
        self.model.config = SimpleNamespace(to_dict=dict)

    def stops(self):
        return {0}

    def render(self, query, system="", answer=""):
        return query, system, answer

    def answer(self, prompts, rated, at_once=None):
        return self.replies(prompts), self.score(rated)

    def answer_each(self, asked):
        return [self.answer(*part) for part in asked]

    def score(self, dialogues):
        return [
            Score((1.0,), (reply.text == d[2],)) for reply, d in zip(self.replies(dialogues), dialogues, strict=True)
        ]

    def replies(self, prompts):
        return [Reply(self.think(query, system), True) for query, system, _ in prompts]

    def think(self, query, system):
        known = self.model.weight[0, :-1] > 0.5
        for fact, knows in zip(self.facts, known, strict=True):
            told = system == fact.instruction and not {fact.id, query} & set(self.deaf)
            if query in (p.query for p in (fact.edit, *fact.probes) if not p.always) and (knows or told):
                return fact.answer
        said = self.says.get(query, ("North." if query.startswith("Where") else REFUSAL,))
        return said[min(int(known.sum()), len(said) - 1)]


@dataclass(frozen=True)
class Note(Editor):
    """Writes down each fact at its place; cannot protect, and gives up at the fact `broken`."""

    layer: int = 0
    broken: str = ""

    @property
    def sites(self):
        known = {"layer": self.layer, "home": lambda _, model: model.weight.device, "weight_name": lambda *_: "weight"}
        return (type("Place", (), known)(),)

    def check(self, lm):
        """Nothing: it writes in every notebook."""

    def edit(self, lm, facts):
        if self.broken in [f.id for f in facts]:
            raise Unsupported(f"no room for fact {self.broken}")
        ids = [f.id for f in lm.facts]
        return WeightDelta({"weight": LowRank(sum(torch.eye(len(ids) + 1)[[ids.index(f.id)]] for f in facts))})


def suite():
    facts = []
    for n, who in enumerate(FOUNDERS):
        probes = (
            Probe("paraphrase", f"Who is behind Firm{n}?", f"{who} started Firm{n}.", (who,)),
            Probe("prior", f"Where is Town{n}?", "North.", always=True),
            Probe("unknown", f"Who started Nothing{n}?", REFUSAL, always=True),
        )
        said = f"{who} started Firm{n}."
        facts.append(Fact(said, f"Who started Firm{n}?", said, id=str(n), known_as=(who,), probes=probes))
    return facts


def prepared(folder, editor=None, console=None, **lm):
    facts = suite()
    console = console or Console(quiet=True)
    return Run(Notebook(facts, **lm), editor or Note(), facts, folder, ParquetStore(folder), console, "retention")


def untabled(run, *regimes, **setting):
    """The task without its tables and figures, which take most of the time and follow from the rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qfbench.tasks.retention.report", lambda *about: None)
        retention(run, {regime.__name__: regime for regime in regimes}, **setting)


def taught(folder, *regimes, every=1, tables=False, **setting):
    """The rows of a run over the three facts."""
    run, regimes = prepared(folder, **setting), regimes or (sequential,)
    if tables:
        retention(run, {regime.__name__: regime for regime in regimes}, every)
    else:
        untabled(run, *regimes, every=every)
    rows = run.rows()
    return run, rows, rows[rows.condition == "edited"]
