"""Questions through lm-eval: its tasks, which of their questions are asked, and a row for each."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qfbench.digest import hashed
from qfbench.errors import UserError
from qfbench.facts.probes import Row
from qfbench.models.lm import LanguageModel
from qfbench.regression.live import live, quiet

FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class Questions:
    """Tasks of lm-eval, loaded once, and which of their questions are asked.

    One row a question: `kind` "question", `asked` ("chat": by the model's chat template, or "plain"), `subject` (a task's name,
    without what its group is called), `group`, `fact_id` (task and place in the data), `query`, `expected`, `reply`, `correct`
    (1, 0, or what the task's metric gives) and, but for generated replies, `gold_logprob` (nats, of the right answer); of
    multiple choice `logprobs` (of each) and `chance`.

    Args:
        tasks: lm-eval's tasks by name.
        groups: the group of each task, where it has one.
        limit: how many questions of each task to ask: drawn once by `seed`, the same whatever else is asked. None asks all.
        chat: whether to ask as in a dialogue, by the chat template of a model that has one.
        metric: what `correct` is; None takes the task's own `acc`, or its first that a single question has.

    Raises:
        UserError: there is no task, one rates whole texts, or `limit` is below 1.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, str]
    limit: int | None = None
    seed: int = 0
    chat: bool = False
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} (regression): must be 1 or more, or null")
        if not self.tasks:
            raise UserError("the list of tasks or subjects (regression) is empty; name one, or leave it out")
        for name, task in self.tasks.items():
            if task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise UserError(f"{name} rates whole texts and asks no questions; use regression=perplexity")

    @cached_property
    def samples(self) -> dict[str, list[int]]:
        """Of the tasks that are not asked whole, the questions' places. Sorted: lm-eval asks in the order of the data, and
        would number those of an unsorted list wrongly."""
        sizes = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return {
            name: sorted(random.Random(f"{self.seed}-{name}").sample(range(size), self.limit))
            for name, size in sizes.items()
            if self.limit is not None and self.limit < size
        }

    @cached_property
    def fingerprint(self) -> str:
        parts = [json.dumps([self.chat, self.metric])]
        for name, task in sorted(self.tasks.items()):
            config = {
                key: value for key, value in task.dump_config().items() if key not in ("metadata", "custom_dataset")
            }
            shots = task.fewshot_docs() if task.config.num_fewshot else []
            docs = task.eval_docs
            asked = [docs[i] for i in self.samples.get(name, range(len(docs)))]
            text = json.dumps([name, config, list(shots or []), asked], sort_keys=True, default=str)
            parts.append(re.sub(r" at 0x[0-9a-f]+", "", text))  # where a function lies differs between processes
        return hashed(*parts)

    def __call__(self, lm: LanguageModel) -> list[Row]:
        """Ask them all; lm-eval's cache of answers is never used, since it does not know that weights change.

        Raises:
            FloatingPointError: a log-probability is not a number.
            UserError: the model cannot be asked in this way, or a task has no metric of single questions.
        """
        from lm_eval.evaluator import evaluate

        for task in self.tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # or each evaluation would draw other examples
        chat = self.chat and lm.tokenizer.chat_template is not None
        with quiet():
            results = evaluate(
                live(lm, chat),
                {"tasks": dict(self.tasks), "groups": {}, "group_map": {}},
                samples=self.samples,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
            )
        asked = {"asked": "chat" if chat else "plain"}
        rows = (row for name, task in self.tasks.items() for row in self._rows(name, task, results["samples"][name]))
        return [row | asked for row in rows]

    def _rows(self, name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        subject = task.config.task_alias or name
        for sample in samples:
            if sample["filter"] != samples[0]["filter"]:
                continue  # the same replies, read in another way
            doc = sample["doc"]
            row = {"kind": "question", "subject": subject, "group": self.groups.get(name, "")}
            row |= {"fact_id": f"{name}/{sample['doc_id']}", "fact_kind": "", "correct": self._correct(name, sample)}
            if task.OUTPUT_TYPE == "generate_until":
                row |= {"query": str(task.doc_to_text(doc)), "expected": str(sample["target"])}
                yield row | {"reply": str(sample["filtered_resps"][0])}
                continue
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else [str(sample["target"])]
            logprobs = [float(logprob) for logprob, _ in sample["filtered_resps"][: len(choices)]]
            if not all(map(math.isfinite, logprobs)):
                raise FloatingPointError(f"{name}: the model gives log-probabilities that are not finite")
            if task.OUTPUT_TYPE == "loglikelihood":  # right if greedy decoding gives the target
                row |= {"query": str(task.doc_to_text(doc)), "expected": choices[0], "reply": ""}
                yield row | {"gold_logprob": logprobs[0]}
                continue
            gold, query = sample["target"], task.doc_to_text(doc)
            if task.multiple_input:  # the question is one of the choices, put into the context
                gold, query = query, sample["arguments"][0][0]
            gold = choices.index(gold) if gold in choices else gold
            row |= {"query": query, "reply": choices[logprobs.index(max(logprobs))], "logprobs": logprobs}
            if isinstance(gold, int) and 0 <= gold < len(choices):  # a task may have several right choices, or none
                row |= {"expected": choices[gold], "gold_logprob": logprobs[gold]}
            yield row | {"chance": 1 / len(choices)}

    def _correct(self, name: str, sample: Mapping[str, Any]) -> float:
        numbers = (bool, int, float, np.number, np.bool_)  # other metrics are worked out of all questions together
        single = [metric for metric in sample["metrics"] if isinstance(sample[metric], numbers)]
        if not single or self.metric not in (None, *single):
            raise UserError(
                f"{name}: metric={self.metric}; of single questions there are {', '.join(single) or 'none'}"
            )
        return float(sample[self.metric or ("acc" if "acc" in single else single[0])])


def tasks(
    tasks: str | Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    metric: str | None = None,
    include: str | None = None,
) -> Questions:
    """Any tasks or groups of lm-eval, by name, or of the YAML files in the folder `include`.

    `shots` is how many examples to show; None as the task has it.

    Raises:
        UserError: there is no such task or folder, or its data cannot be loaded, or hold too few examples.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).expanduser().is_dir():
        raise UserError(f"regression.lm_eval.include={include}: no such folder")
    if shots is not None and shots < 0:
        raise UserError(f"regression.lm_eval.shots={shots}: must be 0 or more, or null")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    own = None if include is None else Path(include).expanduser()
    with quiet():
        manager = TaskManager(include_path=own, include_defaults=False)
        if not {*names} <= {*manager.all_tasks}:
            manager = TaskManager(include_path=own)  # which takes 10 seconds
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"regression.lm_eval.tasks={unknown[0]}: lm-eval has no such task; `lm-eval ls tasks` lists them, and "
                "regression.lm_eval.include=FOLDER adds those of YAML files"
            )
        loaded = load(manager, names, shots)
    groups = {child: group for group, children in loaded["group_map"].items() for child in children}
    return Questions(loaded["tasks"], groups, limit, seed, chat, metric)


def load(manager: Any, spec: Sequence[Any], shots: int | None, remedy: str = "") -> dict[str, Any]:
    """What `TaskManager.load` gives, with `shots` examples unless a task says that it takes none.

    Raises:
        UserError: data cannot be loaded, or hold too few examples.
    """
    try:
        loaded: dict[str, Any] = manager.load(spec)
    except UserError:
        raise
    except Exception as error:  # of the hub, of files, of the tasks' own code
        what = str(error).strip().split("\n")[0]
        raise UserError(f"the tasks or data of {_named(spec)} cannot be loaded: {what}{remedy}") from error
    for name, task in loaded["tasks"].items():
        own = task.config.num_fewshot
        if own != 0:
            task.set_config("num_fewshot", shots if shots is not None else own or 0)
        wanted = task.config.num_fewshot
        there = len(task.fewshot_docs() or []) if wanted else 0
        if there < wanted:
            raise UserError(f"{name}: shots={wanted}, but its data hold only {there} examples")
    return loaded


def _named(spec: Sequence[Any]) -> str:
    names = [name if isinstance(name, str) else "local files" for name in spec]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
