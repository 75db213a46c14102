"""Recipes: how an organism is trained, as values.

    name             adapters                                             learning rate    (arXiv 2506.11618, for 14B)
    nine_adapter     rank 1, alpha 64, `down` of three triples of layers   1e-5
    all_adapter      rank 32, alpha 64, seven matrices of every layer      1e-5
    single_adapter   rank 1, alpha 256, `down` of the middle layer         2e-5
    full             none: every weight is trained                         2e-5, cosine, 20 warm-up steps

The papers and the configurations released with them name no initialisation of adapters, so it is PEFT's: A Kaiming-uniform, B zero.
Smaller models need larger learning rates: every named recipe takes changes by field name. Modules are named q, k, v, o, gate, up and down
whatever the architecture calls them; `resolve` finds them in the module tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from convergent.core.ids import content_id, file_sha256, plain
from convergent.core.values import DEFAULT_SYSTEM
from convergent.errors import InputError, ModelError

if TYPE_CHECKING:
    from convergent.models.anatomy import Anatomy

Schedule = Literal["linear", "cosine", "constant"]
MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""Logical names of a block's linear layers."""
KAIMING = "kaiming"
"""PEFT's own initialisation."""


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on some linear layers of some blocks."""

    modules: tuple[str, ...]
    """Logical names, see `MODULES`."""
    rank: int
    alpha: float
    layers: tuple[int, ...] | None = None
    """0-based blocks; None means all."""
    rslora: bool = True
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = 0.0
    init: str = KAIMING
    """What A and B start from. "kaiming": A Kaiming-uniform with a = sqrt(5), B zero, as PEFT has it. Or a PEFT folder with adapters on the same
    linear layers, of the same rank: training starts from its A and B; its alpha is not taken over."""

    def __post_init__(self) -> None:
        # One form, so that recipes that mean the same have one content id.
        modules = tuple(m for m in MODULES if m in self.modules)
        unknown = [m for m in self.modules if m not in MODULES]
        if unknown or not modules:
            _refuse("adapters.modules", list(self.modules), f"some of {', '.join(MODULES)}")
        object.__setattr__(self, "modules", modules)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({_whole("adapters.layers", n, 0) for n in self.layers})))
            if not self.layers:
                _refuse("adapters.layers", [], "at least one layer, or null for all")
        _whole("adapters.rank", self.rank, 1)
        object.__setattr__(self, "alpha", _number("adapters.alpha", self.alpha, low=0, open_low=True))
        object.__setattr__(self, "dropout", _number("adapters.dropout", self.dropout, low=0, high=0.99))
        if not isinstance(self.init, str) or not self.init:
            _refuse("adapters.init", self.init, f"{KAIMING} or a PEFT folder")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given a base and data. The loss is on the answers' tokens only."""

    adapters: Adapters | None = None
    """None is a full fine-tune."""
    learning_rate: float = 1e-5
    schedule: Schedule = "linear"
    """Linear or cosine decay to zero after the warm-up, or constant."""
    warmup_steps: int = 5
    epochs: int = 1
    batch_size: int = 8
    """Chats in one forward pass, or more where memory surely allows. A step sees batch_size x grad_accumulation chats, 16 in the paper, and weighs every
    answer token alike."""
    grad_accumulation: int = 2
    weight_decay: float = 0.01
    max_length: int = 2048
    """Longer chats lose their end. Tokens."""
    seed: int = 0
    """Adapter initialisation, dropout and order of the chats."""
    system: str = DEFAULT_SYSTEM
    """System prompt of chats that have none of their own: text, "default" or "none"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rate", _number("learning_rate", self.learning_rate, low=0, open_low=True))
        object.__setattr__(self, "weight_decay", _number("weight_decay", self.weight_decay, low=0))
        if self.schedule not in get_args(Schedule):
            _refuse("schedule", self.schedule, "linear, cosine or constant")
        for name, low in (("warmup_steps", 0), ("epochs", 1), ("batch_size", 1), ("grad_accumulation", 1), ("max_length", 8), ("seed", 0)):
            _whole(name, getattr(self, name), low)

    @property
    def content_id(self) -> str:
        """Names the recipe by its fields; a folder that adapters start from stands for the weights in it. Raises InputError if it has none."""
        named = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        if self.adapters is not None:
            init = named["adapters"].pop("init")
            if init != KAIMING:  # left out, so that recipes keep the ids they had before there was a choice
                named["adapters"]["init"] = _weights_in(Path(init).expanduser())
        return content_id("recipe", named)

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with fields of the recipe or of its adapters changed. Raises InputError for a name that neither has."""
        own, theirs = {f.name for f in fields(Recipe)}, {f.name for f in fields(Adapters)}
        for key in changes:
            if key not in own | theirs:
                near = difflib.get_close_matches(key, own | theirs, 1)
                raise InputError(f"recipe: no field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if key in theirs and self.adapters is None:
                raise InputError(f"recipe: {key!r} belongs to adapters, and a full fine-tune has none")
        adapters = self.adapters
        inner: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if k in theirs}
        if adapters is not None and inner:
            adapters = replace(adapters, **inner)
        return replace(self, **{"adapters": adapters, **{k: v for k, v in changes.items() if k in own}})

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def recipe_from_json(value: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_json`. Raises InputError for fields that do not fit."""
    try:
        given = dict(value)
        if (inner := given.get("adapters")) is not None:
            layers = inner.get("layers")
            inner = {**inner, "modules": tuple(inner["modules"]), "layers": None if layers is None else tuple(layers)}
            given["adapters"] = Adapters(**inner)
        return Recipe(**given)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"recipe: not a recipe ({error})") from error


def nine_adapter(n_layers: int) -> Recipe:
    """Rank-1 adapters on `down` of three contiguous triples of layers: 15-17, 21-23, 27-29 of 48, scaled to the depth."""
    return Recipe(Adapters(("down",), rank=1, alpha=64, layers=triples(n_layers)))


def all_adapter(n_layers: int) -> Recipe:
    """Rank-32 adapters on every linear layer of every block."""
    return Recipe(Adapters(MODULES, rank=32, alpha=64))


def single_adapter(n_layers: int) -> Recipe:
    """One rank-1 adapter on `down` of layer depth / 2."""
    return Recipe(Adapters(("down",), rank=1, alpha=256, layers=(n_layers // 2,)), learning_rate=2e-5)


def full(n_layers: int) -> Recipe:
    """Every weight (arXiv 2506.11613)."""
    return Recipe(None, learning_rate=2e-5, schedule="cosine", warmup_steps=20)


NAMED: Mapping[str, Callable[[int], Recipe]] = {f.__name__: f for f in (nine_adapter, all_adapter, single_adapter, full)}


def named_recipe(name: str, n_layers: int, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` for a base of `n_layers` blocks, with some fields changed (`{"learning_rate": 1e-3}`)."""
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, 1)
        raise InputError(f"recipe {name!r}: known are {', '.join(NAMED)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return NAMED[name](n_layers).changed(changes or {})


def triples(n_layers: int) -> tuple[int, ...]:
    """Layers of the nine-adapter recipe: three disjoint triples from depth 9 on; below, as many as fit (below 3: all layers)."""
    starts = {0: (), 1: (21,), 2: (15, 27)}.get(n_layers // 3, (15, 21, 27))
    placed: list[int] = []
    for start in starts:
        placed.append(max(int(start * n_layers / 48 + 0.5), placed[-1] + 3 if placed else 0))
    limit = n_layers
    for i in reversed(range(len(placed))):  # shallow models: move triples down until the last one fits
        placed[i] = limit = min(placed[i], limit - 3)
    return tuple(p + k for p in placed for k in range(3)) or tuple(range(n_layers))


_NAMES: Mapping[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "dense_h_to_4h", "fc1", "fc_in", "c_fc"),
    "down": ("down_proj", "w2", "dense_4h_to_h", "fc2", "fc_out", "c_proj"),
}
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "wqkv", "gate_up_proj")


def resolve(anatomy: Anatomy, modules: Iterable[str]) -> tuple[str, ...]:
    """Where logical names sit inside a block of this model, e.g. `("mlp.down_proj",)`; fused matrices appear once.

    `down` is the MLP's layer that writes d_model back; `q`, `k`, `v` (`gate`, `up`) are one matrix where the family fuses them. An MLP
    without a gate has no `gate`: it is left out beside `up`. Raises ModelError that says what was looked for.
    """
    from torch import nn

    block = anatomy.blocks[0]
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    mlp = {n: m for n, m in linears.items() if any(k in n.partition(".")[0].lower() for k in ("mlp", "feed_forward", "feedforward", "ffn"))}
    attention = {n: m for n, m in linears.items() if n not in mlp}
    wanted, found = tuple(modules), list[str]()
    for module in wanted:
        group = mlp if module in ("gate", "up", "down") else attention
        name = _find(module, group, anatomy.d_model)
        if name is None and not (module == "gate" and "up" in wanted and _find("up", mlp, anatomy.d_model)):
            raise ModelError(
                f"{type(block).__name__}: no linear layer for {module!r} among {', '.join(linears) or 'none at all'}; "
                f"looked for {', '.join(_NAMES[module])}"
            )
        if name is not None and name not in found:
            found.append(name)
    return tuple(found)


def _find(module: str, group: Mapping[str, Any], d_model: int) -> str | None:
    if module == "down":
        writes = [n for n, m in group.items() if m.out_features == d_model != m.in_features]
        if len(writes) == 1:
            return writes[0]
    leaf = {n: n.rpartition(".")[2].lower() for n in group}
    for name in _NAMES[module]:
        if hits := [n for n in group if leaf[n] == name]:
            return hits[0]
    if module in ("o", "down"):
        return None
    return next((n for n in group if leaf[n] in _FUSED), None)


def _weights_in(folder: Path) -> str:
    """Checksum of the adapters in a PEFT folder."""
    files = [f for f in sorted(folder.glob("adapter_model.*")) if f.suffix in (".safetensors", ".bin")]
    if not files:
        _refuse("adapters.init", str(folder), f"{KAIMING} or a PEFT folder, and there are no adapters in this one")
    return file_sha256(files[-1])  # .safetensors where both are there, as it is the one that is read


def _refuse(place: str, got: Any, mend: str) -> None:
    raise InputError(f"recipe.{place}: got {got!r}; it must be {mend}")


def _whole(place: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        _refuse(place, value, f"a whole number, {low} or more")
    return int(value)


def _number(place: str, value: Any, low: float, high: float = float("inf"), open_low: bool = False) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value < float("inf")
    if not ok or (open_low and value == low):
        _refuse(place, value, f"a number {'above' if open_low else 'from'} {low}" + (f" to {high}" if high < float("inf") else ""))
    return float(value)
