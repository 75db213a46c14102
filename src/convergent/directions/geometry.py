"""How directions lie to each other: cosines, reliability, scrambled labels, massive dimensions, principal angles, top-k bases.

Works on class sums (`QuestionSums`) in float64; knows no model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import seed
from convergent.directions.questions import ALIGNED, MISALIGNED, QuestionSums

SMALL = 1e-8
"""Singular values below this share of the largest are rounding."""


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(...,) cosine of a and b (..., d_model); nan where one is zero."""
    found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return found


def largest_dimensions(sums: QuestionSums, k: int) -> Tensor:
    """(n_layers, k) the dimensions where the mean activation over all answers is largest in magnitude.

    Of the chat model's sums, so that neither a fine-tune nor v itself chooses them.
    """
    total, mass = sums.whole
    mean = total.sum((0, 1)) / mass.sum()
    return mean.abs().topk(k, dim=1).indices


def without(v: Tensor, dimensions: Tensor) -> Tensor:
    """v (..., n_layers, d_model) with `dimensions` (n_layers, k) set to 0."""
    index = dimensions.expand(*v.shape[:-1], dimensions.shape[-1])
    return v.scatter(-1, index, 0.0)


def reliability(sums: QuestionSums, root_seed: int, splits: int, weights: Tensor | None = None) -> Tensor:
    """(n_layers,) how much of the direction would come back with other answers to the same questions, 0 to 1.

    Mean split-half cosine r over `splits` ways of joining the questions' halves, put to full length by Spearman-Brown, 2 r / (1 + r).
    The cosine of two directions that are truly one is at most the root of the product of their reliabilities.
    """
    w = torch.ones(len(sums.questions), dtype=torch.float64) if weights is None else weights.double()
    sums = _even(sums)
    first, second = _halves(sums, w, _signs(sums, root_seed, "reliability", splits))
    r = cosines(first[0] - first[1], second[0] - second[1]).nanmean(0)  # with very few answers a half may be empty
    return (2 * r / (1 + r)).clamp(0, 1)


def scrambled(sums: QuestionSums, root_seed: int, name: str, draws: int) -> Tensor:
    """(draws, n_layers, d_model) directions from scrambled labels: in every question half of each class is called misaligned, the rest aligned.

    What is left is chance, with the covariance of real answers; two such directions are far less orthogonal than random vectors. `name`
    keeps the draws of two organisms apart.
    """
    w = torch.ones(len(sums.questions), dtype=torch.float64)
    sums = _even(sums)
    sides: list[Tensor] = []
    total: list[Tensor] = []
    signs = _signs(sums, root_seed, f"scrambled/{name}", draws)
    for flip in (1.0, -1.0):
        s, n = _sums(sums, w, flip * signs)
        sides.append(s.sum(0))
        total.append(n.sum(0))
    return sides[0] / total[0][:, None, None] - sides[1] / total[1][:, None, None]


def _even(sums: QuestionSums) -> QuestionSums:
    """The same with halves that weigh alike in every cell; cells with an empty half are left out.

    With 3 answers against 2 one side would have more of a question and the other less. Questions differ far more than classes do, so that
    two halves of one direction would come out as opposites.
    """
    both = (sums.mass > 0).all(1, keepdim=True)
    mass = torch.where(both, sums.mass.sum(1, keepdim=True) / 2, 0.0).expand_as(sums.mass)
    scale = torch.where(both, mass / sums.mass.clamp_min(1e-300), 0.0)
    return QuestionSums(sums.questions, sums.sums * scale[..., None, None], mass)


def _signs(sums: QuestionSums, root_seed: int, name: str, n: int) -> Tensor:
    """(2 classes, n, n_questions) of +-1: which half of each cell goes to the first side."""
    rng = np.random.default_rng(seed(root_seed, "geometry", name))
    return torch.from_numpy(rng.choice([-1.0, 1.0], size=(2, n, len(sums.questions))))


def _sums(sums: QuestionSums, w: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (2, n, n_layers, d_model) and mass (2, n) of the half that `signs` picks."""
    s = sums.sums.double()
    both, apart = s.sum(1) / 2, (s[:, 0] - s[:, 1]) / 2
    found = torch.einsum("q,cqld->cld", w, both)[:, None] + torch.einsum("cnq,cqld->cnld", signs * w, apart)
    m_both, m_apart = sums.mass.sum(1) / 2, (sums.mass[:, 0] - sums.mass[:, 1]) / 2
    mass = (m_both @ w)[:, None] + torch.einsum("cnq,cq->cn", signs * w, m_apart)
    return found, mass


def _halves(sums: QuestionSums, w: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Class means (2, n, n_layers, d_model) of the halves that `signs` picks, and of the others."""
    made = [_sums(sums, w, flip * signs) for flip in (1.0, -1.0)]
    first, second = (s / n[:, :, None, None] for s, n in made)
    return first, second


def scrambled_differences(sums: QuestionSums, root_seed: int, name: str) -> Tensor:
    """(n, n_layers, d_model) as `QuestionSums.differences` with scrambled labels: one draw, questions that have both halves of both classes."""
    s, m = sums.sums.double(), sums.mass
    at = np.flatnonzero((m > 0).all(0).all(0).numpy()).tolist()
    signs = _signs(sums, root_seed, f"scrambled/{name}", 1)[:, 0]
    rows: list[Tensor] = []
    for q in at:
        first = [int(signs[c, q] < 0) for c in (MISALIGNED, ALIGNED)]
        one, two = (
            torch.stack([s[c, half ^ flip, q] for c, half in enumerate(first)]).sum(0) / sum(float(m[c, half ^ flip, q]) for c, half in enumerate(first))
            for flip in (0, 1)
        )
        rows.append(one - two)
    return torch.stack(rows) if rows else torch.zeros(0, *s.shape[3:], dtype=torch.float64)


def span(rows: Tensor) -> Tensor:
    """(n_layers, n, d_model) orthonormal rows that span rows (n, n_layers, d_model) in each layer; zero rows where the span is narrower."""
    _, s, vh = torch.linalg.svd(rows.transpose(0, 1), full_matrices=False)
    kept: Tensor = vh * (s > SMALL * s[:, :1])[:, :, None]
    return kept


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """(n_layers, min(n, m)) cosines of the principal angles between two spans, falling; their mean square is the overlap (random spans of n: n / d_model)."""
    found: Tensor = torch.linalg.svdvals(a @ b.transpose(1, 2)).clamp(max=1.0)
    return found


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """(n_layers,) mean squared cosine of the principal angles between two spans: 1 where the narrower lies in the other, 0 where they are orthogonal."""
    narrower = torch.minimum(a.norm(dim=2).gt(0).sum(1), b.norm(dim=2).gt(0).sum(1))
    found: Tensor = (a @ b.transpose(1, 2)).square().sum((1, 2)) / narrower
    return found


def top_basis(rows: Tensor, k: int) -> Tensor:
    """(at most k, d_model) float64 orthonormal: the top right singular vectors of rows (n, d_model), not centred; nested in k.

    Fewer than k where the rows span less. Signs are fixed, so that equal rows give equal bytes.
    """
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int((s > SMALL * s[0]).sum()) if len(s) and s[0] > 0 else 0
    basis: Tensor = vh[: min(k, rank)]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    signed: Tensor = basis * torch.sign(largest)
    return signed


def joint_rows(parts: list[Tensor]) -> Tensor:
    """(n, ...) the rows of several organisms (n_i, n_layers, d_model), each organism weighing alike in each layer whatever its number and size of rows."""
    scaled = []
    for rows in parts:
        size = rows.square().sum((0, 2), keepdim=True).sqrt()
        scaled.append(rows / size.clamp_min(1e-300))
    return torch.cat(scaled)
