"""Margins of 8 held-out pairs under 16 conditions: this project beside a pass per condition as one writes it by hand, on the same hooks.

Four directions, each added at the middle layer at three scales and ablated at every block. The plain side reads bad and good answers of all pairs in padded batches, one condition
after the other, with the head on every token. Order alternates; both sides must find the same margins. Prints a table and one JSON line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from common import OURS, Sides, arguments, finish, row, started

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Pair
from convergent.data.training import load_training_set
from convergent.directions.margin import margins
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel, load_base
from convergent.models.texts import batches, padded

PLAIN = "a padded pass per condition on the same hooks"


def conditions_of(model: ChatModel, seed: int = 0) -> list[tuple[Intervention, ...]]:
    """16: four random directions of norm 3, scales 1, 2 and 4, and their ablation."""
    found: list[tuple[Intervention, ...]] = []
    for k in range(4):
        v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed + k))
        d = Direction((3.0 * v / v.norm())[None].repeat(model.n_layers, 1))
        found += [*((Add(d, model.n_layers // 2, s),) for s in (1.0, 2.0, 4.0)), (Ablate(d),)]
    return found


def ours(model: ChatModel, pairs: Sequence[Pair], conditions: Sequence[Sequence[Intervention]]) -> list[float]:
    return [m.margin for m in margins(model, pairs, conditions)]


@torch.inference_mode()
def plain(model: ChatModel, pairs: Sequence[Pair], conditions: Sequence[Sequence[Intervention]]) -> list[float]:
    encoded = [encode_answer(model.tokenizer, p.question, a, closing=False) for p in pairs for a in (p.bad, p.good)]
    found = []
    for interventions in conditions:
        means = [0.0] * len(encoded)
        with applied(model.anatomy, interventions):
            for members in batches([len(e.ids) for e in encoded], 1024):
                ids, mask = padded([encoded[i].ids for i in members], model.device)
                logps = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
                for row, i in enumerate(members):
                    e = encoded[i]
                    means[i] = float(logps[row, e.answer_start - 1 : e.answer_end - 1].gather(1, ids[row, e.answer, None]).mean())
        found += [means[i] - means[i + 1] for i in range(0, len(means), 2)]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, help="default 8, with --quick 2")
    parser.add_argument("--conditions", type=int, help="default 16, with --quick 4")
    options = started(parser)
    model = load_base(dtype="float32")
    pairs = load_training_set("bundled:finance").pairs[: options.pairs or (2 if options.quick else 8)]
    conditions = conditions_of(model)[: options.conditions or (4 if options.quick else 16)]
    values: dict[str, list[float]] = {}

    def seconds(name: str, side: Callable[..., list[float]]) -> float:
        start = time.perf_counter()
        values[name] = side(model, pairs, conditions)
        return time.perf_counter() - start

    sides = Sides({OURS: lambda: seconds(OURS, ours), PLAIN: lambda: seconds(PLAIN, plain)}, ours=(OURS, PLAIN)).measure(options.repeats)
    apart = max(abs(a - b) for a, b in zip(values[OURS], values[PLAIN], strict=True))
    rows = {"margin": row(sides.ratios(OURS, PLAIN, more_is_better=False), None, PLAIN, f"margins at most {apart:.1e} nats apart")}
    finish(options, "margin", rows, sides, "s", settings={"pairs": len(pairs), "conditions": len(conditions)})


if __name__ == "__main__":
    main()
