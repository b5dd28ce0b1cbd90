"""Train a built-in model from scratch: `python -m qfbench.world.train world-s --out FOLDER`.

Depth is made to mean something by random early exit: each batch applies the final norm and the head after a layer drawn
from `exit_from` to the last, so that answers are formed early and every later layer can hand them on. Trained without it,
such models copy names in their last layers only, and an edit anywhere else does nothing.

A run is a function of the recipe alone: text is generated from the step's number, and a checkpoint is written as it goes,
so a killed run started again with the same command continues and ends with the same weights (on the same machine and
number of threads).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qfbench.errors import UserError
from qfbench.models import checkpoint
from qfbench.world import corpus
from qfbench.world.tokenizer import END_OF_TEXT, TURN_END, TURN_START, train_tokenizer
from qfbench.world.world import World

POOL = 16  # batches generated together and sorted by length, so that little is padded


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. `lr` is the peak for matrices (Muon); vectors and embeddings take `adam_lr`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    exit_from: int  # fewest layers a batch may run through
    cycles: tuple[int, ...]  # steps of each rise and fall of the rate; text by `corpus.MIXTURE`, then `LATER_MIXTURE`
    batch: int = 128
    lr: float = 3e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.35  # the last part of a cycle, in which the rate falls linearly to zero
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(self.cycles)

    def at(self, step: int) -> tuple[int, int]:
        """The cycle that a step lies in, and the step's number within it."""
        for cycle, length in enumerate(self.cycles):
            if step < length:
                return cycle, step
            step -= length
        raise ValueError("past the last cycle")


RECIPES = {
    "world-xs": Recipe(hidden=96, layers=4, heads=4, kv_heads=2, intermediate=288, exit_from=2, cycles=(4000, 1600)),
    "world-s": Recipe(hidden=128, layers=8, heads=4, kv_heads=2, intermediate=384, exit_from=3, cycles=(4000, 2000)),
    "world-m": Recipe(
        hidden=160, layers=12, heads=5, kv_heads=5, intermediate=480, exit_from=4, cycles=(2300, 1200), decay_share=0.3
    ),
    # For a GPU: not shipped.
    "world-l": Recipe(
        hidden=512,
        layers=16,
        heads=8,
        kv_heads=4,
        intermediate=1536,
        exit_from=5,
        cycles=(8000, 3000),
        lr=1e-3,
        adam_lr=1e-3,
    ),
}


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def examples(
    world: World, tokenizer: PreTrainedTokenizerFast, n: int, rng: random.Random, mixture: Mapping[str, float]
) -> list[tuple[list[int], int]]:
    """`n` training texts as (token ids, position of the first token whose prediction is learnt)."""
    heads, tails = [], []
    for ability in rng.choices(list(mixture), weights=list(mixture.values()), k=n):
        if ability == "plain":
            heads.append("")
            tails.append(corpus.plain(world, rng) + END_OF_TEXT)
            continue
        d = corpus.ABILITIES[ability](world, rng)
        turns = (("system", d.system), ("user", d.query))
        heads.append(
            "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns) + f"{TURN_START}assistant\n"
        )
        tails.append(d.answer + TURN_END)
    # Cutting between a prompt and its answer is safe: the cut follows a line break, where the tokenizer cuts too.
    head_ids = tokenizer(heads, add_special_tokens=False).input_ids
    tail_ids = tokenizer(tails, add_special_tokens=False).input_ids
    return [(h + t, max(len(h), 1)) for h, t in zip(head_ids, tail_ids, strict=True)]


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All (ids, targets) of the recipe, each `[batch, longest]`, from step `start` on; targets are -100 where nothing is learnt."""
    world = World()
    pad = tokenizer.pad_token_id
    for pool in range(start // POOL, -(-recipe.steps // POOL)):
        rng = random.Random(f"train-{recipe.seed}-{pool}")
        mixture = corpus.MIXTURE if recipe.at(pool * POOL)[0] == 0 else corpus.LATER_MIXTURE
        texts = sorted(examples(world, tokenizer, POOL * recipe.batch, rng, mixture), key=lambda text: len(text[0]))
        groups = [texts[i : i + recipe.batch] for i in range(0, len(texts), recipe.batch)]
        rng.shuffle(groups)
        for group in groups[start - pool * POOL if pool == start // POOL else 0 :]:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), longest), pad)
            targets = torch.full((len(group), longest), -100)
            for row, (text, first) in enumerate(group):
                ids[row, : len(text)] = torch.tensor(text)
                targets[row, first - 1 : len(text) - 1] = torch.tensor(text[first:])
            yield ids, targets


def loss_at_exit(model: Qwen2ForCausalLM, ids: Tensor, targets: Tensor, layers: int) -> Tensor:
    """Mean cross-entropy (nats per learnt token) when the head reads after `layers` layers."""
    depth = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers  # the model runs its first `num_hidden_layers` layers, then its final norm
    try:
        # Padding stands at the right of causal attention: no mask is needed.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.config.num_hidden_layers = depth
    learnt = targets != -100
    return F.cross_entropy(model.lm_head(hidden[learnt]).float(), targets[learnt])


def rate(recipe: Recipe, step: int) -> float:
    """Share of the peak rate at a step: in each cycle a linear warm-up, a plateau, and a linear fall to zero."""
    cycle, step = recipe.at(step)
    length = recipe.cycles[cycle]
    falling = (length - step) / max(1, int(length * recipe.decay_share))
    return min(1.0, (step + 1) / recipe.warmup, falling)


def optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(name: str, recipe: Recipe, folder: Path, device: str = "cpu", every: int = 200) -> Path:
    """Train, or continue, in `folder`; returns the finished model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    model = build(recipe, tokenizer).to(device)  # type: ignore[arg-type] # transformers' wrapper of `to` is mistyped
    opts = optimizers(model, recipe)
    path, parameters, made_by = (
        folder / "checkpoint.safetensors",
        dict(model.named_parameters()),
        json.dumps(asdict(recipe)),
    )
    start = checkpoint.step_of(path, made_by)
    if start:
        checkpoint.restore(path, parameters, opts)
    clock, seen, smooth = time.monotonic(), 0, 0.0
    stream = batches(recipe, tokenizer, start)
    for step in range(start, recipe.steps):
        ids, targets = (t.to(device) for t in next(stream))
        layers = random.Random(f"exit-{recipe.seed}-{step}").randint(recipe.exit_from, recipe.layers)
        loss = loss_at_exit(model, ids, targets, layers)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss became {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, peak in zip(opts, (recipe.lr, recipe.adam_lr), strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * rate(recipe, step)
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += ids.numel()
        smooth = loss.item() if step == start else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = seen / (time.monotonic() - clock)
            print(f"{name} step {step + 1}/{recipe.steps} loss {smooth:.4f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            checkpoint.save(path, parameters, opts, step + 1, made_by)
    final = folder / name
    export(model, tokenizer, recipe, final)
    return final


def export(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, final: Path) -> None:
    """Write the model as an ordinary Hugging Face folder, in float16."""
    model.half().save_pretrained(final)
    tokenizer.save_pretrained(final)
    (final / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qfbench.world.train", description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the finished model")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; two are faster than many on small models"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        print("wrote", train(args.size, RECIPES[args.size], args.out, args.device))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
