"""How far asking a real model is from the least that it can take: the arithmetic of the tokens that must be run, at the speed
of a bare matrix product of the model's own shape.

    python benchmarks/floor.py MODEL            # smollm2-135m-instruct, say; one thread, float32, every reply new

Tokens that must be run: every prompt's through all layers, every reply's through all layers and the head.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from qfbench import LanguageModel
from qfbench.facts.everyday import everyday


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = LanguageModel.load(given.model, device="cpu", max_new_tokens=32)
    queries = [p.query for f in everyday(n=36, part="test", locality=0) for p in (f.edit, *f.probes)][: given.questions]
    prompts = [lm.render(query) for query in queries]
    matrix = lm.model.model.layers[0].mlp.down_proj.weight.detach()
    for size in given.batches:
        rows = torch.randn(size, matrix.shape[1])
        times = 200_000 // (size + 100)
        product = min(seconds(lambda r=rows, n=times: [linear(r, matrix) for _ in range(n)]) / times for _ in range(3))
        speed = 2 * size * matrix.numel() / product
        lm.states.__init__()  # type: ignore[misc] # nothing is known of earlier replies
        taken = seconds(lambda n=size: lm.answer(prompts, [], n))
        replies = lm.answer(prompts, [], size)[0]
        said = sum(len(lm.tokenizer(reply.text).input_ids) + reply.stopped for reply in replies)
        asked = sum(len(prompt.prompt) for prompt in prompts)
        head = lm.model.get_output_embeddings().weight.numel()
        inside = sum(p.numel() for p in lm.model.model.layers.parameters())
        work = 2 * (inside * (asked + said) + head * said)
        print(
            f"{size} at once: {asked} tokens of prompts, {said} of replies: {taken:.1f} s; "
            f"{work / 1e12:.2f} TFLOP at {speed / 1e9:.0f} GFLOP/s: {work / speed:.1f} s; {taken / (work / speed):.1f} times"
        )


if __name__ == "__main__":
    main()
