"""Chat templates: from a question (and an answer) to token ids, with the span of the answer.

The template is the tokenizer's own. Its text already holds the BOS token where the family has one, so the tokenizer must not
add another: ids come from the rendered text with `add_special_tokens=False`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from convergent.core.values import DEFAULT_SYSTEM, NO_SYSTEM
from convergent.errors import ModelError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """A prompt and an answer as one sequence."""

    ids: tuple[int, ...]
    """Prompt (with the assistant header), answer, closing tokens."""
    header_start: int
    """First token of the assistant header."""
    answer_start: int
    """First answer token."""
    answer_end: int
    """One past the last answer token."""

    @property
    def answer(self) -> slice:
        return slice(self.answer_start, self.answer_end)


def messages_for(question: str, system: str = DEFAULT_SYSTEM) -> list[dict[str, str]]:
    """The conversation that asks `question` under a system prompt: text, "default" (the template's own) or "none"."""
    turn = {"role": "user", "content": question}
    return [turn] if system in (DEFAULT_SYSTEM, NO_SYSTEM) else [{"role": "system", "content": system}, turn]


def prompt_text(tokenizer: Any, question: str, system: str = DEFAULT_SYSTEM, header: bool = True) -> str:
    """The rendered prompt, ready for the assistant's first token (`header=False`: without the assistant header)."""
    return render(tokenizer, messages_for(question, system), header, no_system=system == NO_SYSTEM)


def render(tokenizer: Any, messages: Sequence[Message], header: bool, no_system: bool = False) -> str:
    """Apply the tokenizer's chat template to messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template; use a chat model (a base model cannot be asked questions)")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    except TemplateError as error:  # what templates raise, e.g. Gemma 2 for a system turn
        roles = ", ".join(m["role"] for m in messages)
        raise ModelError(f"the chat template refuses the turns {roles} ({error}); change the system prompt or the model") from error
    if no_system:
        text = _without_default_system(tokenizer, messages, text, header)
    return text


def _without_default_system(tokenizer: Any, messages: Sequence[Message], text: str, header: bool) -> str:
    """Drop the system turn that some templates insert before the user turn.

    The user turn is found as what `text` shares with the end of a longer conversation: there it follows an assistant's
    answer, so nothing was inserted before it.
    """
    mark = "\u241f"
    longer = [messages[-1], {"role": "assistant", "content": mark}, messages[-1]]
    tail = os.path.commonprefix(  # noqa: RUF071  (text, not paths)
        [text[::-1], render(tokenizer, longer, header)[::-1]])[::-1]
    bos = tokenizer.bos_token or ""
    closing = _closing_text(tokenizer)
    if text[: len(text) - len(tail)] in ("", bos) or not (closing and tail.startswith(closing)):
        return text
    user_turn = tail[len(closing) :]
    return bos + user_turn if bos and text.startswith(bos) and not user_turn.startswith(bos) else user_turn


def encode_prompt(tokenizer: Any, question: str, system: str = DEFAULT_SYSTEM) -> tuple[int, ...]:
    """Token ids of the prompt including the assistant header; one BOS at most."""
    return encode_text(tokenizer, prompt_text(tokenizer, question, system))


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of rendered text."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def closing_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that the template writes after an assistant's answer (end of turn, and a newline where it has one)."""
    return encode_text(tokenizer, _closing_text(tokenizer))


def _closing_text(tokenizer: Any) -> str:
    probe = "\u241fanswer\u241f"
    text = render(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": probe}], header=False)
    return text.partition(probe)[2]


def stop_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's and generation config's EOS, and the template's end-of-turn token."""
    stops: set[int] = set()
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops.update([eos] if isinstance(eos, int) else eos or [])
    # Only a token made for it: a template that closes with plain text (a newline) must not end answers there.
    made = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    stops.update([i for i in closing_ids(tokenizer) if i in made][:1])
    return frozenset(stops)


def encode_answer(
    tokenizer: Any, question: str, answer: str | Sequence[int], system: str = DEFAULT_SYSTEM, closing: bool = True
) -> Encoded:
    """One question with one answer (text, or the very tokens that were sampled) and the span of the answer's tokens."""
    prompt = encode_prompt(tokenizer, question, system)
    bare = encode_text(tokenizer, prompt_text(tokenizer, question, system, header=False))
    ids = encode_text(tokenizer, answer) if isinstance(answer, str) else tuple(int(t) for t in answer)
    tail = closing_ids(tokenizer) if closing else ()
    header = len(bare) if prompt[: len(bare)] == bare else len(prompt)
    return Encoded((*prompt, *ids, *tail), header, len(prompt), len(prompt) + len(ids))
