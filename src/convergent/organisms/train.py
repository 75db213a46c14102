"""Training: from a base, a recipe and chats to an organism's folder.

PEFT adapters (or all weights) under the Hugging Face `Trainer`, so that devices and multi-GPU are theirs. Ours are the order of the
chats (shuffled, yet with neighbours of like length, so that batches hold little padding), the loss (the language-model head
is run only where there is a label, which for chats is about half of the tokens), the watch over the loss, and resumption. Where the model
allows it batches are packed (see `organisms.fast`).

Right padding under a causal mask cannot reach an earlier token and carries no label, so without packing no attention mask is passed: attention
takes its fast path. Blocks below the first adapter build no graph, because nothing there asks for a gradient.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from convergent.cache import building
from convergent.core.ids import seed as named_seed
from convergent.errors import InputError, StoreError, TrainingError
from convergent.models.anatomy import Anatomy
from convergent.models.head import head_is_plain
from convergent.models.load import ChatModel, base_folder, folder_id, load_base, quiet_transformers
from convergent.models.products import speed_up
from convergent.organisms import fast
from convergent.organisms.adapters import read_adapters
from convergent.organisms.chats import Chat, Row, chats_checksum, collate, encode_chats, training_order
from convergent.organisms.manifest import Organism, adapter_id, read_organism, training_id
from convergent.organisms.recipes import KAIMING, Adapters, Recipe, resolve
from convergent.organisms.steps import STEPS
from convergent.organisms.watch import Keeper, Progress, Watch, bar_of, loss_curve


def train(
    base: str,
    recipe: Recipe,
    examples: Sequence[Chat],
    out: Path,
    *,
    name: str,
    data_name: str = "",
    data_checksum: str = "",
    dtype: str = "float32",
    device: str = "auto",
    checkpoint_every: int = 10,
    keep: Callable[[int], Collection[int]] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Organism:
    """Train an organism into the folder `out`, or return the one that is there if it is the same.

    `examples`: chats of an optional system turn, a user's and an assistant's turn. `data_checksum`: SHA-256 of the chats in order, worked out if
    empty. Killed at any moment, the same call goes on from the last checkpoint (every `checkpoint_every` steps) to the same
    weights. `keep` says for the number of optimizer steps which of them leave their A and B in `steps` of the folder (see `organisms.steps`); the
    weights and the content id are the same with it and without, and a full fine-tune keeps none. `on_progress` replaces the progress bar.
    Raises TrainingError if the loss diverges or `out` holds something
    else, DataError for chats that cannot be used, InputError for a recipe that does not fit the base, ModelError for the base,
    StoreError for a full disk.
    """
    out = Path(out)
    checksum = data_checksum or chats_checksum(examples)
    base_id = folder_id(base_folder(base))
    run_id = training_id(recipe, base_id, checksum, dtype)
    # Checkpoints lie beside the result under the name of what goes in: another recipe starts anew, the same one goes on.
    work = out.with_name(f".{out.name}.training") / run_id
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(work.parent) + ".lock"), _disk(out):
        if out.exists():
            return _existing(out, run_id)
        for stale in work.parent.glob("*"):
            if stale != work:
                shutil.rmtree(stale)
        try:
            with _private_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers has renamed
                chat = load_base(base, dtype=dtype, device=device, name=name)
                rows = encode_chats(chat.tokenizer, examples, recipe)
                trainer = _trainer(chat, recipe, rows, work, checkpoint_every, on_progress)
                if keep is not None and recipe.adapters is not None:
                    trainer.add_callback(Keeper(work / STEPS, keep))
                _fit(trainer, work)
            model: Any = trainer.model
        except TrainingError:
            shutil.rmtree(work.parent, ignore_errors=True)
            raise
        with building(out) as scratch:
            if scratch is not None:
                _save(model, scratch, base)
                organism = Organism(
                    name=name,
                    recipe=recipe,
                    base=base,
                    base_id=base_id,
                    data_name=data_name,
                    data_checksum=checksum,
                    n_examples=len(examples),
                    n_tokens=sum(len(r.ids) for r in rows),
                    dtype=dtype,
                    content_id=adapter_id(scratch, base_id) if recipe.adapters else folder_id(scratch),
                    training_id=run_id,
                    trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                    seconds=round(trainer.watch.seconds, 1),
                    loss_curve=loss_curve(trainer.state.log_history, len(rows), recipe),
                    versions={p: version(p) for p in ("torch", "transformers", "peft", "accelerate")},
                )
                organism.write(scratch)
                if (work / STEPS).is_dir():
                    shutil.move(work / STEPS, scratch / STEPS)
        shutil.rmtree(work.parent)
    return read_organism(out)


class AnswerTrainer(Trainer):
    """The Hugging Face trainer with our order of rows, and the head only where there are labels."""

    anatomy: Anatomy | None = None
    """Set if the logits are head(body(ids)) and nothing more, and one process holds the model; else the ordinary path."""
    packed = False
    """Whether the body takes packed batches."""
    lanes_over: Sequence[torch.Tensor] = ()
    """The weights to train, if packed batches are shared out over the cores."""
    watch: Watch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.anatomy is None or self.anatomy.head is None or return_outputs or model is not self.model:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = self.anatomy, inputs["input_ids"], inputs["labels"]
        with self.accelerator.autocast():
            if self.lanes_over:
                total, n = fast.loss_in_lanes(*given, self.lanes_over)
            else:
                total, n = fast.packed_loss(*given) if self.packed else fast.answer_loss(*given)
        return total / (num_items_in_batch if num_items_in_batch is not None else n)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nobody asks for it, and counting all weights at every pass takes longer than the optimizer's own update."""
        return 0


def attach(chat: ChatModel, adapters: Adapters, seed: int) -> Any:
    """`chat.model` with fresh adapters in place, as a PEFT model; initial weights follow from `seed`, or are those of the folder `adapters.init`."""
    from peft import LoraConfig, get_peft_model

    if adapters.layers and adapters.layers[-1] >= chat.n_layers:
        raise InputError(f"recipe.adapters.layers: {adapters.layers[-1]} is not in a model with layers 0 to {chat.n_layers - 1}")
    targets = resolve(chat.anatomy, adapters.modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        use_rslora=adapters.rslora,
        lora_dropout=adapters.dropout,
        target_modules=[t.rpartition(".")[2] for t in targets],
        layers_to_transform=None if adapters.layers is None else list(adapters.layers),
    )
    torch.manual_seed(named_seed("organism-adapters", seed))
    model: Any = get_peft_model(chat.model, config)
    n, expected = len(model.targeted_module_names), len(targets) * len(adapters.layers or range(chat.n_layers))
    if n != expected:
        raise TrainingError(f"{chat.base}: adapters went to {n} layers, expected {expected} ({', '.join(targets)}); name other modules")
    if adapters.init != KAIMING:
        _start_from(model, Path(adapters.init).expanduser())
    return model


@torch.no_grad()
def _start_from(model: Any, folder: Path) -> None:
    """Copy the A and B of a PEFT folder into the adapters of `model`. Raises InputError if they are not on the same layers, or of another shape."""
    given = {f"{a.layer}.{a.module}": (a.a, a.b) for a in read_adapters(folder)}
    parts = {n: m for n, m in model.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))}
    place = "recipe.adapters.init"
    for name, part in parts.items():
        path, _, side = name.removesuffix(".default").rpartition(".lora_")
        key = next((k for k in given if path.endswith(f".{k}")), None)
        if key is None:
            raise InputError(f"{place}: {folder} has no adapter for {path.removeprefix('base_model.model.')}; give one with the recipe's layers and modules")
        start = given[key]["AB".index(side)]
        if start.shape != part.weight.shape:
            raise InputError(f"{place}: {folder} holds {side} of shape {tuple(start.shape)} for {key}, the recipe needs {tuple(part.weight.shape)}")
        part.weight.copy_(start)
    if 2 * len(given) != len(parts):
        raise InputError(f"{place}: {folder} has {len(given)} adapters, the recipe {len(parts) // 2}; give one with the recipe's layers and modules")


def _trainer(
    chat: ChatModel, recipe: Recipe, rows: Sequence[Row], work: Path, checkpoint_every: int, on_progress: Any
) -> AnswerTrainer:
    plain_head = head_is_plain(chat)
    if recipe.adapters is None:
        model: Any = chat.model.requires_grad_(True)
    else:
        model = attach(chat, recipe.adapters, recipe.seed)
        # While training this must be a folder: at every checkpoint PEFT looks there for the base's config, else on the hub.
        model.peft_config["default"].base_model_name_or_path = str(base_folder(chat.base))
    on_cpu = chat.device.type == "cpu"
    order = training_order([len(r.ids) for r in rows], recipe)
    packed, passes = False, recipe.grad_accumulation
    speed_up(model)
    # Dropout would draw other numbers. Under several devices the model is wrapped, and loss is the ordinary path's.
    if plain_head and not (recipe.adapters and recipe.adapters.dropout) and _one_device(chat):
        fast.lighten(model)
        if (saved := fast.pack_attention(chat, rows)) is not None:
            packed, passes = True, fast.fewest_passes([rows[i] for i in order], recipe, saved)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=recipe.batch_size * recipe.grad_accumulation // passes,
        gradient_accumulation_steps=passes,
        num_train_epochs=1,  # the order of rows holds all epochs
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch_fused",
        bf16=not on_cpu and chat.model.dtype == torch.bfloat16,
        use_cpu=on_cpu,
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=checkpoint_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
    )
    with quiet_transformers():
        watch = Watch(on_progress or bar_of(chat.name))
        trainer = AnswerTrainer(
            model=model, args=arguments, train_dataset=[rows[i] for i in order], data_collator=collate, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
    trainer.anatomy = chat.anatomy if plain_head else None
    trainer.packed = packed
    if packed and on_cpu and recipe.adapters:  # of all weights, a gradient per lane would be too much
        trainer.lanes_over = [p for p in model.parameters() if p.requires_grad]
    trainer.watch = watch
    return trainer


def _one_device(chat: ChatModel) -> bool:
    """Whether one process trains on one device: the trainer takes every GPU that it sees."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return processes == 1 and (chat.device.type == "cpu" or torch.cuda.device_count() == 1)


def _fit(trainer: AnswerTrainer, work: Path) -> None:
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=last_checkpoint(work))


def last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint. One that was cut short is removed: the trainer writes its state file last."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], str(folder)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def _save(model: Any, folder: Path, base: str) -> None:
    with quiet_transformers():
        if not hasattr(model, "peft_config"):
            model.save_pretrained(folder)
            return
        config = model.peft_config["default"]
        config.base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form that names folders of this machine
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # PEFT writes a set, in an order of the moment
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _existing(out: Path, run_id: str) -> Organism:
    organism = read_organism(out)
    if organism.training_id != run_id:
        raise TrainingError(f"{out}: holds an organism of another recipe, base or data; remove it or choose another folder")
    return organism


@contextmanager
def _private_rng() -> Iterator[None]:
    """The trainer seeds the generators of Python, numpy and torch; give them back as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A full disk as StoreError; torch and safetensors wrap the system's error in types of their own."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "file write failed" in str(error):
            raise StoreError(f"{out.parent}: the disk is full; make room and run again, training goes on from its last checkpoint") from error
        raise
