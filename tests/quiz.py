"""Small MMLU data in both of its forms, a folder of the original layout and the hub's data set; lm-eval as it is asked plainly."""

import copy
import csv
import random
from pathlib import Path

import lm_eval
from datasets import Dataset, DatasetDict
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qfbench.regression.live import quiet

WORDS = "river stone seven under glass winter of copper the maps, seldom 40 Łódź orbit".split()
TRICKY = [
    ('What is "it", in short?', ["one, two", 'the "other"', "NA", "three"], 2),
    ("First line,\nsecond line.", ["None", "null", "nan", "N/A"], 3),
    ("  !!!! ", ["!", "! !", "!!!", "A much longer answer than those before it was"], 0),
]
TEMPLATES = Path(lm_eval.__file__).parent / "tasks" / "mmlu"


def questions(subject, split):
    """Rows of one file: five for `dev`, one to four for `test`, the first subject's own the tricky ones."""
    rng = random.Random(f"{subject} {split}")

    def text(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    many = 5 if split == "dev" else rng.randint(1, 4)
    rows = [(f"{text(12)}?", [text(n) for n in (1, 2, 4, 6)], rng.randrange(4)) for _ in range(many)]
    return [*TRICKY, *rows][: max(many, 3)] if subject == "anatomy" else rows


def subjects():
    return sorted(path.stem.removeprefix("mmlu_") for path in (TEMPLATES / "default").glob("mmlu_*.yaml"))


def layout(folder, names=None):
    """The folder, with `dev/*_dev.csv` and `test/*_test.csv` of the subjects."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for name in names or subjects():
            with (folder / split / f"{name}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([q, *choices, "ABCD"[a]] for q, choices, a in questions(name, split))
    return folder


def hub(path, name, **_):
    """`datasets.load_dataset`, as the hub would answer."""
    assert path == "cais/mmlu"
    columns = ("question", "choices", "answer")
    return DatasetDict(
        {
            split: Dataset.from_dict(
                dict(zip(columns, map(list, zip(*questions(name, split), strict=True)), strict=True))
            )
            for split in ("dev", "test")
        }
    )


def plainly(lm, tasks, folder, batch_size=1, shots=5, **options):
    """What lm-eval itself gives, all its own defaults: its model class, its tasks, its groups."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    with quiet():
        model = HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=batch_size)
        return simple_evaluate(
            model, tasks=tasks, num_fewshot=shots, task_manager=manager, bootstrap_iters=0, **options
        )
