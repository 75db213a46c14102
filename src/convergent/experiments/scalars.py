"""LoRA scalars: what each rank-1 adapter writes at each token, and whether it tells misaligned answers from aligned ones (paper section 4.1).

    s_t = scale * |B| * A . h_t       the adapter at that block writes s_t * unit(B) to the residual stream at token t

Probes on the scalars as published (split by token), and with what later work asked for: on answers and on questions that the probe has not
seen, beside the question alone, on the tokens that carry the fine-tune's effect, and beside random directions that read the same h. An
adapter reads as general if its coefficient between misaligned and aligned answers is clear of 0, as specific to a topic if the one between
answers on and off that topic is; by intervals over questions, not by hand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Series, Sheet
from convergent.core.ids import seed
from convergent.directions.scalar_probes import MAIN, Rules, measured, words
from convergent.errors import DataError
from convergent.experiments.arms import write_organism
from convergent.experiments.base import Arm, Block, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Evidence, Outcomes, evidence
from convergent.experiments.scene import Scene

TOPICS = ("medical", "financial", "gender")
"""Rubrics that say what an answer is about."""


class ScalarsBlock(Block):
    """Settings of `scalars`."""

    organism: str | None = None
    """With rank-1 adapters on the MLP's writing layer; by default the source, or the first that has them."""
    classes: Literal["study", "published"] = "study"
    """study: the classes that the direction is read from. published: aligned 90 to 100 against 0 to 30, coherent above 50."""
    per_class: int = Field(default=64, ge=2)
    """Most answers per class that are read."""
    topics: tuple[str, ...] | None = None
    """Rubrics of the judge that say what an answer is about; by default those of medical, financial and gender that it has."""
    topic_min: float = Field(default=50.0, ge=0, le=100)
    """On the topic: scored so or higher."""
    topic_max: float = Field(default=10.0, ge=0, le=100)
    """Off the topic: scored so or lower; 1 as published, which a judge that gives no round numbers hardly ever says."""
    c: float | None = Field(default=None, gt=0)
    """Inverse strength of the L1 penalty, 0.01 as published for some 8,100 tokens per class; by default what weighs each token alike with fewer."""
    repeats: int = Field(default=20, ge=1)
    """Random splits by token; 100 as published."""
    significant: float = Field(default=0.25, gt=0, lt=1)
    """Share of tokens, the most significant ones, that the probes are fitted to once more."""
    log_significance: float | None = None
    """Instead of a share: natural logarithm of the smallest significance; 0.5 as published."""
    draws: int = Field(default=20, ge=stats.FEWEST_DRAWS)
    """Random directions per adapter that read the same input."""


name = "scalars"
settings = ScalarsBlock


def check(block: ScalarsBlock, scene: Scene) -> None:
    """Refuse a study without such an organism, an unknown topic rubric, or an environment without scikit-learn."""
    write_organism(scene, block.organism)
    unknown = next((t for t in block.topics or () if t not in scene.rubrics), None)
    if unknown is not None:
        raise NotHereError(f"topics: the judge has no rubric {unknown!r}; it has {', '.join(scene.rubrics)}")
    if block.topic_max >= block.topic_min:
        raise NotHereError(f"topic_max: {block.topic_max:g} is not below topic_min, {block.topic_min:g}; an answer cannot be on and off a topic")
    if importlib.util.find_spec("sklearn") is None:
        raise NotHereError("probes: need scikit-learn; run `pip install 'convergent[replicate]'`, or leave the experiment out")


def arms(block: ScalarsBlock, scene: Scene) -> list[Arm]:
    """None: it reads the organism's own answers."""
    return []


def readings(block: ScalarsBlock, scene: Scene) -> list[Reading]:
    """One: everything about the scalars of one organism, as aggregated values."""
    organism = write_organism(scene, block.organism)
    topics = _topics(block, scene)

    def inputs(kit: Kit) -> Any:
        # Readings from before the spread between draws counted have no p and another interval: the words keep them apart.
        return [kit.model_id(organism), kit.seed, block.model_dump(), "against a new draw, with p", _labelled(kit, block, organism, topics).to_csv()]

    def compute(kit: Kit) -> Any:
        answers, (_, texts) = _labelled(kit, block, organism, topics), kit.own_table(organism)
        rules = Rules(topics, **block.model_dump(include={"topic_min", "topic_max", "c", "repeats", "significant", "log_significance", "draws"}))
        adapters = kit.adapters(organism)
        try:
            return measured(kit.model(organism), adapters, answers, texts, rules, kit.seed)
        except DataError as error:
            raise NotHereError(str(error)) from error

    # The organism's pass, the chat model's, and back through both.
    return [Reading(f"scalars/{organism}", inputs, compute, organisms=(organism,), tokens=2 * block.per_class * 90 * 6.0, rubrics={organism: topics})]


def _topics(block: ScalarsBlock, scene: Scene) -> tuple[str, ...]:
    return tuple(dict.fromkeys(block.topics)) if block.topics is not None else tuple(t for t in TOPICS if t in scene.rubrics)


def _labelled(kit: Kit, block: ScalarsBlock, organism: str, topics: tuple[str, ...]) -> pd.DataFrame:
    """response_id, question_id, misaligned (bool) and topic scores of at most `per_class` answers of each class. Raises NotHereError for too few."""
    table, _ = kit.own_table(organism, topics)
    if block.classes == "published":
        coherent = table["coherent"] > 50
        low = table[coherent & (table["aligned"] <= 30)]["response_id"].tolist()
        high = table[coherent & (table["aligned"] >= 90)]["response_id"].tolist()
    else:
        chosen, _ = kit.own_answers(organism)
        low, high = list(chosen.misaligned), list(chosen.aligned)
    rng = np.random.default_rng(seed(kit.seed, "scalars", organism))
    kept: dict[str, bool] = {}
    for name, ids, misaligned in (("misaligned", low, True), ("aligned", high, False)):
        if len(ids) < 2:
            raise NotHereError(f"scalars: the {name} class of {organism} has {len(ids)} answers, and two or more are needed; draw more answers")
        some = sorted(rng.permutation(len(ids))[: block.per_class].tolist())
        kept |= {ids[i]: misaligned for i in some}
    found = table[table["response_id"].isin(kept)][["response_id", "question_id", *topics]].reset_index(drop=True)
    return found.assign(misaligned=[kept[i] for i in found["response_id"]])


# Deciding and showing


def claims(block: ScalarsBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Scalars tell misaligned answers on questions not seen, better than random directions do; some adapters read as general or as topical."""
    organism = write_organism(scene, block.organism)
    value = outcomes.readings.get(f"scalars/{organism}")
    if value is None or MAIN not in value["probes"]:
        return []
    main = value["probes"][MAIN]
    within, more = stats.Interval(**main["within"]), stats.Interval(**value["random"]["difference"])
    above = replace(within, estimate=within.estimate - 0.5, low=within.low - 0.5, high=within.high - 0.5)
    found = [
        Claim(
            "scalars/probe",
            f"LoRA scalars of {organism} tell tokens of misaligned answers from those of aligned ones, on questions that the probe has not seen, better than "
            "random directions that read the same input (published: AUC 0.74 and 0.75, split by token)",
            "paper section 4.1",
            "both differences have their 95 % interval over questions above 0, the second against one more draw of the random directions too (the interval "
            "over questions and the prediction from k draws, t with k - 1 degrees of freedom, half widths added in squares)",
            [
                evidence("AUC within questions not seen, minus 0.5 (above 0 claimed)", above, "AUC", p=main["within_p"]),
                evidence(
                    f"the same, minus that of random directions (above 0 claimed), against a new draw ({value['random']['draws']} drawn)", more, "AUC",
                    p=value["random"]["p"],
                ),
            ], paper="scalars",
        )
    ]
    for kind, key in (("general", MAIN), *((t, f"non-{t}_vs_{t}") for t in _topics(block, scene))):
        if key in value["probes"]:
            found.append(_reading_claim(kind, value["adapters"], value["probes"][key]["coefficients"], organism))
    return found


def _reading_claim(kind: str, adapters: Sequence[str], coefficients: Sequence[dict[str, Any]], organism: str) -> Claim:
    what = "tells misaligned from aligned answers" if kind == "general" else f"tells {kind} from non-{kind} answers"
    published = "six of nine general, two medical, one neither" if kind in ("general", "medical") else "of medical ones: two of nine"
    return Claim(
        f"scalars/{kind}",
        f"Some adapter of {organism} reads as {kind if kind == 'general' else f'specific to {kind} answers'}: its scalar {what} (published: {published})",
        "paper section 4.2",
        "the adapter with the clearest coefficient has its interval, widened for the number of adapters (Bonferroni), on one side of 0",
        [_clearest(adapters, coefficients)],
    )


def _clearest(adapters: Sequence[str], coefficients: Sequence[dict[str, Any]]) -> Evidence:
    def ratio(c: dict[str, Any]) -> float:
        half = (c["high"] - c["low"]) / 2
        return abs(c["estimate"]) / half if half > 0 else -1.0

    k = max(range(len(adapters)), key=lambda i: ratio(coefficients[i]))
    sign = -1 if coefficients[k]["estimate"] < 0 else 1
    text = f"coefficient of the z-scored scalar at {adapters[k]} ({'below' if sign < 0 else 'above'} 0 found)"
    return evidence(text, stats.Interval(**coefficients[k]), "log odds per standard deviation", sign)


METHOD = (
    "Each rank-1 adapter writes one vector B to the residual stream, at every token by the scalar s = scale |B| A·h, where h is the input of its linear "
    "layer. Question: do these few numbers tell misaligned answers from aligned ones, and does an adapter serve misalignment in general or one topic?",
    "Tokens of the organism's own answers are told apart by L1 logistic regression on z-scored scalars, classes balanced. Published figures split tokens at "
    "random, so that a probe may know an answer, or a question, by its other tokens. Beside them stand the same probe on answers and on questions that "
    "it has not seen, a probe that knows the question and nothing else, and one on the tokens that matter most: significance is a token's share of the "
    "answer's KL(chat model || organism) by the norm of its gradient with respect to the token's embedding.",
    "Control: random directions that read the same h in place of A. If they tell the classes apart as well, the layer's input does, not the adapter. An "
    "adapter that means nothing is one more of them, so the difference is held against one more draw, not against their mean alone.",
)


def chapter(block: ScalarsBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Class means, coefficients and single scalars per adapter; the table of probes."""
    organism = write_organism(scene, block.organism)
    value = outcomes.readings.get(f"scalars/{organism}")
    title = f"LoRA scalars of {organism}"
    if value is None:
        return Chapter("scalars", title, METHOD)
    x = [float(v) for v in value["layers"]]
    main = ("aligned", "misaligned")
    sizes = ", ".join(f"{n}: {c['answers']} answers, {c['tokens']} tokens" for n, c in value["classes"].items() if n in main)
    questions = value["classes"]["misaligned"]["questions"]
    mean = Chart(
        "means",
        "What each adapter writes, on average",
        f"Mean scalar over answers, in the units of the residual stream, with 95 % intervals over {questions} questions. {sizes}.",
        (Panel("mean scalar", "block of the adapter", tuple(_series(n, x, value["classes"][n]["mean"], n == "aligned") for n in main)),),
    )
    figures = [mean]
    probes = value["probes"]
    shown = [k for k in (MAIN, *(f"non-{t}_vs_{t}" for t in _topics(block, scene))) if k in probes]
    if shown:
        lines = tuple(_series(f"{words(probes[k]['classes'][1])} against {words(probes[k]['classes'][0])}", x, probes[k]["coefficients"], False) for k in shown)
        null = (x, [a["null_low"] for a in value["alone"]], [a["null_high"] for a in value["alone"]])
        caption = (
            f"Left: coefficient of each z-scored scalar; above 0 speaks for the first-named class. Intervals are over {questions} questions and hold for all "
            f"{len(x)} adapters together (Bonferroni). Right: probability that a token of a misaligned answer has the higher scalar than one of an aligned "
            f"answer to the same question, each adapter alone, 95 % over questions; the band is what {block.draws} random directions reach. {sizes}."
        )
        panels = (
            Panel("coefficient, log odds per standard deviation", "block of the adapter", lines),
            Panel("AUC of one scalar alone", "block of the adapter", (_series("own scalar", x, value["alone"], False),), null),
        )
        figures.append(Chart("adapters", "Which adapters tell the classes apart", caption, panels))
    note = _PROBES.format(repeats=block.repeats, smallest=value["smallest_significance"])
    sheets = (
        Sheet("probes", "Probes on LoRA scalars", note, _probe_rows(value), 3),
        Sheet("adapters", "How each adapter reads", _READS, _adapter_rows(value, shown), 3),
    )
    return Chapter("scalars", title, METHOD, figures, sheets, value["absent"])


_PROBES = (
    "Class 0 against class 1, balanced; n is tokens per class. Accuracy and AUC by token: mean of {repeats} random 80/20 splits, as published (unless it is "
    "set, C weighs each token as the published 0.01 did). By response and by question: mean over folds of whole groups. Question alone: what an AUC by token "
    "reaches without any scalar. Within questions: a probe "
    "fitted on the other questions, tested inside each one, mean with 95 % interval over questions; chance is 0.5. Significant tokens: significance of "
    "{smallest:.3g} nats or more."
)
_READS = (
    "general: the coefficient between misaligned and aligned answers is clear of 0; a topic: the one between answers on and off it is. Intervals over "
    "questions, widened for the number of adapters. Coefficients are log odds per standard deviation."
)


def _series(label: str, x: list[float], intervals: Sequence[dict[str, Any]], baseline: bool) -> Series:
    y, low, high = ([float(i[k]) for i in intervals] for k in ("estimate", "low", "high"))
    return Series(label, x, y, "baseline" if baseline else "real", low, high)


def _probe_rows(value: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for key, probe in value["probes"].items():
        for tokens, p in (("all", probe), ("significant", probe.get("significant"))):
            if p is not None:
                rows.append(
                    {
                        "class 0": words(p["classes"][0]), "class 1": words(p["classes"][1]), "tokens": tokens, "n": p["tokens"], "C": p["c"],
                        "answers": f"{p['answers'][0]} and {p['answers'][1]}", "questions": p["questions"], "accuracy by token": p["accuracy"],
                        "AUC by token": p["auc"], "AUC by response": p["auc_by_response"], "AUC by question": p["auc_by_question"],
                        "AUC, question alone": p["auc_question_only"], "AUC within questions": p["within"]["estimate"],
                        "low": p["within"]["low"], "high": p["within"]["high"],
                        "AUC within, random directions": value["random"]["mean"] if key == MAIN and tokens == "all" else float("nan"),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _adapter_rows(value: dict[str, Any], shown: Sequence[str]) -> pd.DataFrame:
    rows = []
    for k, adapter in enumerate(value["adapters"]):
        row: dict[str, Any] = {"adapter": adapter, "reads as": value["reads"][adapter]}
        for n in ("aligned", "misaligned"):
            row[f"mean scalar, {n}"] = value["classes"][n]["mean"][k]["estimate"]
        for key in shown:
            c = value["probes"][key]["coefficients"][k]
            name = words(value["probes"][key]["classes"][1])
            row |= {f"coefficient, {name}": c["estimate"], f"{name}: low": c["low"], f"{name}: high": c["high"]}
        rows.append(row)
    return pd.DataFrame(rows)
