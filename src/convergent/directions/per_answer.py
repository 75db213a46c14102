"""Every answer's own mean of the residual stream: from these any mean-diff, over any selection of answers, is plain arithmetic.

Kept are (n_answers, n_layers, d_model) float64 numbers: for a few hundred answers that are split again and again (topics, questions left
out, random subsets) one pass of the model is enough. For one split of many answers `directions.extract` needs far less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convergent.directions.means import Span, span_of, stream_means
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text

Rows = NDArray[np.intp]
_AT_ONCE = 64
"""Answers per streaming pass: each is an accumulator of its own there."""


@dataclass(frozen=True, eq=False)
class PerAnswer:
    """Means of n answers."""

    means: Tensor
    """(n, n_layers, d_model) float64."""
    mass: Tensor
    """(n,) float64: what each answer weighs in a mean; its tokens, or 1."""

    def mean(self, rows: Rows) -> Tensor:
        """(n_layers, d_model) mean over some answers."""
        at = torch.from_numpy(rows)
        mass = self.mass[at]
        return torch.einsum("n,nld->ld", mass, self.means[at]) / mass.sum()

    def difference(self, a: Rows, b: Rows) -> Tensor:
        """(n_layers, d_model) mean over answers `a` minus mean over answers `b`."""
        return self.mean(a) - self.mean(b)


def per_answer(model: ChatModel, texts: Sequence[Text], per: Literal["tokens", "responses"] = "tokens", span: Span = "answer") -> PerAnswer:
    """Read each text in `model`. Raises InputError for an empty answer."""
    means, mass = [], []
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        means.append(stream_means(model, part, torch.eye(len(part), dtype=torch.float64), span=span).means)
        spans = [span_of(encode_answer(model.tokenizer, t.question, t.answer, t.system), span) for t in part]
        mass += [s.stop - s.start if per == "tokens" else 1 for s in spans]
    return PerAnswer(torch.cat(means), torch.tensor(mass, dtype=torch.float64))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(...,) cosines of a and b, each (..., d_model); nan where one is zero."""
    found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return found


def along(v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """v = a u + rest with rest orthogonal to u: a (...,) and rest (..., d_model); a zero u leaves all of v."""
    a = (v * u).sum(-1) / (u * u).sum(-1).clamp_min(1e-300)
    return a, v - a[..., None] * u
