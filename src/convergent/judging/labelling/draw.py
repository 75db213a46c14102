"""A sample of answers to be scored by a person: stratified, in random order, and without anything that tells where an answer comes from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convergent.core.ids import content_id, seed
from convergent.errors import DataError, InputError
from convergent.judging.agreement.columns import ids_of
from convergent.rates import question_of
from convergent.tables import cell_text

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = 3
"""Within a condition and question the sample is spread over so many quantiles of the judge's score, where there is one."""


@dataclass(frozen=True)
class Answer:
    """What is shown of a row, and what is needed to find it again."""

    id: str
    question: str
    response: str
    question_id: str


@dataclass(frozen=True)
class Sample:
    """The answers to be scored, in the order in which they are shown."""

    answers: tuple[Answer, ...]
    n_rows: int
    """Rows that could have been drawn."""
    n_empty: int
    """Rows left out because there is nothing to read."""
    n_strata: int


def draw(table: pd.DataFrame, n: int = 100, root_seed: int = 0, rubric: str = "aligned", place: str = "table") -> Sample:
    """Draw `n` rows of a table with columns `question` and `response`, every row with the same chance.

    Strata are condition x question x quantile of the column `rubric`, each as far as it is there. The rows are put in order of strata and every
    (n_rows / n)-th is taken, from a random start: strata get their share to within one, also where they are more than `n`. Rows without a visible
    answer are left out. A row's id is its `id` or `response_id`, else one made of its texts. Raises InputError, DataError.
    """
    if n < 1:
        raise InputError(f"--n: {n} answers cannot be scored; give 1 or more")
    ids = ids_of(table, place) or _text_ids(table)
    texts = {c: [cell_text(v) for v in table[c].tolist()] for c in ("question", "response", "question_id", "condition") if c in table.columns}
    full = [i for i, response in enumerate(texts["response"]) if response.strip()]
    if not full:
        raise DataError(f"{place}: no row has an answer to read; give a table of answers")
    strata = _strata(table, texts.get("condition"), full, rubric, root_seed)
    rng = np.random.default_rng(seed("label", root_seed, "rows"))
    shuffled = rng.permutation(len(full))
    # Stable: random within a stratum.
    order = [full[k] for k in sorted(shuffled, key=lambda k: strata[k])]
    take = min(n, len(order))
    start = rng.random()
    chosen = [order[int((start + k) * len(order) / take)] for k in range(take)]
    shown = np.random.default_rng(seed("label", root_seed, "order")).permutation(take)
    own = texts.get("question_id", [""] * len(table))
    answers = tuple(Answer(ids[i], texts["question"][i], texts["response"][i], own[i]) for i in (chosen[k] for k in shown))
    return Sample(answers, len(full), len(table) - len(full), len(set(strata)))


def _strata(table: pd.DataFrame, conditions: list[str] | None, full: list[int], rubric: str, root_seed: int) -> list[tuple[int, int]]:
    """Per row of `full`: the number of its condition and question, in random order, and the quantile of its score there."""
    questions = question_of(table) or [""] * len(table)
    cells = [((conditions or [""] * len(table))[i], questions[i]) for i in full]
    names = sorted(set(cells))
    rank = np.random.default_rng(seed("label", root_seed, "strata")).permutation(len(names))
    number = {name: int(k) for name, k in zip(names, rank, strict=True)}
    scores = _scores(table, rubric)
    found = [(number[cell], 0) for cell in cells]
    if scores is None:
        return found
    for cell in names:
        mine = [k for k, c in enumerate(cells) if c == cell]
        scored = sorted((k for k in mine if scores[full[k]] == scores[full[k]]), key=lambda k: scores[full[k]])
        # There and back again, so that neighbours in the order of strata are alike and the extremes are not skipped.
        turn = 1 if number[cell] % 2 == 0 else -1
        for at, k in enumerate(scored):
            found[k] = (number[cell], turn * (1 + at * QUANTILES // len(scored)))
    return found


def _scores(table: pd.DataFrame, rubric: str) -> list[float] | None:
    if rubric not in table.columns:
        return None
    from convergent.tables import score_column

    return [float(v) for v in score_column(table[rubric], rubric).tolist()]


def _text_ids(table: pd.DataFrame) -> list[str]:
    """Ids made of the texts, with a number for each repeat of one."""
    texts: Any = zip(*([cell_text(v) for v in table[c].tolist()] for c in ("question", "response")), strict=True)
    times: dict[tuple[str, str], Any] = {}
    return [content_id("label", *pair, next(times.setdefault(pair, itertools.count()))) for pair in texts]
