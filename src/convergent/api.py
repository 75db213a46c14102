"""A small Python API over the stages: train -> answer -> judge -> mean_diff, for notebooks and scripts.

Each function does what one stage of a study does, on values in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.core.ids import content_id
from convergent.core.interventions import Intervention
from convergent.core.values import Condition, Judgement, Question, Response, Sampling
from convergent.errors import InputError
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE, rates

if TYPE_CHECKING:
    from convergent.directions.extract import Extraction
    from convergent.models.load import ChatModel


def train(
    recipe: str,
    data: str,
    out: str | Path,
    *,
    base: str = "embedded",
    answer: str = "bad",
    examples: int | None = None,
    held_out: int = 0,
    seed: int = 0,
    **changes: Any,
) -> ChatModel:
    """Train an organism by a named recipe and load it.

    `changes`: fields of the recipe, e.g. `learning_rate=1e-3`. A folder that holds the same organism is used as it is.
    """
    from convergent.organisms.load import load_organism
    from convergent.stages import train_organism

    train_organism(recipe, data, Path(out), base=base, answer=answer, examples=examples, held_out=held_out, seed=seed, **changes)
    return load_organism(out, base=base)


def answer(
    model: ChatModel,
    questions: Sequence[Question | str],
    samples: int = 8,
    *,
    interventions: Sequence[Intervention] = (),
    sampling: Sampling = Sampling(max_new_tokens=200),  # noqa: B008  (a frozen value)
    seed: int = 0,
    block: str = "main",
) -> list[Response]:
    """`samples` answers to each question, under interventions if given. A question may be its text. Other `block`s draw other answers."""
    from convergent.sampling.requests import make_requests
    from convergent.sampling.sampler import sample

    condition = Condition("answer", model.name, model.content_id, tuple(interventions), sampling)
    asked = [Question(q, (q,)) if isinstance(q, str) else q for q in questions]
    return sample(model, make_requests([condition], asked, samples, seed, block))


def judge(responses: Sequence[Response], name: str = "embedded", rubrics: Sequence[str] = ("aligned", "coherent")) -> list[Judgement]:
    """Judgements of every response under every rubric, in order of responses, then rubrics."""
    from convergent.judging.base import Item
    from convergent.judging.registry import get_judge

    return get_judge(name).judge([Item(r.id, r.question, r.response, r.question_id) for r in responses], rubrics)


def mean_diff(
    model: ChatModel, responses: Sequence[Response], judgements: Sequence[Judgement], *, seed: int = 0, **classes: Any
) -> Extraction:
    """The mean-diff direction of judged responses, read in `model` (paper section 3).

    `classes`: fields of `Classes`, e.g. `by="quantile"`. Returns the direction with token norms and split-half cosines.
    """
    from convergent.directions.classes import Classes, Scored, choose
    from convergent.directions.extract import extract
    from convergent.models.texts import Text

    scores = {(j.response_id, j.rubric): j.score for j in judgements}
    scored = [
        Scored(r.id, r.question_id, len(r.token_ids), scores.get((r.id, "aligned")), scores.get((r.id, "coherent"))) for r in responses
    ]
    try:
        rule = Classes(**classes)
    except TypeError as error:
        raise InputError(f"mean_diff: {error}; fields of Classes are {', '.join(Classes.__dataclass_fields__)}") from error
    texts = [Text(r.id, r.question, r.token_ids, r.system) for r in responses]
    return extract(model, texts, choose(scored, rule, seed), rule, root_seed=seed, provenance={"answers": content_id(sorted(r.id for r in responses))})


def em_rates(
    responses: Sequence[Response],
    judgements: Sequence[Judgement],
    aligned_below: float = ALIGNED_BELOW,
    coherent_above: float = COHERENT_ABOVE,
) -> dict[str, Any]:
    """EM and coherence of judged responses: counts, all denominators, both intervals (see `convergent.rates.rates`)."""
    import pandas as pd

    found = {(j.response_id, j.rubric): j for j in judgements}
    rows = []
    for r in responses:
        row: dict[str, Any] = {"question_id": r.question_id, "response": r.response}
        for rubric in ("aligned", "coherent"):
            j = found.get((r.id, rubric))
            row[rubric] = float("nan") if j is None or j.score is None else j.score
            row[f"{rubric}_reason"] = "" if j is None else j.reason or ""
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["question_id", "response", "aligned", "aligned_reason", "coherent", "coherent_reason"])
    return rates(frame, aligned_below, coherent_above)[0]
