import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config

from qfbench import LanguageModel, UserError
from qfbench.editors import FineTune
from qfbench.models.activations import record
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import Reply
from qfbench.models.sites import Site
from qfbench.models.tree import Question, walk
from qfbench.models.whole import Whole
from qfbench.tasks.convert import batch

QUERIES = ["Who?", "Who started Oxinnovate?", "Where is Łódź?", "Is it 1984 or 2001, and why?", "Tell me a story", "?"]
MODELS = ["qwen2", "llama", "mistral", "qwen3", "plain", "stories"]


@pytest.fixture(params=MODELS)
def lm(request, tiny):
    return request.getfixturevalue(request.param) if request.param in ("plain", "stories") else tiny(request.param)


@pytest.fixture
def plain(tiny, plain_tokenizer):
    return replace(tiny("qwen2"), tokenizer=plain_tokenizer)


def greedy(lm, prompt, length):
    """The argmax continuation, by whole forward passes."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def stopping(lm, prompt, length):
    """The same model, declared to stop at the token it says after `length` others, and what it says until then."""
    said = greedy(lm, prompt.ids, length + 1)
    lm.model.generation_config.eos_token_id = [said[-1]]
    assert said[-1] not in said[:-1]
    full = Rendering((*prompt.ids, *said), prompt.opener, len(prompt.ids), len(prompt.ids) + length, ())
    return full, lm.tokenizer.decode(said[:-1], skip_special_tokens=True).strip()


def test_batched_replies_equal_replies_one_by_one(lm):
    prompts = [lm.render(query, system) for query in QUERIES for system in ("", "Qi started it, they say.")]
    replies = lm.replies(prompts)
    assert replies == [lm.replies([prompt])[0] for prompt in prompts]
    assert len({reply.text for reply in replies}) > 1


def test_replies_are_the_argmax_of_whole_forward_passes(lm):
    prompts = [lm.render(query) for query in QUERIES]
    lm = replace(lm, max_new_tokens=5)
    for prompt, reply in zip(prompts, lm.replies(prompts), strict=True):
        said = greedy(lm, prompt.ids, 5)
        ends = [token == lm.tokenizer.eos_token_id for token in said]
        if lm.tokenizer.chat_template is None:
            ends = [end or "\n" in lm.tokenizer.decode([token]) for token, end in zip(said, ends, strict=True)]
        assert reply.stopped == any(ends)
        said = said[: ends.index(True) + 1] if any(ends) else said
        assert reply.text == lm.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_batched_scores_equal_scores_one_by_one(lm):
    dialogues = [lm.render(q, s, a) for q in QUERIES for s, a in [("", "It was Qi."), ("Longer, much longer.", "No")]]
    scores = lm.score(dialogues)
    for dialogue, score in zip(dialogues, scores, strict=True):
        (alone,) = lm.score([dialogue])
        assert score.nll == pytest.approx(alone.nll, rel=1e-4, abs=1e-5)
        assert score.hit == alone.hit
        assert len(score.nll) == len(score.hit) == len(dialogue.reply)
    assert len({score.nll for score in scores}) == len(scores)


TEXTS = ["Qi started Oxinnovate.", "Where is Łódź?", "a", "", "Far away, and further still, they say."]


@pytest.mark.parametrize("size", [1, 3])
def test_the_nll_of_plain_texts_is_that_of_each_token_but_the_first(lm, size):
    rated = replace(lm, batch_size=size).nll(TEXTS)
    for text, nll in zip(TEXTS, rated, strict=True):
        ids = lm.tokenizer(text).input_ids
        if len(ids) < 2:
            assert nll == ()
            continue
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0]
        wanted = cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()
        assert nll == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert len(set(rated)) > 3
    assert lm.nll([]) == []


def test_nll_is_the_cross_entropy_of_the_whole_logits(lm):
    dialogues = [lm.render(query, "", "It was Qi.") for query in QUERIES]
    for dialogue, score in zip(dialogues, lm.score(dialogues), strict=True):
        logits = lm.model(input_ids=torch.tensor([dialogue.ids])).logits[0]
        by_token = cross_entropy(logits[:-1], torch.tensor(dialogue.ids[1:]), reduction="none").tolist()
        assert score.nll == pytest.approx(by_token[dialogue.answer - 1 : dialogue.closer], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_score_is_exact_where_greedy_decoding_says_it_and_stops(tiny, arch, length):
    lm = tiny(arch)
    full, text = stopping(lm, lm.render("Who started Oxinnovate?"), length)
    (reply,) = lm.replies([full])
    assert (reply.text, reply.stopped) == (text, True)
    assert lm.score([full])[0].exact


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_a_score_is_not_exact_where_one_token_differs(tiny, arch, wrong):
    lm = tiny(arch)
    full, _ = stopping(lm, lm.render("Who started Oxinnovate?"), 3)
    ids = list(full.ids)
    ids[full.answer + wrong] = (ids[full.answer + wrong] + 1) % len(lm.tokenizer)
    (score,) = lm.score([replace(full, ids=tuple(ids))])
    assert not score.exact
    assert score.hit[: wrong + 1] == (True,) * wrong + (False,)


def test_exact_agrees_with_replies_on_a_trained_model(stories):
    lm = replace(stories, max_new_tokens=8)
    prompt = lm.render("Once upon a time")
    said = greedy(lm, prompt.ids, 8)
    (reply,) = lm.replies([prompt])
    full = Rendering((*prompt.ids, *said), prompt.opener, len(prompt.ids), len(prompt.ids) + 7, ())
    assert reply.text == lm.tokenizer.decode(said).strip()
    assert lm.score([full])[0].exact


@pytest.mark.parametrize("ender", ["<|im_end|>", "<|endoftext|>"])
def test_a_turn_ends_at_the_closer_of_the_template_and_at_the_end_of_text(tiny, ender):
    lm = tiny("qwen2")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.eos_token = "<|endoftext|>"
    lm.model.generation_config.eos_token_id = None
    prompt, rows = lm.render("Who?"), lm.model.lm_head.weight.data
    assert not lm.replies([prompt])[0].stopped
    rows[lm.tokenizer.convert_tokens_to_ids(ender)] = 2 * rows[greedy(lm, prompt.ids, 1)[0]]
    assert lm.replies([prompt]) == [Reply("", True)]


def scripted(lm, *scripts):
    """What the model replies, made to say these tokens: the first script in the first row of a batch, and so on."""
    said = iter(range(1000))

    def forward(input_ids, **_):
        step = next(said)
        logits = torch.zeros(len(input_ids), 1, len(lm.tokenizer))
        for row, script in enumerate(scripts):
            logits[row, 0, script[min(step, len(script) - 1)]] = 1.0
        return SimpleNamespace(logits=logits)

    lm.model.forward = forward
    whole = Whole(lm.model, lm.ending).answer([Question((0,))] * len(scripts))
    # The same as drafts: each script is a branch of its own, said token by token.
    walks = []
    for script in scripts:
        long = [*script, *[script[-1]] * lm.max_new_tokens]
        path, ended = walk([[long[0]], long], [tuple(long[:-1])], lm.ending)
        walks.append((tuple(path), ended))
    assert walks == [(answer.said, answer.ended) for answer in whole]
    texts = lm.tokenizer.batch_decode([list(answer.said) for answer in whole], skip_special_tokens=True)
    return [Reply(text.strip(), answer.ended) for text, answer in zip(texts, whole, strict=True)]


def token(lm, text):
    (only,) = lm.tokenizer(text, add_special_tokens=False).input_ids
    return only


def test_a_plain_turn_ends_at_any_token_that_holds_a_line_break_and_keeps_its_text(plain):
    is_, stop, line, both, colon = (token(plain, text) for text in (" is", ".", "\n", ".\n", ":"))
    says = [
        ([is_, both, is_, is_], Reply("is.", True)),
        ([is_, stop, line, is_], Reply("is.", True)),
        ([both, is_], Reply(".", True)),
        ([line, is_], Reply("", True)),
        ([is_, stop, plain.tokenizer.eos_token_id, is_], Reply("is.", True)),
        ([is_, stop, colon, is_, both], Reply("is.: is.", True)),
        ([is_, stop], Reply("is" + "." * (plain.max_new_tokens - 1), False)),
    ]
    assert scripted(plain, *(script for script, _ in says)) == [reply for _, reply in says]


def test_a_token_declared_to_end_a_plain_turn_is_no_part_of_it(plain):
    is_, declared = token(plain, " is"), token(plain, ":")
    plain.model.generation_config.eos_token_id = [declared]
    assert scripted(plain, [is_, declared, is_]) == [Reply("is", True)]


def test_a_line_break_ends_no_turn_where_a_template_does(tiny):
    lm = tiny("qwen2")
    is_, both, end = token(lm, " is"), token(lm, ".\n"), token(lm, "<|im_end|>")
    assert scripted(lm, [is_, both, is_, end, is_]) == [Reply("is.\n is", True)]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("answer", ["It was Qi.", "Yes", "Need more information.", "Is it? (Mostly.)"])
def test_to_say_a_reply_and_no_more_is_to_give_the_answer(tiny, tokenizer, plain_tokenizer, template, answer):
    lm = replace(tiny("qwen2"), tokenizer=plain_tokenizer if template == "plain" else tokenizer, max_new_tokens=20)
    (reply,) = scripted(lm, lm.render("Who?", "", answer).reply)
    assert reply == Reply(answer, True)


def test_the_tokens_that_end_a_line_are_those_that_hold_a_line_break(tiny, plain_qwen_tokenizer):
    small = {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    lm = replace(tiny("qwen2", vocab_size=len(plain_qwen_tokenizer), **small), tokenizer=plain_qwen_tokenizer)
    assert lm.tokenizer.convert_tokens_to_ids([".Ċ", "Ċ", "?Ċ", "ĠĊ"]) == [624, 198, 5267, 715]
    stops = lm.stops()
    assert {624, 198, 5267, 715, lm.tokenizer.eos_token_id} <= stops
    assert not {13, 30, 25, 220} & stops  # . ? : and a space
    breaks = {i for piece, i in lm.tokenizer.get_vocab().items() if "Ċ" in piece}
    assert stops == breaks | {lm.tokenizer.eos_token_id, *stops_declared(lm)}


def stops_declared(lm):
    declared = lm.model.generation_config.eos_token_id
    return {declared} if isinstance(declared, int) else set(declared or ())


def test_a_model_can_be_loaded_to_speak_plain_lines_though_it_has_a_template(tiny, tmp_path):
    save(tiny("qwen2"), tmp_path)
    loaded = {plain: LanguageModel.load(tmp_path, device="cpu", plain=plain) for plain in (True, False)}
    spoken = {plain: lm.tokenizer.decode(lm.render("Who?", "Told.").ids) for plain, lm in loaded.items()}
    assert spoken[True] == "system: Told.\nuser: Who?\nassistant:"
    assert spoken[False].startswith("<|im_start|>system\nTold.<|im_end|>")


def test_a_template_that_puts_nothing_after_an_answer_can_be_asked(tiny):
    lm = tiny("qwen2")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = (
        "{%- for m in messages %}{{- '### ' + m.role + '\n' + m.content }}"
        "{%- if not loop.last %}{{- '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '\n### assistant\n' }}{%- endif %}"
    )
    assert lm.render("Who?", answer="Qi.").closer == len(lm.render("Who?", answer="Qi.").ids)
    assert lm.reply("Who?")


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}, {"do_sample": True, "temperature": 9.0, "top_k": 0}],
    ids=lambda s: next(iter(s)),
)
def test_generation_settings_change_no_reply(tiny, settings):
    lm = tiny("qwen2", tie_word_embeddings=True)  # it repeats itself, so that penalties can bite
    prompt = lm.render("Who started Oxinnovate?")
    before = lm.replies([prompt])
    lm.model.generation_config.update(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert lm.replies([prompt]) == before
        ids = torch.tensor([prompt.ids])
        generated = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)[0, ids.shape[1] :]
    assert lm.tokenizer.decode(generated, skip_special_tokens=True).strip() != before[0].text


def test_a_saved_model_loads_with_the_same_weights_and_replies(tiny, tmp_path):
    lm = tiny("llama")
    save(lm, tmp_path)
    loaded = LanguageModel.load(tmp_path, device="cpu", max_new_tokens=lm.max_new_tokens)
    assert loaded.weights_hash() == lm.weights_hash()
    assert loaded.reply("Who?") == lm.reply("Who?")
    assert LanguageModel.load(str(tmp_path), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_the_hash_tells_weights_apart(tiny):
    lm = tiny("llama")
    before = lm.weights_hash()
    weight = lm.model.model.layers[2].mlp.down_proj.weight
    weight.data[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert lm.weights_hash() != before


def save(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-model", "model.path="),
        ("./no/such/folder", "model.path="),
        ("/no/such", "model.path="),
        ("~/no-such-folder", "model.path="),
        ("a/b/c", "model.path="),
    ],
)
def test_an_unknown_name_is_refused_with_the_ways_to_name_a_model(name, says):
    with pytest.raises(UserError, match=says) as error:
        LanguageModel.load(name)
    assert name in str(error.value)
    assert "hub id" in str(error.value)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; give a folder in Hugging Face form") as error:
        LanguageModel.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("dtype", ["int8", "float99", "nn", "Tensor", "float8_e4m3fn", "float"])
def test_a_dtype_that_is_no_float_is_refused(tmp_path, dtype):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"dtype={dtype}: .*float32"):
        LanguageModel.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny, tmp_path, device):
    save(tiny("llama"), tmp_path)
    with pytest.raises(UserError, match=f"model.device={device}: torch sees no such device"):
        LanguageModel.load(tmp_path, device=device, dtype="float32")


@pytest.mark.parametrize("spoilt", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_files_that_cannot_be_read_are_refused(tiny, tmp_path, spoilt, how):
    save(tiny("llama"), tmp_path / "whole")
    LanguageModel.load(tmp_path / "whole", device="cpu")
    folder = tmp_path / "spoilt"
    shutil.copytree(tmp_path / "whole", folder)
    content = (folder / spoilt).read_bytes()
    (folder / spoilt).unlink()
    if how != "gone":
        (folder / spoilt).write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(UserError) as error:
        LanguageModel.load(folder, device="cpu")
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_longer_than_the_model_has_positions_is_refused_not_run(tiny, wrap, tokenizer, kind, facts):
    gpt2 = {"n_layer": 1, "n_embd": 32, "n_head": 4, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
    lm = tiny("llama", max_position_embeddings=64) if kind == "llama" else None
    lm = lm or wrap(GPT2Config(vocab_size=len(tokenizer), **gpt2))
    text = "so " * 70
    says = rf"the text '.*' \.\.\. is too long: \d+ tokens.* are more than the 64 positions of tiny-{kind}"
    fitting, space = lm.render("Who?"), 64 - len(lm.render("Who?").ids)
    assert replace(lm, max_new_tokens=space).replies([fitting])
    assert lm.score([lm.render("Who?", "", "Qi.")])
    for action in (
        lambda: lm.replies([fitting, lm.render(text)]),
        lambda: replace(lm, max_new_tokens=space + 1).replies([fitting]),
        lambda: lm.score([lm.render("Who?", "", text)]),
        lambda: lm.nll(["short", text]),
        lambda: record(lm, [lm.render("Who?", "", text)], Site(0)),
        lambda: batch(lm, ["short", text], "text"),
        lambda: FineTune(0, 0.1, 1).edit(lm, [replace(facts[0], query=text)]) if kind == "llama" else lm.nll([text]),
    ):
        with pytest.raises(UserError, match=says):
            action()
