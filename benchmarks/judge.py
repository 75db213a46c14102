"""Judging speed: the embedded judge beside a plain ridge on MiniLM's last state, on the same answers in one run.

Both read the same bundled advice and give `aligned` and `coherent`. The ridge is what the judge has to be worth its price against: the same MiniLM, one dot product per
score. It is fitted here to the judge's own scores, since weights do not move its speed. Texts that repeat would be computed once, so every answer is another one;
questions are the eight open ones in turn, as in a study.
Loading and the first chunk are not timed; order alternates over the repeats. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.linear_model import Ridge

from convergent.data.questions import load_questions
from convergent.data.training import load_pairs
from convergent.judging import minilm
from convergent.judging.base import Item
from convergent.judging.embedded import NAME, EmbeddedJudge
from convergent.study.results import machine, versions

SOURCES = ("bundled:finance", "bundled:sport")
RUBRICS = ("aligned", "coherent")


def answers(n: int) -> list[Item]:
    """`n` different answers, bad and good in turn, from all sources alike."""
    texts = list(dict.fromkeys(text for source in zip(*(load_pairs(s) for s in SOURCES), strict=False) for pair in source for text in (pair.bad, pair.good)))
    if n > len(texts):
        raise SystemExit(f"--answers: {n} asked for, the bundled sets hold {len(texts)} that differ")
    questions = load_questions("open_eight")
    return [Item(str(i), questions[i % len(questions)].paraphrases[0], text, questions[i % len(questions)].id) for i, text in enumerate(texts[:n])]


def plain_ridge(items: Sequence[Item]) -> Callable[[Sequence[Item]], None]:
    """A ridge on the last state, fitted to the judge's scores of `items`."""
    judged = EmbeddedJudge().judge(items, RUBRICS)
    scores = np.array([j.score for j in judged], dtype=float).reshape(len(items), len(RUBRICS))
    fitted = Ridge(alpha=1.0).fit(_last(items), scores)

    def judge(asked: Sequence[Item]) -> None:
        np.clip(fitted.predict(_last(asked)), 0, 100)

    return judge


def _last(items: Sequence[Item]) -> np.ndarray:
    return minilm.embed([i.response for i in items]).double().numpy()[:, 0]


def seconds(judge: Callable[[Sequence[Item]], object], items: Sequence[Item]) -> tuple[float, float]:
    """(elapsed, CPU time) of one judgement of all `items`."""
    start, cpu = time.perf_counter(), time.process_time()
    judge(items)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few answers and one repeat: shows that it runs, its figures mean little")
    parser.add_argument("--answers", type=int, help="default 800, with --quick 64")
    parser.add_argument("--repeats", type=int, help="default 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.answers, options.repeats = options.answers or (64 if options.quick else 800), options.repeats or (1 if options.quick else 5)
    torch.set_num_threads(options.threads)
    items = answers(options.answers)
    model = EmbeddedJudge()
    sides: dict[str, Callable[[Sequence[Item]], object]] = {NAME: lambda asked: model.judge(asked, RUBRICS), "plain ridge": plain_ridge(items)}
    for judge in sides.values():
        judge(items[:64])
    speed: dict[str, list[float]] = {name: [] for name in sides}
    by_cpu: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            elapsed, cpu = seconds(sides[name], items)
            speed[name].append(len(items) / elapsed)
            by_cpu[name].append(len(items) / cpu)
    ratios = [a / b for a, b in zip(speed[NAME], speed["plain ridge"], strict=True)]
    words = statistics.mean(len(i.response.split()) for i in items)
    for name in sides:
        v, c = speed[name], by_cpu[name]
        print(f"{name:12s} {statistics.median(v):7.1f} answers/s ({min(v):.1f} to {max(v):.1f}); per second of CPU time {statistics.median(c):.1f}")
    print(
        f"{NAME} / plain ridge: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {len(items)} answers of {words:.0f} words on average, "
        f"{options.threads} threads, n = {options.repeats}"
    )
    record = {
        "claim": "judge", "quick": options.quick, "judge": NAME, "answers": len(items), "words": words, "threads": options.threads, "answers_per_second": speed,
        "answers_per_cpu_second": by_cpu, "ratios": ratios, "integer_kernel": minilm.has_integer_kernel(), "machine": machine(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
