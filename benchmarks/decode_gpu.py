"""Decoding on a GPU: this sampler beside its own steps launched one by one, `generate` of transformers and vLLM on the same card; where there is no GPU it says so.

All draw at temperature 1 and equally many tokens. `--shape` builds a model with random weights, for sizes whose weights are not at hand: what a token costs
does not depend on them. vLLM needs an environment of its own; CONVERGENT_VLLM_PYTHON names its Python. It cannot change the residual stream row by row, so it
is the yardstick for plain answers, not for a sweep.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from child import Child
from common import OURS, Sides, arguments, finish, row, started
from decoding import QUESTION, attention, endless, generate, ours, prompts

from convergent.models.load import ChatModel, load_base, wrap
from convergent.sampling import graphs

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 48, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
}
"""SmolLM2-135M, Qwen2.5-7B and Qwen2.5-14B."""
VLLM = "CONVERGENT_VLLM_PYTHON"


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


class Vllm:
    """vLLM with the same model, begun when it is first asked."""

    def __init__(self, model: ChatModel, random: bool, memory: float, dtype: str, answers: int, tokens: int, rows: int) -> None:
        self.model = model
        self.child: Child | None = None
        self.work = {"random": random, "memory": memory, "dtype": dtype, "answers": answers, "tokens": tokens, "rows": rows, "prompt": list(prompts(model, [QUESTION], 1)[0])}
        self.versions: dict[str, str] = {}

    def __call__(self) -> float:
        """Tokens per second."""
        if self.child is None:
            if VLLM not in os.environ:
                raise RuntimeError(f"{VLLM} names no Python that has vLLM")
            self.folder = tempfile.TemporaryDirectory()
            self.model.tokenizer.save_pretrained(self.folder.name)
            (self.model.model.config if self.work["random"] else self.model.model).save_pretrained(self.folder.name)
            self.child = Child("vllm_peer.py", [], {**self.work, "model": self.folder.name}, os.environ[VLLM])
            self.versions = self.child.versions
            self.child.ask({})  # kernels are compiled
        found = self.child.ask({})
        return float(found["tokens"] / found["seconds"])

    def end(self) -> None:
        if self.child is not None:
            self.child.end()


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--base", default="embedded", help="also where --shape takes its tokenizer from")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this size instead of --base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--answers", type=int, default=2048)
    parser.add_argument("--vllm-memory", type=float, default=0.4, help="share of the GPU's memory that vLLM takes")
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
    vllm = Vllm(model, bool(options.shape), options.vllm_memory, options.dtype, *work[1:])
    sides = {OURS: lambda: speed(*work), "steps launched one by one": lambda: one_by_one(*work), "generate, sdpa": lambda: peer(*work), "vLLM": vllm}
    measured = Sides(sides).measure(options.repeats)
    vllm.end()
    rows = {
        name: row(measured.ratios(OURS, "generate, sdpa"), None, "transformers `generate`, sdpa", torch.cuda.get_device_name()),
        f"{name}_vllm": row(measured.ratios(OURS, "vLLM"), None, "vLLM", measured.failed.get("vLLM", torch.cuda.get_device_name())),
        f"{name}_graphs": row(measured.ratios(OURS, "steps launched one by one"), None, "the same without CUDA graphs", torch.cuda.get_device_name()),
    }
    settings = {"rows": options.rows, "answers": work[1], "tokens": work[2], "dtype": options.dtype, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    finish(options, name, rows, measured, "tokens/s", vllm.versions, settings)


if __name__ == "__main__":
    main()
