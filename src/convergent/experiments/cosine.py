"""Cosines between the organisms' directions, layer by layer, beside what the texts alone give (paper section 3.5).

Two organisms' directions are read from each one's own answers and from common texts (the source's answers). The untouched chat model reads the same
texts: whatever cosine it shows lies in the texts, not in the fine-tunes. Noise is known from both sides: the ceiling that so few answers allow
(split-half reliability, other seeds of a recipe), and the floor that scrambled labels leave. Intervals: delete-one jackknife over questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Grid, Panel, Role, Series, Sheet
from convergent.directions.compare import compare, wanted
from convergent.errors import DirectionError
from convergent.experiments.base import Arm, Block, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Evidence, Outcomes, Verdict, evidence
from convergent.experiments.scene import Scene

CLOSE, EXCEPTIONS = 0.8, (4, 48)
"""The paper: above 0.8 in all but 4 of 48 layers."""
GROUPS = {
    "families": "other recipe or data",
    "data": "other data",
    "seeds": "seeds of one recipe",
    "twin": "organism and good-advice twin",
}
READING = "cosine/geometry"


class CosineBlock(Block):
    """Settings of `cosine`."""

    source_too: ClassVar[bool] = True
    organisms: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Organisms compared; all by default."""
    massive: int = Field(default=5, ge=1, le=64)
    """Dimensions removed in the control: those where the chat model's mean activation is largest."""
    splits: int = Field(default=32, ge=2)
    """Ways of halving the answers for the reliability."""
    draws: int = Field(default=100, ge=39)
    """Scrambled labels per organism; the largest of 39 is what 2.5 % lie above."""


name = "cosine"
settings = CosineBlock


def _names(block: CosineBlock, scene: Scene) -> tuple[str, ...]:
    return tuple(dict.fromkeys(block.organisms)) if block.organisms else tuple(scene.organisms)


def check(block: CosineBlock, scene: Scene) -> None:
    """Two organisms at least, all known."""
    names = _names(block, scene)
    unknown = next((n for n in names if n not in scene.organisms), None)
    if unknown is not None:
        raise NotHereError(f"organisms: no organism is called {unknown!r}; there are {', '.join(scene.organisms)}")
    if sum(scene.organisms[n].answer != "good" for n in names) < 2:
        raise NotHereError("organisms: a cosine needs two organisms that were not trained on good advice; add one, or leave the experiment out")


def arms(block: CosineBlock, scene: Scene) -> list[Arm]:
    """Nothing is sampled for it."""
    return []


def groups_of(a: str, b: str, scene: Scene) -> tuple[str, ...]:
    """The groups that a pair of organisms belongs to; a pair of twins is in none."""
    one, two = scene.organisms[a], scene.organisms[b]
    if "good" in (one.answer, two.answer):
        return ("twin",) if one.answer != two.answer else ()
    if one.family == two.family:
        return ("seeds",)
    return ("families", "data") if one.data != two.data else ("families",)


def exceptions(n_layers: int) -> int:
    """Layers that may lie below: the published share of them."""
    return n_layers * EXCEPTIONS[0] // EXCEPTIONS[1]


def readings(block: CosineBlock, scene: Scene) -> list[Reading]:
    """One: everything is made of the class sums by question, which are kept apart."""
    names = _names(block, scene)

    def inputs(kit: Kit) -> Any:
        found, absent = _readable(kit, names)
        subjects = [(o, scene.organisms[o].family, scene.organisms[o].answer, scene.organisms[o].data) for o in found]
        ids = [kit.sums_id(*key) for key in wanted(found, scene.source)]
        return [subjects, absent, ids, kit.layer, kit.seed, block.massive, block.splits, block.draws]

    def compute(kit: Kit) -> Any:
        found, absent = _readable(kit, names)
        if len(found) < 2:
            raise NotHereError(f"fewer than two organisms have a direction of their own ({'; '.join(absent.values())})")
        sums = {key: kit.question_sums(*key) for key in wanted(found, scene.source)}
        try:
            made = compare(
                sums, found, scene.source, lambda a, b: groups_of(a, b, scene), layer=kit.layer, allowed=exceptions(scene.depth),
                massive=block.massive, splits=block.splits, draws=block.draws, root_seed=kit.seed,
            )  # fmt: skip
        except DirectionError as error:
            raise NotHereError(str(error)) from error
        return {"absent": absent, **made}

    # Three passes over some hundred answers of about a hundred tokens each.
    return [Reading(READING, inputs, compute, organisms=("chat", *names), tokens=3e4 * len(names))]


def _readable(kit: Kit, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Organisms with enough answers in both classes, and why the others have not."""
    found, absent = [], {}
    for o in names:
        try:
            kit.own_answers(o)
            found.append(o)
        except NotHereError as error:
            absent[o] = str(error)
    return found, absent


def claims(block: CosineBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Alike more than chance; as alike as published; alike beyond what the texts give."""
    value = outcomes.readings.get(READING)
    if value is None or "families" not in value["groups"]:
        return []
    at, n = scene.layer, value["n_questions"]
    group = value["groups"]["families"]
    pairs = f"mean over {group['n_pairs']} pair(s)"

    def interval(what: str, of: str = "families") -> stats.Interval:
        y = value["groups"][of]["measures"][what]
        return stats.Interval(y["y"][at], y["low"][at], y["high"][at], n, "jackknife", stats.OVER_QUESTIONS)

    own, bound = interval("own"), value["scrambled"]["families"]["high"][at]
    chance = Evidence(
        f"cosine at the primary layer, {pairs}, own texts (above {bound:.2f} claimed: 97.5 % of scrambled labels lie below)",
        own.estimate, own.low, own.high, n, "cosine; n: questions", _against(own.low, own.high, bound),
    )  # fmt: skip
    lowest, ceiling = group["lowest"]["own"], group["lowest"]["ceiling"]
    vote = _against(lowest["low"], lowest["high"], CLOSE)
    if vote == "did not hold" and not ceiling["low"] > CLOSE:
        vote = "undecided"  # so few answers would keep it below, whatever is true
    high = Evidence(
        f"lowest cosine of {scene.depth} layers but for {exceptions(scene.depth)}, {pairs}, own texts (above {CLOSE} claimed; noise allows "
        f"{ceiling['y']:.2f} [{ceiling['low']:.2f}, {ceiling['high']:.2f}], and where that is not above {CLOSE} nothing speaks against the claim)",
        lowest["y"], lowest["low"], lowest["high"], n, "cosine; n: questions", vote,
    )  # fmt: skip
    unit = "cosine; n: questions"
    texts = [
        evidence(f"own texts: cosine minus the chat model's on the same texts, {pairs} (above 0 claimed)", interval("own-chat"), unit),
        evidence(f"the same without the {block.massive} massive dimensions (above 0 claimed)", interval("own_kept-chat_kept"), unit),
        evidence(
            "common texts: cosine of two organisms minus that of the nearer of them with the chat model (above 0 claimed)",
            interval("common-common_chat"), unit,
        ),
        # Shown only: all dimensions of a span weigh alike, so one that is written along what the texts share already adds none, however long it is.
        replace(
            evidence(
                "overlap of the spans of per-question differences, minus the chat model's on the same texts (above 0 expected)",
                interval("overlap-overlap_chat"), "squared cosine; n: questions",
            ),
            decides=False,
        ),
    ]  # fmt: skip
    if "data" in value["groups"]:
        texts.append(evidence("own texts minus chat model, organisms of different data only (above 0 claimed)", interval("own-chat", "data"), unit))
    rule = "the 95 % interval (jackknife over questions) lies on the claimed side"
    return [
        Claim("cosine/chance", "Directions of different organisms point the same way, more than scrambled labels leave", "control", rule, [chance]),
        Claim(
            "cosine/high",
            f"Directions of different organisms have cosines above {CLOSE} in all but a twelfth of the layers (published: all but 4 of 48)",
            "paper section 3.5", rule, [high], paper="convergence",
        ),
        Claim(
            "cosine/beyond-texts",
            "Directions of different organisms are nearer to each other than the chat model's directions on the same texts are "
            "(published data: the chat model on an organism's texts has cosine 1.00 with it up to layer 20)",
            "control of paper section 3.5", f"at the primary layer {rule}, in every comparison but that of spans, which is only shown",
            texts, paper="chat-baseline", opposes=True,
        ),
    ]  # fmt: skip


def _against(low: float, high: float, bound: float) -> Verdict:
    """Above the bound is claimed."""
    return "held" if low > bound else "did not hold" if high < bound else "undecided"


METHOD = (
    "Do organisms of different recipes, data and seeds have one direction? For every organism v = (mean over answer tokens of its misaligned answers) - "
    "(the same of its aligned ones), per layer; cos(v_i, v_j) for every pair, with each organism's own answers and with common texts (the source's answers, "
    "read in both).",
    "Controls: the untouched chat model reads the same answers, and its cosine lies in the texts alone (for common texts: each organism's cosine with the chat "
    "model). Ceiling: root of the product of both split-half reliabilities (Spearman-Brown), and other seeds of a recipe. Floor: labels scrambled inside "
    "every question, which leaves far more than random vectors do. Once more without the dimensions where the chat model's mean activation is largest. "
    "Overlap: mean squared cosine of the principal angles between the spans of per-question differences.",
)


def chapter(block: CosineBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Cosines per layer, the matrices at the primary layer, the tables of pairs and organisms."""
    value = outcomes.readings.get(READING)
    title = "Are the directions of all organisms one?"
    if value is None:
        return Chapter(name, title, METHOD, notes=["Not measured here."])
    notes = [f"{o} is not among them: {why}." for o, why in value["absent"].items()]
    if "families" not in value["groups"]:
        notes.append("All organisms share one recipe and one training set, so the claims about different organisms are not made.")
    return Chapter(name, title, METHOD, _figures(value, scene), [_pairs(value, scene), _organisms(value, scene)], notes)


def _figures(value: dict[str, Any], scene: Scene) -> list[Chart | Grid]:
    groups = value["groups"]
    main = next(g for g in ("families", "seeds", "twin") if g in groups)
    x = [float(layer) for layer in range(scene.depth)]

    def series(label: str, what: str, role: Role, group: str = main) -> Series:
        y = groups[group]["measures"][what]
        return Series(label, x, y["y"], role, y["low"], y["high"])

    seeds = [series("Seeds of one recipe", "own", "control", "seeds")] if "seeds" in groups and main != "seeds" else []
    twin = [series("With the good-advice twin", "own", "control", "twin")] if "twin" in groups and main != "twin" else []
    band, random = value["scrambled"][main], [value["random"]] * len(x)
    two, chat = "Two organisms", "Chat model, same texts"
    panels = (
        Panel(
            "Cosine, own texts", "layer",
            (series(two, "own", "real"), series(chat, "chat", "baseline"), series("Noise ceiling", "ceiling", "control"), *seeds, *twin),
            (x, band["low"], band["high"]), scene.layer,
        ),
        Panel("Cosine, common texts", "layer", (series(two, "common", "real"), series(chat, "common_chat", "baseline")),
              (x, [-r for r in random], random), scene.layer),
        Panel("Cosine without massive dimensions", "layer", (series(two, "own_kept", "real"), series(chat, "chat_kept", "baseline")),
              (x, band["low"], band["high"]), scene.layer),
        Panel("Overlap of spans", "layer", (series(two, "overlap", "real"), series(chat, "overlap_chat", "baseline")),
              (x, [0.0] * len(x), band["overlap"]), scene.layer),
    )  # fmt: skip
    n = f"{groups[main]['n_pairs']} pair(s) of organisms ({GROUPS[main]}), {value['n_questions']} questions"
    chart = Chart(
        "layers", "Directions of two organisms, layer by layer",
        f"Mean over {n}. Lines through points: 95 % intervals over questions (jackknife). Shaded: what scrambled labels leave (95 %; for spans their mean, "
        f"random ones overlap by {value['random_overlap']:.3f}); on common texts what random vectors leave (95 % within {value['random']:.3f}). "
        "Dashed upright: the primary layer.",
        panels,
    )  # fmt: skip
    names = tuple(value["organisms"])
    caption = f"At the primary layer (block {scene.layer}), {value['n_questions']} questions. By chance 0."
    grids = [
        Grid(what, label, caption, names, names, _matrix(value, names, what, scene.layer))
        for what, label in (("own", "Cosine of two organisms, own texts"), ("chat", "The same texts read in the chat model"))
    ]  # fmt: skip
    return [chart, *grids]


def _matrix(value: dict[str, Any], names: Sequence[str], what: str, layer: int) -> tuple[tuple[float, ...], ...]:
    known = {frozenset((p["a"], p["b"])): p[what][layer] for p in value["pairs"]}
    return tuple(tuple(1.0 if a == b else known.get(frozenset((a, b)), float("nan")) for b in names) for a in names)


def _pairs(value: dict[str, Any], scene: Scene) -> Sheet:
    at = scene.layer
    rows = [
        {
            "pair": f"{p['a']}, {p['b']}",
            "differ in": GROUPS[groups_of(p["a"], p["b"], scene)[-1]],
            "cosine": p["own at layer"]["y"],
            "minus chat model": p["own-chat at layer"]["y"],
            "low": p["own-chat at layer"]["low"],
            "high": p["own-chat at layer"]["high"],
            "noise ceiling": p["ceiling"][at],
            "chat model": p["chat"][at],
            "without massive": p["own_kept"][at],
            "common texts": p["common"][at],
            "common, chat model": p["common_chat"][at],
            "overlap": p["overlap"][at],
            "layers above 0.8": sum(c > CLOSE for c in p["own"]),
        }
        for p in value["pairs"]
    ]
    note = (
        f"At the primary layer (block {at}); low and high: 95 % interval of the cosine minus the chat model's on the same texts, jackknife over "
        f"{value['n_questions']} questions. Layers above 0.8: of {scene.depth}, own texts."
    )
    return Sheet("pairs", "Every pair of organisms", note, pd.DataFrame(rows))


def _organisms(value: dict[str, Any], scene: Scene) -> Sheet:
    rows = [
        {
            "organism": o,
            "misaligned tokens": int(v["n_tokens"][0]),
            "aligned tokens": int(v["n_tokens"][1]),
            "questions in both classes": v["n_questions"],
            "reliability": v["reliability"][scene.layer],
            "cosine with chat model, same texts": v["with_chat"][scene.layer],
            "share of massive dimensions": v["massive_share"][scene.layer],
        }
        for o, v in value["organisms"].items()
    ]
    note = (
        f"At the primary layer. Reliability: how much of the direction other answers to the same questions would give (0 to 1). Share: of the squared norm "
        f"of v, in the chat model's massive dimensions {', '.join(map(str, value['massive']))}. Tokens are answers where each answer weighs alike."
    )
    return Sheet("organisms", "Each organism's direction", note, pd.DataFrame(rows))
