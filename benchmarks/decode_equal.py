"""Decoding 64 rows of equal length: this sampler beside `generate` of transformers, same prompt, same number of tokens, both in float32 and sampling at temperature 1.

`generate` is tried first with each attention and cache it offers on a CPU; the fastest goes into the comparison. It reads the prompt once for every row, this sampler once: the
claim is about the whole call, and a row beside it takes a run of one new token off both sides.
"""

from __future__ import annotations

from common import OURS, Sides, arguments, finish, row, started
from decoding import CEILING, LINE, QUESTION, VARIANTS, attention, endless, generate, line, ours, per_token, prompts, suffix

from convergent.models.load import load_base


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, help="new tokens of each row (default 64, with --quick 12)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    options = started(parser)
    tokens = options.tokens or (12 if options.quick else 64)
    model = endless(load_base(dtype=options.dtype))
    batch = prompts(model, [QUESTION], options.rows)

    def ours_run(new: int) -> tuple[float, int]:
        seconds, _, drawn = ours(model, [QUESTION], options.rows, new, options.rows)
        return seconds, drawn

    def peer_run(name: str, new: int) -> tuple[float, int]:
        implementation, settings = VARIANTS[name]
        with attention(model, implementation):
            return generate(model, batch, new, stop=False, **settings)

    def speed(run: tuple[float, int]) -> float:
        return run[1] / run[0]

    ours_run(2)
    trial = Sides({name: lambda n=name: speed(peer_run(n, min(tokens, 16))) for name in VARIANTS}, ours=()).measure(2)
    trial.show("tokens/s, to choose")
    best = trial.best(list(VARIANTS))
    if best is None:
        raise SystemExit(f"decode_equal: every way to call generate failed: {trial.failed}")
    runs = {OURS: ours_run, best: lambda new: peer_run(best, new)}
    alone = Sides({})
    alone.figures = {name: [] for name in runs}  # filled beside those of whole calls

    def measure(name: str) -> float:
        short, long = runs[name](1), runs[name](tokens)
        alone.figures[name].append(1 / per_token(short, long))
        return speed(long)

    sides = {name: lambda n=name: measure(n) for name in runs}
    measured = Sides(sides | {LINE: lambda: line(model, options.rows)}).measure(options.repeats)
    measured.failed |= trial.failed
    end = suffix(options.dtype)
    settings = {"rows": options.rows, "tokens": tokens, "dtype": options.dtype, "tried": trial.figures}
    rows = {
        f"decode_equal{end}": row(measured.ratios(OURS, best), 2.2, f"transformers {best}", "reading the prompt included: `generate` reads it for every row, ours once"),
        f"decode_equal{end}_without_prompts": row(alone.ratios(OURS, best), None, f"transformers {best}", "decode alone: both sides' time less that of a run with one new token"),
        f"decode_equal{end}_ceiling": row(measured.ratios(LINE, best), None, f"transformers {best}", CEILING),
    }
    finish(options, f"decode_equal{end}", rows, measured, "tokens/s", settings=settings, without_prompts=alone.figures)


if __name__ == "__main__":
    main()
