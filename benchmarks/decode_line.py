"""Decoding 128 rows against the machine's own line, measured in the same run: fp32, and bf16 where the CPU has it.

The line is the time of the linear layers alone, in their own shapes at this number of rows and in the model's order, so that weights come from memory as they do in
decoding: by torch's `linear` on all threads, and, stricter, by whatever is fastest on the machine. Beside them stands the rate of a large square matrix product over the
floating-point work of a token.
"""

from __future__ import annotations

from common import Sides, arguments, finish, row, started
from decoding import NO_BF16, QUESTION, endless, has_bf16, line, ours, peak, torchs_line

from convergent.models.load import load_base

TARGETS = {"float32": 0.6, "bfloat16": 0.45}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, help="new tokens of each row (default 64, with --quick 12)")
    options = started(parser)
    tokens = options.tokens or (12 if options.quick else 64)
    sides: dict[str, object] = {}
    dtypes = ["float32", *(["bfloat16"] if has_bf16() else [])]
    for dtype in dtypes:
        model = endless(load_base(dtype=dtype))

        def decode(model=model):  # type: ignore[no-untyped-def]
            seconds, _, drawn = ours(model, [QUESTION], options.rows, tokens, options.rows)
            return drawn / seconds

        sides |= {dtype: decode, f"line {dtype}": lambda m=model: torchs_line(m, options.rows), f"fastest {dtype}": lambda m=model: line(m, options.rows), f"peak {dtype}": lambda m=model: peak(m)}
        ours(model, [QUESTION], options.rows, 2, options.rows)
    measured = Sides(sides, ours=tuple(sides)).measure(options.repeats)
    rows = {}
    for dtype, target in TARGETS.items():
        note = "" if dtype in dtypes else NO_BF16
        rows[f"decode_line_{dtype}"] = row(measured.ratios(dtype, f"line {dtype}"), target, "linear layers alone, same run", note)
        fastest = "linear layers alone, by the fastest library and layout, on all threads or a core each"
        rows[f"decode_line_{dtype}_fastest"] = row(measured.ratios(dtype, f"fastest {dtype}"), target, fastest, note)
        rows[f"decode_peak_{dtype}"] = row(measured.ratios(dtype, f"peak {dtype}"), None, "large matrix product's rate over FLOPs of a token", note)
    finish(options, "decode_line", rows, measured, "tokens/s", settings={"rows": options.rows, "tokens": tokens})


if __name__ == "__main__":
    main()
