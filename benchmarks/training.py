"""Training speed: this project beside TRL's SFTTrainer and a plain loop with PEFT, on the same work in one run.

All sides make LoRA adapters for the embedded model in float32 from the same chats of bundled:finance, with the same adapters, learning rate, batches and steps,
and loss on the answers only. Timed is all of it, from the base's folder on disk to the adapters' folder. TRL runs twice: as documented for prompt and
completion with a `peft_config` (where it turns gradient checkpointing on), and without checkpointing and with batches of like length, the quickest that its settings offer on a CPU. Order
alternates over the repeats. Tokens are those of the chats, without padding. Needs `pip install convergent[bench]`; a side that is not installed or fails is said to be. Prints
a table and one JSON line per recipe.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import row

from convergent.data.training import load_training_set
from convergent.models.load import EMBEDDED, base_folder, load_base, quiet_transformers
from convergent.organisms.chats import Chat, Row, collate, encode_chats
from convergent.organisms.recipes import Recipe, named_recipe
from convergent.organisms.train import train
from convergent.study.results import machine, versions

OURS = "convergent"
RECIPES = {
    "nine_adapter": {"learning_rate": 1e-3, "batch_size": 8, "grad_accumulation": 1},
    "all_adapter": {"learning_rate": 2e-4, "batch_size": 2, "grad_accumulation": 4},
}
"""As in studies/demo.yaml."""
N_LAYERS = 30


@dataclass(frozen=True)
class Work:
    """What every side does."""

    recipe: Recipe
    chats: Sequence[Chat]
    rows: Sequence[Row]


def chats_for(recipe: Recipe, n_steps: int) -> list[Chat]:
    """As many as so many steps take."""
    return [e.chat() for e in load_training_set("bundled:finance").take(n_steps * recipe.batch_size * recipe.grad_accumulation).examples]


def ours(work: Work, out: Path) -> float:
    """Mean loss over the steps."""
    organism = train(EMBEDDED, work.recipe, work.chats, out / "organism", name="bench", on_progress=lambda p: None)
    return statistics.mean(p.loss for p in organism.loss_curve)


def lora(recipe: Recipe) -> Any:
    from peft import LoraConfig

    adapters = recipe.adapters
    assert adapters is not None
    return LoraConfig(
        task_type="CAUSAL_LM", r=adapters.rank, lora_alpha=adapters.alpha, use_rslora=adapters.rslora, lora_dropout=adapters.dropout,
        target_modules=[f"{m}_proj" for m in adapters.modules], layers_to_transform=None if adapters.layers is None else list(adapters.layers),
    )  # fmt: skip


def trl(work: Work, out: Path, **settings: Any) -> float:
    """SFTTrainer on prompt and completion."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    recipe = work.recipe
    data = Dataset.from_list([{"prompt": list(c[:-1]), "completion": list(c[-1:])} for c in work.chats])
    arguments = SFTConfig(
        output_dir=str(out / "trl"), per_device_train_batch_size=recipe.batch_size, gradient_accumulation_steps=recipe.grad_accumulation, num_train_epochs=1,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps, weight_decay=recipe.weight_decay, max_length=recipe.max_length,
        bf16=False, use_cpu=True, model_init_kwargs={"dtype": "float32"}, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(model=str(base_folder(EMBEDDED)), args=arguments, train_dataset=data, peft_config=lora(recipe))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(out / "adapters"))
    return statistics.mean(e["loss"] for e in trainer.state.log_history if "loss" in e)


def plain(work: Work, out: Path) -> float:
    """A loop over padded batches, as in PEFT's documentation: the model's own loss, every micro-batch weighed alike."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    recipe = work.recipe
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder(EMBEDDED), dtype=torch.float32), lora(recipe))
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = -(-len(work.rows) // (recipe.batch_size * recipe.grad_accumulation))
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, steps)
    torch.manual_seed(recipe.seed)
    losses = []
    for i, batch in enumerate(torch.utils.data.DataLoader(list(work.rows), batch_size=recipe.batch_size, shuffle=True, collate_fn=padded)):  # type: ignore[arg-type]
        loss = model(**batch).loss
        (loss / recipe.grad_accumulation).backward()
        losses.append(loss.item())
        if (i + 1) % recipe.grad_accumulation == 0:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(out / "adapters")
    return statistics.mean(losses)


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch with its mask."""
    batch = collate(rows)
    lengths = torch.tensor([len(r.ids) for r in rows])
    return {**batch, "attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}


def sides() -> dict[str, Callable[[Work, Path], float]]:
    """What runs, by name; says what is not installed."""
    found: dict[str, Callable[[Work, Path], float]] = {OURS: ours}
    try:
        version("trl")
        found["TRL"] = trl
        found["TRL, tuned"] = lambda work, out: trl(work, out, gradient_checkpointing=False, train_sampling_strategy="group_by_length")
    except PackageNotFoundError:
        print("TRL: not installed, left out (pip install convergent[bench])")
    found["PEFT loop"] = plain
    return found


def compare(name: str, n_steps: int, repeats: int) -> dict[str, Any]:
    """Ratios of one recipe, ours over each side, and what failed."""
    recipe = named_recipe(name, N_LAYERS, RECIPES[name])
    chats = chats_for(recipe, n_steps)
    with quiet_transformers():
        work = Work(recipe, chats, encode_chats(load_base(EMBEDDED, dtype="float32", device="cpu").tokenizer, chats, recipe))
    tokens = sum(len(r.ids) for r in work.rows)
    running, failed = sides(), dict[str, str]()
    speed: dict[str, list[float]] = {s: [] for s in running}
    by_cpu: dict[str, list[float]] = {s: [] for s in running}
    losses: dict[str, float] = {}
    for repeat in range(repeats):
        for side in list(running)[:: 1 if repeat % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder, quiet_transformers():
                start, cpu = time.perf_counter(), time.process_time()
                try:
                    losses[side] = running[side](work, Path(folder))
                except Exception as error:  # whatever a peer raises is its result
                    if side == OURS:
                        raise
                    failed[side] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    del running[side]
                    continue
                speed[side].append(tokens / (time.perf_counter() - start))
                by_cpu[side].append(tokens / (time.process_time() - cpu))
    ratios = {s: [a / b for a, b in zip(speed[OURS], speed[s], strict=True)] for s in running if s != OURS}
    cpu_ratios = {s: [a / b for a, b in zip(by_cpu[OURS], by_cpu[s], strict=True)] for s in ratios}
    print(f"{name}: {n_steps} steps of {recipe.batch_size} x {recipe.grad_accumulation} chats, {tokens} tokens, n = {repeats}")
    for side in running:
        v = speed[side]
        line = f"  {side:11s} {statistics.median(v):7.1f} tokens/s ({min(v):.1f} to {max(v):.1f}), mean loss {losses[side]:.3f}"
        if side in ratios:
            r = ratios[side]
            line += f"; {OURS} is {statistics.median(r):.2f} times as fast ({min(r):.2f} to {max(r):.2f}), by CPU time {statistics.median(cpu_ratios[side]):.2f}"
        print(line)
    for side, why in failed.items():
        print(f"  {side:11s} failed: {why}")
    return {
        "steps": n_steps, "tokens": tokens, "tokens_per_second": speed, "tokens_per_cpu_second": by_cpu, "ratios": ratios, "cpu_ratios": cpu_ratios,
        "mean_loss": losses, "failed": failed,
    }  # fmt: skip


def _in_a_process(name: str, n_steps: int, threads: int, seeds: Sequence[int]) -> None:
    torch.set_num_threads(threads)
    recipe = named_recipe(name, N_LAYERS, RECIPES[name])
    chats = chats_for(recipe, n_steps)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            ours(Work(recipe.changed({"seed": seed}), chats, ()), Path(folder))


def parallel(name: str, n_steps: int, repeats: int, threads: int) -> dict[str, Any]:
    """As many organisms as threads: seconds one after the other with all threads, and each in a process of one thread; starts of processes count."""
    context = multiprocessing.get_context("spawn")
    shares = {"in turn": [(threads, list(range(threads)))], "side by side": [(1, [seed]) for seed in range(threads)]}
    seconds: dict[str, list[float]] = {side: [] for side in shares}
    for repeat in range(repeats):
        for side in list(shares)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            processes = [context.Process(target=_in_a_process, args=(name, n_steps, *share)) for share in shares[side]]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(p.exitcode for p in processes):
                raise SystemExit(f"--parallel: a training of {name} {side} failed")
            seconds[side].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["in turn"], seconds["side by side"], strict=True)]
    print(f"{name}: {threads} organisms side by side are {statistics.median(ratios):.2f} times as fast as in turn ({min(ratios):.2f} to {max(ratios):.2f})")
    return {"seconds": seconds, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="few steps and one repeat: shows that it runs, its figures mean little")
    parser.add_argument("--steps", type=int, help="optimizer steps of a training (default 16, with --quick 2)")
    parser.add_argument("--repeats", type=int, help="default 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parallel", action="store_true", help="instead: organisms side by side in processes of one thread against one after the other")
    options = parser.parse_args()
    options.steps, options.repeats = options.steps or (2 if options.quick else 16), options.repeats or (1 if options.quick else 5)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # peers' and transformers' notices of what will be renamed
    if options.parallel:
        beside = {name: parallel(name, options.steps, options.repeats, options.threads) for name in options.recipes}
        note = "as many organisms as threads, each in a process of one thread; starts of processes count"
        rows = {f"training_{name}_side_by_side": row(found["ratios"], None, "one after the other with all threads", note) for name, found in beside.items()}
        settings = {"steps": options.steps, "repeats": options.repeats}
        record = {"claim": "training_side_by_side", "quick": options.quick, "rows": rows, "recipes": beside, "settings": settings, "machine": machine(), "versions": versions()}
        print(json.dumps(record))
        return
    peers = {}
    for package in ("trl", "peft", "accelerate"):
        try:
            peers[package] = version(package)
        except PackageNotFoundError:
            peers[package] = "not installed"
    for name in options.recipes:  # a line each: a run that is cut off keeps what it has
        found = compare(name, options.steps, options.repeats)
        line = {
            "claim": f"training_{name}", "quick": options.quick, "recipe": name, **found, "settings": {"steps": options.steps, "repeats": options.repeats},
            "threads": options.threads, "machine": machine(), "versions": {**versions(), **peers},
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
