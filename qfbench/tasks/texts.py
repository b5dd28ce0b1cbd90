"""What a conversion trains on: a function from a step's number to its texts, so that a resumed run sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from qfbench.errors import UserError
from qfbench.facts import everyday as suite
from qfbench.facts.records import Record, existing, json_lines, warn_of_stripped
from qfbench.regression.perplexity import ENGLISH
from qfbench.world import corpus
from qfbench.world.corpus import Dialogue
from qfbench.world.world import World

Texts = Callable[[int], Sequence[Dialogue | str]]  # a str is plain text, outside any dialogue


def world(batch: int, seed: int = 0) -> Texts:
    """The built-in world's own training text, in the mixture of the last cycle of its models' training."""
    if batch < 1:
        raise UserError(f"batch={batch}: must be 1 or more")
    facts, mixture = World(), corpus.LATER_MIXTURE

    def texts(step: int) -> list[Dialogue | str]:
        rng = random.Random(f"convert-{seed}-{step}")
        drawn = rng.choices(list(mixture), weights=list(mixture.values()), k=batch)
        return [corpus.plain(facts, rng) if a == "plain" else corpus.ABILITIES[a](facts, rng) for a in drawn]

    return texts


def everyday(batch: int, seed: int = 0, part: str = "tune") -> Texts:
    """Plain English, in turn: a fact of `facts=everyday` that is told, a question of common knowledge, a plain sentence.

    Facts come in all wordings. `part` as in `facts=everyday`: the other part can be asked of the model afterwards.
    """
    if batch < 1:
        raise UserError(f"batch={batch}: must be 1 or more")
    told, known = [], []
    for fact in suite.everyday(126, part=part, unknown=0, locality=0):  # all of either part
        told.append(Dialogue(fact.instruction, fact.query, fact.answer))
        told += [Dialogue(fact.instruction, p.query, p.expected) for p in fact.probes if p.kind == "paraphrase"]
        known += [Dialogue("", p.query, p.expected) for p in fact.probes if p.kind == "prior"]
    kinds: list[Sequence[Dialogue | str]] = [told, known, ENGLISH.read_text(encoding="utf-8").splitlines()]

    def texts(step: int) -> list[Dialogue | str]:
        rng = random.Random(f"keep-{seed}-{step}")
        return [rng.choice(kinds[place % len(kinds)]) for place in range(step * batch, (step + 1) * batch)]

    return texts


def messages(path: str, batch: int, seed: int = 0) -> Texts:
    """Dialogues of a JSONL file, one object a line: `{"messages": [system, user, assistant]}`, as QFt's company facts.

    Each message is `{"role": ..., "content": ...}`; the system message may be empty or left out. Every pass over the file
    is in another order.

    Raises:
        UserError: the file cannot be read, is empty, or a line is no such dialogue (line and field are named).
    """
    if batch < 1:
        raise UserError(f"batch={batch}: must be 1 or more")
    file = existing(path, "give a .jsonl file of dialogues", "data.path")
    records = json_lines(path, file, "line", "data.path")
    dialogues = [_dialogue(record) for record in records]
    warn_of_stripped(path, records)
    if not dialogues:
        raise UserError(f"data.path={path}: holds no dialogue")

    def texts(step: int) -> list[Dialogue]:
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, at = divmod(place, len(dialogues))
            chosen.append(dialogues[order(epoch)[at]])
        return chosen

    orders: dict[int, list[int]] = {}

    def order(epoch: int) -> list[int]:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = random.Random(f"convert-{seed}-{epoch}").sample(range(len(dialogues)), len(dialogues))
        return orders[epoch]

    return texts


def _dialogue(record: Record | UserError) -> Dialogue:
    if isinstance(record, UserError):
        raise record
    record.check()
    messages = record.records("messages")
    roles = [message.text("role") for message in messages]
    if roles not in (["system", "user", "assistant"], ["user", "assistant"]):
        raise record.error(
            "messages", f"is no dialogue: the roles are {roles}; needs system (or none), user, assistant, in this order"
        )
    said = {
        role: message.text("content", empty=role == "system", breaks="keep")
        for message, role in zip(messages, roles, strict=True)
    }
    return Dialogue(said.get("system", ""), said["user"], said["assistant"])
