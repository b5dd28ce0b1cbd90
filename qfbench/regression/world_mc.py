"""Multiple choice about the built-in world, in the two forms of MMLU."""

from __future__ import annotations

import random
from typing import Any

from qfbench.errors import UserError
from qfbench.regression.harness import Questions
from qfbench.regression.live import quiet
from qfbench.world import corpus
from qfbench.world.relations import RELATIONS
from qfbench.world.world import World

FORMS = {"continuation": corpus.choice, "letter": corpus.letter}


def world_mc(form: str = "continuation", limit: int = 50, seed: int = 0) -> Questions:
    """Four choices about what the built-in models know; each relation is a subject, each kind of knowledge a group.

    In the `continuation` form the likeliest of four whole replies counts; in the `letter` form, which these models do not learn,
    the likeliest of four letters. Up to `limit` facts of each relation are asked about, drawn by `seed`.

    Raises:
        UserError: there is no such form.
    """
    if form not in FORMS:
        raise UserError(f"regression.world_mc.form={form}: must be one of {', '.join(FORMS)}")
    if limit < 1:
        raise UserError(f"regression.world_mc.limit={limit}: must be 1 or more")
    with quiet():
        tasks = {f"world_mc_{name}": _task(name, form, limit, seed) for name in RELATIONS}
    return Questions(tasks, {f"world_mc_{name}": relation.kind for name, relation in RELATIONS.items()}, chat=True)


def _task(relation: str, form: str, limit: int, seed: int) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    world, rng = World(), random.Random(f"world-mc-{seed}-{relation}")
    facts = world.by_relation[relation]
    asked = [FORMS[form](world, rng, fact=fact) for fact in rng.sample(facts, min(limit, len(facts)))]
    columns = {
        "question": [dialogue.query for dialogue in asked],
        "choices": [list(dialogue.choices) for dialogue in asked],
        "answer": [dialogue.choices.index(dialogue.answer) for dialogue in asked],
    }
    config = {
        "task": f"world_mc_{relation}",
        "task_alias": relation,
        "custom_dataset": lambda **_: {"test": Dataset.from_dict(columns)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config=config)
