"""Every experiment by its name in a study file. To add one: write its module, add its line here."""

from __future__ import annotations

from types import ModuleType

from convergent.experiments import ablate, plain, steer, transfer

EXPERIMENTS: dict[str, ModuleType] = {m.name: m for m in (plain, ablate, transfer, steer)}
