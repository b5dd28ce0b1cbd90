"""An edited model as an ordinary Hugging Face folder, with a card that says what it was taught."""

from __future__ import annotations

from pathlib import Path

from qfbench.editors.edits import Edits
from qfbench.errors import UserError
from qfbench.models.lm import LanguageModel
from qfbench.models.loading import tokenizer_of


def merge(edits: Edits, lm: LanguageModel, folder: Path, command: str) -> None:
    """Write the model with the edits, its tokenizer as it came, and a card, into a new folder.

    Raises:
        UserError: `lm` is another model, or the folder holds something, or cannot be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; give a new folder")
    tokenizer = tokenizer_of(lm.name)
    try:
        with edits.applied_to(lm):
            lm.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card(edits, lm, command), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error})") from error


def card(edits: Edits, lm: LanguageModel, command: str) -> str:
    """The model card, in Markdown."""
    rows = [f"| {n} | {cell(fact.query)} | {cell(fact.answer)} |" for n, fact in enumerate(edits.facts, 1)]
    fires = getattr(lm.model.config, "firing_layers", None)
    note = "\nIt has firing blocks: `import qfbench.models.firing` before transformers loads it.\n" if fires else ""
    return f"""---
library_name: transformers
tags: [knowledge-editing, qfbench]
---
# {Path(edits.source.name).name} with {len(edits.facts)} taught facts

Facts were written into the weights of `{edits.source.name}` by qfbench, one after another:
`{len(edits.total.changes)}` of its matrices changed, all else is as it was. The licence is that of the model it was made from.
{note}
| what | value |
|---|---|
| weights before | `{edits.source.weights}` ({edits.source.dtype}) |
| editor | `{cell(repr(edits.editor))}` |
| command | `{cell(command)}` |
| system text it was taught and asked with | {cell(lm.preamble) or "(none)"} |

| | query | answer |
|---|---|---|
{chr(10).join(rows)}
"""


def cell(text: str) -> str:
    """A text in a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")
