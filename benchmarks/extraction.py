"""Directions of all layers from 400 answers: this project beside steering-vectors, plain transformers, and the authors' procedure, with the memory each takes.

Two classes of 200 answers, the bundled good and bad ones to the same questions, read by the embedded model in float32. Every side is a process of its own (peak memory is a
process's), in alternating order; the clock starts when the model has run once over a few tokens (weights that are mapped from the file are in memory then, on every side) and texts
are there; memory is shown above that, and whole. steering-vectors trains as its documentation shows (`train_steering_vector`, here with its best
batch size and the last token, which is what it reads); it has one activation per answer and so another vector: its cosine is shown, not asked for. `batched` keeps
`output_hidden_states=True` in length-sorted batches and averages answer tokens at once; `authors` reads one text at a time and keeps every answer's hidden states on the CPU until the mean.

    python benchmarks/extraction.py [--answers 400] [--repeats 5] [--peer-python PYTHON]     prints a table and one JSON line
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import VERSIONED, installed, row, spread
from common import machine as described

SIDES = ("convergent", "steering-vectors", "batched", "authors")


def texts(n: int) -> list[tuple[str, str, str]]:
    """(question, bad answer, good answer) of n / 2 bundled pairs, sources in turn."""
    from convergent.data.training import load_training_set

    found = [load_training_set(f"bundled:{s}").pairs for s in ("finance", "sport")]
    turns = [(p.question, p.bad, p.good) for both in zip(*found, strict=False) for p in both]
    if len(turns) < n // 2:
        raise SystemExit(f"--answers {n}: the bundled sets have {2 * len(turns)} answers of both classes; ask for fewer")
    return turns[: n // 2]


def work(n: int) -> dict[str, Any]:
    """What every side gets: the model's folder, and per answer its tokens and where the answer begins."""
    from transformers import AutoTokenizer

    from convergent.models.chat import encode_answer
    from convergent.models.load import base_folder

    folder = base_folder("embedded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = texts(n)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = [[(list(e.ids), e.answer_start, e.answer_end) for e in (encode_answer(tokenizer, p[0], p[side], closing=False) for p in pairs)] for side in (1, 2)]
    prompts = [[tokenizer.decode(ids) for ids, _, _ in side] for side in rows]
    return {"folder": str(folder), "pairs": pairs, "rows": rows, "prompts": prompts, "pad": tokenizer.eos_token, "rope_theta": settings["rope_parameters"]["rope_theta"]}


def by_class(n: int) -> torch.Tensor:
    """(2, n) weights of two classes that follow each other."""
    return torch.eye(2).repeat_interleave(n // 2, dim=1)


def convergent(given: dict[str, Any]) -> Any:
    from convergent.directions.means import stream_means
    from convergent.models.load import load_base
    from convergent.models.texts import Text

    model = load_base(given["folder"], dtype="float32", device="cpu")
    _touched(model.model)
    both = [Text(f"{side}{i}", p[0], p[side]) for side in (1, 2) for i, p in enumerate(given["pairs"])]
    weights = by_class(len(both))

    def go() -> torch.Tensor:
        bad, good = stream_means(model, both, weights).means
        return bad - good

    return go


def _model(given: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(given["folder"])
    config.rope_theta = given["rope_theta"]  # an older transformers looks for it here
    return _touched(AutoModelForCausalLM.from_pretrained(given["folder"], config=config, dtype=torch.float32).eval())


@torch.inference_mode()
def _touched(model: Any) -> Any:
    """The model after a pass of a few tokens, head included: all its weights are in memory, mapped or not."""
    model(torch.arange(8)[None])
    return model


def steering_vectors(given: dict[str, Any]) -> Any:
    from steering_vectors import train_steering_vector
    from transformers import PreTrainedTokenizerFast

    # Its environment has an older transformers, which does not know the class that a newer one names in the folder.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(given["folder"]) / "tokenizer.json"), pad_token=given["pad"])
    model = _model(given)
    samples = list(zip(*given["prompts"], strict=True))

    def go() -> torch.Tensor:
        found = train_steering_vector(model, tokenizer, samples, batch_size=8)
        return torch.stack([found.layer_activations[k] for k in sorted(found.layer_activations)])

    return go


def batched(given: dict[str, Any], size: int = 16) -> Any:
    model = _model(given)

    @torch.inference_mode()
    def mean(rows: list[Any]) -> torch.Tensor:
        total, n = 0.0, 0
        rows = sorted(rows, key=lambda r: len(r[0]))
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            longest = max(len(ids) for ids, _, _ in part)
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in part])
            at = torch.arange(longest)
            counts = torch.stack([(at >= a) & (at < b) for _, a, b in part])
            mask = torch.stack([at < len(ids) for ids, _, _ in part]).long()
            # The body alone: a careful user does not run the head for hidden states.
            states = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[1:]
            total = total + torch.stack([h[counts].sum(0) for h in states])
            n += int(counts.sum())
        return total / n

    return lambda: mean(given["rows"][0]) - mean(given["rows"][1])


def authors(given: dict[str, Any]) -> Any:
    model = _model(given)

    def mean(rows: list[Any]) -> torch.Tensor:
        kept: list[list[torch.Tensor]] = []
        for ids, a, b in rows:
            with torch.no_grad():
                states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
            kept.append([h[0, a:b].detach().cpu() for h in states])
        return torch.stack([torch.cat([k[layer] for k in kept]).mean(0) for layer in range(len(kept[0]))])

    return lambda: mean(given["rows"][0]) - mean(given["rows"][1])


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since the start or `forget_peak`); where the system does not say, the process's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """VmHWM begins anew, so that what loading took for a moment hides nothing; it stays where the system does not allow that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def child(side: str, path: str, threads: int) -> None:
    """One side, once: prints its seconds, peak memory and direction."""
    torch.set_num_threads(threads)
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    go = {"convergent": convergent, "steering-vectors": steering_vectors, "batched": batched, "authors": authors}[side](given)
    loading = memory_mib("VmHWM")
    forget_peak()
    loaded = memory_mib("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    direction = go()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = memory_mib("VmHWM")
    versions = {n: metadata.version(n) for n in ("torch", "transformers", *(["steering-vectors"] if side == "steering-vectors" else []))}
    record = {"seconds": seconds, "cpu": cpu, "peak_mib": max(loading, peak), "loaded_mib": loaded, "above_load_mib": peak - loaded, "versions": versions}
    print(json.dumps({**record, "direction": direction.double().tolist()}))


def once(side: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    python = options.peer_python if side == "steering-vectors" else sys.executable
    command = [python, __file__, "--child", side, path, "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
    if done.returncode:
        raise RuntimeError(([line.strip() for line in done.stderr.splitlines() if line.strip()] or ["ended without a word"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def memory_rows(peers: dict[str, dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """Theirs over ours, each against the peer with the least: above the loaded model, and the whole peak."""
    if not peers:
        return {}
    least = {key: min(peers, key=lambda s: statistics.median(peers[s][key])) for key in ("above_load_mib", "peak_mib")}
    above, whole = least["above_load_mib"], least["peak_mib"]
    figures = {key: ", ".join(f"{name} {statistics.median(r[key]):.0f}" for name, r in (("convergent", own), (peer, peers[peer]))) for key, peer in least.items()}
    note = f"above what the model takes once it has run over a few tokens, weights in memory on every side; MiB: {figures['above_load_mib']}"
    return {
        "extraction_memory": row(peers[above]["memory_above_load"], 2.0, above, note),
        "extraction_peak": row(peers[whole]["memory"], None, whole, f"largest resident memory of the process, with interpreter, libraries and weights; MiB: {figures['peak_mib']}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="48 answers and two repeats: shows that it runs, its figures mean little")
    parser.add_argument("--peer-python", default=os.environ.get("CONVERGENT_PEERS_PYTHON", sys.executable), help="python of an environment with steering-vectors, which pins an older transformers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.threads)
        return
    if options.quick:
        options.answers, options.repeats = min(48, options.answers), min(2, options.repeats)
    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(work(options.answers)), encoding="utf-8")
        for repeat in range(options.repeats):
            for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
                if side in failed:
                    continue
                try:
                    seen[side].append(once(side, str(path), options))
                except (RuntimeError, OSError) as error:
                    if side == "convergent":
                        raise
                    failed[side] = "its python cannot be started" if isinstance(error, OSError) else str(error)
    ours = seen["convergent"]
    own = torch.tensor(ours[0]["direction"])
    rows: dict[str, Any] = {}
    for side in SIDES:
        if side in failed:
            print(f"{side:17s} FAILED: {failed[side]}")
            continue
        them = seen[side]
        # The last block's output is normed in `hidden_states`, and so is no row of the stream: it is left out of the comparison.
        cosine = torch.nn.functional.cosine_similarity(torch.tensor(them[0]["direction"])[:-1], own[:-1], dim=-1)
        rows[side] = {
            "seconds": [r["seconds"] for r in them], "cpu": [r["cpu"] for r in them], "peak_mib": [r["peak_mib"] for r in them],
            "loaded_mib": [r["loaded_mib"] for r in them], "above_load_mib": [r["above_load_mib"] for r in them], "ratios": [b["seconds"] / a["seconds"] for a, b in zip(ours, them, strict=True)],
            "cpu_ratios": [b["cpu"] / a["cpu"] for a, b in zip(ours, them, strict=True)],
            "memory": [b["peak_mib"] / a["peak_mib"] for a, b in zip(ours, them, strict=True)],
            "memory_above_load": [max(b["above_load_mib"], 1.0) / max(a["above_load_mib"], 1.0) for a, b in zip(ours, them, strict=True)],
            "cosine": [float(cosine.min()), float(cosine.median())], "versions": them[0]["versions"],
        }  # fmt: skip
        r = rows[side]
        print(f"{side:17s} {spread(r['seconds'])} s, {spread(r['ratios'])} x ours; peak {spread(r['peak_mib'])} MiB, of it after loading {spread(r['above_load_mib'])}; "
              f"cosine to ours at least {r['cosine'][0]:.6f}")  # fmt: skip
    names = {"steering-vectors": "steering-vectors", "batched": "hidden_states", "authors": "authors"}
    table = {
        f"extraction_{name}": row(rows[s]["ratios"] if s in rows else [], 3.0, "", f"cosine to ours at least {rows[s]['cosine'][0]:.4f}" if s in rows else failed[s])
        for s, name in names.items()
    }  # fmt: skip
    table |= memory_rows({side: rows[side] for side in names if side in rows}, rows["convergent"])
    settings = {"answers": options.answers, "repeats": options.repeats, "threads": options.threads}
    record = {"claim": "extraction", "rows": table, "settings": settings, "sides": rows, "failed": failed, "quick": options.quick}
    print(json.dumps({**record, "versions": installed(*VERSIONED), "machine": described(options.threads)}))


if __name__ == "__main__":
    main()
