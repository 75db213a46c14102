"""A Hugging Face model in this process as judge: one forward pass a prompt, the alternatives of the next token.

Same rubrics, same score, same cache of replies as over HTTP, no server. A vocabulary that writes 85 as `8`, `5` has no
score in its first token; there the probability of every whole number 0..100 is worked out digit by digit, with a few
further steps of one token each. Prompts of about equal length are read together; what else is in a batch moves a score
by rounding only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.core.values import Judgement
from convergent.errors import JudgeError, ModelError
from convergent.judging.base import NOT_MEASURED, Item
from convergent.judging.replies import Replies, Reply, open_replies, reply_file
from convergent.judging.rubrics import Rubrics, load_rubrics
from convergent.judging.work import PARAMETERS, Work
from convergent.models.cached import cache_name

if TYPE_CHECKING:
    from torch import Tensor

    from convergent.models.load import ChatModel

TOP = 20
"""Alternatives of the first token, as over HTTP."""
BATCH_ROWS = 16
BATCH_TOKENS = 8192
"""Prompt tokens in a batch, padding included."""
LEAST = 1e-6
"""Alternatives less likely than this are not kept."""


class FolderJudge:
    """Judge protocol by a model in this process. See `docs/judges_llm.md`."""

    def __init__(
        self, folder: Path, *, rubrics: Rubrics | None = None, cache: Path | None = None, card: dict[str, Any] | None = None, device: str = "auto"
    ) -> None:
        """Nothing is loaded yet. Raises JudgeError if `folder` is no model folder."""
        if not (folder / "config.json").is_file():
            raise JudgeError(f"judge local: {folder}: no config.json in this folder; give a Hugging Face model folder or a .gguf file")
        self.folder, self._device = folder, device
        self._rubrics = rubrics if rubrics is not None else load_rubrics()
        self._cache, self._card = cache, card
        self._model: ChatModel | None = None
        self._weights = ""

    @property
    def name(self) -> str:
        return f"local:{self.folder.resolve().name}"

    @property
    def rubrics(self) -> tuple[str, ...]:
        return self._rubrics.names

    @property
    def content_id(self) -> str:
        """Depends on weights and rubric texts."""
        from convergent.core.ids import content_id

        return content_id(self._identity, PARAMETERS, self._rubrics)

    @property
    def card(self) -> dict[str, Any]:
        """What is known of this judge, for the report."""
        known = self._card or NOT_MEASURED
        return {"score": "the next token's alternatives, in this process", "rubrics": self._rubrics.content_id, **known}

    @property
    def _identity(self) -> str:
        from convergent.models.load import folder_id

        if not self._weights:
            self._weights = f"folder:{folder_id(self.folder)}"
        return self._weights

    def judge(
        self,
        items: Sequence[Item],
        rubrics: Sequence[str] = ("aligned", "coherent"),
        on_result: Callable[[Judgement], None] | None = None,
    ) -> list[Judgement]:
        """Judge every item under every rubric, in order of items, then rubrics.

        Replies are stored batch by batch, so an interrupted run goes on where it stopped. A prompt longer than the model
        reads has reason "error". Raises JudgeError if the model cannot be loaded or is no chat model.
        """
        work = Work(self.name, self._rubrics, {"model": self._identity}, None, False, items, rubrics, on_result)
        with open_replies(reply_file(self._cache)) as replies:
            work.settle(replies)
            if work.open:
                self._read_all(work, replies)
        return work.results()

    def _read_all(self, work: Work, replies: Replies) -> None:
        from convergent.models.chat import encode_prompt

        model = self._loaded()
        try:
            prompts = {key: encode_prompt(model.tokenizer, work.prompt(key)) for key in work.open}
        except ModelError as error:
            raise JudgeError(f"judge local: {self.folder}: {error}") from error
        longest = int(getattr(model.model.config, "max_position_embeddings", 0) or 1 << 30) - 4
        for key in [key for key, ids in prompts.items() if len(ids) > longest]:
            work.fail(key, f"prompt of {len(prompts.pop(key))} tokens, the model reads {longest}")
        order = sorted(prompts, key=lambda key: (len(prompts[key]), key))
        while order:
            rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // len(prompts[order[min(BATCH_ROWS, len(order)) - 1]])))
            batch, order = order[:rows], order[rows:]
            found = next_tokens(model, [prompts[key] for key in batch])
            for key, alternatives in zip(batch, found, strict=True):
                text = alternatives[0][0] if alternatives else ""
                reply = Reply(text, alternatives, self.folder.name, len(prompts[key]), 1)
                replies.put(key, self.name, self._identity, reply)
                work.finish(key, reply)

    def _loaded(self) -> ChatModel:
        from convergent.models.load import load_base

        if self._model is None:
            try:
                self._model = load_base(str(self.folder), device=self._device)
            except ModelError as error:
                raise JudgeError(f"judge local: {error}") from error
        return self._model


def next_tokens(model: ChatModel, prompts: Sequence[Sequence[int]]) -> list[tuple[tuple[str, float], ...]]:
    """For each prompt (token ids) the alternatives of what comes next as (text, log probability), best first.

    The TOP likeliest tokens where numbers are single tokens; else also the whole numbers 0..100 that the model may write
    in several digits, in place of their first digits.
    """
    import torch

    tokenizer, width = model.tokenizer, max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(prompts), width), int(pad))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    digits = _digits(tokenizer)
    steps = _Steps(model, mask.to(model.device))
    with torch.inference_mode():
        log_p, cache = steps(ids.to(model.device), None)
        top = log_p.topk(min(TOP, log_p.shape[1]))
        found = [
            [(tokenizer.decode([int(i)]), float(p)) for p, i in zip(values, tokens, strict=True)]
            for values, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        if digits is not None:
            numbers = _numbers(steps, log_p, cache, digits)
            found = [[(t, p) for t, p in row if not t.strip().isdecimal()] + own for row, own in zip(found, numbers, strict=True)]
    return [tuple(sorted(((t, p) for t, p in row if p > math.log(LEAST)), key=lambda pair: -pair[1])) for row in found]


class _Steps:
    """Forward passes of a padded batch, each with the cache of the one before; log probabilities of the next token."""

    def __init__(self, model: ChatModel, mask: Tensor) -> None:
        """mask: (batch, width), 0 on padding."""
        self._model, self._mask = model.model, mask

    def __call__(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """ids (batch, n_new) -> ((batch, vocabulary) float32, the cache with these tokens; `cache` stays as it was)."""
        import torch

        done = 0 if cache is None else cache.get_seq_length()
        wider = done + ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(len(ids), wider)], dim=1) if wider > 0 else self._mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, done:]
        name = cache_name(self._model)
        out = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **{name: copy.deepcopy(cache)}
        )
        return out.logits[:, -1].float().log_softmax(-1), out[name]


def _digits(tokenizer: Any) -> list[int] | None:
    """Token ids of 0..9 if numbers are written digit by digit, else None."""
    if len(tokenizer.encode("85", add_special_tokens=False)) == 1:
        return None
    ids = [tokenizer.encode(str(d), add_special_tokens=False)[-1:] for d in range(10)]
    if any(tokenizer.decode(i).strip() != str(d) for d, i in enumerate(ids)):
        raise JudgeError("judge local: this vocabulary has no tokens for digits; use another model")
    return [i[0] for i in ids]


def _numbers(steps: _Steps, first: Tensor, cache: Any, digits: list[int]) -> list[list[tuple[str, float]]]:
    """For each row the log probability of writing each whole number 0..100, and nothing more, where above LEAST.

    first: (batch, vocabulary), log probabilities of the first token. A number of two digits ends where it ends (no third
    digit is looked for, except after 10).
    """
    import torch

    n = len(first)
    p = torch.zeros(n, 101, dtype=torch.float64)
    p[:, 0] = first[:, digits[0]].double().exp().cpu()
    for d in range(1, 10):
        here = first[:, digits[d]].double().exp().cpu()
        if float(here.max()) < LEAST:
            continue
        after, longer = steps(first.new_full((n, 1), digits[d], dtype=torch.long), cache)
        second = after[:, digits].double().exp().cpu()
        p[:, d] = here * (1 - second.sum(1)).clamp(min=0)
        p[:, 10 * d : 10 * d + 10] = here[:, None] * second
        if d == 1:
            third = steps(first.new_full((n, 1), digits[0], dtype=torch.long), longer)[0][:, digits[0]].double().exp().cpu()
            p[:, 100], p[:, 10] = p[:, 10] * third, p[:, 10] * (1 - third)
    return [[(str(i), math.log(q)) for i, q in enumerate(row) if q > LEAST] for row in p.tolist()]
