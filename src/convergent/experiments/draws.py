"""Further draws of random nulls: of each, the margin alone is measured, which needs no sampling.

The first draw of a null is an arm like any other. A claim that the real intervention does more than a random one must hold against one more draw, and
one draw does not say how far draws differ; the margin of a few more does (`stats.nulls`, `Outcomes.margin`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from convergent.core.ids import content_id
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.experiments.arms import margins_under
from convergent.experiments.base import Arm, Control, Kit, NotHereError, Reading
from convergent.experiments.outcomes import DRAWS

MARGIN_TOKENS, MATCH_TOKENS = 5000.0, 2000.0
"""Rough tokens of a draw's margin, and of matching its effect (two passes over the effect texts, as it starts from the first draw's); for the plan."""


def redraw(kind: Control, organism: str, make: Callable[[Kit], Add | Ablate]) -> Callable[[Kit, int], tuple[Intervention, ...]] | None:
    """`Arm.redraw` of the control of that kind in place of what `make` makes; None for what is not random."""
    return None if kind == "other_concept" else lambda kit, draw: (kit.control(kind, organism, make(kit), draw),)


def further_draws(experiment: str, arms: Sequence[Arm], n_draws: int) -> list[Reading]:
    """A reading per organism: margins of the held-out pairs under draws 1 to `n_draws` - 1 of every arm that can be redrawn."""
    random = [a for a in arms if a.redraw is not None]
    return [_of(experiment, o, [a for a in random if a.organism == o], n_draws) for o in dict.fromkeys(a.organism for a in random)]


def _of(experiment: str, organism: str, arms: Sequence[Arm], n_draws: int) -> Reading:
    def built(kit: Kit) -> dict[str, list[tuple[Intervention, ...]]]:
        found = {}
        for arm in arms:
            assert arm.redraw is not None, "further_draws has chosen them"
            with suppress(NotHereError):  # the arm itself is left out then
                found[arm.name] = [arm.redraw(kit, draw) for draw in range(1, n_draws)]
        return found

    def inputs(kit: Kit) -> str:
        return content_id(kit.model_id(organism), kit.pairs, {name: [list(i) for i in draws] for name, draws in built(kit).items()})

    def compute(kit: Kit) -> dict[str, Any]:
        made = built(kit)  # matching an effect may load the model: first
        margins = iter(margins_under(kit, organism, [i for draws in made.values() for i in draws]))
        return {"pairs": [p.id for p in kit.pairs], "margins": {name: [next(margins) for _ in draws] for name, draws in made.items()}}

    each = sum(MARGIN_TOKENS + ("effect_matched" in a.name) * MATCH_TOKENS for a in arms)
    return Reading(f"{experiment}{DRAWS}{organism}", inputs, compute, organisms=(organism,), tokens=(n_draws - 1) * each)
