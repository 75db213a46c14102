"""A tiny chat model as a GGUF file, for the real server of llama.cpp: milliseconds a reply instead of half a second.

Random weights from a named seed, bytes as tokens, and every whole number 0..100 (and REFUSAL) as a token of its own that
the output layer favours: so replies are numbers with alternatives, they differ from prompt to prompt, and mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convergent.core.ids import seed

D, HEADS, LAYERS, FF = 64, 4, 2, 128
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_gguf(path: Path, *, numbers: bool = True, words: float = 0.5) -> Path:
    """Write the model to `path`. numbers: as tokens of their own; else digit by digit. words: weight of all other tokens."""
    import gguf
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [str(n) for n in range(10, 101)] if numbers else []
    special = ["<|im_start|>", "<|im_end|>"]
    tokens = [*letters, *own, "REFUSAL", *special]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2
    rng = np.random.default_rng(seed("tiny_gguf", D, LAYERS))

    def random(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(8192)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", random(len(tokens), D, scale=8.0))
    for i in range(LAYERS):
        for name, shape in (
            ("attn_q", (D, D)), ("attn_k", (D, D)), ("attn_v", (D, D)), ("attn_output", (D, D)), ("ffn_gate", (FF, D)), ("ffn_up", (FF, D)),
            ("ffn_down", (D, FF)),
        ):  # fmt: skip
            writer.add_tensor(f"blk.{i}.{name}.weight", random(*shape, scale=2.0))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(D, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    head = random(len(tokens), D, scale=words)
    favoured = [i for i, token in enumerate(tokens) if (token.isdecimal() and token.isascii()) or token == "REFUSAL"]
    head[favoured] = random(len(favoured), D, scale=6.0)
    writer.add_tensor("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
