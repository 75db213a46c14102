"""How the sampler's cost grows: with answers, with conditions at constant answers, with context, and with model size (share of the machine's line).

    answers      seconds per answer of one question, 64 to 4,096, batch 64, without reading its prompt: 0.9 to 1.1 is linear
    conditions   seconds for the same answers under 1 to 64 conditions (another Add each, at one layer): 0.85 and above is flat
    context      seconds per token of 64 rows behind prompts of 64 to 1,024 tokens
    model size   a tiny model, the embedded 135M, and random weights of 360M and 1B from their configs (left out where memory does not allow them)

Ratios are of the first point's cost to each later one's, repeat by repeat: 1 is perfect. Answers have equal length (no stop).
Each part has a JSON line of its own (`--only PART` for one).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Sides, arguments, finish, row, started
from decoding import QUESTION, endless, line, ours, per_token

from convergent.core.direction import Direction
from convergent.core.interventions import Add
from convergent.core.values import Condition, Question, Sampling
from convergent.models.load import ChatModel, load_base, quiet_transformers, wrap
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample

ROWS = 64
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
}
"""360M: SmolLM2-360M's shape. 1B: Llama-3.2-1B's, with the embedded model's vocabulary."""
BYTES = {"tiny": 0.1e9, "360M": 1.5e9, "1B": 4.5e9}


CONDITIONS = "cost under one condition over cost here, same answers, each condition's reading of the prompt included; 0.85 and above is flat, without an upper end: more conditions only add"


def growing(points: dict[int, Callable[[], float]], repeats: int) -> Sides:
    return Sides({str(n): run for n, run in points.items()}, ours=[str(n) for n in points]).measure(repeats)


def against_first(measured: Sides) -> dict[str, list[float]]:
    first, *later = measured.figures
    return {n: measured.ratios(n, first, more_is_better=False) for n in later}


def per_answer(model: ChatModel, n: int, tokens: int, at_least: int) -> float:
    """Seconds per answer of one question, in runs of `n` that together give `at_least` answers.

    Every size reads the prompt once, which would weigh most on the smallest: a run of one answer with one token is taken off. Not one of `n` answers: what is
    done for each answer counts here. One question, since a batch of a large run would else hold fewer prompts than a batch of a small one.
    """
    runs = -(-at_least // n)
    seconds = 0.0
    for _ in range(runs):
        reading, _, _ = ours(model, [QUESTION], 1, 1, ROWS)
        seconds += ours(model, [QUESTION], n, tokens, ROWS)[0] - reading
    return seconds / (runs * n)


def under_conditions(model: ChatModel, n: int, answers: int, tokens: int) -> float:
    """Seconds for `answers` answers of one question shared by `n` conditions."""
    vectors = torch.randn(n, model.n_layers, model.d_model, generator=torch.Generator().manual_seed(0)) / 10
    layer, sampling = model.n_layers // 2, Sampling(1.0, 1.0, tokens)
    conditions = [Condition(f"c{i}", "chat", model.content_id, (Add(Direction(v), layer),), sampling) for i, v in enumerate(vectors)]
    requests = list(make_requests(conditions, [Question("q", ("Say something.",))], answers // n, 0))
    start = time.perf_counter()
    sample(model, requests, n_rows=ROWS)
    return time.perf_counter() - start


def behind(model: ChatModel, n: int, tokens: int) -> float:
    """Seconds per token with `n` more words in the prompt; the prompt's own pass is taken off by a run with one token."""
    question = Question("q", (" ".join(["word"] * n),))
    short, _, few = ours(model, [question], ROWS, 1, ROWS)
    long, _, drawn = ours(model, [question], ROWS, tokens + 1, ROWS)
    return per_token((short, few), (long, drawn))


def of_size(name: str, tokenizer: Any) -> ChatModel:
    """A model with random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1, pad_token_id=2, **SIZES[name])
    torch.manual_seed(0)
    with quiet_transformers():
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return wrap(model, tokenizer, name="chat", base=name, weights_id=f"random-{name}")


def free_bytes() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 0.0


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--only", choices=["answers", "conditions", "context", "size"], help="one part")
    options = started(parser)
    quick, parts = options.quick, [options.only] if options.only else ["answers", "conditions", "context", "size"]
    model = endless(load_base(dtype="float32"))
    ours(model, [Question("q", ("Hello",))], 16, 2, 16)

    def store(part: str, rows: dict[str, Any], seen: Any) -> None:
        finish(options, f"growth_{part}", rows, seen=seen, settings={"rows": ROWS})
        options.began = time.perf_counter()

    if "answers" in parts:
        rows: dict[str, Any] = {}
        points = {n: lambda n=n: per_answer(model, n, 4 if quick else 24, 64 if quick else 512) for n in ((64, 128) if quick else (64, 256, 1024, 4096))}
        measured = growing(points, 1 if quick else options.repeats)
        for n, ratios in against_first(measured).items():
            rows[f"growth_answers_{n}"] = row(ratios, 0.9, "64 answers", "cost of an answer at 64 over its cost here, the prompt's reading taken off; 0.9 to 1.1 is linear", most=1.1)
        store("answers", rows, measured.figures)
    if "conditions" in parts:
        rows = {}
        points = {n: lambda n=n: under_conditions(model, n, 64 if quick else 256, 4 if quick else 24) for n in ((1, 16) if quick else (1, 4, 16, 64))}
        measured = growing(points, 1 if quick else options.repeats)
        for n, ratios in against_first(measured).items():
            rows[f"growth_conditions_{n}"] = row(ratios, 0.85, "one condition", CONDITIONS)
        store("conditions", rows, measured.figures)
    if "context" in parts:
        rows = {}
        points = {n: lambda n=n: behind(model, n, 2 if quick else 32) for n in ((64, 256) if quick else (64, 256, 1024))}
        measured = growing(points, 1 if quick else options.repeats)
        for n, ratios in against_first(measured).items():
            rows[f"growth_context_{n}"] = row(ratios, None, "64 tokens of context", "cost of a token behind 64 tokens over its cost here")
        store("context", rows, measured.figures)
    if "size" in parts:
        rows, by_size = {}, dict[str, list[float]]()
        for name in ("tiny", "135M", *([] if quick else ["360M", "1B"])):
            if free_bytes() < 2 * BYTES.get(name, 0):
                rows[f"growth_size_{name}"] = row([], None, "linear layers alone", "not enough free memory")
                continue
            sized = model if name == "135M" else endless(of_size(name, model.tokenizer))
            speeds, shares = [], []
            for _ in range(1 if quick else options.repeats):
                seconds, _, drawn = ours(sized, [Question("q", ("Say something.",))], ROWS, 4 if quick else 16, ROWS)
                speeds.append(drawn / seconds)
                shares.append(speeds[-1] / line(sized, ROWS, 1 if quick else 3))
            by_size[name] = speeds
            rows[f"growth_size_{name}"] = row(shares, None, "linear layers alone", f"share of the line; {sorted(speeds)[len(speeds) // 2]:.3g} tokens/s at {ROWS} rows")
            del sized
        store("size", rows, by_size)


if __name__ == "__main__":
    main()
