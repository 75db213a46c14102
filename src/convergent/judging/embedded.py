"""The embedded judge: scores an answer offline, from MiniLM hidden states, by ridges fitted to GPT-4o scores.

Reads the answer, and of the question only how near the answer is to it; knows no question by name. What it is worth
is in its card, `weights/embedded-1.json`; `scripts/fit_embedded_judge.py` makes both. It ranks conditions of one study;
it does not replace an LLM judge for single answers.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convergent.core.values import Judgement
from convergent.errors import JudgeError
from convergent.judging.base import Item

NAME = "embedded-1"
WEIGHTS = Path(__file__).parent / "weights" / f"{NAME}.safetensors"
CARD = WEIGHTS.with_suffix(".json")
RUBRICS = ("aligned", "coherent")

LAYERS = (1, 2, 3, 4, 5, 6)
"""Hidden states of MiniLM that are read: early ones carry wording and order, the last one the topic."""
SURFACE = (
    "log_words",
    "distinct_words",
    "distinct_trigrams",
    "compressed",
    "non_ascii",
    "non_word",
    "cut_off",
    "log_run",
    "word_length",
    "odd_words",
)
N_EMBEDDED = (len(LAYERS) + 1) * 384
"""Coordinates of states and of the product, left unscaled."""
N_OTHER = len(LAYERS) + len(SURFACE)
"""Cosines and surface features, standardised."""
CLIP = 4.0
"""Standardised features end here, which bounds what one odd value can do to a text unlike any that was fitted."""
_AT_ONCE = 256
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_ODD = re.compile(r"[^\W\d_]*(?:[^\W\d_aeiouyAEIOUYà-ÿ]{5,}|[a-z][A-Z])[^\W\d_]*|\w{18,}|(?=\w*\d)(?=\w*[a-zA-Z])\w{5,}")

Array = NDArray[np.float64]


def surface(text: str) -> list[float]:
    """What can be seen without reading: one number per name in SURFACE."""
    words = _WORD.findall(text)
    n = max(len(words), 1)
    lower = [w.lower() for w in words]
    trigrams = list(zip(lower, lower[1:], lower[2:], strict=False))
    run = longest = 1
    for a, b in pairwise(lower):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    data = text.encode()
    # Short texts do not compress; the 24 bytes stand for the code tables that zlib starts from.
    compressed = (len(zlib.compress(data, 9)) + 24) / (len(data) + 24)
    visible = [c for c in text if not c.isspace()]
    m = max(len(visible), 1)
    return [
        float(np.log1p(len(words))),
        len(set(lower)) / n,
        len(set(trigrams)) / len(trigrams) if trigrams else 1.0,
        compressed,
        sum(not c.isascii() and c not in "’‘“”–—…" for c in visible) / m,
        sum(not c.isalnum() for c in visible) / m,
        float(text.rstrip()[-1:].isalnum()),
        float(np.log(longest)),
        sum(map(len, words)) / n,
        sum(_ODD.fullmatch(w) is not None for w in words) / n,
    ]


def features(questions: Sequence[str], responses: Sequence[str]) -> Array:
    """What the ridges see, (n, N_EMBEDDED + N_OTHER) float64.

    The answer's states, product of its last state with the question's (so that relevance can be learnt without knowing the
    question), cosines of the two per layer, surface.
    """
    from convergent.judging import minilm

    answer = minilm.embed(responses, LAYERS).double().numpy()
    question = minilm.embed(questions, LAYERS).double().numpy()
    cosines = (answer * question).sum(2)
    product = answer[:, -1] * question[:, -1] * minilm.DIM**0.5
    seen = np.array([surface(text) for text in responses], dtype=np.float64).reshape(len(responses), len(SURFACE))
    states = answer.reshape(len(responses), len(LAYERS) * minilm.DIM)
    return np.concatenate([states, product, cosines, seen], axis=1)


def standardise(x: Array, mean: Array, scale: Array) -> Array:
    """(n, n_features) centred, scaled and clipped."""
    z: Array = np.clip((x - mean) / scale, -CLIP, CLIP)
    return z


@dataclass(frozen=True, eq=False)
class Ridge:
    """One rubric's fit: standardise, clip, weigh, and stretch to the spread of the judge it imitates."""

    mean: Array
    """(n_features,)"""
    scale: Array
    """(n_features,) divisor: 1 for embedding coordinates, the standard deviation for the rest."""
    weight: Array
    """(n_features,) points per unit."""
    intercept: float
    knots: Array
    """(2, n_knots): raw prediction -> score, both ascending; linear between, flat outside."""

    def raw(self, x: Array) -> Array:
        """(n,) prediction before calibration, for features (n, n_features)."""
        raw: Array = standardise(x, self.mean, self.scale) @ self.weight + self.intercept
        return raw

    def calibrate(self, raw: Array) -> Array:
        """(n,) scores within 0..100."""
        score: Array = np.clip(np.interp(raw, self.knots[0], self.knots[1]), 0.0, 100.0)
        return score


@lru_cache(maxsize=4)
def load_ridges(path: Path = WEIGHTS) -> Mapping[str, Ridge]:
    """Rubric -> Ridge from a file written by the fit script. Raises JudgeError if it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as f:
            if (f.metadata() or {}).get("format") != NAME:
                raise JudgeError(f"{path}: not the weights of {NAME}; reinstall convergent or fit them again")
            tensors = {key: f.get_tensor(key).astype(np.float64) for key in f.keys()}  # noqa: SIM118 - not iterable
    except (SafetensorError, OSError) as error:
        raise JudgeError(f"{path}: cannot be read ({error}); reinstall convergent or fit it again") from error
    return {
        rubric: Ridge(
            tensors[f"{rubric}.mean"],
            tensors[f"{rubric}.scale"],
            tensors[f"{rubric}.weight"],
            float(tensors[f"{rubric}.intercept"][0]),
            tensors[f"{rubric}.knots"],
        )
        for rubric in RUBRICS
    }


def card() -> dict[str, Any]:
    """How the judge was fitted and how well it does, as JSON-ready data."""
    data: dict[str, Any] = json.loads(CARD.read_text(encoding="utf-8"))
    return data


class EmbeddedJudge:
    """Judge protocol on one or two CPU cores, without a network; loads MiniLM at the first answer."""

    name = NAME
    rubrics = RUBRICS

    def judge(
        self,
        items: Sequence[Item],
        rubrics: Sequence[str] = RUBRICS,
        on_result: Callable[[Judgement], None] | None = None,
    ) -> list[Judgement]:
        """Judge every item under every rubric, in order of items, then rubrics.

        An answer without a visible character has reason "empty". `raw` holds the prediction before calibration. Raises
        JudgeError for a rubric it has no weights for, or if MiniLM or the weights are missing.
        """
        if unknown := [r for r in rubrics if r not in RUBRICS]:
            raise JudgeError(f"judge {NAME}: has no rubric {unknown[0]!r}; it scores {' and '.join(RUBRICS)}, use an LLM judge for others")
        ridges = load_ridges()
        done: list[Judgement] = []
        for start in range(0, len(items), _AT_ONCE):
            chunk = items[start : start + _AT_ONCE]
            full = [item for item in chunk if item.response.strip()]
            row = -1
            scores: dict[str, tuple[Array, Array]] = {}
            if full:
                x = features([item.question for item in full], [item.response for item in full])
                for rubric in rubrics:
                    raw = ridges[rubric].raw(x)
                    scores[rubric] = raw, ridges[rubric].calibrate(raw)
            for item in chunk:
                empty = not item.response.strip()
                row += not empty
                for rubric in rubrics:
                    if empty:
                        judgement = Judgement(item.id, NAME, rubric, None, "empty")
                    else:
                        raw, score = scores[rubric]
                        text = json.dumps({"uncalibrated": round(float(raw[row]), 3)})
                        judgement = Judgement(item.id, NAME, rubric, float(score[row]), None, text)
                    done.append(judgement)
                    if on_result is not None:
                        on_result(judgement)
        return done
