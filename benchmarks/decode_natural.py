"""128 answers of natural length (up to 200 tokens, with stop): this sampler beside `generate`, batched as a careful user would.

The careful user sorts prompts by length, pads on the left, and takes the best of batch 32, 64 and 128 (one trial of each first). Lengths are drawn, so the figure is
tokens up to the stop per second; answers per second stand beside it.
"""

from __future__ import annotations

from common import OURS, Sides, arguments, finish, row, started
from decoding import CEILING, LINE, VARIANTS, attention, generate, line, ours, prompts, suffix

from convergent.data.questions import load_questions
from convergent.models.load import load_base

BATCHES = (32, 64, 128)
READING = "reading the prompts included: `generate` reads one for every answer, ours each different one once"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, help="of eight questions together (default 128, with --quick 32)")
    parser.add_argument("--tokens", type=int, help="most new tokens of an answer (default 200, with --quick 32)")
    parser.add_argument("--rows", type=int, default=128, help="of our batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    parser.add_argument("--variant", default="generate, sdpa", choices=sorted(VARIANTS), help="how generate is called; see decode_equal.py")
    options = started(parser)
    tokens = options.tokens or (32 if options.quick else 200)
    questions = load_questions("open_eight")
    per_question = max(1, (options.answers or (32 if options.quick else 128)) // len(questions))
    model = load_base(dtype=options.dtype)
    asked = prompts(model, questions, per_question)
    answers_per_second: dict[str, list[float]] = {}

    def ours_speed() -> float:
        seconds, answers, drawn = ours(model, questions, per_question, tokens, options.rows)
        answers_per_second.setdefault(OURS, []).append(answers / seconds)
        return drawn / seconds

    def peer_speed(batch: int) -> float:
        implementation, settings = VARIANTS[options.variant]
        seconds, drawn = 0.0, 0
        with attention(model, implementation):
            for start in range(0, len(asked), batch):
                took, got = generate(model, asked[start : start + batch], tokens, stop=True, **settings)
                seconds, drawn = seconds + took, drawn + got
        answers_per_second.setdefault(f"generate, batch {batch}", []).append(len(asked) / seconds)
        return drawn / seconds

    peers = {f"generate, batch {b}": lambda b=b: peer_speed(b) for b in BATCHES if b <= len(asked)}
    ours(model, questions[:1], 16, 2, 16)
    trial = Sides(peers, ours=()).measure(1)
    trial.show("tokens/s, to choose")
    best = trial.best(list(peers))
    if best is None:
        raise SystemExit(f"decode_natural: every batch of generate failed: {trial.failed}")
    answers_per_second.clear()
    measured = Sides({OURS: ours_speed, best: peers[best], LINE: lambda: line(model, options.rows)}).measure(options.repeats)
    by_answer = [a / b for a, b in zip(answers_per_second[OURS], answers_per_second.get(best, []), strict=False)]
    end = suffix(options.dtype)
    rows = {
        f"decode_natural{end}": row(measured.ratios(OURS, best), 3.0, f"transformers {best}", f"tokens up to the stop per second; {READING}"),
        f"decode_natural{end}_answers": row(by_answer, None, f"transformers {best}", f"answers per second; {READING}"),
        f"decode_natural{end}_ceiling": row(measured.ratios(LINE, best), None, f"transformers {best}", CEILING),
    }
    settings = {"answers": len(asked), "tokens": tokens, "rows": options.rows, "dtype": options.dtype, "variant": options.variant, "tried": trial.figures}
    finish(options, f"decode_natural{end}", rows, measured, "tokens/s", settings=settings)


if __name__ == "__main__":
    main()
