"""Ask a model probes; each answer is one flat row."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.matching import stands_in
from qfbench.models.lm import LanguageModel, Reply, Score

Row = dict[str, Any]


def instructed(facts: Sequence[Fact]) -> list[tuple[Fact, Probe]]:
    """The probes that depend on what is taught, each told the instructions that it takes: its fact's, and those it needs."""
    said = {f.id: f.instruction for f in facts}
    own = [(f, p) for f in facts for p in (f.edit, *f.probes) if not p.always]
    return [(f, replace(p, system=" ".join(said[i] for i in (*p.needs, f.id) if i in said))) for f, p in own]


def check_lengths(lm: LanguageModel, facts: Sequence[Fact]) -> None:
    """Refuse facts of which a dialogue is longer than the model has positions, before anything is asked.

    Raises:
        UserError: there is one; its fact, its kind and its length are named.
    """
    if lm.positions is None:
        return
    frame = len(lm.render("?").ids)
    for fact, probe in [*instructed(facts), *((f, p) for f in facts for p in f.probes if p.always)]:
        replies = [probe.expected, *(probe.prefer or ())]
        # No token is shorter than a byte: most dialogues need not be rendered to be known to fit.
        spoken = len(f"{probe.system}{probe.query}".encode()) + max(len(reply.encode()) for reply in replies)
        if frame + spoken + lm.max_new_tokens <= lm.positions:
            continue
        dialogues = [lm.render(probe.query, probe.system, reply or "?") for reply in replies]
        said = lm.excess(len(dialogues[0].prompt), lm.max_new_tokens)
        if said := said or lm.excess(max(len(dialogue.ids) for dialogue in dialogues)):
            what = "" if probe.kind == "edit" else f", probe {probe.kind!r}"
            raise UserError(
                f"fact {fact.id}{what} ({probe.query[:60]!r}) is too long: {said}; shorten it or leave it out"
            )


def ask(lm: LanguageModel, probes: Sequence[Probe]) -> list[Row]:
    """One row per probe, in order: the reply, and what it scores under each protocol.

    Columns: `kind`, `system`, `query`, `expected`, `reply`, `stopped`, and
    `generated` (the free-running reply ends by itself, names what is accepted and nothing that is rejected; of a probe whose
    reference is the model's own reply: it is that text again, as far as `max_new_tokens` reach, ended or not),
    `exact` (it equals the reference reply, end of turn included),
    `forced` (share of the reference's tokens that are the teacher-forced argmax),
    `nll` (nats per token of the reference reply); the last two are NaN where a probe has no reference. Where a probe says so,
    `preferred` (the first of its two replies has fewer nats per token) and `gold` (of a probe whose reference is the model's
    own reply: what the suite holds to be true stands in the reply); None elsewhere.
    A reply that is exact is the reference, to the letter.
    """
    return ask_each(lm, [probes])[0]


def ask_each(lm: LanguageModel, parts: Sequence[Sequence[Probe]]) -> list[list[Row]]:
    """What `ask` gives of each of `parts`: of the i-th under the i-th of the changes that are open side by side
    (`each.each_applied_to`)."""
    asked = []
    for probes in parts:
        dialogues = [lm.render(p.query, p.system, p.expected or "?") for p in probes]
        pairs = [lm.render(p.query, p.system, reply) for p in probes for reply in p.prefer or ()]
        once = list(dict.fromkeys(dialogues + pairs))  # a reference is often one of the two replies
        asked.append((dialogues, pairs, once))
    answers = lm.answer_each([(dialogues, once) for dialogues, _, once in asked])
    out = []
    for probes, (dialogues, pairs, once), (replies, rated) in zip(parts, asked, answers, strict=True):
        known = dict(zip(once, rated, strict=True))
        out.append(_rows(probes, replies, [known[d] for d in dialogues], [known[d] for d in pairs]))
    return out


def _rows(
    probes: Sequence[Probe], replies: Sequence[Reply], scores: Sequence[Score], rivals: Sequence[Score]
) -> list[Row]:
    """`scores` are of the references, `rivals` of the pairs of replies that probes prefer between."""
    compared = iter([sum(score.nll) / len(score.nll) for score in rivals])
    rows = []
    for i, (probe, score) in enumerate(zip(probes, scores, strict=True)):
        reply = Reply(probe.expected, True) if probe.expected and score.exact else replies[i]
        rows.append(
            {
                "kind": probe.kind,
                "system": probe.system,
                "query": probe.query,
                "expected": probe.expected,
                "reply": reply.text,
                "stopped": reply.stopped,
                "generated": (reply.stopped or probe.own) and probe.passes(reply.text),
                "exact": bool(probe.expected) and score.exact,
                "forced": sum(score.hit) / len(score.hit) if probe.expected else math.nan,
                "nll": sum(score.nll) / len(score.nll) if probe.expected else math.nan,
                "preferred": next(compared) < next(compared) if probe.prefer else None,
                "gold": any(stands_in(a, reply.text) for a in probe.accept) if probe.own and probe.accept else None,
            }
        )
    return rows


def leaked(probe: Probe, reply: str, answers: Collection[str]) -> bool:
    """Whether an unknown subject gets one of the taught `answers` that was not said of it before."""
    said = (known for known in answers if stands_in(known, reply))
    return probe.kind == "unknown" and any(not stands_in(known, probe.expected) for known in said)
