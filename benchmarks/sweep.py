"""A sweep of 16 conditions (4 scales x 4 directions, added at one layer) x 64 answers (8 questions x 8): this project, four steering libraries, and the authors' procedure.

This project draws all conditions as one stream. Each library answers one condition after the other, as its documentation does it, with all 64 answers of a condition in one
left-padded batch; the authors' procedure (a forward hook; one question at a time with `num_return_sequences`) takes eight answers at once. All in float32, at temperature 1
from the whole distribution, at most 48 new tokens, with stop. A library's time is linear in conditions, which it takes one by one, so by default it answers 2 of the 16
in each repeat (other ones each time) and its time is scaled; `--peer-conditions 16` times them all.

Libraries that pin other versions run in an interpreter of their own: CONVERGENT_PEERS_PYTHON names it (repeng and steering-vectors want transformers 4).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from child import Child
from common import OURS, Sides, arguments, finish, row, started
from decoding import one_wording

from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Add
from convergent.core.values import Condition, Question, Sampling
from convergent.models.chat import encode_prompt
from convergent.models.load import ChatModel, base_folder, load_base
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample

ENV = "CONVERGENT_PEERS_PYTHON"
LIBRARIES = ("repeng", "steering-vectors", "pyvene", "nnsight")
AUTHORS = "authors' procedure"
SCALES = (1.0, 2.0, 4.0, 8.0)
N_DIRECTIONS = 4
NOTES = {"pyvene": "its generate pushes the answer's tokens only, not the prompt's"}


def directions(model: ChatModel) -> list[Direction]:
    """Random directions; what a direction means does not move the time."""
    size = (N_DIRECTIONS, model.n_layers, model.d_model)
    return [Direction(v / 4) for v in torch.randn(size, generator=torch.Generator().manual_seed(seed("bench", "sweep") % 2**63))]


GRID = [(d, s) for s in range(len(SCALES)) for d in range(N_DIRECTIONS)]
"""(direction, scale) of every condition."""


def steered(model: ChatModel, tokens: int) -> list[Condition]:
    """The conditions of the sweep."""
    pushes, layer, sampling = directions(model), model.n_layers // 2, Sampling(1.0, 1.0, tokens)
    return [Condition(f"{d}x{SCALES[s]:g}", "chat", model.content_id, (Add(pushes[d], layer, SCALES[s]),), sampling) for d, s in GRID]


def ours(model: ChatModel, conditions: list[Condition], questions: tuple[Question, ...], each: int, n_rows: int) -> float:
    requests = list(make_requests(conditions, questions, each, 0))
    start = time.perf_counter()
    sample(model, requests, n_rows=n_rows)
    return time.perf_counter() - start


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=128, help="of our batch")
    parser.add_argument("--tokens", type=int, help="most new tokens of an answer (default 48, with --quick 8)")
    parser.add_argument("--peer-conditions", type=int, default=None, help="conditions a library answers in each repeat (default 2, with --quick 1)")
    parser.add_argument("--peers-python", default=os.environ.get(ENV), help=f"interpreter for libraries that are not in this one (default ${ENV})")
    options = started(parser)
    tokens, each = options.tokens or (8 if options.quick else 48), 2 if options.quick else 8
    n_peer = options.peer_conditions or (1 if options.quick else 2)
    questions = one_wording()
    model = load_base(dtype="float32")
    layer, pushes = model.n_layers // 2, directions(model)
    conditions = steered(model, tokens)
    plain = sample(model, list(make_requests([Condition("plain", sampling=Sampling(0.0, 1.0, 6))], questions[:2], 1, 0)))
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors.json"
        vectors.write_text(json.dumps([d[layer].tolist() for d in pushes]))
        work = {
            "folder": str(base_folder("embedded")), "vectors": str(vectors), "layer": layer, "scales": SCALES, "threads": options.threads, "each": each, "tokens": tokens,
            "prompts": [encode_prompt(model.tokenizer, q.paraphrases[0], q.system) for q in questions], "plain": [r.token_ids for r in plain],
            "stops": sorted(model.stop_ids), "pad": model.tokenizer.eos_token_id, "rope_theta": model.model.config.rope_parameters["rope_theta"],
        }  # fmt: skip
        measure(options, model, conditions, questions, work, n_peer)


def measure(
    options: Any, model: ChatModel, conditions: list[Condition], questions: tuple[Question, ...], work: dict[str, Any], n_peer: int
) -> None:
    peers: dict[str, Child] = {}
    sides: dict[str, Callable[[], float]] = {OURS: lambda: ours(model, conditions, questions, work["each"], options.rows)}
    measured = Sides(sides)
    for name in (AUTHORS, *LIBRARIES):
        for python in dict.fromkeys(p for p in (sys.executable, options.peers_python) if p):
            try:
                peers[name] = Child("sweep_peers.py", ["hooks" if name == AUTHORS else name], work, python)
                measured.failed.pop(name, None)
                break
            except RuntimeError as error:
                if name not in measured.failed or "ModuleNotFoundError" in measured.failed[name]:
                    measured.fail(name, str(error))
    turns = dict.fromkeys(peers, 0)

    def time_peer(name: str) -> float:
        first, turns[name] = turns[name] * n_peer, turns[name] + 1
        part = [GRID[(first + i) % len(GRID)] for i in range(n_peer)]
        answer = peers[name].ask([[d, SCALES[s]] for d, s in part])
        if answer["answers"] != n_peer * len(questions) * work["each"]:
            raise RuntimeError(f"gave {answer['answers']} answers")
        return float(answer["seconds"]) * len(GRID) / n_peer

    for name in peers:
        measured.sides[name] = lambda n=name: time_peer(n)  # type: ignore[misc]
        measured.figures[name] = []
    try:
        ours(model, conditions[:1], questions, 2, 16)
        measured.measure(options.repeats)
    finally:
        for peer in peers.values():
            peer.end()
    best = measured.best(LIBRARIES, more_is_better=False)
    rows = {
        "sweep_best": row(measured.ratios(OURS, best, False) if best else [], 4.0, f"the fastest library: {best}", NOTES.get(best or "", "" if best else "no library ran")),
        "sweep_authors": row(measured.ratios(OURS, AUTHORS, False), 6.0, AUTHORS),
        **{f"sweep_{n}": row(measured.ratios(OURS, n, False), None, n, measured.failed.get(n, NOTES.get(n, ""))) for n in LIBRARIES if n != best},
    }
    versions = {f"{p} with {n}" if p in ("torch", "transformers") else p: v for n in peers for p, v in peers[n].versions.items()}
    settings = {"conditions": len(GRID), "answers": len(questions) * work["each"], "tokens": work["tokens"], "rows": options.rows, "peer_conditions": n_peer, "layer": work["layer"]}
    finish(options, "sweep", rows, measured, "seconds", versions=versions, settings=settings)


if __name__ == "__main__":
    main()
