"""Seconds and memory of one edit, by QF or QF2, on the geometry of real models, with random weights: no download.

    python benchmarks/edit_speed.py qwen2.5-1.5b                  # on a CPU: about 4 GB of memory
    python benchmarks/edit_speed.py qwen2.5-1.5b --editor qf2     # its layer run as a firing block
    python benchmarks/edit_speed.py qwen2.5-1.5b qwen2.5-7b       # on a GPU (bfloat16)

Prints one line per model: seconds to record both passes, to solve (QF: a least-norm system; QF2: outer products) in float64, and to
write and restore the weight (medians of `--repeat` edits, the first left out), tokens of both passes, and peak memory, as
`qfbench experiment=cost` measures them. It also checks that weights come back bit for bit.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qfbench import LanguageModel
from qfbench.editors import QF, QF2
from qfbench.facts.world import world
from qfbench.models.firing import with_firing_layers
from qfbench.tasks.cost import PARTS, machine, timed
from qfbench.world.tokenizer import train_tokenizer

# hidden, intermediate, layers, heads, key-value heads, vocabulary, edited layer
GEOMETRY = {
    "tiny": (64, 192, 4, 4, 2, 4096, 2),  # to try a script
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, 20),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, 23),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, 23),
}


def load(name: str, device: str, dtype: torch.dtype) -> tuple[LanguageModel, int]:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, layer = GEOMETRY[name]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=hidden < 3000,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return LanguageModel(model, train_tokenizer(), name), layer


def measure(lm: LanguageModel, layer: int, fires: bool, repeat: int) -> dict[str, float]:
    """Medians over edits, of what `qfbench.tasks.cost.timed` gives."""
    if fires:
        lm.model = with_firing_layers(lm.model, [layer])
    editor, facts = QF2(layer, lr=4e-4) if fires else QF(layer), world(repeat + 1)
    weight = editor.sites[0].linear(lm.model).weight
    before = weight.clone()
    edits = pd.DataFrame([timed(lm, editor, fact) for fact in facts][1:])
    assert torch.equal(weight, before), "the weight did not come back bit for bit"
    return edits.median().to_dict() | {"peak_gib": edits.peak_gib.max()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", choices=GEOMETRY)
    parser.add_argument("--editor", default="qf", choices=("qf", "qf2"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    for name in args.models:
        lm, layer = load(name, args.device, getattr(torch, args.dtype))
        found = measure(lm, layer, args.editor == "qf2", args.repeat)
        parts = "  ".join(f"{part} {found[part]:.4f} s" for part in PARTS)
        print(
            f"{args.editor} {name} ({machine(lm)}, {args.dtype}): {parts}  {found['tokens']:.0f} tokens  "
            f"peak {found['peak_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()
