"""Is it one direction or several? The top k dimensions shared by other organisms, ablated in one that they were not read in.

    rows  D_q,i = difference of class means of organism i on question q, scaled so that organisms weigh alike        B_k = top k right singular vectors (SVD)
    x' = x - B_k^T B_k x   at every block's output of the held-out organism

The basis is read without the held-out organism's recipe, and once more without its training data. The effect on margin and on KL is read for every k;
few k are sampled and judged. Nulls of the same k: random subspaces, what answers differ along inside a class, and the chat model's own top k on the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from convergent import stats
from convergent.core.chapter import Chapter
from convergent.core.ids import seed
from convergent.core.interventions import AblateSubspace, Intervention, Site
from convergent.directions import geometry
from convergent.directions.margin import margins
from convergent.experiments import subspace_page as page
from convergent.experiments.base import Arm, Block, Build, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.experiments.subspace_page import BASES
from convergent.interventions.controls import answer_logprobs, random_subspace, text_kl

Null = Literal["random", "within", "chat"]
class SubspaceBlock(Block):
    """Settings of `subspace`."""

    held_out: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Organisms in which it is ablated; by default the first of every recipe and data that the others can be a basis for."""
    of: Literal["questions", "directions"] = "questions"
    """What the basis spans: per-question differences of the other organisms, or their directions alone (no more dimensions than organisms)."""
    ks: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5, 6, 7, 8), min_length=1)
    """Numbers of dimensions."""
    control_ks: tuple[int, ...] = (1, 2, 4, 8)
    """Where the nulls are measured, among `ks`; the largest that was measured always is."""
    controls: tuple[Null, ...] = ("random", "within", "chat")
    draws: int = Field(default=5, ge=stats.FEWEST_DRAWS)
    """Random subspaces, whose margins the claims are held against; one of them is sampled."""
    mode: Literal["single", "layerwise"] = "single"
    """single: the primary layer's basis at every block; layerwise: each block its own."""
    site: Site = "block_output"
    sampled_k: tuple[int, ...] = (2,)
    """Numbers of dimensions that are sampled and judged too, with a random null."""
    same: float = Field(default=0.05, gt=0)
    """Nats per token: margins that differ by less are equal, in the claim that there is one dimension."""

    @field_validator("ks", "control_ks", "sampled_k")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = next((i for i, k in enumerate(value) if k < 1), None)
        if wrong is not None:
            raise ValueError(f"{wrong}: {value[wrong]} dimensions are no subspace; give whole numbers from 1")
        return tuple(sorted(set(value)))

    def null_ks(self, most: int) -> tuple[int, ...]:
        """Where nulls are measured, if the subspace has `most` dimensions at most."""
        return tuple(k for k in self.ks if k <= most and (k in self.control_ks or k == most))


name = "subspace"
settings = SubspaceBlock


def basis_organisms(held_out: str, scene: Scene) -> dict[str, tuple[str, ...]]:
    """Basis -> the organisms that it is read in: of another family than the held-out one; and of these only those trained on other data, if fewer."""
    own = scene.organisms[held_out]
    others = tuple(o for o in scene.others(held_out) if scene.organisms[o].family != own.family)
    domains = tuple(o for o in others if scene.organisms[o].data != own.data)
    return {basis: found for basis, found in (("others", others), ("domains", domains)) if found and (basis == "others" or found != others)}


def held_out(block: SubspaceBlock, scene: Scene) -> tuple[str, ...]:
    """The organisms in which the subspaces are ablated."""
    if block.held_out is not None:
        return tuple(dict.fromkeys(block.held_out))
    first = {scene.organisms[o].family: o for o in reversed(scene.others())}
    return tuple(o for o in scene.others() if o in first.values() and basis_organisms(o, scene))


def check(block: SubspaceBlock, scene: Scene) -> None:
    """Held-out organisms are known, and others are left to read a basis in."""
    for o in block.held_out or ():
        if o not in scene.organisms:
            raise NotHereError(f"held_out: no organism is called {o!r}; there are {', '.join(scene.organisms)}")
        if not basis_organisms(o, scene):
            raise NotHereError(f"held_out: no organism of another recipe or data is left to read a subspace for {o} in; add one")
    if not held_out(block, scene):
        raise NotHereError("held_out: a held-out organism needs another one, of other recipe or data, that the subspace is read in; add one")


def bases(kit: Kit, block: SubspaceBlock, organism: str) -> dict[str, list[torch.Tensor]]:
    """Basis or null -> per layer (k, d_model) orthonormal rows, k the largest asked for or what the rows span.

    Raises NotHereError where no organism is left to read it in.
    """
    most = max(*block.ks, *block.sampled_k, 1)
    found: dict[str, list[torch.Tensor]] = {}

    def top(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = geometry.joint_rows(parts)
        if block.mode == "single":
            return [geometry.top_basis(rows[:, kit.layer], most).float()] * rows.shape[1]
        return [geometry.top_basis(rows[:, layer], most).float() for layer in range(rows.shape[1])]

    def rows_of(o: str, reader: str) -> torch.Tensor:
        sums = kit.question_sums(o, reader)
        return sums.differences() if block.of == "questions" else sums.direction()[None]

    for basis, names in basis_organisms(organism, kit.scene).items():
        readable = _readable(kit, names)
        found[basis] = top([rows_of(o, o) for o in readable])
        if basis == "others":
            if "chat" in block.controls:
                found["chat"] = top([rows_of(o, "chat") for o in readable])
            if "within" in block.controls:
                found["within"] = top([kit.question_sums(o, o).within() for o in readable])
    return found


def _readable(kit: Kit, names: Sequence[str]) -> list[str]:
    """Those with a direction of their own. Raises NotHereError if there is none."""
    found, why = [], ""
    for o in names:
        try:
            kit.own_answers(o)
            found.append(o)
        except NotHereError as error:
            why = str(error)
    if not found:
        raise NotHereError(f"no organism to read a subspace in has a direction ({why})")
    return found


def ablated(rows: Sequence[torch.Tensor], k: int, block: SubspaceBlock) -> tuple[Intervention, ...] | None:
    """The interventions for the first k dimensions, or None where the rows span fewer at some layer."""
    if min(map(len, rows)) < k:
        return None
    if block.mode == "single":
        return (AblateSubspace(rows[0][:k], block.site),)
    return tuple(AblateSubspace(rows[layer][:k], block.site, (layer,)) for layer in range(len(rows)))


def _random(kit: Kit, k: int, draw: int, d_model: int, block: SubspaceBlock) -> tuple[Intervention, ...]:
    return (AblateSubspace(random_subspace(d_model, k, seed(kit.seed, "subspace", draw)), block.site),)


def arms(block: SubspaceBlock, scene: Scene) -> list[Arm]:
    """For few k the shared subspace and a random one."""
    found = []
    for o in held_out(block, scene):
        for k in block.sampled_k:
            words = f"{k} dimension{'s' if k > 1 else ''}"
            found += [
                Arm(f"{o}/subspace-{k}", o, f"{o}, shared subspace ablated, k = {k}", f"{o} with the top {words} of other organisms projected out.",
                    "subspace", "real", _real(block, o, k)),
                Arm(f"{o}/subspace-{k}-random", o, f"{o}, ablated: random subspace, k = {k}", f"{o} with {words} drawn at random projected out.",
                    "subspace", "control", _null(block, k)),
            ]  # fmt: skip
    return found


def _real(block: SubspaceBlock, organism: str, k: int) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        made = ablated(bases(kit, block, organism)["others"], k, block)
        if made is None:
            raise NotHereError(f"the other organisms' differences span fewer than {k} dimensions")
        return made

    return build


def _null(block: SubspaceBlock, k: int) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return _random(kit, k, 0, kit.direction.d_model, block)

    return build


def readings(block: SubspaceBlock, scene: Scene) -> list[Reading]:
    """One per held-out organism: margins and KL for every basis and k."""
    found = []
    for o in held_out(block, scene):
        names = tuple(dict.fromkeys(n for ns in basis_organisms(o, scene).values() for n in ns))
        n_conditions = 2 * len(block.ks) + len(block.null_ks(block.ks[-1])) * (block.draws + 2)
        found.append(
            Reading(f"subspace/{o}", _inputs(block, o, names), _compute(block, o), organisms=("chat", *names, o), tokens=4e3 * n_conditions)
        )
    return found


def _inputs(block: SubspaceBlock, organism: str, names: Sequence[str]) -> Any:
    def inputs(kit: Kit) -> Any:
        ids = {b: [kit.sums_id(o, r) for o in _readable(kit, ns) for r in (o, "chat")] for b, ns in basis_organisms(organism, kit.scene).items()}
        settings = block.model_dump(exclude={"sampled_k", "same"})
        return [kit.model_id(organism), kit.model_id("chat"), ids, list(kit.pairs), kit.effect_texts, kit.layer, kit.seed, settings]

    return inputs


def _compute(block: SubspaceBlock, organism: str) -> Any:
    def compute(kit: Kit) -> Any:
        made = bases(kit, block, organism)
        d_model = next(iter(made.values()))[0].shape[1]
        conditions: dict[str, tuple[Intervention, ...] | None] = {}
        nulls = block.null_ks(max((k for k in block.ks if ablated(made["others"], k, block)), default=0))
        for basis, rows in made.items():
            for k in block.ks if basis in BASES else nulls:
                conditions[f"{basis}/{k}"] = ablated(rows, k, block)
        for draw in range(block.draws) if "random" in block.controls else ():
            conditions |= {f"random-{draw}/{k}": _random(kit, k, draw, d_model, block) for k in nulls}
        chat = answer_logprobs(kit.model("chat"), kit.effect_texts)
        model = kit.model(organism)
        clean = answer_logprobs(model, kit.effect_texts)

        def measured(interventions: tuple[Intervention, ...]) -> dict[str, list[float]]:
            changed = answer_logprobs(model, kit.effect_texts, interventions) if interventions else clean
            found = margins(model, kit.pairs, [interventions])
            return {"margin": [m.margin for m in found], "kl": text_kl(clean, changed), "to_chat": text_kl(chat, changed)}

        at = kit.layer
        return {
            "bases": {b: _readable(kit, names) for b, names in basis_organisms(organism, kit.scene).items()},
            "pairs": [p.id for p in kit.pairs],
            "texts": [t.id for t in kit.effect_texts],
            "clean": measured(()),
            "conditions": {c: measured(i) for c, i in conditions.items() if i is not None},
            "absent": [c for c, i in conditions.items() if i is None],
            # How much of the organism's own direction, which was not used, lies in the subspace.
            "own_share": _share(kit, organism, made, at),
        }

    return compute


def _share(kit: Kit, organism: str, made: dict[str, list[torch.Tensor]], layer: int) -> dict[str, list[float]]:
    """Basis -> share of the squared norm of the held-out organism's direction in the first 1, 2, ... dimensions; empty where it has none."""
    try:
        v = kit.question_sums(organism, organism).direction()[layer]
    except NotHereError:
        return {}
    return {b: ((rows[layer].double() @ v).square().cumsum(0) / v.square().sum()).tolist() for b, rows in made.items()}


# What they say


def claims(block: SubspaceBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """More dimensions restore more; or one is enough."""
    return page.claims(block, outcomes, held_out(block, scene))


def chapter(block: SubspaceBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Margin and KL over k, one panel per held-out organism."""
    return page.chapter(block, outcomes, held_out(block, scene))
