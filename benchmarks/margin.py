"""Margins of 8 held-out pairs under 16 conditions: this project beside a pass per condition as one writes it by hand, on the same hooks.

Four directions, each added at the middle layer at three scales and ablated at every block. The plain side reads bad and good answers of all pairs in padded batches, one condition
after the other, with the head on every token. Order alternates; both sides must find the same margins. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence

import torch
from common import VERSIONED, installed, row
from common import machine as described

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Pair
from convergent.data.training import load_training_set
from convergent.directions.margin import margins
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel, load_base
from convergent.models.texts import batches, padded


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--conditions", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="2 pairs, 4 conditions, two repeats")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.conditions, options.repeats = 2, 4, 2
    torch.set_num_threads(options.threads)
    model = load_base(dtype="float32")
    pairs = load_training_set("bundled:finance").pairs[: options.pairs]
    conditions = conditions_of(model)[: options.conditions]
    sides = {"ours": ours, "plain": plain}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    values: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            start, cpu = time.perf_counter(), time.process_time()
            values[name] = sides[name](model, pairs, conditions)
            seen[name].append((time.perf_counter() - start, time.process_time() - cpu))
    apart = max(abs(a - b) for a, b in zip(values["ours"], values["plain"], strict=True))
    ratios, cpu_ratios = ([b[k] / a[k] for a, b in zip(seen["ours"], seen["plain"], strict=True)] for k in (0, 1))
    for name, times in seen.items():
        print(f"{name:6s} {statistics.median(t for t, _ in times):7.1f} s  ({min(t for t, _ in times):.1f} to {max(t for t, _ in times):.1f})")
    print(f"plain / ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); CPU time {statistics.median(cpu_ratios):.2f}; margins at most {apart:.1e} nats apart")
    rows = {"margin": row(ratios, None, "a padded pass per condition on the same hooks", f"margins at most {apart:.1e} nats apart")}
    settings = {"pairs": len(pairs), "conditions": len(conditions), "repeats": options.repeats, "threads": options.threads}
    record = {"claim": "margin", "rows": rows, "settings": settings, "cpu_ratios": cpu_ratios, "sides": seen, "quick": options.quick}
    print(json.dumps({**record, "versions": installed(*VERSIONED), "machine": described(options.threads)}))


if __name__ == "__main__":
    main()
