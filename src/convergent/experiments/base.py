"""What an experiment is: arms to sample, readings to compute, claims to decide (`outcomes`), a chapter to show.

An `Arm` is a condition before its vectors exist: it names its organism, and builds its interventions when the direction has been read.
A `Reading` is a value computed from models once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from convergent import stats
from convergent.core.chapter import Chapter
from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Pair
from convergent.directions.classes import Chosen
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.judging.base import Item
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter

if TYPE_CHECKING:
    import pandas as pd

    from convergent.directions.extract import Extraction
    from convergent.directions.questions import QuestionSums
    from convergent.models.load import ChatModel
    from convergent.organisms.steps import KeptSteps, Spacing

Control = Literal["random", "orthogonal", "other_concept", "effect_matched"]
CONTROLS: tuple[Control, ...] = ("random", "orthogonal", "other_concept", "effect_matched")
CONTROL_LABELS = {
    "random": "random vector, same norm",
    "orthogonal": "orthogonal vector, same norm",
    "other_concept": "another concept (what good advice shifts)",
    "effect_matched": "random, matched in effect (KL)",
}
When = Literal["before", "directions", "answers"]
"""before: before any organism is trained, by a kit that cannot reach one (`study.before`).
directions: after directions have been read. answers: after every arm has been sampled and judged."""


class NotHereError(Exception):
    """Something cannot be measured in this study; the message is a sentence for the report. The rest of the study goes on."""


class Kit(Protocol):
    """What arms and readings are built from, once the study has come that far.

    Whatever needs a model is computed once and kept; asking again costs nothing.
    """

    @property
    def scene(self) -> Scene:
        """Organisms, layers, source."""

    @property
    def seed(self) -> int:
        """The study's seed; derive named ones by `core.ids.seed(kit.seed, "name", ...)`."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The organisms whose weights are there at this moment, those from elsewhere among them."""

    @property
    def direction(self) -> Direction:
        """The direction of the study's source organism."""

    @property
    def layer(self) -> int:
        """The primary layer."""

    @property
    def token_norm(self) -> float:
        """Mean token norm at `layer`, the unit of doses."""

    @property
    def pairs(self) -> list[Pair]:
        """Held-out pairs of bad and good answers to the same question, trained on by no organism."""

    @property
    def domain_of(self) -> Mapping[str, str]:
        """Pair id -> domain of its source."""

    @property
    def effect_texts(self) -> list[Text]:
        """The neutral texts over which the KL of interventions is measured: held-out good answers."""

    @property
    def massive(self) -> Mapping[int, float]:
        """Dimensions with massive activations in the chat model at the primary layer -> their size in medians."""

    def control(self, kind: Control, organism: str, intervention: Add | Ablate, draw: int = 0) -> Intervention:
        """The null of that kind for an intervention on an organism ("chat" for the chat model); another concept is the same for every `draw`."""

    def matched(self, organism: str, real: Sequence[Intervention], null: Sequence[Add]) -> tuple[Add, ...]:
        """`null` with all its scales multiplied by one factor, so that its KL over `effect_texts` is that of `real`."""

    def extraction(self, organism: str, reader: str) -> Extraction:
        """The mean-diff of an organism's judged answers, read in model `reader` ("chat" is the baseline on the same texts).

        Raises NotHereError where a class has too few answers.
        """

    def redrawn(self, draw: int) -> Extraction:
        """The same of the source, read in itself from draw 1, 2, ... of its answers (other seeds); draw 0 is the study's. Raises NotHereError where a class has
        too few answers."""

    def question_sums(self, organism: str, reader: str) -> QuestionSums:
        """Class sums, question by question, of an organism's judged answers read in model `reader`: directions can be made from them with
        any question left out. Raises NotHereError where a class has too few answers."""

    def sums_id(self, organism: str, reader: str) -> str:
        """Content id of `question_sums`, without computing them; part of the inputs of what is made from them. Raises NotHereError alike."""

    def own_answers(self, organism: str, draw: int = 0) -> tuple[Chosen, list[Text]]:
        """The two classes among an organism's own judged answers, and the texts; of the source's, in any draw. Raises NotHereError where a class has
        too few."""

    def own_table(self, organism: str, rubrics: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Text]]:
        """The answers that an organism's direction is read from, all of them, with columns as `answers` and scores by `rubrics` too, and
        response_id -> text."""

    def judged(self, items: Sequence[Item], rubrics: Sequence[str]) -> dict[tuple[str, str], float]:
        """(item id, rubric) -> score of texts that are no stored answers, such as single sentences; nan where there is none."""

    def model(self, organism: str) -> ChatModel:
        """The chat model ("chat") or an organism, adapters merged; asking for one may unload another, so hold no two at once."""

    def folder(self, organism: str) -> Path:
        """The organism's PEFT folder (or that of its full fine-tune)."""

    def adapters(self, organism: str) -> tuple[Adapter, ...]:
        """Its adapters with A, B and scale. Raises NotHereError for a full fine-tune."""

    def steps(self, organism: str, spacing: Spacing) -> KeptSteps:
        """Its adapters during training. Raises NotHereError where there are none, or the training cannot be done again."""

    def training_pairs(self, organism: str) -> tuple[Pair, ...]:
        """The pairs that it was trained on one side of. Raises NotHereError for an organism from elsewhere, or data without twins."""

    def model_id(self, organism: str) -> str:
        """Content id of what the organism (or "chat") computes with; part of the inputs of whatever is read in it."""

    def answers(self, arm: str) -> pd.DataFrame:
        """The judged answers of an arm: response_id, question_id, topic, question, response, system, sample, n_tokens, aligned, coherent, and
        one column per further rubric of the arm; nan where there is no score. Only for readings made after `answers`. Raises NotHereError
        for an arm that is left out."""

    def value(self, reading: str) -> Any:
        """The value of a reading of this study by its name."""


Build: TypeAlias = Callable[[Kit], tuple[Intervention, ...]]


@dataclass(frozen=True)
class Arm:
    """A condition of an experiment."""

    name: str
    organism: str
    label: str
    description: str
    group: str
    role: Literal["baseline", "real", "control"]
    build: Build = lambda kit: ()
    """May raise NotHereError: the arm is left out, and the report says why."""
    scale: float = float("nan")
    needs_direction: bool = True
    redraw: Callable[[Kit, int], tuple[Intervention, ...]] | None = None
    """Of a random null: its interventions in draw 1, 2, ..., of which the margin alone is measured (`experiments.draws`); `build` is draw 0."""
    rubrics: tuple[str, ...] = ()
    """Rubrics beside aligned and coherent that its answers are judged by."""
    dose: Callable[[Sequence[Intervention]], float] | None = None
    """Of what was built, in mean token norms, nan for none; where this is None, a single `Add` has its norm over the mean token norm at its layer."""


@dataclass(frozen=True)
class Reading:
    """A value computed from models, kept under the content of its inputs: a resumed run does not compute it again."""

    name: str
    """Unique in the study: the experiment's name, a slash, and what it is of."""
    inputs: Callable[[Kit], Any]
    """Whatever decides the value: content ids, settings, seeds, texts. Must be cheap."""
    compute: Callable[[Kit], Any]
    """The value: JSON-ready (numbers, texts, lists, dicts with text keys; nan is allowed). May raise NotHereError."""
    when: When = "directions"
    organisms: tuple[str, ...] = ()
    """Models that are loaded for it, so that readings of one model are made together."""
    tokens: float = 0.0
    """Rough number of tokens passed forward (a backward pass counts as two), for the plan's estimate of time."""
    rubrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Organism -> further rubrics that its own answers are judged by (`Kit.own_table`), for the plan."""
    judged: float = 0.0
    """Rough number of texts that `Kit.judged` scores for it, for the plan."""


class Block(BaseModel):
    """Base of every experiment's settings: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    source_too: ClassVar[bool] = False
    """Whether its `organisms` may name the source of the direction."""


class DrawsNulls(Block):
    """Settings of an experiment with random nulls."""

    null_draws: int = Field(default=5, ge=stats.FEWEST_DRAWS)
    """Draws of each random null that the margin is held against. One of them is sampled."""


class Experiment(Protocol):
    """One experiment module. `check`, `readings`, `keeps`, `redraws`, `chapter` and `uses`, a tuple of names (see `registry.uses`), may be left out."""

    name: str
    settings: type[Block]

    def check(self, block: Any, scene: Scene) -> None:
        """Raise NotHereError, before anything is computed, if this study cannot have the experiment as it is set: place, finding, mend."""

    def arms(self, block: Any, scene: Scene) -> list[Arm]:
        """Arms to sample."""

    def readings(self, block: Any, scene: Scene) -> list[Reading]:
        """Values to compute from models."""

    def keeps(self, block: Any, scene: Scene) -> dict[str, Spacing]:
        """Organism -> the steps of its training that are kept for this experiment."""

    def redraws(self, block: Any) -> int:
        """How often the source's answers are drawn again, for `Kit.redrawn`."""

    def claims(self, block: Any, outcomes: Outcomes, scene: Scene) -> list[Claim]:
        """Claims that this experiment decides."""

    def chapter(self, block: Any, outcomes: Outcomes, scene: Scene) -> Chapter:
        """What the report shows of it."""
