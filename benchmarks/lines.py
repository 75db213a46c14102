"""Extraction, training and the sweep against the machine's own line: the time of the linear layers alone, on the same tokens, in the same run.

No float32 code on torch's products passes it, so a target that lies above (peer's time) / (that time) is out of reach on the machine: the share shown here, into the ratio of
the row with peers, is what that row could be at most. Attention, norms, the draw, loading the base, and what LoRA adds are no part of the line. No peers: minutes, not half an hour.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import Sides, arguments, finish, row, started
from decoding import one_wording
from extraction import texts
from sweep import SCALES, directions
from sweep import ours as sweep
from torch import Tensor, nn
from training import N_LAYERS, RECIPES, Work
from training import ours as train

from convergent.core.interventions import Add
from convergent.core.values import Condition, Sampling
from convergent.data.training import load_training_set
from convergent.directions.means import stream_means
from convergent.models.chat import encode_answer, encode_prompt
from convergent.models.load import ChatModel, load_base, quiet_transformers
from convergent.models.packed import read_in_batches
from convergent.models.texts import Text
from convergent.organisms.chats import collate, encode_chats
from convergent.organisms.fast import pack
from convergent.organisms.recipes import named_recipe
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample

LINE = "linear layers alone, same tokens"


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


class Line:
    """Seconds of linear layers alone; every call multiplies anew."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model
        self.blocks = [linears(block) for block in model.anatomy.blocks]
        head = model.anatomy.head
        assert isinstance(head, nn.Linear)
        self.head = head

    @torch.inference_mode()
    def forward(self, n: int, head: int = 0) -> None:
        """Of `n` tokens through the blocks and `head` of them through the head."""
        for layer in (m for block in self.blocks for m in block):
            nn.functional.linear(_ones(n, layer.in_features), layer.weight)
        if head:
            nn.functional.linear(_ones(head, self.head.in_features), self.head.weight)

    @torch.inference_mode()
    def backward(self, n: int, head: int, first: int) -> None:
        """Gradients by the inputs of blocks from `first` on, and of the head."""
        _ones(head, self.head.out_features) @ self.head.weight
        for layer in (m for block in self.blocks[first:] for m in block):
            _ones(n, layer.out_features) @ layer.weight


_kept: dict[tuple[int, int], Tensor] = {}


def _ones(n: int, width: int) -> Tensor:
    if (n, width) not in _kept:
        _kept[n, width] = torch.ones(n, width)
    return _kept[n, width]


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed


def extraction(model: ChatModel, line: Line, n: int) -> tuple[Callable[[], object], Callable[[], object]]:
    both = [Text(f"{side}{i}", p[0], p[side]) for side in (1, 2) for i, p in enumerate(texts(n))]
    weights = torch.zeros(2, len(both))
    weights[0, : len(both) // 2] = weights[1, len(both) // 2 :] = 1
    sequences = [encode_answer(model.tokenizer, t.question, t.answer, closing=False).ids for t in both]
    sizes = [batch.n_tokens for batch in read_in_batches(model, sequences, 1024)]
    return lambda: stream_means(model, both, weights), lambda: [line.forward(size) for size in sizes]


def training(model: ChatModel, line: Line, name: str, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    recipe = named_recipe(name, N_LAYERS, RECIPES[name])
    each = recipe.batch_size * recipe.grad_accumulation
    chats = [e.chat() for e in load_training_set("bundled:finance").take(steps * each).examples]
    rows = encode_chats(model.tokenizer, chats, recipe)
    packs = []
    for i in range(0, len(rows), each):
        batch = collate(rows[i : i + each])
        made = pack(batch["input_ids"], batch["labels"])
        packs.append((made.ids.shape[1], len(made.targets)))
    layers = recipe.adapters.layers if recipe.adapters else None
    first = min(layers) if layers else 0

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            train(Work(recipe, chats, rows), Path(folder))

    def alone() -> None:
        for n, labels in packs:
            line.forward(n, labels)
            line.backward(n, labels, first)

    return ours, alone


def sweeping(model: ChatModel, line: Line, tokens: int, each: int, n_rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    questions, layer = one_wording(), model.n_layers // 2
    conditions = [
        Condition(f"{i}x{scale:g}", "chat", model.content_id, (Add(v, layer, scale),), Sampling(1.0, 1.0, tokens)) for i, v in enumerate(directions(model)) for scale in SCALES
    ]
    prompts = [len(encode_prompt(model.tokenizer, q.paraphrases[0], q.system)) for q in questions]
    drawn = sum(len(r.token_ids) + 1 for r in sample(model, list(make_requests(conditions, questions, each, 0)), n_rows=n_rows))
    steps = round((drawn - len(conditions) * len(questions) * each) / n_rows)  # the first token of each answer comes with its prompt

    def alone() -> None:
        for n in prompts * len(conditions):
            line.forward(n, 1)
        for _ in range(steps):
            line.forward(n_rows, n_rows)

    return lambda: sweep(model, conditions, questions, each, n_rows), alone


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--answers", type=int, help="that directions are read from (default 400, with --quick 40)")
    parser.add_argument("--steps", type=int, help="of a training (default 8, with --quick 1)")
    parser.add_argument("--tokens", type=int, help="most new tokens of an answer of the sweep (default 32, with --quick 4)")
    options = started(parser)
    answers, steps, tokens = options.answers or (40 if options.quick else 400), options.steps or (1 if options.quick else 8), options.tokens or (4 if options.quick else 32)
    model = load_base(dtype="float32", device="cpu")
    line = Line(model)
    works = {
        "extraction_line": extraction(model, line, answers),
        **{f"training_{name}_line": training(model, line, name, steps) for name in RECIPES},
        "sweep_line": sweeping(model, line, tokens, 1 if options.quick else 8, 128),
    }
    sides = {}
    for name, (ours, alone) in works.items():
        alone()
        sides |= {name: seconds(ours), f"{name}, {LINE}": seconds(alone)}
    measured = Sides(sides, ours=tuple(sides)).measure(options.repeats)
    rows = {name: row(measured.ratios(name, f"{name}, {LINE}", more_is_better=False), None, LINE, _figures(measured.figures, name)) for name in works}
    finish(options, "lines", rows, measured, "seconds", settings={"answers": answers, "steps": steps, "tokens": tokens})


def _figures(figures: dict[str, Sequence[float]] | dict[str, list[float]], name: str) -> str:
    both = (statistics.median(figures[n]) for n in (name, f"{name}, {LINE}"))
    return "share of the line; seconds: {:.1f}, the line {:.1f}".format(*both)


if __name__ == "__main__":
    main()
