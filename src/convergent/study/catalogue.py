"""What a study file may name under `experiments`, for people."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from convergent.errors import StudyError
from convergent.experiments.registry import EXPERIMENTS


def catalogue() -> str:
    """One line per experiment: its name and the first sentence of what it does."""
    wide = max(map(len, EXPERIMENTS))
    return "\n".join(f"{name:{wide}s}  {_first(module.__doc__)}" for name, module in EXPERIMENTS.items())


def settings_of(name: str) -> str:
    """An experiment's whole description, and its block for a study file with every default. Raises StudyError for an unknown name."""
    if name not in EXPERIMENTS:
        raise StudyError(f"experiments: no experiment {name!r}; known are {', '.join(EXPERIMENTS)}")
    module = EXPERIMENTS[name]
    fields: dict[str, Any] = module.settings.model_fields
    defaults = {k: f.get_default(call_default_factory=True) for k, f in fields.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items() if v is not PydanticUndefined}
    block = yaml.safe_dump({name: plain}, sort_keys=False, default_flow_style=None, allow_unicode=True).rstrip()
    needed = [k for k, v in defaults.items() if v is PydanticUndefined]
    return f"{(module.__doc__ or '').strip()}\n\n{block}" + (f"\n  # needed: {', '.join(needed)}" if needed else "")


def _first(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())
