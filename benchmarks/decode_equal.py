"""Decoding 64 rows of equal length: this sampler beside `generate` of transformers, same prompt, same number of tokens, both in float32 and sampling at temperature 1.

`generate` is tried first with each attention and cache it offers on a CPU; the fastest goes into the comparison.
"""

from __future__ import annotations

from common import OURS, Sides, arguments, finish, row, started
from decoding import QUESTION, VARIANTS, attention, endless, generate, ours, prompts

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

    def ours_speed(new: int = tokens) -> float:
        seconds, _, drawn = ours(model, [QUESTION], options.rows, new, options.rows)
        return drawn / seconds

    def peer_speed(name: str, new: int = tokens) -> float:
        implementation, settings = VARIANTS[name]
        with attention(model, implementation):
            seconds, drawn = generate(model, batch, new, stop=False, **settings)
        return drawn / seconds

    ours_speed(2)
    trial = Sides({name: lambda n=name: peer_speed(n, min(tokens, 16)) for name in VARIANTS}, ours=()).measure(2)
    trial.show("tokens/s, to choose")
    best = trial.best(list(VARIANTS))
    if best is None:
        raise SystemExit(f"decode_equal: every way to call generate failed: {trial.failed}")
    measured = Sides({OURS: ours_speed, best: lambda: peer_speed(best)}).measure(options.repeats)
    measured.failed |= trial.failed
    settings = {"rows": options.rows, "tokens": tokens, "dtype": options.dtype, "tried": trial.figures}
    finish(options, "decode_equal", {"decode_equal": row(measured.ratios(OURS, best), 2.2, f"transformers {best}")}, measured, "tokens/s", settings=settings)


if __name__ == "__main__":
    main()
