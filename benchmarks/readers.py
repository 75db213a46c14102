"""32 readers at once, and one reader: this sampler beside llama.cpp (through `xllamacpp`) with as many slots, on the same GGUF.

llama.cpp computes with the file's own 4-bit weights; this project with the same weights in float32, and in bfloat16 where the CPU has it: the better one is compared. Every
reader asks one of the eight open questions, in the same words on both sides, and gets the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from child import Child
from common import Sides, arguments, finish, row, started
from decoding import CEILING, LINE, NO_BF16, endless, has_bf16, line, one_wording, ours

from convergent.models.chat import encode_prompt
from convergent.models.load import embedded_gguf, load_base

LLAMA = "llama.cpp"
TARGETS = {32: 2.0, 1: 0.5}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="new tokens of each answer (default 96, with --quick 12)")
    options = started(parser)
    tokens = options.tokens or (12 if options.quick else 96)
    questions = one_wording()  # all readers of a question share its prompt, which this project reads once, and llama.cpp may keep in its slots
    dtypes = ["float32", *(["bfloat16"] if has_bf16() else [])]
    models = {dtype: endless(load_base(dtype=dtype)) for dtype in dtypes}
    prompts = [encode_prompt(models["float32"].tokenizer, q.paraphrases[0], q.system) for q in questions]
    sides: dict[str, Callable[[], float]] = {}
    children: dict[int, Child] = {}
    failed: dict[str, Exception] = {}
    for readers in TARGETS:
        asked = (prompts * readers)[:readers]
        own = questions[:readers]
        for dtype, model in models.items():

            def speed(model=model, own=own, readers=readers):  # type: ignore[no-untyped-def]
                seconds, _, drawn = ours(model, own, readers // len(own), tokens, readers)
                return drawn / seconds

            sides[f"{dtype}, {readers}"] = speed

        sides[f"{LINE}, {readers}"] = lambda readers=readers: line(models[dtypes[-1]], readers)

        def peer(readers=readers, asked=asked):  # type: ignore[no-untyped-def]
            answer = children[readers].ask({"prompts": asked, "tokens": tokens})
            if answer["tokens"] != [tokens] * readers:
                raise RuntimeError(f"drew {answer['tokens'][:4]} tokens, not {tokens}")
            return sum(answer["tokens"]) / answer["seconds"]

        try:
            work = {"gguf": str(embedded_gguf()), "slots": readers, "context": 512, "threads": options.threads}
            children[readers] = Child("llama_readers.py", [], work)
            sides[f"{LLAMA}, {readers}"] = peer
        except RuntimeError as error:
            failed[f"{LLAMA}, {readers}"] = error
    measured = Sides(sides, ours=[name for name in sides if LLAMA not in name])
    for name, error in failed.items():
        measured.fail(name, error)
    try:
        for side in list(sides):  # caches, thread pools, the server's first graph
            if LLAMA in side:
                sides[side]()
        measured.measure(options.repeats)
    finally:
        for child in children.values():
            child.end()
    rows = {}
    for readers, target in TARGETS.items():
        best = measured.best([f"{dtype}, {readers}" for dtype in dtypes])
        note = f"ours in {best}" if "bfloat16" in dtypes else f"ours in float32; {NO_BF16}"
        rows[f"readers_{readers}"] = row(measured.ratios(best or "", f"{LLAMA}, {readers}"), target, f"{LLAMA}, slots: {readers}", measured.failed.get(f"{LLAMA}, {readers}", note))
        rows[f"readers_{readers}_ceiling"] = row(measured.ratios(f"{LINE}, {readers}", f"{LLAMA}, {readers}"), None, f"{LLAMA}, slots: {readers}", CEILING)
    versions = next((c.versions for c in children.values()), {"xllamacpp": "not installed"})
    finish(options, "readers", rows, measured, "tokens/s", versions=versions, settings={"tokens": tokens, "gguf": embedded_gguf().name})


if __name__ == "__main__":
    main()
