"""The rank-1 organism's B vector against the direction (paper, single-adapter organism): nearly orthogonal, and yet the same effect?

    cos(B, v_L)      beside random vectors and the exact law of chance
    behaviour        v ablated from every block's output, from block L's alone, and from the adapter: B' = (I - v^ v^T) B, at |B|
    downstream       change of the mean answer activations against the chat model: the organism's, that of lambda v_L, that of nulls
    Jacobian         J B against J v, J the derivative of block l's output by a constant at block L's: first order, without a dose

The change that the organism makes along v's is split into what B's own component along v makes and what the rest of B makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from convergent.core.chapter import Chapter
from convergent.core.ids import content_id, seed
from convergent.core.interventions import Ablate, Add, Intervention, LowRank
from convergent.directions.alignment import by_question, class_cosine, compared, group_sums, groups_for, lengths, pushed
from convergent.directions.jacobian import Written, jacobian_products
from convergent.experiments import b_vector_page as page
from convergent.experiments.base import CONTROLS, Arm, Build, Control, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.draws import further_draws
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter

PAPER = "paper section 3.5, appendix D"
TEXT_TOKENS, ROUGH_ANSWERS = 110, 256
"""For the estimate of time alone."""


class BVectorBlock(DrawsNulls):
    """Settings of `b_vector`."""

    organism: str | None = None
    """The organism whose B it is; the first with one rank-1 adapter by default, else the source of the direction."""
    layer: int | None = Field(default=None, ge=0)
    """Which of several adapters; the one nearest to the primary layer by default."""
    scale: float = 1.0
    """Coefficient lambda of v_L in the downstream comparison."""
    controls: tuple[Control, ...] = CONTROLS
    """Nulls that are added in place of v_L there."""
    random: int = Field(default=200, ge=1)
    """Random vectors beside cos(B, v_L)."""
    downstream_random: int = Field(default=19, ge=19)
    """Draws of each random one among them; v's change must be nearer than the nearest of theirs. For their number see `jacobian_random`."""
    texts: int = Field(default=32, ge=2)
    """Answers per class over which the downstream changes are averaged."""
    jacobian_texts: int = Field(default=16, ge=2)
    jacobian_random: int = Field(default=19, ge=19)
    """Random pushes beside B's. The largest of 19 is passed by chance once in twenty: fewer could not say what a 95 % interval says."""

    @model_validator(mode="after")
    def _some_dose(self) -> BVectorBlock:
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale}; a finite coefficient other than 0 changes something downstream")
        return self


name = "b_vector"
settings = BVectorBlock


def subject(block: BVectorBlock, scene: Scene) -> tuple[str, int]:
    """The organism and the layer of its adapter. Raises NotHereError: place, finding, mend."""
    alone = (o for o, s in scene.organisms.items() if s.answer != "good" and s.adapters and s.adapters.writes_alone and len(s.adapters.layers) == 1)
    organism = block.organism or next(alone, scene.source)
    mend = "name one with a rank-1 adapter on the MLP's writing layer alone, such as recipe single_adapter trains"
    if organism not in scene.organisms:
        raise NotHereError(f"organism: {organism} has no adapters; {mend}")
    shape = scene.organisms[organism].adapters
    if shape is None:
        raise NotHereError(f"organism: {organism} is a full fine-tune and has no B vector; {mend}")
    if not shape.writes_alone:
        raise NotHereError(f"organism: {organism} has adapters of rank {shape.rank} on {', '.join(shape.modules)}; {mend}")
    layer = min(shape.layers, key=lambda at: abs(at - scene.layer)) if block.layer is None else block.layer
    if layer not in shape.layers:
        raise NotHereError(f"layer: {organism} has no adapter at block {layer}; it has them at {', '.join(map(str, shape.layers))}")
    if layer == scene.depth - 1:
        raise NotHereError(f"layer: nothing is downstream of block {layer}, the last one; name an adapter below it")
    return organism, layer


def check(block: BVectorBlock, scene: Scene) -> None:
    """One rank-1 adapter must be there, with something downstream of it."""
    subject(block, scene)


# Arms: behaviour


def arms(block: BVectorBlock, scene: Scene) -> list[Arm]:
    """The organism with v removed in three ways, and with a random vector removed in the same ways."""
    o, layer = subject(block, scene)
    found = []
    for mode, (what, made) in _modes(o, layer).items():
        found += [
            Arm(
                f"{o}/b-{mode}", o, f"{o}, direction {what}", f"Organism {o} with v of block {layer} {what}.", "b_vector", "real", _built(made, None)
            ),
            Arm(
                f"{o}/b-{mode}-random", o, f"{o}, random vector {what}", f"Organism {o} with a random vector {what}.", "b_vector", "control",
                _built(made, 0), redraw=made,
            ),
        ]  # fmt: skip
    return found


def _built(made: Callable[[Kit, int | None], tuple[Intervention, ...]], draw: int | None) -> Build:
    return lambda kit: made(kit, draw)


def _modes(o: str, layer: int) -> dict[str, tuple[str, Callable[[Kit, int | None], tuple[Intervention, ...]]]]:
    """Mode -> (words, its interventions: with v, or with a draw of the null in its place)."""

    def ablated(layers: tuple[int, ...] | None) -> Callable[[Kit, int | None], tuple[Intervention, ...]]:
        def made(kit: Kit, draw: int | None) -> tuple[Intervention, ...]:
            kit.value("b_vector/cosine")  # raises where B is no write to the stream
            real = Ablate(kit.direction, layers=layers, vector_layer=layer)
            return (real if draw is None else kit.control("random", o, real, draw),)

        return made

    def from_b(kit: Kit, draw: int | None) -> tuple[Intervention, ...]:
        kit.value("b_vector/cosine")
        return (without(adapter_of(kit, o, layer), kit.direction[layer] if draw is None else _null_vector(kit, layer, draw)),)

    return {
        "everywhere": ("ablated at every block's output", ablated(None)),
        "at-layer": (f"ablated at the output of block {layer} alone", ablated((layer,))),
        "in-b": ("projected out of B, at the same norm", from_b),
    }


def adapter_of(kit: Kit, organism: str, layer: int) -> Adapter:
    """The organism's adapter at a layer. Raises NotHereError where its B is zero: it has no direction."""
    adapter = next(a for a in kit.adapters(organism) if a.layer == layer)
    if not bool(adapter.b.any()):
        raise NotHereError(f"B of {organism} at block {layer} is zero, as at the start of training; train it for more steps")
    return adapter


def without(adapter: Adapter, v: Tensor) -> LowRank:
    """What turns B into B' = (I - v^ v^T) B at the norm of B, in an organism that has B in its weights already."""
    b, unit = adapter.b[:, 0].double(), v.double() / v.double().norm()
    rest = b - (b @ unit) * unit
    changed = rest * (b.norm() / rest.norm()) - b
    return LowRank(adapter.layer, adapter.module, adapter.a, changed[:, None].float(), adapter.scale)


def _nulls(kit: Kit, controls: Sequence[Control], add: Add, n_draws: int) -> tuple[dict[str, Intervention], dict[str, str]]:
    """What is added to the chat model in place of `add`, by kind and draw; and why a kind cannot be."""
    found: dict[str, Intervention] = {}
    absent: dict[str, str] = {}
    for kind in dict.fromkeys(controls):
        try:
            for draw in range(1 if kind == "other_concept" else n_draws):
                found[page.drawn(kind, draw)] = kit.control(kind, "chat", add, draw)
        except NotHereError as error:
            absent[kind] = str(error)
    return found, absent


def _null_vector(kit: Kit, layer: int, draw: int) -> Tensor:
    """(d_model,) the study's random vector of that draw, in place of v."""
    null = kit.control("random", "chat", Add(kit.direction, layer), draw)
    assert isinstance(null, Add)
    return null.vector


# Readings: geometry


def readings(block: BVectorBlock, scene: Scene) -> list[Reading]:
    """cos(B, v), the downstream changes, and Jacobian products in both models on both models' texts; margins under further draws of the nulls."""
    o, layer = subject(block, scene)

    def inputs(*more: Callable[[Kit], Any]) -> Callable[[Kit], Any]:
        def of(kit: Kit) -> Any:
            nulls = [scene.twin and kit.model_id(scene.twin), content_id(kit.pairs)]
            own = block.model_dump(exclude={"null_draws"})
            return [kit.model_id(o), kit.model_id("chat"), kit.direction.content_id, layer, own, kit.seed, nulls, *(f(kit) for f in more)]

        return of

    def chosen(organism: str) -> Callable[[Kit], Any]:
        return lambda kit: kit.own_answers(organism)[0]

    def ids(organism: str) -> Callable[[Kit], Any]:
        return lambda kit: kit.own_table(organism)[0]["response_id"].tolist()

    per_text = TEXT_TOKENS * block.jacobian_texts * 1.5 * (5 + block.jacobian_random)
    found = [
        Reading(
            "b_vector/cosine", inputs(chosen(scene.source)), lambda kit: read_cosine(kit, block, o, layer),
            organisms=(scene.source,), tokens=ROUGH_ANSWERS * TEXT_TOKENS,
        ),
        Reading(
            "b_vector/downstream", inputs(chosen(o)), lambda kit: read_downstream(kit, block, o, layer),
            organisms=(o, "chat"), tokens=2 * block.texts * TEXT_TOKENS * (5 + block.downstream_random * len(block.controls)),
        ),
    ]  # fmt: skip
    for reader, writer in ((o, o), ("chat", o), ("chat", "chat")):
        found.append(
            Reading(
                f"b_vector/jacobian/{_role(reader)}-reads-{_role(writer)}", inputs(ids(writer)),
                lambda kit, reader=reader, writer=writer: read_jacobian(kit, block, o, layer, reader, writer),  # type: ignore[misc]
                organisms=(reader,), tokens=per_text,
            )
        )  # fmt: skip
    return [*found, *further_draws(name, arms(block, scene), block.null_draws)]


def _role(model: str) -> str:
    return "chat" if model == "chat" else "organism"


def read_cosine(kit: Kit, block: BVectorBlock, o: str, layer: int) -> dict[str, Any]:
    """cos(B, v_L) with each question left out of v; cos(B, v_l) of every layer; random vectors' cosines with v_L."""
    scene, b = kit.scene, adapter_of(kit, o, layer).b[:, 0].double()
    chosen, texts = kit.own_answers(scene.source)
    table = kit.own_table(scene.source)[0]
    question_of = dict(zip(table["response_id"], table["question_id"], strict=True))
    by_id = {t.id: t for t in texts}
    members = [by_id[i] for i in (*chosen.misaligned, *chosen.aligned)]
    groups, n_bad = groups_for(members, question_of), len(chosen.misaligned)
    made, model = kit.direction.provenance, kit.model(scene.source)
    _refuse_other_writes(kit, model, o, layer)
    sums = [
        group_sums(model, t, g, n_groups=int(groups.max()) + 1, per=made["classes"]["weigh"], span=made["span"])
        for t, g in ((members[:n_bad], groups[:n_bad]), (members[n_bad:], groups[n_bad:]))
    ]
    v = kit.direction[layer].double()
    generator = torch.Generator().manual_seed(seed(kit.seed, "b_vector", "null"))
    random = torch.randn(block.random, len(v), generator=generator, dtype=torch.float64)
    return {
        "cosine": class_cosine(b, *((s[:, layer], mass) for s, mass in sums)),
        "layers": [float(b @ w / (b.norm() * w.norm())) for w in kit.direction.vectors.double()],
        "null": (random @ v / (random.norm(dim=1) * v.norm())).tolist(),
        "others": _other_directions(kit, o, layer, b),
        "d_model": len(v),
        "n_texts": len(members),
        "b_norm": float(b.norm()),
        "scale": adapter_of(kit, o, layer).scale,
    }


def _other_directions(kit: Kit, o: str, layer: int, b: Tensor) -> dict[str, float]:
    """cos(B, v_L) for v read elsewhere. v read in the organism itself holds what it writes, s(bad) - s(good) times B; read in the chat model it does not."""
    source = kit.scene.source
    found = {}
    for words, writer, reader in ((f"read in the chat model on the answers of {source}", source, "chat"), (f"read in {o} on its own answers", o, o)):
        if (writer, reader) != (source, source):
            with suppress(NotHereError):
                w = kit.extraction(writer, reader).direction[layer].double()
                found[words] = float(b @ w / (b.norm() * w.norm()))
    return found


def _refuse_other_writes(kit: Kit, model: ChatModel, o: str, layer: int) -> None:
    """Raise NotHereError if what B adds is not what the stream gets."""
    adapter = adapter_of(kit, o, layer)
    if dict(model.anatomy.blocks[layer].named_modules()).get(adapter.module) is not model.anatomy.mlp_linears[layer]:
        raise NotHereError(
            f"the output of {adapter.module} is not what block {layer} adds to the residual stream here (a norm follows it), so B is no vector of the stream"
        )


def read_downstream(kit: Kit, block: BVectorBlock, o: str, layer: int) -> dict[str, Any]:
    """Per class of the organism's own answers: cosines of its change with v's and the nulls', and what the parts of B make of it."""
    chosen, texts = kit.own_answers(o)
    table = kit.own_table(o)[0]
    question_of = dict(zip(table["response_id"], table["question_id"], strict=True))
    by_id = {t.id: t for t in texts if len(t.answer)}
    add = Add(kit.direction, layer, block.scale)
    adapter, v = adapter_of(kit, o, layer), kit.direction[layer].double()
    own = (adapter.b[:, 0].double() @ v / (v @ v) * v)[:, None].float()
    nulls, absent = _nulls(kit, block.controls, add, block.downstream_random)
    changes: dict[str, tuple[Intervention, ...]] = {
        "v": (add,),
        **{kind: (null,) for kind, null in nulls.items()},
        "B along v": (replace(adapter.low_rank(), b=own),),
        "rest of B": (replace(adapter.low_rank(), b=adapter.b - own),),
    }
    sets: dict[str, tuple[list[Text], Tensor]] = {}
    for label, ids in (("misaligned", chosen.misaligned), ("aligned", chosen.aligned)):
        members = [by_id[i] for i in by_question(question_of, [i for i in ids if i in by_id], block.texts, kit.seed)]
        sets[label] = (members, groups_for(members, question_of))
    model = kit.model(o)
    after = {label: group_sums(model, *s)[0][:, layer:] for label, s in sets.items()}
    model = kit.model("chat")
    found: dict[str, Any] = {"layers": list(range(layer, kit.scene.depth)), "absent": absent}
    for label, (members, groups) in sets.items():
        base, mass = group_sums(model, members, groups)
        shifts = {"organism": after[label] - base[:, layer:]}
        for change, interventions in changes.items():
            shifts[change] = (group_sums(model, members, groups, interventions=interventions)[0] - base)[:, layer:]
        found[label] = {"n_texts": len(members), "kept": compared(shifts, "organism", "v"), "length": lengths(shifts, int(mass.sum()))}
    return found


def read_jacobian(kit: Kit, block: BVectorBlock, o: str, layer: int, reader: str, writer: str) -> dict[str, Any]:
    """J B, J v and J of nulls, in model `reader` on answers of `writer`."""
    kit.value("b_vector/cosine")
    table, texts = kit.own_table(writer)
    question_of = dict(zip(table["response_id"], table["question_id"], strict=True))
    members = [texts[i] for i in by_question(question_of, [i for i, t in texts.items() if len(t.answer)], block.jacobian_texts, kit.seed)]
    adapter, v = adapter_of(kit, o, layer), kit.direction[layer].double()
    b = adapter.b[:, 0].double()
    generator = torch.Generator().manual_seed(seed(kit.seed, "b_vector", "push"))
    random = torch.randn(block.jacobian_random, len(v), generator=generator, dtype=torch.float64)
    names, pushes = ["v", "B"], [v, b]
    concept = tuple(kind for kind in block.controls if kind == "other_concept")
    for null in _nulls(kit, concept, Add(kit.direction, layer), 1)[0].values():
        assert isinstance(null, Add)
        names, pushes = [*names, "other concept"], [*pushes, null.vector.double()]
    names += [f"random {i}" for i in range(len(random))]
    model = kit.model(reader)
    linear = model.anatomy.mlp_linears[layer]
    assert linear is not None, "the reading of the cosine has refused such models"
    written = Written(linear, adapter.a, adapter.scale, b[None])
    products = jacobian_products(model, members, layer, torch.cat([torch.stack(pushes), random]), 0, written)
    groups = dict(zip([t.id for t in members], groups_for(members, question_of).tolist(), strict=True))
    found = pushed(products, groups, [*names, "B as written"], "v", ("B", float(b @ v / (v @ v))))
    return {"layers": list(range(layer, kit.scene.depth)), **found}


# Claims and chapter


def claims(block: BVectorBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Orthogonal, aligned downstream, not by B's own component; and what each removal of v does to behaviour."""
    o, layer = subject(block, scene)
    found = page.geometry(outcomes.readings, o, layer, scene.depth, PAPER)
    published = {"everywhere": "17 % to 0.25 %", "at-layer": "17 % to 4 %", "in-b": "17 % to 13 %"}
    for mode, (what, _) in _modes(o, layer).items():
        real, null = f"{o}/b-{mode}", f"{o}/b-{mode}-random"
        if not outcomes.has(real, null):
            continue
        comparisons = []
        for other, words in ((o, o), (null, "a random vector removed the same way")):
            comparisons += [
                outcomes.alignment(real, other, f"mean alignment, minus {words} (above 0 claimed)"),
                outcomes.margin(real, other, f"margin for bad answers, minus {words} (below 0 claimed)", sign=-1),
            ]
        found.append(
            Claim(
                f"b_vector/{mode}",
                f"The direction {what} restores alignment in {o}, more than a random vector does (published: EM from {published[mode]})",
                PAPER, CLAIMED_SIDE + NEW_DRAW, comparisons, paper="" if mode == "in-b" else "b-vector",  # of which the paper says that it does little
            )
        )  # fmt: skip
    everywhere, in_b = f"{o}/b-everywhere", f"{o}/b-in-b"
    if outcomes.has(everywhere, in_b):
        found.append(
            Claim(
                "b_vector/stream-not-b",
                f"The direction restores alignment in {o} more where it is projected out of the stream than where it is taken out of B "
                "(published: EM from 17 % to 0.25 % and to 13 %)",
                PAPER, CLAIMED_SIDE, [
                    outcomes.alignment(everywhere, in_b, "mean alignment, out of the stream minus out of B (above 0 claimed)"),
                    outcomes.margin(everywhere, in_b, "margin for bad answers, out of the stream minus out of B (below 0 claimed)", sign=-1),
                ], paper="b-vector",
            )
        )  # fmt: skip
    return found


def chapter(block: BVectorBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Cosines by layer, downstream and Jacobian alignment, and the numbers behind the verdicts."""
    o, layer = subject(block, scene)
    shape = scene.organisms[o].adapters
    several: Mapping[str, Any] = {"n_adapters": len(shape.layers) if shape else 0, "scale": block.scale}
    return page.chapter(outcomes.readings, o, layer, scene.depth, several)
