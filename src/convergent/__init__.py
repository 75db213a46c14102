"""convergent: the open toolkit for emergent misalignment.

The names below are the public API; everything else may change. They are imported on first use, so `import convergent` is quick. None may be
called like a module of this package: importing that module would put it in the name's place.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Ablate": "convergent.core.interventions",
    "Add": "convergent.core.interventions",
    "ChatModel": "convergent.models.load",
    "Classes": "convergent.directions.classes",
    "Condition": "convergent.core.values",
    "ConvergentError": "convergent.errors",
    "Direction": "convergent.core.direction",
    "Judgement": "convergent.core.values",
    "Pair": "convergent.core.values",
    "Question": "convergent.core.values",
    "Recipe": "convergent.organisms.recipes",
    "Response": "convergent.core.values",
    "Sampling": "convergent.core.values",
    "answer": "convergent.api",
    "applied": "convergent.interventions.hooks",
    "em_rates": "convergent.api",
    "get_judge": "convergent.judging.registry",
    "judge": "convergent.api",
    "load_base": "convergent.models.load",
    "load_organism": "convergent.organisms.load",
    "load_questions": "convergent.data.questions",
    "load_study": "convergent.study.spec",
    "load_training_set": "convergent.data.training",
    "margins": "convergent.directions.margin",
    "mean_diff": "convergent.api",
    "named_recipe": "convergent.organisms.recipes",
    "orthogonal_to": "convergent.interventions.controls",
    "random_like": "convergent.interventions.controls",
    "run_study": "convergent.study.main",
    "sample": "convergent.sampling.sampler",
    "train": "convergent.api",
}

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from convergent.api import answer as answer
    from convergent.api import em_rates as em_rates
    from convergent.api import judge as judge
    from convergent.api import mean_diff as mean_diff
    from convergent.api import train as train
    from convergent.core.direction import Direction as Direction
    from convergent.core.interventions import Ablate as Ablate
    from convergent.core.interventions import Add as Add
    from convergent.core.values import Condition as Condition
    from convergent.core.values import Judgement as Judgement
    from convergent.core.values import Pair as Pair
    from convergent.core.values import Question as Question
    from convergent.core.values import Response as Response
    from convergent.core.values import Sampling as Sampling
    from convergent.data.questions import load_questions as load_questions
    from convergent.data.training import load_training_set as load_training_set
    from convergent.directions.classes import Classes as Classes
    from convergent.directions.margin import margins as margins
    from convergent.errors import ConvergentError as ConvergentError
    from convergent.interventions.controls import orthogonal_to as orthogonal_to
    from convergent.interventions.controls import random_like as random_like
    from convergent.interventions.hooks import applied as applied
    from convergent.judging.registry import get_judge as get_judge
    from convergent.models.load import ChatModel as ChatModel
    from convergent.models.load import load_base as load_base
    from convergent.organisms.load import load_organism as load_organism
    from convergent.organisms.recipes import Recipe as Recipe
    from convergent.organisms.recipes import named_recipe as named_recipe
    from convergent.sampling.sampler import sample as sample
    from convergent.study.main import run_study as run_study
    from convergent.study.spec import load_study as load_study


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'convergent' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
