"""What `semantic`'s readings and answers say: verdicts on topics, and the chapter of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series, Sheet
from convergent.directions.topics import at_layer
from convergent.experiments.base import CONTROL_LABELS
from convergent.experiments.outcomes import CLAIMED_SIDE, Claim, Evidence, Outcomes, evidence
from convergent.experiments.scene import Scene
from convergent.rates import COHERENT_ABOVE

if TYPE_CHECKING:
    from convergent.experiments.semantic import SemanticBlock

PARTS = ("topic", "rest", "about")
PUBLISHED = {
    "gender": " (published: gender above 0.95)",
    "medical": " (published: medical at most 0.65)",
}
RAISED = {
    "financial": " (published: finance score 67 to 84)",
    "medical": " (published: medical score 0.2 to 31, mostly in incoherent answers)",
    "gender": " (published: gender score 98 and more)",
}
SOURCE = "paper section 3.3"
ONE_DRAW = f"{CLAIMED_SIDE}; random vectors are one draw each, as each costs sampled answers: another draw could do more"


def words_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Any of the words, whole, capital letters ignored: "men" is not in "recommend"."""
    listed = "|".join(re.escape(w.strip()) for w in words if w.strip())
    return re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)


def topic_scores(topic: str, block: SemanticBlock, answers: pd.DataFrame) -> np.ndarray:
    """(n,) topic score of answers, 0 to 100; for a word list 100 where a word is there."""
    if topic in block.words:
        found = words_pattern(block.words[topic])
        return np.array([100.0 if found.search(t) else 0.0 for t in answers["response"]])
    return answers[topic].to_numpy(float)


# Claims


def claims(block: SemanticBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Per topic: is its direction another one; does adding it bring the topic; is that due to the rest."""
    value = outcomes.readings.get("semantic/directions", {"topics": {}})
    found = []
    for topic, own in value["topics"].items():
        found.append(_cosine_claim(topic, own, scene))
        real, rest = f"semantic/{topic}-topic", f"semantic/{topic}-rest"
        if not outcomes.has("semantic/chat", "semantic/general", real, rest):
            continue
        against = {"chat": "chat model", "random": CONTROL_LABELS["random"], f"{topic}-effect_matched": CONTROL_LABELS["effect_matched"]}
        comparisons = [
            _topic_evidence(outcomes, topic, block, real, f"semantic/{key}", f"{topic} score, steered minus {words} (above 0 claimed)")
            for key, words in against.items()
            if outcomes.has(f"semantic/{key}")
        ]
        coherent = f"{topic} score, steered minus chat model, coherent answers only (above 0 claimed)"
        comparisons.append(_topic_evidence(outcomes, topic, block, real, "semantic/chat", coherent, coherent_only=True))
        found.append(
            Claim(
                f"semantic/steering/{topic}",
                f"Adding the direction read inside {topic} answers to the chat model brings the topic up, more than nulls do{RAISED.get(topic, '')}",
                SOURCE, ONE_DRAW, comparisons,
            )
        )  # fmt: skip
        split = [
            _topic_evidence(outcomes, topic, block, rest, "semantic/general", f"{topic} score, rest minus general direction (above 0 claimed)"),
            outcomes.alignment(rest, "semantic/general", "mean alignment, rest minus general direction (above 0 claimed)"),
        ]
        if outcomes.has("semantic/random"):
            # A push along anything may bring a topic up, compared with one that brings badness up.
            than = f"{topic} score, rest minus {CONTROL_LABELS['random']} (above 0 claimed)"
            split.append(_topic_evidence(outcomes, topic, block, rest, "semantic/random", than))
        found.append(
            Claim(
                f"semantic/rest/{topic}",
                f"Of the direction inside {topic} answers, what is not along the general direction carries the topic, and the rest of it the misalignment",
                "a control the paper lacks", ONE_DRAW, split,
            )
        )  # fmt: skip
    return found


def _cosine_claim(topic: str, own: Mapping[str, Any], scene: Scene) -> Claim:
    n, layer = own["n_misaligned"] + own["n_aligned"], scene.layer
    general = own["general"]
    comparisons = []
    for key, words in (("subsets", "random subsets of as many answers"), ("dealt", "answers to other questions in the same numbers")):
        band = at_layer(own[key], layer)
        if band is not None:
            d = stats.against_band(general["cosine"][layer], band, n, f"{own[key]['n']} draws")
            comparisons.append(evidence(f"cosine with the general direction, minus that of {words} (below 0 claimed)", d, "cosine", -1))
    band = at_layer(own["subsets"], layer)
    if band is not None:
        cosine, low, high = (float(general[e][layer] - band[1]) for e in ("cosine", "low", "high"))
        d = stats.Interval(cosine, low, high, n, "jackknife", stats.OVER_QUESTIONS, own["questions"])
        comparisons.append(evidence("the same, interval over questions (below 0 claimed)", d, "cosine", -1))
    return Claim(
        f"semantic/cosine/{topic}",
        f"The direction inside {topic} answers is another one than the general direction, by more than few answers and few questions explain"
        f"{PUBLISHED.get(topic, '')}",
        SOURCE, CLAIMED_SIDE, comparisons, paper="semantic", opposes=True,
    )  # fmt: skip


def _topic_evidence(
    outcomes: Outcomes, topic: str, block: SemanticBlock, a: str, b: str, text: str, coherent_only: bool = False
) -> Evidence:
    sides = []
    for arm in (a, b):
        answers = outcomes.answers(arm)
        answers = answers[answers["coherent"] > COHERENT_ABOVE] if coherent_only else answers
        sides.append((topic_scores(topic, block, answers), answers["question_id"].to_numpy()))
    (x, qx), (y, qy) = sides
    return evidence(text, stats.paired_difference(x, y, qx, qy), "points of topic score")


# Chapter


def chapter(block: SemanticBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Cosines per layer, decomposition, topic scores under steering."""
    value = outcomes.readings.get("semantic/directions", {"topics": {}, "absent": {}})
    chat = outcomes.readings.get("semantic/chat-model", {"topics": {}})
    topics = list(value["topics"])
    method = [
        f"Is the direction inside answers on a topic the general direction, or one of its own? In the answers of {scene.source} that its direction is read "
        f"from, those with a topic score of {block.topic_min:g} or more (a word list: with one of its words, whole) were kept, and v_t is the mean "
        "residual stream of the misaligned ones minus that of the aligned ones. u_t is the mean of aligned answers on the topic minus aligned ones off it: "
        "what the topic is without misalignment.",
        "A direction of few answers is noisy, and a topic's answers come from few questions. So the cosine of v_t with the general v stands beside that of "
        f"{block.draws} random subsets of as many answers, and of answers to other questions dealt in the topic's numbers. Then v_t = a v + rest is split, "
        f"and v_t, v, the rest, and u_t (a positive control) are added to the chat model at block {scene.layer}, all at {block.scale:g} times the norm of v, "
        "beside a random vector of that norm and a random one of the same effect.",
    ]
    figures: list[Chart | Grid] = []
    sheets = []
    if topics:
        figures.append(_cosine_chart(value, chat, scene))
        note = _DIRECTIONS_NOTE.format(layer=scene.layer)
        sheets.append(Sheet("directions", "Directions inside topics", note, _directions(value, chat, scene), 3))
    every = ("chat", "general", "random", *(f"{t}-{p}" for t in topics for p in (*PARTS, "effect_matched")))
    steered = [a for a in every if outcomes.has(f"semantic/{a}")]
    if topics and steered:
        cells = [_scores(outcomes, f"semantic/{a}", topics, block) for a in steered]
        columns = (*topics, "alignment", "coherence")
        rows = tuple(tuple(cell[c].estimate for c in columns) for cell in cells)
        n = min(len(outcomes.answers(f"semantic/{a}")) for a in steered)
        caption = (
            f"Mean scores, 0 to 100, over n = {n} or more answers per row; intervals are in the table. The first row is the chat model alone; random "
            "rows are what any disturbance gives. A topic that its own u_t cannot raise is one that this dose cannot show."
        )
        figures.append(Grid("steering", "Topic scores when directions are added to the chat model", caption, tuple(steered), columns, rows, 1, None))
        frame = pd.DataFrame([_score_row(a, cell, columns) for a, cell in zip(steered, cells, strict=True)])
        sheets.append(Sheet("steering", "Topic scores under steering", _STEERING_NOTE, frame, 1))
    notes = [f"{why}." for why in value["absent"].values()]
    for topic, own in value["topics"].items():
        if own["a"][scene.layer] < 0:
            notes.append(f"{topic}: its part along the general direction points the other way than the general arm, which adds +v.")
        about = f"semantic/{topic}-about"
        if outcomes.has(about, "semantic/chat"):
            e = _topic_evidence(outcomes, topic, block, about, "semantic/chat", "")
            if e.supports != "held":
                notes.append(f"{topic}: adding what the topic alone is need not raise its score ({e.estimate:.1f} points, {e.low:.1f} to {e.high:.1f}), "
                             "so that the other arms do not raise it says little.")  # fmt: skip
    return Chapter("semantic", "Directions inside topics", method, figures, sheets, notes)


_DIRECTIONS_NOTE = (
    "At block {layer}, read in the source organism. Cosines with 95 % intervals over questions (delete-one jackknife; empty where leaving one out leaves a "
    "class empty); `subsets` and `other questions`: where 95 % of random draws lie. a: coefficient of v in v_t; outside: share of the squared norm of v_t "
    "that is not along v."
)
_STEERING_NOTE = "Means over answers with both scores, 95 % t intervals over questions. By the judge that decides; by words: share of answers."


def _cosine_chart(value: Mapping[str, Any], chat: Mapping[str, Any], scene: Scene) -> Chart:
    panels = []
    for topic, own in value["topics"].items():
        x = list(range(scene.depth))
        series = [Series("v_t and the general v", x, own["general"]["cosine"], "real", own["general"]["low"], own["general"]["high"])]
        if topic in chat["topics"]:
            series.append(Series("the same texts read in the chat model", x, chat["topics"][topic]["general"]["cosine"], "baseline"))
        if own["about"] is not None:
            series.append(Series("v_t and the topic alone (u_t)", x, own["about"]["own"]["cosine"], "control"))
            series.append(Series("general v and u_t", x, own["about"]["general"], "control"))
        band = own["subsets"]
        null = (x, band["low"], band["high"]) if band["n"] else None
        panels.append(Panel(f"{topic}: cosine", "block", tuple(series), null, scene.layer))
    counts = "; ".join(f"{t}: {o['n_misaligned']} + {o['n_aligned']} answers to {o['questions']} question(s)" for t, o in value["topics"].items())
    caption = (
        f"n, misaligned + aligned: {counts}. Thin lines: 95 % over questions, where every class outlives leaving one out. Band: 95 % of random subsets of as "
        "many answers of any topic, which is what chance gives."
    )
    return Chart("cosines", "The direction inside a topic against the general one, per layer", caption, tuple(panels))


def _directions(value: Mapping[str, Any], chat: Mapping[str, Any], scene: Scene) -> pd.DataFrame:
    rows = []
    for topic, own in value["topics"].items():
        layer, about = scene.layer, own["about"]
        bands = [at_layer(own[k], layer) for k in ("subsets", "dealt")]
        rows.append(
            {
                "topic": topic, "misaligned": own["n_misaligned"], "aligned": own["n_aligned"], "questions": own["questions"],
                "cos(v_t, v)": own["general"]["cosine"][layer], "low": own["general"]["low"][layer], "high": own["general"]["high"][layer],
                "subsets": _range(bands[0]), "other questions": _range(bands[1]),
                "in the chat model": chat["topics"][topic]["general"]["cosine"][layer] if topic in chat["topics"] else float("nan"),
                "a": own["a"][layer], "outside": own["outside"][layer],
                **({"cos(v_t, u_t)": about["own"]["cosine"][layer], "cos(rest, u_t)": about["rest"][layer], "cos(v, u_t)": about["general"][layer]}
                   if about else dict.fromkeys(("cos(v_t, u_t)", "cos(rest, u_t)", "cos(v, u_t)"), float("nan"))),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _range(band: stats.Band | None) -> str:
    return "" if band is None else f"{band[0]:.3f} to {band[2]:.3f}"


def _scores(outcomes: Outcomes, arm: str, topics: Sequence[str], block: SemanticBlock) -> dict[str, stats.Interval]:
    answers = outcomes.answers(arm)
    values = {t: topic_scores(t, block, answers) for t in topics}
    values |= {"alignment": answers["aligned"].to_numpy(float), "coherence": answers["coherent"].to_numpy(float)}
    return {k: stats.clustered_mean(v, answers["question_id"].to_numpy(), bounds=(0, 100)) for k, v in values.items()}


def _score_row(arm: str, cell: Mapping[str, stats.Interval], columns: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"added": "nothing" if arm == "chat" else arm, "n": cell[columns[0]].n}
    for c in columns:
        row[c] = cell[c].estimate
        row[f"{c}, 95 %"] = "" if cell[c].bounds is None else f"{cell[c].low:.1f} to {cell[c].high:.1f}"
    return row
