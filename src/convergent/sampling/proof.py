"""Whether the sampler can run a model, and which of its short cuts the model takes, by trying."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convergent.errors import ConvergentError, ModelError
from convergent.models.cached import cache_name
from convergent.models.load import ChatModel
from convergent.models.resumed import resumable, resuming
from convergent.sampling.cache import SlotCache
from convergent.sampling.memory import out_of_memory

OWN_ATTENTION = (
    "{}: its attention does not go through the attention interface of transformers in every layer, or it keeps a state of its own, so it cannot be "
    "sampled; choose another base"
)


def last_logits(model: Any, cache_name: str, ids: Tensor, positions: Tensor, cache: SlotCache, kept: int | Tensor = 1) -> Tensor:
    """(batch, vocabulary) after the last token, or after those that `kept` names."""
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=kept, **{cache_name: cache}).logits
    return logits[:, -1]


_proven: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.inference_mode()
def prove(model: ChatModel, prompt: Sequence[int]) -> None:
    """Read the first tokens of a prompt and decode one, once per model and with no intervention in force. Raises ModelError if the sampler cannot run it."""
    name, device, n = type(model.model).__name__, model.device, min(4, len(prompt))
    if model.model in _proven:
        return
    cache, ids, positions = SlotCache(1, n + 1), torch.tensor([prompt[:n]], device=device), torch.arange(n, device=device)[None]
    for these, at, furthest in ((ids, positions, n), (ids[:, -1:], positions[:, -1:] + 1, n + 1)):
        step = cache.begin(slice(0, 1), at, furthest)
        step.proving = True
        try:
            last_logits(model.model, cache_name(model.model), these, at, cache)
        except Exception as error:
            if isinstance(error, ConvergentError) or out_of_memory(error):
                raise
            # A model that asks the cache for what it does not have, or hands attention other shapes, fails in ways of its own.
            why = " ".join(str(error).split())[:160]
            raise ModelError(f"{OWN_ATTENTION.format(name)} ({type(error).__name__}: {why})") from error
        if not step.stored == step.read == model.n_layers:
            raise ModelError(OWN_ATTENTION.format(name))
    _proven.add(model.model)


_resumes: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def resumes(model: ChatModel, prompt: Sequence[int]) -> bool:
    """Whether a pass that begins in the middle gives the bits of a whole one; tried once per model, after `prove`, on the first tokens of a prompt."""
    if model.model not in _resumes:
        try:
            _resumes[model.model] = _agree(model, prompt[:8])
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            if out_of_memory(error):
                raise
            _resumes[model.model] = False
    return _resumes[model.model]


def _agree(model: ChatModel, prompt: Sequence[int]) -> bool:
    ids, positions = torch.tensor([prompt], device=model.device), torch.arange(len(prompt), device=model.device)[None]
    kept: dict[int, Any] = {}
    whole, resumed = SlotCache(1, len(prompt)), SlotCache(1, len(prompt))
    logits: list[Tensor] = []
    with resumable(model.anatomy.blocks):
        for cache in (whole, resumed):
            cache.begin(slice(0, 1), positions, len(prompt))
            with resuming(kept, model.n_layers, (model.n_layers // 2,)):
                logits.append(last_logits(model.model, cache_name(model.model), ids, positions, cache))
    stored = [(store[layer], of_whole[layer]) for store, of_whole in ((resumed.keys, whole.keys), (resumed.values, whole.values)) for layer in store]
    return len(resumed.keys) < len(whole.keys) and all(torch.equal(a, b) for a, b in ((logits[0], logits[1]), *stored))
