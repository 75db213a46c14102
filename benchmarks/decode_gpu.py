"""Decoding on a GPU: this sampler beside its own steps launched one by one, and beside `generate` of transformers on the same card; where there is no GPU it says so.

All draw at temperature 1 and equally many tokens. `--shape` builds a model with random weights, for sizes whose weights are not at hand: what a token costs
does not depend on them. vLLM is not compared: it cannot change the residual stream row by row, and was not to be had on the card we measured on.
"""

from __future__ import annotations

from typing import Any

import torch
from common import OURS, Sides, arguments, finish, row, started
from decoding import QUESTION, attention, endless, generate, ours, prompts

from convergent.models.load import ChatModel, load_base, wrap
from convergent.sampling import graphs

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 48, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
}
"""SmolLM2-135M and Qwen2.5-14B."""


def of_shape(name: str, dtype: torch.dtype, like: ChatModel) -> ChatModel:
    """A Qwen2 of that size with random weights, made on the GPU."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SHAPES[name], max_position_embeddings=2048, tie_word_embeddings=name == "135M", dtype=dtype)
    torch.manual_seed(0)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model: Any = Qwen2ForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
    return wrap(model, like.tokenizer, "chat", name, f"random-{name}")


def one_by_one(model: ChatModel, answers: int, tokens: int, rows: int) -> float:
    """Tokens per second without replaying."""
    capture = graphs.Graphs._capture
    graphs.Graphs._capture = lambda self, key, step: None  # type: ignore[method-assign]
    try:
        return speed(model, answers, tokens, rows)
    finally:
        graphs.Graphs._capture = capture  # type: ignore[method-assign]


def speed(model: ChatModel, answers: int, tokens: int, rows: int) -> float:
    seconds, _, drawn = ours(model, [QUESTION], answers, tokens, rows)
    return drawn / seconds


def peer(model: ChatModel, answers: int, tokens: int, rows: int) -> float:
    """Tokens per second of `generate` in batches of `rows`."""
    total = drawn = 0.0
    with attention(model, "sdpa"):
        for _ in range(-(-answers // rows)):
            seconds, n = generate(model, prompts(model, [QUESTION], rows), tokens, stop=False)
            total, drawn = total + seconds, drawn + n
    return drawn / total


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--base", default="embedded", help="also where --shape takes its tokenizer from")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this size instead of --base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--answers", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    options = started(parser)
    name = f"decode_gpu_{options.shape or 'base'}_{options.dtype}"
    if not torch.cuda.is_available():
        finish(options, name, {name: row([], None, "transformers `generate`", "no GPU here")})
        return
    model = load_base(options.base, options.dtype, "cuda")
    if options.shape:
        model = of_shape(options.shape, getattr(torch, options.dtype), model)
    model = endless(model)
    work = (model, options.rows if options.quick else options.answers, 16 if options.quick else options.tokens, options.rows)
    for side in (speed, peer):  # kernels are compiled, libraries chosen
        side(model, options.rows, 4, options.rows)
    sides = {OURS: lambda: speed(*work), "steps launched one by one": lambda: one_by_one(*work), "generate, sdpa": lambda: peer(*work)}
    measured = Sides(sides).measure(options.repeats)
    rows = {
        name: row(measured.ratios(OURS, "generate, sdpa"), None, "transformers `generate`, sdpa", torch.cuda.get_device_name()),
        f"{name}_graphs": row(measured.ratios(OURS, "steps launched one by one"), None, "the same without CUDA graphs", torch.cuda.get_device_name()),
    }
    settings = {"rows": options.rows, "answers": work[1], "tokens": work[2], "dtype": options.dtype, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    finish(options, name, rows, measured, "tokens/s", settings=settings)


if __name__ == "__main__":
    main()
