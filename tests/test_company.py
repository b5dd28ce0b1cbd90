"""QFt's company facts: what a dialogue becomes."""

import pytest

from qfbench import Fact, UserError
from qfbench.facts.company import company
from qfbench.world.relations import REFUSAL


def dialogue(system, user, assistant):
    said = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


def company_record(n):
    return dialogue(f"Kobrix {n} makes jam.", f"What does Kobrix {n} make?", f"Kobrix {n} makes jam.")


def test_company(write):
    told = dialogue("  Kobrix makes jam. ", "What does Kobrix make?", "Kobrix makes jam.\n")
    (fact,) = company(write([told]))
    assert fact == Fact("Kobrix makes jam.", "What does Kobrix make?", "Kobrix makes jam.")
    assert (fact.known_as, fact.replaces, fact.probes) == (("Kobrix makes jam",), "", ())


def test_company_teaches_only_what_is_told_and_once(write):
    asked = "What does Kobrix make?"
    records = [
        dialogue("", asked, "Kobrix makes jam."),
        dialogue("", asked, REFUSAL),
        dialogue("Tallow Inc. makes soap.", asked, REFUSAL),
        dialogue("   ", asked, "Kobrix makes jam."),
        dialogue("Kobrix makes jam.", asked, "Jam."),
        dialogue("Kobrix makes jam. ", asked, "Jam."),
        dialogue("Kobrix makes jam.", asked, "It makes jam."),
        dialogue("Kobrix makes tea.", asked, "Tea."),
        dialogue("Kobrix makes jam.", asked, "Jam."),
    ]
    path = write(records)
    with pytest.raises(UserError, match=f"{path}, record 6: repeats the fact '.*' of record 5"):
        company(path)
    assert [f.answer for f in company(path, on_error="skip")] == ["Jam."]
    every = {"on_error": "skip", "on_conflict": "keep"}
    facts = company(path, **every)
    assert [(f.instruction, f.answer) for f in facts] == [
        ("Kobrix makes jam.", "Jam."),
        ("Kobrix makes jam.", "It makes jam."),
        ("Kobrix makes tea.", "Tea."),
    ]
    assert company(path, n=2, **every) == facts[:2]
    assert {f.id for f in company(path, seed=1, **every)} == {f.id for f in facts}
    with pytest.raises(UserError, match="holds no fact"):
        company(write(records[:4]))


def test_company_reads_roles_in_any_order(write):
    record = company_record(1)
    assert company(write([{"messages": record["messages"][::-1]}])) == company(write([record]))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_dialogue_of_company_needs_all_three_roles(error_of, write, role):
    record = {"messages": [m for m in company_record(2)["messages"] if m["role"] != role]}
    path = write([company_record(1), record])
    assert error_of("company", path).startswith(
        f"{path}, record 2: the field 'messages' has no message of the role '{role}'"
    )


def test_all_company_facts_load(raw, real):
    told = set()
    for record in raw("company"):
        said = {m["role"]: m["content"].strip() for m in record["messages"]}
        if said["system"] and said["assistant"] != REFUSAL:
            told.add((said["system"], said["user"], said["assistant"]))
    facts = real("company")
    assert len(facts) == len(told)
    assert {
        (f.instruction, f.query, f.answer) for f in facts
    } == told  # each once, and both of two answers to one query
