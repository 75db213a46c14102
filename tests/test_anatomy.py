"""Anatomy: the same reading of every family, and a clear refusal of what is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from convergent.errors import ModelError
from convergent.models.anatomy import inspect_model, named_targets, stream, with_stream
from tiny import FAMILIES, n_hooks, tiny_chat

IDS = torch.arange(3, 15).view(2, 6)
NORM_FOLLOWS = ("gemma2", "gemma3_text", "olmo2")


def record(model: nn.Module, modules):
    """Input and output of each module in one pass."""
    seen, handles = {}, []
    for module in modules:
        handles.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out: seen.__setitem__(m, ((args[0] if args else kwargs["hidden_states"]), stream(out))), with_kwargs=True
            )
        )
    with torch.inference_mode():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    chat = tiny_chat(family)
    a, config = chat.anatomy, chat.model.config
    assert (a.n_layers, a.d_model) == (config.num_hidden_layers, config.hidden_size)
    assert len(a.blocks) == len(a.attention_writes) == len(a.mlp_writes) == len(a.attention_linears) == len(a.mlp_linears) == a.n_layers
    assert a.embedding is chat.model.get_input_embeddings() and a.head is chat.model.get_output_embeddings()
    assert a.final_norm is not None and not any(a.final_norm is m for b in a.blocks for m in b.modules())
    everything = record(chat.model, [a.embedding, a.final_norm, *a.blocks])
    x = everything[a.embedding][1]
    for block in a.blocks:  # the stream runs through embedding, blocks, final norm, in this order
        assert_close(everything[block][0], x)
        x = everything[block][1]
    assert_close(everything[a.final_norm][0], x)
    writes = record(chat.model, [w for w in (*a.attention_writes, *a.mlp_writes) if w not in a.blocks])
    for block, attention, mlp in zip(a.blocks, a.attention_writes, a.mlp_writes, strict=True):
        before, after = everything[block]
        assert_close(before + writes[attention][1] + writes[mlp][1], after, atol=1e-5, rtol=1e-4)
    assert not n_hooks(chat.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mixes_tokens_and_mlp_does_not(family):
    chat = tiny_chat(family)
    write = {kind: {} for kind in ("attention", "mlp")}
    for name in ("a", "b"):  # two batches that differ in the first token alone
        ids = IDS.clone()
        ids[:, 0] = 1 if name == "a" else 2
        for kind, module in (("attention", chat.anatomy.attention_writes[0]), ("mlp", chat.anatomy.mlp_writes[0])):
            handle = module.register_forward_hook(lambda m, args, out, kind=kind, name=name: write[kind].__setitem__(name, stream(out)))
            with torch.inference_mode():
                chat.model(input_ids=ids)
            handle.remove()
    changed = {kind: (w["a"] - w["b"])[:, 1:].abs().max() for kind, w in write.items()}
    assert changed["attention"] > 1e-3
    if family == "gpt_neox":  # its MLP reads the block's input, so in the first block it sees one token only
        assert changed["mlp"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_linear_layers(family):
    a = tiny_chat(family).anatomy
    if family in NORM_FOLLOWS:
        assert set(a.attention_linears) == set(a.mlp_linears) == {None}
        return
    names = {id(m): n.rpartition(".")[2] for n, m in a.body.named_modules()}
    outs = {"gpt_neox": ("dense", "dense_4h_to_h")}.get(family, ("o_proj", "down_proj"))
    assert {names[id(m)] for m in a.attention_linears} == {outs[0]} and {names[id(m)] for m in a.mlp_linears} == {outs[1]}
    for layer, (attention, mlp) in enumerate(zip(a.attention_linears, a.mlp_linears, strict=True)):
        assert any(attention is m for m in a.blocks[layer].modules()) and any(mlp is m for m in a.blocks[layer].modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_read_alike_in_bfloat16_with_massive_activations(family):
    exact, chat = tiny_chat(family), tiny_chat(family, "bfloat16", seed=9)
    with torch.no_grad():  # one dimension of the stream a thousand times the others: bfloat16 drops the writes' last bits there
        chat.anatomy.embedding.weight[:, 3] = 2000.0
    found = inspect_model(chat.model)

    def names(a):
        of = {id(m): n for n, m in a.body.named_modules()}
        return [[None if m is None else of[id(m)] for m in p] for p in (a.attention_writes, a.mlp_writes, a.attention_linears, a.mlp_linears)]

    assert names(found) == names(exact.anatomy)


def test_read_in_bfloat16_where_the_writes_cancel_each_other():
    """The stream is largest between them, and so is its rounding there."""
    chat = tiny_chat("qwen2", "bfloat16")
    before = inspect_model(chat.model)
    hooks = [
        write.register_forward_hook(lambda m, args, out, by=by: (out[0] + by, *out[1:]) if isinstance(out, tuple) else out + by)
        for writes, by in ((before.attention_writes, 300.0), (before.mlp_writes, -300.0))
        for write in writes
    ]
    found = inspect_model(chat.model)
    for hook in hooks:
        hook.remove()
    assert (found.attention_writes, found.mlp_writes) == (before.attention_writes, before.mlp_writes)


def test_adapter_targets():
    a = tiny_chat().anatomy
    names = dict(named_targets(a))
    assert len(names) == 7 * a.n_layers
    assert names["layers.5.mlp.down_proj"] is a.mlp_linears[5]


def test_streams_in_tensors_and_tuples():
    h, new = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    assert stream(h) is h and stream((h, "cache")) is h
    assert with_stream(h, new) is new and with_stream((h, "cache"), new) == (new, "cache")
    for output in ({"hidden": h}, None, ("text", h)):
        with pytest.raises(ModelError, match="neither a tensor nor a tuple"):
            stream(output)


class Config:
    num_hidden_layers, hidden_size = 2, 8


class Plain(nn.Module):
    """A module with a config and blocks, but no residual stream."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.config, self.embed, self.layers = Config(), nn.Embedding(16, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def other(name: str) -> nn.Module:
    import transformers as t

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0}
    if name == "bert":
        return t.BertModel(t.BertConfig(**small))
    if name == "t5":
        return t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    if name == "granite":  # scales what it adds, so no submodule's output is what is added
        return t.GraniteForCausalLM(t.GraniteConfig(**small, num_key_value_heads=2, residual_multiplier=0.3))
    if name == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    if name == "no config":
        return nn.Linear(8, 8)
    if name == "other depth":
        return Plain(3)
    assert name == "no stream"
    return Plain()


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("bert", "BertModel: looked for"),
        ("t5", "T5ForConditionalGeneration: looked for a decoder alone"),
        ("granite", "GraniteForCausalLM: looked in block 0 .* for two submodules"),
        ("mamba", "MambaForCausalLM: looked in block 0"),
        ("no config", "Linear: looked for num_hidden_layers and hidden_size"),
        ("other depth", "Plain: looked for a ModuleList of 2 blocks"),
        ("no stream", r"Plain: looked in block 0 \(Linear"),
    ],
)
def test_unknown_architectures_are_refused(name, looked_for):
    model = other(name).eval()
    with pytest.raises(ModelError, match=looked_for):
        inspect_model(model)
    assert not n_hooks(model)


def test_training_mode_is_kept():
    chat = tiny_chat("llama", seed=4)
    chat.model.train()
    inspect_model(chat.model)
    assert chat.model.training and chat.model.model.training
    chat.model.eval()
