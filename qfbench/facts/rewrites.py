"""Rewrites, which put a new answer in the place of an old one: the templates they fill, and ROME's schema of them."""

from __future__ import annotations

import re
from string import Formatter

from qfbench.errors import UserError
from qfbench.facts.matching import STOPS, key
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


def filled(template: str, object: str, **fields: str) -> str:
    """A template as a text. After an object that ends with a stop of its own ("Apple Inc."), the template's full stop goes."""
    if object[-1:] in STOPS:
        template = re.sub(r"(?<=\{object\})\.(?!\.)", "", template)
    return template.format(object=object, **fields)


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
