"""Do two pushes do the same thing further down? Cosines between what they change, whole and with each question left out.

Everything is a sum over answer tokens by question, (n_questions, ..., d_model) in float64, so that a number without one question costs no further
pass, and an interval over questions no stored activations. Values are JSON-ready: {"all": x, "without": [x without question 0, ...]}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import seed
from convergent.core.interventions import Intervention
from convergent.directions.jacobian import Products
from convergent.directions.means import Span, stream_means
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.stats.leaveout import groups_of

Kept = dict[str, Any]
"""{"all": value, "without": [value without each question]}."""


def by_question(question_of: Mapping[str, str], ids: Sequence[str], n: int | None, root_seed: int) -> list[str]:
    """At most `n` of `ids`, taken from the questions in turn, in an order that follows from the seed; all of them if n is None."""
    pools: dict[str, list[str]] = {}
    rng = np.random.default_rng(seed(root_seed, "by-question"))
    ordered = sorted(ids)
    for i in (ordered[int(k)] for k in rng.permutation(len(ordered))):
        pools.setdefault(question_of[i], []).append(i)
    turns = [p[k] for k in range(max(map(len, pools.values()), default=0)) for _, p in sorted(pools.items()) if k < len(p)]
    return turns[:n]


def groups_for(texts: Sequence[Text], question_of: Mapping[str, str]) -> Tensor:
    """(n_texts,) number of each text's question, counted from 0."""
    return torch.as_tensor(groups_of([question_of[t.id] for t in texts]))


def group_sums(
    model: ChatModel, texts: Sequence[Text], groups: Tensor, *, n_groups: int | None = None, per: Literal["tokens", "responses"] = "tokens",
    span: Span = "answer", interventions: Sequence[Intervention] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums (n_groups, n_layers, d_model), mass (n_groups,)) over answer tokens, or over responses' means; groups without a text are zero."""
    count = int(groups.max()) + 1 if n_groups is None else n_groups
    there = sorted(set(groups.tolist()))
    weights = (groups[None] == torch.tensor(there)[:, None]).double()
    found = stream_means(model, texts, weights, per=per, span=span, interventions=interventions)
    sums, mass = torch.zeros(count, model.n_layers, model.d_model, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    sums[there], mass[there] = found.means * found.mass[:, None, None], found.mass
    return sums, mass


def leaving_out(n_groups: int, statistic: Callable[[Tensor], Tensor]) -> Kept:
    """`statistic` of weights (n_groups,): ones, and with one group at 0."""
    ones = torch.ones(n_groups, dtype=torch.float64)
    without = [ones.clone().index_fill(0, torch.tensor([g]), 0.0) for g in range(n_groups)]
    return {"all": statistic(ones).tolist(), "without": [statistic(w).tolist() for w in without]}


def along(a: Tensor, b: Tensor) -> Tensor:
    """The part of a (..., d) along b (..., d), signed, as a length; nan where b is zero."""
    found: Tensor = (a * b).sum(-1) / b.norm(dim=-1)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) over the last dimension; nan where one of them is zero."""
    found: Tensor = along(a, b) / a.norm(dim=-1)
    return found


def class_cosine(b: Tensor, bad: tuple[Tensor, Tensor], good: tuple[Tensor, Tensor]) -> Kept:
    """cos(b, v) with v the difference of two classes' means. b (d,); bad and good: sums (n_groups, d) and mass (n_groups,)."""

    def statistic(keep: Tensor) -> Tensor:
        v = (keep @ bad[0]) / (keep @ bad[1]) - (keep @ good[0]) / (keep @ good[1])
        return cosine(b.double(), v)

    return leaving_out(len(bad[1]), statistic)


def compared(shifts: Mapping[str, Tensor], of: str, reference: str) -> dict[str, Kept]:
    """Per layer the cosine between shift `of` and every other. shifts: (n_groups, n_layers, d_model), summed over the same tokens.

    Beside them `part/NAME` for every other shift but the reference: its length along the reference's, as a share of |shift `of`|. Where two
    parts add up to `of`, these add up to its cosine with the reference.
    """
    groups = len(shifts[of])

    def total(name: str, keep: Tensor) -> Tensor:
        return torch.einsum("g,gld->ld", keep, shifts[name])

    found = {n: leaving_out(groups, lambda keep, n=n: cosine(total(of, keep), total(n, keep))) for n in shifts if n != of}  # type: ignore[misc]
    for n in shifts:
        if n not in (of, reference):
            found[f"part/{n}"] = leaving_out(
                groups, lambda keep, n=n: along(total(n, keep), total(reference, keep)) / total(of, keep).norm(dim=-1)  # type: ignore[misc]
            )  # fmt: skip
    return found


def lengths(shifts: Mapping[str, Tensor], n_tokens: int) -> dict[str, list[float]]:
    """Per layer the norm of each mean shift."""
    return {n: (s.sum(0) / n_tokens).norm(dim=-1).tolist() for n, s in shifts.items()}


def pushed(products: Iterable[Products], groups: Mapping[str, int], names: Sequence[str], onto: str, own: tuple[str, float]) -> dict[str, Any]:
    """What Jacobian products say, with each question left out; names: of the pushes, in order.

    cosine   cos(J u, J onto) per layer, J averaged over answer tokens; its square is the share of |J u|^2 along J onto
    token    the same share token by token: sum of squared lengths along J_t onto over sum of |J_t u|^2
    direct   of push own[0], which is own[1] times the push `onto` plus a rest orthogonal to it: what the first part alone gives to its cosine
    length   |J u|
    """
    rows = list(products)
    n = max(groups.values()) + 1
    at = torch.tensor([groups[p.text] for p in rows])
    sums, squares, beside = (torch.zeros(n, *getattr(rows[0], part).shape, dtype=torch.float64) for part in ("sums", "squares", "along"))
    for total, part in ((sums, "sums"), (squares, "squares"), (beside, "along")):
        total.index_add_(0, at, torch.stack([getattr(p, part) for p in rows]))
    v, u = names.index(onto), names.index(own[0])

    def pooled(keep: Tensor) -> Tensor:
        return torch.einsum("g,gkld->kld", keep, sums)

    def direct(keep: Tensor) -> Tensor:
        j = pooled(keep)
        found: Tensor = own[1] * j[v].norm(dim=-1) / j[u].norm(dim=-1)
        return found

    cosines = leaving_out(n, lambda keep: cosine(pooled(keep), pooled(keep)[v][None]))
    tokens = leaving_out(n, lambda keep: torch.einsum("g,gkl->kl", keep, beside) / torch.einsum("g,gkl->kl", keep, squares))
    n_tokens = sum(p.n_tokens for p in rows)
    return {
        "n_texts": len(rows),
        "n_tokens": n_tokens,
        "cosine": _named(cosines, names),
        "token": _named(tokens, names),
        "direct": leaving_out(n, direct),
        "length": dict(zip(names, (sums.sum(0) / n_tokens).norm(dim=-1).tolist(), strict=True)),
    }


def _named(kept: Kept, names: Sequence[str]) -> dict[str, Kept]:
    """A value per push, each with its own "all" and "without"."""
    return {n: {"all": kept["all"][i], "without": [w[i] for w in kept["without"]]} for i, n in enumerate(names)}
