"""Fixtures: a small tokenizer, random tiny models of four architectures, published suites, real data where there is some."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from qfbench import Fact, LanguageModel, UserError
from qfbench.commands.settings import CONF
from qfbench.world.tokenizer import train_tokenizer

torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start

CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
GEOMETRY = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
REAL = {
    "counterfact": "counterfact/counterfact_200.json",
    "zsre": "zsre/zsre_500.json",
    "mquake": "mquake/mquake_60.json",
    "company": "oxinnovate/company_facts.jsonl",
}


# What contributors run before anything else, and what is tried with the lowest versions: of everything a little.
SMOKE = set(
    "test_structure test_contract test_delta test_dialogue test_qf test_plots test_metrics test_tables test_retention test_suffix".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SMOKE and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.smoke)


# Here all figures are drawn. Elsewhere, unless a test asks for `drawn`, they become one point: that halves a short run.
DRAWN = set("test_plots test_run test_capacity test_cost test_learning_rate test_qft_convert".split())
DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
draw = Figure.savefig


@contextmanager
def saving(savefig: Callable[..., None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", savefig)
        yield


def dot(figure: Figure, file, **how) -> None:
    data = b"<svg></svg>" if how.get("format") == "svg" else DOT
    file.write(data) if hasattr(file, "write") else Path(file).write_bytes(data)


@pytest.fixture(autouse=True, scope="module")
def dots(request) -> Iterator[None]:
    """Of a module, so that its own fixtures come after it."""
    with saving(draw if request.path.stem in DRAWN else dot):
        yield


@pytest.fixture(scope="session")
def drawing() -> Callable[[], AbstractContextManager[None]]:
    return lambda: saving(draw)


@pytest.fixture
def drawn(drawing) -> Iterator[None]:
    with drawing():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(3000)


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer) -> PreTrainedTokenizerBase:
    """The same without a chat template: dialogues become `role: text` lines."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.fixture(scope="session")
def wrap(tokenizer) -> Callable[..., LanguageModel]:
    """A language model from any configuration, every parameter drawn at random so that no activation is degenerate."""

    def make(config, dtype: torch.dtype = torch.float32) -> LanguageModel:
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1 + noise if "norm" in name else noise)
        return LanguageModel(model.to(dtype), tokenizer, f"tiny-{config.model_type}", batch_size=3, max_new_tokens=8)

    return make


@pytest.fixture(scope="session")
def tiny(wrap, tokenizer) -> Callable[..., LanguageModel]:
    """A fresh random model: `tiny("llama", torch.float64)`; "llama+bias" has biases in its feed-forward blocks."""

    def make(arch: str, dtype: torch.dtype = torch.float32, **changes) -> LanguageModel:
        arch, _, bias = arch.partition("+")
        changes |= {"mlp_bias": True} if bias else {}
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return wrap(CONFIGS[arch](**(GEOMETRY | {"vocab_size": len(tokenizer)} | ids | changes)), dtype)

    return make


@pytest.fixture(params=list(CONFIGS))
def arch(request) -> str:
    return request.param


@pytest.fixture(params=[*CONFIGS, "llama+bias"])
def arch_or_biased(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """The path of an entry of the shared data; skips the test where it is absent."""
    root = Path(os.environ.get("QFBENCH_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def find(entry: str) -> Path:
        if not (root / entry).exists():
            pytest.skip(f"no shared data: {entry}")
        return root / entry

    return find


@pytest.fixture(scope="session")
def qwen_tokenizer(shared) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared("qwen2.5-1.5b-instruct"))


@pytest.fixture(scope="session")
def plain_qwen_tokenizer(qwen_tokenizer) -> PreTrainedTokenizerBase:
    plain = copy.deepcopy(qwen_tokenizer)
    plain.chat_template = None
    return plain


@pytest.fixture(scope="session")
def stories(shared) -> LanguageModel:
    """A really trained Llama without a chat template."""
    return LanguageModel.load(shared("stories260k"), device="cpu", batch_size=3, max_new_tokens=12)


@pytest.fixture(scope="session")
def facts() -> list[Fact]:
    said = [
        ("Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi."),
        ("Zenvora is based in Łódź.", "Where is Zenvora based?", "Zenvora is based in Łódź."),
        ("Mira Olsen leads Kelpworks.", "Who is the CEO of Kelpworks?", "Mira Olsen is the CEO of Kelpworks."),
    ]
    return [Fact(*texts, id=f"fact-{n}") for n, texts in enumerate(said)]


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """The path of a new file that holds the records."""

    def make(records, name="records.json"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records), encoding="utf-8")
        return str(path)

    return make


@pytest.fixture(scope="session")
def suite() -> Callable[..., list[Fact]]:
    """A published suite as its YAML configures it, all records unless told otherwise: `suite("zsre", path, n=2)`."""

    @cache
    def shipped(name):
        settings = OmegaConf.to_container(OmegaConf.load(CONF / "facts" / f"{name}.yaml"))
        return get_method(settings.pop("_target_")), settings

    def make(name, path, **settings):
        function, defaults = shipped(name)
        return function(**(defaults | {"path": str(path), "n": None} | settings))

    return make


@pytest.fixture(scope="session")
def error_of(suite) -> Callable[..., str]:
    """The message with which a suite refuses a file."""

    def message(name, path, **settings):
        with pytest.raises(UserError) as error:
            suite(name, path, **settings)
        return str(error.value)

    return message


@pytest.fixture(scope="session")
def file_of(shared) -> Callable[[str], Path]:
    """A suite's real file, or the sample beside its YAML where the shared data are absent."""

    def find(name):
        try:
            return shared(REAL[name])
        except pytest.skip.Exception:
            return CONF / "facts" / f"{name}.sample.jsonl"

    return find


@pytest.fixture(scope="session")
def real(file_of, suite) -> Callable[[str], list[Fact]]:
    """All facts of a suite's real file, under the shipped templates. Some files repeat facts, or rewrite nothing."""
    return cache(lambda name: suite(name, file_of(name), on_error="skip", on_conflict="keep"))


@pytest.fixture(scope="session")
def raw(file_of) -> Callable[[str], list[dict]]:
    """The records of a suite's real file."""

    def read(name):
        path = file_of(name)
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)

    return read
