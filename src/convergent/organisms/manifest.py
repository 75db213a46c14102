"""`Organism`: what is written down about a trained organism, in `convergent.json` beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convergent.core.ids import content_id, file_sha256
from convergent.errors import ConvergentError, ModelError
from convergent.organisms.recipes import Recipe, recipe_from_json

MANIFEST = "convergent.json"
FORMAT = "convergent-organism-1"
_VOLATILE = {"base_model_name_or_path", "peft_version", "inference_mode", "revision", "auto_mapping"}


@dataclass(frozen=True)
class LossPoint:
    """Training loss after one optimizer step."""

    step: int
    """1-based."""
    epoch: float
    loss: float
    """Mean cross-entropy of the step's answer tokens, in nats."""


@dataclass(frozen=True)
class Organism:
    """A fine-tuned model on disk and how it came to be."""

    name: str
    recipe: Recipe
    base: str
    """The base as the user named it: `embedded`, a folder or a hub id."""
    base_id: str
    data_name: str
    data_checksum: str
    """SHA-256, 64 hex digits, of the chats in order."""
    n_examples: int
    n_tokens: int
    """Tokens of one epoch, prompts included."""
    dtype: str
    content_id: str
    """Names the weights: base and adapter files."""
    training_id: str
    """Names what went in: recipe, base and data."""
    trainable_parameters: int
    seconds: float
    loss_curve: tuple[LossPoint, ...]
    versions: Mapping[str, str]

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the loss curve."""
        tail = self.loss_curve[-max(1, len(self.loss_curve) // 10) :]
        return math.fsum(p.loss for p in tail) / max(1, len(tail))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {"format": FORMAT, "seed": self.seed, **asdict(self), "recipe": self.recipe.to_json()}

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder`."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_organism(folder: Path) -> Organism:
    """The manifest in `folder`. Raises ModelError if there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != FORMAT:
            raise ValueError("another format")
        value.pop("seed")
        curve = tuple(LossPoint(**p) for p in value.pop("loss_curve"))
        return Organism(**{**value, "recipe": recipe_from_json(value["recipe"]), "loss_curve": curve})
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no {MANIFEST} in this folder; it was not trained by `convergent train`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConvergentError) as error:
        raise ModelError(f"{path}: cannot be read as an organism's manifest ({error}); train the organism again") from error


def training_id(recipe: Recipe, base_id: str, data_checksum: str, dtype: str = "float32") -> str:
    """Names a training run by what goes in; known before it starts."""
    return content_id("organism", recipe, base_id, data_checksum, dtype)


def adapter_id(folder: Path, base_id: str) -> str:
    """Content id of an adapter folder on a base: weights and settings, not version marks or the order of lists."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items() if k not in _VOLATILE}
    weights = [(f.name, file_sha256(f)) for f in sorted(folder.glob("adapter_model.*"))]
    return content_id("adapter", base_id, settings, weights)
