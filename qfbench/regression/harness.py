"""Questions through lm-eval, asked of the model as it stands in memory."""

from __future__ import annotations

import io
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qfbench.errors import UserError
from qfbench.lm import LanguageModel
from qfbench.probes import Row
from qfbench.provenance import hashed

FEWSHOT_SEED = 1234  # lm-eval's own default
LOGITS = 2**31  # bytes that the logits of one batch may take, in float32


@dataclass(frozen=True)
class Questions:
    """Tasks of lm-eval, loaded once, and which of their questions are asked.

    One row a question: `kind` "question", `subject` (a task's name, without what its group is called), `group`,
    `fact_id` (subject and place in the data), `query`, `expected`, `reply`, `correct` (1, 0, or what the task's metric gives) and,
    of multiple choice, `logprobs` (nats, of each choice), `gold_logprob` and `chance` (1 / choices).

    Args:
        tasks: lm-eval's tasks by name.
        groups: the group of each task, where it has one.
        limit: how many questions of each task to ask: drawn once by `seed`, the same whatever else is asked. None asks all.
        chat: whether to ask as in a dialogue, by the chat template of a model that has one.
        metric: what `correct` is; None takes the task's own `acc`, or its first.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, str]
    limit: int | None = None
    seed: int = 0
    chat: bool = False
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit}: must be 1 or more, or null")

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
            asked = [task.eval_docs[i] for i in self.samples.get(name, range(len(task.eval_docs)))]
            parts.append(json.dumps([name, config, list(shots or []), asked], sort_keys=True, default=str))
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
                live(lm),
                {"tasks": dict(self.tasks), "groups": {}, "group_map": {}},
                samples=self.samples,
                bootstrap_iters=0,
                apply_chat_template=chat,
            )
        return [row for name, task in self.tasks.items() for row in self._rows(name, task, results["samples"][name])]

    def _rows(self, name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        subject = task.config.task_alias or name
        for sample in samples:
            if sample["filter"] != samples[0]["filter"]:
                continue  # the same replies, read in another way
            doc = sample["doc"]
            row = {"kind": "question", "subject": subject, "group": self.groups.get(name, "")}
            row |= {"fact_id": f"{subject}/{sample['doc_id']}", "fact_kind": "", "correct": self._correct(name, sample)}
            if task.OUTPUT_TYPE != "multiple_choice":
                reply = sample["filtered_resps"][0]
                row |= {"query": str(task.doc_to_text(doc)), "expected": str(sample["target"])}
                yield row | {"reply": reply if isinstance(reply, str) else ""}
                continue
            choices = task.doc_to_choice(doc)
            logprobs = [float(logprob) for logprob, _ in sample["filtered_resps"][: len(choices)]]
            if not all(map(math.isfinite, logprobs)):
                raise FloatingPointError(f"{name}: the model gives log-probabilities that are not finite")
            gold, query = sample["target"], task.doc_to_text(doc)
            if task.multiple_input:  # the question is one of the choices, put into the context
                gold, query = query, sample["arguments"][0][0]
            gold = choices.index(gold) if isinstance(gold, str) else gold
            row |= {"query": query, "reply": choices[logprobs.index(max(logprobs))], "logprobs": logprobs}
            if isinstance(gold, int):  # a task may have several right choices
                row |= {"expected": choices[gold], "gold_logprob": logprobs[gold]}
            yield row | {"chance": 1 / len(choices)}

    def _correct(self, name: str, sample: Mapping[str, Any]) -> float:
        metrics = sample["metrics"]
        metric = self.metric or ("acc" if "acc" in metrics else metrics[0])
        value = sample.get(metric)
        if metric not in metrics or not isinstance(value, (bool, int, float)):
            raise UserError(
                f"{name}: {metric} is no measure of single questions; give metric=, one of {', '.join(metrics)}"
            )
        return float(value)


def tasks(
    tasks: str | Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    metric: str | None = None,
) -> Questions:
    """Any tasks or groups of lm-eval, by name. `shots` is how many examples to show; None as the task has it.

    Raises:
        UserError: there is no such task, or its data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager()
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(f"regression tasks={unknown[0]}: lm-eval has no such task; `lm-eval ls tasks` lists them")
        loaded = load(manager, names, shots)
    groups = {child: group for group, children in loaded["group_map"].items() for child in children}
    return Questions(loaded["tasks"], groups, limit, seed, chat, metric)


def load(manager: Any, spec: Any, shots: int | None) -> dict[str, Any]:
    """What `TaskManager.load` gives, with `shots` examples where a task does not have its own number.

    Raises:
        UserError: data cannot be loaded.
    """
    try:
        loaded: dict[str, Any] = manager.load(spec)
    except UserError:
        raise
    except Exception as error:  # of the hub, of files, of the tasks' own code
        what = str(error).strip().split("\n")[0]
        raise UserError(f"the data of {_named(spec)} cannot be loaded: {what}") from error
    for task in loaded["tasks"].values():
        own = task.config.num_fewshot
        if own != 0:
            task.set_config("num_fewshot", shots if shots is not None else own or 0)
    return loaded


def _named(spec: Any) -> str:
    return ", ".join(spec) if isinstance(spec, list) and all(isinstance(name, str) for name in spec) else "the tasks"


def live(lm: LanguageModel) -> Any:
    """The model in memory as lm-eval asks it, but for what costs much and changes no number."""
    from copy import deepcopy

    from lm_eval.models.huggingface import HFLM

    class Live(HFLM):
        tail = 0  # the tokens of the longest answer

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> Any:
            self.tail = max(len(answer) for _, _, answer in requests)
            lengths = sorted((len(before) + len(answer) for _, before, answer in requests), reverse=True)
            self.batch_size_per_gpu = fitting(lengths, self.tail, len(lm.tokenizer), lm.batch_size)
            return super()._loglikelihood_tokens(requests, **options)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            # Logits of all positions of a long prompt over a large vocabulary would cost more than the model itself. lm-eval
            # counts positions from the end of what is returned. It pads with 0 at the right.
            real = inps.shape[1] - (inps.flip(1) != 0).int().argmax(1).max().item()
            first = max(0, int(real) - self.tail)
            with torch.no_grad():
                logits: Tensor = self.model(inps, logits_to_keep=inps.shape[1] - first).logits
            return logits

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            # lm-eval scores the white space that a prompt ends with as part of the answer: in a dialogue that is the template's own
            # line break, which no model was taught to expect.
            whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
            if whole[: len(before)] == before:
                return before, whole[len(before) :]
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair

    tokenizer = deepcopy(lm.tokenizer)  # it is given a padding token
    with quiet():
        return Live(pretrained=lm.model, tokenizer=tokenizer, backend="causal", batch_size=lm.batch_size)


def fitting(lengths: Sequence[int], tail: int, vocabulary: int, most: int) -> int:
    """How many requests of these `lengths` (in tokens, longest first) fit in one batch, if logits from the shortest one's answer on
    are to stay within `LOGITS`."""
    batch = most
    while batch > 1:
        spread = max(
            (a - b for a, b in zip(lengths, lengths[batch - 1 :], strict=False)), default=lengths[0] - lengths[-1]
        )
        if 4 * vocabulary * min(batch, len(lengths)) * (spread + tail) <= LOGITS:
            break
        batch //= 2
    return max(1, batch)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of lm-eval."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
