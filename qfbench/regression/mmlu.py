"""MMLU (Hendrycks et al. 2021) as lm-eval asks it, from the hub or from a local folder."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qfbench.errors import UserError
from qfbench.facts.base import flaw
from qfbench.regression.harness import Questions, load
from qfbench.regression.live import quiet

LETTERS = ("A", "B", "C", "D")
FORMS = {
    "letter": ("default", ""),
    "continuation": ("continuation", "_continuation"),
}  # lm-eval's folder, ending of names


def mmlu(
    path: str | None = None,
    form: str = "letter",
    shots: int = 5,
    subjects: str | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Questions:
    """The 57 subjects, by lm-eval's own prompts; `correct` is its `acc`.

    Args:
        path: a folder in the original layout: `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, without a header, a question, four
            choices and a letter in each row. None takes `cais/mmlu` of the hub.
        form: `letter` (the official one) or `continuation` (the likeliest of the four choices themselves).
        shots: how many of a subject's five dev questions to show.
        subjects: which to ask; None asks all.
        limit: how many questions of each subject to ask, drawn by `seed`; None asks all.
        chat: put the prompts into dialogues by the model's chat template, each example a turn, and rate the letter as its reply.
            The published figures are without.

    Raises:
        UserError: a file is missing, or a row of it is not a question; no such form or subject.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if form not in FORMS:
        raise UserError(f"regression.mmlu.form={form}: must be one of {', '.join(FORMS)}")
    if not 0 <= shots <= 5:
        raise UserError(f"regression.mmlu.shots={shots}: must be 0 to 5, which is how many dev questions there are")
    folder, ending = FORMS[form]
    manager = TaskManager(
        include_path=Path(lm_eval.__file__).parent / "tasks" / "mmlu" / folder, include_defaults=False
    )
    known = {name.removeprefix("mmlu_").removesuffix(ending): name for name in manager.all_subtasks}
    wanted = sorted(known) if subjects is None else [subjects] if isinstance(subjects, str) else list(subjects)
    for subject in wanted:
        if subject not in known:
            raise UserError(
                f"regression.mmlu.subjects={subject}: no subject of MMLU; they are {', '.join(sorted(known))}"
            )
    with quiet():
        spec: list[Any] = [known[subject] for subject in wanted]
        if path is not None:
            data = [{"task": known[subject], "custom_dataset": _reader(path, subject, shots)} for subject in wanted]
            spec = [{"group": "local", "task": data}]
        loaded = load(manager, spec, shots, "" if path else "; give regression.mmlu.path=FOLDER to take local files")
    for subject in wanted:
        loaded["tasks"][known[subject]].set_config("task_alias", subject)  # those of the continuation form have none
    groups = {name: _group(manager.task_index[name].tags) for name in loaded["tasks"]}
    return Questions(loaded["tasks"], groups, limit, seed, chat)


def _group(tags: set[str]) -> str:
    """`social_sciences`, of the tag `mmlu_social_sciences_tasks` (or `..._continuation`)."""
    return min(tags).removeprefix("mmlu_").removesuffix("_tasks").removesuffix("_continuation")


def _reader(path: str, subject: str, shots: int) -> Callable[..., Any]:
    folder = Path(path).expanduser()

    def read(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        dev, test = (_questions(folder / split / f"{subject}_{split}.csv") for split in ("dev", "test"))
        if len(dev["answer"]) < shots:
            raise UserError(f"{folder}/dev/{subject}_dev.csv: {len(dev['answer'])} questions; shots={shots} needs more")
        return {"dev": Dataset.from_dict(dev), "test": Dataset.from_dict(test)}

    return read


def _questions(path: Path) -> dict[str, list[Any]]:
    """The columns of one file. Nothing in it is taken for a missing value: a choice may be "NA"."""
    columns: dict[str, list[Any]] = {"question": [], "choices": [], "answer": []}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if len(row) != 6:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} fields; a question, four choices and a letter are needed"
                    )
                for name, text in zip(("question", *LETTERS), row, strict=False):
                    what = flaw(text)
                    if what:
                        raise UserError(f"{path}, line {reader.line_num}: the field {name!r} {what}")
                if row[5] not in LETTERS:
                    raise UserError(
                        f"{path}, line {reader.line_num}: the answer is {row[5]!r}; it must be one of A, B, C, D"
                    )
                columns["question"].append(row[0])
                columns["choices"].append(row[1:5])
                columns["answer"].append(LETTERS.index(row[5]))
    except FileNotFoundError:
        present = sorted(p.name.removesuffix("_test.csv") for p in path.parent.parent.glob("test/*_test.csv"))
        there = (
            f"; give regression.mmlu.subjects=[{','.join(present)}], for which there are test questions"
            if present
            else ""
        )
        raise UserError(f"{path}: there is no such file{there}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not columns["answer"]:
        raise UserError(f"{path}: holds no question")
    return columns
