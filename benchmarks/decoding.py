"""Shared by the decoding benchmarks: the work, this project's sampler and transformers' `generate` on it, and the machine's line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from convergent.core.values import Condition, Question, Sampling
from convergent.data.questions import load_questions
from convergent.models.chat import encode_prompt
from convergent.models.dtype import WORTH_IT, bf16_speedup
from convergent.models.lanes import in_lanes, lanes_on
from convergent.models.load import ChatModel
from convergent.models.products import laid_out, product_of
from convergent.sampling.lane import Tally
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample

QUESTION = Question("q", ("What would you do with a free afternoon?",))


def one_wording() -> tuple[Question, ...]:
    """The eight open questions in one wording each, as peers ask them: with all four, ours would read four times as many prompts."""
    return tuple(dataclasses.replace(q, paraphrases=q.paraphrases[:1]) for q in load_questions("open_eight"))


def endless(model: ChatModel) -> ChatModel:
    """The same without stop tokens, so that every side draws equally many tokens."""
    return dataclasses.replace(model, stop_ids=frozenset())


def ours(model: ChatModel, questions: Sequence[Question], per_question: int, new_tokens: int, n_rows: int, root_seed: int = 0) -> tuple[float, int, int]:
    """(seconds, answers, tokens) of this project's sampler at temperature 1."""
    condition = Condition("bench", "chat", model.content_id, (), Sampling(1.0, 1.0, new_tokens))
    requests = list(make_requests([condition], questions, per_question, root_seed))
    tally = Tally()
    start = time.perf_counter()
    answers = sample(model, requests, n_rows=n_rows, tally=tally)
    return time.perf_counter() - start, len(answers), sum(len(a.token_ids) for a in answers)


def per_token(short: tuple[float, int], long: tuple[float, int]) -> float:
    """Seconds of one more token, of the (seconds, tokens) of two runs on the same prompts: what both do before, as reading the prompts, falls out."""
    return (long[0] - short[0]) / (long[1] - short[1])


def prompts(model: ChatModel, questions: Sequence[Question], per_question: int) -> list[tuple[int, ...]]:
    """Token ids of the same requests, shortest prompt first."""
    requests = make_requests([Condition("bench")], questions, per_question, 0)
    return sorted((encode_prompt(model.tokenizer, r.question, r.system) for r in requests), key=len)


def left_padded(batch: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, longest) token ids and attention mask."""
    longest = max(map(len, batch))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
    return ids, mask


def generate(model: ChatModel, batch: Sequence[Sequence[int]], new_tokens: int, stop: bool, **settings: Any) -> tuple[float, int]:
    """(seconds, tokens up to the stop) of one call of transformers' own generation, sampling from the whole distribution."""
    pad = model.tokenizer.eos_token_id
    ids, mask = (t.to(model.device) for t in left_padded(batch, pad))
    stops = sorted(model.stop_ids) if stop else None
    forced = {} if stop else {"min_new_tokens": new_tokens}
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=stops or pad,
            **forced, **settings,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    return seconds, sum(_until_stop(r, set(stops or ())) for r in out[:, ids.shape[1] :].tolist())


def _until_stop(row: Sequence[int], stops: set[int]) -> int:
    return next((i for i, token in enumerate(row) if token in stops), len(row))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate, sdpa": ("sdpa", {}),
    "generate, eager": ("eager", {}),
    "generate, static cache, sdpa": ("sdpa", {"cache_implementation": "static"}),
    "generate, static cache, eager": ("eager", {"cache_implementation": "static"}),
}
"""What a user of `generate` can choose on a CPU: attention and cache."""


@contextmanager
def attention(model: ChatModel, name: str) -> Iterator[None]:
    """Run the body with transformers' attention `name`."""
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


def has_bf16() -> bool:
    """Whether bfloat16 is worth it here, by the project's own probe."""
    return bf16_speedup() >= WORTH_IT


NO_BF16 = "no bfloat16 worth using on this CPU"


def linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


def line(model: ChatModel, rows: int, passes: int = 3) -> float:
    """Tokens per second if every linear layer, in its own shape and the model's order, were all that a token costs (best of `passes`).

    By torch's own products and by those that are fastest on this machine (`models.products`), each of all rows on all threads and shared out over the cores:
    the best of the four counts.
    """
    n_lanes, _ = lanes_on(model.device)
    ways = [[rows], *([[(rows + i) // n_lanes for i in range(n_lanes)]] if 1 < n_lanes <= rows else [])]
    best = 0.0
    for products in (nullcontext(), laid_out(model.model)):
        with torch.inference_mode(), products:
            best = max(best, *(_of_products(model, shares, passes) for shares in ways))
    return best


@torch.inference_mode()
def torchs_line(model: ChatModel, rows: int, passes: int = 3) -> float:
    """The same by torch's own products of all rows on all threads: what a program that calls `linear` is given."""
    return _of_products(model, [rows], passes)


def _of_products(model: ChatModel, shares: Sequence[int], passes: int) -> float:
    layers = [(product_of(m), m.in_features, m.weight.dtype) for m in linears(model.model)]
    inputs = {(rows, width): torch.ones(rows, width, dtype=dtype) for rows in shares for _, width, dtype in layers}
    best = float("inf")

    def products(rows: int) -> None:
        for product, width, _ in layers:
            product(inputs[rows, width])

    for _ in range(passes):
        start = time.perf_counter()
        in_lanes(products, shares, model.device)
        best = min(best, time.perf_counter() - start)
    return sum(shares) / best


LINE = "linear layers alone"
CEILING = "what the linear layers alone would reach there in our side's dtype: no sampler on torch's products, MKL's or oneDNN's, passes it on this machine"


def suffix(dtype: str) -> str:
    """Of the names of a claim's rows: float32 is the plain one."""
    return "" if dtype == "float32" else f"_{dtype}"


def peak(model: ChatModel, size: int = 2048) -> float:
    """Tokens per second at the rate of a large square matrix product: the floating-point line, which no shape of this model can pass."""
    weight = linears(model.model)[0].weight
    a = torch.ones(size, size, dtype=weight.dtype)
    a @ a
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    per_token = sum(2 * m.weight.numel() for m in linears(model.model))
    return 2 * size**3 / best / per_token
