"""MMLU: the official numbers of lm-eval from the hub's data set and from local files, and what is wrong with a file."""

import csv
from dataclasses import replace

import pandas as pd
import pytest
from quiz import TEMPLATES, TRICKY, hub, layout, plainly, questions, subjects

from qfbench import LanguageModel, UserError
from qfbench.analysis.drops import by_subject
from qfbench.analysis.rows import regular
from qfbench.regression import mmlu

FEW = ["anatomy", "astronomy", "world_religions", "virology"]
FORMS = {"letter": "default", "continuation": "continuation"}  # lm-eval's folders


@pytest.fixture(scope="module")
def lm(tiny):
    return replace(tiny("qwen2", max_position_embeddings=1024), batch_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return layout(tmp_path_factory.mktemp("mmlu") / "data", FEW)


@pytest.fixture
def from_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", hub)


def agree(rows, results, suite):
    """The rows are lm-eval's own samples: places, prompts, right or wrong, log-probabilities. Returns what came of them."""
    own = {row["fact_id"]: row for row in rows}
    assert len(own) == len(rows)
    samples = {f"{name}/{s['doc_id']}": s for name, given in results["samples"].items() for s in given}
    assert own.keys() == samples.keys()
    asked = {name: [one.arguments for one in task.instances] for name, task in suite.tasks.items()}
    assert asked == {
        name: [prompt for s in sorted(given, key=lambda s: s["doc_id"]) for prompt in s["arguments"]]
        for name, given in results["samples"].items()
    }
    for key, sample in samples.items():
        row = own[key]
        logprobs = [logprob for logprob, _ in sample["filtered_resps"]]
        assert row["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert row["correct"] == sample["acc"]
        assert row["gold_logprob"] == row["logprobs"][sample["target"]]
        assert row["chance"] == 0.25
    return {row["correct"] for row in rows}


@pytest.mark.parametrize("group", ["mmlu_humanities", pytest.param("mmlu", marks=pytest.mark.slow)])
def test_the_hubs_data_give_lm_evals_own_numbers_and_averages(lm, from_hub, group):
    results = plainly(lm, [group], TEMPLATES / "default", batch_size=16)
    asked = sorted(name.removeprefix("mmlu_") for name in results["samples"])
    suite = mmlu() if group == "mmlu" else mmlu(subjects=asked)
    rows = suite(lm)
    assert agree(rows, results, suite) == {0, 1}
    assert sorted({row["subject"] for row in rows}) == asked
    assert group != "mmlu" or asked == subjects()
    frame = pd.DataFrame(rows).assign(
        suite="mmlu", model="m", editor="e", step=1, taught=1, checkpoint=True, fresh=False
    )
    before = frame.assign(condition="unedited", regime=None, step=0)
    table = by_subject(
        regular(pd.concat([before, frame.assign(condition="edited", regime="joint")], ignore_index=True))
    )
    ours = {
        (line.group, line.subject): line.before for line in table.astype(object).where(table.notna(), None).itertuples()
    }
    assert len(ours) == len(asked) + len(results["groups"].keys() - {"mmlu"}) + 1
    for (part, subject), accuracy in ours.items():
        name = f"mmlu_{subject or part}" if subject or part else group
        assert accuracy == pytest.approx(results["results"][name]["acc,none"]), name
    assert table.questions.iloc[-1] == table.questions[: len(asked)].sum() == len(rows)
    assert table.before[: len(asked)].mean() != pytest.approx(
        table.before.iloc[-1]
    )  # a mean over subjects would be another number


@pytest.mark.parametrize(("form", "batch_size"), [("letter", 1), ("continuation", 3), ("letter", 64)])
def test_local_files_give_lm_evals_own_numbers(lm, folder, from_hub, form, batch_size):
    suite = mmlu(str(folder), form, subjects=["anatomy", "virology"])
    rows = suite(replace(lm, batch_size=batch_size))
    assert agree(rows, plainly(lm, list(suite.tasks), TEMPLATES / FORMS[form], 8), suite) == {0, 1}


def letters(lm, shown):
    """The log-probabilities of the four letters as the model's reply in a dialogue, by one plain pass each."""
    before = lm.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    start = len(lm.tokenizer(before).input_ids)
    out = []
    for letter in "ABCD":
        ids = lm.tokenizer(before + letter, return_tensors="pt").input_ids
        logits = lm.model(ids).logits[0].log_softmax(-1)
        out.append(sum(logits[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
    return out


@pytest.mark.parametrize("shots", [0, 2])
def test_in_a_dialogue_examples_are_turns_and_letters_are_replies(lm, folder, shots):
    suite, plain = (mmlu(str(folder), shots=shots, subjects=["virology"], chat=chat) for chat in (True, False))
    rows = suite(lm)
    posed = [
        (
            f"{q.strip()}\n" + "\n".join(f"{x}. {c}" for x, c in zip("ABCD", choices, strict=True)) + "\nAnswer:",
            "ABCD"[a],
        )
        for split in ("dev", "test")
        for q, choices, a in questions("virology", split)
    ]
    intro = "The following are multiple choice questions (with answers) about virology.\n\n"
    shown = [{"role": "system", "content": intro}]
    for query, answer in posed[:shots]:
        shown += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    for row, (query, answer) in zip(rows, posed[5:], strict=True):
        assert (row["asked"], row["query"], row["expected"]) == ("chat", query, answer)
        assert row["logprobs"] == pytest.approx(letters(lm, [*shown, {"role": "user", "content": query}]), abs=1e-4)
    assert {row["asked"] for row in plain(lm)} == {"plain"}
    assert [row["logprobs"] for row in plain(lm)] != [row["logprobs"] for row in rows]
    assert suite.fingerprint != plain.fingerprint == mmlu(str(folder), shots=shots, subjects=["virology"]).fingerprint


def fields(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_questions_are_those_of_the_files_to_the_letter(lm, folder):
    rows = mmlu(str(folder), "continuation", shots=0, subjects="anatomy")(lm)
    for row, (question, choices, answer) in zip(rows, TRICKY, strict=False):
        assert row["query"] == f"Question: {question.strip()}\nAnswer:"
        assert row["expected"] == choices[answer]
        assert row["reply"] in choices
        assert (row["subject"], row["group"]) == ("anatomy", "stem")
    assert [row["fact_id"] for row in rows] == [f"mmlu_anatomy_continuation/{n}" for n in range(len(rows))]
    letters = mmlu(str(folder), shots=0, subjects=["anatomy"])(lm)
    assert letters[0]["query"] == ('What is "it", in short?\nA. one, two\nB. the "other"\nC. NA\nD. three\nAnswer:')
    assert [row["expected"] for row in letters] == ["ABCD"[a] for _, _, a in questions("anatomy", "test")]


def test_a_byte_order_mark_is_no_part_of_the_first_question(folder, tmp_path, lm):
    layout(tmp_path / "other", ["anatomy"])
    path = tmp_path / "other" / "test" / "anatomy_test.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ours, plain = (mmlu(str(f), subjects=["anatomy"]).fingerprint for f in (tmp_path / "other", folder))
    assert ours == plain


def test_what_is_asked_has_one_fingerprint_wherever_it_comes_from(folder, from_hub):
    local = mmlu(str(folder), subjects=FEW)
    assert mmlu(subjects=FEW).fingerprint == mmlu(str(folder), subjects=FEW[::-1]).fingerprint == local.fingerprint
    assert mmlu(str(folder), subjects=FEW, limit=4, seed=1).fingerprint == local.fingerprint  # that is all there are
    others = ({"shots": 4}, {"limit": 1}, {"limit": 2}, {"form": "continuation"}, {"subjects": FEW[:2]})
    prints = {mmlu(**{"path": str(folder), "subjects": FEW} | other).fingerprint for other in others}
    assert len(prints | {local.fingerprint}) == 6


def test_a_subset_is_drawn_once_by_seed_and_keeps_its_places(folder, lm):
    suite = mmlu(str(folder), subjects=["anatomy"], shots=0, limit=2, seed=3)
    whole = {row["fact_id"]: row for row in mmlu(str(folder), subjects=["anatomy"], shots=0)(lm)}
    assert len(whole) == 3
    drawn = {}
    for seed in range(8):
        rows = mmlu(str(folder), subjects=["anatomy"], shots=0, limit=2, seed=seed)(lm)
        assert len(rows) == 2
        for row in rows:
            assert row["query"] == whole[row["fact_id"]]["query"]
            assert row["logprobs"] == pytest.approx(whole[row["fact_id"]]["logprobs"], abs=1e-4)
        drawn[seed] = [row["fact_id"] for row in rows]
    assert len(set(map(tuple, drawn.values()))) > 1
    assert drawn[3] == [row["fact_id"] for row in suite(lm)] == [row["fact_id"] for row in suite(lm)]
    among = mmlu(str(folder), subjects=FEW, shots=0, limit=2, seed=3)(lm)
    assert [row["fact_id"] for row in among if row["subject"] == "anatomy"] == drawn[3]


WRONG = [
    ("dev", None, r"there is no such file"),
    ("test", None, r"there is no such file; give regression.mmlu.subjects=\[astronomy\], for which there are test"),
    ("test", b"", "holds no question"),
    ("dev", b"q,a,b,c,d,A\n", r"1 questions; shots=5 needs more"),
    ("test", b"q,a,b,c,d,A\nq,a,b,c,B\n", "line 2: 5 fields; a question, four choices and a letter"),
    ("test", b'"q\nr",a,b,c,d,A\nq,a,b,c,d,e,B\n', "line 3: 7 fields"),
    ("dev", b"q,a,b,c,d,A\nq,a,b,c,d,E\n", "line 2: the answer is 'E'; it must be one of A, B, C, D"),
    ("test", b"q,a,b,c,d,AB\n", "line 1: the answer is 'AB'"),
    ("test", b"q,a,b,c,d,\n", "line 1: the answer is ''"),
    ("test", b"question,A,B,C,D,answer\n", "line 1: the answer is 'answer'"),
    ("test", b'q,a,b,c,d,A\n"q,a,b,c,d,A\n', "cannot be read"),
    ("test", b"\xff,a,b,c,d,A\n", "cannot be read"),
    ("test", b"q,a,b,c,d,A\nq,a,,c,d,A\n", "line 2: the field 'B' is empty"),
    ("dev", b"\xe2\x80\x8b,a,b,c,d,A\n", "line 1: the field 'question' is empty but for"),
    ("test", b"q\x00,a,b,c,d,A\n", "line 1: the field 'question' holds the control character"),
]


@pytest.mark.parametrize(("split", "content", "message"), WRONG)
def test_what_is_wrong_with_a_file_is_named(tmp_path, split, content, message):
    layout(tmp_path / "data", ["anatomy", "astronomy"])
    path = tmp_path / "data" / split / f"anatomy_{split}.csv"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}[:,] {message}"):
        mmlu(str(tmp_path / "data"), subjects=["astronomy", "anatomy"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"form": "letters"}, "regression.mmlu.form=letters: must be one of letter, continuation"),
        ({"shots": 6}, "regression.mmlu.shots=6: must be 0 to 5"),
        ({"shots": -1}, "regression.mmlu.shots=-1: must be 0 to 5"),
        ({"limit": 0}, r"limit=0 \(regression\): must be 1 or more"),
        (
            {"subjects": ["anatomy", "alchemy"]},
            "regression.mmlu.subjects=alchemy: no subject of MMLU; they are abstract",
        ),
        ({"subjects": []}, r"subjects \(regression\) is empty"),
    ],
)
def test_a_setting_that_cannot_be_is_named(folder, setting, message):
    with pytest.raises(UserError, match=f"{message}"):
        mmlu(**{"path": str(folder), "subjects": ["anatomy"]} | setting)


def test_without_the_hub_a_folder_is_asked_for(monkeypatch):
    def load_dataset(**_):
        raise ConnectionError("no route\nto there")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        mmlu()
    assert str(error.value) == (
        "the tasks or data of mmlu_abstract_algebra, mmlu_anatomy, mmlu_astronomy and 54 more cannot be loaded: no route; "
        "give regression.mmlu.path=FOLDER to take local files"
    )


def test_real_files_under_a_real_tokenizer_give_lm_evals_own_numbers(shared, tiny, qwen_tokenizer, from_hub):
    tested = sorted(path.name.removesuffix("_test.csv") for path in shared("mmlu").glob("test/*_test.csv"))
    model = tiny("qwen2", vocab_size=len(qwen_tokenizer), max_position_embeddings=4096).model
    lm = LanguageModel(model, qwen_tokenizer, "random", batch_size=4)
    suite = mmlu(str(shared("mmlu")), subjects=tested[:2], limit=1)
    agree(suite(lm), plainly(lm, list(suite.tasks.values()), TEMPLATES / "default", samples=suite.samples), suite)
    every = mmlu(str(shared("mmlu")), "continuation", shots=0, subjects=tested)
    for subject, task in zip(tested, every.tasks.values(), strict=True):
        rows = fields(shared("mmlu") / "test" / f"{subject}_test.csv")
        assert [[d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in task.eval_docs] == rows
    with pytest.raises(UserError, match="dev/.*anatomy|test/anatomy_test.csv: there is no such file"):
        mmlu(str(shared("mmlu")))
