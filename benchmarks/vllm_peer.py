"""vLLM on the work of `decode_gpu.py`, in a process of its own (it pins another torch): `decode_gpu.py` starts it with the Python that CONVERGENT_VLLM_PYTHON names.

The first line on stdin is the work, the answer says versions and which attention was chosen; every further line asks for one run and is answered with its seconds and tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
"""The real stdout: vLLM logs there."""
os.dup2(2, 1)


def say(what: dict[str, Any]) -> None:
    ANSWERS.write(json.dumps(what) + "\n")
    ANSWERS.flush()


def main() -> None:
    work = json.loads(sys.stdin.readline())
    import torch
    import vllm

    rows = work["rows"]
    llm = vllm.LLM(
        model=work["model"], dtype=work["dtype"], load_format="dummy" if work["random"] else "auto", max_num_seqs=rows, max_model_len=512, seed=0, generation_config="vllm",
        gpu_memory_utilization=work["memory"], disable_log_stats=True,
        # As by default, but captured for fewer numbers of rows: the run has `rows` at all times but its last moment.
        compilation_config={"cudagraph_capture_sizes": sorted({rows, *(s for s in (1, 8, 32, 64, 128, 256) if s < rows)})},
    )  # fmt: skip
    settings = vllm.SamplingParams(temperature=1.0, top_p=1.0, max_tokens=work["tokens"], ignore_eos=True, seed=None, detokenize=True)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    found = next((layer for layer in layers if hasattr(layer, "attn_backend")), None)
    version = getattr(getattr(found, "impl", None), "vllm_flash_attn_version", None)
    say({"versions": {"vllm": vllm.__version__, "torch with vllm": torch.__version__}, "attention": f"{found.attn_backend.get_name()} {version or ''}".strip() if found else "?"})
    for _ in sys.stdin:
        start = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": work["prompt"]}] * work["answers"], settings, use_tqdm=False)
        say({"seconds": time.perf_counter() - start, "tokens": sum(len(one.token_ids) for a in answers for one in a.outputs)})


if __name__ == "__main__":
    main()
