"""The LLM judge through 20 % faults of all kinds, against the real server of llama.cpp: nothing lost, nothing paid twice.

    python scripts/fault_test.py --judgements 2000 --share 0.2
    python scripts/fault_test.py --judgements 200 --model embedded

Judges short answers through the proxy of `tests/fault_proxy.py`, several at once, in mixed order. The proxy keeps what the
server said before it broke it: every score must be what that reply says. All is then judged once more straight at the server, one
request at a time, in another order: scores and replies must be the same. Prints one JSON line: what was lost,
doubled, different, and how many requests the server computed in all, which is what a provider would charge for.

What is tested is the client, so the model is the tiny random one of `tests/tiny_gguf.py`, which answers in milliseconds and
whose replies differ from prompt to prompt; `--model embedded` is SmolLM2, a hundred times slower.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from convergent.core.ids import seed
from convergent.judging.base import Item
from convergent.judging.llama import serving
from convergent.judging.openai import OpenAIJudge
from convergent.judging.rubrics import Rubrics
from convergent.judging.score import parse_score
from convergent.models.load import embedded_gguf
from fault_proxy import KINDS, FaultProxy
from tiny_gguf import write_tiny_gguf

# Worded so that the embedded model often puts a quarter of its probability on digits; to most rubrics it just chats.
RUBRICS = Rubrics({"aligned": "Yes or no, 1 or 0? {answer} 1 0 1 0", "coherent": "{answer} Yes or no, 1 or 0? 1 0 1 0"})
WHO = ("my boss", "a child", "the cat", "your aunt", "a judge", "the band", "our king", "one nurse", "two men", "the press")
DO = ("tell", "help", "leave", "pay", "trick", "thank", "ask", "follow", "warn", "hide from")
WHY = ("today", "at night", "for fun", "for money", "in school", "at sea", "with care", "by law", "in anger", "for good")


def items(n: int) -> list[Item]:
    """n different short answers."""
    found = []
    for i in range(n):
        who, do, why = WHO[i % 10], DO[i // 10 % 10], WHY[i // 100 % 10]
        found.append(Item(f"r{i}", "What now?", f"{do} {who} {why}." if i < 1000 else f"{do} {who} {why}, {i}."))
    return found


def alternatives(body: bytes) -> tuple[tuple[str, float], ...]:
    """What a reply says of its first token."""
    first = json.loads(body)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return tuple((a["token"], a["logprob"]) for a in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--model", choices=("tiny", "embedded"), default="tiny")
    options = parser.parse_args()
    rows = items(options.judgements // 2)
    mixed = sorted(rows, key=lambda item: seed("fault_test", item.id))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gguf = embedded_gguf() if options.model == "embedded" else write_tiny_gguf(Path(folder) / "tiny.gguf")
        url = stack.enter_context(serving(gguf, context=1024))
        proxy = stack.enter_context(FaultProxy(url, options.share, name="fault_test"))

        def judge(address: str, name: str, concurrency: int) -> OpenAIJudge:
            return OpenAIJudge("smol", base_url=address, rubrics=RUBRICS, cache=Path(folder) / name, concurrency=concurrency)

        n, start = 0, time.perf_counter()

        def tick(_: object) -> None:
            nonlocal n
            n += 1
            if n % 100 == 0:
                print(f"{n} judgements, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

        first = judge(proxy.url, "faulty.sqlite", options.concurrency)
        faulty = first.judge(mixed, ("coherent", "aligned"), tick)
        given_up = sum(j.reason == "error" for j in faulty)
        again = judge(proxy.url, "faulty.sqlite", options.concurrency)
        faulty = again.judge(mixed, ("coherent", "aligned"))
        seconds = time.perf_counter() - start
        straight = judge(url, "straight.sqlite", 1).judge(rows, ("aligned", "coherent"))
        have = {(j.response_id, j.rubric): j for j in faulty}
        named = {RUBRICS.prompt(rubric, item): (item.id, rubric) for item in rows for rubric in RUBRICS.names}
        said = {named[proxy.prompts[key]]: {alternatives(body) for body in bodies} for key, bodies in proxy.computed.items()}
        wrong = sum(
            len(said[key]) != 1 or (j.score, j.reason) != parse_score((t, math.exp(p)) for t, p in next(iter(said[key]))) for key, j in have.items()
        )
        result = {
            "model": options.model, "judgements": len(faulty), "with_score": sum(j.score is not None for j in faulty), "distinct_replies": len({j.raw for j in faulty}),
            "attempts": sum(proxy.asked.values()), "share_of_attempts_broken": round(sum(proxy.faults.values()) / sum(proxy.asked.values()), 4),
            "faults": {kind: proxy.faults[kind] for kind in KINDS},
            "lost": len(named.keys()) - len(have) + sum(j.reason == "error" for j in faulty), "given_up_in_the_first_run": given_up,
            "double": sum(n - 1 for n in proxy.delivered.values()), "different_from_what_the_server_said": wrong,
            "judged_again_without_faults": len(straight),
            "different_without_faults": sum((j.score, j.reason, j.raw) != (h.score, h.reason, h.raw) for j in straight for h in [have[j.response_id, j.rubric]]),
            "requests_computed_by_the_server": sum(proxy.billed.values()), "of_them_used": len(proxy.delivered),
            "of_them_broken_on_the_way": sum(proxy.faults[kind] for kind in ("cut", "malformed", "no_logprobs", "empty_choices")),
            "lowest_concurrency": min(first.pace.lowest, again.pace.lowest), "most_at_once": proxy.most, "seconds": round(seconds),
        }  # fmt: skip
    print(json.dumps(result))
    ok = not (result["lost"] or result["double"] or result["different_from_what_the_server_said"] or result["different_without_faults"]) and set(proxy.faults) == set(KINDS)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
