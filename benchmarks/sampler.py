"""Decode speed: this sampler beside `generate` of transformers, on the same work in one run.

Both answer the same questions with the embedded model in float32, the same number of new tokens each, sampling at temperature 1. Order alternates over the repeats;
the machine's own line is the GEMM rate measured in the same run divided by the floating-point work of a token. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from convergent.core.values import Condition, Question, Sampling
from convergent.models.load import ChatModel, load_base
from convergent.sampling.lane import Tally
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample
from convergent.study.results import machine, versions


def ours(model: ChatModel, rows: int, new_tokens: int) -> float:
    """Tokens per second; no stop token, so that both sides draw equally many."""
    import dataclasses

    endless = dataclasses.replace(model, stop_ids=frozenset())
    question = Question("q", ("What would you do with a free afternoon?",))
    condition = Condition("bench", "chat", model.content_id, (), Sampling(1.0, 1.0, new_tokens))
    tally = Tally()
    start = time.perf_counter()
    sample(endless, make_requests([condition], [question], rows, 0), n_rows=rows, tally=tally)
    return tally.tokens / (time.perf_counter() - start)


def generate(model: ChatModel, rows: int, new_tokens: int) -> float:
    """transformers' own batched generation."""
    from convergent.models.chat import encode_prompt

    ids = torch.tensor([encode_prompt(model.tokenizer, "What would you do with a free afternoon?")] * rows)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.inference_mode():
        model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, pad_token_id=model.tokenizer.eos_token_id,
        )  # fmt: skip
    return rows * new_tokens / (time.perf_counter() - start)


def line(model: ChatModel, rows: int) -> float:
    """Tokens per second if every linear layer ran at the GEMM rate of this machine and nothing else cost anything."""
    seconds = 0.0
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            x = torch.ones(rows, module.in_features)
            torch.nn.functional.linear(x, module.weight)
            start = time.perf_counter()
            torch.nn.functional.linear(x, module.weight)
            seconds += time.perf_counter() - start
    return rows / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = load_base(dtype="float32")
    results: dict[str, list[float]] = {"ours": [], "generate": [], "line": []}
    sides = {"ours": ours, "generate": generate}
    for repeat in range(options.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            results[name].append(sides[name](model, options.rows, options.tokens))
        results["line"].append(line(model, options.rows))
    ratios = [a / b for a, b in zip(results["ours"], results["generate"], strict=True)]
    shares = [a / b for a, b in zip(results["ours"], results["line"], strict=True)]
    for name, values in results.items():
        print(f"{name:9s} {statistics.median(values):7.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})")
    print(f"ours / generate: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {options.rows} rows x {options.tokens} tokens, n = {options.repeats}")
    print(f"ours / GEMM line: {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
    record = {"claim": "decode", "rows": options.rows, "tokens": options.tokens, "ratios": ratios, "share_of_line": shares, "machine": machine(), "python": platform.python_version()}
    print(json.dumps({**record, "versions": versions()}))


if __name__ == "__main__":
    main()
