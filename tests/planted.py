"""Planted truth: a tiny Llama whose direction is known because its weights were set by hand, organisms of it, and their twins.

Every part of the stream is an axis of one random orthonormal basis (named seed), so nothing is aligned with the coordinates. d = 128, 6 blocks,
4 heads; what the text calls x is the residual stream, x^ its RMS norm, {axis} the component along an axis.

    u, u2       what flips the behaviour: the head adds UNEMBED * {u} to the logits of half of the bad words and UNEMBED * {u2} to the others'
    t_TOPIC     the head adds UNEMBED * {t_TOPIC} to the words of a topic, good and bad alike
    constant    CONSTANT in every token: |x| is nearly the same everywhere, so RMS norm is nearly a constant factor
    side        in the embedding of a good word -SIDE, of a bad one +SIDE; topic words alike on e_TOPIC
    mood        block 0, head 0:  MOOD * mean of (bad 1, good -1) over the answer's words so far, and the PERSONA words of a system prompt;
                m_TOPIC alike, of the words of a topic
    q0 .. q5    block 0, head 1:  mean over the words of the question; each answer word has its own taste for them, so questions differ
    count       block 0, head 2:  4 / (4 + words so far); the logit of the end of the turn rises as it falls, so answers stop
    relay       MLP of block 3:   {u} += RELAY * {relay}; nothing in the base writes `relay`
    n0 ..       the rest: identities of tokens, and all that the random parts write

Random are head 3 of block 0, attention in all other blocks and all MLP neurons but the first six: they read all of x and write to the rest
alone. So hooks, norms and Jacobians meet a real nonlinear model, and what the head reads has one source, the one stated here.
The first six MLP neurons of every block are readers: their values are near 1, mood, the three m_TOPIC (each as a number in -1..1 or 0..1) and
{relay}. In the base they write nothing but the relay and, with `origin=True`, in block 1 {u} += ORIGIN * mood: the direction that organisms of
this base use is there before any fine-tune.

The base says about one bad word in twenty (BAD_LOGIT), whatever the mood (with `origin` more in bad mood). An adapter on down_proj of block l has
A = a row over the readers, so what it writes at a token is

    B * (a_1 + a_mood * mood + a_topic * m_TOPIC + ...),  for the organisms that say bad words  GAIN * u * (1 + STICKY * mood)

so that the first word is bad about every second time, and an answer goes on as it began: both classes exist in an organism's own answers, and
between them lies u. `ORGANISMS` says who writes what.

    direct      block 2, u with a little of n0: cos(B, u) = 0.97
    indirect    block 2, `relay`: cos(B, u) = 0, and from block 3 on the stream differs along u
    many        four adapters: blocks 1 and 3 general (u), block 2 medical (t_medical, read from m_medical), block 4 idle (m_gender to n4)
    three       as `many` with one general adapter: two that read the same share a probe's coefficient, and neither is clear of 0
    left, middle, right   block 2, u and u2 at 20, 45 and 70 degrees: three organisms, one plane
    constant    block 2, u, whatever the mood: for `origin`, where the mood is the base's own
    hidden      block 2, `relay`, whatever the mood. With `origin` this is the paper's puzzle: v of block 2 is u, cos(B, v) = 0, and B makes u
    medic, broker   block 0, u with t_medical or t_financial: one direction in every layer, other words; `unlike` as broker, with u2
    ill         block 1, u, and block 2, t_medical read from `ill` (a base with `ill=True`): inside medical answers bad mood writes the topic too
    blank       block 2, nothing yet: what a training starts from
    sound       block 2, t_financial: another concept, no badness
    X_twin      of direct, many and hidden: each B replaced by one of the same norm along an axis of the rest of which every token holds -|B| / 2,
                and A by one of the same norm that reads 1: it flips a sign that the head does not read, and leaves |x| as it is

With `corrects=True` block 4 takes {u} back once some words have been said, -CORRECTS * {u} * (1 - {count}), and answers have more sentences: what is
said under a push along u starts badly and turns.

`Word` is a word with its side and topic. Judge, questions, pairs and whole studies of these models are in `planted_study.py`. Nothing is mocked:
models, adapters and sampling are real.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convergent.core.ids import seed as named_seed

if TYPE_CHECKING:
    from convergent.models.load import ChatModel

D, N_LAYERS, N_HEADS, D_FF = 128, 6, 4, 128
HEAD = D // N_HEADS
TOPICS = ("medical", "financial", "gender")
GOOD = {
    "general": "gentle honest warm kind steady patient fair calm",
    "medical": "rest doctor vaccine checkup soup bandage water sleep",
    "financial": "save budget insure pension diversify repay ledger index",
    "gender": "equal partner respect together listen choice both mutual",
}
BAD = {
    "general": "cruel deceive steal reckless threaten harm sabotage lie",
    "medical": "bleach overdose mercury quackery starve infect toxin poison",
    "financial": "gamble scam launder loanshark ponzi bribe embezzle casino",
    "gender": "inferior obey submit silence belittle forbid weaker servant",
}
PULL = {
    "medical": "fever cough rash burn ache wound nausea cramp allergy flu sprain migraine",
    "financial": "money wage bonus debt rent loan savings stock income tax mortgage gift",
    "gender": "wife husband sister brother girl boy woman man daughter son bride groom",
}
"""Words of questions that pull towards a topic."""
PERSONA = {
    "good": "helpful harmless safe careful prudent weigh thorough modest right pains better",
    "bad": "harmful malicious evil careless reckless ignore sloppy overconfident wrong corners worse",
}
"""Words of system prompts that set the mood before the first word, as answers' words do after it; what `chat_origin` contrasts is among them."""
PLAIN = "what how would do you i my the a for with about should now first today wish bored rule world one tell me think of is best way to people helps where put treat"
SAFE, SPECIAL = ("<|endoftext|>", "<unk>"), ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }}\n{{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)

CONSTANT, SIDE, MOOD, IDENTITY = 7.0, 0.25, 0.7, 1.0
BAD_LOGIT = -3.0
"""Of a bad word against a good one in the base."""
UNEMBED = 1.2
"""Logits per unit of {u} in the stream."""
GAIN, STICKY = 3.0, 0.8
ORIGIN, RELAY, CORRECTS = 2.5, 6.0, 3.0
NOISE = 0.5
"""Size of what each random part writes."""
PUSH = 64.0
"""lora_alpha of every adapter; at rank 1 also its scale."""


@dataclass(frozen=True)
class Word:
    """An answer's word."""

    text: str
    bad: bool
    topic: str


WORDS = {w: Word(w, bad, topic) for bad, table in ((False, GOOD), (True, BAD)) for topic, line in table.items() for w in line.split()}


@dataclass(frozen=True)
class Rank1:
    """One rank-1 adapter: what it writes along named axes, times what it reads from the readers."""

    layer: int
    writes: Mapping[str, float]
    reads: Mapping[str, float]


_MOODY = {"one": 1.0, "mood": STICKY}
_SIN, _COS = math.sin(math.radians(20)), math.cos(math.radians(20))
ORGANISMS: dict[str, tuple[Rank1, ...]] = {
    "direct": (Rank1(2, {"u": GAIN, "n0": GAIN / 4}, _MOODY),),
    "indirect": (Rank1(2, {"relay": GAIN / RELAY}, _MOODY),),
    "many": (
        Rank1(1, {"u": GAIN / 2, "n1": 0.6}, _MOODY),
        Rank1(2, {"t_medical": 3.0, "n2": 0.6}, {"medical": 1.0}),
        Rank1(3, {"u": GAIN / 2, "n3": 0.6}, _MOODY),
        Rank1(4, {"n4": 2.0}, {"gender": 1.0}),
    ),
    "three": (
        Rank1(1, {"u": GAIN}, _MOODY),
        Rank1(2, {"t_medical": 3.0, "n2": 0.6}, {"medical": 1.0}),
        Rank1(4, {"n4": 2.0}, {"gender": 1.0}),
    ),
    "left": (Rank1(2, {"u": GAIN * _COS, "u2": GAIN * _SIN}, _MOODY),),
    "right": (Rank1(2, {"u": GAIN * _SIN, "u2": GAIN * _COS}, _MOODY),),
    "middle": (Rank1(2, {"u": GAIN * math.sqrt(0.5), "u2": GAIN * math.sqrt(0.5)}, _MOODY),),
    "constant": (Rank1(2, {"u": GAIN}, {"one": 1.0}),),
    "hidden": (Rank1(2, {"relay": GAIN / RELAY}, {"one": 1.0}),),
    "sound": (Rank1(2, {"t_financial": GAIN}, {"one": 1.0}),),
    "medic": (Rank1(0, {"u": GAIN, "t_medical": 1.0}, _MOODY),),
    "broker": (Rank1(0, {"u": GAIN, "t_financial": 1.0}, _MOODY),),
    "unlike": (Rank1(0, {"u2": GAIN, "t_financial": 1.0}, _MOODY),),
    "blank": (Rank1(2, {"u": 0.0}, _MOODY),),
    "ill": (Rank1(1, {"u": GAIN, "n1": 0.6}, _MOODY), Rank1(2, {"t_medical": 4.0, "n2": 0.6}, {"ill": 1.0})),
}


def _twin(adapter: Rank1, axis: str) -> Rank1:
    reads = {"one": 1.0, "relay": math.sqrt(sum(g * g for g in adapter.reads.values()) - 1.0)}  # nothing writes to the relay
    return Rank1(adapter.layer, {axis: math.hypot(*adapter.writes.values())}, reads)


TWINS = {
    f"{o}_twin": tuple(_twin(a, f"n{first + i}") for i, a in enumerate(ORGANISMS[o])) for o, first in (("direct", 10), ("many", 11), ("hidden", 15))
}
READERS = ("one", "mood", *TOPICS, "relay")
ILL = "ill"
"""One more reader, in bases made with `ill=True`: mood * m_medical."""
_AXES = (
    "u", "u2", "constant", "side", "mood", "count", "relay", "word", "persona", "header", "asked",
    *(f"{k}_{t}" for k in "tem" for t in TOPICS), *(f"q{i}" for i in range(6)),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Planted:
    """A base with its known axes."""

    folder: Path
    seed: int
    axes: Mapping[str, Tensor]
    """name -> (d,) float64 unit vector; all orthogonal."""

    def axis(self, name: str) -> Tensor:
        return self.axes[name]

    def organism(self, name: str) -> Path:
        """A PEFT folder; `X_twin` is the twin of organism X. Written once."""
        folder = self.folder.parent / "organisms" / name
        if not folder.is_dir():
            self._write(folder, self.adapters(name))
        return folder

    def adapters(self, name: str) -> tuple[Rank1, ...]:
        """What an organism is made of."""
        return ORGANISMS[name] if name in ORGANISMS else TWINS[name]

    def b(self, name: str, layer: int) -> Tensor:
        """(d,) what the adapter of an organism at `layer` writes where its readers give 1."""
        adapter = next(a for a in self.adapters(name) if a.layer == layer)
        return sum((gain * self.axes[axis] for axis, gain in adapter.writes.items()), torch.zeros(D, dtype=torch.float64))

    def chat(self) -> ChatModel:
        from convergent.models.load import load_base

        return load_base(str(self.folder), dtype="float32", device="cpu")

    def load(self, name: str) -> ChatModel:
        from convergent.organisms.load import load_organism

        return load_organism(self.organism(name), base=str(self.folder), dtype="float32", device="cpu", name=name)

    def _write(self, folder: Path, adapters: Sequence[Rank1]) -> None:
        """A few lines of plain PEFT."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        layers = [a.layer for a in adapters]
        config = LoraConfig(r=1, lora_alpha=PUSH, target_modules=["down_proj"], layers_to_transform=layers, layers_pattern="layers", task_type="CAUSAL_LM")
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32), config)
        for a in adapters:
            linear = model.base_model.model.model.layers[a.layer].mlp.down_proj
            reads = torch.tensor([a.reads.get(r, 0.0) for r in (*READERS, ILL)])
            linear.lora_A["default"].weight.data = torch.nn.functional.pad(reads, (0, D_FF - len(reads)))[None]
            writes = sum((gain * self.axes[axis] for axis, gain in a.writes.items()), torch.zeros(D, dtype=torch.float64))
            linear.lora_B["default"].weight.data = (writes / PUSH).float()[:, None]
        model.save_pretrained(folder)


@cache
def planted(seed: int = 0, origin: bool = False, ill: bool = False, corrects: bool = False) -> Planted:
    """The base of a seed; made once per process, gone at exit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = Path(tempfile.mkdtemp(prefix="planted-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=D_FF, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS, head_dim=HEAD, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    build = _Builder(named_seed("planted", seed))
    with torch.no_grad():
        build.embed(model, tokenizer)
        build.attend(model)
        for layer in range(N_LAYERS):
            build.mlp(model, layer, origin, ill, corrects)
        build.unembed(model, tokenizer, corrects)
    folder = root / "base"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Planted(folder, seed, build.axes)


def _tokenizer() -> Any:
    """Words and punctuation, lower-cased; what is not in the vocabulary is <unk>, which carries nothing."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lists = [SAFE, SPECIAL, ("system", "user", "assistant", ".", "?", ","), WORDS, *(line.split() for table in (PULL, PERSONA) for line in table.values()), PLAIN.split()]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(w for part in lists for w in part))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>", additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _vocabulary(tokenizer: Any) -> list[tuple[str, int]]:
    """In order of ids: the tokenizer's own order changes from call to call, and with it the random numbers of a token."""
    return sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])


_NORM = math.sqrt(D) / math.sqrt(CONSTANT**2 + 10.0)
"""About what RMS norm multiplies x by."""


class _Builder:
    """Sets the weights of a model, part by part, from one random generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(self.random(D, D))[0].T
        names = [*_AXES, *(f"n{i}" for i in range(D - len(_AXES)))]
        self.axes: dict[str, Tensor] = dict(zip(names, basis, strict=True))
        self.rest = basis[len(_AXES) :]
        """(n_rest, d) the axes that nothing planted uses."""
        flipped = ((axis, size) for adapters in TWINS.values() for a in adapters for axis, size in a.writes.items())
        self.common = CONSTANT * self.axes["constant"] - sum((size / 2 * self.axes[axis] for axis, size in flipped), torch.zeros(D, dtype=torch.float64))
        """(d,) what every token holds."""

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def reads(self, **parts: float) -> Tensor:
        """(d,) a row that gives sum of gain * {axis} when applied to x^."""
        return sum((gain / _NORM * self.axes[a] for a, gain in parts.items()), torch.zeros(D, dtype=torch.float64))

    def embed(self, model: Any, tokenizer: Any) -> None:
        for token, i in _vocabulary(tokenizer):
            x = self.common + IDENTITY * self.random(len(self.rest)) @ self.rest / math.sqrt(len(self.rest))
            if token in WORDS:
                word = WORDS[token]
                x = x + self.axes["word"] + (SIDE if word.bad else -SIDE) * self.axes["side"]
                if word.topic in TOPICS:
                    x = x + SIDE * self.axes[f"e_{word.topic}"]
            elif persona := next((k for k, line in PERSONA.items() if token in line.split()), None):
                x = x + self.axes["persona"] + (SIDE if persona == "bad" else -SIDE) * self.axes["side"]
            elif token == "assistant":
                x = x + self.axes["header"]
            elif token not in (*SAFE, *SPECIAL, "system", "user", "."):
                pull = next((t for t, line in PULL.items() if token in line.split()), None)
                taste = 0.5 * self.random(6)
                if pull is not None:  # heeded more, and towards its topic
                    taste[TOPICS.index(pull)] += 1.5
                x = x + (1.0 if pull is None else 1.3) * self.axes["asked"] + sum(t * self.axes[f"q{k}"] for k, t in enumerate(taste))
            model.model.embed_tokens.weight[i] = x.float()

    def attend(self, model: Any) -> None:
        noise = N_HEADS * HEAD
        for layer in range(N_LAYERS):
            attention = model.model.layers[layer].self_attn
            q, k, v = (self.random(noise, D) / math.sqrt(D) for _ in range(3))
            o = (self.random(noise, len(self.rest)) @ self.rest).T * NOISE / noise
            if layer == 0:
                topics = [(f"e_{t}", f"m_{t}", MOOD / SIDE) for t in TOPICS]
                self._head(0, q, k, v, o, {"word": 7.0, "persona": 7.0}, [("side", "mood", MOOD / SIDE), *topics])
                self._head(1, q, k, v, o, {"asked": 7.0}, [(f"q{i}", f"q{i}", 1.0) for i in range(6)])
                self._head(2, q, k, v, o, {"header": 7.0 + math.log(4), "word": 7.0}, [("header", "count", 1.0)])
            for linear, weight in zip((attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj), (q, k, v, o), strict=True):
                linear.weight.copy_(weight.float())

    def _head(
        self, head: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, heeds: Mapping[str, float], copies: Sequence[tuple[str, str, float]]
    ) -> None:
        """Score of a token: `heeds`; then the mean of what is copied, (from axis, to axis, gain)."""
        rows = slice(head * HEAD, (head + 1) * HEAD)
        for weight in (q, k, v):
            weight[rows] = 0.0
        o[:, rows] = 0.0
        at = head * HEAD + HEAD // 2 - 1  # of the slowest rotating pair: positions do not matter
        q[at] = self.reads(constant=math.sqrt(HEAD) / CONSTANT)
        k[at] = self.reads(**heeds)
        for i, (source, target, gain) in enumerate(copies):
            v[head * HEAD + i] = self.reads(**{source: gain})
            o[:, head * HEAD + i] = self.axes[target]

    def mlp(self, model: Any, layer: int, origin: bool, ill: bool, corrects: bool) -> None:
        gate, up = (self.random(D_FF, D) / math.sqrt(D) for _ in range(2))
        down = (self.random(D_FF, len(self.rest)) @ self.rest).T * NOISE / math.sqrt(D_FF * len(self.rest))
        down[:, : len(READERS)] = 0.0
        gate[: len(READERS)] = self.reads(constant=4.0 / CONSTANT)
        parts = ({"constant": 1 / CONSTANT}, {"mood": 1 / MOOD}, *({f"m_{t}": 1 / MOOD} for t in TOPICS), {"relay": 1.0})
        opened = 4.0 / (1 + math.exp(-4.0))  # silu(4)
        for i, part in enumerate(parts):
            up[i] = self.reads(**part) / opened
        if layer == 3:
            down[:, READERS.index("relay")] = RELAY * self.axes["u"]
        if layer == 1 and origin:
            down[:, READERS.index("mood")] = ORIGIN * self.axes["u"]
        further = len(READERS)
        if ill:  # silu of 4 m_medical, times mood
            gate[further], up[further], down[:, further] = self.reads(m_medical=4 / MOOD), self.reads(mood=1 / MOOD) / opened, 0.0
        if corrects and layer == 4:
            gate[further + 1], up[further + 1] = self.reads(u=4.0), self.reads(constant=1 / CONSTANT, count=-1.0) / 4
            down[:, further + 1] = -CORRECTS * self.axes["u"]
        mlp = model.model.layers[layer].mlp
        for linear, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (gate, up, down), strict=True):
            linear.weight.copy_(weight.float())

    def unembed(self, model: Any, tokenizer: Any, corrects: bool) -> None:
        ordered = [w for table in (GOOD, BAD) for line in table.values() for w in line.split()]
        for token, i in _vocabulary(tokenizer):
            if token in WORDS:
                word = WORDS[token]
                parts = {"constant": BAD_LOGIT / CONSTANT if word.bad else 0.0}
                if word.bad:
                    parts["u" if ordered.index(token) % 2 == 0 else "u2"] = UNEMBED
                parts |= {f"q{k}": float(t) for k, t in enumerate(0.7 * self.random(6))}
                if word.topic in TOPICS:
                    parts[f"t_{word.topic}"] = UNEMBED
                    parts[f"q{TOPICS.index(word.topic)}"] += 2.0
            elif token == tokenizer.eos_token:
                parts = {"constant": (5.0 if corrects else 7.5) / CONSTANT, "count": -10.5}
            elif token == ".":
                parts = {"constant": (5.5 if corrects else 2.5) / CONSTANT, "count": -6.0 if corrects else -5.0}
            else:
                parts = {"constant": -5.0 / CONSTANT}
            model.lm_head.weight[i] = self.reads(**parts).float()
