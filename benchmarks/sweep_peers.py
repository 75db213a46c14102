"""One steering library answering a sweep, in a process of its own: it may pin other versions than the project, and need not have the project at all.

    python sweep_peers.py PEER < lines

First line in: JSON with the work (model folder, prompts as token ids, layer, scales; `vectors` names a file of (n_directions, d_model) float32 as JSON lists). First line out: versions.
Then each line in is a list of [direction, scale] conditions, and each line out how long all answers of these took. Every condition is one batch of all its answers,
left-padded, with the model in evaluation mode and no gradients; `hooks` is the authors' procedure instead: one question at a time, `num_return_sequences` answers of it.

Before the first figure two prompts are answered greedily: without steering the tokens must be the project's, and with it those of a plain forward hook. A peer that
does not steer is fast for nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

Generate = Callable[..., torch.Tensor]
"""(input_ids, attention_mask, vector, scale, settings of generate) -> (rows, tokens)."""


@contextmanager
def hooked(model: Any, layer: int, push: torch.Tensor, prompt_too: bool = True) -> Iterator[None]:
    """A plain forward hook that adds `push` (d_model,) at the output of block `layer`."""

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if prompt_too or hidden.shape[1] == 1:
            hidden = hidden + push
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest)."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def hooks(model: Any, layer: int) -> Generate:
    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, vector: torch.Tensor, scale: float, settings: dict[str, Any]) -> torch.Tensor:
        with hooked(model, layer, scale * vector):
            return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    return generate


def repeng(model: Any, layer: int) -> Generate:
    from repeng import ControlModel, ControlVector

    wrapped = ControlModel(model, [layer])

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, vector: torch.Tensor, scale: float, settings: dict[str, Any]) -> torch.Tensor:
        wrapped.set_control(ControlVector(model.config.model_type, {layer: vector.numpy()}), scale)
        try:
            return wrapped.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
        finally:
            wrapped.reset()

    return generate


def steering_vectors(model: Any, layer: int) -> Generate:
    from steering_vectors import SteeringVector

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, vector: torch.Tensor, scale: float, settings: dict[str, Any]) -> torch.Tensor:
        with SteeringVector({layer: vector}, "decoder_block").apply(model, multiplier=scale):
            return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    return generate


def pyvene(model: Any, layer: int) -> Generate:
    import pyvene as pv

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, vector: torch.Tensor, scale: float, settings: dict[str, Any]) -> torch.Tensor:
        intervention = pv.AdditionIntervention(embed_dim=model.config.hidden_size, source_representation=scale * vector)
        intervenable = pv.IntervenableModel({"layer": layer, "component": "block_output", "intervention": intervention}, model)
        return intervenable.generate({"input_ids": input_ids, "attention_mask": attention_mask}, **settings)[1]

    return generate


def nnsight(model: Any, layer: int) -> Generate:
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    sight = TransformersModel(model, tokenizer=AutoTokenizer.from_pretrained(model.name_or_path))

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, vector: torch.Tensor, scale: float, settings: dict[str, Any]) -> torch.Tensor:
        push, steps = scale * vector, settings["max_new_tokens"]
        with sight.generate({"input_ids": input_ids, "attention_mask": attention_mask}, **settings) as tracer:
            for _ in tracer.iter[:steps]:
                sight.model.layers[layer].output[:] += push
            out = tracer.result.save()
        return out

    return generate


PEERS = {"hooks": hooks, "repeng": repeng, "steering-vectors": steering_vectors, "pyvene": pyvene, "nnsight": nnsight}
NOT_IN_PROMPT = {"pyvene"}
"""Its `generate` pushes the prompt or the answer's tokens, not both; a sweep wants the answer's."""


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    name, work = sys.argv[1], json.loads(sys.stdin.readline())
    torch.set_num_threads(work["threads"])
    torch.set_grad_enabled(False)
    with open(work["vectors"], encoding="utf-8") as file:
        vectors = torch.tensor(json.load(file))
    config = AutoConfig.from_pretrained(work["folder"])
    if int(metadata.version("transformers").partition(".")[0]) < 5:
        config.rope_theta = work["rope_theta"]  # transformers 4 does not find it where 5 wrote it, and would take its default
    model = AutoModelForCausalLM.from_pretrained(work["folder"], config=config, dtype=torch.float32).eval()
    layer, pad = work["layer"], work["pad"]
    two = left_padded(work["prompts"][:2], pad)
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": pad}
    plain = model.generate(**two, **greedy)[:, -6:].tolist()
    if plain != work["plain"]:
        raise SystemExit(f"{name}: the model answers otherwise under transformers {metadata.version('transformers')}, before any steering: {plain}")
    scale = work["scales"][-1]
    with hooked(model, layer, scale * vectors[0], prompt_too=name not in NOT_IN_PROMPT):
        expected = model.generate(**two, **greedy)
    generate = PEERS[name](model, layer)
    if not torch.equal(generate(**two, vector=vectors[0], scale=scale, settings=greedy), expected):
        raise SystemExit(f"{name}: its greedy answers differ from those of a plain hook with the same push")
    print(json.dumps({"versions": {p: metadata.version(p) for p in ("torch", "transformers", *({name} - {"hooks"}))}}), file=out, flush=True)

    drawn = {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": work["tokens"], "pad_token_id": pad, "eos_token_id": work["stops"],
    }  # fmt: skip
    batch = left_padded([p for p in work["prompts"] for _ in range(work["each"])], pad)
    for line in sys.stdin:
        torch.manual_seed(0)
        start, answers = time.perf_counter(), 0
        for direction, scale in json.loads(line):
            if name == "hooks":
                for prompt in work["prompts"]:
                    settings = {**drawn, "num_return_sequences": work["each"]}
                    answers += len(generate(**left_padded([prompt], pad), vector=vectors[direction], scale=scale, settings=settings))
            else:
                answers += len(generate(**batch, vector=vectors[direction], scale=scale, settings=drawn))
        print(json.dumps({"seconds": time.perf_counter() - start, "answers": answers}), file=out, flush=True)


if __name__ == "__main__":
    main()
