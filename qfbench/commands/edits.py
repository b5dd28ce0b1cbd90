"""The command `qfbench-edits`: keep edits in a folder; list, apply, undo, compare and ask them, also on a page; hand them on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console

from qfbench.analysis.tables import console, show
from qfbench.commands import show_all
from qfbench.commands.library import composed
from qfbench.commands.merge import merge
from qfbench.commands.page import Server, Talk, prior_questions
from qfbench.commands.run import quiet, with_own_settings
from qfbench.commands.settings import CONF, build, check
from qfbench.editors.edits import FILE, Edits
from qfbench.errors import UserError
from qfbench.models import lora
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.tasks.run import load

SHOWN = 3  # singular values of a matrix


def teach(args: argparse.Namespace, out: Console) -> None:
    """New edits, or further facts for those that are there: by the same editor, to the same model."""
    there, cfg = given(args)
    if there:
        before = Edits.load(args.folder)
        edits = before.more(before.source.load(), build(cfg, "facts"))
    else:
        edits = Edits.teach(load(cfg.model), build(cfg, "editor"), build(cfg, "facts"))
    edits.save(args.folder)
    say(out, f"{args.folder}: {len(edits.facts)} facts by {name_of(edits)}")


def given(args: argparse.Namespace) -> tuple[bool, DictConfig]:
    """Whether the folder has edits, and the settings of the command line, which may not choose what those have already."""
    there = (Path(args.folder) / FILE).exists()
    fixed = [word for word in args.settings if word.startswith(("model", "editor", "facts@editor"))]
    if there and fixed:
        raise UserError(f"{args.folder} has edits already, with their model and editor; leave out {' '.join(fixed)}")
    cfg = composed(*with_own_settings(args.settings))
    check(cfg)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    return there, cfg


def list_facts(args: argparse.Namespace, out: Console) -> None:
    edits = Edits.load(args.folder)
    show(out, facts_of(edits), f"{len(edits.facts)} facts by {edits.editor!r}, on {edits.source.name}")


def facts_of(edits: Edits) -> pd.DataFrame:
    """A line a fact: its place in the order, id, query, answer, editor, and the norm of the change that it brought."""
    lines = [
        {"order": n, "id": f.id, "query": f.query, "answer": f.answer, "editor": name_of(edits), "norm": c.norm()}
        for n, (f, c) in enumerate(zip(edits.facts, edits.changes, strict=True), 1)
    ]
    return pd.DataFrame(lines, columns=["order", "id", "query", "answer", "editor", "norm"])


def apply(args: argparse.Namespace, out: Console) -> None:
    """What the model with the edits replies to what it was taught; with `--replay` another model, which is taught the same."""
    edits = Edits.load(args.folder)
    if args.replay:
        if not args.model:
            raise UserError("--replay: needs --model MODEL, the model to teach the facts to")
        lm = another(args.model)
        edits = Edits.teach(lm, edits.editor, edits.facts)
        say(out, f"taught {len(edits.facts)} facts again, in order, by {name_of(edits)} to {lm.name}")
    else:
        lm = edits.source.load(args.model)
    if args.to:
        edits.save(args.to)
        say(out, f"wrote {args.to}")
    with edits.applied_to(lm):
        replies = lm.replies([lm.render(fact.query) for fact in edits.facts])
    said = [
        {
            "id": fact.id,
            "query": fact.query,
            "reply": reply.text,
            "right": "yes" if fact.edit.passes(reply.text) else "no",
        }
        for fact, reply in zip(edits.facts, replies, strict=True)
    ]
    right = sum(line["right"] == "yes" for line in said)
    show(out, pd.DataFrame(said, columns=["id", "query", "reply", "right"]), f"{right} of {len(said)} facts answered")


def another(model: str) -> LanguageModel:
    """A model by the name of its settings, or by its path alone."""
    if (CONF / "model" / f"{model}.yaml").exists():
        return load(composed(f"model={model}").model)
    own = composed("model=own").model
    own.update({"path": model, "layer": 0, "layers": ""})  # which would be looked up in its folder
    return load(own)


def undo(args: argparse.Namespace, out: Console) -> None:
    edits = Edits.load(args.folder)
    left = edits.without(edits.source.load(args.model), args.ids)
    left.save(args.folder)
    first = min([fact.id for fact in edits.facts].index(id) for id in args.ids)
    if edits.editor.sees_all:
        what = f"taught again by {name_of(edits)}: all {len(left.facts)}, since what it keeps depends on them"
    elif again := len(left.facts) - first:
        what = f"taught again by {name_of(edits)}, in order: {again} after them"
    else:
        what = "nothing had to be taught again"
    say(out, f"{args.folder}: {len(left.facts)} facts, as if {', '.join(args.ids)} had never been taught; {what}")


def hand_over(args: argparse.Namespace, out: Console) -> None:
    edits = Edits.load(args.folder)
    lm = edits.source.load(args.model)
    merge(edits, lm, Path(args.to), f"qfbench-edits {args.folder} merge {args.to}")
    say(out, f"wrote {args.to}: {lm.name} with {len(edits.facts)} facts, as an ordinary model")


def diff(args: argparse.Namespace, out: Console) -> None:
    edits = Edits.load(args.folder)
    show(out, matrices(edits.total, edits), "What changed, by matrix")
    by_fact = facts_of(edits)[["order", "id", "query", "norm"]]
    sizes = [sum(edits.sizes[name] ** 2 for name in change.changes) ** 0.5 for change in edits.changes]
    by_fact["relative"] = [norm / size for norm, size in zip(by_fact.norm, sizes, strict=True)]
    show(out, by_fact, "What changed, by fact")


def matrices(delta: WeightDelta, edits: Edits) -> pd.DataFrame:
    """A line a changed matrix: norms are Frobenius norms, `relative` to the matrix before; the rank is numerical."""
    lines = []
    for name, change in delta.changes.items():
        near = change.truncated()
        top = change.singular_values()[:SHOWN].tolist()
        line = {"matrix": name, "norm": change.norm(), "relative": change.norm() / edits.sizes[name], "rank": near.rank}
        lines.append(line | {"largest singular values": ", ".join(f"{value:.3g}" for value in top)})
    return pd.DataFrame(lines)


def ask(args: argparse.Namespace, out: Console) -> None:
    questions = args.questions or [line.strip() for line in sys.stdin if line.strip()]
    if not questions:
        raise UserError("ask: give questions, or one a line on standard input")
    edits = Edits.load(args.folder)
    lm = edits.source.load(args.model)
    prompts = [lm.render(question) for question in questions]
    before = [reply.text for reply in lm.replies(prompts)]
    with edits.applied_to(lm):
        after = [reply.text for reply in lm.replies(prompts)]
    show(out, pd.DataFrame({"question": questions, "before": before, "after": after}), "")


def page(args: argparse.Namespace, out: Console) -> None:
    """Serve the page until Ctrl-C. A folder without edits begins with none."""
    there, cfg = given(args)
    taught = [word for word in args.settings if word.startswith(("facts", "edits")) and not word.startswith("facts@")]
    if taught:
        raise UserError(f"page: facts are taught on the page, or by `teach`; leave out {' '.join(taught)}")
    if args.prior:
        prior_questions("", args.prior)  # what cannot be read is found before anything is written
    if there:
        edits = Edits.load(args.folder)
        lm = edits.source.load(args.model)
    elif args.model:
        raise UserError(f"--model: is for edits that are there, and {args.folder} has none; give model=... instead")
    else:
        lm = load(cfg.model)
        edits = Edits.teach(lm, build(cfg, "editor"), [])
        edits.save(args.folder)
    with Server(Talk(args.folder, lm, edits, prior_questions(lm.name, args.prior)), args.port) as server:
        say(out, f"{args.folder}: {len(edits.facts)} facts by {name_of(edits)}, on {server.url} (Ctrl-C ends it)")
        # Not in this thread: Ctrl-C may get lost where it serves, in what Python cleans up meanwhile.
        serving = Thread(target=server.serve_forever, daemon=True)
        serving.start()
        with suppress(KeyboardInterrupt):
            serving.join()
        server.shutdown()


def to_peft(args: argparse.Namespace, out: Console) -> None:
    edits = Edits.load(args.folder)
    if not edits.changes:
        raise UserError(f"{args.folder}: there are no facts, and an adapter of nothing is none")
    cut = lora.write(edits.total, Path(args.to), edits.source.name, args.rank)
    lines = [{"matrix": name, "cut off": f"{share:.2g}"} for name, share in cut.items() if name]
    show(out, pd.DataFrame(lines), "What the rank cuts off: ‖ΔW − BA‖ / ‖ΔW‖")
    say(out, f"wrote {args.to}: a LoRA adapter of {len(lines)} matrices; cut off in all: {cut['']:.2g}")


def name_of(edits: Edits) -> str:
    return type(edits.editor).__name__


def say(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="qfbench-edits", description="Edits in a folder: keep, list, apply, undo, compare, ask, and hand them on."
    )
    top.add_argument("folder", metavar="FOLDER", help="where the edits are: of `teach`, or of qfbench.edit(...).save")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], about: str, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("--model", help="where the edited model is now, if not where it was")
        return sub

    sub = command("teach", teach, "teach facts, the first or further ones, and keep the edits", model=False)
    sub.add_argument(
        "settings", nargs="*", metavar="SETTING", help="as for qfbench: model=... editor=... facts=table facts.path=..."
    )
    command("list", list_facts, "the facts, in the order of teaching", model=False)
    sub = command("apply", apply, "check that the edits fit the model, and ask it what it was taught")
    sub.add_argument(
        "--replay", action="store_true", help="teach the facts to --model, another one, by the same editor"
    )
    sub.add_argument("--to", metavar="DIR", help="keep these edits in the folder DIR")
    sub = command("undo", undo, "take facts out again, as if they had never been taught")
    sub.add_argument("ids", nargs="+", metavar="ID")
    sub = command("merge", hand_over, "write the edited model as an ordinary Hugging Face folder")
    sub.add_argument("to", metavar="DIR")
    command("diff", diff, "what changed: by matrix, and by fact", model=False)
    sub = command("ask", ask, "replies before and after, side by side")
    sub.add_argument("questions", nargs="*", metavar="QUESTION", help="none: one a line from standard input")
    sub = command("page", page, "a page of this machine's own, to teach, undo and ask by hand")
    sub.add_argument(
        "settings", nargs="*", metavar="SETTING", help="where there are no edits: model=... editor=..., as for qfbench"
    )
    sub.add_argument(
        "--port", type=int, default=8765, help="of this machine; 0: any that is free (default: %(default)s)"
    )
    sub.add_argument("--prior", metavar="FILE", help="questions that should stay as they are answered, one a line")
    sub = command("to-peft", to_peft, "write a LoRA adapter for peft", model=False)
    sub.add_argument("to", metavar="DIR")
    sub.add_argument("--rank", type=int, help="of each matrix at most; by default what it has")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = parser().parse_args(arguments)
    show_all()
    quiet()
    try:
        args.run(args, console())
    except (UserError, FloatingPointError) as error:
        print(f"qfbench-edits: {error}", file=sys.stderr)
        sys.exit(2)
