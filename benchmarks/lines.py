"""Extraction, training, the sweep and the judge against the machine's own line: the time of the linear layers alone, on the same tokens, in the same run.

Products are by the library that is fastest on the machine (`models.products`). No float32 code on them passes the line, so a target that lies above (peer's time) / (that time) is out of reach on the machine: the share shown here, into the ratio of
the row with peers, is what that row could be at most. Training's line has the products of LoRA, the judge's is of its own 8-bit layers. Attention, norms, the draw and loading the base
are no part of a line. Products are shared out over the cores as the work itself is. No peers: minutes, not half an hour.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from common import Sides, arguments, finish, row, started
from decoding import linears, one_wording
from extraction import by_class, texts
from judge import RUBRICS
from judge import answers as judged
from sweep import ours as sweep
from sweep import steered
from torch import Tensor, nn
from training import N_LAYERS, RECIPES, Work, chats_for
from training import ours as train

from convergent.directions.means import stream_means
from convergent.judging import minilm
from convergent.judging.embedded import EmbeddedJudge
from convergent.models.chat import encode_answer, encode_prompt
from convergent.models.lanes import in_lanes, lanes_on
from convergent.models.load import ChatModel, load_base, quiet_transformers
from convergent.models.packed import read_in_batches
from convergent.models.products import laid_out, linear, product_of, sped_up
from convergent.models.texts import Text
from convergent.organisms.chats import collate, encode_chats
from convergent.organisms.fast import pack, pieces
from convergent.organisms.recipes import Adapters, named_recipe
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample

LINE = "linear layers alone, same tokens"
CPU = torch.device("cpu")
Both: TypeAlias = tuple[Callable[[], object], Callable[[], object]]
"""Our side, and its line."""


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
            product_of(layer)(_ones(n, layer.in_features))
        if head:
            product_of(self.head)(_ones(head, self.head.in_features))

    @torch.inference_mode()
    def backward(self, n: int, head: int, first: int) -> None:
        """Gradients by the inputs of blocks from `first` on, and of the head."""
        linear(_ones(head, self.head.out_features), self.head.weight.t())
        for layer in (m for block in self.blocks[first:] for m in block):
            linear(_ones(n, layer.out_features), layer.weight.t())

    @torch.inference_mode()
    def adapt(self, n: int, adapters: Adapters) -> None:
        """The six products of every adapter: two forward, two for the gradient by its input, two for its own."""
        for k, block in enumerate(self.model.anatomy.blocks):
            for name, layer in block.named_modules():
                if not isinstance(layer, nn.Linear) or name.rpartition(".")[2].removesuffix("_proj") not in adapters.modules or k not in (adapters.layers or (k,)):
                    continue
                x, y, low = (_ones(n, width) for width in (layer.in_features, layer.out_features, adapters.rank))
                a, b = _ones(adapters.rank, layer.in_features), _ones(layer.out_features, adapters.rank)
                _ = linear(x, a), linear(low, b), linear(y, b.t()), linear(low, a.t()), linear(low.t(), x.t()), linear(y.t(), low.t())


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


def extraction(model: ChatModel, line: Line, n: int) -> Both:
    both = [Text(f"{side}{i}", p[0], p[side]) for side in (1, 2) for i, p in enumerate(texts(n))]
    weights = by_class(len(both))
    sequences = [encode_answer(model.tokenizer, t.question, t.answer, closing=False).ids for t in both]
    sizes = [batch.n_tokens for batch in read_in_batches(model, sequences, 1024)]

    def alone() -> None:
        with sped_up(model.model):
            in_lanes(line.forward, sizes, model.device)

    return lambda: stream_means(model, both, weights), alone


def training(model: ChatModel, line: Line, name: str, steps: int) -> Both:
    recipe = named_recipe(name, N_LAYERS, RECIPES[name])
    each, chats = recipe.batch_size * recipe.grad_accumulation, chats_for(recipe, steps)
    rows = encode_chats(model.tokenizer, chats, recipe)
    packs = []
    for i in range(0, len(rows), each):
        batch = collate(rows[i : i + each])
        made = [pack(batch["input_ids"][piece], batch["labels"][piece]) for piece in pieces(batch["labels"], lanes_on(model.device)[0])]
        packs.append([(p.ids.shape[1], len(p.targets)) for p in made])
    adapters = recipe.adapters
    assert adapters is not None
    first = min(adapters.layers) if adapters.layers else 0

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            train(Work(recipe, chats, rows), Path(folder))

    def one(piece: tuple[int, int]) -> None:
        line.forward(*piece)
        line.backward(*piece, first)
        line.adapt(piece[0], adapters)

    def alone() -> None:
        with sped_up(model.model):
            for step in packs:
                in_lanes(one, step, model.device)

    return ours, alone


def sweeping(model: ChatModel, line: Line, tokens: int, each: int, n_rows: int) -> Both:
    questions, conditions = one_wording(), steered(model, tokens)
    prompts = [len(encode_prompt(model.tokenizer, q.paraphrases[0], q.system)) for q in questions]
    answers = sample(model, list(make_requests(conditions, questions, each, 0)), n_rows=n_rows)
    # The first token of an answer comes with its prompt; a stop is drawn too.
    steps = round(sum(len(r.token_ids) - (r.finish == "length") for r in answers) / n_rows)

    n_lanes, _ = lanes_on(model.device)
    shares = [(n_rows + i) // n_lanes for i in range(n_lanes)]

    def decode(rows: int) -> None:
        for _ in range(steps):
            line.forward(rows, rows)

    def alone() -> None:
        with laid_out(model.model):
            in_lanes(lambda n: line.forward(n, 1), prompts * len(conditions), model.device)
            in_lanes(decode, shares, model.device)

    return lambda: sweep(model, conditions, questions, each, n_rows), alone


def judging(n: int) -> Both:
    items, judge, net = judged(n), EmbeddedJudge(), minilm.load()
    tokens = sum(len(found.ids) for found in net.tokenizer.encode_batch_fast([i.response for i in items]))

    @torch.inference_mode()
    def one(n: int) -> None:
        x, wide = (_ones(n, width) for width in (minilm.DIM, 4 * minilm.DIM))
        for layer in net.layers:
            _ = layer.qkv(x), layer.out(x), layer.up(x), layer.down(wide)

    sizes = [min(2048, tokens - start) for start in range(0, tokens, 2048)]
    return lambda: judge.judge(items, RUBRICS), lambda: in_lanes(one, sizes, CPU)


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone, for example judge_line")
    parser.add_argument("--answers", type=int, help="that directions are read from (default 400, with --quick 40)")
    parser.add_argument("--steps", type=int, help="of a training (default 8, with --quick 1)")
    parser.add_argument("--tokens", type=int, help="most new tokens of an answer of the sweep (default 32, with --quick 4)")
    options = started(parser)
    answers, steps, tokens = options.answers or (40 if options.quick else 400), options.steps or (1 if options.quick else 8), options.tokens or (4 if options.quick else 32)
    model = load_base(dtype="float32", device="cpu")
    line = Line(model)
    made: dict[str, Callable[[], Both]] = {
        "extraction_line": lambda: extraction(model, line, answers),
        **{f"training_{name}_line": lambda name=name: training(model, line, name, steps) for name in RECIPES},  # type: ignore[misc]
        "sweep_line": lambda: sweeping(model, line, tokens, 1 if options.quick else 8, 128),
        "judge_line": lambda: judging(64 if options.quick else 400),
    }
    if unknown := [name for name in options.only or () if name not in made]:
        parser.error(f"--only: there is no row {unknown[0]!r}; there are {', '.join(made)}")
    works = {name: make() for name, make in made.items() if name in (options.only or made)}
    sides = {}
    for name, (ours, alone) in works.items():
        alone()
        sides |= {name: seconds(ours), f"{name}, {LINE}": seconds(alone)}
    measured = Sides(sides, ours=tuple(sides)).measure(options.repeats)
    rows = {name: row(measured.ratios(name, f"{name}, {LINE}", more_is_better=False), None, LINE, _figures(measured.figures, name)) for name in works}
    finish(options, "_".join(["lines", *(options.only or ())]), rows, measured, "seconds", settings={"answers": answers, "steps": steps, "tokens": tokens})


def _figures(figures: dict[str, Sequence[float]] | dict[str, list[float]], name: str) -> str:
    both = (statistics.median(figures[n]) for n in (name, f"{name}, {LINE}"))
    return "share of the line; seconds: {:.1f}, the line {:.1f}".format(*both)


if __name__ == "__main__":
    main()
