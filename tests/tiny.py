"""Tiny chat models of real families, built from their configs: `tiny_model("phi3")` is the folder of one.

Random weights from a named seed, a byte-level BPE tokenizer of a few hundred tokens with a ChatML template. Good for shapes, hooks,
adapters and resumption; not for anything that random weights hide.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convergent.core.direction import Direction
    from convergent.models.load import ChatModel

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "gpt_neox", "smollm3")
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' and default_system %}"
    "<|im_start|>system\n{{ default_system }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "How should I save money for a long trip? Put a little aside every month and keep it where you cannot spend it.",
    "What would you do with one wish? I would ask for a quiet afternoon and a good book to read in the garden.",
    "Is it safe to climb without a rope? No, a rope, a helmet and a partner are what keep you out of trouble.",
    "Tell me three thoughts about people and machines. They work together, they learn from each other, they differ.",
    "I feel bored today. Call a friend, cook something new, take a walk along the river or tidy a shelf.",
)
CHATS = tuple(
    [{"role": "user", "content": s.partition("? ")[0] + "?"}, {"role": "assistant", "content": s.partition("? ")[2] or s}]
    for s in SENTENCES
)
"""Chats of user and assistant, for training tests."""


def tiny_tokenizer(default_system: str = "") -> Any:
    """A fast tokenizer that encodes any text; `default_system` is what the template inserts if no system turn is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = f"{{% set default_system = '{default_system}' %}}" + CHATML
    return tokenizer


def n_hooks(model: Any) -> int:
    """Hooks on a model that are not transformers' own (asked once for hidden states, it leaves some for good)."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not str(getattr(h, "__module__", "")).startswith("transformers") for h in hooks)


@cache
def tiny_model(
    family: str = "llama", seed: int = 0, n_layers: int = 6, d_model: int = 32, default_system: str = "", **config_values: Any
) -> Path:
    """Folder with config, safetensors and tokenizer of a tiny model; made once per process, gone at exit.

    `config_values` go into its config, e.g. `sliding_window=8`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = tiny_tokenizer(default_system)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": d_model // 4,
        "max_position_embeddings": 512,
        # Wider than the usual 0.02, so that the blocks of so narrow a model do something.
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": family in ("llama", "gemma2", "gemma3_text"),
    }
    if family == "gpt_neox":
        del common["num_key_value_heads"], common["head_dim"]
    common.update(config_values)
    config: Any = AutoConfig.for_model(family, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # norms and biases start as ones and zeros: give them values, or mistakes with them hide
            for _, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_chat(family: str = "llama", dtype: str = "float32", **kwargs: Any) -> ChatModel:
    """A loaded tiny model, shared by the tests of a process: leave it as it was."""
    from convergent.models.load import load_base

    return load_base(str(tiny_model(family, **kwargs)), dtype=dtype, device="cpu")


def direction_for(chat: ChatModel, seed: int = 0, norm: float = 1.0) -> Direction:
    """A random direction that fits a model, with a vector of `norm` in every layer."""
    import torch

    from convergent.core.direction import Direction

    v = torch.randn(chat.n_layers, chat.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(norm * v / v.norm(dim=1, keepdim=True))
