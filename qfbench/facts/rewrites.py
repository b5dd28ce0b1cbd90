"""Rewrites, which put a new answer in the place of an old one: the templates they fill, and ROME's schema of them."""

from __future__ import annotations

from string import Formatter

from qfbench.errors import UserError
from qfbench.facts.matching import key
from qfbench.facts.records import Record


def check_templates(*fields: str, needs: str, **templates: str) -> None:
    """Refuse a template with a placeholder other than `fields`, or without one of those in `needs` ("question or cloze").

    Raises:
        UserError: naming the setting, and what it may hold.
    """
    for name, template in templates.items():
        try:
            held = {field for _, field, _, _ in Formatter().parse(template)}
            template.format(**dict.fromkeys(fields, ""))
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            allowed = ", ".join(f"{{{field}}}" for field in fields)
            raise UserError(f"facts.{name}={template!r}: not a template that holds no other than {allowed}") from error
        if not held & set(needs.split(" or ")):
            raise UserError(f"facts.{name}={template!r}: must hold {{{needs.replace(' or ', '} or {')}}}")


def filled(template: str, **fields: str) -> str:
    """A template with its fields. The stop of an `object` that ends with one ("Apple Inc.") is not doubled by the template's."""
    if "{object}." in template:
        fields["object"] = fields["object"].removesuffix(".")
    return template.format(**fields)


def with_subject(rewrite: Record) -> str:
    """The cloze of a rewrite in ROME's schema, its subject in place."""
    prompt = rewrite.text("prompt", breaks="join")
    if "{}" not in prompt:
        raise rewrite.error("prompt", "has no {} where the subject stands")
    return prompt.replace("{}", rewrite.text("subject", breaks="join"))


def objects(rewrite: Record) -> tuple[str, str]:
    """The new object of a rewrite in ROME's schema and the old one, which differ."""
    new, old = (rewrite.record(f"target_{which}").text("str") for which in ("new", "true"))
    if key(new) == key(old):
        raise rewrite.error("target_new.str", f"is {new!r}, which target_true says too: nothing is rewritten")
    return new, old
