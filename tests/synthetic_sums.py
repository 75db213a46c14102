"""Class sums drawn at random with a known truth: what geometry is tested on without a model."""

from __future__ import annotations

import numpy as np
import torch

from convergent.core.ids import seed
from convergent.directions.questions import QuestionSums


def drawn_sums(difference: np.ndarray, name: str, n: int = 6, noise: float = 1.0, common: float = 0.0) -> QuestionSums:
    """Sums of `n` one-token answers per class and question, whose class means differ by difference (n_questions, n_layers, d_model) in truth.

    `noise`: standard deviation of an answer in each dimension. `common`: what every answer has in dimension 0.
    """
    rng = np.random.default_rng(seed("tests", "sums", name))
    q, layers, d = difference.shape
    answers = noise * rng.standard_normal((2, n, q, layers, d))
    answers[0] += difference / 2
    answers[1] -= difference / 2
    answers[..., 0] += common
    halves = np.stack([answers[:, ::2].sum(1), answers[:, 1::2].sum(1)], axis=1)
    mass = np.broadcast_to(np.array([len(range(0, n, 2)), len(range(1, n, 2))], dtype=float)[None, :, None], (2, 2, q))
    return QuestionSums(tuple(f"q{i}" for i in range(q)), torch.from_numpy(halves).float(), torch.from_numpy(mass.copy()))


def unit(name: str, d: int) -> np.ndarray:
    """(d,) a random unit vector."""
    v = np.random.default_rng(seed("tests", "unit", name)).standard_normal(d)
    return v / np.linalg.norm(v)
