"""Questions through lm-eval of the model in memory: after edits, in batches, in dialogues, of any task; the built-in world's own."""

import copy
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from qfbench import LanguageModel, UserError
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.tree import Ending, Question
from qfbench.models.whole import Whole
from qfbench.regression import Questions, harness, tasks, world_mc
from qfbench.regression import live as live_module
from qfbench.regression.live import fitting, live, quiet
from qfbench.world.relations import RELATIONS

DOCS = [
    {"q": f"Who leads firm {n}?", "c": [f"Qi{n}", "Bo of the hills", "Cy", "Dee Dee"][: 2 + n % 3], "a": n % 2}
    for n in range(9)
]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "a"}
YAML = """
task: {name}
custom_dataset: !function data.load
test_split: test
{config}
"""
DATA = f"""
from datasets import Dataset

def load(**_):
    return {{"test": Dataset.from_list({DOCS}), "more": Dataset.from_list({DOCS[:3]})}}

def shots():
    return {DOCS[:3]}
"""
CONFIGS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\nnum_fewshot: 1\n"
    "fewshot_config: {samples: !function data.shots}",
    "several": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: '[0, 1]'\ntag: mine",
    "named": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: '{{c[a]}}'\ntag: mine",
    "none": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: '{{q}}'",
    "say": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: '{{c[0]}}'\nfewshot_split: more\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 6}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    "rate": "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: '{{c[0]}}'\n"
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
    " {metric: acc, aggregation: mean, higher_is_better: true}]",
    "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    "metric_list: [{metric: word_perplexity}]",
    "unmeasured": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
    "metric_list: [{metric: mcc}]",
}


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs", device="cpu")


@pytest.fixture
def yaml(tmp_path, monkeypatch):
    """A folder of tasks; lm-eval's own 14,000, which take seconds to find, are not looked at."""
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, config=config))
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [choose, named]\n")
    manager = lambda include_path, include_defaults=True: TaskManager(  # noqa: E731
        include_path=include_path, include_defaults=False
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    return str(tmp_path)


def suite(docs=DOCS, name="own", limit=None, seed=0, chat=False, **config):
    data = {"test": Dataset.from_list(docs), "more": Dataset.from_list(DOCS)}
    given = {"task": name, "custom_dataset": lambda **_: data, "test_split": "test", "num_fewshot": 0}
    with quiet():
        return Questions({name: ConfigurableTask(config=given | CHOICE | config)}, {}, limit, seed, chat)


def logprob(lm, before, answer):
    """Of the answer's tokens, by one plain pass."""
    whole = lm.tokenizer(before + answer, return_tensors="pt").input_ids
    start = len(lm.tokenizer(before).input_ids)
    logits = lm.model(whole).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[0, i]].item() for i in range(start, whole.shape[1]))


def moved(lm, factor=3.0):
    """A change that every answer shows."""
    name = next(n for n, _ in lm.model.named_parameters() if n.endswith("layers.1.mlp.down_proj.weight"))
    weight = lm.model.get_parameter(name).detach()
    return WeightDelta({name: LowRank(factor * weight.double())})


def forgets(lm):
    """Whether the same questions are answered anew after an edit, and as before once it is undone."""
    own = suite()
    before = own(lm)
    with moved(lm).applied_to(lm):
        edited = own(lm)
    assert own(lm) == before
    pairs = list(zip(before, edited, strict=True))
    assert all(a["fact_id"] == b["fact_id"] for a, b in pairs)
    return [a["logprobs"] != pytest.approx(b["logprobs"], abs=1e-3) for a, b in pairs]


def test_an_edited_model_answers_for_itself(tiny):
    assert all(forgets(tiny("llama")))


def test_a_memory_of_answers_would_be_noticed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "live", lambda lm, chat: CachingLM(live(lm, chat), str(tmp_path / "answers")))
    assert not any(forgets(tiny("llama")))


def test_asking_leaves_everything_as_it_was(tiny, yaml):
    lm = tiny("qwen2")
    lm = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    lm.tokenizer.pad_token = None  # lm-eval sets one
    own, said = suite(), tasks(["say"], include=yaml)

    def state():
        of_tokenizer = (lm.tokenizer.backend_tokenizer.to_str(), lm.tokenizer.pad_token, lm.tokenizer.padding_side)
        randomness = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
        return lm.weights_hash(), of_tokenizer, lm.model.generation_config.to_dict(), lm.model.training, *randomness

    before = state()
    own(lm), said(lm)
    assert state() == before


OWN_WAYS = {
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [*range(0, 1000, 2)],
    "begin_suppress_tokens": [*range(0, 1000, 2)],
    "bad_words_ids": [[n] for n in range(0, 1000, 2)],
    "forced_eos_token_id": 5,
    "sequence_bias": [[[77], 99.0]],
    "exponential_decay_length_penalty": [0, 9.0],
    "num_beams": 4,
    "max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def plain_reply(tiny):
    lm = tiny("qwen2")
    return lm, [row["reply"] for row in said(lm)]


def said(lm):
    """What it says by greedy decoding, which repeats itself, as random models do."""
    config = {"output_type": "generate_until", "doc_to_target": "q", "doc_to_choice": None}
    return suite(DOCS[:3], **config, generation_kwargs={"until": ["@@"], "max_gen_toks": 24})(lm)


@pytest.mark.parametrize("name", OWN_WAYS)
def test_generated_replies_are_greedy_whatever_the_models_own_settings_of_generation_are(
    plain_reply, monkeypatch, name
):
    lm, replies = plain_reply
    own = OWN_WAYS[name]
    monkeypatch.setattr(
        lm.model, "generation_config", GenerationConfig(eos_token_id=lm.tokenizer.eos_token_id, **{name: own})
    )
    assert [row["reply"] for row in said(lm)] == replies
    assert getattr(lm.model.generation_config, name) == own  # as it was
    with monkeypatch.context() as patched:
        patched.setattr(live_module, "greedy", lambda model: nullcontext())
        assert [row["reply"] for row in said(lm)] != replies  # the setting does something


def test_generated_replies_are_what_the_model_says_of_itself(tiny):
    lm = tiny("qwen2")
    lm.model.generation_config.repetition_penalty = 50.0
    way = Whole(lm.model, Ending(frozenset({lm.tokenizer.eos_token_id}), frozenset(), 24))
    asked = [Question(tuple(lm.tokenizer(doc["q"]).input_ids)) for doc in DOCS[:3]]
    own = [lm.tokenizer.decode(list(answer.said), skip_special_tokens=True) for answer in way.answer(asked)]
    assert [row["reply"] for row in said(lm)] == own


def test_rows_are_those_of_the_questions_by_their_places(tiny):
    lm = tiny("qwen2")
    rows = suite()(lm)
    for n, (row, doc) in enumerate(zip(rows, DOCS, strict=True)):
        assert row["fact_id"] == f"own/{n}"
        assert (row["query"], row["expected"]) == (doc["q"], doc["c"][doc["a"]])
        assert row["logprobs"] == pytest.approx([logprob(lm, doc["q"], f" {c}") for c in doc["c"]], abs=1e-4)
        best = row["logprobs"].index(max(row["logprobs"]))
        assert (row["reply"], row["correct"]) == (doc["c"][best], float(best == doc["a"]))
        assert row["gold_logprob"] == row["logprobs"][doc["a"]]
        assert row["chance"] == 1 / len(doc["c"])


def test_a_subset_is_the_same_in_every_evaluation_and_knows_its_places(tiny):
    lm, drawn = tiny("qwen2"), {}
    whole = {row["fact_id"]: row for row in suite()(lm)}
    for seed in range(6):
        own = suite(limit=4, seed=seed)
        rows = own(lm)
        assert rows == own(lm) == suite(limit=4, seed=seed)(lm)
        drawn[seed] = [row["fact_id"] for row in rows]
        assert len({*drawn[seed]}) == 4
        assert all(row["query"] == whole[row["fact_id"]]["query"] for row in rows)
    assert len({*map(tuple, drawn.values())}) > 2
    assert suite(limit=9)(lm) == suite(limit=99)(lm) == list(whole.values())


def test_random_examples_are_the_same_in_every_evaluation(tiny):
    lm = tiny("qwen2")
    own, asked = suite(num_fewshot=2, fewshot_split="more"), []
    for _ in range(3):
        own(lm)
        asked.append([one.arguments for one in own.tasks["own"].instances])
    assert asked[0] == asked[1] == asked[2]
    shown = {arguments[0].rpartition("Who leads")[0] for arguments in asked[0]}
    assert len(shown) > 3  # they are drawn anew for each question


@pytest.mark.parametrize("most", [2, 3, 64])
def test_batches_change_no_number(tiny, most):
    """Token ids at random, the padding's own among them, in inputs and answers of any length."""
    lm = tiny("qwen2")
    rng = random.Random(most)
    requests = [(None, [0], [n]) for n in (0, 5)] + [(None, [0, 0, 0], [0, 0]), (None, [7] * 30, [0, 9, 0])]
    for _ in range(30):
        before, answer = (rng.choices((0, 0, 5, 9, 77), k=rng.randint(1, n)) for n in (30, 6))
        requests += [(None, before, answer), (None, before, [*answer[:-1], 3])]
    with quiet():
        plain = HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=1)
        wanted = plain._loglikelihood_tokens(requests, disable_tqdm=True)
        given = live(replace(lm, batch_size=most))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in given] == [greedy for _, greedy in wanted]
    assert [value for value, _ in given] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_logits_are_computed_at_the_end_only(tiny, monkeypatch):
    lm, kept = tiny("qwen2"), []
    forward = lm.model.lm_head.forward
    monkeypatch.setattr(lm.model.lm_head, "forward", lambda hidden: kept.append(hidden.shape[1]) or forward(hidden))
    with quiet():
        live(lm)._loglikelihood_tokens([(None, [5] * 100, [7, 8]), (None, [5] * 97, [9])], disable_tqdm=True)
    assert kept == [101 - 97 + 2]


def test_a_batch_is_as_large_as_its_logits_allow(monkeypatch):
    monkeypatch.setattr(live_module, "LOGITS", 4 * 1000 * 100)  # a hundred positions of a thousand tokens
    assert fitting([10] * 50, 1, 1000, 64) == 64
    assert fitting([10] * 200, 1, 1000, 64) == 64
    assert fitting([10] * 200, 2, 1000, 64) == 32
    assert fitting([200, 10, 10, 10], 1, 1000, 64) == 1
    assert fitting([60, 30, 10, 10], 1, 1000, 64) == 2
    assert fitting([10], 500, 1000, 64) == 1
    rng = random.Random(0)
    for _ in range(200):
        lengths = sorted((rng.randint(1, 90) for _ in range(rng.randint(1, 40))), reverse=True)
        tail, most = rng.randint(1, 5), rng.choice((1, 2, 8, 64))
        batch = fitting(lengths, tail, 1000, most)
        parts = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
        assert batch <= most
        assert batch == 1 or all(len(part) * (part[0] - part[-1] + tail) <= 100 for part in parts)


def test_requests_that_share_an_input_count_once(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(live_module, "fitting", lambda lengths, *rest: asked.append(lengths) or 1)
    with quiet():
        live(tiny("qwen2"))._loglikelihood_tokens(
            [(None, [5, 6], [n]) for n in (1, 2, 3)] + [(None, [5], [6, 1])] + [(None, [4], [4])], disable_tqdm=True
        )
    assert asked == [[2, 1]]


def test_numbers_that_are_not_finite_stop_the_run(tiny):
    lm = tiny("qwen2")
    lm.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(FloatingPointError, match="own: .* not finite"):
        suite()(lm)


def test_a_question_that_is_longer_than_the_model_is_refused_and_not_cut(yaml, xs, monkeypatch):
    """lm-eval takes the left of it away, and says so where nobody reads it."""
    monkeypatch.setattr(xs.model.config, "max_position_embeddings", 8)
    for name, what in (
        ("choose", "with its answer"),
        ("say", "with room for 6 tokens of a reply"),
        ("rate", "with its answer"),
    ):
        asked = tasks([name], include=str(yaml))
        with pytest.raises(
            UserError, match=rf"a question \(regression\) has \d+ tokens {what}, and world-xs has 8 positions"
        ):
            asked(xs)
    monkeypatch.undo()
    assert tasks(["choose"], include=str(yaml))(xs)


def test_in_a_dialogue_the_templates_line_break_belongs_to_the_prompt(xs):
    rows = suite(chat=True)(xs)
    for row, doc in zip(rows, DOCS, strict=True):
        asked = [{"role": "user", "content": doc["q"]}]
        before = xs.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert before != before.rstrip()  # or this would test nothing
        assert row["logprobs"] == pytest.approx([logprob(xs, before, c) for c in doc["c"]], abs=1e-4)


def test_without_a_dialogue_a_prompts_last_white_space_belongs_to_the_answer_as_in_lm_eval(xs):
    row = suite(doc_to_text=lambda doc: f"Firm {doc['a']}\n", target_delimiter="")(xs)[0]
    assert row["logprobs"][1] == pytest.approx(logprob(xs, "Firm 0", "\nBo of the hills"), abs=1e-4)


def test_a_model_without_a_template_is_asked_plainly(xs, plain_tokenizer):
    tokenizer = copy.deepcopy(xs.tokenizer)
    tokenizer.chat_template = None
    plain = replace(xs, tokenizer=tokenizer)
    assert suite(chat=True)(plain) == suite()(xs) != suite(chat=True)(xs)


def test_examples_of_a_dialogue_are_turns_as_in_lm_eval(xs):
    own = suite(chat=True, num_fewshot=1, fewshot_split="more")
    own(xs)
    prompt = own.tasks["own"].instances[0].arguments[0]
    assert prompt.count("<|im_start|>user\n") == prompt.count("<|im_start|>assistant\n") == 2


# The built-in world


def test_the_worlds_questions_are_about_every_relation_and_have_one_right_choice():
    for form in ("continuation", "letter"):
        own = world_mc(form, limit=7)
        assert [task.config.task_alias for task in own.tasks.values()] == list(RELATIONS)
        assert set(own.groups.values()) == {relation.kind for relation in RELATIONS.values()}
        for task in own.tasks.values():
            assert 0 < len(task.eval_docs) <= 7
            assert len({doc["question"] for doc in task.eval_docs}) == len(task.eval_docs)
            for doc in task.eval_docs:
                assert len({*doc["choices"]}) == 4
                assert all(len(choice) == 1 for choice in doc["choices"]) == (form == "letter")
        golds = [doc["answer"] for task in own.tasks.values() for doc in task.eval_docs]
        assert {*golds} == {0, 1, 2, 3}


def test_a_built_in_model_knows_its_world_and_no_letters(xs):
    rows = world_mc(limit=6)(xs)
    assert {row["subject"] for row in rows} == {*RELATIONS}
    assert {row["group"] for row in rows} == {relation.kind for relation in RELATIONS.values()}
    assert all(row["chance"] == 0.25 for row in rows)
    assert np.mean([row["correct"] for row in rows]) > 0.95
    letters = world_mc("letter", limit=20)(xs)
    assert np.mean([row["correct"] for row in letters]) == pytest.approx(0.25, abs=0.12)
    with moved(xs, -1.0).applied_to(xs):  # nothing is left of that layer
        assert np.mean([row["correct"] for row in world_mc(limit=6)(xs)]) < 0.9


@pytest.mark.parametrize("plain", [False, True])
def test_firing_models_and_plain_ones_are_asked_too(plain):
    lm = LanguageModel.load("world-s-qf2", device="cpu", plain=plain)
    rows = world_mc(limit=2)(lm)
    assert len(rows) == 2 * len(RELATIONS)
    assert np.mean([row["correct"] for row in rows]) > (0.5 if plain else 0.9)


def test_the_worlds_questions_are_drawn_by_seed():
    prints = [world_mc(*how).fingerprint for how in (("letter", 3), ("continuation", 3), ("continuation", 4))]
    assert len({*prints, world_mc(limit=3, seed=1).fingerprint}) == 4
    assert world_mc(limit=3).fingerprint == prints[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"form": "words"}, "world_mc.form=words: must be one of continuation, letter"),
        ({"limit": 0}, "world_mc.limit=0"),
    ],
)
def test_a_setting_of_the_world_that_cannot_be_is_named(setting, message):
    with pytest.raises(UserError, match=f"regression.{message}"):
        world_mc(**setting)


# Any task by name


def test_tasks_of_ones_own_by_name_tag_and_group(tiny, yaml):
    lm = tiny("qwen2")
    rows = tasks(["both", "several", "say", "rate", "none"], include=yaml)(lm)
    by = {name: [row for row in rows if row["subject"] == name] for name in CONFIGS}
    assert {name: len(own) for name, own in by.items() if own} == dict.fromkeys(
        ("choose", "named", "several", "say", "rate", "none"), 9
    )
    assert {row["subject"] for row in rows if row["group"] == "both"} == {"choose", "named"}
    for n, doc in enumerate(DOCS):
        right = doc["c"][doc["a"]]
        assert by["choose"][n]["expected"] == by["named"][n]["expected"] == right
        assert by["named"][n]["gold_logprob"] == pytest.approx(logprob(lm, doc["q"], f" {right}"), abs=1e-4)
        assert by["several"][n]["correct"] == (by["several"][n]["reply"] in doc["c"][:2])
        assert (by["none"][n]["correct"], "expected" in by["none"][n]) == (0, False)
        assert by["rate"][n]["gold_logprob"] == pytest.approx(logprob(lm, doc["q"], doc["c"][0]), abs=1e-4)
        assert by["say"][n]["correct"] == (by["say"][n]["reply"] == by["say"][n]["expected"] == doc["c"][0])
        assert {"reply", "query", "expected"} <= by["say"][n].keys()
    assert {row["subject"] for row in tasks("mine", include=yaml)(lm)} == {"named", "several"}


def test_a_reply_that_is_right_counts(tiny, yaml, monkeypatch):
    own, said = tasks("say", include=yaml), [doc["c"][0] for doc in DOCS]
    monkeypatch.setattr(HFLM, "generate_until", lambda *_, **__: [*said[:5], *["Nobody"] * 4])
    assert [row["correct"] for row in own(tiny("qwen2"))] == [1] * 5 + [0] * 4
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, requests, **_: [(-2.0, n < 3) for n, _ in enumerate(requests)]
    )
    rows = tasks("rate", include=yaml)(tiny("qwen2"))
    assert [(row["correct"], row["gold_logprob"]) for row in rows] == [(1, -2.0)] * 3 + [(0, -2.0)] * 6


def test_shots_are_the_tasks_own_unless_given(yaml):
    def shown(**how):
        return {
            name: task.config.num_fewshot for name, task in tasks(["choose", "say"], include=yaml, **how).tasks.items()
        }

    assert shown() == {"choose": 1, "say": 0}
    assert shown(shots=2) == {"choose": 2, "say": 2}


def test_a_fingerprint_is_the_same_wherever_functions_lie(yaml):
    first, again = (suite(num_fewshot=1, fewshot_config={"samples": lambda: DOCS[:3]}) for _ in range(2))
    one, other = (str(one.tasks["own"].config.fewshot_config.samples) for one in (first, again))
    assert one != other  # as in two processes
    assert first.fingerprint == again.fingerprint


def test_a_fingerprint_tells_what_is_asked_apart(yaml):
    first = tasks("choose", include=yaml)
    prints = {tasks("choose", include=yaml, **how).fingerprint for how in ({"chat": True}, {"shots": 0}, {"limit": 3})}
    assert len(prints | {first.fingerprint}) == 4


def test_metric_says_what_is_right(tiny, yaml):
    lm = tiny("qwen2")
    rows = tasks("rate", metric="perplexity", include=yaml)(lm)
    assert [row["correct"] for row in rows] == [row["gold_logprob"] for row in rows]
    with pytest.raises(UserError, match="rate: metric=f1; of single questions there are perplexity, acc"):
        tasks("rate", metric="f1", include=yaml)(lm)
    with pytest.raises(UserError, match="unmeasured: metric=None; of single questions there are none"):
        tasks("unmeasured", include=yaml)(lm)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tasks": ["choose", "nothing"]}, r"lm_eval.tasks=nothing: lm-eval has no such task; `lm-eval ls tasks`"),
        ({"tasks": "roll"}, "roll rates whole texts and asks no questions; use regression=perplexity"),
        ({"tasks": []}, "is empty"),
        ({"tasks": "choose", "shots": -1}, "lm_eval.shots=-1"),
        ({"tasks": "choose", "shots": 4}, "choose: shots=4, but its data hold only 3 examples"),
        ({"tasks": "choose", "limit": 0}, "limit=0"),
        ({"tasks": "choose", "include": "/no/such"}, "lm_eval.include=/no/such: no such folder"),
        ({"tasks": "broken"}, "the tasks or data of broken cannot be loaded: no route"),
    ],
)
def test_what_cannot_be_asked_is_named(yaml, setting, message):
    data = "def load(**_):\n    raise ConnectionError('no route')\n"
    config = (
        "custom_dataset: !function broken_data.load\ntask: broken\noutput_type: multiple_choice\ntest_split: test\n"
    )
    for name, text in (("broken.yaml", config), ("broken_data.py", data)):
        with open(f"{yaml}/{name}", "w") as file:
            file.write(text)
    with pytest.raises(UserError, match=message):
        tasks(**{"include": yaml} | setting)


def test_lm_evals_own_tasks_are_looked_for_only_where_they_are_needed(yaml, monkeypatch):
    asked = []

    def manager(include_path, include_defaults=True):
        asked.append(include_defaults)
        names = ["choose", "elsewhere"] if include_defaults else ["choose"]
        return SimpleNamespace(all_tasks=names, load=lambda spec: {"tasks": {}, "group_map": {}})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    for name, looked in (("choose", [False]), ("elsewhere", [False, True])):
        asked.clear()
        with pytest.raises(UserError, match="is empty"):
            tasks(name, include=yaml)
        assert asked == looked


@pytest.mark.slow
def test_an_unknown_name_among_all_of_lm_evals_tasks():
    with pytest.raises(UserError, match="tasks=no_such_task: lm-eval has no such task"):
        tasks("no_such_task")
