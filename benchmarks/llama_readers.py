"""llama.cpp answering readers, in a process of its own: a server in this process, one slot a reader, all requests at once.

First line in: JSON {"gguf", "slots", "context", "threads"}. Then each line in is {"prompts", "tokens"}, and each line out how long all answers took and how many tokens they have.
Sampling is at temperature 1 from the whole distribution, and goes on past the end of the turn, so that every answer has the same length.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what the library prints is log, not answer
    import xllamacpp

    config = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = config["gguf"]
    params.port = 0
    params.n_parallel = config["slots"]
    params.n_ctx = config["context"] * config["slots"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config["threads"]
    params.n_threads_http = config["slots"] + 2
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    os.write(out, json.dumps({"versions": {"xllamacpp": metadata.version("xllamacpp")}}).encode() + b"\n")

    def answer(number: int, prompt: list[int], tokens: int) -> int:
        reply = server.handle_completions({
            "prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": number, "samplers": ["temperature"],
        })  # fmt: skip
        reply = json.loads(reply) if isinstance(reply, str) else reply
        if "usage" in reply:
            return int(reply["usage"]["completion_tokens"])
        return int(reply["tokens_predicted"])

    with ThreadPoolExecutor(config["slots"]) as readers:
        for line in sys.stdin:
            work = json.loads(line)
            start = time.perf_counter()
            drawn = list(readers.map(answer, range(len(work["prompts"])), work["prompts"], [work["tokens"]] * len(work["prompts"])))
            os.write(out, json.dumps({"seconds": time.perf_counter() - start, "tokens": drawn}).encode() + b"\n")
    os._exit(0)  # the server's own threads would keep the process


if __name__ == "__main__":
    main()
