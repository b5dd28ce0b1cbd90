"""The company facts of QFt: each dialogue that is answered from its system text is a fact (the others train a conversion)."""

from __future__ import annotations

from qfbench.facts.base import Fact
from qfbench.facts.records import Record, load
from qfbench.world.relations import REFUSAL


def company(path: str, n: int | None = None, seed: int | None = None, on_error: str = "stop") -> list[Fact]:
    """One fact for each distinct dialogue `{"messages": [system, user, assistant]}` whose reply its system text gives.

    Dialogues without a system text, and those refused ("Need more information."), teach nothing. A right reply holds the
    whole answer, since the file does not say which words of it matter.

    Raises:
        UserError: naming file, record and field.
    """
    seen: set[tuple[str, ...]] = set()

    def make(record: Record) -> list[Fact]:
        said = {m.text("role"): m.text("content", empty=True) for m in record.records("messages")}
        for role in ("system", "user", "assistant"):
            if role not in said:
                raise record.error("messages", f"has no message of the role {role!r}")
        told, asked, reply = said["system"], said["user"], said["assistant"]
        key = (told, asked, reply)
        if not told or reply == REFUSAL or key in seen:
            return []
        seen.add(key)
        return [Fact(told, asked, reply)]

    return load(path, make, n, seed, on_error)
