"""QFt: convert decoder layers into firing blocks, one after another (QF2 preprint, "QFt").

While a layer is converted, the share α of its stock form falls as `decay`^step and is 0 once below `cutoff`; the layer and
its neighbours train, all else is frozen.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.markup import escape
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer

from qfbench.analysis import plots
from qfbench.errors import UserError
from qfbench.models import checkpoint, difference
from qfbench.models.dialogue import Rendering
from qfbench.models.firing import with_firing_layers
from qfbench.models.lm import LanguageModel
from qfbench.models.loading import find
from qfbench.tasks.run import Run
from qfbench.tasks.solved import down_proj
from qfbench.tasks.texts import Texts
from qfbench.world.corpus import Dialogue


@dataclass(frozen=True)
class Conversion:
    """Everything but the text that decides the converted weights.

    Args:
        layers: the layers to convert, in this order.
        beta: β, the slope of the sigmoid.
        decay, cutoff: α = decay^step, and 0 once below the cutoff.
        neighbours: how many layers on either side train along.
        lr: of AdamW.
        steps: for each layer.
        cooldown: the share of the steps at the end in which the rate falls linearly to 0; the paper has none.
        loss: over the whole text (`text`, as the paper), or over the answer and the end of the turn (`answer`).
        distill: weight of the divergence from the base model on the texts that are to be kept; the paper has none.
        solved_on: begin with α = 0 and the `down_proj` that is nearest to the stock layer on the texts of so many steps
            (`solved.down_proj`); 0, as the paper: begin with the stock layer.
    """

    layers: Sequence[int]
    beta: float = 10.0
    decay: float = 0.99
    cutoff: float = 0.01
    neighbours: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.0
    steps: int = 12_000
    cooldown: float = 0.0
    loss: str = "text"
    distill: float = 0.0
    solved_on: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers={list(self.layers)}: a layer is named twice")
        for name, good in (
            ("beta", self.beta > 0),
            ("decay", 0 < self.decay < 1),
            ("cutoff", 0 < self.cutoff < 1),
            ("neighbours", isinstance(self.neighbours, int) and self.neighbours >= 0),
            ("weight_decay", self.weight_decay >= 0),
            ("lr", self.lr > 0),
            ("cooldown", 0 <= self.cooldown <= 1),
            ("distill", self.distill >= 0),
            ("solved_on", isinstance(self.solved_on, int) and self.solved_on >= 0),
            ("loss", self.loss in ("text", "answer")),
        ):
            if not good:
                raise UserError(f"{name}={getattr(self, name)}: out of range")
        if self.alpha(self.steps - 1) > 0:
            raise UserError(
                f"steps={self.steps}: α = {self.decay}^step is still above {self.cutoff} at the end; give more steps"
            )

    def alpha(self, step: int) -> float:
        if self.solved_on:
            return 0.0
        raw = self.decay**step
        return raw if raw >= self.cutoff else 0.0

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (self.steps - step) / max(1.0, self.cooldown * self.steps))


def convert(
    run: Run,
    conversion: Conversion,
    texts: Texts,
    keep: Texts | None = None,
    abilities: Callable[[LanguageModel], Mapping[str, float]] | None = None,
    save: str = "model",
    every: int = 100,
) -> None:
    """The task: convert the run's model, keep it in the run's folder, and measure it.

    Writes `checkpoint.safetensors` at every `every`-th step; a killed run, started again in the same folder,
    continues from it and ends with the same weights (on the same machine and number of threads).

    Args:
        keep: texts on which the converted model is to say what the base says (`Conversion.distill`).
        abilities: what to measure before and after: a function from the model to named shares.
        save: `model` writes a whole folder, `difference` only the tensors that changed.

    Raises:
        UserError: bad settings, or the folder holds another conversion.
        Unsupported: the model's family has no firing block.
        FloatingPointError: the loss is not finite.
    """
    if save not in ("model", "difference"):
        raise UserError(f"task.convert.save={save}: must be model or difference")
    if run.lm.dtype != torch.float32:
        raise UserError(f"model.dtype={run.lm.dtype}: conversion trains in float32; use model.dtype=float32")
    if len(run.lm.devices) > 1:
        raise UserError("conversion trains on one device, and model.device=balanced has spread the model over several")
    if (keep is None) != (conversion.distill == 0):
        raise UserError(
            f"task.convert.keep and conversion.distill={conversion.distill}: texts to keep need a weight above 0, and it them"
        )
    if every < 1:
        raise UserError(f"task.convert.every={every}: must be 1 or more")
    if save == "difference" and difference.base_of(find(run.lm.name)):
        raise UserError(f"{run.lm.name} is itself a difference, and no base for another; use task.convert.save=model")
    base, before = run.lm, abilities(run.lm) if abilities else {}
    converted, changed = train(run, conversion, texts, every, keep)
    source = find(base.name)
    stored = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype or torch.float32
    # A copy: what the base shares with it, buffers too, stays as it is.
    model: Any = copy.deepcopy(converted.model)
    model.to(stored)
    folder = run.folder / save
    if save == "difference":
        path = Path(base.name)
        local = (path / "config.json").exists() or path.is_file()  # elsewhere a relative path would mean another folder
        tensors = {name: model.get_parameter(name) for name in changed}
        difference.save(model, str(path.resolve()) if local else base.name, tensors, folder)
    else:
        model.save_pretrained(folder)
        # As its files have it: that of `base` has one template alone, whose date may stand still.
        whole = find(difference.base_of(source) or source)
        AutoTokenizer.from_pretrained(whole, trust_remote_code=False).save_pretrained(folder)
    recipe = {"base": base.name, **asdict(conversion)}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    run.console.print(f"converted model: [bold]{escape(os.path.relpath(folder))}[/bold]", soft_wrap=True)
    run.figure(plots.conversion(run.rows()), "conversion")
    if abilities:
        after = abilities(
            LanguageModel.load(
                folder,
                str(base.device),
                "float32",
                base.batch_size,
                base.max_new_tokens,
                plain=base.tokenizer.chat_template is None,
                template=base.template,
                told=base.told,
                preamble=base.preamble,
            )
        )
        frame = pd.DataFrame([{"model": base.name} | dict(before), {"model": "converted"} | dict(after)])
        run.table(frame, f"abilities before and after: {base.name}, layers {list(conversion.layers)}")


def train(
    run: Run, conversion: Conversion, texts: Texts, every: int, keep: Texts | None = None
) -> tuple[LanguageModel, dict[str, Tensor]]:
    """The converted model, α = 0 throughout, and the parameters that trained, by name. Logs a row per step."""
    model = with_firing_layers(run.lm.model, conversion.layers, conversion.beta, alpha=1.0)
    lm = replace(run.lm, model=model)
    path, recipe = run.folder / "checkpoint.safetensors", json.dumps(asdict(conversion))
    windows = [_window(lm, layer, conversion.neighbours) for layer in conversion.layers]
    touched = {name: p for window in windows for name, p in window.items()}
    for p in touched.values():
        p.data = p.data.clone()  # the base, which shared it until here, stays as it is
    done = checkpoint.step_of(path, recipe)
    if done:
        checkpoint.restore(path, touched, [])
    run.store.recover(lambda row: row["task"] == run.task and row["step"] < done)
    with run.progress(len(conversion.layers) * conversion.steps - done) as advance:
        for phase, layer in enumerate(conversion.layers):
            first, block = phase * conversion.steps, model.model.layers[layer]
            block.alpha = 0.0
            if done >= first + conversion.steps:
                continue
            trained = list(windows[phase].values())
            opt = torch.optim.AdamW(trained, lr=conversion.lr, weight_decay=conversion.weight_decay)
            if done > first:
                checkpoint.restore(path, touched, [opt])
            elif conversion.solved_on:
                steps = range(first, first + conversion.solved_on)
                seen = ([rendered(lm, text) for text in (*texts(at), *(keep(at) if keep else ()))] for at in steps)
                block.mlp.down_proj.weight.data.copy_(down_proj(run.lm, lm, layer, seen))
            for p in trained:
                p.requires_grad_(True)
            for step in range(max(0, done - first), conversion.steps):
                block.alpha, opt.param_groups[0]["lr"] = conversion.alpha(step), conversion.rate(step)
                loss = text_loss(lm, *batch(lm, texts(first + step), conversion.loss))
                about = {"lr": conversion.rate(step), "step": first + step, "layer": layer}
                total = loss
                if keep:
                    apart = divergence(run.lm, lm, *batch(lm, keep(first + step), "text"))
                    total, about["divergence"] = loss + conversion.distill * apart, apart.item()
                if not torch.isfinite(total):
                    raise FloatingPointError(f"layer {layer}: the loss became {total.item()} at step {step}")
                total.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                opt.step()
                opt.zero_grad(set_to_none=True)
                state = f"layer {layer}: α {block.alpha:.2f}, loss {loss.item():.3f}"
                run.log({"alpha": block.alpha, "loss": loss.item()} | about)
                if (step + 1) % every == 0 or step + 1 == conversion.steps:
                    run.store.flush()
                    checkpoint.save(path, touched, [opt], first + step + 1, recipe)
                    if not run.console.is_terminal:  # a log file shows no progress bar
                        run.console.print(f"{first + step + 1} steps: {state}")
                advance(state)
            for p in trained:
                p.requires_grad_(False)
    return lm, touched


def batch(lm: LanguageModel, texts: Sequence[Dialogue | str], loss: str) -> tuple[Tensor, Tensor]:
    """Token ids and targets of the texts, each `[texts, longest]`; targets are -100 where nothing is learnt."""
    rows = []
    for text in texts:
        r = rendered(lm, text)
        # ".\n" may be one token
        first, end = (
            (1, len(r.ids)) if loss == "text" or isinstance(text, str) else (r.answer, min(r.closer + 1, len(r.ids)))
        )
        rows.append((r.ids, first, end))
    lm.check_lengths([ids for ids, _, _ in rows])
    longest = max(len(ids) for ids, _, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for row, (ids, first, end) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, first - 1 : end - 1] = torch.tensor(ids[first:end])
    return tokens.to(lm.device), targets.to(lm.device)


def rendered(lm: LanguageModel, text: Dialogue | str) -> Rendering:
    """A dialogue as tokens; of plain text all but its first token is an answer."""
    if not isinstance(text, str):
        return lm.render(text.query, text.system, text.answer)
    ids, stop = lm.tokenizer(text).input_ids, lm.tokenizer.eos_token_id
    ids += [] if stop is None or ids[-1:] == [stop] else [stop]  # some tokenizers end each text themselves
    return Rendering(tuple(ids), 1, 1, len(ids) - 1, ())


def text_loss(lm: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, nats per learnt token."""
    learnt = targets != -100
    return F.cross_entropy(_logits(lm, ids, learnt), targets[learnt])


def divergence(base: LanguageModel, lm: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of what `lm` expects from what `base` does, nats per learnt token."""
    learnt = targets != -100
    with torch.no_grad():
        stock = _logits(base, ids, learnt).log_softmax(-1)
    return F.kl_div(_logits(lm, ids, learnt).log_softmax(-1), stock, reduction="batchmean", log_target=True)


def _logits(lm: LanguageModel, ids: Tensor, at: Tensor) -> Tensor:
    # Padding stands at the right of causal attention: no mask is needed.
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.device.type == "cuda"):
        hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits: Tensor = lm.model.get_output_embeddings()(hidden[at])
    return logits.float()


def _window(lm: LanguageModel, layer: int, neighbours: int) -> dict[str, Tensor]:
    """The parameters that train while a layer is converted, by name."""
    prefixes = tuple(f"model.layers.{i}." for i in range(layer - neighbours, layer + neighbours + 1))
    return {name: p for name, p in lm.model.named_parameters() if name.startswith(prefixes)}
