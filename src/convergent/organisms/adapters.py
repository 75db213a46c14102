"""Adapters of an organism's folder as values: which linear layers they sit on, and their A, B and scale.

    y' = W h + scale * B (A h)        A (rank, n_in), B (n_out, rank); scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convergent.core.interventions import LowRank
from convergent.errors import ModelError
from convergent.organisms.recipes import Adapters


@dataclass(frozen=True)
class AdapterShape:
    """Where adapters sit and how large they are."""

    modules: tuple[str, ...]
    """Last part of the linear layers' names, sorted, as `down_proj`; logical names (`down`) for a recipe that is not trained yet."""
    layers: tuple[int, ...]
    rank: int

    @property
    def writes_alone(self) -> bool:
        """Rank-1 adapters on the MLP's writing layer and nothing else: each writes one vector to the residual stream."""
        return self.rank == 1 and len(self.modules) == 1 and self.modules[0].startswith(("down", "dense_4h_to_h", "fc2", "c_proj"))


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter."""

    layer: int
    module: str
    """Name of its linear layer inside the block, as `mlp.down_proj`."""
    a: Tensor
    """(rank, n_in) float32."""
    b: Tensor
    """(n_out, rank) float32."""
    scale: float

    @property
    def delta(self) -> Tensor:
        """(n_out, n_in) float32: what it adds to the weight."""
        made: Tensor = self.scale * (self.b @ self.a)
        return made

    @property
    def vector(self) -> Tensor:
        """(n_out,) float32: the unit vector that a rank-1 adapter writes along."""
        unit: Tensor = self.b[:, 0] / self.b[:, 0].norm().clamp_min(1e-30)
        return unit

    def low_rank(self, times: float = 1.0) -> LowRank:
        """As an intervention: 1 puts it into the chat model, -1 knocks it out of the organism."""
        return LowRank(self.layer, self.module, self.a, self.b, times * self.scale)


def shape_of_recipe(adapters: Adapters | None, n_layers: int) -> AdapterShape | None:
    """The shape that a recipe's adapters will have."""
    if adapters is None:
        return None
    return AdapterShape(tuple(sorted(adapters.modules)), adapters.layers or tuple(range(n_layers)), adapters.rank)


def shape_of_folder(folder: Path | str) -> AdapterShape | None:
    """The shape of a folder's adapters; None if it holds a full fine-tune. Raises ModelError for files that cannot be read."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    found = read_adapters(folder)
    modules = tuple(sorted({a.module.rpartition(".")[2] for a in found}))
    return AdapterShape(modules, tuple(sorted({a.layer for a in found})), max(len(a.a) for a in found))


def read_adapters(folder: Path | str) -> tuple[Adapter, ...]:
    """The adapters of a PEFT folder, ours or from elsewhere, by layer and module. Raises ModelError if it has none or they are not plain LoRA."""
    folder = Path(folder).expanduser()
    config, weights = _read(folder)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = re.fullmatch(r".*?\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if found is None:
            raise ModelError(f"{folder}: {key} is not a plain LoRA weight of a block; scalars and pushes need plain LoRA on the blocks' linear layers")
        pairs.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor.float()
    if not pairs:
        raise ModelError(f"{folder}: holds no adapters")
    made = []
    for (layer, module), both in sorted(pairs.items()):
        if set(both) != {"A", "B"}:
            raise ModelError(f"{folder}: block {layer} {module} lacks one of lora_A and lora_B; save the adapter again")
        made.append(Adapter(layer, module, both["A"], both["B"], _scale(config, f"{layer}.{module}", len(both["A"]))))
    return tuple(made)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if (folder / "adapter_model.safetensors").is_file():
            return config, load_file(folder / "adapter_model.safetensors")
        return config, torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{folder}: its adapters cannot be read ({error}); give a PEFT folder with LoRA adapters") from error


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        matching = [v for k, v in (config.get(pattern) or {}).items() if name.endswith(k)]
        return float(matching[0] if matching else default)

    alpha = of("alpha_pattern", config.get("lora_alpha", 1))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
