"""Trusted scores of some of a study's answers: a table by people, as `convergent label` writes one, or by a better judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from convergent.core.ids import file_sha256
from convergent.errors import DataError, StudyError
from convergent.judging.agreement.columns import ids_of
from convergent.tables import cell_text, need_columns, read_table

RUBRICS = ("aligned", "coherent")
Scored = tuple[float, float]
"""aligned and coherent, nan where absent."""


@dataclass(frozen=True)
class Trusted:
    """Scores by the id of an answer, or by its texts where the table has no ids of ours."""

    path: Path
    sha256: str
    by_id: Mapping[str, tuple[str, Scored]]
    """id -> response and scores."""
    by_text: Mapping[tuple[str, str], Scored]
    """(question, response) -> scores; the mean where a text was scored several times."""

    def among(self, ids: Set[str]) -> Trusted:
        """What counts for a study with these answers: scores by id if any id is one of its own, else by text.

        Never both: an answer that merely reads like a sampled one was not sampled, and a correction needs a random sample.
        """
        return replace(self, by_text={}) if self.by_id.keys() & ids else replace(self, by_id={})

    def of(self, response_id: str, question: str, response: str) -> Scored | None:
        """The scores of one answer. Raises StudyError if its id stands for another text there."""
        if response_id in self.by_id:
            text, scored = self.by_id[response_id]
            if text and text.strip() != cell_text(response).strip():
                raise StudyError(f"trusted: {self.path.name}: id {response_id!r} has another answer than in this study; give scores of these answers")
            return scored
        return self.by_text.get((cell_text(question), cell_text(response).strip()))


def read_trusted(path: str) -> Trusted:
    """Read such a table: `aligned`, perhaps `coherent`, and `id` or `question` with `response`. Raises StudyError."""
    try:
        table = read_table(Path(path).expanduser(), required=("aligned",))
        ids = ids_of(table, path)
        if ids is None:
            need_columns(table, ("question", "response"), f"{path} (without `id`)")
    except DataError as error:
        raise StudyError(f"trusted: {error}") from error
    columns = {c: table[c].tolist() if c in table.columns else [math.nan] * len(table) for c in (*RUBRICS, "question", "response")}
    scores = list(zip(*(columns[r] for r in RUBRICS), strict=True))
    texts = [(cell_text(q), cell_text(r)) for q, r in zip(columns["question"], columns["response"], strict=True)]
    grouped: dict[tuple[str, str], list[Scored]] = {}
    for (question, response), scored in zip(texts, scores, strict=True):
        if response.strip():
            grouped.setdefault((question, response.strip()), []).append(scored)
    by_id = {i: (r, s) for i, (_, r), s in zip(ids or (), texts, scores, strict=bool(ids))}
    return Trusted(Path(path), file_sha256(Path(path).expanduser()), by_id, {key: _mean(given) for key, given in grouped.items()})


def _mean(given: list[Scored]) -> Scored:
    means = []
    for rubric in range(len(RUBRICS)):
        known = [s[rubric] for s in given if not math.isnan(s[rubric])]
        means.append(sum(known) / len(known) if known else math.nan)
    return means[0], means[1]
