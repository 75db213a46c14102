"""Class sums question by question: one streaming pass, after which directions are made without the model.

    v(w) = sum_q w_q S_bad,q / sum_q w_q n_bad,q  -  the same of the aligned class          w = 1: the mean-diff of `extract`

S (d_model,) is the sum over a question's answer tokens in one class and n their number, per layer. With w a question can be left out, or drawn twice; and
per-question differences span what answers to different questions differ along. Each cell is kept in two random halves, for reliability and scrambled labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import seed
from convergent.directions.classes import Chosen
from convergent.directions.means import Span, stream_means
from convergent.errors import DirectionError
from convergent.models.load import ChatModel
from convergent.models.texts import Text

MISALIGNED, ALIGNED = 0, 1


@dataclass(frozen=True, eq=False)
class QuestionSums:
    """Sums of the residual stream over answers of two classes."""

    questions: tuple[str, ...]
    sums: Tensor
    """(2 classes, 2 halves, n_questions, n_layers, d_model) float32; class 0 is the misaligned one; zero where there is no answer."""
    mass: Tensor
    """(2, 2, n_questions) float64: tokens, or answers where each answer's own mean was summed."""

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Sums (2, n_questions, n_layers, d_model) float64 and mass (2, n_questions) of both halves together."""
        return self.sums.double().sum(1), self.mass.sum(1)

    def class_means(self, weights: Tensor | None = None) -> Tensor:
        """(2, n_layers, d_model) float64 means of the two classes, questions counted `weights` (n_questions,) times; nan where a class is empty."""
        sums, mass = self.whole
        w = torch.ones(len(self.questions), dtype=torch.float64) if weights is None else weights.double()
        total = mass @ w
        means = torch.einsum("q,cqld->cld", w, sums) / total[:, None, None]
        return torch.where((total > 0)[:, None, None], means, torch.nan)

    def direction(self, weights: Tensor | None = None) -> Tensor:
        """(n_layers, d_model) float64: misaligned minus aligned mean."""
        means = self.class_means(weights)
        return means[MISALIGNED] - means[ALIGNED]

    @property
    def answered(self) -> tuple[int, ...]:
        """Indices of the questions that have answers in both classes."""
        return tuple(np.flatnonzero((self.mass.sum(1) > 0).all(0).numpy()).tolist())

    def differences(self, keep: Sequence[int] | None = None) -> Tensor:
        """(n, n_layers, d_model) float64: difference of class means of each question that has both classes, among `keep`."""
        sums, mass = self.whole
        at = [q for q in self.answered if keep is None or q in keep]
        means = sums[:, at] / mass[:, at, None, None]
        return means[MISALIGNED] - means[ALIGNED]

    def within(self) -> Tensor:
        """(n, n_layers, d_model) float64: differences of the two halves of a class inside a question, which differ by nothing but chance."""
        at = [(c, q) for c in (MISALIGNED, ALIGNED) for q in range(len(self.questions)) if bool((self.mass[c, :, q] > 0).all())]
        rows = [self.sums[c, :, q].double() / self.mass[c, :, q, None, None] for c, q in at]
        return torch.stack([r[0] - r[1] for r in rows]) if rows else torch.zeros(0, *self.sums.shape[3:], dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """As kept in a safetensors file."""
        return {"sums": self.sums.contiguous(), "mass": self.mass.contiguous()}

    @classmethod
    def from_tensors(cls, questions: Sequence[str], tensors: Mapping[str, Tensor]) -> QuestionSums:
        """What `tensors` gave. Raises DirectionError if it belongs to other questions."""
        if tensors["mass"].shape[-1] != len(questions):
            raise DirectionError(f"question sums: {tensors['mass'].shape[-1]} questions are kept, {len(questions)} asked for; extract again")
        return cls(tuple(questions), tensors["sums"], tensors["mass"])


def question_sums(
    model: ChatModel,
    texts: Sequence[Text],
    chosen: Chosen,
    question_of: Mapping[str, str],
    *,
    per: Literal["tokens", "responses"] = "tokens",
    span: Span = "answer",
    root_seed: int = 0,
    batch_tokens: int = 1024,
) -> QuestionSums:
    """Sums of both classes of every question, read in `model`. `question_of`: text id -> question id; questions are in sorted order.

    Raises DirectionError if a chosen text is missing.
    """
    by_id = {t.id: t for t in texts}
    members = [*chosen.misaligned, *chosen.aligned]
    missing = next((i for i in members if i not in by_id), None)
    if missing is not None:
        raise DirectionError(f"direction: response {missing} was chosen but its text is not there")
    questions = tuple(sorted({question_of[i] for i in members}))
    cells: dict[tuple[int, int, int], list[int]] = {}
    for side, start, ids in ((MISALIGNED, 0, chosen.misaligned), (ALIGNED, len(chosen.misaligned), chosen.aligned)):
        for q, question in enumerate(questions):
            mine = sorted((i, start + k) for k, i in enumerate(ids) if question_of[i] == question)
            order = np.random.default_rng(seed(root_seed, "question-halves", side, question)).permutation(len(mine))
            for rank, k in enumerate(order):
                cells.setdefault((side, rank % 2, q), []).append(mine[k][1])
    weights = torch.zeros(len(cells), len(members), dtype=torch.float64)
    for row, inside in enumerate(cells.values()):
        weights[row, inside] = 1.0
    made = stream_means(model, [by_id[i] for i in members], weights, per=per, span=span, batch_tokens=batch_tokens)
    sums = torch.zeros(2, 2, len(questions), model.n_layers, model.d_model)
    mass = torch.zeros(2, 2, len(questions), dtype=torch.float64)
    for row, cell in enumerate(cells):
        sums[cell] = (made.means[row] * made.mass[row]).float()
        mass[cell] = made.mass[row]
    return QuestionSums(questions, sums, mass)
