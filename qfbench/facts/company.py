"""The company facts of QFt: each dialogue that is answered from its system text is a fact (the others train a conversion)."""

from __future__ import annotations

from qfbench.facts.base import Fact
from qfbench.facts.collection import collect
from qfbench.facts.records import Record
from qfbench.world.relations import REFUSAL


def company(
    path: str, n: int | None = None, seed: int | None = None, on_error: str = "stop", on_conflict: str = "stop"
) -> list[Fact]:
    """One fact for each dialogue `{"messages": [system, user, assistant]}` whose reply its system text gives.

    Dialogues without a system text, and those refused ("Need more information."), teach nothing. The
    released files have most dialogues twice: `on_error=skip` takes each once. A right reply holds the
    whole answer, since the file does not say which words of it matter.

    Raises:
        UserError: naming file, record and field.
    """

    def make(record: Record) -> list[Fact]:
        messages = record.records("messages")
        roles = [message.text("role") for message in messages]
        for role in ("system", "user", "assistant"):
            n = roles.count(role)
            if n != 1:
                raise record.error(
                    "messages", f"has {n or 'no'} message{'s' * (n > 1)} of the role {role!r}; needs one"
                )
        said = {role: m.text("content", empty=role == "system") for m, role in zip(messages, roles, strict=True)}
        told, asked, reply = said["system"], said["user"], said["assistant"]
        return [] if not told or reply == REFUSAL else [Fact(told, asked, reply)]

    return collect(path, make, n, seed, on_error, on_conflict)
