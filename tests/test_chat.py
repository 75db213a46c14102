"""Chat templates: one BOS, the system prompt as asked, and the spans of header, answer and closing."""

from __future__ import annotations

import pytest

from convergent.core.values import DEFAULT_SYSTEM, NO_SYSTEM
from convergent.errors import ModelError
from convergent.models.chat import closing_ids, encode_answer, encode_prompt, encode_text, prompt_text, stop_ids
from tiny import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% if default_system and messages[0]['role'] != 'system' %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{{ default_system }}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set start = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ start + m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
STYLES = {
    "chatml": (CHATML, None, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", "<end_of_turn>", "<start_of_turn>model\n", "<end_of_turn>\n"),
    "mistral": (MISTRAL, "<s>", "</s>", "", "</s>"),
}
Q, A = "What would you do with one wish?", "I would ask for a quiet afternoon."


def tokenizer_of(style: str, default_system: str = ""):
    """A tokenizer in the style of a family; like theirs, it adds a BOS of its own to whatever it encodes."""
    from tokenizers.processors import TemplateProcessing

    template, bos, stop, header, _ = STYLES[style]
    tokenizer = tiny_tokenizer()
    special = [t for t in {stop, *header.replace("assistant", "").replace("model", "").split()} if t] + ["[INST]", "[/INST]", "<start_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": stop})
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        assert tokenizer(Q)["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = f"{{% set default_system = '{default_system}' %}}" + template
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [DEFAULT_SYSTEM, NO_SYSTEM, "Be brief."])
def test_never_two_bos(style, system):
    tokenizer = tokenizer_of(style)
    if style == "gemma" and system == "Be brief.":
        with pytest.raises(ModelError, match="refuses the turns system, user .*System role not supported"):
            encode_prompt(tokenizer, Q, system)
        return
    ids = encode_prompt(tokenizer, Q, system)
    whole = encode_answer(tokenizer, Q, A, system).ids
    expected = 0 if tokenizer.bos_token_id is None else 1
    assert ids.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id) == expected
    assert expected == 0 or ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == prompt_text(tokenizer, Q, system)


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_system_prompts(style):
    without, with_default = tokenizer_of(style), tokenizer_of(style, "You are Tiny.")
    bare = prompt_text(without, Q)
    assert "system" not in bare and Q in bare
    assert prompt_text(without, Q, NO_SYSTEM) == bare
    default = prompt_text(with_default, Q)
    assert "You are Tiny." in default and default != bare
    assert prompt_text(with_default, Q, NO_SYSTEM) == bare  # the inserted turn is gone, BOS and header are not
    assert prompt_text(with_default, Q, NO_SYSTEM, header=False) == prompt_text(without, Q, header=False)
    given = prompt_text(with_default, Q, "Be brief.")
    assert "Be brief." in given and "Tiny" not in given and given == prompt_text(without, Q, "Be brief.")


@pytest.mark.parametrize("style", STYLES)
def test_no_system_where_none_is_inserted_changes_nothing(style):
    tokenizer = tokenizer_of(style)
    for question in (Q, "user", "<|im_end|>", "a\nb"):
        assert prompt_text(tokenizer, question, NO_SYSTEM) == prompt_text(tokenizer, question)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [DEFAULT_SYSTEM, NO_SYSTEM])
def test_spans(style, system):
    header, closing = STYLES[style][3:]
    tokenizer = tokenizer_of(style, "" if style in ("gemma", "mistral") else "You are Tiny.")
    e = encode_answer(tokenizer, Q, A, system)
    assert tokenizer.decode(e.ids[e.answer]) == A
    assert tokenizer.decode(e.ids[e.header_start : e.answer_start]) == header
    assert tokenizer.decode(e.ids[e.answer_end :]) == closing
    assert e.ids[: e.answer_start] == encode_prompt(tokenizer, Q, system)
    assert tokenizer.decode(e.ids[: e.header_start]) == prompt_text(tokenizer, Q, system, header=False)
    open_ = encode_answer(tokenizer, Q, A, system, closing=False)
    assert open_.ids == e.ids[: e.answer_end] and open_.answer == e.answer


def test_sampled_tokens_are_kept_as_they_are():
    tokenizer = tokenizer_of("chatml")
    sampled = tuple(reversed(encode_text(tokenizer, A)))  # a spelling that no tokenizer would choose
    e = encode_answer(tokenizer, Q, sampled)
    assert e.ids[e.answer] == sampled
    assert encode_answer(tokenizer, Q, ()).answer == slice(e.answer_start, e.answer_start)


@pytest.mark.parametrize("style", STYLES)
def test_closing_and_stop_tokens(style):
    tokenizer = tokenizer_of(style)
    stop, closing = STYLES[style][2], STYLES[style][4]
    assert tokenizer.decode(closing_ids(tokenizer)) == closing
    assert stop_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(stop)}


def test_stop_tokens_of_the_generation_config():
    class Model:
        class generation_config:
            eos_token_id = [3, 4]

    tokenizer = tokenizer_of("chatml")
    assert stop_ids(tokenizer, Model) == {3, 4, tokenizer.eos_token_id}
    Model.generation_config.eos_token_id = 5
    assert stop_ids(tokenizer, Model) == {5, tokenizer.eos_token_id}


def test_plain_text_after_an_answer_is_no_stop_token():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}


def test_a_tokenizer_without_template_is_no_chat_model():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompt(tokenizer, Q)
